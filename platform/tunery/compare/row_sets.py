"""Compares the rows of trainings with the same name: counts of shared and exclusive rows, samples, median scores.

Rows are equal if their ids are (store/rows.py); duplicates count once. The ids of 100 million rows take 0.8 GB per
side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tunery.compare.sides import RunSelection
from tunery.ingest.row_samples import excerpt
from tunery.spec import ReviewLabels, Score, Training
from tunery.spec.graph import lineage
from tunery.spec.trainings import data_refs
from tunery.store.rows import REVIEWED_DIR, shards, to_str_list
from tunery.store.score_cache import Ids, ids_to_uint64

NUM_SAMPLES = 3
"""Sample rows of each side."""
SAMPLE_COLUMNS = ["text", "messages", "source", "line"]


@dataclass(frozen=True)
class RowSample:
    id: str
    source: str
    line: int
    text: str


@dataclass(frozen=True)
class Median:
    """Median of a score over the rows that only one side has, and over the rows that both have."""

    only: float
    both: float | None


@dataclass(frozen=True)
class RowSetStats:
    """The rows of one side's training."""

    rows: int
    """Distinct rows."""
    only: int
    """Rows that only this side has."""
    samples: tuple[RowSample, ...]
    scores: dict[str, Median]
    """By score, from this side's score stage, or from the other's if this side did not score its rows."""


@dataclass(frozen=True)
class RowComparison:
    stage: str
    both: int
    left: RowSetStats
    right: RowSetStats

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_rows(left: RunSelection, right: RunSelection) -> tuple[list[RowComparison], list[str]]:
    """Compare the trainings that both have; return (comparisons, notes on trainings that cannot be compared).

    Raises RequestError if rows were removed from the store."""
    comparisons, notes = [], []
    for name, stage in left.experiment.stages.items():
        if not isinstance(stage, Training) or not isinstance(right.experiment.stages.get(name), Training):
            continue
        dirs = [row_dirs(side, name) for side in (left, right)]
        missing = [side.name for side, own in zip((left, right), dirs, strict=True) if own is None]
        if missing:
            notes.append(f"{name}: its rows are not built in {' and '.join(dict.fromkeys(missing))}")
        elif dirs[0] is not None and dirs[1] is not None:
            comparisons.append(_compare(name, left, right, dirs[0], dirs[1]))
    return comparisons, notes


def row_dirs(side: RunSelection, training: str) -> list[Path] | None:
    """Folders with the rows of a training; None if some were not built."""
    stage = side.experiment.stages[training]
    assert isinstance(stage, Training), "the caller passes trainings"
    artifacts = [side.artifact(name) for name in data_refs(stage.data).values()]
    within = REVIEWED_DIR if isinstance(stage.data, ReviewLabels) else ""
    dirs = [artifact.path / within for artifact in artifacts if artifact is not None]
    return dirs if len(dirs) == len(artifacts) else None


def _compare(
    name: str, left: RunSelection, right: RunSelection, left_dirs: list[Path], right_dirs: list[Path]
) -> RowComparison:
    left_ids, right_ids = _ids(left_dirs), _ids(right_dirs)
    both = np.intersect1d(left_ids, right_ids, assume_unique=True)
    left_scores, right_scores = ([*_score_dirs(side, name)] for side in (left, right))
    stats = [
        RowSetStats(
            len(ids),
            len(only := np.setdiff1d(ids, both, assume_unique=True)),
            tuple(_samples(dirs, only)),
            _medians([*own_scores, *other_scores], only, both),
        )
        for ids, dirs, own_scores, other_scores in (
            (left_ids, left_dirs, left_scores, right_scores),
            (right_ids, right_dirs, right_scores, left_scores),
        )
    ]
    return RowComparison(name, len(both), *stats)


def _ids(dirs: list[Path]) -> Ids:
    """Distinct row ids, ascending."""
    columns = [_id_column(shard) for folder in dirs for shard in shards(folder)]
    return np.unique(np.concatenate(columns)) if columns else ids_to_uint64(())


def _id_column(file: Path) -> Ids:
    return ids_to_uint64(to_str_list(pq.read_table(file, columns=["id"])[0]))


def _samples(dirs: list[Path], ids: Ids) -> Iterator[RowSample]:
    """The first rows with one of the ids, in training order without shuffling."""
    left = NUM_SAMPLES
    for shard in (shard for folder in dirs for shard in shards(folder)):
        indices = np.flatnonzero(np.isin(_id_column(shard), ids))[:left] if left and len(ids) else ()
        if len(indices):
            for row in pq.read_table(shard, columns=["id", *SAMPLE_COLUMNS]).take(indices).to_pylist():
                yield RowSample(row["id"], row["source"] or "", row["line"] or 0, excerpt(row))
            left -= len(indices)


def _score_dirs(side: RunSelection, training: str) -> Iterator[tuple[str, Path]]:
    """(score, folder of its tables) for the score stages upstream of a training, the last stage first."""
    stage = side.experiment.stages[training]
    assert isinstance(stage, Training), "the caller passes trainings"
    for data in data_refs(stage.data).values():
        for name in lineage(side.experiment.stages, data):
            scorer = side.experiment.stages[name]
            artifact = side.artifact(name) if isinstance(scorer, Score) else None
            if isinstance(scorer, Score) and artifact is not None:
                yield from ((spec.score, artifact.path / "scores") for spec in scorer.by)


def _medians(score_dirs: list[tuple[str, Path]], only: Ids, both: Ids) -> dict[str, Median]:
    """Medians by score, from the first folder that has values for some of the exclusive rows."""
    medians: dict[str, Median] = {}
    for score, folder in score_dirs if len(only) else ():
        if score in medians:
            continue
        own, shared = _values(score, folder, only), _values(score, folder, both)
        if len(own):
            medians[score] = Median(float(np.median(own)), float(np.median(shared)) if len(shared) else None)
    return medians


def _values(score: str, folder: Path, ids: Ids) -> Any:
    """Score values of the rows with one of the ids, without NaN."""
    parts = [np.empty(0)]
    for file in sorted(folder.glob("part-*.parquet")):
        if score in pq.read_schema(file).names:
            values = pq.read_table(file, columns=[score])[0].to_numpy().astype(float)
            parts.append(values[np.isin(_id_column(file), ids)])
    values = np.concatenate(parts)
    return values[~np.isnan(values)]
