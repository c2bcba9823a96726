"""Packs as Ray actors, and the scheduler, another actor, that assigns each training to a pack.

The process of a trial asks the scheduler for a pack, and polls the pack until its training ends. It reserves no CPU or
GPU; the pack has those. A pack removes a training that is no longer polled. If the process or the node of a pack dies,
its trainings join other packs and resume from their checkpoints.
"""

from __future__ import annotations

import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tunery.errors import StageError, Stopped, TuneryError
from tunery.interrupt import STOP
from tunery.models.load import Source
from tunery.spec import TRAINERS, Compute, Stage, adapter_spec, settings_of, tuner_of
from tunery.training.job import Job, Report
from tunery.workers.cluster_resources import free_resources, num_workers, on_this_node

POLL_SECONDS = 5.0
"""Maximum duration of one poll."""
IDLE_SECONDS = 5.0
"""A pack without members exits after this time, which frees its resources for trials that are not packed."""
POLL_TIMEOUT_SECONDS = 30.0
"""If a trial has not polled for this time, it was stopped, or its process was killed."""
RETRY_SECONDS = 0.5
"""Time between two attempts to join a pack, while all are full."""
CALL_SECONDS = 60.0
"""Time limit for an answer of a pack, which may finish a step and save a checkpoint first. A pack that does not answer
in time is killed: its node is unreachable, or another process has taken the CPU or GPU that it waits for."""
MAX_PACK_DEATHS = 2
"""How many deaths of its packs a training tolerates; the next one fails it."""
MAX_CONCURRENT_CALLS = 256
"""Maximum number of concurrent calls of a pack actor. Nearly all of them are polls, which wait."""


def unpackable_reason(stage: Stage, compute: Compute) -> str:
    """Return why a training can't join a pack; "" if it can."""
    if compute.max_packed_trials == 1:
        return "compute.max_packed_trials is 1"
    if not TRAINERS[stage.kind].packable:
        packable = ", ".join(kind for kind, spec in TRAINERS.items() if spec.packable)
        return f"a {stage.kind} stage has no packed form, {packable} has"
    tuner = tuner_of(stage)
    return adapter_spec(tuner).unpackable_reason(settings_of(tuner))


class PackFull(TuneryError):
    """A training is not in its pack: the device has no memory for it, or it was not polled in time. `train_packed` then
    joins a pack again, and the training resumes from its checkpoint."""


@dataclass
class _PackedJob:
    """A training in a pack, as its actor sees it."""

    job: Job
    reports: list[dict[str, float]] = field(default_factory=list)
    """Reports that were not polled yet."""
    ended: bool = False
    error: Exception | None = None
    """The error that ended it."""
    last_poll: float = field(default_factory=time.monotonic)
    """Monotonic time, which does not advance while the machine sleeps."""
    leave_requested: bool = False

    @property
    def should_leave(self) -> bool:
        return self.leave_requested or time.monotonic() - self.last_poll > POLL_TIMEOUT_SECONDS


class PackActor:
    """Ray actor of one pack. A thread takes training steps as long as the pack has members."""

    def __init__(self, source: Source, compute: Compute) -> None:
        self._source, self._compute = source, compute
        self._jobs: dict[str, _PackedJob] = {}
        self._full = False
        """Whether a training was rejected for lack of memory, and no member has left since."""
        self._changed = threading.Condition()
        threading.Thread(target=self._train_loop, name="pack", daemon=True).start()

    def join(self, job: Job) -> None:
        """Add a training, before the next step of the training thread."""
        with self._changed:
            self._jobs[job.trial] = _PackedJob(job)
            self._changed.notify_all()

    def leave(self, trial: str) -> None:
        """Remove a training; returns once its last checkpoint is written."""
        with self._changed:
            if (packed_job := self._jobs.get(trial)) is None:
                return
            if packed_job.ended:  # the training thread does not use it any more
                del self._jobs[trial]
            else:
                packed_job.leave_requested = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._jobs.get(trial) is not packed_job)

    def poll(self, trial: str) -> tuple[list[dict[str, float]], bool]:
        """Wait for reports, at most POLL_SECONDS. Return those since the last poll, and whether the training has ended.
        Raises the error that ended it, or PackFull if it is not in this pack."""
        with self._changed:
            packed_job = self._jobs.get(trial)
            if packed_job is None:
                raise PackFull(f"{trial} was removed from its pack: it was not polled for {POLL_TIMEOUT_SECONDS:.0f} s")
            packed_job.last_poll = time.monotonic()
            self._changed.wait_for(lambda: packed_job.reports or packed_job.ended, POLL_SECONDS)
            packed_job.last_poll = time.monotonic()
            reports, packed_job.reports = packed_job.reports, []
            if packed_job.ended:
                del self._jobs[trial]
                self._changed.notify_all()
            if packed_job.error is not None:
                raise packed_job.error
            return reports, packed_job.ended

    def members(self) -> tuple[list[str], bool]:
        """Return the trials in training, and whether the device has no memory for another one."""
        with self._changed:
            return [trial for trial, packed_job in self._jobs.items() if not packed_job.ended], self._full

    # Called by the training thread.

    def _train_loop(self) -> None:
        """Take steps while there are members; exit after IDLE_SECONDS without any."""
        pack: Any = None
        members: dict[str, tuple[_PackedJob, Any]] = {}
        while True:
            with self._changed:
                if not self._changed.wait_for(self._has_work, IDLE_SECONDS):
                    # These have ended but are no longer polled: the process of the trial was killed.
                    stale = [trial for trial, job in self._jobs.items() if job.should_leave]
                    for trial in stale:
                        del self._jobs[trial]
                    if not self._jobs:
                        return self._terminate()
                    continue
                jobs = dict(self._jobs)
            try:
                pack = pack or self._load_pack()
                self._admit_and_evict(pack, members, jobs)
                if pack.members:
                    pack.step()
            except Exception as error:  # any error in a step ends all trainings of the pack
                traceback.print_exception(error)
                _clear_tracebacks(error)
                for trial in [*members] or [*jobs]:
                    self._end(trial, error)
                members.clear()
                pack = None
                _free_memory()
            for trial, member in [(trial, member) for trial, (_, member) in members.items() if member.ended]:
                del members[trial]
                self._full = False
                self._end(trial, member.error)

    def _has_work(self) -> bool:
        return any(not packed_job.ended for packed_job in self._jobs.values())

    def _terminate(self) -> None:
        import ray

        ray.get_runtime_context().current_actor.__ray_terminate__.remote()

    def _load_pack(self) -> Any:
        import torch

        from tunery.models.precision import pick_dtype
        from tunery.training.packed.pack import Pack

        torch.set_num_threads(self._compute.cpus_per_worker)
        dtype = pick_dtype(self._compute.precision, self._compute.device)
        return Pack(self._source, self._compute.device, dtype, self._compute.gradient_checkpointing)

    def _admit_and_evict(
        self, pack: Any, members: dict[str, tuple[_PackedJob, Any]], jobs: dict[str, _PackedJob]
    ) -> None:
        """Add new trainings to the pack, and remove those that should leave."""
        for trial, packed_job in jobs.items():
            evict = packed_job.should_leave
            if trial in members and (evict or members[trial][0] is not packed_job):  # the trial may have restarted
                pack.leave(members.pop(trial)[1])
                self._full = False
            if evict:
                with self._changed:
                    self._jobs.pop(trial, None)  # one that has ended may have been polled in the meantime
                    self._changed.notify_all()
            elif trial not in members and not packed_job.ended:
                try:
                    member = pack.join(packed_job.job, partial(self._add_report, packed_job))
                    if member is None:
                        self._full = True
                        self._end(trial, PackFull(f"no memory for {trial} in a pack with {len(members)} members"))
                    else:
                        members[trial] = (packed_job, member)
                except Exception as error:  # any error ends this training only
                    self._end(trial, error)

    def _add_report(self, packed_job: _PackedJob, metrics: dict[str, float]) -> None:
        with self._changed:
            packed_job.reports.append(metrics)
            self._changed.notify_all()

    def _end(self, trial: str, error: Exception | None = None) -> None:
        """Mark a training as ended; its next poll returns or raises `error`."""
        with self._changed:
            if (packed_job := self._jobs.get(trial)) is not None:
                packed_job.ended, packed_job.error = True, error
                self._changed.notify_all()


def _clear_tracebacks(error: BaseException) -> None:
    """Remove the tracebacks of an error and its contexts, whose frames would keep the pack and its tensors alive."""
    current: BaseException | None = error
    while current is not None:
        current.__traceback__ = None
        current = current.__context__


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Pack:
    source: Source
    """The base model of its trainings."""
    handle: Any


class _PackDied(Exception):
    """The process or node of a pack has died, or it did not answer in time. PackScheduler has removed it."""


class PackScheduler:
    """Ray actor that assigns each training to the pack of its base model with the fewest members, or to a new pack. All
    packs end with this actor."""

    def __init__(self, max_packs: int, max_members: int, compute: Compute) -> None:
        """max_members: maximum number of trainings per pack; compute: resources of each pack."""
        self._max_packs, self._max_members, self._compute = max_packs, max_members, compute
        self._packs: list[_Pack] = []

    def assign(self, job: Job) -> Any:
        """Add the training to a pack and return that pack; None if all are full, or the chosen one has died."""
        counts = self._member_counts(job.trial)
        available = [(count, pack) for pack, count in counts if pack.source == job.model and count < self._max_members]
        if not available and len(self._packs) < self._max_packs and not self._has_free_node():
            return None  # a trial outside a pack or another search uses the device
        if len(self._packs) == self._max_packs and not available:
            empty = [pack for pack, count in counts if not count]
            if not empty:
                return None
            self._kill(empty[0])
        fewest = min((count for count, _ in available), default=self._max_members)
        if len(self._packs) < self._max_packs and fewest > 0 and (not available or self._has_free_node()):
            pack = self._create_pack(job.model)
        else:
            pack = next(pack for count, pack in available if count == fewest)
        with suppress(_PackDied):
            self._call(pack, "join", job)
            return pack.handle
        return None

    def close(self) -> None:
        """Kill all packs."""
        for pack in list(self._packs):
            self._kill(pack)

    def _member_counts(self, trial: str) -> list[tuple[_Pack, int]]:
        """Return the number of members of each pack, without `trial`; the maximum for a pack without free memory."""
        counts = []
        for pack in list(self._packs):
            with suppress(_PackDied):
                members, full = self._call(pack, "members")
                if trial in members:  # an earlier attempt, whose process was killed
                    self._call(pack, "leave", trial)
                    members.remove(trial)
                counts.append((pack, self._max_members if full else len(members)))
        return counts

    def _has_free_node(self) -> bool:
        """Whether a node has the free CPUs, and the GPU, that a pack needs."""
        return num_workers(free_resources(), self._compute.device, self._compute.cpus_per_worker) > 0

    def _create_pack(self, source: Source) -> _Pack:
        import ray

        compute = self._compute
        actor: Any = ray.remote(PackActor)
        handle = actor.options(
            num_cpus=compute.cpus_per_worker,
            num_gpus=1 if compute.device == "gpu" else 0,
            max_concurrency=MAX_CONCURRENT_CALLS,
        ).remote(source, compute)
        pack = _Pack(source, handle)
        self._packs.append(pack)
        return pack

    def _call(self, pack: _Pack, method: str, *arguments: Any) -> Any:
        """Call a method of a pack. Raises _PackDied if it has died (or was idle and has exited), or does not answer
        within CALL_SECONDS."""
        import ray

        try:
            return ray.get(getattr(pack.handle, method).remote(*arguments), timeout=CALL_SECONDS)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            self._kill(pack)
            raise _PackDied from error

    def _kill(self, pack: _Pack) -> None:
        import ray

        ray.kill(pack.handle)
        self._packs.remove(pack)


def start_pack_scheduler(max_packs: int, max_members: int, compute: Compute) -> Any:
    """Start a PackScheduler on the node of this process and return its handle. The scheduler and its packs end with
    this process."""
    import ray

    actor: Any = ray.remote(PackScheduler)
    return actor.options(num_cpus=0, scheduling_strategy=on_this_node()).remote(max_packs, max_members, compute)


def close_pack_scheduler(scheduler: Any) -> None:
    """End the scheduler and its packs, so that their resources are free."""
    import ray

    with suppress(ray.exceptions.RayError):
        ray.get(scheduler.close.remote(), timeout=CALL_SECONDS)
    ray.kill(scheduler)


def train_packed(job: Job, scheduler: Any, report: Report) -> None:
    """Train in a pack and wait for the end; leave the pack if interrupted. `scheduler`: handle of the PackScheduler.

    Raises Stopped, the errors of the training, and RayActorError after MAX_PACK_DEATHS deaths of its packs.
    """
    import ray

    deaths = 0
    while True:
        while (pack := _call(scheduler.assign, job)) is None:
            _raise_if_stopped(job)
            time.sleep(RETRY_SECONDS)
        try:
            return _poll_until_done(job, pack, report)
        except PackFull:
            continue
        except ray.exceptions.RayActorError:
            deaths += 1
            if deaths > MAX_PACK_DEATHS:
                raise


def _raise_if_stopped(job: Job) -> None:
    STOP.check()
    if job.stop_file is not None and job.stop_file.exists():
        raise Stopped("stopped while it trained")


def _poll_until_done(job: Job, pack: Any, report: Report) -> None:
    import ray

    try:
        ended = False
        while not ended:
            _raise_if_stopped(job)
            reports, ended = _call(pack.poll, job.trial)
            for metrics in reports:
                report(metrics)
    except PackFull:
        raise
    except BaseException:  # including SystemExit, which Tune raises to stop a trial. The pack would otherwise train on.
        leave = pack.leave.remote(job.trial)
        with suppress(ray.exceptions.RayError):  # the pack may have died
            ray.get(leave, timeout=CALL_SECONDS)  # the lease is released after the last checkpoint is written
        raise


def _call(method: Any, *arguments: Any) -> Any:
    """Call a method of an actor and wait for its result. Raises the original error instead of Ray's RayTaskError."""
    import ray

    try:
        return ray.get(method.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        raise (cause if isinstance(cause, TuneryError) else StageError("pack", str(cause))) from error
