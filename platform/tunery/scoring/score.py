"""The `score` stage, on Ray Data: shards of rows stream through pools of actors, and no row is scored twice.

The unit of work is a shard of the dataset, whose size depends on the rows alone; so every score is computed from the
same batches whatever the number of actors, and the table comes out the same to the byte. Scorers that read
the same of a model (likelihoods, logits, embeddings) share an actor and its forward passes; all that need no model
share one pass over the rows on every CPU that is free.

A unit's result waits in the stage's work folder, so a job that was killed goes on at the unit where it was; rows that
were scored before, in any run of the store, come from its score tables (store/score_cache.py).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tunery.errors import RowsLost, StageError
from tunery.ingest.row_samples import quarantine_facts
from tunery.models.actor_pool import map_tasks
from tunery.models.load import source_of
from tunery.scoring.score_actors import ClassificationActor, EmbeddingActor, LikelihoodActor, RuleActor
from tunery.scoring.score_shard import ScorePass
from tunery.scoring.score_stats import describe_scores
from tunery.scoring.scorers.external_groupby import RowSignatures
from tunery.scoring.scorers.registry import SCORER_ENTRIES, CorpusScorer
from tunery.spec import Pretrained, Score, ScorerSpec
from tunery.store import StageContext, StageResult, fingerprint
from tunery.store.fingerprint import folder_digest
from tunery.store.rows import shards, to_str_list
from tunery.store.score_cache import ScoreCache, ids_to_uint64

MODEL_ACTORS: dict[str, type] = {
    "likelihood": LikelihoodActor,
    "classification": ClassificationActor,
    "embedding": EmbeddingActor,
}
"""By what scorers read: those of one model share an actor and its forward passes."""
LONGEST_NAME = 100
"""Of the folder of a pass: the names of its scores, and file systems take 255 bytes."""


def run_scoring(context: StageContext) -> StageResult:
    """Writes rows/ (as they came, without the lost ones), scores/ (a table a shard, same rows in the same order:
    id, and for each scorer its score and what explains it), and quarantine.jsonl."""
    stage = context.spec
    assert isinstance(stage, Score)
    files = shards(context.inputs[stage.data].path)
    started = time.time()
    run = f"{os.getpid()}-{time.time_ns()}"
    passes = list(_passes(context, stage, run))
    counted: dict[str, float] = {"scored": 0, "known": 0, "resumed": 0, "seconds": 0}
    total = len(passes) * int(context.inputs[stage.data].facts["rows"])
    context.emit("progress", done=0, total=total, unit="rows", detail="starting actors")
    done = 0
    for job, actor, arguments in passes:
        for told in _run_pass(context, job, actor, arguments, files):
            done += int(told["rows"])
            for key in counted:
                counted[key] += told.get(key, 0)
            if "resumed" not in told:  # those take no time, and would count as speed
                context.emit("progress", done=done, total=total, unit="rows")
    context.emit("progress", done=done, total=total, unit="rows")
    seconds = time.time() - started
    lost = _combine(context, [job for job, _, _ in passes], files)
    for job, _, _ in passes:
        _keep_scores(context, job)
    facts = describe_scores(context.out, stage.by)
    rows_in = sum(int(pq.read_metadata(path).num_rows) for path in files)
    if facts["rows"] != facts["rows_out"] or facts["rows_out"] + lost != rows_in:
        raise RowsLost(
            context.name,
            f"{rows_in} rows went in; {facts['rows']} came out with {facts['rows_out']} scores, {lost} in quarantine",
        )
    facts["rows_in"] = rows_in
    return StageResult(
        {**facts, "quarantined": lost, "quarantine": quarantine_facts(context.out / "quarantine.jsonl")},
        {
            "rows_scored": int(counted["scored"]),
            "rows_known": int(counted["known"]),
            "rows_resumed": int(counted["resumed"]),
            "tokens_per_second": facts["tokens"] / seconds,
            "rows_per_second": facts["rows_out"] / seconds,
            "score_seconds": seconds,
            "actor_seconds": counted["seconds"],
        },
    )


def _passes(context: StageContext, stage: Score, run: str) -> Iterator[tuple[ScorePass, type, tuple[Any, ...]]]:
    """What goes over the rows together, with its actor and the actor's further arguments."""
    paths = {name: artifact.path for name, artifact in context.inputs.items()}
    by_model: dict[tuple[type, str], list[ScorerSpec]] = {}
    by_rule: list[ScorerSpec] = []
    specs: Sequence[ScorerSpec] = stage.by
    for spec in specs:
        reads = SCORER_ENTRIES[spec.kind()].reads
        if reads in MODEL_ACTORS:
            assert spec.model is not None, "it reads what a model makes of a row"
            source = json.dumps(source_of(spec.model, paths, context.folder))
            by_model.setdefault((MODEL_ACTORS[reads], source), []).append(spec)
        else:
            by_rule.append(spec)
    for (actor, source), mine in by_model.items():
        further: tuple[Any, ...] = (mine, json.loads(source), stage.max_length, context.compute)
        yield _pass(context, mine, run), actor, (*further, paths) if actor is EmbeddingActor else further
    if by_rule:
        yield _pass(context, by_rule, run), RuleActor, (by_rule, paths)


def _pass(context: StageContext, specs: Sequence[ScorerSpec], run: str) -> ScorePass:
    scores = tuple(spec.score for spec in specs)
    name = "+".join(scores)
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{fingerprint('pass', {'scores': scores}, {})}"
    folder = context.work / "passes" / name
    folder.mkdir(parents=True, exist_ok=True)
    # What a comparison with other rows gives is worked out anew: it changes with every row that is added.
    kept = [spec for spec in specs if SCORER_ENTRIES[spec.kind()].reads != "across"]
    return ScorePass(
        scores, folder, run, {spec.score: context.scores / _scorer_fingerprint(context, spec) for spec in kept}
    )


def _scorer_fingerprint(context: StageContext, spec: ScorerSpec) -> str:
    """All that a row's score depends on besides the row; the name of the score is not among it."""
    stage, compute = context.spec, context.compute
    assert isinstance(stage, Score)
    kind = SCORER_ENTRIES[spec.kind()]
    own: dict[str, Any] = {**spec.model_dump(mode="json", exclude={"name"}), "version": kind.version}
    if kind.reads in MODEL_ACTORS:
        # Scores in bf16 differ in the third digit from those in fp32, so they are not mixed.
        own |= {"max_length": stage.max_length, "precision": "fp32" if compute.device == "cpu" else compute.precision}
    if isinstance(spec.model, Pretrained) and spec.model.is_folder:
        own["content"] = folder_digest((context.folder / Path(spec.model.pretrained).expanduser()).resolve())
    inputs = {".".join(map(str, item.path)): context.inputs[item.stage].fingerprint for item in spec.inputs()}
    return fingerprint("scorer", {key: value for key, value in own.items() if key not in inputs}, inputs)


def _run_pass(
    context: StageContext, job: ScorePass, actor: type, arguments: tuple[Any, ...], files: list[Path]
) -> Iterator[dict[str, float]]:
    """Counts of each unit, and an actor's seconds with it; those whose file is there already come first."""
    todo = []
    for path in files:
        if (job.folder / path.name).is_file():
            rows = int(pq.read_metadata(path).num_rows)
            yield {"rows": rows, "resumed": rows}
        else:
            todo.append({"shard": str(path)})
    if todo:
        on_cpu = actor is RuleActor
        yield from map_tasks(actor, (job, *arguments), todo, context.compute, context.in_process, on_cpu)


def _combine(context: StageContext, passes: Sequence[ScorePass], files: Sequence[Path]) -> int:
    """The passes' columns side by side, and the rows as they came; both without what some pass has lost.

    Returns how many rows are in quarantine.jsonl.
    """
    stage = context.spec
    assert isinstance(stage, Score)
    (context.out / "rows").mkdir()
    (context.out / "scores").mkdir()
    across = {spec.score: _resolved(context, spec, passes, files) for spec in stage.by if _compares(spec)}
    count = 0
    with (context.out / "quarantine.jsonl").open("w", encoding="utf-8") as quarantine:
        for path in files:
            lost: dict[int, str] = {}
            columns: dict[str, Any] = {}
            for job in passes:
                own = [name for name in job.scores if name not in across]
                result = _columns_of(job.folder / path.name, own)
                columns.setdefault("id", result["id"])
                if result["id"] != columns["id"]:
                    raise RowsLost(context.name, f"the scores of {path.name} are not those of its rows")
                reasons = job.folder / f"{path.stem}.lost.json"
                if reasons.is_file():
                    lost |= {int(index): why for index, why in json.loads(reasons.read_text()).items()}
                found = [(name.replace(":", "_"), result[name]) for name in result.column_names if name != "id"]
                for name in job.scores:
                    found += next(across[name]).items() if name in across else ()
                names = [*columns, *(name for name, _ in found)]
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    raise StageError(
                        context.name,
                        f"two scores have a column `{twice[0]}`",
                        cause="what explains a score stands under its name, `_` and what it is",
                        remedy="give the score of that name another `name`",
                    )
                columns |= dict(found)
            scores = pa.table(columns)
            final = context.out / "rows" / path.name
            if not lost:
                _link(path, final)
            else:
                count += len(lost)
                whole = pq.read_table(path)
                kept = np.setdiff1d(np.arange(len(whole)), np.fromiter(lost, np.int64))
                for index, why in sorted(lost.items()):
                    row = whole.slice(index, 1).to_pylist()[0]
                    told = {"source": row["source"], "line": row["line"], "id": row["id"], "reason": why}
                    quarantine.write(json.dumps(told, ensure_ascii=False) + "\n")
                pq.write_table(whole.take(kept), final)
                scores = scores.take(kept)
            pq.write_table(scores, context.out / "scores" / path.name)
    if count and not any(pq.read_metadata(path).num_rows for path in shards(context.out)):
        first = json.loads((context.out / "quarantine.jsonl").read_text().splitlines()[0])
        raise StageError(context.name, f"none of {count:,} rows can be scored", cause=first["reason"])
    return count


def _link(path: Path, final: Path) -> None:
    """The same bytes, once on the disk: artifacts never change. Some file systems know no hard links."""
    try:
        os.link(path, final)
    except OSError:
        shutil.copyfile(path, final)


def _columns_of(path: Path, scores: Sequence[str]) -> pa.Table:
    """id, and what the unit's file has of these scores: each with what explains it."""
    names = [name for name in pq.read_schema(path).names if name.split(":")[0] in ("id", *scores)]
    return pq.read_table(path, columns=names)


def _compares(spec: ScorerSpec) -> bool:
    return SCORER_ENTRIES[spec.kind()].reads == "across"


def _resolved(
    context: StageContext, spec: ScorerSpec, passes: Sequence[ScorePass], files: Sequence[Path]
) -> Iterator[dict[str, Any]]:
    """A shard's columns after the other, of a scorer that compares rows; its sketches have the score's prefix."""
    (job,) = (job for job in passes if spec.score in job.scores)
    scorer: CorpusScorer = SCORER_ENTRIES[spec.kind()].load()(spec)
    sketches = RowSignatures(tuple(job.folder / path.name for path in files), f"{spec.score}:")
    for columns in scorer.resolve(sketches, context.work / "across" / spec.score):
        yield {spec.score if key == "score" else f"{spec.score}_{key}": pa.array(v) for key, v in columns.items()}


def _keep_scores(context: StageContext, job: ScorePass) -> None:
    """Add what is new to the score tables, for whoever meets the same rows again."""
    for score, folder in job.tables.items():
        fresh = rows = 0
        for path in sorted(job.folder.glob("part-*.parquet")):
            known = pq.read_table(path, columns=[f"known:{score}"])[0].to_numpy()
            fresh += int((~known).sum())
            rows += len(known)
        if fresh:
            ScoreCache(folder).add(context.out.parent.name, _fresh(job, score), fresh)


def _fresh(job: ScorePass, score: str) -> Iterator[pa.Table]:
    for path in sorted(job.folder.glob("part-*.parquet")):
        flags = pq.read_table(path, columns=[f"known:{score}", "lost"])
        table = _columns_of(path, [score]).filter(pc.invert(pc.or_(flags[0], flags[1])))
        columns: dict[str, Any] = {"id": pa.array(ids_to_uint64(to_str_list(table["id"])))}
        own = [name for name in table.column_names if name != "id"]
        columns |= {"score" if name == score else name.removeprefix(f"{score}:"): table[name] for name in own}
        yield pa.table(columns)
