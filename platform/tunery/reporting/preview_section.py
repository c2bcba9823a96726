"""Tokenized rows in the report, from the `preview` events that trainings log, and formatting shared with
`tunery preview`.

models/preview.py builds a record from a row: {id, source, line, reason, sequences: [{label, num_tokens, num_trained,
max_length, truncated, cut_tokens, reason, notes, segments: [[kind, text, special]]}]}.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tunery.events.formatting import as_number, count, strings
from tunery.events.run_state import StageState
from tunery.events.stage_summary import mappings_in

KINDS = ("trained", "masked", "input", "cut", "mark")
MAX_EXPANDED = 1
"""Rows of a stage that are expanded when the report is opened."""
# A terminal interprets control characters, and bidirectional overrides (U+202A to U+202E, U+2066 to U+2069) reorder
# the text that follows (https://www.unicode.org/reports/tr36/#Bidirectional_Text_Spoofing).
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060\u2066-\u2069\ufeff]")


@dataclass(frozen=True)
class SequenceView:
    """A token sequence, formatted for the page."""

    label: str
    summary: str
    reason: str
    segments: list[tuple[str, str]]
    """(CSS classes, text)."""


@dataclass(frozen=True)
class RowView:
    """A row with its token sequences, formatted for the page."""

    title: str
    summary: str
    reason: str
    sequences: list[SequenceView]


def visible(text: str) -> str:
    """Replace invisible characters: line breaks by ⏎ and a line break, tabs by ⇥ and a tab, others by their code."""
    replaced = _INVISIBLE.sub(_symbol, text)
    return replaced.replace("\t", "⇥\t").replace("\n", "⏎\n")


def _symbol(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's control pictures
    return "␡" if code == 0x7F else f"<U+{code:04X}>"


def token_summary(sequence: Mapping[str, Any], loss_word: str = "trained") -> str:
    """Token counts of a record's sequence: '213 tokens (max_length 512), 87 trained; truncated by 120 tokens'."""
    tokens, max_length = as_number(sequence.get("num_tokens")) or 0, as_number(sequence.get("max_length")) or 0
    trained, cut = as_number(sequence.get("num_trained")), as_number(sequence.get("cut_tokens"))
    summary = f"{count(tokens)} tokens (max_length {count(max_length)})"
    if sequence.get("blocks"):
        summary = f"{count(tokens)} tokens, in blocks of {count(max_length)}"
    if trained is not None:
        summary += f", {count(trained)} {loss_word}"
    if sequence.get("truncated") or cut:
        summary += f"; truncated by {count(cut)} tokens" if cut else "; truncated"
    return summary


def previews(stages: Iterable[StageState]) -> list[tuple[str, str, list[RowView]]]:
    """(stage name with its trial, if any; description of its chat template; rows) of each training that logged rows."""
    result = []
    for stage in stages:
        rows = [_row(record) for record in mappings_in(stage.preview.get("records"))]
        if rows:
            name = f"{stage.name}, trial {stage.trial}" if stage.trial else stage.name
            result.append((name, str(stage.preview.get("template") or ""), rows))
    return result


def _row(record: Mapping[str, Any]) -> RowView:
    sequences = [
        SequenceView(
            str(one.get("label") or ""),
            "; ".join([token_summary(one), *strings(one.get("notes"))]),
            str(one.get("reason") or ""),
            list(_segments(one.get("segments"))),
        )
        for one in mappings_in(record.get("sequences"))
    ]
    source, line = str(record.get("source") or ""), as_number(record.get("line"))
    at = f"{source}:{line:.0f}" if source and line else source
    summary = (
        sequences[0].summary if len(sequences) == 1 else f"{len(sequences)} sequences" if sequences else "not used"
    )
    return RowView(
        str(record.get("id") or "a row"), f"{at} {summary}".strip(), str(record.get("reason") or ""), sequences
    )


def _segments(segments: object) -> Iterable[tuple[str, str]]:
    for segment in segments if isinstance(segments, list) else ():
        if isinstance(segment, list | tuple) and len(segment) == 3 and segment[0] in KINDS:
            kind, text, special = segment
            yield f"{kind} special" if special else str(kind), visible(str(text))
