"""The queue between a run and its workers: a Ray actor that hands out jobs and tasks, and collects their results.

A job runs on all workers together (a training); a task runs on one of them (scoring a shard). Workers ask the queue for
work: a worker that Ray Train has restarted asks again, and unfinished work is handed out again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Pickled = bytes
"""Functions, arguments and errors pass through as cloudpickle bytes, so the queue imports nothing that they need."""

MAX_IDLE_FAILURES = 3
"""Failures in a row that interrupt no work, such as a lack of memory while workers start. One more fails the pending
tasks."""
MAX_WAIT_SECONDS = 1.0
"""Maximum duration of a call that waits for results; the run handles signals between two calls."""


@dataclass
class _Job:
    number: int
    call: Pickled
    max_failures: int
    failures: int = 0
    finished: set[int] = field(default_factory=set)
    """Ranks that have finished."""
    reports: list[dict[str, float]] = field(default_factory=list)
    """Reports of rank 0 that the run has not collected yet."""
    state: Literal["open", "done", "stopped", "failed"] = "open"
    errors: Pickled = b""
    """{rank: exception} of the last failure."""


@dataclass
class _Task:
    batch: int
    index: int
    values: dict[str, Any]
    crashes: int = 0


@dataclass(frozen=True)
class Work:
    """What a worker does next."""

    kind: Literal["job", "task"]
    number: int
    """Of the job, or of the actor that runs the task."""
    call: Pickled
    """(function, argument) of a job; (class, arguments) of the actor that runs a task."""
    values: dict[str, Any] = field(default_factory=dict)
    """Columns of a task."""
    crashes: int = 0
    """How many workers died while they ran this task."""


@dataclass(frozen=True)
class JobUpdate:
    state: Literal["open", "done", "stopped", "failed"]
    failures: int
    reports: list[dict[str, float]]
    errors: Pickled


@dataclass(frozen=True)
class TaskResult:
    index: int
    result: Pickled
    error: Pickled
    """An exception, or {rank: exception} if workers died; empty if there is a result."""


class JobQueue:
    """An asynchronous actor: calls that wait do not block others."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._changed = asyncio.Condition()
        self._closed = False
        self._sessions: dict[int, int] = dict.fromkeys(range(num_workers), 0)
        """By rank; increased when a worker starts or fails. Messages of earlier sessions are ignored."""
        self._joined: set[int] = set()
        """Ranks that are idle or working."""
        self._job: _Job | None = None
        self._job_number = 0
        self._actor_number = 0
        self._actor: Pickled = b""
        self._batch = 0
        self._max_crashes = 0
        self._pending: deque[_Task] = deque()
        self._running: dict[int, _Task] = {}
        """By rank."""
        self._results: list[TaskResult] = []
        self._idle_failures = 0

    # Called by workers.

    async def join(self, rank: int) -> int:
        """Register a worker that has started; return its session."""
        async with self._changed:
            self._sessions[rank] += 1
            self._joined.add(rank)
            self._requeue(rank)
            self._changed.notify_all()
            return self._sessions[rank]

    async def next(self, rank: int, session: int, last_job: int) -> Work | None:
        """Wait for work; None means exit. `last_job`: number of the last job that this worker has run."""

        def work() -> Work | None:
            job = self._job
            if job is not None and job.state == "open" and job.number > last_job:
                return Work("job", job.number, job.call) if len(self._joined) == self._num_workers else None
            if self._pending:
                task = self._running[rank] = self._pending.popleft()
                return Work("task", self._actor_number, self._actor, task.values, task.crashes)
            return None

        return await self._wait_for(work, lambda: self._closed or self._sessions[rank] != session)

    async def report(self, rank: int, session: int, metrics: dict[str, float]) -> None:
        """Pass metrics of the current job on to the run."""
        async with self._changed:
            if self._sessions[rank] == session and self._job is not None:
                self._job.reports.append(metrics)
                self._changed.notify_all()

    async def finish_job(self, rank: int, session: int, stopped: bool) -> None:
        """Register that a worker has finished its part of the job, or has raised Stopped, as all ranks do."""
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
        async with self._changed:
            if self._sessions[rank] == session and (task := self._running.pop(rank, None)) is not None:
                self._idle_failures = 0
                self._add_result(task, result, error)

    # Called by the controller of Ray Train.

    async def fail(self, ranks: list[int], errors: Pickled) -> None:
        """Register that these ranks have raised an error or died. Ray Train then restarts all workers."""
        async with self._changed:
            job = self._job
            is_job_open = job is not None and job.state == "open"
            self._idle_failures += not (is_job_open or self._running.keys() & set(ranks))
            if self._idle_failures > MAX_IDLE_FAILURES:
                while self._pending:
                    self._add_result(self._pending.popleft(), b"", errors)
            for rank in ranks:
                if (task := self._running.get(rank)) is not None:
                    task.crashes += 1
                    if task.crashes > self._max_crashes:
                        self._add_result(self._running.pop(rank), b"", errors)
            self._joined.clear()
            for rank in self._sessions:
                self._sessions[rank] += 1
                self._requeue(rank)
            if job is not None and is_job_open:
                job.failures += 1
                job.errors = errors
                job.finished.clear()
                if job.failures > job.max_failures:
                    job.state = "failed"
            self._changed.notify_all()

    # Called by the run.

    async def submit_job(self, call: Pickled, max_failures: int) -> None:
        async with self._changed:
            self._job_number += 1
            self._job = _Job(self._job_number, call, max_failures)
            self._changed.notify_all()

    async def job_update(self, failures: int) -> JobUpdate:
        """Wait for reports, a new failure (`failures` are known), or the end of the job, up to MAX_WAIT_SECONDS."""
        job = self._job
        assert job is not None, "called after submit_job"

        def update() -> JobUpdate | None:
            if not job.reports and job.state == "open" and job.failures == failures:
                return None
            reports, job.reports = job.reports, []
            return JobUpdate(job.state, job.failures, reports, job.errors)

        return await self._wait_for(update, seconds=MAX_WAIT_SECONDS) or JobUpdate("open", failures, [], b"")

    async def submit_tasks(self, actor: Pickled, tasks: list[dict[str, Any]], max_crashes: int) -> None:
        """Replace all tasks. Workers keep their actor if `actor` is the same as before."""
        async with self._changed:
            if actor != self._actor:
                self._actor, self._actor_number = actor, self._actor_number + 1
            self._batch += 1
            self._max_crashes = max_crashes
            self._pending = deque(_Task(self._batch, index, values) for index, values in enumerate(tasks))
            self._results.clear()
            self._changed.notify_all()

    async def task_results(self) -> list[TaskResult]:
        """Wait for finished tasks, up to MAX_WAIT_SECONDS."""

        def results() -> list[TaskResult] | None:
            finished, self._results = self._results, []
            return finished or None

        return await self._wait_for(results, seconds=MAX_WAIT_SECONDS) or []

    async def close(self) -> None:
        """Make the workers exit after what they are doing."""
        async with self._changed:
            self._closed = True
            self._pending.clear()
            self._changed.notify_all()

    def _add_result(self, task: _Task, result: Pickled, error: Pickled) -> None:
        if task.batch == self._batch:
            self._results.append(TaskResult(task.index, result, error))
            self._changed.notify_all()

    def _requeue(self, rank: int) -> None:
        task = self._running.pop(rank, None)
        if task is not None and task.batch == self._batch:
            self._pending.appendleft(task)

    async def _wait_for(
        self, value: Callable[[], T | None], ended: Callable[[], bool] = lambda: False, seconds: float | None = None
    ) -> T | None:
        """Wait until `value` returns something else than None; return None if `ended`, or after `seconds`."""
        end = None if seconds is None else asyncio.get_running_loop().time() + seconds
        async with self._changed:
            while not ended():
                if (result := value()) is not None:
                    return result
                remaining = None if end is None else end - asyncio.get_running_loop().time()
                if remaining is not None and remaining <= 0:
                    return None
                try:
                    await asyncio.wait_for(self._changed.wait(), remaining)
                except TimeoutError:
                    return None
            return None
