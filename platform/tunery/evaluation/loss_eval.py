"""The `evaluate` stage: loss and perplexity of each model on each set, on Ray Data.

One pipeline for all models: the units of work are (model, shard of a set), models one after another, and an actor
holds one model at a time; so actors start, and load torch, once.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq

from tunery.errors import RowsLost
from tunery.models.actor_pool import map_tasks, score_dtype
from tunery.models.load import Source, source_of
from tunery.spec import Compute, Evaluate
from tunery.spec.references import model_name
from tunery.store import StageContext, StageResult
from tunery.store.rows import CONTENT, count_rows, shards


class EvaluationActor:
    """Sums the negative log-likelihood of shards under one model after another."""

    def __init__(self, max_length: int, compute: Compute) -> None:
        import torch

        torch.set_num_threads(compute.cpus_per_worker)
        self._dtype = score_dtype(compute)
        self._device = "cuda" if compute.device == "gpu" else "cpu"
        self._max_length = max_length
        self._loaded: tuple[str, Any, Any] = ("", None, None)

    def _load(self, source: str) -> tuple[Any, Any]:
        from tunery.models.load import load_model, load_tokenizer
        from tunery.models.nll import Likelihood

        if self._loaded[0] != source:
            self._loaded = ("", None, None)  # let go of the last one before the next takes memory
            where: Source = json.loads(source)
            model = load_model(where, self._dtype).to(self._device).eval()
            tokenizer = load_tokenizer(where)
            self._loaded = (source, Likelihood(model, tokenizer.pad_token_id), tokenizer)
        return self._loaded[1], self._loaded[2]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from tunery.models.nll import response_nll
        from tunery.models.truncation import encode

        nlls, tokens, counts, unusable = [], [], [], []
        for source, shard in zip(batch["source"], batch["shard"], strict=True):
            likelihood, tokenizer = self._load(str(source))
            encoded = encode(
                pq.read_table(shard, columns=CONTENT).to_pylist(), tokenizer, self._max_length, "all_turns"
            )
            pairs = response_nll(likelihood, encoded)
            nlls.append(math.fsum(nll for nll, _ in pairs))
            tokens.append(sum(count for _, count in pairs))
            counts.append(len(pairs))
            unusable.append(sum(not count for _, count in pairs))
        keys = ("index", "model", "set")
        return {key: list(batch[key]) for key in keys} | {
            "nll": nlls,
            "tokens": tokens,
            "rows": counts,
            "unusable": unusable,
        }


def run_evaluate(context: StageContext) -> StageResult:
    """Facts: results, a row per model and set: loss (nats per token), perplexity, tokens, rows, and how many of
    them are unusable (no response, or refused by the chat template); where there is a baseline, forgetting."""
    stage, compute = context.spec, context.compute
    assert isinstance(stage, Evaluate)
    paths = {name: artifact.path for name, artifact in context.inputs.items()}
    units = [
        {
            "model": model_name(model),
            "set": name,
            "source": json.dumps(source_of(model, paths, context.folder)),
            "shard": str(shard),
        }
        for model in stage.models
        for name, stage_name in stage.data.items()
        for shard in shards(paths[stage_name])
    ]
    numbered: list[dict[str, Any]] = [{"index": index, **unit} for index, unit in enumerate(units)]
    expected = {name: count_rows(paths[stage_name]) for name, stage_name in stage.data.items()}
    total = len(stage.models) * sum(expected.values())
    started = time.time()
    context.emit("progress", done=0, total=total, unit="rows", detail="starting actors")
    done: list[dict[str, Any]] = []
    for row in map_tasks(EvaluationActor, (stage.max_length, compute), numbered, compute, context.in_process):
        done.append(row)
        context.emit("progress", done=sum(int(item["rows"]) for item in done), total=total, unit="rows")
    done.sort(key=lambda row: int(row["index"]))  # sums in one order, whichever actor was first
    table = [_total(done, model_name(model), name) for model in stage.models for name in stage.data]
    for result in table:
        if result["rows"] != expected[result["set"]]:
            raise RowsLost(
                context.name, f"{expected[result['set']]} rows of `{result['set']}` went in, {result['rows']} came out"
            )
    if stage.baseline is not None:
        table = with_forgetting(table, model_name(stage.baseline))
    (context.out / "results.json").write_text(json.dumps(table, indent=1) + "\n")
    return StageResult({"results": table}, {"seconds": time.time() - started})


def with_forgetting(table: Sequence[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Each result, and by what share its loss is above that of the model `baseline` on the same set: 0.1 is a tenth
    more, below 0 it is better than before. NaN where the baseline has no loss."""
    before = {result["set"]: result["loss"] for result in table if result["model"] == baseline}
    return [
        {**result, "forgetting": result["loss"] / before[result["set"]] - 1 if before[result["set"]] else math.nan}
        for result in table
    ]


def _total(done: list[dict[str, Any]], model: str, name: str) -> dict[str, Any]:
    mine = [row for row in done if row["model"] == model and row["set"] == name]
    nll = math.fsum(float(row["nll"]) for row in mine)
    tokens = sum(int(row["tokens"]) for row in mine)
    loss = nll / tokens if tokens else math.nan
    return {
        "model": model,
        "set": name,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)) if tokens else math.nan,
        "tokens": tokens,
        "rows": sum(int(row["rows"]) for row in mine),
        "unusable": sum(int(row["unusable"]) for row in mine),
    }
