"""The `select` stage: the rows that pass; dropped.jsonl lists the others with the rule that dropped them.

The scores are read first, to find the cuts (data/cut.py: six passes, constant memory), then the rows, a shard at a
time, to write what passes; kept rows go from file to file as Arrow tables, not through Python. It runs on one core, in
the driver (products of matrices of vectors on all). On paper, 100 M rows of 1 kB: 0.8 GB a score and pass, 100 GB of
rows to read and as much to write; what grows with the data is the list of dropped rows on disk, and with a quota 100
bytes a row that it keeps in memory. What diversity costs stands in diverse.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tunery.data.judge import Bools, Floats, filter_quality
from tunery.data.rules import QuotaCut
from tunery.data.samples import Samples, decile_edges
from tunery.data.score_facts import JUDGED
from tunery.data.select.diverse import Diversity, choose
from tunery.data.select.scored import ScoredRows, goods_of
from tunery.data.select.verdicts import Rule, Scores, again, decide, rules_of
from tunery.errors import RowsLost, StageError
from tunery.spec import RANDOM, Select
from tunery.store import Artifact, StageContext, StageResult
from tunery.store.rows import strings, write_tables


class NothingPasses(StageError):
    """No row passes, so the stage has no artifact."""

    def __init__(self, stage: str, data: Artifact, rows: int, out: Path, *, cause: str) -> None:
        remedy = "loosen the rule; the scores' spread is in the report"
        super().__init__(stage, f"no row of {rows:,} passes", cause=cause, remedy=remedy)
        self.data = data
        """What the rows are in."""
        self.rows = rows
        self.out = out
        """The folder in which dropped.jsonl lists all of them, until the stage runs again."""


def make_selection(context: StageContext) -> StageResult:
    """Facts: rows_in, kept, dropped, and per rule its cut and how many it dropped; a few rows at each decile of the
    first rule's score; how well it found planted rows; what diversity bought."""
    stage = context.spec
    assert isinstance(stage, Select)
    data = context.inputs[stage.data]
    table, goods = ScoredRows(data.path, context.seed), goods_of(data)
    as_many = {
        score: int(context.inputs[keep.as_many_as].facts["rows"])
        for score, keep in stage.keep.items()
        if keep.as_many_as is not None
    }
    rules = rules_of(table, stage.keep, goods, as_many)
    quota = _see_quota(stage, table, again(rules), goods) if stage.quota else None
    judge = Judge(table.rows)
    single = rules[0] if len(rules) == 1 and rules[0].keep.range is None else None
    shown = next(iter(stage.ranked_by), RANDOM)
    samples = Samples(shown, decile_edges(lambda: table.column(shown), table.rows))

    with (context.out / "dropped.jsonl").open("w", encoding="utf-8") as file, ExitStack() as stack:
        diversity: Diversity | None = None
        if stage.diverse is not None:
            among = _passing(stage, table, again(rules), quota)
            diversity = stack.enter_context(choose(context, stage.diverse, table, among, goods))

        def passed() -> Iterator[pa.Table]:
            done = 0
            pieces = zip(table.files, _passing(stage, table, rules, quota), strict=True)
            for shard, (scores, kept, reasons) in pieces:
                rows = pq.read_table(shard)
                if diversity is not None:
                    kept, reasons = diversity.verdicts(kept, reasons)
                done += len(rows)
                _list_dropped(file, rows, kept, reasons)
                samples.see(rows, scores[shown], kept)
                judge.see(rows["planted"], ~kept, single.badness(scores) if single else None)
                context.emit("progress", done=done, total=table.rows, unit="rows")
                yield rows.filter(pa.array(kept))

        written = write_tables(passed(), context.out)

    dropped = sum(1 for _ in (context.out / "dropped.jsonl").open(encoding="utf-8"))
    if written + dropped != table.rows:
        raise RowsLost(context.name, f"{table.rows} rows went in, {written} kept, {dropped} dropped")
    if not written:
        raise _nothing_passes(context, data, table.rows, rules, diversity)
    return StageResult(
        {
            "rows": written,
            "rows_in": table.rows,
            "kept": written,
            "dropped": dropped,
            "combine": stage.combine,
            "rules": [rule.told() for rule in rules],
            "samples": samples.facts(),
            "planted": judge.quality(),
            **({"diverse": diversity.facts} if diversity is not None else {}),
        }
    )


def _passing(
    stage: Select, table: ScoredRows, rules: Sequence[Rule], quota: QuotaCut | None
) -> Iterator[tuple[Scores, Bools, list[str]]]:
    """Of each shard in turn its scores, which rows pass `keep` and `quota`, and why the others don't."""
    start = 0
    for shard in table.files:
        scores, count = table.scores(shard), int(pq.read_metadata(shard).num_rows)
        kept, reasons = decide(rules, stage.combine, scores, count)
        if quota is not None:
            within = quota.passing(range(start, start + count))
            reasons = ["quota" if k and not w else r for r, k, w in zip(reasons, kept, within, strict=True)]
            kept &= within
        start += count
        yield scores, kept, reasons


def _see_quota(stage: Select, table: ScoredRows, rules: Sequence[Rule], goods: Mapping[str, str]) -> QuotaCut:
    assert stage.quota is not None
    quota, start = QuotaCut(stage.quota.rows), 0
    for shard, (scores, kept, _) in zip(table.files, _passing(stage, table, rules, None), strict=True):
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


def _nothing_passes(
    context: StageContext, data: Artifact, rows: int, rules: Sequence[Rule], diversity: Diversity | None
) -> NothingPasses:
    causes = [f"`{rule.described}` dropped {rule.dropped:,}" for rule in rules]
    if diversity is not None and diversity.facts["without"]:
        causes.append(f"{diversity.facts['without']:,} rows have {diversity.lacking}")
    return NothingPasses(context.name, data, rows, context.out, cause="; ".join(causes))


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
