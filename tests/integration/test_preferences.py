"""Reward models and preference optimization give the same result with any number of workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_here import RunsHere
from small_classifiers import write_language_model
from workspace import Workspace

COMMON = {"model": {"pretrained": "./base"}, "learning_rate": 0.001, "max_length": 64, "num_evals": 2}
LORA = {"lora": {"rank": 4}}
COLOURS = ("red", "green", "blue", "one", "two", "three")


@pytest.fixture
def bench(tmp_path: Path) -> Workspace:
    write_language_model(tmp_path / "base")
    pairs = [
        {"prompt": f"what is {first} {second}", "chosen": f"the {first} row", "rejected": f"no {second} model is it"}
        for first in COLOURS
        for second in COLOURS
        if first != second
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return Workspace(tmp_path)


def write(bench: Workspace, trainings: dict[str, dict], **compute: object) -> None:
    """Write an experiment with these trainings; the first pairs are for training, the last ones for evaluation."""

    def change(experiment: dict) -> None:
        pairs = {"kind": "dataset", "source": "pairs.jsonl"}
        experiment["stages"] = {
            "data": {**pairs, "split": "train", "eval_fraction": 0.2},
            "held_out": {**pairs, "split": "test", "eval_fraction": 0.2},
            **{
                name: {"data": "data", "eval_data": "held_out", **COMMON, **fields}
                for name, fields in trainings.items()
            },
        }
        experiment["compute"] = compute

    bench.write(change)


def test_preferences_are_learned_the_same_by_one_worker_and_by_two(bench: Workspace, runs_here: RunsHere) -> None:
    trainings = {
        "dpo": {"kind": "dpo", "epochs": 1.5, "global_batch_size": 4},
        "dpo_lora": {"kind": "dpo", "epochs": 1, "global_batch_size": 4, "tuner": LORA, "label_smoothing": 0.1},
        "kto": {"kind": "kto", "epochs": 1, "global_batch_size": 8},
    }
    write(bench, trainings, workers=1, zero_stage=0)
    alone = {name: item["facts"] for name, item in bench.without_ray(bench.folder / "alone").items()}
    write(bench, trainings, workers=2, zero_stage=3, micro_batch_size=1)
    sharded = {name: item.facts for name, item in runs_here.execute(bench).items()}
    for name in trainings:
        for fact in ("loss", "eval_loss", "eval_margin"):
            assert sharded[name][fact] == pytest.approx(alone[name][fact], rel=1e-4, abs=1e-6), (name, fact)
        same = ("rows", "sequences", "tokens", "steps", "trainable")
        assert {fact: sharded[name][fact] for fact in same} == {fact: alone[name][fact] for fact in same}
    assert sharded["dpo"]["eval_accuracy"] == alone["dpo"]["eval_accuracy"] == 1.0
    assert alone["dpo_lora"]["trainable"] < alone["dpo"]["trainable"]
    assert alone["kto"]["eval_margin"] > 0.1


REWARD = """
def reward(prompts: list[str], responses: list[str]) -> list[float]:
    assert all(prompt.startswith("what is") for prompt in prompts)
    return [response.count("e") for response in responses]
"""
GROUPS = {"sampling": {"min_new_tokens": 6, "max_new_tokens": 6}, "group_size": 8, "global_batch_size": 32}


def curve(made: dict, name: str) -> list[float]:
    lines = (Path(made["path"]) / "history.jsonl").read_text().splitlines()
    return [point[name] for line in lines if name in (point := json.loads(line))]


def test_group_rl_raises_the_reward_of_a_function(bench: Workspace) -> None:
    (bench.folder / "reward.py").write_text(REWARD)
    common = {"reward": {"python": "reward.py"}, "learning_rate": 0.03, **GROUPS}
    trainings = {
        "grpo": {"kind": "grpo", "epochs": 3, "iterations": 2, **common},
        "rloo": {"kind": "rloo", "epochs": 2, "beta": 0.01, "tuner": LORA, **common},
    }
    write(bench, trainings, workers=1, zero_stage=0, micro_batch_size=16)
    built = bench.without_ray(bench.folder / "alone")
    assert [built[name]["facts"]["steps"] for name in trainings] == [24, 8]
    for name in trainings:
        rewards, held_out = curve(built[name], "reward"), curve(built[name], "eval_reward")
        assert built[name]["facts"]["reward"] > 2 * rewards[0], (name, rewards)
        assert built[name]["facts"]["eval_reward"] == held_out[-1] > held_out[0], (name, held_out)
        assert set(curve(built[name], "response_length")) == {6.0}
    assert curve(built["rloo"], "kl")[0] == pytest.approx(0, abs=1e-6), "the reference is where it began"
    clipped = curve(built["grpo"], "clip_fraction")
    assert max(clipped[0::2]) == 0, "the first step on new answers has a ratio of 1"
    assert max(clipped[1::2]) > 0
