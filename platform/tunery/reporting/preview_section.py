"""Rows as the model sees them: the section of the report, from the events `preview` that trainings log, and the words
and signs that `tunery preview` uses too. Pure.

A record is what models/preview.py makes of a row: {id, source, line, reason, sequences: [{label, num_tokens,
num_trained, max_length, truncated, cut_tokens, reason, notes, segments: [[kind, text, special]]}]}.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tunery.events.formatting import as_number, count, strings
from tunery.events.run_state import StageState
from tunery.events.stage_summary import listed

KINDS = ("trained", "masked", "input", "cut", "mark")
OPEN = 1
"""Rows of a stage that are open when the report is opened."""
# Control characters would act on a terminal, and bidirectional overrides (U+202A to U+202E, U+2066 to U+2069) change
# the order in which what follows is shown (https://www.unicode.org/reports/tr36/#Bidirectional_Text_Spoofing).
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060\u2066-\u2069\ufeff]")


@dataclass(frozen=True)
class ShownSequence:
    """A token sequence for the page."""

    label: str
    said: str
    reason: str
    segments: list[tuple[str, str]]
    """(CSS classes, text)."""


@dataclass(frozen=True)
class ShownRow:
    title: str
    said: str
    reason: str
    sequences: list[ShownSequence]


def visible(text: str) -> str:
    """`text` with a sign for each character that has none: ⏎ (and a line break), ⇥, and the name of others."""
    shown = _INVISIBLE.sub(_sign, text)
    return shown.replace("\t", "⇥\t").replace("\n", "⏎\n")


def _sign(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's control pictures
    return "␡" if code == 0x7F else f"<U+{code:04X}>"


def said_tokens(sequence: Mapping[str, Any], loss_word: str = "trained") -> str:
    """Of a record's sequence: '213 of 512 tokens, 87 trained; truncated, 120 tokens cut off'."""
    tokens, most = as_number(sequence.get("num_tokens")) or 0, as_number(sequence.get("max_length")) or 0
    trained, cut = as_number(sequence.get("num_trained")), as_number(sequence.get("cut_tokens"))
    said = f"{count(tokens)} of at most {count(most)} tokens"
    if sequence.get("blocks"):
        said = f"{count(tokens)} tokens, in blocks of {count(most)}"
    if trained is not None:
        said += f", {count(trained)} {loss_word}"
    if sequence.get("truncated") or cut:
        said += f"; truncated, {count(cut)} tokens cut off" if cut else "; truncated"
    return said


def previews(stages: Iterable[StageState]) -> list[tuple[str, str, list[ShownRow]]]:
    """(stage, what its chat template does, rows) of each training that logged some; of a trial's with the trial."""
    found = []
    for stage in stages:
        rows = [_row(record) for record in listed(stage.preview.get("records"))]
        if rows:
            name = f"{stage.name}, trial {stage.trial}" if stage.trial else stage.name
            found.append((name, str(stage.preview.get("template") or ""), rows))
    return found


def _row(record: Mapping[str, Any]) -> ShownRow:
    sequences = [
        ShownSequence(
            str(one.get("label") or ""),
            "; ".join([said_tokens(one), *strings(one.get("notes"))]),
            str(one.get("reason") or ""),
            list(_segments(one.get("segments"))),
        )
        for one in listed(record.get("sequences"))
    ]
    source, line = str(record.get("source") or ""), as_number(record.get("line"))
    at = f"{source}:{line:.0f}" if source and line else source
    said = sequences[0].said if len(sequences) == 1 else f"{len(sequences)} sequences" if sequences else "not used"
    return ShownRow(
        str(record.get("id") or "a row"), f"{at} {said}".strip(), str(record.get("reason") or ""), sequences
    )


def _segments(told: object) -> Iterable[tuple[str, str]]:
    for segment in told if isinstance(told, list) else ():
        if isinstance(segment, list | tuple) and len(segment) == 3 and segment[0] in KINDS:
            kind, text, special = segment
            yield f"{kind} special" if special else str(kind), visible(str(text))
