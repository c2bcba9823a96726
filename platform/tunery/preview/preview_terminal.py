"""Renders a preview with colours for a terminal, or with brackets as plain text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text

from tunery.models.preview_sequences import PreviewRow, PreviewSequence, Segment
from tunery.preview.preview_command import Preview, PreviewSection
from tunery.reporting.preview_section import token_summary, visible

STYLES = {"trained": "bold green", "masked": "dim", "input": "", "cut": "dim red strike", "mark": "bold cyan"}
SPECIAL = {"trained": "bold reverse green", "masked": "magenta", "input": "magenta", "cut": "dim red strike"}
BRACKETS = {"trained": ("⟦", "⟧"), "cut": ("⟪", "⟫"), "mark": ("«", "»")}
"""Plain-text markers by kind of segment."""


def render(preview: Preview, *, colours: bool, ids: bool) -> RenderableType:
    """Render a preview; without `colours` brackets mark the segments. `ids`: add token ids."""
    parts: list[RenderableType] = [Text(f"{preview.stage} ({preview.kind})", style="bold"), _legend(preview, colours)]
    for section in preview.sections:
        parts.append(Text(""))
        if section.input.title:
            parts.append(Text(section.input.title, style="bold underline"))
        parts += [
            Text(f"tokenizer: {section.tokenizer_from}"),
            Text(visible(section.summary)),
            Text(visible(section.rows_from)),
        ]
        for row in section.rows:
            parts += _row(row, section, colours, ids)
    return Group(*parts)


def _legend(preview: Preview, colours: bool) -> Text:
    sequences = [one for section in preview.sections for row in section.rows for one in row.sequences]
    words = dict.fromkeys(section.input.loss_word for section in preview.sections)
    entries: list[tuple[str, str]] = []
    if any(one.has_loss for one in sequences):
        entries += [(word, "trained") for word in words] + [("masked: no loss", "masked")]
    entries += [("special token", "special")] if colours else []
    entries += [("cut off", "cut")] if any(one.cuts for one in sequences) else []
    entries += [("position", "mark")] if any(one.marks or one.cuts for one in sequences) else []
    legend = Text("legend: ")
    for number, (word, kind) in enumerate(entries):
        if number:
            legend.append("  ")
        if colours:
            legend.append(word, style=SPECIAL["masked"] if kind == "special" else STYLES[kind])
        else:
            opening, closing = BRACKETS.get(kind, ("", ""))
            legend.append(f"{opening}{word}{closing}")
    return legend.append("  ⏎ line break" if entries else "⏎ line break")


def _row(row: PreviewRow, section: PreviewSection, colours: bool, ids: bool) -> Iterator[Text]:
    at = f"{row.source}:{row.line}" if row.source and row.line else row.source
    yield Text("")
    one = row.sequences[0] if len(row.sequences) == 1 and not row.sequences[0].label else None
    head = Text.assemble(("row ", "bold"), (row.id, "bold"), f"  {visible(at)}")
    if one is not None:
        head.append(f"  {_summary(one, section)}")
    yield head
    if row.reason:
        yield Text(f"not used: {visible(row.reason)}", style="bold red")
    for sequence in row.sequences:
        if one is None:
            yield Text.assemble((sequence.label, "bold underline"), f"  {_summary(sequence, section)}")
        for note in sequence.notes:
            yield Text(f"note: {note}", style="dim")
        if sequence.reason:
            yield Text(f"not used: {visible(sequence.reason)}", style="bold red")
        text = _text(sequence.segments(with_ids=ids), colours)
        if text.plain:
            yield text


def _summary(sequence: PreviewSequence, section: PreviewSection) -> str:
    return visible(token_summary(sequence.common_fields(), section.input.loss_word))


def _text(segments: list[Segment], colours: bool) -> Text:
    text = Text()
    if colours:
        for segment in segments:
            styles = SPECIAL if segment.special else STYLES
            content = f"«{segment.text.strip()}»" if segment.kind == "mark" else visible(segment.text)
            text.append(content, style=styles[segment.kind])
    else:
        for _, group in groupby(segments, key=lambda one: (one.kind, one.text if one.kind == "mark" else "")):
            members = list(group)
            opening, closing = BRACKETS.get(members[0].kind, ("", ""))
            text.append(opening + "".join(visible(one.text) for one in members) + closing)
    text.rstrip()
    return text
