"""The registry of scorers, and the protocol of each kind of scorer.

Scorers are referred to by name and imported on use, so planning an experiment imports none of them. There are five
kinds; `load()` returns the factory:

    row             scores a row by its own content and the inputs the spec names: factory(spec, inputs) -> RowScorer
    likelihood      scores a row by the token likelihoods of a causal language model: factory(spec) -> LikelihoodScorer
    classification  scores a row by the logits of a sequence-classification model: factory(spec, labels, model name) ->
                    ClassificationScorer
    embedding       scores a row by its similarity to reference rows: factory(their vectors, their ids) ->
                    EmbeddingScorer; without reference rows the embedding itself is stored
    across          scores a row by comparison with the other rows (duplicates): factory(spec) -> CorpusScorer

Scorers of the same model share its forward passes. Scores of all kinds but `across` are cached by row id in the score
cache of the store, so a row is scored once. `across` scores change with every added row and are always recomputed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from tunery.models.nll import SpanNll
from tunery.scoring.scorers.external_groupby import RowSignatures
from tunery.store.rows import Row

Columns = dict[str, Any]
"""One value per row under each name: a list, or a float16 array (rows, dimensions) for vectors. `score` (float, NaN for
a row without one) is the score itself; other columns explain it and are stored as `<score>_<name>`."""


class RowScorer(Protocol):
    def __call__(self, rows: Sequence[Row]) -> Columns:
        """Return columns with one value per row. `rows` have every column except `planted`."""
        ...


class LikelihoodScorer(Protocol):
    views: tuple[SpanNll, ...]
    """The sums of negative log-likelihoods that the scorer needs."""

    def __call__(self, sums: Mapping[SpanNll, Sequence[tuple[float, int]]]) -> Columns:
        """Return columns from the (sum of -log p in nats, number of tokens) of each row, for each view."""
        ...


class ClassificationScorer(Protocol):
    def __call__(self, logits_nl: np.ndarray) -> Columns:
        """Return columns from the logits, (rows, labels) in float32; NaN for a row without tokens."""
        ...


class CorpusScorer(Protocol):
    def compute_signatures(self, rows: Sequence[Row]) -> Columns:
        """Return what is needed of each row to compare it with others. Runs on many shards in parallel."""
        ...

    def resolve(self, signatures: RowSignatures, work_dir: Path) -> Iterator[Columns]:
        """Yield the columns of each shard in order, from the signatures of all rows (null for a row that has none).

        Must not hold all rows in memory: large data goes to files in `work_dir`, which may contain files of an
        interrupted attempt.
        """
        ...


@dataclass(frozen=True)
class ScorerEntry:
    input_kind: Literal["row", "likelihood", "classification", "embedding", "across"]
    factory: str
    """module:callable"""
    direction: Literal["low", "high"]
    """Which scores are better: those that `keep_fraction` keeps; it also sets the sign of the AUC against corrupted
    rows."""
    version: int
    """Increased when the score of a row changes, which invalidates cached scores."""

    def load(self) -> Callable[..., Any]:
        module, name = self.factory.split(":")
        factory: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return factory


SCORER_ENTRIES: dict[str, ScorerEntry] = {
    "perplexity": ScorerEntry(
        "likelihood", "tunery.scoring.scorers.perplexity:PerplexityScorer", direction="low", version=2
    ),
    "ifd": ScorerEntry("likelihood", "tunery.scoring.scorers.ifd:IfdScorer", direction="low", version=2),
    "reward": ScorerEntry(
        "classification", "tunery.scoring.scorers.reward_score:RewardScorer", direction="high", version=2
    ),
    "classifier": ScorerEntry(
        "classification", "tunery.scoring.scorers.label_probability:ClassifierScorer", direction="high", version=2
    ),
    "embedding": ScorerEntry(
        "embedding", "tunery.scoring.scorers.embedding:EmbeddingScorer", direction="high", version=2
    ),
    "length": ScorerEntry("row", "tunery.scoring.scorers.length:LengthScorer", direction="high", version=2),
    "gopher": ScorerEntry("row", "tunery.scoring.scorers.gopher:GopherScorer", direction="low", version=2),
    "c4": ScorerEntry("row", "tunery.scoring.scorers.c4:C4Scorer", direction="low", version=2),
    "language": ScorerEntry("row", "tunery.scoring.scorers.language:LanguageScorer", direction="high", version=2),
    "contamination": ScorerEntry(
        "row", "tunery.scoring.scorers.contamination:ContaminationScorer", direction="low", version=2
    ),
    "duplicates": ScorerEntry(
        "across", "tunery.scoring.scorers.exact_duplicates:DuplicatesScorer", direction="low", version=1
    ),
    "near_duplicates": ScorerEntry(
        "across", "tunery.scoring.scorers.near_duplicates:NearDuplicatesScorer", direction="low", version=2
    ),
}
