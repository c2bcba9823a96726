"""Row samples for the report: a few kept and a few dropped rows at each decile of a score.

They are stored in the facts of an artifact, so they are few and short. The rows with the smallest ids are sampled; ids
are hashes, so the sample does not depend on the order of the rows.
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

MAX_EXCERPT_CHARS = 300
ROWS_PER_DECILE = 2
"""Number of kept rows, and of dropped rows, sampled from each decile."""
SAMPLE_SIZE = 100_000
"""Number of evenly spaced values that the deciles are estimated from, accurate to half a percent."""
NUM_QUARANTINED = 5
"""Number of quarantined rows in the facts."""
MAX_REASONS = 1_000
"""Maximum number of distinct reasons that are counted separately."""


def decile_edges(column: Callable[[], Iterator[Floats]], rows: int) -> Floats:
    """Return the edges between the deciles of a score with `rows` values; fewer than nine if many values are equal."""
    stride = max(1, rows // SAMPLE_SIZE)
    start, sampled = 0, []
    for chunk in column():
        sampled.append(chunk[(-start) % stride :: stride])
        start += len(chunk)
    values = np.concatenate(sampled) if sampled else np.empty(0)
    values = values[np.isfinite(values)]
    if not len(values):
        return np.empty(0)
    edges: Floats = np.unique(np.quantile(values, np.arange(1, 10) / 10))
    return edges


class DecileSamples:
    """Receives the rows of a filter, shard by shard, and holds a few of each decile."""

    def __init__(self, score: str, edges: Floats) -> None:
        self.score, self._edges = score, edges
        self._counts = np.zeros((len(edges) + 1, 2), dtype=np.int64)
        self._samples: dict[tuple[int, bool], list[tuple[int, dict[str, Any]]]] = {}
        self._ranges = [(np.inf, -np.inf)] * (len(edges) + 1)

    def empty_copy(self) -> DecileSamples:
        return DecileSamples(self.score, self._edges)

    def add(self, rows: pa.Table, scores: Floats, kept: Bools) -> None:
        # A score equal to an edge belongs to the decile below it, so equal scores share a decile.
        deciles = np.searchsorted(self._edges, scores, side="left")
        ids = ids_to_uint64(to_str_list(rows["id"]))
        for decile in range(len(self._edges) + 1):
            in_decile = (deciles == decile) & np.isfinite(scores)
            if in_decile.any():
                low, high = self._ranges[decile]
                decile_scores = scores[in_decile]
                self._ranges[decile] = min(low, float(decile_scores.min())), max(high, float(decile_scores.max()))
            for is_kept in (True, False):
                indices = np.flatnonzero(in_decile & (kept == is_kept))
                self._counts[decile, int(is_kept)] += len(indices)
                smallest = indices[np.lexsort((scores[indices], ids[indices]))[:ROWS_PER_DECILE]]
                new = [(int(ids[index]), self._sample(rows, int(index), float(scores[index]))) for index in smallest]
                self._add_samples((decile, is_kept), new)

    def merge(self, other: DecileSamples) -> None:
        """Add the rows of another filter of the same score. The order of merges does not matter."""
        self._counts += other._counts
        self._ranges = [
            (min(low, other_low), max(high, other_high))
            for (low, high), (other_low, other_high) in zip(self._ranges, other._ranges, strict=True)
        ]
        for key, samples in other._samples.items():
            self._add_samples(key, samples)

    def _add_samples(self, key: tuple[int, bool], new: list[tuple[int, dict[str, Any]]]) -> None:
        def order(item: tuple[int, dict[str, Any]]) -> tuple[int, float, str]:
            id, sample = item
            return id, sample["score"], sample["injected_corruption"] or ""  # rows with equal ids may have other scores

        self._samples[key] = sorted([*self._samples.get(key, []), *new], key=order)[:ROWS_PER_DECILE]

    def _sample(self, rows: pa.Table, index: int, score: float) -> dict[str, Any]:
        row = rows.slice(index, 1).to_pylist()[0]
        return {"text": excerpt(row), "score": score, "injected_corruption": row["injected_corruption"]}

    def facts(self) -> dict[str, Any]:
        """Return {"score", "deciles": [{"low", "high", "kept", "dropped", "kept_rows", "dropped_rows"}]}."""
        deciles = []
        for decile, (low, high) in enumerate(self._ranges):
            if low <= high:
                rows = {
                    name: [sample for _, sample in self._samples.get((decile, is_kept), [])]
                    for name, is_kept in (("kept_rows", True), ("dropped_rows", False))
                }
                dropped, kept = map(int, self._counts[decile])
                deciles.append({"low": low, "high": high, "kept": kept, "dropped": dropped, **rows})
        return {"score": self.score, "deciles": deciles}


def excerpt(row: Row) -> str:
    """Return at most MAX_EXCERPT_CHARS characters of the row: its text, or the last user message and the response."""
    messages = row.get("messages") or []
    if not messages:
        return _truncate(row.get("text") or "", MAX_EXCERPT_CHARS)
    prompt = next((message["content"] or "" for message in reversed(messages) if message["role"] == "user"), "")
    response = (messages[-1]["content"] or "") if messages[-1]["role"] == "assistant" else ""
    if not (prompt and response):
        return _truncate(prompt or response, MAX_EXCERPT_CHARS)
    head = _truncate(prompt, MAX_EXCERPT_CHARS // 3)
    return f"{head} → {_truncate(response, MAX_EXCERPT_CHARS - len(head) - 3)}"


def _truncate(text: str, max_chars: int) -> str:
    text = " ".join(text[: 4 * max_chars].split())
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def quarantine_facts(file: Path) -> dict[str, Any]:
    """Return the ten most frequent reasons of a quarantine.jsonl with their counts, and its first rows."""
    reasons: Counter[str] = Counter()
    first: list[dict[str, Any]] = []
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            entry = json.loads(line)
            reason = _truncate(entry["reason"], MAX_EXCERPT_CHARS)
            reasons[reason if reason in reasons or len(reasons) < MAX_REASONS else "other reasons"] += 1
            if len(first) < NUM_QUARANTINED:
                text = _truncate(str(entry.get("excerpt") or ""), MAX_EXCERPT_CHARS)
                first.append({"source": entry["source"], "line": entry["line"], "reason": reason, "text": text})
    most_common = reasons.most_common(10)
    if (rest := reasons.total() - sum(count for _, count in most_common)) > 0:
        most_common.append(("other reasons", rest))
    return {"reasons": [{"reason": reason, "rows": count} for reason, count in most_common], "first": first}
