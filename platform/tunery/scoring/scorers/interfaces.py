"""The interface of each input kind of scorers (`InputKind`, spec/scorers/scorer_entry.py).

`ScorerEntry.load` returns the implementation, a callable that builds a scorer from its config:

    row             implementation(config, artifacts of the stages that the config names) -> RowScorer
    likelihood      implementation(config) -> LikelihoodScorer
    classification  implementation(config, labels of the model, its name) -> ClassificationScorer
    embedding       implementation(config, artifacts of the stages that the config names, embed) -> EmbeddingFn, where
                    `embed` returns the embeddings of rows
    across          implementation(config) -> CorpusScorer

Scorers of the same model share its forward passes. Scores of all kinds but `across` are cached by row id in the score
cache of the store, so a row is scored once. `across` scores change with every added row and are always recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tunery.models.nll import NllSpan
from tunery.scoring.scorers.external_groupby import RowSignatures
from tunery.store.rows import Row

Columns = dict[str, Any]
"""One value per row under each name: a list, or a float16 array (rows, dimensions) for vectors. `score` (float, NaN for
a row without one) is the score itself; other columns explain it and are stored as `<score>_<name>`."""


class RowScorer(Protocol):
    def __call__(self, rows: Sequence[Row]) -> Columns:
        """Return columns with one value per row. `rows` have every column except `injected_corruption`."""
        ...


class LikelihoodScorer(Protocol):
    spans: tuple[NllSpan, ...]
    """The sums of negative log-likelihoods that the scorer needs."""

    def __call__(self, sums: Mapping[NllSpan, Sequence[tuple[float, int]]]) -> Columns:
        """Return columns from the (sum of -log p in nats, number of tokens) of each row, for each span."""
        ...


class ClassificationScorer(Protocol):
    def __call__(self, logits_nl: np.ndarray) -> Columns:
        """Return columns from the logits, (rows, labels) in float32; NaN for a row without tokens."""
        ...


EmbeddingFn = Callable[[np.ndarray], Columns]
"""Returns columns from the embeddings of rows, (rows, dimensions) in float32, each of length 1; NaN for a row without
tokens."""
EmbedRows = Callable[[Sequence[Row]], np.ndarray]
"""Returns the embeddings of rows, as in EmbeddingFn."""


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
