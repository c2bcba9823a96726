"""Convert an exception of any library to an error that names the stage, the cause and the remedy.

Ray wraps the exceptions of workers (RayTaskError of Ray Core and Ray Data, UserCodeException, WorkerGroupError and
ControllerError of Ray Train, TuneError), sometimes only as the text of a traceback. The reported error is the wrapped
one. If several workers fail, the root cause is reported: when a worker dies, the others fail with broken connections.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path

from tunery.errors import StageError, TuneryError
from tunery.pipeline.run_context import RunContext
from tunery.workers.worker_group import WorkersFailed

SECONDARY_ERRORS = re.compile(r"Connection (closed|reset) by peer|gloo|NCCL|timed out|Broken pipe", re.IGNORECASE)
WRAPPED = ("cause", "controller_failure", "_base_exc")
"""Attributes with the wrapped exception (Ray 2.60): RayTaskError, ControllerError, UserExceptionWithTraceback."""
RETRY_NOTE = re.compile(r"\n?Failed to .* after \d+/\d+\s+attempts \(total backoff .*", re.DOTALL)
"""Suffix that Ray Data (2.60, _annotate_exception_with_retry_context) adds to the message of an error in a task."""
ERROR_LINE = re.compile(r"[A-Za-z_][\w.<>]*(:|$)")
"""The line of the error at the end of a traceback: `Type: message`, the type with module and enclosing function."""
RUN = "run"
"""Stage name of errors outside of stages."""
MAX_MESSAGE_LENGTH = 500
"""In characters; the log has the complete message."""
MIN_FREE_BYTES = 4 << 20
"""A disk with less free space counts as full."""


def diagnose(error: BaseException, stage: str, run_context: RunContext, trial: str = "") -> TuneryError:
    """Return the first TuneryError in the exception chain, or a StageError if there is none. The traceback is written
    to the log folder of the run."""
    log = run_context.logs / f"{trial or 'run'}-{stage}-error.txt"
    try:
        run_context.logs.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(traceback.format_exception(error)))
    except OSError:  # a full disk must not hide the original error
        pass
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, TuneryError):
            return link if stage == RUN else _at_stage(link, stage, str(log))
    message, cause, remedy = _cause(chain, run_context)
    return StageError(stage, message, cause=cause, remedy=remedy, log=str(log))


def _at_stage(error: TuneryError, stage: str, log: str) -> TuneryError:
    """Add the stage to a plain TuneryError, which an actor or a loader raised."""
    if type(error) is not TuneryError:
        return error
    return StageError(stage, error.message, cause=error.cause, remedy=error.remedy, log=log)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, the errors of workers (root causes before secondary errors), and all their causes."""
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


def _cause(chain: list[BaseException], run_context: RunContext) -> tuple[str, str, str]:
    texts = [f"{type(link).__name__}: {link}" for link in chain]
    names = {base.__name__ for link in chain for base in type(link).__mro__}
    text = "\n".join(texts)
    resume = "then run the same command again: it resumes from the last checkpoint"
    if _disk_full(chain, text, run_context):
        folder = _full_folder(chain, run_context)
        return (
            "the disk is full",
            f"{folder} has {shutil.disk_usage(folder).free / 1e6:,.0f} MB left",
            f"free some space or give another --store, {resume}",
        )
    if ("OutOfMemoryError" in names and "RayError" not in names) or "CUDA out of memory" in text:
        return (
            "a worker ran out of GPU memory",
            _line(text, "out of memory"),
            "lower compute.micro_batch_size, raise compute.zero_stage, or set compute.gradient_checkpointing: true",
        )
    if "OutOfMemoryError" in names or "MemoryError" in names or "can't allocate memory" in text:
        return (
            "a worker ran out of memory",
            _line(text, "memory"),
            "lower compute.micro_batch_size or compute.workers, or use a machine with more memory; " + resume,
        )
    if names & {"WorkerGroupStartupTimeoutError"}:
        return (
            "the workers did not start in time",
            "the cluster has no free resources for them, or its nodes cannot start a process",
            "wait until other jobs have ended, or lower compute.workers; " + resume,
        )
    if "error raised in its creation task" in text:  # an actor of Ray Train or of an actor pool
        message, cause = _innermost(chain)
        return "a worker could not start", _joined(f"{message}\n{cause}"), "see the log for the traceback"
    died = "worker process has died" in text or "WorkerHealthCheckFailedError" in names
    if died or names & {"ActorDiedError", "WorkerCrashedError", "NodeDiedError", "ActorUnavailableError"}:
        signal = re.search(r"SIG[A-Z]+", text)
        return (
            "a worker process was killed",
            "the out-of-memory killer of the system, a kill command, or the death of its node or of the head node"
            + (f" ({signal.group()})" if signal else "")
            + "; the worker reported no error",
            "check the memory of the machine (dmesg), "
            + resume
            + "; a larger compute.max_failures makes a run do that by itself",
        )
    message, cause = _innermost(chain)
    return message, cause, "see the log for the traceback"


def _innermost(chain: list[BaseException]) -> tuple[str, str]:
    """Return the message of the error that user or library code raised, and its cause."""
    errors = [link for link in chain if not _is_of_ray(link) and (str(link).strip() or hasattr(link, "__notes__"))]
    root_causes = [link for link in errors if not SECONDARY_ERRORS.search(str(link))]
    for link in root_causes or errors:
        # The explicit cause of an error is informative; the exception being handled (__context__) mostly is not.
        reason = link.__cause__ if link.__cause__ in errors else None
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
    """Return `Type: message` of the error whose traceback is at the end of `text`; None if there is no traceback.

    Frames are indented, so the lines of the error start at the first unindented line after them.
    """
    lines = RETRY_NOTE.sub("", text).rstrip().splitlines()
    frames = [index for index, line in enumerate(lines) if re.match(r'\s+File ".*", line \d+', line)]
    if frames:
        starts = [index for index in range(frames[-1] + 1, len(lines)) if ERROR_LINE.match(lines[index])][:1]
    else:  # truncated to its last lines
        starts = [index for index, line in enumerate(lines) if re.match(r"\w+(Error|Exception|Interrupt)\b", line)][-1:]
    if not starts:
        return None
    name, rest = lines[starts[0]].partition(":")[0], lines[starts[0] :]
    return "\n".join([rest[0][len(name.rpartition(".")[0]) :].lstrip("."), *rest[1:]])


def _is_of_ray(error: BaseException) -> bool:
    """Whether Ray or the worker group raised or wrapped the error; the dual class RayTaskError(X) counts as Ray's."""
    return type(error).__module__.split(".")[0] == "ray" or isinstance(error, WorkersFailed)


def _message(error: BaseException) -> str:
    """`Type: message`; where the message is empty (an assertion of a library) the line of code that raised it."""
    message = RETRY_NOTE.sub("", str(error)).strip()
    frames = re.findall(r'File "(.*)", (line \d+), in (.*)', "\n".join(getattr(error, "__notes__", ())))
    if not message and frames:
        message = "in {2} ({0}, {1})".format(*frames[-1])
    return f"{type(error).__name__}: {message}"


def _split(message: str) -> tuple[str, str]:
    first, _, rest = message.strip().partition("\n")
    return first[:MAX_MESSAGE_LENGTH], rest


def _joined(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())[:MAX_MESSAGE_LENGTH]


def _disk_full(chain: list[BaseException], text: str, run_context: RunContext) -> bool:
    if any(isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT) for link in chain):
        return True
    if os.strerror(errno.ENOSPC) in text:
        return True
    return shutil.disk_usage(run_context.store.root).free < MIN_FREE_BYTES


def _full_folder(chain: list[BaseException], run_context: RunContext) -> Path:
    """Return the folder that the error names; the store if it names none."""
    folders = [Path(str(link.filename)).parent for link in chain if isinstance(link, OSError) and link.filename]
    return next((folder for folder in folders if folder.is_dir()), run_context.store.root)


def _line(text: str, word: str) -> str:
    """Return the first line with `word`, truncated."""
    return next((line.strip()[:300] for line in text.splitlines() if word in line), "")
