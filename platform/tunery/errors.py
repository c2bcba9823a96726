"""The one exception tree of tunery.

Every error carries what happened (`message`, with the value in it), why (`cause`) and what to do (`remedy`).
`exit_code` is what the command line ends with: 2 when the request was wrong, 1 when the work failed.
All of them survive pickling, because they travel from Ray workers to the driver.
"""

from __future__ import annotations

from typing import Any


class TuneryError(Exception):
    """An error meant for the user's eyes: no traceback is shown with it."""

    exit_code = 1

    def __init__(self, message: str, *, cause: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        parts = [self.message]
        if self.cause:
            parts.append(f"cause: {self.cause}")
        if self.remedy:
            parts.append(f"remedy: {self.remedy}")
        return "\n".join(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own __reduce__ calls cls(*args) and so drops keyword arguments: rebuild from the attributes.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(cls: type[TuneryError], args: tuple[Any, ...], state: dict[str, Any]) -> TuneryError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class RequestError(TuneryError):
    """The request was wrong: nothing was started and nothing was written."""

    exit_code = 2


class SpecError(RequestError):
    """The experiment file is wrong, at `file`:`line` (1-based; 0 when no line can be named)."""

    def __init__(self, message: str, *, file: str = "", line: int = 0, cause: str = "", remedy: str = "") -> None:
        super().__init__(message, cause=cause, remedy=remedy)
        self.file = file
        self.line = line

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.file and self.line else f"{self.file}: " if self.file else ""
        return where + super().__str__()


class SpecErrors(RequestError):
    """Several things are wrong with one experiment file; all of them are reported at once."""

    def __init__(self, errors: list[SpecError]) -> None:
        super().__init__("\n".join(str(error) for error in errors))
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


class StoreError(RequestError):
    """The store can't be used: not writable, or not a store."""


class StageError(TuneryError):
    """A stage failed while running. `log` is the file that holds the whole story."""

    def __init__(self, stage: str, message: str, *, cause: str = "", remedy: str = "", log: str = "") -> None:
        super().__init__(message, cause=cause, remedy=remedy)
        self.stage = stage
        self.log = log

    def __str__(self) -> str:
        text = f"stage {self.stage}: " + super().__str__()
        return text + (f"\nlog: {self.log}" if self.log else "")


class RowsLost(StageError):
    """Rows in and rows out of a stage differ: an invariant of tunery is broken."""


class Stopped(TuneryError):
    """A trial was stopped on request, by a user or a scheduler; it did not fail."""


class Interrupted(TuneryError):
    """Ctrl-C: stopped cleanly; the same command resumes the run."""

    exit_code = 130
