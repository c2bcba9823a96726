"""A training in a pack gives the same model as the same training alone."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from workspace import Workspace, facts

from tunery.errors import StageError
from tunery.spec import Compute, Sft
from tunery.training.job import Job, RowSource
from tunery.training.packed.pack import ADAPTER_STATE_BYTES, Pack

TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "other_rank": {"learning_rate": 5e-3, "tuner": {"lora": {"rank": 8, "alpha": 4}}},
    "large_batches": {
        "global_batch_size": 12,
        "epochs": 3,
        "schedule": "linear",
        "weight_decay": 0.1,
        "schedule_overrides": [
            {"after": 0.3, "learning_rate": 2e-3},
            {"after": 0.6, "weight_decay": 1.0, "learning_rate": 1e-3},
        ],
    },
    "few_layers": {
        "global_batch_size": 2,
        "epochs": 0.4,
        "max_grad_norm": 0.1,
        "warmup": 0.2,
        "max_length": 96,
        "seed": 5,
        "tuner": {"lora": {"rank": 2, "target_modules": ["q_proj", "v_proj"]}},
    },
}
"""By name, the fields that differ from the first training."""


def stages(experiment: dict) -> None:
    sft = {**experiment["stages"].pop("sft"), "epochs": 1, "num_evals": 3, "tuner": {"lora": {"rank": 4}}}
    experiment["stages"].pop("eval")
    experiment["stages"] |= {name: {**sft, **changed} for name, changed in TRAININGS.items()}
    experiment["compute"] = {"workers": 1}


def job_of(bench: Workspace, name: str, folder: Path, **changed: Any) -> Job:
    experiment: dict[str, Any] = {}
    bench.write(lambda written: experiment.update(written) or stages(experiment))
    spec = Sft.model_validate_json(json.dumps({**experiment["stages"][name], **changed}))
    measured = next(path for path in bench.artifacts("dataset") if facts(path)["rows"] == 30)
    work = folder / name
    (work / "out").mkdir(parents=True)
    return Job(
        stage=name,
        trial=name,
        spec=spec,
        seed=spec.seed or 17,
        model={"artifact": str(bench.only("pretrain"))},
        data=(RowSource(bench.only("select")),),
        eval_data=(RowSource(measured),),
        out=work / "out",
        staging_dir=work,
        store=work,
        events=folder / "events",
        compute=Compute(workers=1, device="cpu", save_steps=8),
        started_at=time.time(),
    )


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_packed_trainings_equal_solo_trainings(before_sft: Workspace, tmp_path: Path) -> None:
    before_sft.write(stages)
    alone = before_sft.without_ray(before_sft.store)
    jobs = {name: job_of(before_sft, name, tmp_path / "packed") for name in TRAININGS}
    reports: dict[str, list[float]] = {name: [] for name in TRAININGS}

    def listening(name: str) -> Any:
        return lambda metrics: reports[name].append(metrics[f"{name}.eval_loss"])

    pack = Pack(jobs["plain"].model, "cpu", "fp32", budget=700)  # so that a step has several microbatches
    members = {name: pack.join(jobs[name], listening(name)) for name in TRAININGS if name != "large_batches"}
    step = 0
    while pack.members:
        pack.step()
        step += 1
        if step == 5:
            members["large_batches"] = pack.join(jobs["large_batches"], listening("large_batches"))
        if step == 10:
            pack.leave(members["plain"])
        if step == 14:  # normally in another process
            members["plain"] = pack.join(jobs["plain"], listening("plain"))
            assert members["plain"].loop.resumed_from == 10
    for name, solo in alone.items():
        if name not in TRAININGS:
            continue
        theirs, ours = curve(Path(solo["path"])), curve(jobs[name].out)
        assert [sorted(point) for point in ours] == [sorted(point) for point in theirs]
        for expected, point in zip(theirs, ours, strict=True):
            assert point == pytest.approx(expected, rel=1e-5, abs=1e-9), name
        result = json.loads((jobs[name].staging_dir / "outcome.json").read_text())["facts"]
        expected = {key: solo["facts"][key] for key in result}
        numbers = {key for key, value in expected.items() if isinstance(value, int | float)}
        assert {key: result[key] for key in numbers} == pytest.approx({key: expected[key] for key in numbers}, rel=1e-5)
        assert {key: result[key] for key in result.keys() - numbers} == {
            key: expected[key] for key in expected.keys() - numbers
        }
        heard = list(dict.fromkeys(reports[name]))  # the resumed training reports some evaluations again
        assert heard == [point["eval_loss"] for point in ours if "eval_loss" in point][:-1]
        adapters = [Path(solo["path"]) / "adapter", jobs[name].out / "adapter"]
        files = [{path.name for path in folder.iterdir()} for folder in adapters]
        assert files[0] == files[1]
        for file in files[0] - {"adapter_model.safetensors"}:
            assert (adapters[0] / file).read_bytes() == (adapters[1] / file).read_bytes(), file
        expected_weights, weights = (load_file(folder / "adapter_model.safetensors") for folder in adapters)
        assert weights.keys() == expected_weights.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(weight, expected_weights[key], rtol=1e-3, atol=2e-5)
        assert (jobs[name].out / "base.json").read_bytes() == (Path(solo["path"]) / "base.json").read_bytes()


def test_diverged_pack_member_fails_without_affecting_the_others(before_sft: Workspace, tmp_path: Path) -> None:
    def losses(wild: bool) -> list[float]:
        folder = tmp_path / str(wild)
        pack = Pack(job_of(before_sft, "plain", folder / "source").model, "cpu", "fp32")
        members = [pack.join(job_of(before_sft, "plain", folder), lambda metrics: None)]
        if wild:
            changed = {"learning_rate": 1e38, "max_grad_norm": 1e9, "schedule": "constant", "warmup": 0}
            members.append(pack.join(job_of(before_sft, "other_rank", folder, **changed), lambda metrics: None))
        while pack.members:
            pack.step()
        assert members[0].error is None
        if wild:
            assert "the training diverged at step" in str(members[1].error)
            assert not any((folder / "other_rank" / "out").iterdir())
            assert not (folder / "other_rank" / "outcome.json").exists()
        return [point["loss"] for point in curve(folder / "plain" / "out") if "loss" in point]

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)


def test_adapter_on_the_head_is_rejected_before_training(before_sft: Workspace, tmp_path: Path) -> None:
    job = job_of(before_sft, "plain", tmp_path, tuner={"lora": {"rank": 4, "target_modules": ["q_proj", "lm_head"]}})
    pack = Pack(job.model, "cpu", "fp32")
    with pytest.raises(StageError, match="on the head"):
        pack.join(job, lambda metrics: None)
    assert pack.members == []
    whole = dataclasses.replace(job, spec=job_of(before_sft, "few_layers", tmp_path).spec)
    pack.join(whole, lambda metrics: None)
    pack.step()


def test_pack_size_is_limited_by_memory(before_sft: Workspace, tmp_path: Path) -> None:
    jobs = {name: job_of(before_sft, name, tmp_path) for name in ("plain", "large_batches", "other_rank")}
    numbers = sum(
        (module.in_features + module.out_features) * 8  # times the largest rank: smaller adapters are padded to it
        for name, module in Pack(jobs["plain"].model, "cpu", "fp32")._model.named_modules()
        if name.endswith("_proj")
    )
    pack = Pack(jobs["plain"].model, "cpu", "fp32", free_memory=lambda device: 2.5 * numbers * ADAPTER_STATE_BYTES)
    members = {name: pack.join(job, lambda metrics: None) for name, job in jobs.items()}
    assert members["plain"] is not None
    assert members["large_batches"] is not None
    assert members["other_rank"] is None
    pack.step()
    pack.leave(members["plain"])
    assert pack.join(jobs["other_rank"], lambda metrics: None) is not None


def test_model_without_packed_attention_learns_the_same(before_sft: Workspace, tmp_path: Path) -> None:
    result: dict[bool, list[list[dict[str, float]]]] = {}
    for beside in (True, False):
        names = ("plain", "large_batches", "few_layers")
        jobs = [job_of(before_sft, name, tmp_path / str(beside)) for name in names]
        pack = Pack(jobs[0].model, "cpu", "fp32", budget=700)
        if not beside:
            pack._attention = None
            pack._model.set_attn_implementation("sdpa")
        members = [pack.join(job, lambda metrics: None) for job in jobs]
        while pack.members:
            pack.step()
        result[beside] = [member.loop.history for member in members if member is not None]
    assert [len(history) for history in result[True]] == [len(history) for history in result[False]]
    for one, other in zip(*result.values(), strict=True):
        for point, same in zip(one, other, strict=True):
            assert point == pytest.approx(same, rel=1e-5)
