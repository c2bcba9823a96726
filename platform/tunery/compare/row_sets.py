"""Rows that trainings of the same name were given: how many both had, how many only one, and what those are like.

Rows are the same when their ids are (store/rows.py); a row that stands twice counts once. Ids of 100 million rows take
0.8 GB a side.
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

SAMPLES = 3
"""Rows that are shown of each side."""
SHOWN = ["text", "messages", "source", "line"]


@dataclass(frozen=True)
class RowSample:
    id: str
    source: str
    line: int
    text: str


@dataclass(frozen=True)
class Median:
    """Of a score, over the rows that only one side has and over those that both have."""

    only: float
    both: float | None


@dataclass(frozen=True)
class RowSetStats:
    """What one side's training was given."""

    rows: int
    """Distinct ones."""
    only: int
    samples: tuple[RowSample, ...]
    scores: dict[str, Median]
    """By score, where its rows were scored by this side, or else by the other."""


@dataclass(frozen=True)
class RowsCompared:
    stage: str
    both: int
    left: RowSetStats
    right: RowSetStats

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_rows(left: RunSelection, right: RunSelection) -> tuple[list[RowsCompared], list[str]]:
    """By training that both have; and why others can't be compared. Raises RequestError where rows were removed."""
    found, notes = [], []
    for name, stage in left.experiment.stages.items():
        if not isinstance(stage, Training) or not isinstance(right.experiment.stages.get(name), Training):
            continue
        places = [places_of(side, name) for side in (left, right)]
        without = [side.name for side, there in zip((left, right), places, strict=True) if there is None]
        if without:
            notes.append(f"{name}: its rows were not made by {' and '.join(dict.fromkeys(without))}")
        elif places[0] is not None and places[1] is not None:
            found.append(_compare(name, left, right, places[0], places[1]))
    return found, notes


def places_of(side: RunSelection, training: str) -> list[Path] | None:
    """Folders with the rows of a training; None where they were not made."""
    stage = side.experiment.stages[training]
    assert isinstance(stage, Training), "asked of trainings"
    artifacts = [side.artifact(name) for name in data_refs(stage.data).values()]
    within = REVIEWED_DIR if isinstance(stage.data, ReviewLabels) else ""
    places = [artifact.path / within for artifact in artifacts if artifact is not None]
    return places if len(places) == len(artifacts) else None


def _compare(name: str, left: RunSelection, right: RunSelection, ones: list[Path], others: list[Path]) -> RowsCompared:
    one, other = _ids(ones), _ids(others)
    both = np.intersect1d(one, other, assume_unique=True)
    tables = [[*_scored(side, name)] for side in (left, right)]
    given = [
        RowSetStats(
            len(own),
            len(only := np.setdiff1d(own, both, assume_unique=True)),
            tuple(_samples(places, only)),
            _medians([*own_tables, *other_tables], only, both),
        )
        for own, places, own_tables, other_tables in (
            (one, ones, tables[0], tables[1]),
            (other, others, tables[1], tables[0]),
        )
    ]
    return RowsCompared(name, len(both), *given)


def _ids(places: list[Path]) -> Ids:
    """Each once, in ascending order."""
    found = [_column(shard) for place in places for shard in shards(place)]
    return np.unique(np.concatenate(found)) if found else ids_to_uint64(())


def _column(file: Path) -> Ids:
    return ids_to_uint64(to_str_list(pq.read_table(file, columns=["id"])[0]))


def _samples(places: list[Path], wanted: Ids) -> Iterator[RowSample]:
    """The first rows of them, in the order in which they are trained on without shuffling."""
    left = SAMPLES
    for shard in (shard for place in places for shard in shards(place)):
        found = np.flatnonzero(np.isin(_column(shard), wanted))[:left] if left and len(wanted) else ()
        if len(found):
            for row in pq.read_table(shard, columns=["id", *SHOWN]).take(found).to_pylist():
                yield RowSample(row["id"], row["source"] or "", row["line"] or 0, excerpt(row))
            left -= len(found)


def _scored(side: RunSelection, training: str) -> Iterator[tuple[str, Path]]:
    """Scores that a training's rows were given on their way, with the folder where they lie; the last first."""
    stage = side.experiment.stages[training]
    assert isinstance(stage, Training), "asked of trainings"
    for data in data_refs(stage.data).values():
        for name in lineage(side.experiment.stages, data):
            scorer = side.experiment.stages[name]
            artifact = side.artifact(name) if isinstance(scorer, Score) else None
            if isinstance(scorer, Score) and artifact is not None:
                yield from ((spec.score, artifact.path / "scores") for spec in scorer.by)


def _medians(tables: list[tuple[str, Path]], only: Ids, both: Ids) -> dict[str, Median]:
    """By the first table of a score that knows some of the rows."""
    found: dict[str, Median] = {}
    for score, folder in tables if len(only) else ():
        if score in found:
            continue
        own, shared = _values(score, folder, only), _values(score, folder, both)
        if len(own):
            found[score] = Median(float(np.median(own)), float(np.median(shared)) if len(shared) else None)
    return found


def _values(score: str, folder: Path, wanted: Ids) -> Any:
    """Of the wanted rows that have one."""
    found = [np.empty(0)]
    for file in sorted(folder.glob("part-*.parquet")):
        if score in pq.read_schema(file).names:
            values = pq.read_table(file, columns=[score])[0].to_numpy().astype(float)
            found.append(values[np.isin(_column(file), wanted)])
    values = np.concatenate(found)
    return values[~np.isnan(values)]
