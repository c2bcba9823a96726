"""The outcome of a filter for every input row, and the distance of each row from the threshold.

The `injected_corruption` column is not read here: review items are built from these results and must not reveal which
rows are corrupted.
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

REVIEWED_COLUMNS = ["id", "text", "messages", "rejected"]
"""Columns shown to the reviewer."""


@dataclass(frozen=True)
class FilterResult:
    """All input rows in the order they were scored; arrays have one entry per row."""

    scored: Path
    """The input artifact of the filter, scored or not (rows can be selected by `random` without scores)."""
    ids: list[str]
    sources: list[str]
    kept: Bools
    distance: Floats
    """Distance to the threshold in ranks, negative for a kept row: -0.5 is the last row kept, 0.5 the first one
    dropped. With several rules it is the distance for the rule that is closest to changing the outcome."""
    scores: Mapping[str, Floats]
    """NaN for a row without a score."""
    badness: Mapping[str, Floats]
    """Scores with their sign set so that lower is better; infinite for a row without a score."""
    signs: Mapping[str, float]
    """By score: 1 if lower is better, else -1."""
    thresholds: Mapping[str, float]
    """Threshold by score. Scores with a range are not included, because a range has two."""


def read_filter_results(selection: Artifact) -> FilterResult:
    """Read the results from a select artifact and its scored input.

    Raises StoreError if the input was removed, or if applying the rules does not give the rows of the artifact.
    """
    scored = input_of(selection, "data")
    identity = selection.manifest["identity"]
    table = ScoredRows(scored.path, int(identity.get("seed", 0)))
    rows = [pq.read_table(path, columns=["id", "source"]) for path in table.files]
    ids = [str(id) for piece in rows for id in piece["id"].to_pylist()]
    sources = [str(source or "") for piece in rows for source in piece["source"].to_pylist()]
    badness: dict[str, Floats] = {}
    signs: dict[str, float] = {}
    thresholds: dict[str, float] = {}
    keeps: dict[str, Keep] = {}
    for (score, config), rule_facts in zip(identity["keep"].items(), selection.facts["rules"], strict=True):
        if not any(config.get(name) is not None for name in KEEP_RULES):
            # The identity omits names of stages (`match_count_of`); the number of rows is in the facts.
            config = {**config, "top_k": rule_facts["passed"]}
        keeps[score] = Keep.model_validate_json(json.dumps(config))
    rules = fit_rules(table, keeps, score_directions(scored), {})
    scores = {score: np.concatenate(list(table.column(score))) for score in keeps}
    masks = rule_masks(rules, scores)
    # A `keep_fraction_of_rest` rule ranks only the rows that the other rules keep; all others are beyond its threshold.
    other_masks = [mask for rule, mask in zip(rules, masks, strict=True) if rule.keep.keep_fraction_of_rest is None]
    rest = np.logical_and.reduce(other_masks) if other_masks else np.True_
    distances: list[Floats] = []
    for rule, mask in zip(rules, masks, strict=True):
        score = rule.score
        if rule.keep.range is not None:
            low, high = rule.threshold.min_score, rule.threshold.max_badness
            badness[score] = _nan_to_inf(np.maximum(low - scores[score], scores[score] - high))
        else:
            badness[score] = _nan_to_inf(rule.badness(scores))
            signs[score], thresholds[score] = rule.sign, rule.sign * rule.threshold.max_badness
        ranked = badness[score] if rule.keep.keep_fraction_of_rest is None else np.where(rest, badness[score], math.inf)
        distances.append(ranks_from_threshold(ranked, mask))
    combine_all = identity["combine"] == "all"
    kept = np.logical_and.reduce(masks) if combine_all else np.logical_or.reduce(masks)
    distance = np.maximum.reduce(distances) if combine_all else np.minimum.reduce(distances)
    selected_ids = [row["id"] for row in read_rows(selection.path, ["id"])]
    if identity["quota"] is not None or identity.get("diverse") is not None:
        # Rows dropped by the quota or by diversity are placed far from every threshold.
        kept = _mask_of(ids, selected_ids)
        distance = np.where(~kept & (distance < 0), len(ids), distance)
    if [id for id, keep in zip(ids, kept, strict=True) if keep] != selected_ids:
        raise StoreError(
            f"{selection.path} does not have the rows that its rules keep from {scored.path}",
            cause="one of them was modified, or built by another version of tunery",
            remedy="remove both and run `tunery run` again",
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
        thresholds=thresholds,
    )


def _mask_of(ids: list[str], selected_ids: list[str]) -> Bools:
    """Return which of `ids` are selected. `selected_ids` is a subsequence of `ids`, which may contain duplicates."""
    mask = np.zeros(len(ids), dtype=bool)
    index = 0
    for id in selected_ids:
        index = ids.index(id, index)
        mask[index] = True
        index += 1
    return mask


def ranks_from_threshold(badness: Floats, passed: Bools) -> Floats:
    """Return the rank of each row, best first, relative to the threshold, which is halfway between two ranks. Ties are
    ordered as in selection/select_stage.py."""
    order = np.argsort(badness, kind="stable")
    rank = np.empty(len(badness))
    rank[order] = np.arange(len(badness))
    distance: Floats = rank - passed.sum() + 0.5
    return distance


def read_reviewed_columns(filtered: FilterResult, ids: Iterable[str]) -> dict[str, Row]:
    """Return the columns shown to the reviewer of the rows with these ids, by id."""
    wanted = set(ids)
    return {row["id"]: row for row in read_rows(filtered.scored, REVIEWED_COLUMNS) if row["id"] in wanted}


def _nan_to_inf(values: Floats) -> Floats:
    return np.where(np.isnan(values), math.inf, values)
