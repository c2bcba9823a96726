"""The `select` stage: the rows that pass the rules; dropped.jsonl lists the others with the rule that dropped them.

The scores are read first, to find the cuts (data/cut.py: six passes, constant memory), then the rows, a shard at a
time, to write what passes; kept rows go from file to file as Arrow tables, not through Python. It runs on one core, in
the driver. On paper, 100 M rows of 1 kB: 0.8 GB a score and pass, 100 GB of rows to read and as much to write; what
grows with the data is the list of dropped rows on disk, and with a quota 100 bytes a row that it keeps in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tunery.data.judge import Bools, Floats, filter_quality
from tunery.data.rules import Cut, QuotaCut, describe, find_cut, random_scores
from tunery.data.samples import Samples, decile_edges
from tunery.data.score_facts import JUDGED
from tunery.errors import RowsLost, StageError
from tunery.spec import RANDOM, Keep, Select
from tunery.store import Artifact, StageContext, StageResult
from tunery.store.rows import shards, strings, write_tables


@dataclass
class Rule:
    score: str
    keep: Keep
    good: Literal["low", "high"]
    cut: Cut
    dropped: int = 0
    """Rows that this rule was the one to drop."""
    passed: int = 0
    """Rows that it would keep by itself."""

    @property
    def described(self) -> str:
        return describe(self.score, self.keep)

    @property
    def sign(self) -> float:
        return 1.0 if self.keep.range is not None or self.good == "low" else -1.0


def make_selection(context: StageContext) -> StageResult:
    """Facts: rows_in, kept, dropped, and per rule its cut and how many it dropped; a few rows at each decile of the
    first rule's score; how well it found planted rows."""
    stage = context.spec
    assert isinstance(stage, Select)
    data = context.inputs[stage.data]
    table = ScoredRows(data.path, context.seed)
    goods = goods_of(data)
    rules = [_rule(context, table, score, keep, goods) for score, keep in stage.keep.items()]
    quota = _see_quota(stage, table, _again(rules), goods) if stage.quota else None
    judge = Judge(table.rows)
    single = len(rules) == 1 and rules[0].keep.range is None
    samples = Samples(rules[0].score, decile_edges(lambda: table.column(rules[0].score), table.rows))
    written = 0

    with (context.out / "dropped.jsonl").open("w", encoding="utf-8") as file:

        def passed() -> Iterator[pa.Table]:
            start = 0
            for shard in table.files:
                rows = pq.read_table(shard)
                scores = table.scores(shard)
                kept, reasons = decide(stage, rules, scores)
                if quota is not None:
                    within = quota.passing(range(start, start + len(rows)))
                    reasons = ["quota" if k and not w else r for r, k, w in zip(reasons, kept, within, strict=True)]
                    kept &= within
                start += len(rows)
                _list_dropped(file, rows, kept, reasons)
                samples.see(rows, scores[rules[0].score], kept)
                judge.see(rows["planted"], ~kept, rules[0].sign * scores[rules[0].score] if single else None)
                context.emit("progress", done=start, total=table.rows, unit="rows")
                yield rows.filter(pa.array(kept))

        written = write_tables(passed(), context.out)

    dropped = sum(1 for _ in (context.out / "dropped.jsonl").open(encoding="utf-8"))
    if written + dropped != table.rows:
        raise RowsLost(context.name, f"{table.rows} rows went in, {written} kept, {dropped} dropped")
    if not written:
        raise StageError(
            context.name,
            f"no row of {table.rows:,} passes",
            cause="; ".join(f"`{rule.described}` dropped {rule.dropped:,}" for rule in rules),
            remedy="loosen the rule; the scores' spread is in the report",
        )
    return StageResult(
        {
            "rows": written,
            "rows_in": table.rows,
            "kept": written,
            "dropped": dropped,
            "combine": stage.combine,
            "rules": [_told(rule) for rule in rules],
            "samples": samples.facts(),
            "planted": judge.quality(),
        }
    )


class Judge:
    """How well a filter finds planted rows; holds nothing from the first row on of which the truth is not known, and
    nothing of rows that are too many to hold."""

    def __init__(self, rows: int) -> None:
        self._open = rows <= JUDGED
        self._planted: list[str] = []
        self._dropped: list[Bools] = []
        self._badness: list[Floats] = []

    def see(self, planted: Any, dropped: Bools, badness: Floats | None) -> None:
        """The next rows; `planted` is an Arrow column, `badness` is there where one score decides (NaN is worst)."""
        self._open = self._open and planted.null_count == 0
        if not self._open:
            self._planted, self._dropped, self._badness = [], [], []
            return
        self._planted += strings(planted)
        self._dropped.append(dropped)
        if badness is not None:
            self._badness.append(np.where(np.isnan(badness), np.inf, badness))

    def quality(self) -> dict[str, Any] | None:
        if not self._open or not self._planted:
            return None
        badness = np.concatenate(self._badness) if self._badness else None
        return filter_quality(np.concatenate(self._dropped), badness, self._planted)


class ScoredRows:
    """Rows and their scores, a shard at a time; `random` is a score of every table."""

    def __init__(self, artifact: Path, seed: int) -> None:
        self.artifact, self.files, self._seed = artifact, shards(artifact), seed
        self.rows = sum(int(pq.read_metadata(path).num_rows) for path in self.files)

    def column(self, score: str) -> Iterator[Floats]:
        for path in self.files:
            yield self.one(path, score)

    def one(self, shard: Path, score: str) -> Floats:
        if score == RANDOM:
            return random_scores(strings(pq.read_table(shard, columns=["id"])[0]), self._seed)
        values: Floats = pq.read_table(self.artifact / "scores" / shard.name, columns=[score])[0].to_numpy()
        return values.astype(np.float64)

    def scores(self, shard: Path) -> _Columns:
        return _Columns(self, shard)


class _Columns(dict[str, Floats]):
    """The score columns of a shard, read when they are asked for."""

    def __init__(self, table: ScoredRows, shard: Path) -> None:
        super().__init__()
        self._table, self._shard = table, shard

    def __missing__(self, score: str) -> Floats:
        self[score] = self._table.one(self._shard, score)
        return self[score]


def _rule(context: StageContext, table: ScoredRows, score: str, keep: Keep, goods: Mapping[str, str]) -> Rule:
    like = None if keep.as_many_as is None else int(context.inputs[keep.as_many_as].facts["rows"])
    return rule_of(table, score, keep, goods, like)


def rule_of(table: ScoredRows, score: str, keep: Keep, goods: Mapping[str, str], as_many: int | None) -> Rule:
    """A rule with its cut in the rows at hand; `goods` is which end of each score is good, by its scorer."""
    good: Any = keep.best or goods.get(score, "low")
    sign = 1.0 if keep.range is not None or good == "low" else -1.0
    cut = find_cut(lambda: (sign * piece for piece in table.column(score)), keep, good, table.rows, as_many)
    return Rule(score, keep, good, cut)


def goods_of(scored: Artifact) -> dict[str, str]:
    """Which end of each score is good, as the score stage tells it."""
    return {name: told["good"] for name, told in scored.facts.get("scores", {}).items() if "good" in told}


def _again(rules: Sequence[Rule]) -> list[Rule]:
    """Rules that have decided on nothing yet: a cut counts down its ties."""
    return [Rule(rule.score, rule.keep, rule.good, Cut(**vars(rule.cut))) for rule in rules]


def decide(stage: Select, rules: Sequence[Rule], scores: Any) -> tuple[Bools, list[str]]:
    """Which rows of a shard pass, and for each the rule that dropped it ("" where it passes).

    Of several rules that drop a row the first is named; where any is enough to pass, all of them dropped it.
    """
    passes = [rule.cut.passing(rule.sign * scores[rule.score]) for rule in rules]
    kept: Bools = np.logical_and.reduce(passes) if stage.combine == "all" else np.logical_or.reduce(passes)
    reasons = [""] * len(kept)
    open_rows = ~kept
    for rule, passed in zip(rules, passes, strict=True):
        rule.passed += int(passed.sum())
        mine = open_rows & ~passed
        rule.dropped += int(mine.sum())
        if stage.combine == "all":
            for index in np.flatnonzero(mine):
                reasons[index] = rule.described
            open_rows &= passed
    if stage.combine == "any":
        every = " and ".join(rule.described for rule in rules)
        for index in np.flatnonzero(~kept):
            reasons[index] = every
    return kept, reasons


def _see_quota(stage: Select, table: ScoredRows, rules: Sequence[Rule], goods: Mapping[str, str]) -> QuotaCut:
    assert stage.quota is not None
    quota, start = QuotaCut(stage.quota.rows), 0
    for shard in table.files:
        scores = table.scores(shard)
        kept, _ = decide(stage, rules, scores)
        kinds = strings(pq.read_table(shard, columns=[stage.quota.per])[0].filter(pa.array(kept)))
        places = [start + int(index) for index in np.flatnonzero(kept)]
        if stage.quota.by is None:
            badness = np.zeros(len(places))
        else:
            badness = scores[stage.quota.by][kept] * (1.0 if goods.get(stage.quota.by, "low") == "low" else -1.0)
        quota.see(kinds, badness, places)
        start += len(kept)
    quota.close()
    return quota


def _list_dropped(file: TextIO, rows: pa.Table, kept: Bools, reasons: Sequence[str]) -> None:
    out = rows.select(["id", "source", "line"]).filter(pa.array(~kept)).to_pylist()
    for row, reason in zip(out, (reason for reason, k in zip(reasons, kept, strict=True) if not k), strict=True):
        file.write(json.dumps({**row, "rule": reason}, ensure_ascii=False) + "\n")


def _told(rule: Rule) -> dict[str, Any]:
    keep = rule.keep
    if keep.range is not None:
        cuts = [end for end in keep.range if end is not None]
    else:
        cuts = [rule.sign * rule.cut.worst] if np.isfinite(rule.cut.worst) else []
    return {
        "score": rule.score,
        "rule": rule.described,
        "cut": cuts[0] if cuts else None,
        "cuts": cuts,
        "dropped": rule.dropped,
        "passed": rule.passed,
    }
