"""How a training is computed does not change what it learns."""

from __future__ import annotations

import pytest
from conftest import Bench, facts

LORA = {"lora": {"rank": 4}}


def trained(bench: Bench, tuner: object, **compute: object) -> dict:
    def change(experiment: dict) -> None:
        experiment["stages"].pop("eval")
        experiment["stages"]["sft"] |= {"tuner": tuner, "epochs": 0.5}
        experiment["compute"] = {**experiment["compute"], **compute}

    bench.write(change)
    done = bench.tunery("run", str(bench.file), WANDB_MODE="disabled")
    assert done.returncode == 0, done.stdout + done.stderr
    return facts(bench.only("sft"))


@pytest.mark.parametrize("tuner", ["full", LORA], ids=["full", "lora"])
def test_one_worker_and_two_under_zero_3_learn_the_same(before_sft: Bench, tuner: object) -> None:
    import shutil

    alone = trained(before_sft, tuner, workers=1, zero_stage=0)
    shutil.rmtree(before_sft.only("sft"))
    sharded = trained(before_sft, tuner, workers=2, zero_stage=3, micro_batch_size=1)
    for name in ("loss", "eval_loss"):
        assert sharded[name] == pytest.approx(alone[name], rel=1e-5), name
    same = ("rows", "tokens", "steps", "parameters", "trainable")
    assert {name: sharded[name] for name in same} == {name: alone[name] for name in same}
