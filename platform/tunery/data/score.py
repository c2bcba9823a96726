"""The `score` stage, on Ray Data: shards of rows stream through a pool of actors that each hold the model.

The unit of work is a shard of the dataset, whose size depends on the number of rows alone; so every score is computed
from the same batches whatever the number of actors, and the table comes out the same to the byte.
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tunery.data.judge import auc, auc_by_kind, histogram
from tunery.data.scorers import SCORERS
from tunery.errors import RowsLost
from tunery.models.load import Source, source_of
from tunery.models.pool import map_units, score_dtype
from tunery.spec import Compute, Score
from tunery.store import StageContext, StageResult
from tunery.store.rows import CONTENT, shards


class ScoringActor:
    """Loads the model once, then scores one shard of rows after another."""

    def __init__(self, source: Source, score: str, max_length: int, compute: Compute, out: str) -> None:
        import torch

        from tunery.models.load import load_model, load_tokenizer

        torch.set_num_threads(compute.cpus_per_worker)
        device = "cuda" if compute.device == "gpu" else "cpu"
        self._tokenizer = load_tokenizer(source)
        self._model = load_model(source, score_dtype(compute)).to(device).eval()
        self._scorer = SCORERS[score]
        self._score, self._max_length, self._out = score, max_length, Path(out)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """{"shard": [path]} -> {"shard", "rows"}; the scores are written beside the others, one file a shard."""
        counts = []
        for shard in batch["shard"]:
            # `planted` is the truth that a filter is judged by: no scorer may see it.
            rows = pq.read_table(shard, columns=["id", *CONTENT]).to_pylist()
            scores = self._scorer.score(rows, self._model, self._tokenizer, self._max_length)
            table = pa.Table.from_pylist([{"id": row["id"], **score} for row, score in zip(rows, scores, strict=True)])
            final = self._out / Path(shard).name
            temporary = final.with_suffix(".tmp")
            pq.write_table(table, temporary)
            temporary.rename(final)
            counts.append(len(scores))
        return {"shard": list(batch["shard"]), "rows": counts}


def make_scores(context: StageContext) -> StageResult:
    """Writes rows/ (as they came) and scores/ (a table a shard, same rows in the same order)."""
    stage = context.spec
    assert isinstance(stage, Score)
    data = context.inputs[stage.data]
    (scorer,) = stage.by
    (name,) = type(scorer).model_fields
    source = source_of(
        getattr(scorer, name), {key: artifact.path for key, artifact in context.inputs.items()}, context.folder
    )
    files = shards(data.path)
    target = context.out / "scores"
    target.mkdir()
    started = time.time()
    _run_actors(context, source, name, [str(path) for path in files], target)
    seconds = time.time() - started

    (context.out / "rows").mkdir()
    for path in files:
        shutil.copyfile(path, context.out / "rows" / path.name)
    return _check_and_describe(context, name, seconds)


def _run_actors(context: StageContext, source: Source, name: str, files: list[str], target: Path) -> None:
    stage, compute = context.spec, context.compute
    assert isinstance(stage, Score)
    total = int(context.inputs[stage.data].facts["rows"])
    done = 0
    context.emit("progress", done=0, total=total, unit="rows", detail="starting actors")
    arguments = (source, name, stage.max_length, compute, str(target))
    for row in map_units(ScoringActor, arguments, [{"shard": path} for path in files], compute, context.in_process):
        done += int(row["rows"])
        context.emit("progress", done=done, total=total, unit="rows")


def _check_and_describe(context: StageContext, name: str, seconds: float) -> StageResult:
    rows_in = rows_out = tokens = truncated = 0
    values: list[float] = []
    planted: list[str | None] = []
    for path in shards(context.out):
        kept = pq.read_table(path, columns=["id", "planted"]).to_pydict()
        table = pq.read_table(context.out / "scores" / path.name).to_pydict()
        rows_in += len(kept["id"])
        rows_out += len(table["id"])
        if kept["id"] != table["id"]:
            raise RowsLost(context.name, f"the scores of {path.name} are not those of its rows")
        tokens += sum(table["tokens"])
        truncated += sum(table["truncated"])
        values += table[name]
        planted += kept["planted"]
    if rows_in != rows_out:
        raise RowsLost(context.name, f"{rows_in} rows went in, {rows_out} came out")
    bad = None if None in planted else np.array([kind != "" for kind in planted])
    badness = np.array(values) if SCORERS[name].good == "low" else -np.array(values)
    badness = np.where(np.isnan(badness), math.inf, badness)
    described = {
        "histogram": histogram(np.array(values), bad),
        "median": float(np.nanmedian(values)),
        "unscored": int(np.isnan(values).sum()),
        "auc": None if bad is None else auc(badness, bad),
        "auc_by_kind": {} if bad is None else auc_by_kind(badness, [str(kind) for kind in planted]),
    }
    return StageResult(
        {
            "rows": rows_out,
            "rows_in": rows_in,
            "rows_out": rows_out,
            "tokens": tokens,
            "truncated": truncated,
            "scores": {name: described},
        },
        {"tokens_per_second": tokens / seconds, "rows_per_second": rows_out / seconds, "score_seconds": seconds},
    )
