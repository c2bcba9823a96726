"""Population based training: copies resume from checkpoints of the best trials, and end as if trained from scratch."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from run_here import RunsHere
from workspace import Workspace, facts, wait_for


def bred(experiment: dict[str, Any]) -> None:
    """Change the experiment to a search of four LoRA trials that fit in one pack."""
    experiment["stages"]["sft"] |= {"tuner": {"lora": {"rank": 4}}, "epochs": 2, "num_evals": 4}
    experiment["stages"].pop("eval")
    experiment["compute"] |= {"max_packed_trials": 4}
    experiment["search"] = {
        "metric": "sft.eval_loss",
        "mode": "min",
        "trials": 4,
        "scheduler": "pbt",
        "space": {"sft.learning_rate": {"loguniform": [1e-4, 1e-2]}, "sft.weight_decay": {"uniform": [0.0, 0.1]}},
    }


def trials_of(bench: Workspace) -> dict[str, dict[str, Any]]:
    (search,) = bench.artifacts("search")
    return {trial["trial"]: trial for trial in facts(search)["trials"]}


def test_pbt_children_resume_from_checkpoints_and_equal_training_from_scratch(
    before_sft: Workspace, tmp_path: Path, runs_here: RunsHere
) -> None:
    before_sft.write(bred)
    other = Workspace(tmp_path / "other")
    other.folder.mkdir()
    shutil.copytree(before_sft.store, other.store)

    first = before_sft.start()
    started = lambda: [  # noqa: E731
        event for event in before_sft.events() if event["event"] == "trial_started" and event["origin"] == "pbt_child"
    ]
    wait_for(lambda: (before_sft.run / "events").is_dir() and started(), process=first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = before_sft.tunery("run", str(before_sft.file))
    assert done.returncode == 0, done.stdout + done.stderr
    trials = trials_of(before_sft)
    children = [trial for trial in trials.values() if trial["origin"] == "pbt_child"]
    assert len(children) == 3, "one at each evaluation but the last"
    assert sum(trial["state"] == "done" for trial in trials.values()) >= 4
    assert not [*(before_sft.store / "work").glob("*")], "checkpoints were left behind"

    # Without packing, with room for two trials: members wait at each evaluation until all have reached it.
    def in_turn(experiment: dict[str, Any]) -> None:
        bred(experiment)
        experiment["compute"]["max_packed_trials"] = 1

    other.write(in_turn)
    again = runs_here.tunery(other, "run", str(other.file))
    assert again.returncode == 0, again.stdout + again.stderr
    same = trials_of(other)
    assert {trial["trial"] for trial in children} == {
        name for name, trial in same.items() if trial["origin"] == "pbt_child"
    }
    for name, trial in same.items():
        if "done" == trial["state"] == trials[name]["state"]:
            assert trial["values"] == pytest.approx(trials[name]["values"], rel=1e-5)
    resumed = {json.loads((path / "runtime_stats.json").read_text())["resumed_from"] for path in other.artifacts("sft")}
    assert any(resumed), "nothing went on from a checkpoint"

    # A training from scratch with the values of the best copy, written as in an experiment file.
    last = next(trial for trial in children if trial["state"] == "done")

    def written(experiment: dict[str, Any]) -> None:
        bred(experiment)
        experiment.pop("search")
        experiment["stages"]["sft"] |= {path.removeprefix("sft."): value for path, value in last["overrides"].items()}

    whole = Workspace(tmp_path / "whole")
    whole.folder.mkdir()
    whole.write(written)
    shutil.copytree(other.store, whole.store, ignore=shutil.ignore_patterns("runs"))
    for item in whole.artifacts("sft"):
        shutil.rmtree(item)
    alone = runs_here.tunery(whole, "run", str(whole.file))
    assert alone.returncode == 0, alone.stdout + alone.stderr
    (model,) = whole.artifacts("sft")
    assert json.loads((model / "runtime_stats.json").read_text())["resumed_from"] == 0
    assert facts(model)["eval_loss"] == pytest.approx(last["value"], rel=1e-5)
    # The packed and the unpacked training have the same artifact.
    for store in (other.store, before_sft.store):
        assert facts(store / "artifacts" / model.name)["loss"] == pytest.approx(facts(model)["loss"], rel=1e-5)
    curves = [
        {
            (point["step"]): point["eval_loss"]
            for point in map(json.loads, (store / "artifacts" / model.name / "history.jsonl").read_text().splitlines())
            if "eval_loss" in point
        }
        for store in (whole.store, before_sft.store)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert len(curves[0]) == 4
