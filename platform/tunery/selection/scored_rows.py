"""Read access to the rows and scores of an artifact, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tunery.ingest.corruption_metrics import Floats
from tunery.selection.thresholds import random_scores
from tunery.spec import RANDOM
from tunery.store import Artifact
from tunery.store.rows import shards, to_str_list
from tunery.store.vectors import Float16Array, vectors_of


class ScoredRows:
    """The rows of an artifact, scored or not; every artifact has the score `random`."""

    def __init__(self, artifact: Path, seed: int) -> None:
        self.artifact, self.files, self._seed = artifact, shards(artifact), seed
        self.rows = sum(int(pq.read_metadata(path).num_rows) for path in self.files)

    def column(self, score: str) -> Iterator[Floats]:
        """Yield a score column, one array per shard."""
        for path in self.files:
            yield self.shard_column(path, score)

    def shard_column(self, shard: Path, score: str) -> Floats:
        if score == RANDOM:
            return random_scores(to_str_list(pq.read_table(shard, columns=["id"])[0]), self._seed)
        values: Floats = pq.read_table(self.artifact / "scores" / shard.name, columns=[score])[0].to_numpy()
        return values.astype(np.float64)

    def vectors(self, shard: Path, score: str) -> Float16Array:
        """Return the vectors of a non-empty shard, (rows, dimensions), float16; NaN for a row without a vector."""
        return vectors_of(pq.read_table(self.artifact / "scores" / shard.name, columns=[f"{score}_vector"])[0])

    def scores(self, shard: Path) -> LazyScores:
        return LazyScores(self, shard)


class LazyScores(dict[str, Floats]):
    """The score columns of a shard, each read on first access."""

    def __init__(self, table: ScoredRows, shard: Path) -> None:
        super().__init__()
        self._table, self._shard = table, shard

    def __missing__(self, score: str) -> Floats:
        self[score] = self._table.shard_column(self._shard, score)
        return self[score]


def score_directions(scored: Artifact) -> dict[str, str]:
    """Return which end of each score is better ("low" or "high"), from the facts of the score stage."""
    return {name: stats["good"] for name, stats in scored.facts.get("scores", {}).items() if "good" in stats}
