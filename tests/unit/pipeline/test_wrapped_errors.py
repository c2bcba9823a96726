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
from tunery.pipeline.run_context import RunContext
from tunery.store import Store

NOTE = (
    "Failed to map after 1/16 attempts (total backoff 0.0s).\n"
    "To change retry attempts, backoff, or which errors are retried, configure `ray.data.DataContext.get_current()` "
    "(`retried_io_errors` for I/O) if you believe this to be transient."
)
MESSAGE = "ValueError: the row has 3 labels"


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    (tmp_path / "store").mkdir()
    return RunContext(Store(tmp_path / "store"), tmp_path / "run", tmp_path)


def raised(error: Exception) -> tuple[Exception, str]:
    """Return the error as a worker raises it, with its traceback, and the traceback as text."""
    try:
        raise error
    except Exception as caught:
        return caught, "ray::Map() (pid=7, ip=10.0.0.1)\n" + traceback.format_exc()


def task_error(error: Exception) -> RayTaskError:
    caught, text = raised(error)
    return RayTaskError("Map", text, caught)


def diagnosed(error: Exception, context: RunContext) -> TuneryError:
    return diagnose(error, "scored", context)


def test_error_of_a_ray_task(context: RunContext) -> None:
    assert diagnosed(task_error(ValueError("the row has 3 labels")), context).message == MESSAGE


def test_error_of_a_ray_task_as_ray_get_raises_it(context: RunContext) -> None:
    dual = task_error(ValueError("the row has 3 labels")).as_instanceof_cause()
    assert diagnosed(dual, context).message == MESSAGE


def test_error_of_a_ray_data_task_is_shown_without_the_note_on_retries(context: RunContext) -> None:
    actual = diagnosed(task_error(ValueError(f"the row has 3 labels\n{NOTE}")).as_instanceof_cause(), context)
    assert (actual.message, actual.cause) == (MESSAGE, "")


def test_error_that_cannot_be_pickled_is_read_from_the_traceback(context: RunContext) -> None:
    class Local(Exception):  # the driver can't import this class
        def __reduce__(self) -> tuple:
            raise TypeError("cannot pickle")

    error = RayTaskError("Map", raised(Local(f"the row has 3 labels\n{NOTE}"))[1], Local("x"))
    assert isinstance(error.cause, RayError)
    actual = diagnosed(error, context)
    assert actual.message.endswith("Local: the row has 3 labels")
    assert "To change retry" not in str(actual)


def test_error_within_a_user_code_exception(context: RunContext) -> None:
    error = UserCodeException("UDF failed")
    error.__cause__ = ValueError("the row has 3 labels")
    assert diagnosed(error, context).message == MESSAGE


def worker_error(error: Exception) -> WorkerGroupError:
    wrapped = UserExceptionWithTraceback(*raised(error))
    return WorkerGroupError(str(wrapped), {0: RuntimeError("Connection reset by peer"), 1: wrapped})


def test_root_cause_is_reported_instead_of_secondary_worker_errors(context: RunContext) -> None:
    assert (
        diagnosed(pickle.loads(pickle.dumps(worker_error(ValueError("the row has 3 labels")))), context).message
        == MESSAGE
    )


def test_error_of_ray_trains_controller(context: RunContext) -> None:
    assert diagnosed(ControllerError(task_error(ValueError("the row has 3 labels"))), context).message == MESSAGE


def test_error_of_tune_is_read_from_the_traceback(context: RunContext) -> None:
    assert diagnosed(TuneError(raised(ValueError("the row has 3 labels"))[1]), context).message == MESSAGE


def test_error_of_an_actors_constructor(context: RunContext) -> None:
    error = ActorDiedError()
    error.error_msg = (
        "The actor died because of an error raised in its creation task, "
        + raised(ValueError("the row has 3 labels"))[1]
    )
    actual = diagnosed(error, context)
    assert (actual.message, actual.cause) == ("a worker could not start", MESSAGE)


@pytest.mark.parametrize("wrap", [task_error, worker_error, lambda error: ControllerError(task_error(error))])
def test_tunery_error_keeps_cause_and_remedy_and_gets_the_stage(context: RunContext, wrap: object) -> None:
    actual = diagnosed(wrap(TuneryError("no row", cause="all are empty", remedy="give others")), context)  # type: ignore[operator]
    assert isinstance(actual, StageError)
    assert (actual.stage, actual.message, actual.cause, actual.remedy) == (
        "scored",
        "no row",
        "all are empty",
        "give others",
    )


def test_first_line_is_the_message_and_other_lines_are_the_cause(context: RunContext) -> None:
    actual = diagnosed(OSError("can't load the model\nit has no config.json\nsee the docs"), context)
    assert actual.message == "OSError: can't load the model"
    assert actual.cause == "it has no config.json; see the docs"


def chained(reason: Exception, *, explicit: bool) -> Exception:
    """Return a ValueError that was raised while `reason` was handled, and `from` it if `explicit`."""
    try:
        try:
            raise reason
        except Exception as handled:
            if explicit:
                raise ValueError("the row has 3 labels") from handled
            raise ValueError("the row has 3 labels")  # noqa: B904
    except ValueError as error:
        return error


def test_implicitly_chained_exception_is_not_the_cause(context: RunContext) -> None:
    actual = diagnosed(chained(KeyError("tokens"), explicit=False), context)
    assert (actual.message, actual.cause) == (MESSAGE, "")


def test_explicitly_chained_exception_is_the_cause(context: RunContext) -> None:
    actual = diagnosed(chained(OSError("connection refused"), explicit=True), context)
    assert (actual.message, actual.cause) == (MESSAGE, "OSError: connection refused")


def test_tunery_error_outside_of_stages_has_no_stage(context: RunContext) -> None:
    actual = diagnose(TuneryError("no cluster responds"), RUN, context)
    assert type(actual) is TuneryError
