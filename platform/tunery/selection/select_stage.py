"""The `select` stage: writes the rows that pass its rules, and lists the others in dropped.jsonl with the rule that
dropped them.

The driver reads only scores: it fits the thresholds (scoring/order_statistics.py: six passes, constant memory), and
writes for each shard which rows pass and why the others do not. Ray actors then read the rows, list the dropped ones,
and write the others as new shards (ingest/parallel_write.py). A small dataset is processed by the driver alone, with
the same result.

Estimate for 100 M rows of 1 kB: the driver reads 0.8 GB per score and pass; the actors read 100 GB twice and write as
much as passes. With a quota the driver needs 100 bytes of memory per row that it keeps, and it decides on rows that the
rules drop one by one (1 us each). diversity.py documents the cost of diversity.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tunery.errors import RowCountError, StageError
from tunery.ingest.corruption_metrics import Bools, Floats, filter_quality
from tunery.ingest.parallel_write import RowFile, is_worth_parallel, map_files, write_files
from tunery.ingest.row_samples import DecileSamples, decile_edges
from tunery.scoring.score_stats import MAX_AUC_ROWS
from tunery.selection.diversity import DiversityFilter, select_diverse
from tunery.selection.rules import Rule, Scores, apply_rules, fit_rules, reset_ties
from tunery.selection.scored_rows import ScoredRows, score_directions
from tunery.selection.thresholds import QuotaThreshold
from tunery.spec import RANDOM, Select
from tunery.store import Artifact, StageContext, StageResult
from tunery.store.atomic_write import replace_file, write_text
from tunery.store.rows import content_bytes, to_str_list


class NothingPasses(StageError):
    """No row passes, so the stage commits no artifact."""

    def __init__(self, stage: str, data: Artifact, rows: int, out: Path, *, cause: str) -> None:
        remedy = "loosen the rule; the report has the histograms of the scores"
        super().__init__(stage, f"no row of {rows:,} passes", cause=cause, remedy=remedy)
        self.data = data
        """The input artifact."""
        self.rows = rows
        self.out = out
        """The folder with dropped.jsonl, which lists all rows; it exists until the stage runs again."""


def run_select(context: StageContext) -> StageResult:
    """Write the selected rows.

    Facts: rows_in, kept, dropped; the threshold of each rule and how many rows it dropped; a few rows at each decile of
    the first rule's score; how well the filter detects corrupted rows; the coverage of a diverse selection.
    """
    stage = context.spec
    assert isinstance(stage, Select)
    data = context.inputs[stage.data]
    table, directions = ScoredRows(data.path, context.seed), score_directions(data)
    match_counts = {
        score: int(context.inputs[keep.match_count_of].facts["rows"])
        for score, keep in stage.keep.items()
        if keep.match_count_of is not None
    }
    rules = fit_rules(table, stage.keep, directions, match_counts)
    quota = _fit_quota(stage, table, reset_ties(rules), directions) if stage.quota else None
    evaluator = FilterEvaluator(table.rows)
    single_rule = rules[0] if len(rules) == 1 and rules[0].keep.range is None else None
    sample_score = next(iter(stage.ranked_by), RANDOM)
    samples = DecileSamples(sample_score, decile_edges(lambda: table.column(sample_score), table.rows))
    masks = context.staging_dir / "masks"
    shutil.rmtree(masks, ignore_errors=True)  # of an interrupted run
    masks.mkdir(parents=True)

    with ExitStack() as stack:
        diversity: DiversityFilter | None = None
        if stage.diverse is not None:
            filtered = _apply_rules_and_quota(stage, table, reset_ties(rules), quota)
            diversity = stack.enter_context(select_diverse(context, stage.diverse, table, filtered, directions))
        filtered = _apply_rules_and_quota(stage, table, rules, quota)
        for shard, (scores, kept, reasons) in zip(table.files, filtered, strict=True):
            if diversity is not None:
                kept, reasons = diversity.apply(kept, reasons)
            np.save(_mask_file(masks, shard), kept)
            dropped_reasons = [reason for reason, is_kept in zip(reasons, kept, strict=True) if not is_kept]
            _mask_file(masks, shard, "reasons.json").write_text(json.dumps(dropped_reasons))
            evaluator.add(shard, ~kept, single_rule.badness(scores) if single_rule else None)

    parallel = is_worth_parallel(context.launcher, sum(shard.stat().st_size for shard in table.files))
    progress = partial(context.emit, "progress", unit="rows")
    dropped, done = 0, 0
    tasks = [{"shard": str(shard)} for shard in table.files]
    for result in map_files(context.launcher, parallel, ShardFilter, (table, masks, samples), tasks):
        dropped, done = dropped + int(result["dropped"]), done + int(result["rows"])
        samples.merge(pickle.loads(result["samples"]))
        progress(done=done, total=table.rows)
    with (context.out / "dropped.jsonl").open("wb") as file:
        for shard in table.files:
            with _mask_file(masks, shard, "dropped.jsonl").open("rb") as part:
                shutil.copyfileobj(part, file)
    files = [RowFile(shard, _mask_file(masks, shard, "sizes.npy"), _mask_file(masks, shard)) for shard in table.files]
    written = write_files(
        context.launcher,
        parallel,
        files,
        context.out,
        lambda done: progress(done=done, total=table.rows - dropped, detail="writing"),
    )
    shutil.rmtree(masks)
    if written + dropped != table.rows:
        raise RowCountError(context.name, f"{table.rows} rows went in, {written} kept, {dropped} dropped")
    if not written:
        raise _nothing_passes_error(context, data, table.rows, rules, diversity)
    return StageResult(
        {
            "rows": written,
            "rows_in": table.rows,
            "kept": written,
            "dropped": dropped,
            "combine": stage.combine,
            "rules": [rule.as_facts() for rule in rules],
            "samples": samples.facts(),
            "injected_corruption": evaluator.quality(),
            **({"diverse": diversity.facts} if diversity is not None else {}),
        }
    )


def _apply_rules_and_quota(
    stage: Select, table: ScoredRows, rules: Sequence[Rule], quota: QuotaThreshold | None
) -> Iterator[tuple[Scores, Bools, list[str]]]:
    """Yield for each shard its scores, which rows pass `keep` and `quota`, and the reason of each other row."""
    start = 0
    for shard in table.files:
        scores, count = table.scores(shard), int(pq.read_metadata(shard).num_rows)
        kept, reasons = apply_rules(rules, stage.combine, scores, count)
        if quota is not None:
            in_quota = quota.mask(range(start, start + count))
            reasons = ["quota" if k and not q else r for r, k, q in zip(reasons, kept, in_quota, strict=True)]
            kept &= in_quota
        start += count
        yield scores, kept, reasons


def _fit_quota(
    stage: Select, table: ScoredRows, rules: Sequence[Rule], directions: Mapping[str, str]
) -> QuotaThreshold:
    assert stage.quota is not None
    quota, start = QuotaThreshold(stage.quota.rows), 0
    filtered = _apply_rules_and_quota(stage, table, rules, None)
    for shard, (scores, kept, _) in zip(table.files, filtered, strict=True):
        groups = to_str_list(pq.read_table(shard, columns=[stage.quota.group_by])[0].filter(pa.array(kept)))
        indices = [start + int(index) for index in np.flatnonzero(kept)]
        if stage.quota.sort_by is None:
            badness = np.zeros(len(indices))
        else:
            badness = scores[stage.quota.sort_by][kept] * (
                1.0 if directions.get(stage.quota.sort_by, "low") == "low" else -1.0
            )
        quota.add(groups, badness, indices)
        start += len(kept)
    quota.finalize()
    return quota


def _mask_file(masks: Path, shard: Path, suffix: str = "kept.npy") -> Path:
    """Return the file about a shard: which rows pass, why others do not, the dropped rows, or the sizes of the rest."""
    return masks / f"{shard.stem}.{suffix}"


class ShardFilter:
    """Lists the dropped rows of a shard, and measures the others, by the masks of the driver."""

    def __init__(self, table: ScoredRows, masks: Path, samples: DecileSamples) -> None:
        self._table, self._masks, self._samples = table, masks, samples.empty_copy()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """{"shard": [path]} -> {"rows": [count], "dropped": [count], "samples": [pickled DecileSamples]}, one entry per
        shard. Writes <shard>.dropped.jsonl and <shard>.sizes.npy to the folder of the masks."""
        results: dict[str, Any] = {"rows": [], "dropped": [], "samples": []}
        for path in map(Path, batch["shard"]):
            rows, kept = pq.read_table(path), np.load(_mask_file(self._masks, path))
            dropped = rows.select(["id", "source", "line"]).filter(pa.array(~kept)).to_pylist()
            reasons = json.loads(_mask_file(self._masks, path, "reasons.json").read_text())
            lines = [
                json.dumps({**row, "rule": reason}, ensure_ascii=False) + "\n"
                for row, reason in zip(dropped, reasons, strict=True)
            ]
            write_text(_mask_file(self._masks, path, "dropped.jsonl"), "".join(lines), sync=False)
            with replace_file(_mask_file(self._masks, path, "sizes.npy"), sync=False) as file:
                np.save(file, content_bytes(rows.filter(pa.array(kept))))
            samples = self._samples.empty_copy()
            samples.add(rows, self._table.shard_column(path, samples.score), kept)
            results["rows"].append(len(rows))
            results["dropped"].append(len(dropped))
            results["samples"].append(pickle.dumps(samples))
        return results


def _nothing_passes_error(
    context: StageContext, data: Artifact, rows: int, rules: Sequence[Rule], diversity: DiversityFilter | None
) -> NothingPasses:
    causes = [f"`{rule.description}` dropped {rule.dropped:,}" for rule in rules]
    if diversity is not None and diversity.facts["missing"]:
        causes.append(f"{diversity.facts['missing']:,} rows have {diversity.missing}")
    return NothingPasses(context.name, data, rows, context.out, cause="; ".join(causes))


class FilterEvaluator:
    """Measures how well a filter detects corrupted rows.

    It discards everything once a row is added whose corruption is unknown, and holds nothing of a dataset with more
    than MAX_AUC_ROWS rows.
    """

    def __init__(self, rows: int) -> None:
        self._enabled = rows <= MAX_AUC_ROWS
        self._corruption_kinds: list[str] = []
        self._dropped: list[Bools] = []
        self._badness: list[Floats] = []

    def add(self, shard: Path, dropped: Bools, badness: Floats | None) -> None:
        """Add the rows of the next shard. `badness` is given if a single score decides (NaN is worst)."""
        if self._enabled:
            corruption_kinds = pq.read_table(shard, columns=["injected_corruption"])[0]
            self._enabled = corruption_kinds.null_count == 0
        if not self._enabled:
            self._corruption_kinds, self._dropped, self._badness = [], [], []
            return
        self._corruption_kinds += to_str_list(corruption_kinds)
        self._dropped.append(dropped)
        if badness is not None:
            self._badness.append(np.where(np.isnan(badness), np.inf, badness))

    def quality(self) -> dict[str, Any] | None:
        if not self._enabled or not self._corruption_kinds:
            return None
        badness = np.concatenate(self._badness) if self._badness else None
        return filter_quality(np.concatenate(self._dropped), badness, self._corruption_kinds)
