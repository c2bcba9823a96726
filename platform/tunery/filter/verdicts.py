"""What a filter decided about each record of its sources, in their order: kept, dropped by a rule, or quarantined."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tunery.errors import RowsLost
from tunery.spec import RANDOM
from tunery.store.rows import shards

BATCH = 1024
QUARANTINED = "quarantined"
"""In `dropped_by`: the row can't be read, used or scored."""


@dataclass(frozen=True)
class Verdict:
    outcome: Literal["kept", "dropped", "quarantined"]
    scores: Mapping[str, float | None] = field(default_factory=dict)
    """By scorer; None where there is no score."""
    by: str = ""
    """The rule that dropped the row, as on the command line."""
    reason: str = ""
    """Why: the score, and what explains it; of a quarantined row what is wrong with it."""


@dataclass(frozen=True)
class Artifacts:
    """Folders of what the run's stages wrote."""

    rows: Path
    scored: Path | None
    """None where the rules need no score."""
    kept: Path
    """Only its dropped.jsonl is read, which is complete also where the stage failed because no row passes."""


class Verdicts:
    """The verdicts by source and line, in the order of the sources. Memory: a batch of rows."""

    def __init__(self, artifacts: Artifacts, scores: Sequence[str], rules: Mapping[str, tuple[str, Sequence[str]]]):
        """`scores`: names of the scorers; `rules`: by the rule as dropped.jsonl has it, the rule as on the command
        line and the scores that it looks at."""
        self._artifacts, self._scores, self._rules = artifacts, scores, rules
        self._unread = _Peekable(_quarantine(artifacts.rows))
        self._unscored = _Peekable(_quarantine(artifacts.scored) if artifacts.scored else iter(()))
        self._decided = _Peekable(self._rows())

    @property
    def is_exhausted(self) -> bool:
        return not (self._unread.head or self._unscored.head or self._decided.head)

    def of(self, source: str, line: int) -> Verdict:
        """The verdict on the next record. Raises RowsLost where there is none on this one."""
        for verdicts in (self._unread, self._unscored, self._decided):
            if verdicts.head is not None and verdicts.head[0] == (source, line):
                return verdicts.next()
        raise RowsLost("kept", f"nothing was decided about `{source}:{line}`")

    def _rows(self) -> Iterator[tuple[tuple[str, int], Verdict]]:
        """Of the rows that have their scores."""
        filtered = self._artifacts.scored or self._artifacts.rows
        with (self._artifacts.kept / "dropped.jsonl").open(encoding="utf-8") as file:
            dropped = (json.loads(line) for line in file)
            next_dropped = next(dropped, None)
            for path in shards(filtered):
                table = pq.read_table(path, columns=["source", "line"])
                explained = _score_table(self._artifacts.scored, path.name)
                for start in range(0, len(table), BATCH):
                    rows = table.slice(start, BATCH).to_pylist()
                    scored = explained.slice(start, BATCH).to_pylist() if explained is not None else [{}] * len(rows)
                    for row, found in zip(rows, scored, strict=True):
                        key = (row["source"], row["line"])
                        scores = {name: _finite(found.get(name)) for name in self._scores}
                        if next_dropped is not None and key == (next_dropped["source"], next_dropped["line"]):
                            rule = str(next_dropped["rule"])
                            by, looks_at = self._rules.get(rule, (rule, ()))
                            reason = "; ".join(_told(score, scores.get(score), found) for score in looks_at)
                            yield key, Verdict("dropped", scores, by, reason)
                            next_dropped = next(dropped, None)
                        else:
                            yield key, Verdict("kept", scores)
        if next_dropped is not None:
            where = f"{next_dropped['source']}:{next_dropped['line']}"
            raise RowsLost("kept", f"`{where}` was dropped, and is none of the rows")


def _quarantine(artifact: Path) -> Iterator[tuple[tuple[str, int], Verdict]]:
    with (artifact / "quarantine.jsonl").open(encoding="utf-8") as file:
        for line in file:
            bad = json.loads(line)
            yield (bad["source"], bad["line"]), Verdict("quarantined", by=QUARANTINED, reason=bad["reason"])


def _score_table(scored: Path | None, name: str) -> Any:
    """Scores and what explains them in words; no vectors, no ids of rows."""
    if scored is None:
        return None
    path = scored / "scores" / name
    schema = pq.read_schema(path)
    worded = (pa.string(), pa.list_(pa.string()), pa.float64(), pa.float32(), pa.int64())
    columns = [item.name for item in schema if not _holds_ids(item.name) and _is_one_of(item.type, worded)]
    return pq.read_table(path, columns=columns)


def _holds_ids(name: str) -> bool:
    return name == "id" or name.endswith("_nearest")


def _is_one_of(kind: Any, known: Sequence[Any]) -> bool:
    if pa.types.is_list(kind):
        return bool(pa.types.is_string(kind.value_type))
    return kind in known


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _told(score: str, value: float | None, found: Mapping[str, Any]) -> str:
    """ "gopher is 2 (rules: words_min, stop_words_min)"."""
    if score == RANDOM:
        return "not among the random rows"
    if value is None:
        return f"no {score} could be computed"
    words = []
    for name, explained in found.items():
        if name.startswith(f"{score}_") and isinstance(explained, str | list) and explained:
            listed = ", ".join(explained) if isinstance(explained, list) else explained
            words.append(f"{name.removeprefix(f'{score}_')}: {listed}")
    return f"{score} is {value:.6g}" + (f" ({'; '.join(words)})" if words else "")


class _Peekable:
    """An iterator of (key, verdict) whose next item can be looked at."""

    def __init__(self, items: Iterator[tuple[tuple[str, int], Verdict]]) -> None:
        self._items = items
        self.head = next(items, None)

    def next(self) -> Verdict:
        assert self.head is not None, "the head was looked at"
        _, verdict = self.head
        self.head = next(self._items, None)
        return verdict
