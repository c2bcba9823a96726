"""Win rates and forgetting of pretrained models, with two workers and in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_here import RunsHere
from small_classifiers import write_language_model, write_reward_model
from workspace import Workspace, facts

REWARD = """
def reward(prompts, responses):
    return [len(set(response)) for response in responses]
"""


@pytest.fixture
def bench(tmp_path: Path) -> Workspace:
    """No training: two models with random weights, a reward model as judge, and a judge in Python."""
    actual = Workspace(tmp_path)
    write_language_model(actual.folder / "before")
    write_language_model(actual.folder / "after", seed=1)
    write_reward_model(actual.folder / "rater", pad=0)
    (actual.folder / "rules.py").write_text(REWARD)

    def change(experiment: dict) -> None:
        # More prompts than one part of a shard has (evaluation/generate_responses.py).
        prompts = {**experiment["stages"]["questions"], "limit": 300, "corrupt_fraction": 0.0}
        compared = {
            "kind": "win_rate",
            "models": [{"pretrained": "./after"}],
            "baseline": {"pretrained": "./before"},
            "data": "prompts",
            "sampling": {"max_new_tokens": 8},
            "max_length": 62,
        }
        models = [{"pretrained": "./before"}, {"pretrained": "./after"}]
        experiment["stages"] = {
            "prompts": prompts,
            "by_model": {**compared, "judge": {"pretrained": "./rater"}},
            "by_rules": {**compared, "judge": {"python": "rules.py"}},
            "eval": {"kind": "evaluate", "models": models, "data": {"prompts": "prompts"}, "baseline": models[0]},
        }

    actual.write(change)
    return actual


def test_win_rate_does_not_depend_on_workers_and_a_failing_judge_is_reported(
    bench: Workspace, runs_here: RunsHere
) -> None:
    done = runs_here.tunery(bench, "run", str(bench.file))
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("Win rates", "rules.py", "rater", "forgetting"):
        assert words in done.stdout
    alone = bench.without_ray(bench.folder / "alone")
    by_stage = {event["stage"]: event for event in bench.events() if event["event"] == "stage_finished"}
    for name in ("by_model", "by_rules"):
        output = by_stage[name]["facts"]
        assert all(output[key] == alone[name]["facts"][key] for key in ("results", "responses"))
        (result,) = output["results"]
        assert result["rows"] + sum(result["left_out"].values()) == 300
        assert 0 < result["left_out"]["too_long"] < 100
        assert sum(result["outcomes"].values()) == result["rows"]
        both = [Path(path) / "responses.jsonl" for path in (by_stage[name]["artifact"], alone[name]["path"])]
        assert both[0].read_text() == both[1].read_text()
    before, after = by_stage["eval"]["facts"]["results"]
    assert (before["forgetting"], after["forgetting"]) == (0, after["loss"] / before["loss"] - 1)
    planned = json.loads(bench.tunery("plan", str(bench.file), "--json").stdout)["stages"]
    assert {stage["name"]: (stage["rows"], stage["reused"]) for stage in planned} == {
        "prompts": (300, True), "by_model": (600, True), "by_rules": (600, True), "eval": (600, True)}  # fmt: skip

    (bench.folder / "rules.py").write_text("def reward(prompts, responses):\n    return responses\n")
    failed = runs_here.tunery(bench, "run", str(bench.file))
    assert failed.returncode == 1
    assert "the reward `reward` of rules.py gave" in failed.stdout + failed.stderr
    assert "a reward is a finite number" in failed.stdout + failed.stderr
    assert len(bench.artifacts("win_rate")) == 2
    assert all(facts(path)["results"] for path in bench.artifacts("win_rate"))
