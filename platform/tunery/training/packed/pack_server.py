"""Packs as Ray actors, and the desk that finds each training a seat in one.

A training is asked for by a trial's own process, which takes no CPU or GPU: the pack has them. It asks for news until
its training ends, and a training that nobody asks about any more has left.
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
from tunery.models.load import Source
from tunery.spec import Compute, Lora, LoraTuner, Sft, Stage
from tunery.training.job import Job, Report

POLL_SECONDS = 5.0
"""A question for news is answered after this long at the latest."""
IDLE_SECONDS = 5.0
"""A pack without members ends after this long, and what it holds is free for trials that train alone."""
GONE_SECONDS = 30.0
"""A trial that has not asked for so long is gone: stopped, or its process killed."""
PLACEMENT_SECONDS = 0.5
"""Between two questions for a seat, while all are taken."""
CALLS = 256
"""That a pack answers at a time; all but one wait for news."""


def unpackable_reason(stage: Stage, compute: Compute) -> str:
    """Why a training can't be in a pack; "" when it can."""
    if compute.max_packed_trials == 1:
        return "compute.max_packed_trials is 1"
    if not isinstance(stage, Sft):
        return f"a {stage.kind} stage has no packed form, sft has"
    if not isinstance(stage.tuner, LoraTuner):
        return "full fine-tuning changes the base that a pack shares"
    lora: Lora = stage.tuner.lora
    if lora.dropout:
        return "LoRA's dropout would be drawn for all members together"
    return ""


class PackFull(TuneryError):
    """A training is no member of its pack: its device has no memory for another one, or nobody asked about it for long.
    It takes a seat again, and goes on from its checkpoint."""


@dataclass
class _PackedJob:
    """A training as its pack sees it."""

    job: Job
    news: list[dict[str, float]] = field(default_factory=list)
    ended: bool = False
    error: Exception | None = None
    asked: float = field(default_factory=time.monotonic)
    """A clock that stands still while the machine sleeps."""
    leaves: bool = False

    @property
    def gone(self) -> bool:
        return self.leaves or time.monotonic() - self.asked > GONE_SECONDS


class PackActor:
    """One pack in a process of its own; a thread takes step after step while it has members."""

    def __init__(self, source: Source, compute: Compute) -> None:
        self._source, self._compute = source, compute
        self._passengers: dict[str, _PackedJob] = {}
        self._full = False
        """Somebody was turned away, and nobody has left since."""
        self._changed = threading.Condition()
        threading.Thread(target=self._drive, name="pack", daemon=True).start()

    def join(self, job: Job) -> None:
        with self._changed:
            self._passengers[job.trial] = _PackedJob(job)
            self._changed.notify_all()

    def leave(self, trial: str) -> None:
        """Returns when its last checkpoint is written."""
        with self._changed:
            if (passenger := self._passengers.get(trial)) is None:
                return
            if passenger.ended:  # meanwhile; the thread has done with it
                del self._passengers[trial]
            else:
                passenger.leaves = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._passengers.get(trial) is not passenger)

    def news(self, trial: str) -> tuple[list[dict[str, float]], bool]:
        """Reports since the last question, and whether the training has ended; waits for some. Raises its error."""
        with self._changed:
            passenger = self._passengers.get(trial)
            if passenger is None:
                raise PackFull(f"{trial} has left its pack: nobody asked about it for {GONE_SECONDS:.0f} s")
            passenger.asked = time.monotonic()
            self._changed.wait_for(lambda: passenger.news or passenger.ended, POLL_SECONDS)
            passenger.asked = time.monotonic()
            told, passenger.news = passenger.news, []
            if passenger.ended:
                del self._passengers[trial]
                self._changed.notify_all()
            if passenger.error is not None:
                raise passenger.error
            return told, passenger.ended

    def members(self) -> tuple[list[str], bool]:
        """By trial, and whether its memory has room for no more."""
        with self._changed:
            return [trial for trial, passenger in self._passengers.items() if not passenger.ended], self._full

    # The thread.

    def _drive(self) -> None:
        pack: Any = None
        members: dict[str, tuple[_PackedJob, Any]] = {}
        while True:
            with self._changed:
                if not self._changed.wait_for(self._busy, IDLE_SECONDS):
                    # Ended, and nobody came to ask: its trial's process was killed.
                    late = [trial for trial, one in self._passengers.items() if one.gone]
                    for trial in late:
                        del self._passengers[trial]
                    if not self._passengers:
                        return self._close()
                    continue
                here = dict(self._passengers)
            try:
                pack = pack or self._load()
                self._come_and_go(pack, members, here)
                if pack.members:
                    pack.step()
            except Exception as error:  # of a step: it was everybody's
                traceback.print_exception(error)
                _let_go(error)
                for trial in [*members] or [*here]:
                    self._end(trial, error)
                members.clear()
                pack = None
                _free_memory()
            for trial, member in [(trial, member) for trial, (_, member) in members.items() if member.ended]:
                del members[trial]
                self._full = False
                self._end(trial, member.error)

    def _busy(self) -> bool:
        return any(not passenger.ended for passenger in self._passengers.values())

    def _close(self) -> None:
        import ray

        ray.get_runtime_context().current_actor.__ray_terminate__.remote()

    def _load(self) -> Any:
        import torch

        from tunery.training.packed.pack import Pack
        from tunery.training.worker_setup import pick_dtype

        torch.set_num_threads(self._compute.cpus_per_worker)
        dtype = pick_dtype(self._compute.precision, self._compute.device)
        return Pack(self._source, self._compute.device, dtype, self._compute.gradient_checkpointing)

    def _come_and_go(self, pack: Any, members: dict[str, tuple[_PackedJob, Any]], here: dict[str, _PackedJob]) -> None:
        for trial, passenger in here.items():
            gone = passenger.gone
            if trial in members and (gone or members[trial][0] is not passenger):  # or it has begun anew
                pack.leave(members.pop(trial)[1])
                self._full = False
            if gone:
                with self._changed:
                    del self._passengers[trial]
                    self._changed.notify_all()
            elif trial not in members and not passenger.ended:
                try:
                    member = pack.join(passenger.job, partial(self._tell, passenger))
                    if member is None:
                        self._full = True
                        self._end(trial, PackFull(f"no memory for {trial} beside {len(members)} others"))
                    else:
                        members[trial] = (passenger, member)
                except Exception as error:  # of this one: the others go on
                    self._end(trial, error)

    def _tell(self, passenger: _PackedJob, metrics: dict[str, float]) -> None:
        with self._changed:
            passenger.news.append(metrics)
            self._changed.notify_all()

    def _end(self, trial: str, error: Exception | None = None) -> None:
        with self._changed:
            if (passenger := self._passengers.get(trial)) is not None:
                passenger.ended, passenger.error = True, error
                self._changed.notify_all()


def _let_go(error: BaseException) -> None:
    """Of the pack and all the tensors of a step, which its traceback holds."""
    held: BaseException | None = error
    while held is not None:
        held.__traceback__ = None
        held = held.__context__


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class PackScheduler:
    """Finds seats: in the emptiest pack on the training's base that has room, else in a new pack. Packs end with it."""

    def __init__(self, packs: int, size: int, compute: Compute) -> None:
        self._most, self._size, self._compute = packs, size, compute
        self._packs: list[tuple[Source, Any]] = []

    def seat(self, job: Job) -> Any:
        """The pack that the training has joined; None while there is no room."""
        import ray

        told = []
        for source, pack in list(self._packs):
            try:
                told.append((source, pack, ray.get(pack.members.remote())))
            except ray.exceptions.RayActorError:  # it had nothing to do for long, or was killed
                self._packs.remove((source, pack))
        for _, pack, (members, _) in told:
            if job.trial in members:  # an earlier try of the same, whose process is gone
                ray.get(pack.leave.remote(job.trial))
        counted = [(source, pack, self._size if full else len(members)) for source, pack, (members, full) in told]
        fitting = [(count, pack) for source, pack, count in counted if source == job.model and count < self._size]
        if not fitting and len(self._packs) < self._most and not self._has_device():
            return None  # a trial that trains alone has it, or another search: asking a pack that waits would block
        if len(self._packs) == self._most and not fitting:
            empty = [(source, pack) for source, pack, count in counted if not count]
            if not empty:
                return None
            ray.kill(empty[0][1])
            self._packs.remove(empty[0])
        emptiest = min((count for count, _ in fitting), default=self._size)
        if len(self._packs) < self._most and emptiest > 0 and (not fitting or self._has_device()):
            pack = self._new(job.model)
        else:
            pack = next(pack for count, pack in fitting if count == emptiest)
        ray.get(pack.join.remote(job))
        return pack

    def _has_device(self) -> bool:
        """Whether a new pack could start at once."""
        import ray

        free = ray.available_resources()
        gpu = self._compute.device == "gpu"
        enough: bool = free.get("GPU", 0) >= 1 if gpu else free.get("CPU", 0) >= self._compute.cpus_per_worker
        return enough

    def _new(self, source: Source) -> Any:
        import ray

        compute = self._compute
        actor: Any = ray.remote(PackActor)
        pack = actor.options(
            num_cpus=compute.cpus_per_worker,
            num_gpus=1 if compute.device == "gpu" else 0,
            max_concurrency=CALLS,
        ).remote(source, compute)
        self._packs.append((source, pack))
        return pack


def get_pack_scheduler(packs: int, size: int, compute: Compute) -> Any:
    """A desk of a search; it and its packs end with the process that has the handle."""
    import ray

    actor: Any = ray.remote(PackScheduler)
    return actor.options(num_cpus=0).remote(packs, size, compute)


def train_packed(job: Job, desk: Any, report: Report) -> None:
    """Takes a seat and waits until the training has ended; whoever stops this leaves the pack. Raises Stopped, and the
    training's own errors."""
    while True:
        while (pack := _asked(desk.seat, job)) is None:
            _stop_if_wanted(job)
            time.sleep(PLACEMENT_SECONDS)
        with suppress(PackFull):
            return _poll_until_done(job, pack, report)


def _stop_if_wanted(job: Job) -> None:
    if job.stop is not None and job.stop.exists():
        raise Stopped("stopped while it trained")


def _poll_until_done(job: Job, pack: Any, report: Report) -> None:
    try:
        ended = False
        while not ended:
            _stop_if_wanted(job)
            told, ended = _asked(pack.news, job.trial)
            for metrics in told:
                report(metrics)
    except PackFull:
        raise
    except BaseException:  # also SystemExit, by which Tune stops a trial: else the pack trains it on
        pack.leave.remote(job.trial)
        raise


def _asked(method: Any, *arguments: Any) -> Any:
    """Raises the cause of what was raised there."""
    import ray

    try:
        return ray.get(method.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        raise (cause if isinstance(cause, TuneryError) else StageError("pack", str(cause))) from error
