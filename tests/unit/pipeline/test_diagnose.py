"""Messages for errors that libraries raise."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, RayActorError

from tunery.pipeline.diagnose import diagnose
from tunery.pipeline.run_context import RunContext
from tunery.store import Store


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    (tmp_path / "store").mkdir()
    return RunContext(Store(tmp_path / "store"), tmp_path / "run", tmp_path)


def actor_error(text: str) -> RayActorError:
    error = ActorDiedError()
    error.error_msg = text
    return error


def test_killed_worker_is_reported_as_killed(context: RunContext) -> None:
    result = diagnose(actor_error("The actor died unexpectedly: Worker exit: SIGKILL"), "sft", context)
    assert result.message == "a worker process was killed"
    assert "SIGKILL" in result.cause


def test_worker_that_raised_at_start_is_not_reported_as_killed(context: RunContext) -> None:
    text = "The actor died because of an error raised in its creation task, ray::A.x()\nValueError: no such file x"
    result = diagnose(actor_error(text), "sft", context)
    assert result.message == "a worker could not start"
    assert result.cause == "ValueError: no such file x"
    assert "ValueError" in (context.logs / "run-sft-error.txt").read_text()
