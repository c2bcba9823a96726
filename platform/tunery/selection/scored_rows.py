"""Rows and their scores, a shard at a time."""

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
    """Of an artifact of rows, scored or not; `random` is a score of every table."""

    def __init__(self, artifact: Path, seed: int) -> None:
        self.artifact, self.files, self._seed = artifact, shards(artifact), seed
        self.rows = sum(int(pq.read_metadata(path).num_rows) for path in self.files)

    def column(self, score: str) -> Iterator[Floats]:
        for path in self.files:
            yield self.one(path, score)

    def one(self, shard: Path, score: str) -> Floats:
        if score == RANDOM:
            return random_scores(to_str_list(pq.read_table(shard, columns=["id"])[0]), self._seed)
        values: Floats = pq.read_table(self.artifact / "scores" / shard.name, columns=[score])[0].to_numpy()
        return values.astype(np.float64)

    def vectors(self, shard: Path, score: str) -> Float16Array:
        """(rows, dimensions), float16; NaN for a row without a vector. Of a shard that has rows."""
        return vectors_of(pq.read_table(self.artifact / "scores" / shard.name, columns=[f"{score}_vector"])[0])

    def scores(self, shard: Path) -> Columns:
        return Columns(self, shard)


class Columns(dict[str, Floats]):
    """The score columns of a shard, read when they are asked for."""

    def __init__(self, table: ScoredRows, shard: Path) -> None:
        super().__init__()
        self._table, self._shard = table, shard

    def __missing__(self, score: str) -> Floats:
        self[score] = self._table.one(self._shard, score)
        return self[score]


def score_directions(scored: Artifact) -> dict[str, str]:
    """Which end of each score is good, as the score stage tells it."""
    return {name: told["good"] for name, told in scored.facts.get("scores", {}).items() if "good" in told}
