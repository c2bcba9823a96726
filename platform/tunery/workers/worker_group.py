"""The worker processes of a run: one group of Ray Train workers that stays alive between stages.

Starting a group takes 20 to 40 s on two cores, nearly all of it for imports of torch, transformers, TRL and DeepSpeed.
The group starts in the background while the first stages run, and later stages use the same group
(benchmarks/stage_starts.py).

One `TorchTrainer.fit()` lasts as long as the group. Its train function (serve.py) is a loop that takes work from a
queue actor (job_queue.py): a job, such as a training, runs on all ranks; a task, such as scoring a shard, on one. If a
worker dies, Ray Train restarts all of them. The job is then called again up to `max_failures` times
(`compute.max_failures`) and resumes from its last checkpoint; interrupted tasks are repeated. The death of a node, such
as its preemption, is not counted as a failure of the job or a crash of the task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tunery.errors import Stopped, TuneryError
from tunery.interrupt import BackgroundCall, interruptible
from tunery.spec import Compute
from tunery.workers.cluster_resources import (
    dead_nodes,
    describe_nodes,
    describe_workers,
    free_resources,
    on_this_node,
)
from tunery.workers.job_queue import JobQueue, JobUpdate, TaskResult
from tunery.workers.map_tasks import Task
from tunery.workers.pickling import dumps, loads
from tunery.workers.serve import WorkerConfig, serve

CLOSE_SECONDS = 30.0
"""How long `close` waits for the workers to finish their current job or task and exit."""
WAIT_SECONDS = 10.0
"""Interval of the messages about workers that have not started. Starting takes longer than the first."""
Waiting = Callable[[str], None]
"""Called with a message about what the workers wait for."""


class WorkersFailed(Exception):
    """Workers raised errors or died, more often than allowed. `worker_failures`: the last error of each rank."""

    def __init__(self, worker_failures: dict[int, Exception]) -> None:
        failures = [f"rank {rank}: {type(error).__name__}: {error}" for rank, error in worker_failures.items()]
        super().__init__("; ".join(failures))
        self.worker_failures = worker_failures
        self.__cause__ = next(iter(worker_failures.values()))

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkersFailed, (self.worker_failures,)


class WorkerGroup:
    """`compute.workers` processes, each with its CPUs and, if `compute.device` is gpu, one GPU."""

    def __init__(self, compute: Compute, logs: Path, preload: Sequence[str] = ()) -> None:
        """Start the workers in the background.

        compute: resources, without `auto`; logs: folder for the state of Ray Train; preload: modules that the workers
        import first.
        """
        import ray

        assert compute.workers != "auto", "resolved"
        self.compute = compute
        self.num_workers = compute.workers
        actor: Any = ray.remote(JobQueue)
        options = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": on_this_node()}
        self._queue: Any = actor.options(**options).remote(self.num_workers)
        self._workers = BackgroundCall(lambda: self._run_workers(logs, tuple(preload)))

    @property
    def is_alive(self) -> bool:
        """Whether the workers are running or starting."""
        return not self._workers.ended

    def matches(self, compute: Compute) -> bool:
        """Whether the group is alive and has the resources of `compute`."""
        resources = (self.compute.workers, self.compute.device, self.compute.cpus_per_worker)
        return self.is_alive and resources == (compute.workers, compute.device, compute.cpus_per_worker)

    def run(
        self,
        function: Callable[[Any, Callable[[dict[str, float]], bool | None]], None],
        argument: Any,
        report: Callable[[dict[str, float]], object],
        max_failures: int,
        waiting: Waiting = lambda message: None,
    ) -> None:
        """Call `function(argument, report)` on all workers and wait for its end. The reports of rank 0 are passed to
        `report` in this process. If that raises, the report returns True to rank 0, which should then make all ranks
        raise Stopped.

        If a worker dies or raises an error, all workers restart and call the function again, up to `max_failures`
        times. Raises WorkersFailed after that, or after a TuneryError, which another attempt would raise again; and
        Stopped if the workers have raised it.
        """
        self._call(self._queue.submit_job, dumps((function, argument)), max_failures)
        attempts, num_processed = 1, 0
        started = time.monotonic()
        while True:
            try:
                update: JobUpdate = self._call(self._queue.job_update, attempts, num_processed)
                attempts = update.attempts
                if not num_processed and not update.reports:
                    started = self._report_waiting(waiting, started)
                for metrics in update.reports:
                    report(metrics)
                    num_processed += 1
            except BaseException:  # Tune raises SystemExit in the report of a trial that it stops
                self._queue.cancel_job.remote()
                raise
            if update.state == "stopped":
                raise Stopped("stopped while it trained")
            if update.state == "failed":
                raise WorkersFailed(loads(update.errors))
            if update.state == "done":
                return

    def map(
        self,
        callable_class: type,
        constructor_args: tuple[Any, ...],
        tasks: Sequence[Task],
        max_crashes: int,
        waiting: Waiting = lambda message: None,
    ) -> Iterator[Task]:
        """Construct `callable_class(*constructor_args)` once per worker, call it with a batch {column: [value]} per
        task, and yield the results in order of completion. It is a callable class as for `map_batches` of Ray Data.

        A task whose worker died is repeated up to `max_crashes` times; its column `crashes` has the number of deaths.
        Raises the error of the first task that failed.
        """
        self._call(self._queue.submit_tasks, dumps((callable_class, constructor_args)), list(tasks), max_crashes)
        remaining = len(tasks)
        started = time.monotonic()
        try:
            while remaining:
                results: list[TaskResult] = self._call(self._queue.task_results)
                if not results and remaining == len(tasks):
                    started = self._report_waiting(waiting, started)
                for result in results:
                    remaining -= 1
                    if result.error:
                        error = loads(result.error)
                        raise WorkersFailed(error) if isinstance(error, dict) else error
                    yield loads(result.result)
        finally:
            if remaining:  # the caller has stopped early, or a task has failed
                self._queue.submit_tasks.remote(b"", [], 0)

    def _report_waiting(self, waiting: Waiting, since: float) -> float:
        """Call `waiting` if WAIT_SECONDS have passed `since` and workers have not started. Return the new `since`."""
        if time.monotonic() - since < WAIT_SECONDS:
            return since
        if self._call(self._queue.num_joined) < self.num_workers:
            compute = self.compute
            free = describe_nodes(free_resources(), compute.device)
            waiting(
                f"waiting for {describe_workers(self.num_workers, compute.device, compute.cpus_per_worker)} to start; "
                f"free now: {free}"
            )
        return time.monotonic()

    def close(self) -> None:
        """Make the workers exit and wait until their resources are free."""
        self._queue.close.remote()
        self._workers.wait(CLOSE_SECONDS)

    def _call(self, method: Any, *arguments: Any) -> Any:
        """Call a method of the queue and wait for its result. If the workers have exited, raise the error that ended
        them."""
        import ray

        if self._workers.ended:
            self._workers.result()
            raise RuntimeError("the workers have exited")
        return interruptible(lambda: ray.get(method.remote(*arguments)))

    def _run_workers(self, logs: Path, preload: tuple[str, ...]) -> None:
        """Start the workers and wait for their end."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        compute = self.compute
        gpu = compute.device == "gpu"
        trainer = TorchTrainer(
            serve,
            train_loop_config={"worker": WorkerConfig(self._queue, compute.device, compute.cpus_per_worker, preload)},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=self.num_workers,
                use_gpu=gpu,
                resources_per_worker={"CPU": compute.cpus_per_worker} | ({"GPU": 1} if gpu else {}),
            ),
            run_config=RunConfig(
                # With an existing name, Ray Train would resume from its own state. Our checkpoints are in the store.
                name=f"workers-{time.time_ns()}",
                storage_path=str(logs / "ray-train"),
                # No limit here: the queue counts the failures of each job.
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=3),
                callbacks=[_failure_callback(self._queue)],
            ),
        )
        trainer.fit()


def _failure_callback(queue: Any) -> Any:
    """Return a callback for Ray Train's controller that passes the errors of workers to the queue."""
    from ray.train import UserCallback

    class FailureCallback(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            import ray

            nodes = ray.get(queue.nodes.remote())
            died = {rank: nodes.get(rank, "") for rank, error in worker_exceptions.items() if _has_died(error)}
            dead = dead_nodes({*died.values()} - {""})  # "": it died before it joined the queue
            node_died = [rank for rank, node in died.items() if node in dead]
            is_final = any(isinstance(_cause(error), TuneryError) for error in worker_exceptions.values())
            ray.get(queue.fail.remote(list(worker_exceptions), dumps(worker_exceptions), node_died, is_final))

    return FailureCallback()


def _cause(error: Exception) -> Exception:
    """Return the error that a worker raised, or that its process ended with, without the wrappers of Ray (2.60)."""
    for name in ("_base_exc", "health_check_failure", "cause"):
        wrapped = getattr(error, name, None)
        if isinstance(wrapped, Exception):
            return _cause(wrapped)
    return error


def _has_died(error: Exception) -> bool:
    """Whether the process of the worker has died, in contrast to an error that it has raised."""
    from ray.exceptions import RayActorError

    return isinstance(_cause(error), RayActorError)


class CurrentWorkerGroup:
    """The worker group of a process. It starts when it is first needed, and is replaced when other resources are
    needed."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._group: WorkerGroup | None = None

    def group(self, compute: Compute, preload: Sequence[str] = ()) -> WorkerGroup:
        """Return a group with the resources of `compute`, which may still be starting. `preload`: modules that the
        workers of a new group import first."""
        if (group := self.running(compute)) is None:
            self.close()
            group = self._group = WorkerGroup(compute, self._logs, preload)
        return group

    @property
    def reserved_cpus(self) -> int:
        """Number of CPUs that the group reserves."""
        group = self._group
        return group.num_workers * group.compute.cpus_per_worker if group is not None and group.is_alive else 0

    def running(self, compute: Compute) -> WorkerGroup | None:
        """Return the current group if it is alive and has the resources of `compute`, else None."""
        return self._group if self._group is not None and self._group.matches(compute) else None

    def close(self) -> None:
        """Free the resources of the group, if there is one."""
        if self._group is not None:
            self._group.close()
            self._group = None
