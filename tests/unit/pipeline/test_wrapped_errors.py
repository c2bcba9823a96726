"""The original error of a worker is reported, for each way in which Ray wraps errors."""

from __future__ import annotations

import pickle
import traceback
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, RayError, RayTaskError, UserCodeException
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.tune.error import TuneError

from tunery.errors import StageError, TuneryError
from tunery.pipeline.diagnose import RUN, diagnose
from tunery.pipeline.execute import RunContext
from tunery.store import Store

NOTE = (
    "Failed to map after 1/16 attempts (total backoff 0.0s).\n"
    "To change retry attempts, backoff, or which errors are retried, configure `ray.data.DataContext.get_current()` "
    "(`retried_io_errors` for I/O) if you believe this to be transient."
)
SHOWN = "ValueError: the row has 3 labels"


@pytest.fixture
def where(tmp_path: Path) -> RunContext:
    (tmp_path / "store").mkdir()
    return RunContext(Store(tmp_path / "store"), tmp_path / "run", tmp_path)


def raised(error: Exception) -> tuple[Exception, str]:
    """As a worker raises it: with a traceback, and that as text."""
    try:
        raise error
    except Exception as caught:
        return caught, "ray::Map() (pid=7, ip=10.0.0.1)\n" + traceback.format_exc()


def task_error(error: Exception) -> RayTaskError:
    caught, text = raised(error)
    return RayTaskError("Map", text, caught)


def told(error: Exception, where: RunContext) -> TuneryError:
    return diagnose(error, "scored", where)


def test_error_of_a_ray_task(where: RunContext) -> None:
    assert told(task_error(ValueError("the row has 3 labels")), where).message == SHOWN


def test_error_of_a_ray_task_as_ray_get_raises_it(where: RunContext) -> None:
    dual = task_error(ValueError("the row has 3 labels")).as_instanceof_cause()
    assert told(dual, where).message == SHOWN


def test_error_of_a_ray_data_task_is_shown_without_the_note_on_retries(where: RunContext) -> None:
    found = told(task_error(ValueError(f"the row has 3 labels\n{NOTE}")).as_instanceof_cause(), where)
    assert (found.message, found.cause) == (SHOWN, "")


def test_error_that_cannot_be_pickled_is_read_from_the_traceback(where: RunContext) -> None:
    class Local(Exception):  # of a class that the driver can't import
        def __reduce__(self) -> tuple:
            raise TypeError("cannot pickle")

    error = RayTaskError("Map", raised(Local(f"the row has 3 labels\n{NOTE}"))[1], Local("x"))
    assert isinstance(error.cause, RayError)
    found = told(error, where)
    assert found.message.endswith("Local: the row has 3 labels")
    assert "To change retry" not in str(found)


def test_error_within_a_user_code_exception(where: RunContext) -> None:
    error = UserCodeException("UDF failed")
    error.__cause__ = ValueError("the row has 3 labels")
    assert told(error, where).message == SHOWN


def worker_error(error: Exception) -> WorkerGroupError:
    wrapped = UserExceptionWithTraceback(*raised(error))
    return WorkerGroupError(str(wrapped), {0: RuntimeError("Connection reset by peer"), 1: wrapped})


def test_error_of_a_training_worker_and_not_that_of_its_neighbour(where: RunContext) -> None:
    assert told(pickle.loads(pickle.dumps(worker_error(ValueError("the row has 3 labels")))), where).message == SHOWN


def test_error_of_ray_trains_controller(where: RunContext) -> None:
    assert told(ControllerError(task_error(ValueError("the row has 3 labels"))), where).message == SHOWN


def test_error_of_tune_is_read_from_the_traceback(where: RunContext) -> None:
    assert told(TuneError(raised(ValueError("the row has 3 labels"))[1]), where).message == SHOWN


def test_error_of_an_actors_constructor(where: RunContext) -> None:
    error = ActorDiedError()
    error.error_msg = (
        "The actor died because of an error raised in its creation task, "
        + raised(ValueError("the row has 3 labels"))[1]
    )
    found = told(error, where)
    assert (found.message, found.cause) == ("a worker could not start", SHOWN)


@pytest.mark.parametrize("wrap", [task_error, worker_error, lambda error: ControllerError(task_error(error))])
def test_error_of_ours_keeps_its_cause_and_remedy_and_gains_the_stage(where: RunContext, wrap: object) -> None:
    found = told(wrap(TuneryError("no row", cause="all are empty", remedy="give others")), where)  # type: ignore[operator]
    assert isinstance(found, StageError)
    assert (found.stage, found.message, found.cause, found.remedy) == (
        "scored",
        "no row",
        "all are empty",
        "give others",
    )


def test_first_line_is_the_message_and_the_others_the_cause(where: RunContext) -> None:
    found = told(OSError("can't load the model\nit has no config.json\nsee the docs"), where)
    assert found.message == "OSError: can't load the model"
    assert found.cause == "it has no config.json; see the docs"


def caught(reason: Exception, *, given: bool) -> Exception:
    """A ValueError raised while `reason` was handled, and `from` it where that is `given`."""
    try:
        try:
            raise reason
        except Exception as handled:
            if given:
                raise ValueError("the row has 3 labels") from handled
            raise ValueError("the row has 3 labels")  # noqa: B904
    except ValueError as error:
        return error


def test_what_was_handled_when_an_error_was_raised_does_not_replace_it(where: RunContext) -> None:
    found = told(caught(KeyError("tokens"), given=False), where)
    assert (found.message, found.cause) == (SHOWN, "")


def test_reason_that_a_library_gives_is_the_cause(where: RunContext) -> None:
    found = told(caught(OSError("connection refused"), given=True), where)
    assert (found.message, found.cause) == (SHOWN, "OSError: connection refused")


def test_error_of_ours_between_the_stages_is_of_no_stage(where: RunContext) -> None:
    found = diagnose(TuneryError("no cluster answers"), RUN, where)
    assert type(found) is TuneryError
