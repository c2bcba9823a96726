"""The table of scorers, and what each kind of them has to offer.

Functions are named, not imported: planning an experiment loads none of them. Five kinds:

    row             scores a row from itself alone (and from what the spec names): make(spec, inputs) gives a RowScorer
    likelihood      scores a row by what a causal language model makes of its tokens: make(spec) gives a
                    LikelihoodScorer; scorers of one model share its forward passes
    classification  scores a row by the logits of a sequence-classification model: make(spec, labels, name of the model)
                    gives a ClassificationScorer; scorers of one model share its forward passes
    embedding       scores a row by how near it is to reference rows: make(their vectors, their ids) gives an
                    EmbeddingScorer; without reference rows it keeps the vector itself; scorers of one model share its
                    forward passes
    across          scores a row by the other rows (duplicates): make(spec) gives an CorpusScorer

Scores of all but the last are kept by row id in the store's score tables, so that a row is scored once; those of the
last change with every row that is added, and are worked out anew.
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
"""A value a row under each name: a list, or an array (rows, dimensions) of float16 where each row has a vector. `score`
(float, NaN where a row has none) is the score itself; any other column explains it, and stands in the table as
`<score>_<name>`."""


class RowScorer(Protocol):
    def __call__(self, rows: Sequence[Row]) -> Columns:
        """Columns of `rows`, each as long as they are. Sees all columns of a row but `planted`."""
        ...


class LikelihoodScorer(Protocol):
    views: tuple[SpanNll, ...]
    """What must be known of every row."""

    def __call__(self, sums: Mapping[SpanNll, Sequence[tuple[float, int]]]) -> Columns:
        """From (sum of -log p in nats, number of tokens) a row, for each of its views."""
        ...


class ClassificationScorer(Protocol):
    def __call__(self, logits_nl: np.ndarray) -> Columns:
        """From the model's logits, (rows, labels) in float32; those of a row without a token are NaN."""
        ...


class CorpusScorer(Protocol):
    def sketch(self, rows: Sequence[Row]) -> Columns:
        """What has to be kept of each row to compare it with others; runs on many shards at once."""
        ...

    def resolve(self, sketches: RowSignatures, work: Path) -> Iterator[Columns]:
        """The columns of each shard in turn, from the sketches of all, as `sketch` gave them (null where a row could
        not be sketched). Never holds all rows in memory: what is
        large goes through files in `work`, which may hold those of a try that was killed."""
        ...


@dataclass(frozen=True)
class ScorerEntry:
    reads: Literal["row", "likelihood", "classification", "embedding", "across"]
    make: str
    """module:callable"""
    good: Literal["low", "high"]
    """Which end is good: what `keep_fraction` keeps, and the sign of an AUC against planted rows."""
    version: int
    """Raised when the same row gets another score: kept scores are then not used again."""

    def load(self) -> Callable[..., Any]:
        module, name = self.make.split(":")
        made: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return made


SCORER_ENTRIES: dict[str, ScorerEntry] = {
    "perplexity": ScorerEntry(
        "likelihood", "tunery.scoring.scorers.perplexity:PerplexityScorer", good="low", version=2
    ),
    "ifd": ScorerEntry("likelihood", "tunery.scoring.scorers.ifd:IfdScorer", good="low", version=2),
    "reward": ScorerEntry("classification", "tunery.scoring.scorers.reward_score:RewardScorer", good="high", version=2),
    "classifier": ScorerEntry(
        "classification", "tunery.scoring.scorers.label_probability:ClassifierScorer", good="high", version=2
    ),
    "embedding": ScorerEntry("embedding", "tunery.scoring.scorers.embedding:EmbeddingScorer", good="high", version=2),
    "length": ScorerEntry("row", "tunery.scoring.scorers.length:LengthScorer", good="high", version=2),
    "gopher": ScorerEntry("row", "tunery.scoring.scorers.gopher:GopherScorer", good="low", version=2),
    "c4": ScorerEntry("row", "tunery.scoring.scorers.c4:C4Scorer", good="low", version=2),
    "language": ScorerEntry("row", "tunery.scoring.scorers.language:LanguageScorer", good="high", version=2),
    "contamination": ScorerEntry(
        "row", "tunery.scoring.scorers.contamination:ContaminationScorer", good="low", version=2
    ),
    "duplicates": ScorerEntry(
        "across", "tunery.scoring.scorers.exact_duplicates:DuplicatesScorer", good="low", version=1
    ),
    "near_duplicates": ScorerEntry(
        "across", "tunery.scoring.scorers.near_duplicates:NearDuplicatesScorer", good="low", version=2
    ),
}
