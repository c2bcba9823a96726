"""Exceptions of tunery.

Every error has a message (with the invalid value), a cause and a remedy. `exit_code` is the exit code of the command
line: 2 for an invalid request, 1 for a failure. All errors can be pickled, because Ray workers send them to the driver.
"""

from __future__ import annotations

from typing import Any


class TuneryError(Exception):
    """An error for the user, shown without a traceback."""

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
        # Exception.__reduce__ calls cls(*args), which drops keyword arguments: rebuild from the attributes.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(cls: type[TuneryError], args: tuple[Any, ...], state: dict[str, Any]) -> TuneryError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class RequestError(TuneryError):
    """The request is invalid; nothing was started or written."""

    exit_code = 2


class SpecError(RequestError):
    """The experiment file is invalid at `file`:`line` (1-based; 0 if there is no line)."""

    def __init__(self, message: str, *, file: str = "", line: int = 0, cause: str = "", remedy: str = "") -> None:
        super().__init__(message, cause=cause, remedy=remedy)
        self.file = file
        self.line = line

    def __str__(self) -> str:
        location = f"{self.file}:{self.line}: " if self.file and self.line else f"{self.file}: " if self.file else ""
        return location + super().__str__()


class SpecErrors(RequestError):
    """All errors of an experiment file, reported together."""

    def __init__(self, errors: list[SpecError]) -> None:
        super().__init__("\n".join(str(error) for error in errors))
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


class StoreError(RequestError):
    """The store is not usable: it is not writable, or not a store."""


class StageError(TuneryError):
    """A stage failed while running. `log` is the file with the complete output."""

    def __init__(self, stage: str, message: str, *, cause: str = "", remedy: str = "", log: str = "") -> None:
        super().__init__(message, cause=cause, remedy=remedy)
        self.stage = stage
        self.log = log

    def __str__(self) -> str:
        text = f"stage {self.stage}: " + super().__str__()
        return text + (f"\nlog: {self.log}" if self.log else "")


class RowCountError(StageError):
    """The number of input rows of a stage is not the sum of its output rows and quarantined rows."""


class Stopped(TuneryError):
    """A trial was stopped by a user or a scheduler; it did not fail."""


class Interrupted(TuneryError):
    """The run was interrupted by a signal; the same command resumes it."""

    exit_code = 130
