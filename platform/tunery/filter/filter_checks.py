"""What is wrong with a filter's command line, in its own words: the option and the value, not the experiment's text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from tunery.errors import RequestError, SpecError, SpecErrors, StageError, TuneryError
from tunery.filter.filter_experiment import (
    Built,
    FilterRequest,
    dataset_here,
    model_folder,
    other_rows,
    paths_in_experiment,
)
from tunery.ingest.read import check_source
from tunery.ingest.sources import BadSource, find_parts
from tunery.models.model_folder import BadModel, check_model_folder
from tunery.spec import Dataset

_PATH = re.compile(r"`stages\.(?:scored\.by\.\d+|kept\.keep\.\w+|rows\.columns|rows|set\d+)(?:\.([^`]*))?`")
_STAGE = re.compile(r"^(?:rows|scored|kept|set\d+): ")
_NAME_COLUMNS = (
    "say what the columns are: `--column prompt=NAME --column completion=NAME`, `--column messages=NAME` or "
    "`--column text=NAME`"
)
_PHRASES = (
    ("the experiment's folder", "the current folder"),
    (", or say `format:`", ""),
    ("say `format: json`", "let its name end in .json"),
    ("`columns` names", "`--column` names"),
    ("name the `columns` to read", "name the columns with `--column` to read"),
)
"""Of messages about an experiment."""


def check_sources(asked: FilterRequest) -> None:
    """Raises RequestError where a source can't be found or read, or its columns have no known meaning."""
    for source in asked.sources:
        if source.startswith("builtin:"):
            raise RequestError(
                f"`{source}` is no source of a filter",
                cause="a filter reads files and hub datasets",
                remedy="write an experiment with a dataset, a score and a select stage: `tunery run FILE`",
            )
        try:
            find_parts(_stage(asked, source), Path.cwd())
        except BadSource as error:
            raise _in_words(error) from error
    try:
        check_source(_stage(asked, *asked.sources), Path.cwd())
    except BadSource as error:
        raise _in_words(error) from error


def _stage(asked: FilterRequest, *sources: str) -> Dataset:
    try:
        return dataset_here(asked, sources)
    except ValidationError as error:
        detail = error.errors()[0]
        field = str(detail["loc"][0]) if detail["loc"] else "source"
        options = {"limit": f"--limit {asked.limit}", "columns": " ".join(f"--column {text}" for text in asked.columns)}
        option = options.get(field, " ".join(asked.sources))
        cause = detail["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
        raise RequestError(f"`{option}` can't be used", cause=_phrased(cause)) from None


def _in_words(error: BadSource, option: str = "") -> RequestError:
    remedy = _phrased(error.remedy)
    if "don't fit" in error.message:
        remedy = _NAME_COLUMNS
    elif error.field not in ("source", "columns"):
        remedy = f"`tunery filter` has no option for it: write an experiment, whose dataset has `{error.field}:`"
    message = f"`{option}`: {error.message}" if option else error.message
    return RequestError(_phrased(message), cause=_phrased(error.cause), remedy=remedy)


def check_models(built: Built) -> None:
    """Raises RequestError where model folders are missing or incomplete, or rows that scorers compare with are."""
    errors: list[RequestError] = []
    for scorer, option in built.by_options:
        folder = model_folder(scorer)
        if folder is not None:
            try:
                check_model_folder(folder)
            except BadModel as error:
                message, cause = f"`{option}`: {error.message}", _phrased(error.cause)
                errors.append(RequestError(message, cause=cause, remedy=error.remedy))
        for source in other_rows(scorer):
            try:
                check_source(dataset_here(FilterRequest((), Path()), [source]), Path.cwd())
            except BadSource as error:
                errors.append(_in_words(error, option))
    if errors:
        raise RequestError("\n".join(map(str, errors)))


@contextmanager
def command_line_errors(asked: FilterRequest, built: Built) -> Iterator[None]:
    """Errors about the experiment, and about its stages while they run, in the words of the command line."""
    try:
        yield
    except SpecErrors as error:
        told = [_of_option(item, asked, built) for item in error.errors]
        raise RequestError("\n".join(map(str, told))) from error
    except SpecError as error:
        raise _of_option(error, asked, built) from error
    except StageError as error:
        remedy = error.remedy + (f"\nlog: {error.log}" if error.log else "")
        raise TuneryError(
            _unstaged(error.message, asked, built), cause=_unstaged(error.cause, asked, built), remedy=remedy
        ) from error


def _of_option(error: SpecError, asked: FilterRequest, built: Built) -> RequestError:
    option = built.options.get(error.line, "")
    message = _STAGE.sub("", error.message)
    message = _PATH.sub(lambda found: f"`{found[1]}`" if found[1] else "it", message)
    message = f"`{option}`: {message}" if option else message
    return RequestError(
        _unstaged(message, asked, built),
        cause=_unstaged(error.cause, asked, built),
        remedy=_unstaged(error.remedy, asked, built),
    )


def _unstaged(text: str, asked: FilterRequest, built: Built) -> str:
    """With paths and rules as they were given."""
    for written, given in paths_in_experiment(asked, built).items():
        text = text.replace(f"`{written}", f"`{given}")
    for rule, said in built.described.items():
        text = text.replace(f"`{rule}`", f"`{said}`")
    return _phrased(text)


def _phrased(text: str) -> str:
    for phrase, words in _PHRASES:
        text = text.replace(phrase, words)
    return text
