"""Classes that score shards. Each holds the scorers of a pass and the model that they share, and is constructed once in
each worker (for scorers without a model: in each Ray Data actor)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunery.errors import TuneryError
from tunery.models.load import Source
from tunery.models.model_folder import BadModel
from tunery.models.nll import NllSpan
from tunery.models.precision import score_dtype
from tunery.scoring.score_shard import Scored, ScoreFn, ScorePass, score_shard
from tunery.scoring.scorers.interfaces import ClassificationScorer, Columns, CorpusScorer, EmbeddingFn, RowScorer
from tunery.spec import Compute, ScorerSpec
from tunery.spec.scorers import SCORERS
from tunery.store.rows import Row


class LikelihoodShardScorer:
    """Holds one causal language model for all likelihood scorers that use it."""

    def __init__(
        self, score_pass: ScorePass, specs: Sequence[ScorerSpec], source: Source, max_length: int, compute: Compute
    ):
        import torch

        from tunery.models.load import load_model, load_tokenizer
        from tunery.models.nll import Likelihood

        torch.set_num_threads(compute.cpus_per_worker)
        device = "cuda" if compute.device == "gpu" else "cpu"
        self._pass, self._max_length = score_pass, max_length
        self._scorers = {spec.score: SCORERS[spec.kind()].load()(spec) for spec in specs}
        self._tokenizer = load_tokenizer(source)
        pad = self._tokenizer.pad_token_id
        assert isinstance(pad, int), "load_tokenizer sets a pad token"
        self._likelihood = Likelihood(load_model(source, score_dtype(compute)).to(device).eval(), pad)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _score_shards(batch, self._pass, self._score)

    def _score(self, rows: Sequence[Row], scores: Sequence[str]) -> Scored:
        from tunery.models.nll import nll_by_span
        from tunery.models.truncation import encode

        encoded = encode(rows, self._tokenizer, self._max_length)
        spans: dict[NllSpan, None] = {span: None for score in scores for span in self._scorers[score].spans}
        sums = nll_by_span(self._likelihood, encoded, list(spans))
        truncated = [item.truncated for item in encoded]
        return {score: {**self._scorers[score](sums), "truncated": truncated} for score in scores}


class ClassificationShardScorer:
    """Holds one sequence-classification model for all scorers that use it."""

    def __init__(
        self, score_pass: ScorePass, specs: Sequence[ScorerSpec], source: Source, max_length: int, compute: Compute
    ) -> None:
        import torch

        from tunery.models.classify import SequenceClassifier
        from tunery.models.load import load_classifier, load_original_tokenizer

        torch.set_num_threads(compute.cpus_per_worker)
        self._pass = score_pass
        model, labels = load_classifier(source, score_dtype(compute))
        name = source.get("pretrained", source.get("artifact"))
        try:
            self._scorers: dict[str, ClassificationScorer] = {
                spec.score: SCORERS[spec.kind()].load()(spec, labels, name) for spec in specs
            }
        except BadModel as error:  # local folders were validated before the run; hub models are only checked here
            raise TuneryError(error.message, cause=error.cause, remedy=error.remedy) from None
        device = "cuda" if compute.device == "gpu" else "cpu"
        self._classifier = SequenceClassifier(model.to(device).eval(), load_original_tokenizer(source), max_length)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _score_shards(batch, self._pass, self._score)

    def _score(self, rows: Sequence[Row], scores: Sequence[str]) -> Scored:
        output = self._classifier(rows)
        token_columns: Columns = {"tokens": output.tokens, "truncated": output.truncated}
        return {score: {**self._scorers[score](output.logits), **token_columns} for score in scores}


class EmbeddingShardScorer:
    """Holds one model without its head for all scorers that use it."""

    def __init__(
        self,
        score_pass: ScorePass,
        specs: Sequence[ScorerSpec],
        source: Source,
        max_length: int,
        compute: Compute,
        inputs: dict[str, Path],
    ) -> None:
        import torch

        from tunery.models.embed import Embedder
        from tunery.models.load import load_encoder, load_original_tokenizer

        torch.set_num_threads(compute.cpus_per_worker)
        device = "cuda" if compute.device == "gpu" else "cpu"
        model = load_encoder(source, score_dtype(compute)).to(device).eval()
        self._pass = score_pass
        self._embedder = Embedder(model, load_original_tokenizer(source), max_length)
        self._scorers: dict[str, EmbeddingFn] = {
            spec.score: SCORERS[spec.kind()].load()(spec, inputs, lambda rows: self._embedder(rows).vectors)
            for spec in specs
        }

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _score_shards(batch, self._pass, self._score)

    def _score(self, rows: Sequence[Row], scores: Sequence[str]) -> Scored:
        output = self._embedder(rows)
        token_columns: Columns = {"tokens": output.tokens, "truncated": output.truncated}
        return {score: {**self._scorers[score](output.vectors), **token_columns} for score in scores}


class RuleShardScorer:
    """Holds the scorers without a model: those that score a row alone, and the signature functions of those that
    compare rows."""

    def __init__(self, score_pass: ScorePass, specs: Sequence[ScorerSpec], inputs: dict[str, Path]):
        self._pass = score_pass
        self._scorers = {spec.score: _row_scorer(spec, inputs) for spec in specs}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _score_shards(batch, self._pass, self._score)

    def _score(self, rows: Sequence[Row], scores: Sequence[str]) -> Scored:
        return {score: self._scorers[score](rows) for score in scores}


def _row_scorer(spec: ScorerSpec, inputs: dict[str, Path]) -> RowScorer:
    entry = SCORERS[spec.kind()]
    if entry.input_kind == "row":
        scorer: RowScorer = entry.load()(spec, inputs)
        return scorer
    corpus_scorer: CorpusScorer = entry.load()(spec)
    return lambda rows: {"score": [math.nan] * len(rows), **corpus_scorer.compute_signatures(rows)}


def _score_shards(batch: dict[str, Any], score_pass: ScorePass, score: ScoreFn) -> dict[str, Any]:
    """{"shard": [path]} -> {"shard", "rows", "scored", "cached", "failed", "seconds"}, one entry per shard."""
    counts: list[dict[str, float]] = []
    for shard, crashes in zip(batch["shard"], batch.get("crashes", [None] * len(batch["shard"])), strict=True):
        start = time.time()
        counts.append({**score_shard(Path(shard), score_pass, score, crashes), "seconds": time.time() - start})
    return {"shard": list(batch["shard"])} | {key: [shard[key] for shard in counts] for key in counts[0]}
