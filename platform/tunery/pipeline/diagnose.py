"""From whatever a library raised to an error that names the stage, the cause and the remedy.

Ray wraps what a worker raised (RayTaskError of Ray Core and Ray Data, UserCodeException, WorkerGroupError and
ControllerError of Ray Train, TuneError), sometimes as nothing but the text of a traceback: the error shown is the one
inside. Of several workers' errors it is the one that started it: when a worker dies, the others fail with broken
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
    from tunery.pipeline.execute import RunContext

SECONDARY_ERRORS = re.compile(r"Connection (closed|reset) by peer|gloo|NCCL|timed out|Broken pipe", re.IGNORECASE)
WRAPPED = ("cause", "controller_failure", "_base_exc")
"""Where Ray's errors (2.60) keep the one that they wrap: RayTaskError, ControllerError, UserExceptionWithTraceback."""
RETRY_NOTE = re.compile(r"\n?Failed to .* after \d+/\d+\s+attempts \(total backoff .*", re.DOTALL)
"""What Ray Data (2.60, _annotate_exception_with_retry_context) adds to the message of every error in a task."""
NAMED = re.compile(r"[A-Za-z_][\w.<>]*(:|$)")
"""An error's line at the end of a traceback: `Type: message`, the type with its module and enclosing function."""
RUN = "run"
"""In place of a stage's name: what happened between the stages."""
LONGEST = 500
"""Of a message, in characters: the log has all of it."""
FULL = 4 << 20
"""A disk with less left than this, in bytes, is called full."""


def diagnose(error: BaseException, stage: str, where: RunContext, trial: str = "") -> TuneryError:
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
            return link if stage == RUN else _at_stage(link, stage, str(log))
    message, cause, remedy = _cause(chain, where)
    return StageError(stage, message, cause=cause, remedy=remedy, log=str(log))


def _at_stage(error: TuneryError, stage: str, log: str) -> TuneryError:
    """With the stage's name, where the error knows none of its own (it was raised by an actor, or by a loader)."""
    if type(error) is not TuneryError:
        return error
    return StageError(stage, error.message, cause=error.cause, remedy=error.remedy, log=log)


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
            queue += sorted(workers.values(), key=lambda failure: bool(SECONDARY_ERRORS.search(str(failure))))
        context = None if link.__suppress_context__ else link.__context__
        wrapped = (getattr(link, name, None) for name in WRAPPED) if _is_of_ray(link) else ()
        for next_link in (*wrapped, link.__cause__, context):
            if isinstance(next_link, BaseException):
                queue.append(next_link)


def _cause(chain: list[BaseException], where: RunContext) -> tuple[str, str, str]:
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
        message, cause = _innermost(chain)
        return "a worker could not start", _joined(f"{message}\n{cause}"), "the whole story is in the log"
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
    message, cause = _innermost(chain)
    return message, cause, "the whole story is in the log"


def _innermost(chain: list[BaseException]) -> tuple[str, str]:
    """The message of the error that the user's or a library's code raised, and what that gives as its reason."""
    told = [link for link in chain if not _is_of_ray(link) and str(link).strip()]
    starters = [link for link in told if not SECONDARY_ERRORS.search(str(link))]
    for link in starters or told:
        # A library's cause says more than it adds; what it was handling when it raised (__context__) mostly doesn't.
        reason = link.__cause__ if link.__cause__ in told else None
        first, rest = _split(_message(link))
        return first, _joined(rest if reason is None else _message(reason))
    texts = [str(link) for link in chain if str(link).strip()]
    for text in sorted(texts, key=lambda text: bool(SECONDARY_ERRORS.search(text))):
        if (raised := raised_in(text)) is not None:
            first, rest = _split(raised)
            return first, _joined(rest)
    first, rest = _split(_message(chain[0]))
    return first, _joined(rest)


def raised_in(text: str) -> str | None:
    """`Type: message` of the error whose traceback ends `text`; None where there is no traceback.

    Frames are indented, so the error's own lines begin at the first line after them that is not.
    """
    lines = RETRY_NOTE.sub("", text).rstrip().splitlines()
    frames = [index for index, line in enumerate(lines) if re.match(r'\s+File ".*", line \d+', line)]
    if frames:
        begins = [index for index in range(frames[-1] + 1, len(lines)) if NAMED.match(lines[index])][:1]
    else:  # shortened to its last lines
        begins = [index for index, line in enumerate(lines) if re.match(r"\w+(Error|Exception|Interrupt)\b", line)][-1:]
    if not begins:
        return None
    name, rest = lines[begins[0]].partition(":")[0], lines[begins[0] :]
    return "\n".join([rest[0][len(name.rpartition(".")[0]) :].lstrip("."), *rest[1:]])


def _is_of_ray(error: BaseException) -> bool:
    """Raised or wrapped by Ray itself; the class of a dual RayTaskError(X) counts as Ray's."""
    return type(error).__module__.split(".")[0] == "ray"


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {RETRY_NOTE.sub('', str(error)).strip()}"


def _split(message: str) -> tuple[str, str]:
    first, _, rest = message.strip().partition("\n")
    return first[:LONGEST], rest


def _joined(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())[:LONGEST]


def _disk_full(chain: list[BaseException], whole: str, where: RunContext) -> bool:
    if any(isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT) for link in chain):
        return True
    if os.strerror(errno.ENOSPC) in whole:
        return True
    return shutil.disk_usage(where.store.root).free < FULL


def _full_place(chain: list[BaseException], where: RunContext) -> Path:
    """The folder that was written to, where the error names it; else the store."""
    names = [Path(str(link.filename)).parent for link in chain if isinstance(link, OSError) and link.filename]
    return next((name for name in names if name.is_dir()), where.store.root)


def _line(text: str, word: str) -> str:
    """The first line with `word`, shortened."""
    return next((line.strip()[:300] for line in text.splitlines() if word in line), "")
