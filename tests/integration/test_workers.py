"""How a training is computed does not change what it learns."""

from __future__ import annotations

import pytest
from conftest import Bench, facts

LORA = {"lora": {"rank": 4}}


def trained(bench: Bench, folder: str, **compute: object) -> dict[str, dict]:
    """Facts of a full and a LoRA fine-tuning, from one run with a store of its own."""

    def change(experiment: dict) -> None:
        experiment["stages"].pop("eval")
        full = {**experiment["stages"].pop("sft"), "epochs": 0.5}
        experiment["stages"] |= {"full": full, "lora": {**full, "tuner": LORA}}
        experiment["compute"] = {**experiment["compute"], **compute}

    bench.write(change)
    done = bench.tunery("run", str(bench.file), WANDB_MODE="disabled")
    assert done.returncode == 0, done.stdout + done.stderr
    made = {event["stage"]: event["facts"] for event in bench.events() if event["event"] == "stage_finished"}
    for path in bench.artifacts("sft"):
        path.rename(bench.folder / f"{folder}-{path.name}")
    return made


def test_one_worker_and_two_under_zero_3_learn_the_same(before_sft: Bench) -> None:
    alone = trained(before_sft, "alone", workers=1, zero_stage=0)
    sharded = trained(before_sft, "sharded", workers=2, zero_stage=3, micro_batch_size=1)
    assert facts(next(before_sft.folder.glob("sharded-sft-*")))["steps"] > 0
    for tuner in ("full", "lora"):
        for name in ("loss", "eval_loss"):
            assert sharded[tuner][name] == pytest.approx(alone[tuner][name], rel=1e-5), (tuner, name)
        same = ("rows", "tokens", "steps", "parameters", "trainable")
        assert {name: sharded[tuner][name] for name in same} == {name: alone[tuner][name] for name in same}
    assert alone["lora"]["trainable"] < alone["full"]["trainable"]
