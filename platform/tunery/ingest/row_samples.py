"""A few rows of a filter for the report: some that were kept and some that were dropped at every decile of a score.

They are facts, so they are few and short. Which rows: those of the smallest ids, which are hashes, so that it does not
depend on where a row stands.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tunery.ingest.corruption_metrics import Bools, Floats
from tunery.store.rows import Row, to_str_list
from tunery.store.score_cache import ids_to_uint64

TEXT = 300
"""Characters of a row that are told."""
EACH = 2
"""Rows kept, and rows dropped, of each decile."""
SAMPLE_SIZE = 100_000
"""Values that the deciles are worked out from: every so many-th, which places them to within half a percent."""
FIRST = 5
"""Quarantined rows that are told."""
REASONS = 1_000
"""Different reasons that are counted by themselves."""


def decile_edges(column: Callable[[], Iterator[Floats]], rows: int) -> Floats:
    """The edges between the deciles of a score that has so many values; fewer than nine where many are the same."""
    every = max(1, rows // SAMPLE_SIZE)
    start, seen = 0, []
    for piece in column():
        seen.append(piece[(-start) % every :: every])
        start += len(piece)
    values = np.concatenate(seen) if seen else np.empty(0)
    values = values[np.isfinite(values)]
    if not len(values):
        return np.empty(0)
    edges: Floats = np.unique(np.quantile(values, np.arange(1, 10) / 10))
    return edges


class Samples:
    """Sees all rows of a filter, a shard at a time; holds a few."""

    def __init__(self, score: str, edges: Floats) -> None:
        self._score, self._edges = score, edges
        self._counts = np.zeros((len(edges) + 1, 2), dtype=np.int64)
        self._found: dict[tuple[int, bool], list[tuple[int, dict[str, Any]]]] = {}
        self._ends = [(np.inf, -np.inf)] * (len(edges) + 1)

    def see(self, rows: pa.Table, scores: Floats, kept: Bools) -> None:
        # What lies at an edge belongs below it: of many equal scores none is parted from the others.
        places = np.searchsorted(self._edges, scores, side="left")
        numbers = ids_to_uint64(to_str_list(rows["id"]))
        for decile in range(len(self._edges) + 1):
            here = (places == decile) & np.isfinite(scores)
            if here.any():
                low, high = self._ends[decile]
                self._ends[decile] = min(low, float(scores[here].min())), max(high, float(scores[here].max()))
            for verdict in (True, False):
                among = np.flatnonzero(here & (kept == verdict))
                self._counts[decile, int(verdict)] += len(among)
                first = among[np.argsort(numbers[among], kind="stable")[:EACH]]
                fresh = [(int(numbers[index]), self._told(rows, int(index), float(scores[index]))) for index in first]
                found = self._found.get((decile, verdict), [])
                self._found[decile, verdict] = sorted([*found, *fresh], key=lambda item: item[0])[:EACH]

    def _told(self, rows: pa.Table, index: int, score: float) -> dict[str, Any]:
        row = rows.slice(index, 1).to_pylist()[0]
        return {"text": excerpt(row), "score": score, "planted": row["planted"]}

    def facts(self) -> dict[str, Any]:
        """{"score", "deciles": [{"low", "high", "kept", "dropped", "kept_rows", "dropped_rows"}]}."""
        deciles = []
        for decile, (low, high) in enumerate(self._ends):
            if low <= high:
                rows = {
                    name: [told for _, told in self._found.get((decile, verdict), [])]
                    for name, verdict in (("kept_rows", True), ("dropped_rows", False))
                }
                dropped, kept = map(int, self._counts[decile])
                deciles.append({"low": low, "high": high, "kept": kept, "dropped": dropped, **rows})
        return {"score": self._score, "deciles": deciles}


def excerpt(row: Row) -> str:
    """The row in at most TEXT characters: the text; of a conversation the last question and the answer."""
    turns = row.get("messages") or []
    if not turns:
        return _clipped(row.get("text") or "", TEXT)
    asked = next((turn["content"] or "" for turn in reversed(turns) if turn["role"] == "user"), "")
    answer = (turns[-1]["content"] or "") if turns[-1]["role"] == "assistant" else ""
    if not (asked and answer):
        return _clipped(asked or answer, TEXT)
    head = _clipped(asked, TEXT // 3)
    return f"{head} → {_clipped(answer, TEXT - len(head) - 3)}"


def _clipped(text: str, most: int) -> str:
    text = " ".join(text[: 4 * most].split())
    return text if len(text) <= most else text[: most - 1] + "…"


def quarantine_facts(file: Path) -> dict[str, Any]:
    """How often each reason stands in a quarantine.jsonl, the most frequent ten, and its first rows."""
    reasons: Counter[str] = Counter()
    first: list[dict[str, Any]] = []
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            told = json.loads(line)
            reason = _clipped(told["reason"], TEXT)
            reasons[reason if reason in reasons or len(reasons) < REASONS else "other reasons"] += 1
            if len(first) < FIRST:
                text = _clipped(str(told.get("excerpt") or ""), TEXT)
                first.append({"source": told["source"], "line": told["line"], "reason": reason, "text": text})
    listed = reasons.most_common(10)
    if (rest := reasons.total() - sum(count for _, count in listed)) > 0:
        listed.append(("other reasons", rest))
    return {"reasons": [{"reason": reason, "rows": count} for reason, count in listed], "first": first}
