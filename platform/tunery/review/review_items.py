"""Review items: the content of a row as shown to the reviewer, and the outcome of the filter, for the page and the
workbook."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunery.review.filter_results import FilterResult, read_reviewed_columns
from tunery.review.sample import Sample
from tunery.store.rows import Message, Row, row_format


@dataclass(frozen=True)
class RowOutcome:
    """The outcome of the filter for one row."""

    keep: bool
    scores: Mapping[str, float]
    thresholds: Mapping[str, float]


@dataclass(frozen=True)
class ReviewItem:
    """One row of a sample. `row` has only the columns REVIEWED_COLUMNS, which don't reveal an injected corruption."""

    id: str
    row: Row
    outcome: RowOutcome

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages to show, top to bottom: {"role", "content", "judged"}; the response or the text is judged.

        The content includes the reasoning of a message before its text and its tool calls after it.
        """
        format = row_format(self.row)
        if format == "text":
            return [{"role": "text", "content": self.row["text"] or "", "judged": True}]
        messages = self.row["messages"] or []
        judged = range(len(messages)) if format == "prompt" else (len(messages) - 1,)
        rendered = [
            _render_message(message, message["role"], index in judged) for index, message in enumerate(messages)
        ]
        if format == "preference":
            rendered += [
                _render_message(message, f"rejected {message['role']}", True) for message in self.row["rejected"]
            ]
        return rendered


def _render_message(message: Message, role: str, judged: bool) -> dict[str, Any]:
    parts = [f"Reasoning:\n{reasoning}"] if (reasoning := message.get("reasoning_content")) else []
    parts += [message["content"]] if message["content"] else []
    for call in json.loads(message.get("tool_calls") or "[]"):
        function = call["function"]
        parts.append(f"Calls {function['name']}: {json.dumps(function.get('arguments'), ensure_ascii=False)}")
    return {"role": role, "content": "\n\n".join(parts), "judged": judged}


def review_items(filtered: FilterResult, sample: Sample) -> list[ReviewItem]:
    """Return the rows of `sample` in its order, with their content."""
    rows = read_reviewed_columns(filtered, (sampled.id for sampled in sample.rows))
    return [
        ReviewItem(
            sampled.id,
            rows[sampled.id],
            RowOutcome(
                bool(filtered.kept[sampled.index]),
                {score: float(values[sampled.index]) for score, values in filtered.scores.items()},
                filtered.thresholds,
            ),
        )
        for sampled in sample.rows
    ]
