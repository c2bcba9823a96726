"""What a filter did with every row that it saw, and how far each row is from its cut.

What was planted in the rows is not read here: what a reviewer sees is made from this, and must not tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tunery.data.judge import Bools, Floats
from tunery.data.scorers import SCORERS
from tunery.data.select import passing
from tunery.errors import StoreError
from tunery.spec import Keep
from tunery.store import Artifact
from tunery.store.artifacts import input_of
from tunery.store.rows import Row, read_rows, shards

SHOWN = ["id", "text", "messages", "rejected"]
"""Columns that a reviewer may see."""


@dataclass(frozen=True)
class Filtered:
    """All rows in the order that they were scored in; the arrays have one entry a row."""

    scored: Path
    """The score artifact: its rows are those that went into the filter."""
    ids: list[str]
    sources: list[str]
    kept: Bools
    distance: Floats
    """Rows from the cut by rank, below 0 where the row was kept: -0.5 is the last one kept, 0.5 the first one dropped.
    Under several rules it is that of the rule which comes closest to changing the verdict."""
    scores: Mapping[str, Floats]
    """NaN where there is none."""
    badness: Mapping[str, Floats]
    """The same with low for good; infinite where there is no score."""
    cuts: Mapping[str, float]
    """By score: the worst that passes, as a score."""


def read_filtered(selection: Artifact) -> Filtered:
    """From a select artifact and the scored rows that it was made from.

    Raises StoreError when those were removed, or when the rules don't give the rows that the artifact holds.
    """
    scored = input_of(selection, "data", "score")
    rules = {score: Keep.model_validate(rule) for score, rule in selection.manifest["identity"]["keep"].items()}
    files = shards(scored.path)
    rows = [pq.read_table(path, columns=["id", "source"]) for path in files]
    tables = [pq.read_table(scored.path / "scores" / path.name) for path in files]
    ids = [str(id) for table in rows for id in table["id"].to_pylist()]
    scores: dict[str, Floats] = {}
    badness: dict[str, Floats] = {}
    cuts: dict[str, float] = {}
    distances: list[Floats] = []
    kept = np.ones(len(ids), dtype=bool)
    for score, rule in rules.items():
        low_is_good = SCORERS[score].good == "low"
        scores[score] = np.concatenate([table[score].to_numpy() for table in tables]).astype(np.float64)
        badness[score] = _without_nan(scores[score] if low_is_good else -scores[score])
        passed, cut = passing(badness[score], rule, SCORERS[score].good)
        cuts[score] = cut if low_is_good else -cut
        distances.append(ranks_from_cut(badness[score], passed))
        kept &= passed
    if [id for id, keep in zip(ids, kept, strict=True) if keep] != [
        row["id"] for row in read_rows(selection.path, ["id"])
    ]:
        raise StoreError(
            f"{selection.path} doesn't hold the rows that its rules keep of {scored.path}",
            cause="one of the two was changed by hand, or another version of tunery made it",
            remedy="move both away and give `tunery run` again",
        )
    return Filtered(
        scored=scored.path,
        ids=ids,
        sources=[str(source or "") for table in rows for source in table["source"].to_pylist()],
        kept=kept,
        distance=np.maximum.reduce(distances),
        scores=scores,
        badness=badness,
        cuts=cuts,
    )


def ranks_from_cut(badness: Floats, passed: Bools) -> Floats:
    """Each row's place, best first, less the cut's, which lies between two rows. Ties stand as in data/select.py."""
    order = np.argsort(badness, kind="stable")
    rank = np.empty(len(badness))
    rank[order] = np.arange(len(badness))
    from_cut: Floats = rank - passed.sum() + 0.5
    return from_cut


def read_shown(filtered: Filtered, wanted: Iterable[str]) -> dict[str, Row]:
    """By id: what a reviewer may see of the rows `wanted`."""
    ids = set(wanted)
    return {row["id"]: row for row in read_rows(filtered.scored, SHOWN) if row["id"] in ids}


def _without_nan(values: Floats) -> Floats:
    return np.where(np.isnan(values), math.inf, values)
