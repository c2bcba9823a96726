"""What a score stage tells of its scores, read back from its table in constant memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq

from tunery.ingest.corruption_metrics import Floats, auc_by_kind, histogram
from tunery.models.metrics import auc
from tunery.scoring.order_statistics import kth_smallest
from tunery.scoring.scorers.registry import SCORER_ENTRIES
from tunery.spec import ScorerSpec
from tunery.store.rows import shards
from tunery.store.vectors import vectors_of

MAX_AUC_ROWS = 1 << 22
"""AUC against planted rows needs all of a score at once: for corpora of at most so many rows."""

STEPS = 24
"""Of each axis where rows are counted by two scores at once."""
PAIRS = 3


def describe_scores(artifact: Path, by: Sequence[ScorerSpec]) -> dict[str, Any]:
    """rows, rows_out (of the scores), tokens, truncated (rows that were too long for some model); of each score its
    histogram, median, how many rows have none, how well it tells planted rows apart; rows by two scores at once; how
    many rows have a vector."""
    files = shards(artifact)
    rows = sum(int(pq.read_metadata(path).num_rows) for path in files)
    scored = sum(int(pq.read_metadata(artifact / "scores" / path.name).num_rows) for path in files)
    names = pq.read_schema(artifact / "scores" / files[0].name).names
    # Scorers of one model count the same tokens: those of the first model are told.
    first = next((spec.score for spec in by if f"{spec.score}_tokens" in names), None)
    tokens = sum(int(piece.sum()) for piece in column(artifact, f"{first}_tokens")) if first else 0
    cuts = [f"{spec.score}_truncated" for spec in by if f"{spec.score}_truncated" in names]
    truncated = _rows_with_any(artifact, cuts)
    planted = _planted(artifact) if rows <= MAX_AUC_ROWS else None
    vectors = {spec.score: _describe_vectors(artifact, spec.score) for spec in by if spec.gives_vectors}
    by = [spec for spec in by if not spec.gives_vectors]
    described = {spec.score: _describe(artifact, spec, rows, planted) for spec in by}
    return {
        "rows": rows,
        "rows_out": scored,
        "tokens": tokens,
        "truncated": truncated,
        "scores": described,
        "pairs": list(_pairs(artifact, by, described)),
        **({"vectors": vectors} if vectors else {}),
    }


def column(artifact: Path, name: str) -> Iterator[Any]:
    """A column of the score table, a numpy array a shard."""
    for path in shards(artifact):
        yield pq.read_table(artifact / "scores" / path.name, columns=[name])[0].to_numpy()


def _rows_with_any(artifact: Path, names: Sequence[str]) -> int:
    """Rows with True in one of the columns, or in several."""
    total = 0
    for path in shards(artifact) if names else ():
        table = pq.read_table(artifact / "scores" / path.name, columns=list(names))
        total += int(np.logical_or.reduce([column.to_numpy() for column in table.columns]).sum())
    return total


def _describe(artifact: Path, spec: ScorerSpec, rows: int, planted: Sequence[str] | None) -> dict[str, Any]:
    unscored = sum(int(np.isnan(piece).sum()) for piece in column(artifact, spec.score))
    usable = rows - unscored
    middle = sorted({(usable - 1) // 2, usable // 2}) if usable else []
    median = [kth_smallest(lambda: column(artifact, spec.score), k) for k in middle]
    good = SCORER_ENTRIES[spec.kind()].good
    told: dict[str, Any] = {
        "good": good,
        "histogram": histogram(lambda: _with_planted(artifact, spec.score, planted)),
        "median": sum(median) / len(median) if median else None,
        "unscored": unscored,
        "auc": None,
        "auc_by_kind": {},
    }
    if planted is not None and rows:
        badness = as_badness(np.concatenate(list(column(artifact, spec.score))), good)
        told["auc"] = auc(badness, np.array([kind != "" for kind in planted]))
        told["auc_by_kind"] = auc_by_kind(badness, planted)
    return told


def _describe_vectors(artifact: Path, score: str) -> dict[str, int]:
    """How many rows have a vector, how many have none, and its dimensions."""
    there = missing = dimensions = 0
    for vectors_nh in vector_pieces(artifact, score):
        known = int((~np.isnan(vectors_nh[:, 0])).sum())
        there, missing = there + known, missing + len(vectors_nh) - known
        dimensions = vectors_nh.shape[1]
    return {"rows": there, "missing": missing, "dimensions": dimensions}


def vector_pieces(artifact: Path, score: str) -> Iterator[Any]:
    """The vectors that a scorer kept, float16, (rows, dimensions) a shard; of a shard without rows there is none."""
    for path in shards(artifact):
        if pq.read_metadata(path).num_rows:
            table = pq.read_table(artifact / "scores" / path.name, columns=[f"{score}_vector"])
            yield vectors_of(table[0])


def _pairs(artifact: Path, by: Sequence[ScorerSpec], described: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows by two scores at once, of the first scores that vary: {"x", "y", "x_edges", "y_edges", "counts"}, the counts
    a row of them for each step of y. One more pass over two columns each."""
    varied = [spec.score for spec in by if _spread(described[spec.score]["histogram"]["edges"])]
    for x, y in itertools.islice(itertools.combinations(varied, 2), PAIRS):
        edges = [thinned_edges(described[score]["histogram"]["edges"]) for score in (x, y)]
        counts = np.zeros((STEPS, STEPS), dtype=int)
        for xs, ys in zip(column(artifact, x), column(artifact, y), strict=True):
            both = np.isfinite(xs) & np.isfinite(ys)
            counts += np.histogram2d(ys[both], xs[both], [edges[1], edges[0]])[0].astype(int)
        told = {"x": x, "y": y, "x_edges": edges[0].tolist(), "y_edges": edges[1].tolist()}
        yield {**told, "counts": counts.tolist()}


def _spread(edges: Sequence[float]) -> bool:
    return len(edges) > 1 and edges[-1] > edges[0] + 1e-3 * max(abs(edges[0]), 1.0)


def thinned_edges(edges: Sequence[float]) -> Floats:
    """STEPS + 1 edges from the first to the last, spaced as the histogram's are: evenly, or by the logarithm."""
    low, high = edges[0], edges[-1]
    found = np.geomspace(low, high, STEPS + 1) if low > 0 and high > 10 * low else np.linspace(low, high, STEPS + 1)
    found[0], found[-1] = low, high
    return found


def as_badness(values: Floats, good: str) -> Floats:
    """Higher is worse; a row without a score is as bad as can be."""
    return np.where(np.isnan(values), math.inf, values if good == "low" else -values)


def _planted(artifact: Path) -> list[str] | None:
    """The kind of damage of each row; None where it is not known of all."""
    kinds: list[str] = []
    for path in shards(artifact):
        piece = pq.read_table(path, columns=["planted"])[0].to_pylist()
        if None in piece:
            return None
        kinds += cast(list[str], piece)
    return kinds


def _with_planted(artifact: Path, score: str, planted: Sequence[str] | None) -> Iterator[tuple[Floats, Any]]:
    start = 0
    for piece in column(artifact, score):
        bad = None if planted is None else np.array([kind != "" for kind in planted[start : start + len(piece)]], bool)
        start += len(piece)
        yield piece, bad
