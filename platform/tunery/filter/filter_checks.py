"""Validate the `tunery filter` command line. Errors name the option and its value instead of the generated
experiment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from tunery.errors import RequestError, SpecError, SpecErrors, StageError, TuneryError
from tunery.filter.filter_experiment import (
    FilterRequest,
    GeneratedExperiment,
    dataset_from_cwd,
    model_folder,
    paths_in_experiment,
    reference_sources,
)
from tunery.ingest.read import validate_source
from tunery.ingest.sources import BadSource, resolve_sources
from tunery.models.model_folder import BadModel, check_model_folder
from tunery.spec import Dataset

_PATH = re.compile(r"`stages\.(?:scored\.by\.\d+|kept\.keep\.\w+|rows\.columns|rows|set\d+)(?:\.([^`]*))?`")
_STAGE = re.compile(r"^(?:rows|scored|kept|set\d+): ")
_NAME_COLUMNS = (
    "map the columns: `--column prompt=NAME --column completion=NAME`, `--column messages=NAME` or `--column text=NAME`"
)
_PHRASES = (
    ("the experiment's folder", "the current folder"),
    (", or set `format:`", ""),
    ("set `format: json`", "use a name that ends in .json"),
    ("`columns` names", "`--column` names"),
    ("set `columns` to read", "use `--column` to read"),
)
"""Phrases of messages about an experiment, and their replacements in messages about the command line."""


def check_sources(request: FilterRequest) -> None:
    """Raise RequestError if a source can't be found or read, or its columns are unknown."""
    for source in request.sources:
        if source.startswith("builtin:"):
            raise RequestError(
                f"`{source}` can't be filtered",
                cause="a filter reads files and hub datasets",
                remedy="write an experiment with a dataset, a score and a select stage: `tunery run FILE`",
            )
        try:
            resolve_sources(_dataset_stage(request, source), Path.cwd())
        except BadSource as error:
            raise _to_request_error(error) from error
    try:
        validate_source(_dataset_stage(request, *request.sources), Path.cwd())
    except BadSource as error:
        raise _to_request_error(error) from error


def _dataset_stage(request: FilterRequest, *sources: str) -> Dataset:
    try:
        return dataset_from_cwd(request, sources)
    except ValidationError as error:
        detail = error.errors()[0]
        field = str(detail["loc"][0]) if detail["loc"] else "source"
        options = {
            "limit": f"--limit {request.limit}",
            "columns": " ".join(f"--column {text}" for text in request.columns),
        }
        option = options.get(field, " ".join(request.sources))
        cause = detail["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
        raise RequestError(f"`{option}` is invalid", cause=_rephrase(cause)) from None


def _to_request_error(error: BadSource, option: str = "") -> RequestError:
    remedy = _rephrase(error.remedy)
    if "match no row format" in error.message:
        remedy = _NAME_COLUMNS
    elif error.field not in ("source", "columns"):
        remedy = f"`tunery filter` has no option for it: write an experiment and set `{error.field}:` of its dataset"
    message = f"`{option}`: {error.message}" if option else error.message
    return RequestError(_rephrase(message), cause=_rephrase(error.cause), remedy=remedy)


def check_models(generated: GeneratedExperiment) -> None:
    """Raise RequestError if a scorer's model folder or the rows it compares with are missing or invalid."""
    errors: list[RequestError] = []
    for scorer, option in generated.by_options:
        folder = model_folder(scorer)
        if folder is not None:
            try:
                check_model_folder(folder)
            except BadModel as error:
                message, cause = f"`{option}`: {error.message}", _rephrase(error.cause)
                errors.append(RequestError(message, cause=cause, remedy=error.remedy))
        for source in reference_sources(scorer):
            try:
                validate_source(dataset_from_cwd(FilterRequest((), Path()), [source]), Path.cwd())
            except BadSource as error:
                errors.append(_to_request_error(error, option))
    if errors:
        raise RequestError("\n".join(map(str, errors)))


@contextmanager
def command_line_errors(request: FilterRequest, generated: GeneratedExperiment) -> Iterator[None]:
    """Convert errors of the generated experiment and its stages to errors about the command line."""
    try:
        yield
    except SpecErrors as error:
        errors = [_to_option_error(item, request, generated) for item in error.errors]
        raise RequestError("\n".join(map(str, errors))) from error
    except SpecError as error:
        raise _to_option_error(error, request, generated) from error
    except StageError as error:
        remedy = error.remedy + (f"\nlog: {error.log}" if error.log else "")
        raise TuneryError(
            _to_command_line(error.message, request, generated),
            cause=_to_command_line(error.cause, request, generated),
            remedy=remedy,
        ) from error


def _to_option_error(error: SpecError, request: FilterRequest, generated: GeneratedExperiment) -> RequestError:
    option = generated.options.get(error.line, "")
    message = _STAGE.sub("", error.message)
    message = _PATH.sub(lambda match: f"`{match[1]}`" if match[1] else "it", message)
    message = f"`{option}`: {message}" if option else message
    return RequestError(
        _to_command_line(message, request, generated),
        cause=_to_command_line(error.cause, request, generated),
        remedy=_to_command_line(error.remedy, request, generated),
    )


def _to_command_line(text: str, request: FilterRequest, generated: GeneratedExperiment) -> str:
    """Replace paths and rules of the experiment with those of the command line."""
    for experiment_path, given_path in paths_in_experiment(request, generated).items():
        text = text.replace(f"`{experiment_path}", f"`{given_path}")
    for rule, given_rule in generated.given_rules.items():
        text = text.replace(f"`{rule}`", f"`{given_rule}`")
    return _rephrase(text)


def _rephrase(text: str) -> str:
    for phrase, replacement in _PHRASES:
        text = text.replace(phrase, replacement)
    return text
