"""The `evaluate` stage: loss and perplexity of each model on each evaluation set, on the workers of the run.

A task is one model and one shard of a set. Tasks are ordered by model, and a worker has one model in memory at a time.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq

from tunery.errors import RowCountError
from tunery.models.load import Source, source_of
from tunery.models.precision import score_dtype
from tunery.spec import Compute, Evaluate
from tunery.spec.references import model_name
from tunery.store import StageContext, StageResult
from tunery.store.rows import CONTENT, count_rows, shards


class LossEvaluator:
    """Callable class for `Launcher.map_tasks` that sums the negative log-likelihood of shards, with one model in memory
    at a time."""

    def __init__(self, max_length: int, compute: Compute) -> None:
        import torch

        torch.set_num_threads(compute.cpus_per_worker)
        self._dtype = score_dtype(compute)
        self._device = "cuda" if compute.device == "gpu" else "cpu"
        self._max_length = max_length
        self._loaded: tuple[str, Any, Any] = ("", None, None)
        """Source as JSON, Likelihood and tokenizer of the model in memory."""

    def _load(self, source: str) -> tuple[Any, Any]:
        """Return Likelihood and tokenizer of a model."""
        from tunery.models.load import load_model, load_tokenizer
        from tunery.models.nll import Likelihood

        if self._loaded[0] != source:
            self._loaded = ("", None, None)  # free the previous model before the next one is loaded
            model_source: Source = json.loads(source)
            model = load_model(model_source, self._dtype).to(self._device).eval()
            tokenizer = load_tokenizer(model_source)
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
    """Compute the losses and write results.json.

    Facts: `results`, one entry per model and set: loss (nats per loss token), perplexity, tokens, rows, unusable
    (number of rows without a response, or rejected by the chat template) and, with a baseline, forgetting. Raises
    RowCountError if a row was not evaluated.
    """
    stage, compute = context.spec, context.compute
    assert isinstance(stage, Evaluate)
    paths = {name: artifact.path for name, artifact in context.inputs.items()}
    shard_tasks = [
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
    tasks: list[dict[str, Any]] = [{"index": index, **task} for index, task in enumerate(shard_tasks)]
    expected = {name: count_rows(paths[stage_name]) for name, stage_name in stage.data.items()}
    total = len(stage.models) * sum(expected.values())
    start_time = time.time()
    context.emit("progress", done=0, total=total, unit="rows", detail="waiting for workers")
    shard_results: list[dict[str, Any]] = []
    for result in context.launcher.map_tasks(LossEvaluator, (stage.max_length, compute), tasks):
        shard_results.append(result)
        num_rows = sum(int(finished["rows"]) for finished in shard_results)
        context.emit("progress", done=num_rows, total=total, unit="rows")
    shard_results.sort(key=lambda result: int(result["index"]))  # sums must not depend on the order of completion
    results = [_aggregate(shard_results, model_name(model), name) for model in stage.models for name in stage.data]
    for result in results:
        if result["rows"] != expected[result["set"]]:
            raise RowCountError(
                context.name,
                f"{expected[result['set']]} input rows of `{result['set']}`, {result['rows']} were evaluated",
            )
    if stage.baseline is not None:
        results = with_forgetting(results, model_name(stage.baseline))
    (context.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return StageResult({"results": results}, {"seconds": time.time() - start_time})


def with_forgetting(results: Sequence[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Add `forgetting` to each result: the relative increase of its loss over that of `baseline` on the same set.

    0.1 is 10% more loss, and negative values are an improvement. It is NaN if the loss of the baseline is 0 or NaN.
    """
    baseline_loss = {result["set"]: result["loss"] for result in results if result["model"] == baseline}
    return [
        {
            **result,
            "forgetting": result["loss"] / baseline_loss[result["set"]] - 1
            if baseline_loss[result["set"]]
            else math.nan,
        }
        for result in results
    ]


def _aggregate(shard_results: list[dict[str, Any]], model: str, name: str) -> dict[str, Any]:
    """Return the result of one model on the set `name`."""
    selected = [result for result in shard_results if result["model"] == model and result["set"] == name]
    nll = math.fsum(float(result["nll"]) for result in selected)
    tokens = sum(int(result["tokens"]) for result in selected)
    loss = nll / tokens if tokens else math.nan
    return {
        "model": model,
        "set": name,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)) if tokens else math.nan,
        "tokens": tokens,
        "rows": sum(int(result["rows"]) for result in selected),
        "unusable": sum(int(result["unusable"]) for result in selected),
    }
