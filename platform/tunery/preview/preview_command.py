"""`tunery preview`: tokenizes the first rows of a stage, for text or JSON output."""

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
from tunery.pipeline.run_context import RunContext
from tunery.pipeline.validate_training import validate_row_formats
from tunery.preview.inputs import ModelInput, preview_inputs
from tunery.preview.preview_sources import LoadedTokenizer, PreviewSources
from tunery.spec import load
from tunery.store import Store
from tunery.store.rows import Row

MAX_SKIPPED_DOCUMENTS = 10_000
"""Texts before the previewed one that are encoded to find the block boundaries."""


class NoSuchRow(RequestError):
    """The requested row id or offset does not exist."""


@dataclass(frozen=True)
class PreviewSection:
    """Previewed rows for one tokenizer."""

    input: ModelInput
    rows_from: str
    tokenizer_from: str
    summary: str
    """Summary of the chat template, or of the special tokens around a text."""
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
    """Preview `count` rows from index `offset` on, or the row whose id begins with `row_id`.

    Raises RequestError if the stage or row does not exist, the rows have an unsupported format, the chat template is
    not usable, or the tokenizer is not built yet; TuneryError if a model cannot be loaded from the hub.
    """
    experiment, source = load(file)
    inputs = preview_inputs(stage, experiment)
    context = RunContext(store, store.run(experiment.name), Path(source.file))
    if errors := list(validate_row_formats(stage, experiment.stages[stage], experiment, source, context.folder)):
        raise SpecErrors(errors)
    models = [model for item in inputs for model in item.models if isinstance(model, str)]
    sources = PreviewSources(experiment, source, context, [*(item.data for item in inputs), *models])
    sections = []
    missing: list[RequestError] = []
    for item in inputs:
        tokenizer = sources.tokenizer(item.models, item.input_format, item.embeds)
        stream = sources.rows(item.data, item.within)
        try:
            before, rows = _window(stream.rows, item, count, offset, row_id)
        except NoSuchRow as error:  # another input may have the row
            missing.append(error)
            continue
        sections.append(_section(item, tokenizer, stream.description(), before, rows))
    if not sections:
        raise missing[0]
    return Preview(stage, experiment.stages[stage].kind, tuple(sections))


def _window(
    stream: Iterator[Row], item: ModelInput, count: int, offset: int, row_id: str | None
) -> tuple[list[Row], list[Row]]:
    """Return (preceding rows, previewed rows). The former are kept only for documents, which are packed into blocks
    with the texts before them. Raises NoSuchRow."""
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
                    f"only the first {MAX_SKIPPED_DOCUMENTS:,} texts of `{item.data}` can be previewed",
                    cause="the block boundaries of a text depend on the tokens of all texts before it",
                    remedy="give a smaller --offset, or the id of an earlier row",
                )
    if row_id is not None:
        raise NoSuchRow(
            f"`{item.data}` has no row `{row_id}`",
            cause=f"none of its {number:,} rows has an id that begins with `{row_id}`",
            remedy="ids are in the artifacts' rows, in dropped.jsonl and in the output of this command",
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
        previews = preview_rows(
            [*before, *rows], tokenizer, item.encoding, item.input_format, model=loaded.model, skip=len(before)
        )
        if tokenizer.chat_template is None:
            summary = "the model has no chat template: prompt and response are encoded as a pair of texts, or as one"
        elif any(row.get("messages") for row in rows):
            default = "" if loaded.has_template else "tunery's default, because the model has none; "
            summary = f"chat template: {default}{template_summary(tokenizer)}"
        else:
            summary = text_summary(tokenizer)
    except UnsupportedTemplate as error:
        raise RequestError(
            f"the chat template of {loaded.origin} can't be used",
            cause=str(error),
            remedy="put another chat_template.jinja into the model folder, or use another model",
        ) from None
    return PreviewSection(item, rows_from, loaded.origin, summary, tuple(previews))
