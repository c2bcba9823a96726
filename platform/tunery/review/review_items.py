"""What a reviewer sees of a row, and, once it is decided, of the filter: the same for the page and the workbook."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunery.review.filter_results import FilterResult, read_shown
from tunery.review.sample import Sample
from tunery.store.rows import Row, Turn, row_format


@dataclass(frozen=True)
class RowOutcome:
    """The filter's, on one row."""

    keep: bool
    scores: Mapping[str, float]
    cuts: Mapping[str, float]


@dataclass(frozen=True)
class ReviewItem:
    """One row of a sample. `row` has no more than `filtered.SHOWN`: nothing that says what was planted."""

    id: str
    row: Row
    verdict: RowOutcome

    @property
    def turns(self) -> list[dict[str, Any]]:
        """What to show, top to bottom: {"role", "content", "judged"}; what is judged is the answer, or the text. The
        content begins with a turn's reasoning and ends with its calls of tools, where there are some."""
        shape = row_format(self.row)
        if shape == "text":
            return [{"role": "text", "content": self.row["text"] or "", "judged": True}]
        turns = self.row["messages"] or []
        judged = range(len(turns)) if shape == "prompt" else (len(turns) - 1,)
        shown = [_preview(turn, turn["role"], place in judged) for place, turn in enumerate(turns)]
        if shape == "preference":
            shown += [_preview(turn, f"rejected {turn['role']}", True) for turn in self.row["rejected"]]
        return shown


def _preview(turn: Turn, role: str, judged: bool) -> dict[str, Any]:
    parts = [f"Reasoning:\n{reasoning}"] if (reasoning := turn.get("reasoning_content")) else []
    parts += [turn["content"]] if turn["content"] else []
    for call in json.loads(turn.get("tool_calls") or "[]"):
        function = call["function"]
        parts.append(f"Calls {function['name']}: {json.dumps(function.get('arguments'), ensure_ascii=False)}")
    return {"role": role, "content": "\n\n".join(parts), "judged": judged}


def review_items(filtered: FilterResult, sample: Sample) -> list[ReviewItem]:
    """The rows of `sample` in its order, with their content."""
    rows = read_shown(filtered, (drawn.id for drawn in sample.rows))
    return [
        ReviewItem(
            drawn.id,
            rows[drawn.id],
            RowOutcome(
                bool(filtered.kept[drawn.index]),
                {score: float(values[drawn.index]) for score, values in filtered.scores.items()},
                filtered.cuts,
            ),
        )
        for drawn in sample.rows
    ]
