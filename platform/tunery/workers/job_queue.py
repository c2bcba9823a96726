"""The queue between a run and its workers: a Ray actor that hands out jobs and tasks, and collects their results.

A job, such as a training, runs on all workers at once. A task, such as scoring a shard, runs on one of them. Workers
ask the queue for work. A worker that Ray Train has restarted asks again, and unfinished work is handed out again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Pickled = bytes
"""Functions, arguments and errors pass through as cloudpickle bytes, so the queue imports nothing that they need."""

MAX_IDLE_FAILURES = 3
"""Consecutive failures that interrupt no work, such as a lack of memory while workers start. One more fails the pending
tasks."""
MAX_NODE_DEATHS = 10
"""Deaths of nodes (preemption, hardware) that a job, or a task, tolerates in addition to its failures, or crashes."""
BACKOFF_SECONDS = 5.0
"""Minimum time between the first failure of a job and its next attempt. It doubles with each failure."""
MAX_BACKOFF_SECONDS = 60.0
MAX_WAIT_SECONDS = 1.0
"""Maximum duration of a call that waits for results. The run handles signals between two calls."""


@dataclass
class _Job:
    number: int
    call: Pickled
    """(function, argument)."""
    max_failures: int
    failures: int = 0
    node_deaths: int = 0
    attempts: int = 1
    start_time: float = 0.0
    """Time of the event loop before which the next attempt does not start."""
    finished: set[int] = field(default_factory=set)
    """Ranks that have finished."""
    reports: list[dict[str, float]] = field(default_factory=list)
    """Reports of rank 0 that the run has not collected yet."""
    num_reports: int = 0
    """Number of all reports of rank 0."""
    num_processed: int = 0
    """Number of reports that the run has processed."""
    is_cancelled: bool = False
    state: Literal["open", "done", "stopped", "failed"] = "open"
    errors: Pickled = b""
    """{rank: exception} of the last failure."""


@dataclass
class _Task:
    submission: int
    """Number of the `submit_tasks` call."""
    index: int
    """Index among the tasks of that call."""
    values: dict[str, Any]
    """Columns of the task."""
    crashes: int = 0
    """How many workers have died while they ran it."""
    node_deaths: int = 0
    """How many of their nodes have died."""


@dataclass(frozen=True)
class Work:
    """A job or a task for one worker."""

    kind: Literal["job", "task"]
    number: int
    """Number of the job, or of the callable class that runs the task. A worker keeps its instance of the class while
    the number is the same."""
    call: Pickled
    """(function, argument) of a job; (callable class, constructor arguments) of a task."""
    values: dict[str, Any] = field(default_factory=dict)
    """Columns of the task."""
    crashes: int = 0
    """How many workers have died while they ran this task."""


@dataclass(frozen=True)
class JobUpdate:
    """State of the current job, and its reports since the last update."""

    state: Literal["open", "done", "stopped", "failed"]
    attempts: int
    """Number of attempts so far, including the current one."""
    reports: list[dict[str, float]]
    errors: Pickled
    """{rank: exception} of the last failure."""


@dataclass(frozen=True)
class TaskResult:
    """Result or error of one task."""

    index: int
    """Index among the submitted tasks."""
    result: Pickled
    error: Pickled
    """An exception, or {rank: exception} if workers died; empty if there is a result."""


class JobQueue:
    """An asynchronous Ray actor: calls that wait do not block others."""

    def __init__(self, num_workers: int, backoff_seconds: float = BACKOFF_SECONDS) -> None:
        self._num_workers = num_workers
        self._backoff_seconds = backoff_seconds
        self._changed = asyncio.Condition()
        self._closed = False
        self._sessions: dict[int, int] = dict.fromkeys(range(num_workers), 0)
        """Number of the session of each rank. It increases when a worker starts or fails, and messages of earlier
        sessions are ignored."""
        self._nodes: dict[int, str] = {}
        """Id of the node that each rank was started on last."""
        self._joined: set[int] = set()
        """Ranks of the workers that are running."""
        self._job: _Job | None = None
        self._job_number = 0
        self._callable_class: Pickled = b""
        """(callable class, constructor arguments) of the submitted tasks."""
        self._callable_class_number = 0
        self._submission = 0
        self._max_crashes = 0
        self._pending: deque[_Task] = deque()
        self._running: dict[int, _Task] = {}
        """Task of each rank that runs one."""
        self._results: list[TaskResult] = []
        self._idle_failures = 0
        self._timer: asyncio.Task[None] | None = None

    # Called by workers.

    async def join(self, rank: int, node: str = "") -> int:
        """Register a worker that has started on `node` (its id); return the number of its session."""
        async with self._changed:
            self._sessions[rank] += 1
            self._nodes[rank] = node
            self._joined.add(rank)
            self._requeue(rank)
            self._changed.notify_all()
            return self._sessions[rank]

    async def next(self, rank: int, session: int, last_job: int) -> Work | None:
        """Wait for work and return it; None means exit. `last_job`: number of the last job that this worker has run."""

        def find_work() -> Work | None:
            job = self._job
            if job is not None and job.state == "open" and job.number > last_job:
                is_ready = len(self._joined) == self._num_workers and _now() >= job.start_time
                return Work("job", job.number, job.call) if is_ready else None
            if self._pending:
                task = self._running[rank] = self._pending.popleft()
                return Work("task", self._callable_class_number, self._callable_class, task.values, task.crashes)
            return None

        return await self._wait_for(find_work, lambda: self._closed or self._sessions[rank] != session)

    async def report(self, rank: int, session: int, metrics: dict[str, float]) -> bool:
        """Pass metrics of the current job to the run, and wait until it has processed them. Return whether the job is
        cancelled."""
        async with self._changed:
            job = self._job
            if self._sessions[rank] != session or job is None:
                return False
            job.reports.append(metrics)
            job.num_reports = number = job.num_reports + 1
            self._changed.notify_all()

        def is_cancelled() -> bool | None:
            return job.is_cancelled if job.is_cancelled or job.num_processed >= number else None

        return await self._wait_for(is_cancelled, lambda: self._closed or self._sessions[rank] != session) or False

    async def finish_job(self, rank: int, session: int, stopped: bool) -> None:
        """Register that a worker has finished its part of the job. `stopped`: whether it has raised Stopped; either all
        ranks do or none."""
        async with self._changed:
            job = self._job
            if self._sessions[rank] != session or job is None:
                return
            self._idle_failures = 0
            job.finished.add(rank)
            if len(job.finished) == self._num_workers:
                job.state = "stopped" if stopped else "done"
            self._changed.notify_all()

    async def finish_task(self, rank: int, session: int, result: Pickled, error: Pickled) -> None:
        """Register the result or the error of the task that a worker was given last."""
        async with self._changed:
            if self._sessions[rank] == session and (task := self._running.pop(rank, None)) is not None:
                self._idle_failures = 0
                self._add_result(task, result, error)

    # Called by Ray Train's controller.

    async def nodes(self) -> dict[int, str]:
        """Return the id of the node of each rank."""
        return self._nodes

    async def fail(
        self, ranks: list[int], errors: Pickled, node_died: Collection[int] = (), is_final: bool = False
    ) -> None:
        """Register that these ranks have raised an error or died, after which Ray Train restarts all workers.

        errors: {rank: exception}; node_died: ranks whose node died, for which no row or training is to blame; is_final:
        whether another attempt at the job would fail with the same error.
        """
        async with self._changed:
            job = self._job
            is_job_open = job is not None and job.state == "open"
            self._idle_failures += not (is_job_open or self._running.keys() & set(ranks))
            if self._idle_failures > MAX_IDLE_FAILURES:
                while self._pending:
                    self._add_result(self._pending.popleft(), b"", errors)
            for rank in ranks:
                if (task := self._running.get(rank)) is not None:
                    if rank in node_died and task.node_deaths < MAX_NODE_DEATHS:
                        task.node_deaths += 1
                    else:
                        task.crashes += 1
                    if task.crashes > self._max_crashes:
                        self._add_result(self._running.pop(rank), b"", errors)
            self._joined.clear()
            for rank in self._sessions:
                self._sessions[rank] += 1
                self._requeue(rank)
            if job is not None and is_job_open:
                job.errors = errors
                job.finished.clear()
                if node_died and job.node_deaths < MAX_NODE_DEATHS:
                    job.node_deaths += 1
                else:
                    job.failures += 1
                if job.failures > job.max_failures or is_final:
                    job.state = "failed"
                else:
                    job.attempts += 1
                    self._delay(job)
            self._changed.notify_all()

    def _delay(self, job: _Job) -> None:
        """Let the next attempt at the job start after a time that doubles with its failures."""
        seconds = min(self._backoff_seconds * 2 ** max(0, job.failures - 1), MAX_BACKOFF_SECONDS)
        job.start_time = _now() + seconds

        async def notify() -> None:
            await asyncio.sleep(seconds)
            async with self._changed:
                self._changed.notify_all()

        self._timer = asyncio.create_task(notify())  # the event loop itself keeps no reference

    # Called by the run.

    async def num_joined(self) -> int:
        """Return the number of workers that are running."""
        return len(self._joined)

    async def submit_job(self, call: Pickled, max_failures: int) -> None:
        """Replace the current job. `call`: (function, argument)."""
        async with self._changed:
            self._job_number += 1
            self._job = _Job(self._job_number, call, max_failures)
            self._changed.notify_all()

    async def cancel_job(self) -> None:
        """Make the current or next `report` of the job return True."""
        async with self._changed:
            if self._job is not None:
                self._job.is_cancelled = True
                self._changed.notify_all()

    async def job_update(self, attempts: int, num_processed: int) -> JobUpdate:
        """Wait for reports, for an attempt beyond the `attempts` that the caller knows, or for the end of the job, at
        most MAX_WAIT_SECONDS. Return the update. `num_processed`: number of reports that the caller has processed."""
        job = self._job
        assert job is not None, "called after submit_job"
        async with self._changed:
            job.num_processed = num_processed
            self._changed.notify_all()

        def find_update() -> JobUpdate | None:
            if not job.reports and job.state == "open" and job.attempts == attempts:
                return None
            reports, job.reports = job.reports, []
            return JobUpdate(job.state, job.attempts, reports, job.errors)

        return await self._wait_for(find_update, seconds=MAX_WAIT_SECONDS) or JobUpdate("open", attempts, [], b"")

    async def submit_tasks(self, callable_class: Pickled, tasks: list[dict[str, Any]], max_crashes: int) -> None:
        """Replace all tasks. `callable_class`: (callable class, constructor arguments). Workers keep their instance of
        the class if it is the same as before."""
        async with self._changed:
            if callable_class != self._callable_class:
                self._callable_class, self._callable_class_number = callable_class, self._callable_class_number + 1
            self._submission += 1
            self._max_crashes = max_crashes
            self._pending = deque(_Task(self._submission, index, values) for index, values in enumerate(tasks))
            self._results.clear()
            self._changed.notify_all()

    async def task_results(self) -> list[TaskResult]:
        """Wait for results, at most MAX_WAIT_SECONDS. Return those since the last call."""

        def take_results() -> list[TaskResult] | None:
            results, self._results = self._results, []
            return results or None

        return await self._wait_for(take_results, seconds=MAX_WAIT_SECONDS) or []

    async def close(self) -> None:
        """Make the workers exit after their current job or task."""
        async with self._changed:
            self._closed = True
            self._pending.clear()
            self._changed.notify_all()

    def _add_result(self, task: _Task, result: Pickled, error: Pickled) -> None:
        """Add a result, unless its task has been replaced."""
        if task.submission == self._submission:
            self._results.append(TaskResult(task.index, result, error))
            self._changed.notify_all()

    def _requeue(self, rank: int) -> None:
        """Make the unfinished task of a worker pending again, unless it has been replaced."""
        task = self._running.pop(rank, None)
        if task is not None and task.submission == self._submission:
            self._pending.appendleft(task)

    async def _wait_for(
        self, get: Callable[[], T | None], should_end: Callable[[], bool] = lambda: False, seconds: float | None = None
    ) -> T | None:
        """Wait until `get` returns a value other than None, and return it. Return None when `should_end` returns True,
        or after `seconds`."""
        deadline = None if seconds is None else _now() + seconds
        async with self._changed:
            while not should_end():
                if (value := get()) is not None:
                    return value
                remaining = None if deadline is None else deadline - _now()
                if remaining is not None and remaining <= 0:
                    return None
                try:
                    await asyncio.wait_for(self._changed.wait(), remaining)
                except TimeoutError:
                    return None
            return None


def _now() -> float:
    return asyncio.get_running_loop().time()
