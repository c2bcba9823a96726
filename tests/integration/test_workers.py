"""Workers, ZeRO stage and micro batch size do not change the result of a training."""

from __future__ import annotations

import shutil

import pytest
from workspace import Workspace

LORA = {"lora": {"rank": 4}}


def two_trainings(bench: Workspace, **compute: object) -> None:
    """Write an experiment whose last stages are a full and a LoRA fine-tuning."""

    def change(experiment: dict) -> None:
        experiment["stages"].pop("eval")
        full = {**experiment["stages"].pop("sft"), "epochs": 0.5}
        experiment["stages"] |= {"full": full, "lora": {**full, "tuner": LORA}}
        experiment["compute"] = {**experiment["compute"], **compute}

    bench.write(change)


def test_one_worker_and_two_under_zero_3_learn_the_same(before_sft: Workspace) -> None:
    two_trainings(before_sft, workers=1, zero_stage=0)
    shutil.copytree(before_sft.store, before_sft.folder / "alone")
    alone = {name: made["facts"] for name, made in before_sft.without_ray(before_sft.folder / "alone").items()}
    two_trainings(before_sft, workers=2, zero_stage=3, micro_batch_size=1)
    done = before_sft.tunery("run", str(before_sft.file), WANDB_MODE="disabled")
    assert done.returncode == 0, done.stdout + done.stderr
    sharded = {event["stage"]: event["facts"] for event in before_sft.events() if event["event"] == "stage_finished"}
    for tuner in ("full", "lora"):
        for name in ("loss", "eval_loss"):
            assert sharded[tuner][name] == pytest.approx(alone[tuner][name], rel=1e-5), (tuner, name)
        same = ("rows", "tokens", "steps", "parameters", "trainable")
        assert {name: sharded[tuner][name] for name in same} == {name: alone[tuner][name] for name in same}
    assert alone["lora"]["trainable"] < alone["full"]["trainable"]
