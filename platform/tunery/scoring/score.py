"""The `score` stage: shards of rows go through the workers of the run, and no row is scored twice.

One task is one shard of the dataset, whose size depends only on its rows. Every score is therefore computed from the
same batches whatever the number of workers, and the score table is identical to the byte. Scorers that use the same
kind of output of the same model (likelihoods, logits, embeddings) share forward passes. Scorers without a model share
one pass over the rows on all free CPUs.

The result of each shard is written to the work directory of the stage, so an interrupted stage resumes with the next
shard. Rows that any earlier run of the store has scored come from its score cache (store/score_cache.py).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tunery.errors import RowCountError, StageError
from tunery.ingest.parallel_write import is_worth_parallel, map_files
from tunery.ingest.row_samples import quarantine_facts
from tunery.models.load import source_of
from tunery.scoring.score_shard import ScorePass, failures_path, scored_rows
from tunery.scoring.score_stats import describe_scores
from tunery.scoring.scorers.external_groupby import RowSignatures
from tunery.scoring.scorers.interfaces import CorpusScorer
from tunery.scoring.shard_scorers import (
    ClassificationShardScorer,
    EmbeddingShardScorer,
    LikelihoodShardScorer,
    RuleShardScorer,
)
from tunery.spec import Pretrained, Score, ScorerSpec
from tunery.spec.scorers import SCORERS
from tunery.store import StageContext, StageResult, fingerprint
from tunery.store.atomic_write import replace_file, write_text
from tunery.store.fingerprint import folder_digest
from tunery.store.rows import shards, to_str_list
from tunery.store.score_cache import ScoreCache, ids_to_uint64

SHARD_SCORERS: dict[str, type] = {
    "likelihood": LikelihoodShardScorer,
    "classification": ClassificationShardScorer,
    "embedding": EmbeddingShardScorer,
}
"""Class that scores shards, by input kind of the scorers. Scorers of the same class and model share forward passes."""
MAX_SHARD_CRASHES = 20
"""How many worker deaths during one shard are tolerated; the next one fails the stage. Before that, rows that kill
their worker are quarantined one after the other (score_shard.py)."""
MAX_NAME_LENGTH = 100
"""Maximum length of the score names in the folder name of a pass; file systems allow 255 bytes."""


def run_scoring(context: StageContext) -> StageResult:
    """Write rows/ (the input rows without quarantined ones), scores/ (a table per shard with the same rows in the same
    order: id, and for each scorer its score and the columns that explain it), and quarantine.jsonl."""
    stage = context.spec
    assert isinstance(stage, Score)
    files = shards(context.inputs[stage.data].path)
    started = time.time()
    run = f"{os.getpid()}-{time.time_ns()}"
    passes = list(_plan_passes(context, stage, run))
    counts: dict[str, float] = {"scored": 0, "cached": 0, "resumed": 0, "seconds": 0}
    total = len(passes) * int(context.inputs[stage.data].facts["rows"])
    context.emit("progress", done=0, total=total, unit="rows", detail="waiting for workers")
    done = 0
    for score_pass, shard_scorer, arguments in passes:
        for shard_counts in _run_pass(context, score_pass, shard_scorer, arguments, files):
            done += int(shard_counts["rows"])
            for key in counts:
                counts[key] += shard_counts.get(key, 0)
            if "resumed" not in shard_counts:  # resumed shards take no time and would inflate the speed
                context.emit("progress", done=done, total=total, unit="rows")
    context.emit("progress", done=done, total=total, unit="rows")
    seconds = time.time() - started
    num_quarantined = _combine_passes(context, [score_pass for score_pass, _, _ in passes], files)
    for score_pass, _, _ in passes:
        _cache_scores(context, score_pass)
    facts = describe_scores(context.out, stage.by)
    rows_in = sum(int(pq.read_metadata(path).num_rows) for path in files)
    if facts["rows"] != facts["rows_out"] or facts["rows_out"] + num_quarantined != rows_in:
        raise RowCountError(
            context.name,
            f"{rows_in} input rows; {facts['rows']} output rows, {facts['rows_out']} rows with scores, "
            f"{num_quarantined} in quarantine",
        )
    facts["rows_in"] = rows_in
    return StageResult(
        {**facts, "quarantined": num_quarantined, "quarantine": quarantine_facts(context.out / "quarantine.jsonl")},
        {
            "rows_scored": int(counts["scored"]),
            "rows_cached": int(counts["cached"]),
            "rows_resumed": int(counts["resumed"]),
            "tokens_per_second": facts["tokens"] / seconds,
            "rows_per_second": facts["rows_out"] / seconds,
            "score_seconds": seconds,
            "worker_seconds": counts["seconds"],
        },
    )


def _plan_passes(context: StageContext, stage: Score, run: str) -> Iterator[tuple[ScorePass, type, tuple[Any, ...]]]:
    """Yield the passes over the rows, each with the class that scores its shards and that class's further arguments."""
    paths = {name: artifact.path for name, artifact in context.inputs.items()}
    by_model: dict[tuple[type, str], list[ScorerSpec]] = {}
    without_model: list[ScorerSpec] = []
    specs: Sequence[ScorerSpec] = stage.by
    for spec in specs:
        input_kind = SCORERS[spec.kind()].input_kind
        if input_kind in SHARD_SCORERS:
            assert spec.model is not None, "a scorer of this kind has a model"
            source = json.dumps(source_of(spec.model, paths, context.folder))
            by_model.setdefault((SHARD_SCORERS[input_kind], source), []).append(spec)
        else:
            without_model.append(spec)
    for (shard_scorer, source), model_specs in by_model.items():
        arguments: tuple[Any, ...] = (model_specs, json.loads(source), stage.max_length, context.compute)
        if shard_scorer is EmbeddingShardScorer:
            arguments = (*arguments, paths)
        yield _build_pass(context, model_specs, run), shard_scorer, arguments
    if without_model:
        yield _build_pass(context, without_model, run), RuleShardScorer, (without_model, paths)


def _build_pass(context: StageContext, specs: Sequence[ScorerSpec], run: str) -> ScorePass:
    scores = tuple(spec.score for spec in specs)
    name = "+".join(scores)
    if len(name) > MAX_NAME_LENGTH:
        name = f"{name[:MAX_NAME_LENGTH]}-{fingerprint('pass', {'scores': scores}, {})}"
    folder = context.staging_dir / "passes" / name
    folder.mkdir(parents=True, exist_ok=True)
    # Scores that compare rows change with every added row, so they are not cached.
    cached = [spec for spec in specs if not _compares_rows(spec)]
    return ScorePass(
        scores, folder, run, {spec.score: context.scores / _scorer_fingerprint(context, spec) for spec in cached}
    )


def _scorer_fingerprint(context: StageContext, spec: ScorerSpec) -> str:
    """Return the cache key of a scorer: everything a score depends on except the row and the name of the score."""
    stage, compute = context.spec, context.compute
    assert isinstance(stage, Score)
    entry = SCORERS[spec.kind()]
    config: dict[str, Any] = {**spec.model_dump(mode="json", exclude={"name"}), "version": entry.version}
    if entry.input_kind in SHARD_SCORERS:
        # Scores in bf16 differ from those in fp32 in the third digit, so they are not mixed.
        precision = "fp32" if compute.device == "cpu" else compute.precision
        config |= {"max_length": stage.max_length, "precision": precision}
    if isinstance(spec.model, Pretrained) and spec.model.is_folder:
        config["content"] = folder_digest((context.folder / Path(spec.model.pretrained).expanduser()).resolve())
    inputs = {".".join(map(str, item.path)): context.inputs[item.stage].fingerprint for item in spec.inputs()}
    return fingerprint("scorer", {key: value for key, value in config.items() if key not in inputs}, inputs)


def _run_pass(
    context: StageContext, score_pass: ScorePass, shard_scorer: type, arguments: tuple[Any, ...], files: list[Path]
) -> Iterator[dict[str, float]]:
    """Yield the counts of each shard and the seconds that a worker spent on it; shards already done come first."""
    tasks = []
    for path in files:
        if (rows := scored_rows(score_pass, path)) is not None:
            yield {"rows": rows, "resumed": rows}
        else:
            tasks.append({"shard": str(path)})
    if tasks:
        on_cpu = shard_scorer is RuleShardScorer
        yield from context.launcher.map_tasks(
            shard_scorer, (score_pass, *arguments), tasks, on_cpu=on_cpu, max_crashes=MAX_SHARD_CRASHES
        )


def _combine_passes(context: StageContext, passes: Sequence[ScorePass], files: Sequence[Path]) -> int:
    """Write the columns of all passes as one table per shard, and the rows; both without rows that some pass
    quarantined.

    Return the number of rows in quarantine.jsonl.
    """
    stage = context.spec
    assert isinstance(stage, Score)
    (context.out / "rows").mkdir()
    (context.out / "scores").mkdir()
    folder = context.staging_dir / "combined"
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
    folder.mkdir(parents=True)
    corpus_scores = [spec for spec in stage.by if _compares_rows(spec)]
    for spec in corpus_scores:
        _write_corpus_scores(context, spec, passes, files, folder / spec.score)
    arguments = (context.name, passes, {spec.score: folder / spec.score for spec in corpus_scores}, folder, context.out)
    parallel = is_worth_parallel(context.launcher, sum(path.stat().st_size for path in files))
    tasks = [{"shard": str(path)} for path in files]
    num_rows = num_quarantined = 0
    for result in map_files(context.launcher, parallel, ShardCombiner, arguments, tasks):
        num_rows += int(result["rows"])
        num_quarantined += int(result["quarantined"])
    with (context.out / "quarantine.jsonl").open("wb") as quarantine:
        for path in files:
            if (part := folder / f"{path.stem}.quarantine.jsonl").is_file():
                with part.open("rb") as lines:
                    shutil.copyfileobj(lines, quarantine)
    shutil.rmtree(folder)
    if num_quarantined and not num_rows:
        first = json.loads((context.out / "quarantine.jsonl").read_text().splitlines()[0])
        raise StageError(context.name, f"none of {num_quarantined:,} rows can be scored", cause=first["reason"])
    return num_quarantined


class ShardCombiner:
    """Joins the results of all passes over a shard."""

    def __init__(
        self, stage: str, passes: Sequence[ScorePass], corpus_scores: Mapping[str, Path], folder: Path, out: Path
    ) -> None:
        """corpus_scores: folder with the columns of each shard, by score that compares rows; folder: for quarantined
        rows; out: folder of the artifact."""
        self._stage, self._passes, self._corpus_scores = stage, passes, corpus_scores
        self._folder, self._out = folder, out

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """{"shard": [path]} -> {"rows": [count], "quarantined": [count]}, one entry per shard."""
        counts = [self._combine(Path(path)) for path in batch["shard"]]
        return {"rows": [rows for rows, _ in counts], "quarantined": [quarantined for _, quarantined in counts]}

    def _combine(self, path: Path) -> tuple[int, int]:
        columns, failed = self._columns(path)
        scores = pa.table(columns)
        with replace_file(self._out / "rows" / path.name, sync=False) as rows_path:
            if not failed:
                _link_or_copy(path, rows_path)
            else:
                rows = pq.read_table(path)
                self._write_quarantine(path, rows, failed)
                kept = np.setdiff1d(np.arange(len(rows)), np.fromiter(failed, np.int64))
                pq.write_table(rows.take(kept), rows_path)
                scores = scores.take(kept)
        with replace_file(self._out / "scores" / path.name, sync=False) as scores_path:
            pq.write_table(scores, scores_path)
        return len(scores), len(failed)

    def _write_quarantine(self, path: Path, rows: pa.Table, failed: Mapping[int, str]) -> None:
        lines = []
        for index, reason in sorted(failed.items()):
            row = rows.slice(index, 1).to_pylist()[0]
            entry = {"source": row["source"], "line": row["line"], "id": row["id"], "reason": reason}
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        write_text(self._folder / f"{path.stem}.quarantine.jsonl", "".join(lines), sync=False)

    def _columns(self, path: Path) -> tuple[dict[str, Any], dict[int, str]]:
        """Return id and the columns of all scores of a shard, and the reason for each row that a pass quarantined."""
        failed: dict[int, str] = {}
        columns: dict[str, Any] = {}
        for score_pass in self._passes:
            result = _read_scores(
                score_pass.folder / path.name, [name for name in score_pass.scores if name not in self._corpus_scores]
            )
            columns.setdefault("id", result["id"])
            if result["id"] != columns["id"]:
                raise RowCountError(self._stage, f"the scores of {path.name} do not belong to its rows")
            reasons = failures_path(score_pass, path)
            if reasons.is_file():
                failed |= {int(index): reason for index, reason in json.loads(reasons.read_text()).items()}
            new = [(name.replace(":", "_"), result[name]) for name in result.column_names if name != "id"]
            for name in score_pass.scores:
                if name in self._corpus_scores:
                    table = pq.read_table(self._corpus_scores[name] / path.name)
                    new += zip(table.column_names, table.columns, strict=True)
            names = [*columns, *(name for name, _ in new)]
            if duplicates := sorted({name for name in names if names.count(name) > 1}):
                raise StageError(
                    self._stage,
                    f"two scores have a column `{duplicates[0]}`",
                    cause="a column that explains a score is named `<score>_<column>`",
                    remedy="give one of the two scores another `name`",
                )
            columns |= dict(new)
        return columns, failed


def _link_or_copy(source: Path, target: Path) -> None:
    """Hard-link an immutable file, or copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _read_scores(path: Path, scores: Sequence[str]) -> pa.Table:
    """Read id and the columns of these scores, including those that explain them, from the result of a shard."""
    names = [name for name in pq.read_schema(path).names if name.split(":")[0] in ("id", *scores)]
    return pq.read_table(path, columns=names)


def _compares_rows(spec: ScorerSpec) -> bool:
    return SCORERS[spec.kind()].input_kind == "across"


def _write_corpus_scores(
    context: StageContext, spec: ScorerSpec, passes: Sequence[ScorePass], files: Sequence[Path], folder: Path
) -> None:
    """Write the columns of a scorer that compares rows, one file per shard. They are computed in this process."""
    (score_pass,) = (score_pass for score_pass in passes if spec.score in score_pass.scores)
    scorer: CorpusScorer = SCORERS[spec.kind()].load()(spec)
    signatures = RowSignatures(tuple(score_pass.folder / path.name for path in files), f"{spec.score}:")
    folder.mkdir()
    resolved = scorer.resolve(signatures, context.staging_dir / "across" / spec.score)
    for path, columns in zip(files, resolved, strict=True):
        named = {spec.score if key == "score" else f"{spec.score}_{key}": pa.array(v) for key, v in columns.items()}
        pq.write_table(pa.table(named), folder / path.name)


def _cache_scores(context: StageContext, score_pass: ScorePass) -> None:
    """Add the new scores to the score cache."""
    for score, cache_dir in score_pass.cache_dirs.items():
        num_new = 0
        for path in sorted(score_pass.folder.glob("part-*.parquet")):
            known = pq.read_table(path, columns=[f"cached:{score}"])[0].to_numpy()
            num_new += int((~known).sum())
        if num_new:
            ScoreCache(cache_dir).add(context.out.parent.name, _new_scores(score_pass, score), num_new)


def _new_scores(score_pass: ScorePass, score: str) -> Iterator[pa.Table]:
    for path in sorted(score_pass.folder.glob("part-*.parquet")):
        flags = pq.read_table(path, columns=[f"cached:{score}", "failed"])
        table = _read_scores(path, [score]).filter(pc.invert(pc.or_(flags[0], flags[1])))
        columns: dict[str, Any] = {"id": pa.array(ids_to_uint64(to_str_list(table["id"])))}
        names = [name for name in table.column_names if name != "id"]
        columns |= {"score" if name == score else name.removeprefix(f"{score}:"): table[name] for name in names}
        yield pa.table(columns)
