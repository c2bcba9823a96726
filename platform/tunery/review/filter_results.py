"""What a filter did with every row that it saw, and how far each row is from its cut.

What was planted in the rows is not read here: what a reviewer sees is made from this, and must not tell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tunery.errors import StoreError
from tunery.ingest.corruption_metrics import Bools, Floats
from tunery.selection.rules import fit_rules, rule_masks
from tunery.selection.scored_rows import ScoredRows, score_directions
from tunery.spec import Keep
from tunery.spec.stages import KEEP_RULES
from tunery.store import Artifact
from tunery.store.artifacts import input_of
from tunery.store.rows import Row, read_rows

SHOWN = ["id", "text", "messages", "rejected"]
"""Columns that a reviewer may see."""


@dataclass(frozen=True)
class FilterResult:
    """All rows in the order that they were scored in; the arrays have one entry a row."""

    scored: Path
    """The artifact of the rows that went into the filter, scored or not (by `random` they can be selected anyway)."""
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
    signs: Mapping[str, float]
    """By score: 1 where low is good, else -1."""
    cuts: Mapping[str, float]
    """By score: the worst that passes, as a score. A range has two, and is not among them."""


def read_filter_results(selection: Artifact) -> FilterResult:
    """From a select artifact and the scored rows that it was made from.

    Raises StoreError when those were removed, or when the rules don't give the rows that the artifact holds.
    """
    scored = input_of(selection, "data")
    identity = selection.manifest["identity"]
    table = ScoredRows(scored.path, int(identity.get("seed", 0)))
    rows = [pq.read_table(path, columns=["id", "source"]) for path in table.files]
    ids = [str(id) for piece in rows for id in piece["id"].to_pylist()]
    sources = [str(source or "") for piece in rows for source in piece["source"].to_pylist()]
    badness: dict[str, Floats] = {}
    signs: dict[str, float] = {}
    cuts: dict[str, float] = {}
    keeps: dict[str, Keep] = {}
    for (score, described), told in zip(identity["keep"].items(), selection.facts["rules"], strict=True):
        if not any(described.get(name) is not None for name in KEEP_RULES):
            # An identity leaves out the names of stages (`match_count_of`): what their number of rows came to is told.
            described = {**described, "top_k": told["passed"]}
        keeps[score] = Keep.model_validate_json(json.dumps(described))
    rules = fit_rules(table, keeps, score_directions(scored), {})
    scores = {score: np.concatenate(list(table.column(score))) for score in keeps}
    passed_by = rule_masks(rules, scores)
    # A fraction's cut is one among the rows that the other rules keep: the others are beyond it, wherever they score.
    plain = [passed for rule, passed in zip(rules, passed_by, strict=True) if rule.keep.keep_fraction_of_rest is None]
    left = np.logical_and.reduce(plain) if plain else np.True_
    distances: list[Floats] = []
    for rule, passed in zip(rules, passed_by, strict=True):
        score = rule.score
        if rule.keep.range is not None:
            low, high = rule.cut.low, rule.cut.worst
            badness[score] = _without_nan(np.maximum(low - scores[score], scores[score] - high))
        else:
            badness[score] = _without_nan(rule.badness(scores))
            signs[score], cuts[score] = rule.sign, rule.sign * rule.cut.worst
        among = badness[score] if rule.keep.keep_fraction_of_rest is None else np.where(left, badness[score], math.inf)
        distances.append(ranks_from_cut(among, passed))
    every = identity["combine"] == "all"
    kept = np.logical_and.reduce(passed_by) if every else np.logical_or.reduce(passed_by)
    distance = np.maximum.reduce(distances) if every else np.minimum.reduce(distances)
    held = [row["id"] for row in read_rows(selection.path, ["id"])]
    if identity["quota"] is not None or identity.get("diverse") is not None:
        # What passed the rules and neither quota nor diversity lies far from every cut.
        kept = _places(ids, held)
        distance = np.where(~kept & (distance < 0), len(ids), distance)
    if [id for id, keep in zip(ids, kept, strict=True) if keep] != held:
        raise StoreError(
            f"{selection.path} doesn't hold the rows that its rules keep of {scored.path}",
            cause="one of the two was changed by hand, or another version of tunery made it",
            remedy="move both away and give `tunery run` again",
        )
    return FilterResult(
        scored=scored.path,
        ids=ids,
        sources=sources,
        kept=kept,
        distance=distance,
        scores=scores,
        badness=badness,
        signs=signs,
        cuts=cuts,
    )


def _places(ids: list[str], passed: list[str]) -> Bools:
    """Where the rows of `passed` stand among `ids`; both are in the same order, and an id may be there twice."""
    kept = np.zeros(len(ids), dtype=bool)
    at = 0
    for wanted in passed:
        at = ids.index(wanted, at)
        kept[at] = True
        at += 1
    return kept


def ranks_from_cut(badness: Floats, passed: Bools) -> Floats:
    """Each row's place, best first, less the cut's, which lies between two rows. Ties stand as in
    selection/select_stage.py."""
    order = np.argsort(badness, kind="stable")
    rank = np.empty(len(badness))
    rank[order] = np.arange(len(badness))
    from_cut: Floats = rank - passed.sum() + 0.5
    return from_cut


def read_shown(filtered: FilterResult, wanted: Iterable[str]) -> dict[str, Row]:
    """By id: what a reviewer may see of the rows `wanted`."""
    ids = set(wanted)
    return {row["id"]: row for row in read_rows(filtered.scored, SHOWN) if row["id"] in ids}


def _without_nan(values: Floats) -> Floats:
    return np.where(np.isnan(values), math.inf, values)
