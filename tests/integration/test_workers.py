"""Workers that stay alive between stages: what one stage leaves behind does not reach the next one, and failures."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle
from run_here import RunsHere
from workspace import Workspace

from tunery.errors import Stopped, TuneryError
from tunery.pipeline.diagnose import diagnose
from tunery.pipeline.run_context import RunContext
from tunery.spec import Compute
from tunery.store import Store
from tunery.workers.worker_group import WorkerGroup, WorkersFailed

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file

Report = Callable[[dict[str, float]], None]
TRAININGS: dict[str, dict[str, Any]] = {
    "first": {"kind": "sft", "model": "base"},
    "lora": {"kind": "sft", "model": "base", "tuner": {"lora": {"rank": 4, "dropout": 0.1}}},
    "policy": {
        "kind": "ppo",
        "model": "base",
        "reward": {"python": "reward.py"},
        "global_batch_size": 8,
        "epochs": 0.2,
        "sampling": {"max_new_tokens": 8},
    },
    "again": {"kind": "sft", "model": "base", "schedule_overrides": [{"after": 0.5, "learning_rate": 1.0e-3}]},
}
"""`again` has the values of `first`, written so that its cache key differs: the override changes nothing."""


@pytest.fixture
def group(runs_here: RunsHere) -> WorkerGroup:
    return runs_here.session.workers.group(runs_here.compute)


def process_ids(group: WorkerGroup) -> list[int]:
    """Ids of the worker processes, sent by rank 0."""

    def job(argument: None, report: Report) -> None:
        ids = [torch.zeros(1, dtype=torch.int64) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(ids, torch.tensor([os.getpid()]))
        report({str(rank): float(pid) for rank, pid in enumerate(ids)})

    reports: list[dict[str, float]] = []
    group.run(job, None, reports.append, 0)
    return [int(pid) for pid in reports[0].values()]


def tensor_bytes(group: WorkerGroup) -> float:
    """Bytes of all tensors that rank 0 keeps alive."""

    def job(argument: None, report: Report) -> None:
        gc.collect()
        storages = {}
        for item in gc.get_objects():
            if isinstance(item, torch.Tensor):
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        report({"bytes": float(sum(storages.values()))})

    reports: list[dict[str, float]] = []
    group.run(job, None, reports.append, 0)
    return reports[0]["bytes"]


def weights(artifact: Path) -> bytes:
    (file,) = artifact.rglob("*.safetensors")
    return file.read_bytes()


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_training_does_not_depend_on_those_before_it_and_its_memory_is_freed(
    zero_stage: int, runs_here: RunsHere, before_sft: Workspace
) -> None:
    (before_sft.folder / "reward.py").write_text(
        "def reward(prompts, responses):\n    return [len(r) for r in responses]\n"
    )

    def change(experiment: dict[str, Any]) -> None:
        sft = experiment["stages"].pop("sft")
        del experiment["stages"]["eval"]
        common = {key: sft[key] for key in ("data", "learning_rate", "global_batch_size")} | {"epochs": 0.5}
        experiment["stages"] |= {name: {**common, **fields} for name, fields in TRAININGS.items()}

    before_sft.write(change)
    group = runs_here.session.workers.group(runs_here.compute)
    pids = process_ids(group)
    before = tensor_bytes(group)
    artifacts = {name: item.path for name, item in runs_here.execute(before_sft, zero_stage=zero_stage).items()}
    assert weights(artifacts["first"]) == weights(artifacts["again"])
    assert weights(artifacts["first"]) != weights(artifacts["lora"])
    after = tensor_bytes(group)
    assert after <= before + 100_000, f"{after - before:,.0f} bytes of tensors were not freed"
    assert process_ids(group) == pids


def test_environment_random_state_and_defaults_are_reset_after_a_job(group: WorkerGroup) -> None:
    def state() -> dict[str, float]:
        return {
            "environment": float("LEFT_BEHIND" in os.environ),
            "random": random.random(),
            "numpy": float(np.random.rand()),
            "torch": float(torch.rand(())),
            "bits": float(torch.finfo(torch.get_default_dtype()).bits),
            "threads": float(torch.get_num_threads()),
            "gradients": float(torch.is_grad_enabled()),
        }

    def job(leave_behind: bool, report: Report) -> None:
        report(state())
        if leave_behind:
            os.environ["LEFT_BEHIND"] = "1"
            torch.set_default_dtype(torch.bfloat16)
            torch.set_num_threads(3)
            torch.set_grad_enabled(False)

    reports: list[dict[str, float]] = []
    for leave_behind in (True, False):
        group.run(job, leave_behind, reports.append, 0)
    assert reports[0] == reports[1]


def test_job_of_a_killed_worker_runs_again_in_new_processes(group: WorkerGroup, tmp_path: Path) -> None:
    def job(folder: Path, report: Report) -> None:
        rank = torch.distributed.get_rank()
        attempts = len(list(folder.glob(f"{rank}-*")))
        (folder / f"{rank}-{os.getpid()}").touch()
        if rank == 1 and attempts == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.barrier()
        report({"attempt": float(attempts)})

    old = process_ids(group)
    reports: list[dict[str, float]] = []
    group.run(job, tmp_path, reports.append, 1)
    assert reports == [{"attempt": 1.0}]
    assert not set(old) & set(process_ids(group))


def test_error_of_a_job_is_raised_and_the_next_job_runs(group: WorkerGroup) -> None:
    def job(argument: None, report: Report) -> None:
        raise TuneryError("no usable row", cause="all are too long", remedy="raise max_length")

    with pytest.raises(WorkersFailed) as raised:
        group.run(job, None, lambda metrics: None, 0)
    errors = [error for error in raised.value.worker_failures.values() if isinstance(error, TuneryError)]
    causes = [getattr(error, "_base_exc", error) for error in raised.value.worker_failures.values()]
    assert any(isinstance(error, TuneryError) and error.remedy == "raise max_length" for error in [*errors, *causes])
    assert len(process_ids(group)) == 2


def test_error_without_a_message_names_the_line_that_raised_it(group: WorkerGroup, before_sft: Workspace) -> None:
    def job(argument: None, report: Report) -> None:
        raise AssertionError  # as an assertion of a library

    with pytest.raises(WorkersFailed) as raised:
        group.run(job, None, lambda metrics: None, 0)
    run_context = RunContext(Store(before_sft.store), before_sft.run, before_sft.file)
    error = diagnose(raised.value, "sft", run_context)
    assert error.message.startswith("AssertionError: in job (")
    assert "raise AssertionError" in (before_sft.run / "logs" / "run-sft-error.txt").read_text()


def test_stop_keeps_the_workers(group: WorkerGroup) -> None:
    def job(argument: None, report: Report) -> None:
        raise Stopped("stopped at step 3")

    pids = process_ids(group)
    with pytest.raises(Stopped):
        group.run(job, None, lambda metrics: None, 0)
    assert process_ids(group) == pids


class Doubler:
    """Doubles numbers; the number 5 kills its worker twice, and -1 raises."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (number,), (crashes,) = batch["number"], batch["crashes"]
        if number == -1:
            raise TuneryError("a negative number", remedy="remove it")
        if number == 5 and crashes < 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"doubled": [2 * number], "crashes": [crashes], "pid": [os.getpid()]}


def test_task_that_kills_its_worker_is_repeated_and_no_result_is_lost(group: WorkerGroup, tmp_path: Path) -> None:
    results = list(group.map(Doubler, (tmp_path,), [{"number": n} for n in range(8)], 2))
    assert sorted(result["doubled"] for result in results) == [2 * n for n in range(8)]
    assert {result["doubled"]: result["crashes"] for result in results if result["crashes"]} == {10: 2}
    with pytest.raises(WorkersFailed):
        list(group.map(Doubler, (tmp_path / "other",), [{"number": 5}], 1))
    assert len(process_ids(group)) == 2


def test_error_of_a_task_is_raised_and_keeps_the_workers(group: WorkerGroup, tmp_path: Path) -> None:
    pids = process_ids(group)
    with pytest.raises(TuneryError, match="a negative number") as raised:
        list(group.map(Doubler, (tmp_path,), [{"number": -1}, {"number": 1}, {"number": 2}], 0))
    assert raised.value.remedy == "remove it"
    results = list(group.map(Doubler, (tmp_path,), [{"number": n} for n in range(4)], 0))
    assert {result["pid"] for result in results} <= set(pids)


def test_group_is_replaced_when_other_resources_are_needed(runs_here: RunsHere) -> None:
    workers = runs_here.session.workers
    two = workers.group(runs_here.compute)
    assert workers.running(runs_here.compute) is two
    one = workers.group(Compute(workers=1, device="cpu"))
    assert len(process_ids(one)) == 1
    assert workers.running(runs_here.compute) is None
