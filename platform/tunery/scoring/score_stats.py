"""Statistics of the scores of a score stage, computed from its score table in constant memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow.parquet as pq

from tunery.ingest.corruption_metrics import Floats, LabeledScores, auc_by_kind, histogram
from tunery.models.metrics import auc
from tunery.scoring.order_statistics import kth_smallest
from tunery.spec import ScorerSpec
from tunery.spec.scorers import SCORERS
from tunery.store.rows import shards
from tunery.store.vectors import vectors_of

MAX_AUC_ROWS = 1 << 22
"""The AUC against corrupted rows needs a complete score column in memory, so it is computed up to this many rows."""

PAIR_BINS = 24
"""Number of bins per axis of a two-dimensional histogram of two scores."""
MAX_PAIRS = 3


def describe_scores(artifact: Path, by: Sequence[ScorerSpec]) -> dict[str, Any]:
    """Return the facts of a score stage.

    rows, rows_out (rows of the score table), tokens, truncated (rows that were too long for some model); for each score
    its histogram, median, number of rows without a score, and AUC as a detector of corrupted rows; two-dimensional
    histograms of pairs of scores; and the number of rows with a vector.
    """
    files = shards(artifact)
    rows = sum(int(pq.read_metadata(path).num_rows) for path in files)
    scored = sum(int(pq.read_metadata(artifact / "scores" / path.name).num_rows) for path in files)
    names = pq.read_schema(artifact / "scores" / files[0].name).names
    # Scorers of one model count the same tokens. The tokens of the first model are reported.
    first = next((spec.score for spec in by if f"{spec.score}_tokens" in names), None)
    tokens = sum(int(chunk.sum()) for chunk in column(artifact, f"{first}_tokens")) if first else 0
    truncated_columns = [f"{spec.score}_truncated" for spec in by if f"{spec.score}_truncated" in names]
    truncated = _count_rows_with_any(artifact, truncated_columns)
    corruption_kinds = _read_corruption_kinds(artifact) if rows <= MAX_AUC_ROWS else None
    vectors = {spec.score: _describe_vectors(artifact, spec.score) for spec in by if spec.returns_embeddings}
    by = [spec for spec in by if not spec.returns_embeddings]
    score_stats = {spec.score: _describe_score(artifact, spec, rows, corruption_kinds) for spec in by}
    return {
        "rows": rows,
        "rows_out": scored,
        "tokens": tokens,
        "truncated": truncated,
        "scores": score_stats,
        "pairs": list(_pair_histograms(artifact, by, score_stats)),
        **({"vectors": vectors} if vectors else {}),
    }


def column(artifact: Path, name: str) -> Iterator[Any]:
    """Yield a column of the score table, one numpy array per shard."""
    for path in shards(artifact):
        yield pq.read_table(artifact / "scores" / path.name, columns=[name])[0].to_numpy()


def _count_rows_with_any(artifact: Path, names: Sequence[str]) -> int:
    """Return the number of rows with True in at least one of the columns."""
    total = 0
    for path in shards(artifact) if names else ():
        table = pq.read_table(artifact / "scores" / path.name, columns=list(names))
        total += int(np.logical_or.reduce([column.to_numpy() for column in table.columns]).sum())
    return total


def _describe_score(
    artifact: Path, spec: ScorerSpec, rows: int, corruption_kinds: Sequence[str] | None
) -> dict[str, Any]:
    unscored = sum(int(np.isnan(chunk).sum()) for chunk in column(artifact, spec.score))
    num_scored = rows - unscored
    middle = sorted({(num_scored - 1) // 2, num_scored // 2}) if num_scored else []
    middle_values = [kth_smallest(lambda: column(artifact, spec.score), k) for k in middle]
    better = SCORERS[spec.kind()].better
    stats: dict[str, Any] = {
        "good": better,
        "histogram": histogram(lambda: _scores_with_corruption(artifact, spec.score, corruption_kinds)),
        "median": sum(middle_values) / len(middle_values) if middle_values else None,
        "unscored": unscored,
        "auc": None,
        "auc_by_kind": {},
    }
    if corruption_kinds is not None and rows:
        badness = as_badness(np.concatenate(list(column(artifact, spec.score))), better)
        stats["auc"] = auc(badness, np.array([kind != "" for kind in corruption_kinds]))
        stats["auc_by_kind"] = auc_by_kind(badness, corruption_kinds)
    return stats


def _describe_vectors(artifact: Path, score: str) -> dict[str, int]:
    """Return the number of rows with and without a vector, and its dimensions."""
    present = missing = dimensions = 0
    for vectors_nh in _read_vectors(artifact, score):
        num_present = int((~np.isnan(vectors_nh[:, 0])).sum())
        present, missing = present + num_present, missing + len(vectors_nh) - num_present
        dimensions = vectors_nh.shape[1]
    return {"rows": present, "missing": missing, "dimensions": dimensions}


def _read_vectors(artifact: Path, score: str) -> Iterator[Any]:
    """Yield the vectors of each non-empty shard, (rows, dimensions), float16."""
    for path in shards(artifact):
        if pq.read_metadata(path).num_rows:
            table = pq.read_table(artifact / "scores" / path.name, columns=[f"{score}_vector"])
            yield vectors_of(table[0])


def _pair_histograms(artifact: Path, by: Sequence[ScorerSpec], score_stats: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield two-dimensional histograms of the first pairs of non-constant scores.

    {"x", "y", "x_edges", "y_edges", "counts"}, where counts has one row per bin of y. Each takes a pass over two
    columns.
    """
    varying = [spec.score for spec in by if _is_varying(score_stats[spec.score]["histogram"]["edges"])]
    for x, y in itertools.islice(itertools.combinations(varying, 2), MAX_PAIRS):
        x_edges, y_edges = (_pair_edges(score_stats[score]["histogram"]["edges"]) for score in (x, y))
        counts = np.zeros((PAIR_BINS, PAIR_BINS), dtype=int)
        for xs, ys in zip(column(artifact, x), column(artifact, y), strict=True):
            finite = np.isfinite(xs) & np.isfinite(ys)
            counts += np.histogram2d(ys[finite], xs[finite], [y_edges, x_edges])[0].astype(int)
        yield {
            "x": x,
            "y": y,
            "x_edges": x_edges.tolist(),
            "y_edges": y_edges.tolist(),
            "counts": counts.tolist(),
        }


def _is_varying(edges: Sequence[float]) -> bool:
    return len(edges) > 1 and edges[-1] > edges[0] + 1e-3 * max(abs(edges[0]), 1.0)


def _pair_edges(edges: Sequence[float]) -> Floats:
    """Return PAIR_BINS + 1 edges over the range of a histogram, spaced linearly or logarithmically as it is."""
    low, high = edges[0], edges[-1]
    if low > 0 and high > 10 * low:
        pair_edges = np.geomspace(low, high, PAIR_BINS + 1)
    else:
        pair_edges = np.linspace(low, high, PAIR_BINS + 1)
    pair_edges[0], pair_edges[-1] = low, high
    return pair_edges


def as_badness(scores: Floats, better: Literal["low", "high"]) -> Floats:
    """Return scores with their sign set so that higher is worse; a row without a score is infinitely bad."""
    return np.where(np.isnan(scores), math.inf, scores if better == "low" else -scores)


def _read_corruption_kinds(artifact: Path) -> list[str] | None:
    """Return the kind of corruption of each row ("" for an intact row), or None if it is unknown for some row."""
    kinds: list[str] = []
    for path in shards(artifact):
        shard_kinds = pq.read_table(path, columns=["injected_corruption"])[0].to_pylist()
        if None in shard_kinds:
            return None
        kinds += cast(list[str], shard_kinds)
    return kinds


def _scores_with_corruption(
    artifact: Path, score: str, corruption_kinds: Sequence[str] | None
) -> Iterator[LabeledScores]:
    start = 0
    for chunk in column(artifact, score):
        is_corrupted = None
        if corruption_kinds is not None:
            is_corrupted = np.array([kind != "" for kind in corruption_kinds[start : start + len(chunk)]], bool)
        start += len(chunk)
        yield chunk, is_corrupted
