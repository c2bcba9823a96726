"""What a reviewer sees of a row, and, once it is decided, of the filter: the same for the page and the workbook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunery.data.review.filtered import Filtered, read_shown
from tunery.data.review.sample import Sample
from tunery.store.rows import Row, shape_of


@dataclass(frozen=True)
class Verdict:
    """The filter's, on one row."""

    keep: bool
    scores: Mapping[str, float]
    cuts: Mapping[str, float]


@dataclass(frozen=True)
class Item:
    """One row of a sample. `row` has no more than `filtered.SHOWN`: nothing that says what was planted."""

    id: str
    row: Row
    verdict: Verdict

    @property
    def turns(self) -> list[dict[str, Any]]:
        """What to show, top to bottom: {"role", "content", "judged"}; what is judged is the answer, or the text."""
        shape = shape_of(self.row)
        if shape == "text":
            return [{"role": "text", "content": self.row["text"] or "", "judged": True}]
        turns = self.row["messages"] or []
        judged = range(len(turns)) if shape == "prompt" else (len(turns) - 1,)
        shown = [{**turn, "judged": place in judged} for place, turn in enumerate(turns)]
        if shape == "preference":
            shown += [{**turn, "role": f"rejected {turn['role']}", "judged": True} for turn in self.row["rejected"]]
        return shown


def items(filtered: Filtered, sample: Sample) -> list[Item]:
    """The rows of `sample` in its order, with their content."""
    rows = read_shown(filtered, (drawn.id for drawn in sample.rows))
    return [
        Item(
            drawn.id,
            rows[drawn.id],
            Verdict(
                bool(filtered.kept[drawn.index]),
                {score: float(values[drawn.index]) for score, values in filtered.scores.items()},
                filtered.cuts,
            ),
        )
        for drawn in sample.rows
    ]
