"""From whatever a library raised to an error that names the stage, the cause and the remedy.

Of several workers' errors the one that started it is told: when a worker dies, the others fail with broken
connections, and those say nothing.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tunery.errors import StageError, TuneryError

if TYPE_CHECKING:
    from tunery.runner.execute import Where

FOLLOWERS = re.compile(r"Connection (closed|reset) by peer|gloo|NCCL|timed out|Broken pipe", re.IGNORECASE)
FULL = 4 << 20
"""A disk with less left than this, in bytes, is called full."""


def explain(error: BaseException, stage: str, where: Where, trial: str = "") -> TuneryError:
    """The same error when it is one of ours (found anywhere in the chain), else a StageError."""
    log = where.logs / f"{trial or 'run'}-{stage}-error.txt"
    try:
        where.logs.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(traceback.format_exception(error)))
    except OSError:  # a full disk must not hide itself
        pass
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, TuneryError):
            return link
    message, cause, remedy = _cause(chain, where)
    return StageError(stage, message, cause=cause, remedy=remedy, log=str(log))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what workers raised (starters before followers), and all their causes."""
    seen: set[int] = set()
    queue: list[BaseException] = [error]
    while queue:
        link = queue.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        workers = getattr(link, "worker_failures", None)
        if isinstance(workers, dict):
            queue += sorted(workers.values(), key=lambda failure: bool(FOLLOWERS.search(str(failure))))
        context = None if link.__suppress_context__ else link.__context__
        for next_link in (getattr(link, "cause", None), link.__cause__, context):
            if isinstance(next_link, BaseException):
                queue.append(next_link)


def _cause(chain: list[BaseException], where: Where) -> tuple[str, str, str]:
    texts = [f"{type(link).__name__}: {link}" for link in chain]
    names = {base.__name__ for link in chain for base in type(link).__mro__}
    whole = "\n".join(texts)
    again = "then give the same command again: it goes on from the last checkpoint"
    if _disk_full(chain, whole, where):
        place = _full_place(chain, where)
        return (
            "the disk is full",
            f"{place} has {shutil.disk_usage(place).free / 1e6:,.0f} MB left",
            f"free some space or give another --store, {again}",
        )
    if ("OutOfMemoryError" in names and "RayError" not in names) or "CUDA out of memory" in whole:
        return (
            "a worker ran out of GPU memory",
            _line(whole, "out of memory"),
            "lower compute.micro_batch_size, raise compute.zero_stage, or set compute.gradient_checkpointing: true",
        )
    if "OutOfMemoryError" in names or "MemoryError" in names or "can't allocate memory" in whole:
        return (
            "a worker ran out of memory",
            _line(whole, "memory"),
            "lower compute.micro_batch_size or compute.workers, or use a machine with more memory; " + again,
        )
    if "error raised in its creation task" in whole:  # Ray's own actor, of a training or of a pool
        told = [line.strip() for line in whole.splitlines() if re.match(r"\s*\w+(Error|Exception|Interrupt)\b", line)]
        return "a worker could not start", told[-1][:300] if told else "", "the whole story is in the log"
    died = "worker process has died" in whole or "WorkerHealthCheckFailedError" in names
    if died or names & {"ActorDiedError", "WorkerCrashedError", "NodeDiedError", "ActorUnavailableError"}:
        signal = re.search(r"SIG[A-Z]+", whole)
        return (
            "a worker process was killed",
            "the system's out-of-memory killer, or somebody's kill"
            + (f" ({signal.group()})" if signal else "")
            + "; the worker left no error of its own",
            "look at the memory of the machine (dmesg), "
            + again
            + "; compute.max_failures lets a run do that by itself",
        )
    starter = next(
        (link for link in reversed(chain) if not FOLLOWERS.search(str(link)) and str(link).strip()), chain[0]
    )
    first = str(starter).strip().splitlines()
    return f"{type(starter).__name__}: {first[-1] if first else ''}", "", "the whole story is in the log"


def _disk_full(chain: list[BaseException], whole: str, where: Where) -> bool:
    if any(isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT) for link in chain):
        return True
    if os.strerror(errno.ENOSPC) in whole:
        return True
    return shutil.disk_usage(where.store.root).free < FULL


def _full_place(chain: list[BaseException], where: Where) -> Path:
    """The folder that was written to, where the error names it; else the store."""
    names = [Path(str(link.filename)).parent for link in chain if isinstance(link, OSError) and link.filename]
    return next((name for name in names if name.is_dir()), where.store.root)


def _line(text: str, word: str) -> str:
    """The first line with `word`, shortened."""
    return next((line.strip()[:300] for line in text.splitlines() if word in line), "")
