"""`tunery preview`: the first rows of a stage as its model gets them, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tunery.errors import RequestError, SpecErrors
from tunery.models.preview import ROWS, preview_rows, template_summary, text_summary
from tunery.models.preview_sequences import PreviewRow
from tunery.models.template_rendering import UnsupportedTemplate
from tunery.preview.artifacts import Artifacts, LoadedTokenizer
from tunery.preview.inputs import ModelInput, preview_inputs
from tunery.runner.check_training import check_shapes
from tunery.runner.execute import Where
from tunery.spec import load
from tunery.store import Store
from tunery.store.rows import Row

MAX_SKIPPED_DOCUMENTS = 10_000
"""Texts that are encoded to know where the blocks of a later one begin."""


class NoSuchRow(RequestError):
    """A set of rows has no row of an id, or not so many."""


@dataclass(frozen=True)
class PreviewSection:
    """Some rows for one tokenizer."""

    input: ModelInput
    rows_from: str
    tokenizer_from: str
    summary: str
    """What the chat template does, or what is put around a text."""
    rows: tuple[PreviewRow, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.input.title,
            "data": self.input.data,
            "input_format": self.input.input_format,
            "rows_from": self.rows_from,
            "tokenizer": self.tokenizer_from,
            "summary": self.summary,
            "rows": [row.as_json() for row in self.rows],
        }


@dataclass(frozen=True)
class Preview:
    stage: str
    kind: str
    sections: tuple[PreviewSection, ...]

    def as_json(self) -> dict[str, Any]:
        return {"stage": self.stage, "kind": self.kind, "sections": [one.as_json() for one in self.sections]}


def preview(
    file: Path, stage: str, store: Store, count: int = ROWS, offset: int = 0, row_id: str | None = None
) -> Preview:
    """`count` rows from the `offset`-th on, or from the one whose id begins with `row_id`.

    Raises RequestError where there is no such stage or row, the rows are of a wrong shape, the chat template can't be
    used, or the tokenizer is not built yet; TuneryError where a model from the hub can't be loaded.
    """
    experiment, source = load(file)
    inputs = preview_inputs(stage, experiment)
    where = Where(store, store.run(experiment.name), Path(source.file))
    if errors := list(check_shapes(stage, experiment.stages[stage], experiment, source, where.folder)):
        raise SpecErrors(errors)
    models = [model for item in inputs for model in item.models if isinstance(model, str)]
    artifacts = Artifacts(experiment, source, where, [*(item.data for item in inputs), *models])
    sections = []
    missing: list[RequestError] = []
    for item in inputs:
        tokenizer = artifacts.tokenizer(item.models, item.input_format, item.embeds)
        stream = artifacts.rows(item.data, item.within)
        try:
            before, rows = _window(stream.rows, item, count, offset, row_id)
        except NoSuchRow as error:  # of several sets of rows one may have it
            missing.append(error)
            continue
        sections.append(_section(item, tokenizer, stream.described(), before, rows))
    if not sections:
        raise missing[0]
    return Preview(stage, experiment.stages[stage].kind, tuple(sections))


def _window(
    stream: Iterator[Row], item: ModelInput, count: int, offset: int, row_id: str | None
) -> tuple[list[Row], list[Row]]:
    """The rows before (of documents, whose blocks go on from them) and the rows to show. Raises NoSuchRow."""
    keep_before = item.input_format == "documents"
    before: list[Row] = []
    number = 0
    for number, row in enumerate(stream, 1):
        if number > offset and (row_id is None or row["id"].startswith(row_id)):
            return before, [row, *islice(stream, 0 if row_id else count - 1)]
        if keep_before:
            before.append(row)
            if len(before) > MAX_SKIPPED_DOCUMENTS:
                raise RequestError(
                    f"a text after the first {MAX_SKIPPED_DOCUMENTS:,} of `{item.data}` can't be shown",
                    cause="where its blocks begin depends on the tokens of all texts before it",
                    remedy="give a smaller --offset, or a row among the first ones",
                )
    if row_id is not None:
        raise NoSuchRow(
            f"`{item.data}` has no row `{row_id}`",
            cause=f"the id of none of its {number:,} rows begins so",
            remedy="ids are in the artifacts' rows, in dropped.jsonl and in the lines that this command prints",
        )
    raise NoSuchRow(
        f"`{item.data}` has {number:,} rows, so there is none after the first {offset:,}",
        remedy="give a smaller --offset",
    )


def _section(
    item: ModelInput, loaded: LoadedTokenizer, rows_from: str, before: list[Row], rows: list[Row]
) -> PreviewSection:
    tokenizer = loaded.tokenizer
    try:
        shown = preview_rows(
            [*before, *rows], tokenizer, item.encoding, item.input_format, model=loaded.model, skip=len(before)
        )
        if tokenizer.chat_template is None:
            summary = "the model has no chat template: question and answer are a pair of texts, or one text"
        elif any(row.get("messages") for row in rows):
            own = "" if loaded.has_template else "tunery's own, because the model brings none; "
            summary = f"chat template: {own}{template_summary(tokenizer)}"
        else:
            summary = text_summary(tokenizer)
    except UnsupportedTemplate as error:
        raise RequestError(
            f"the chat template of {loaded.origin} can't be used",
            cause=str(error),
            remedy="give the model folder another chat_template.jinja, or take another model",
        ) from None
    return PreviewSection(item, rows_from, loaded.origin, summary, tuple(shown))
