"""Decisions of a filter on each record of its sources, in order: kept, dropped by a rule, or quarantined."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tunery.errors import RowCountError
from tunery.spec import RANDOM
from tunery.store.rows import shards

BATCH_SIZE = 1024
QUARANTINED = "quarantined"
"""Value of `dropped_by` for a row that can't be read, used or scored."""


@dataclass(frozen=True)
class RowDecision:
    outcome: Literal["kept", "dropped", "quarantined"]
    scores: Mapping[str, float | None] = field(default_factory=dict)
    """Score by scorer name; None for a missing score."""
    by: str = ""
    """The rule that dropped the row, as on the command line."""
    reason: str = ""
    """The score and the columns that explain it; for a quarantined row the error."""


@dataclass(frozen=True)
class Artifacts:
    """Output folders of the stages of the run."""

    rows: Path
    scored: Path | None
    """None if the rules need no score."""
    kept: Path
    """Only dropped.jsonl is read, which is complete even if the stage failed because no row passed."""


class RowDecisions:
    """Decisions by source and line, in the order of the sources, with one batch of rows in memory."""

    def __init__(self, artifacts: Artifacts, scores: Sequence[str], rules: Mapping[str, tuple[str, Sequence[str]]]):
        """`scores`: names of the scorers; `rules`: by the rule name in dropped.jsonl, the rule as on the command line
        and the scores it uses."""
        self._artifacts, self._scores, self._rules = artifacts, scores, rules
        self._quarantined_rows = _Peekable(_quarantine(artifacts.rows))
        self._failed_rows = _Peekable(_quarantine(artifacts.scored) if artifacts.scored else iter(()))
        self._rows = _Peekable(self._row_decisions())

    @property
    def is_exhausted(self) -> bool:
        return not (self._quarantined_rows.head or self._failed_rows.head or self._rows.head)

    def of(self, source: str, line: int) -> RowDecision:
        """Return the decision on the next record. Raises RowCountError if there is none."""
        for decisions in (self._quarantined_rows, self._failed_rows, self._rows):
            if decisions.head is not None and decisions.head[0] == (source, line):
                return decisions.next()
        raise RowCountError("kept", f"there is no decision about `{source}:{line}`")

    def _row_decisions(self) -> Iterator[tuple[tuple[str, int], RowDecision]]:
        """Yield the decisions on the rows that are not quarantined."""
        filtered = self._artifacts.scored or self._artifacts.rows
        with (self._artifacts.kept / "dropped.jsonl").open(encoding="utf-8") as file:
            dropped = (json.loads(line) for line in file)
            next_dropped = next(dropped, None)
            for path in shards(filtered):
                table = pq.read_table(path, columns=["source", "line"])
                score_table = _read_score_table(self._artifacts.scored, path.name)
                for start in range(0, len(table), BATCH_SIZE):
                    rows = table.slice(start, BATCH_SIZE).to_pylist()
                    if score_table is not None:
                        score_rows = score_table.slice(start, BATCH_SIZE).to_pylist()
                    else:
                        score_rows = [{}] * len(rows)
                    for row, score_row in zip(rows, score_rows, strict=True):
                        key = (row["source"], row["line"])
                        scores = {name: _finite_or_none(score_row.get(name)) for name in self._scores}
                        if next_dropped is not None and key == (next_dropped["source"], next_dropped["line"]):
                            rule = str(next_dropped["rule"])
                            by, rule_scores = self._rules.get(rule, (rule, ()))
                            reason = "; ".join(_reason(score, scores.get(score), score_row) for score in rule_scores)
                            yield key, RowDecision("dropped", scores, by, reason)
                            next_dropped = next(dropped, None)
                        else:
                            yield key, RowDecision("kept", scores)
        if next_dropped is not None:
            location = f"{next_dropped['source']}:{next_dropped['line']}"
            raise RowCountError("kept", f"`{location}` was dropped, but is not among the rows")


def _quarantine(artifact: Path) -> Iterator[tuple[tuple[str, int], RowDecision]]:
    with (artifact / "quarantine.jsonl").open(encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            yield (entry["source"], entry["line"]), RowDecision("quarantined", by=QUARANTINED, reason=entry["reason"])


def _read_score_table(scored: Path | None, name: str) -> Any:
    """Read the numeric and text columns of a score table, without vectors and row ids."""
    if scored is None:
        return None
    path = scored / "scores" / name
    schema = pq.read_schema(path)
    types = (pa.string(), pa.list_(pa.string()), pa.float64(), pa.float32(), pa.int64())
    columns = [item.name for item in schema if not _has_ids(item.name) and _is_one_of(item.type, types)]
    return pq.read_table(path, columns=columns)


def _has_ids(name: str) -> bool:
    return name == "id" or name.endswith("_nearest")


def _is_one_of(type_: Any, types: Sequence[Any]) -> bool:
    if pa.types.is_list(type_):
        return bool(pa.types.is_string(type_.value_type))
    return type_ in types


def _finite_or_none(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _reason(score: str, value: float | None, score_row: Mapping[str, Any]) -> str:
    """Return the score with the columns that explain it, such as "gopher is 2 (rules: words_min, stop_words_min)"."""
    if score == RANDOM:
        return "not among the random rows"
    if value is None:
        return f"{score} could not be computed"
    details = []
    for name, detail in score_row.items():
        if name.startswith(f"{score}_") and isinstance(detail, str | list) and detail:
            text = ", ".join(detail) if isinstance(detail, list) else detail
            details.append(f"{name.removeprefix(f'{score}_')}: {text}")
    return f"{score} is {value:.6g}" + (f" ({'; '.join(details)})" if details else "")


class _Peekable:
    """An iterator of (key, decision) with access to the next item."""

    def __init__(self, items: Iterator[tuple[tuple[str, int], RowDecision]]) -> None:
        self._items = items
        self.head = next(items, None)

    def next(self) -> RowDecision:
        assert self.head is not None, "the caller checks `head`"
        _, decision = self.head
        self.head = next(self._items, None)
        return decision
