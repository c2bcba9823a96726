"""Diversity selection against hand-worked cases and brute force, for any division of rows into shards and blocks."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import stage_context
from pydantic import ValidationError

from tunery.errors import StageError
from tunery.reporting.filter_tables import diversity_table
from tunery.review.filter_results import read_filter_results
from tunery.selection import candidates as candidates_module
from tunery.selection import k_center as k_center_module
from tunery.selection import score_first as score_first_module
from tunery.selection.candidates import MAX_DIMENSIONS, SCALE, Candidates, round_vectors
from tunery.selection.coverage import chance_similarity, coverage
from tunery.selection.k_center import k_center
from tunery.selection.score_first import score_first, sort_by_score
from tunery.selection.select_stage import run_select
from tunery.spec import Diverse, Experiment, Keep, Quota, Select
from tunery.store import Artifact, StageResult
from tunery.store.rows import SCHEMA, read_rows
from tunery.store.vectors import vector_column

NAN = math.nan


def vectors_at(*degrees: float) -> np.ndarray:
    """Return unit vectors in the plane at these angles, in degrees."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)


@contextmanager
def candidates_of(vectors: np.ndarray, badness: Sequence[float] | None = None) -> Iterator[tuple[Candidates, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        actual = Candidates(Path(folder), vectors.shape[1])
        rounded, is_valid = round_vectors(vectors)
        assert is_valid.all()
        count = len(vectors)
        scores = np.zeros(count) if badness is None else np.array(badness, float)
        actual.add(rounded, np.arange(count, dtype=np.uint64), np.arange(count) / max(count, 1), scores)
        actual.close()
        yield actual, Path(folder)


@contextmanager
def small_blocks() -> Iterator[None]:
    """Use small blocks and batches, so that a few dozen rows need many of them."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (candidates_module, k_center_module):
            patch.setattr(module, "BLOCK_SIZE", 7)
        patch.setattr(k_center_module, "MIN_ACTIVE_ROWS", 3)
        patch.setattr(k_center_module, "MAX_ACTIVE_ROWS", 5)
        patch.setattr(k_center_module, "PRUNE_INTERVAL", 2)
        patch.setattr(score_first_module, "BATCH_SIZE", 4)
        patch.setattr(score_first_module, "MAX_RECORDS", 9)
        yield


VECTORS = st.tuples(st.integers(1, 60), st.integers(2, 6), st.integers(1, 40), st.integers(0, 2**32 - 1))
"""Rows, dimensions, number of distinct rows, seed."""


def random_vectors(shape: tuple[int, int, int, int]) -> np.ndarray:
    rows, dimensions, distinct, seed = shape
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((distinct, dimensions))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[rng.integers(0, distinct, rows)].astype(np.float16)


# k-center.


def test_k_center_by_hand() -> None:
    # The mean points to 41 degrees: 20 is nearest to it, 180 farthest from that, then 100, then 0.
    with candidates_of(vectors_at(0, 10, 20, 100, 180)) as (candidates, _):
        assert [k_center(candidates, num_rows)[0] for num_rows in (1, 2, 3, 4)] == [
            [2],
            [2, 4],
            [2, 4, 3],
            [2, 4, 3, 0],
        ]


def greedy_k_center(candidates: Candidates, first: int, num_rows: int) -> tuple[list[int], np.ndarray]:
    """Gonzalez' greedy algorithm without optimizations, in integers."""
    vectors = candidates.vectors(slice(0, candidates.count)).astype(np.int64)
    squared_distances = ((vectors - vectors[first]) ** 2).sum(axis=1)
    selected = [first]
    while len(selected) < num_rows and squared_distances.max() > 0:
        selected.append(int(squared_distances.argmax()))
        squared_distances = np.minimum(squared_distances, ((vectors - vectors[selected[-1]]) ** 2).sum(axis=1))
    return selected, squared_distances


@settings(max_examples=30)
@given(VECTORS, st.integers(1, 60))
def test_k_center_equals_the_greedy_algorithm(shape: tuple[int, int, int, int], num_rows: int) -> None:
    with small_blocks(), candidates_of(random_vectors(shape)) as (candidates, _):
        selected, squared_distances = k_center(candidates, min(num_rows, candidates.count))
        expected, distances = greedy_k_center(candidates, selected[0], min(num_rows, candidates.count))
        assert selected == expected
        assert squared_distances.tolist() == distances.tolist()


def test_k_center_stops_if_all_rows_equal_a_selected_one() -> None:
    with candidates_of(vectors_at(0, 90, 0, 90, 0)) as (candidates, _):
        assert len(k_center(candidates, 4)[0]) == 2


@pytest.mark.parametrize("dimensions", [2, 64, MAX_DIMENSIONS])
def test_products_are_exact_in_any_summation_order(dimensions: int) -> None:
    rng = np.random.default_rng(0)
    extreme = np.vstack([np.ones((1, dimensions)), -np.ones((1, dimensions)), np.eye(2, dimensions)])
    vectors = np.vstack([extreme, rng.standard_normal((20, dimensions))])
    rounded, _ = round_vectors((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))
    floats, integers = rounded.astype(np.float32), rounded.astype(np.int64)
    exact = integers @ integers.T
    assert (floats @ floats.T).tolist() == exact.tolist()
    order = rng.permutation(dimensions)
    assert (floats[:, order] @ floats[:, order].T).tolist() == exact.tolist()
    assert [float(floats[0] @ row) for row in floats] == exact[0].tolist()
    squares = np.diag(exact)
    assert (squares[:, None] + squares - 2 * exact).max() <= 2**24
    lengths = np.sqrt(squares)
    assert np.abs(lengths / SCALE - 1).max() < 0.03


# Score first.


def test_score_first_by_hand() -> None:
    # 10 degrees has the best score; 25 and 0 are too similar to it (20 degrees: a cosine of 0.94), 90 is not.
    with candidates_of(vectors_at(0, 10, 25, 90), badness=[3, 1, 2, 4]) as (candidates, work):
        selection = score_first(candidates, 4, 0.94, work)
        assert selection.selected == [1, 3]
        assert selection.nearest_selected.tolist() == [1, -1, 1, -1]
        assert selection.similarity[2] == pytest.approx(math.cos(math.radians(15)), abs=1e-3)
        assert score_first(candidates, 1, 0.94, work).selected == [1]
        assert score_first(candidates, 4, 1.0, work).selected == [1, 2, 0, 3]


@settings(max_examples=30)
@given(VECTORS, st.integers(1, 60), st.sampled_from([-0.5, 0.0, 0.5, 0.9, 1.0]), st.integers(1, 5))
def test_score_first_equals_a_plain_loop(
    shape: tuple[int, int, int, int], num_rows: int, similarity: float, levels: int
) -> None:
    vectors = random_vectors(shape)
    badness = np.random.default_rng(shape[3]).integers(0, levels, len(vectors)).astype(float)
    with small_blocks(), candidates_of(vectors, badness.tolist()) as (candidates, work):
        selection = score_first(candidates, num_rows, similarity, work)
        vectors_int = candidates.vectors(slice(0, candidates.count)).astype(np.int64)
        squares = (vectors_int**2).sum(axis=1)
        cosines = (vectors_int @ vectors_int.T) / np.sqrt(np.multiply.outer(squares, squares))
        selected: list[int] = []
        for index in sorted(range(len(badness)), key=lambda index: (badness[index], index)):
            if len(selected) == num_rows:
                break
            if all(cosines[index, other] <= similarity + 1e-9 for other in selected):
                selected.append(index)
                continue
            nearest = int(selection.nearest_selected[index])
            assert nearest in selected
            assert cosines[index, nearest] == pytest.approx(max(cosines[index, other] for other in selected))
        assert selection.selected == selected
        assert not set(selected) & set(np.flatnonzero(np.asarray(selection.nearest_selected) >= 0).tolist())
        pairwise = cosines[np.ix_(selected, selected)][np.triu_indices(len(selected), 1)]
        assert (pairwise <= similarity + 1e-9).all(), "two kept rows are too similar"


@settings(max_examples=30)
@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.5, -3.0, 1e300, math.inf, -math.inf]), max_size=60))
def test_external_sort_equals_a_stable_sort(badness: list[float]) -> None:
    with small_blocks(), tempfile.TemporaryDirectory() as work:
        actual = [int(index) for chunk in sort_by_score(np.array(badness), Path(work)) for index in chunk]
    assert actual == sorted(range(len(badness)), key=lambda index: badness[index])


# Coverage.


def test_coverage_by_hand() -> None:
    with candidates_of(vectors_at(0, 60, 180)) as (candidates, _):
        result = coverage(candidates, np.arange(3), np.array([0]))
        assert result["radius"] == pytest.approx(2.0, abs=1e-3)
        assert result["similarity"] == pytest.approx((1 + 0.5 - 1) / 3, abs=1e-3)
        assert coverage(candidates, np.arange(3), np.arange(3)) == {"radius": 0.0, "similarity": 1.0}
        result = chance_similarity(candidates) or {}
        assert result["median"] == pytest.approx(-0.5, abs=1e-3)  # of 0.5, -0.5 and -1


# The stage.

ROWS = 40


def score_artifact(
    folder: Path, vectors: np.ndarray, splits: Sequence[int], scores: Sequence[float] | None = None
) -> Artifact:
    """Return a score artifact whose shards end at `splits`."""
    for name in ("rows", "scores"):
        (folder / name).mkdir(parents=True)
    ids = [f"{n * 7919 % 2**32:016x}" for n in range(len(vectors))]
    values = list(range(len(vectors))) if scores is None else list(scores)
    for number, (start, end) in enumerate(zip([0, *splits], [*splits, len(vectors)], strict=True)):
        rows = [
            {"id": ids[n], "text": f"row {n}", "source": "abc"[n % 3], "line": n, "injected_corruption": ""}
            for n in range(start, end)
        ]
        name = f"part-{number:05d}.parquet"
        pq.write_table(
            pa.Table.from_pylist([{k: r.get(k) for k in SCHEMA.names} for r in rows], SCHEMA), folder / "rows" / name
        )
        columns: dict[str, Any] = {"id": ids[start:end], "length": pa.array(values[start:end], pa.float64())}
        if end > start:
            columns["vec_vector"] = vector_column(vectors[start:end])
        pq.write_table(pa.table(columns), folder / "scores" / name)
    facts = {"rows": len(vectors), "scores": {"length": {"good": "high"}}}
    return Artifact(folder, {"kind": "score", "fingerprint": "f", "facts": facts}, {})


def run(folder: Path, data: Artifact, spec: Select, seed: int = 0) -> tuple[StageResult, list[str], dict[str, str]]:
    """Return facts, kept ids in order, and the rule that dropped each other id."""
    out = folder / "out"
    out.mkdir(parents=True)
    context = stage_context(
        spec, {"scored": data}, folder, name="clean", seed=seed, out=out, staging_dir=folder / "work"
    )
    result = run_select(context)
    assert not list((folder / "work").iterdir()), "temporary files are deleted"
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    return result, [row["id"] for row in read_rows(out)], {line["id"]: line["rule"] for line in dropped}


def select(**fields: Any) -> Select:
    return Select(kind="select", data="scored", **fields)


def unit_vectors(count: int = ROWS) -> np.ndarray:
    vectors = np.random.default_rng(5).standard_normal((count, 8))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize(
    "diverse",
    [
        Diverse(embedding="vec", method="k_center", rows=7),
        Diverse(embedding="vec", method="k_center", keep_fraction=0.5),
        Diverse(embedding="vec", method="score_first", rows=7, score="length"),
        Diverse(embedding="vec", method="score_first", score="random", max_similarity=0.3),
    ],
    ids=lambda diverse: f"{diverse.method} {diverse.rows or diverse.keep_fraction}",
)
def test_every_row_is_kept_or_listed_independent_of_shards(tmp_path: Path, diverse: Diverse) -> None:
    spec = select(diverse=diverse, keep={"length": Keep(range=(3, None))})
    results = []
    for number, splits in enumerate(([], [13], [1, 2, 2, 30])):
        folder = tmp_path / str(number)
        result, kept, dropped = run(folder, score_artifact(folder / "scored", unit_vectors(), splits), spec)
        assert len(kept) + len(dropped) == ROWS
        assert not set(kept) & set(dropped)
        assert len(kept) == result.facts["kept"] == result.facts["diverse"]["kept"]
        assert result.facts["diverse"]["candidates"] == ROWS - 3
        results.append((result.facts["diverse"], kept, dropped))
    assert all(other == results[0] for other in results)
    if diverse.rows:
        assert len(results[0][1]) == diverse.rows
    elif diverse.keep_fraction:
        assert len(results[0][1]) == round(diverse.keep_fraction * (ROWS - 3))


def test_too_similar_row_is_listed_with_its_neighbor(tmp_path: Path) -> None:
    data = score_artifact(tmp_path / "scored", vectors_at(0, 10, 90, 95), [2], scores=[1, 2, 3, 4])
    spec = select(diverse=Diverse(embedding="vec", method="score_first", score="length", prefer="low", rows=2))
    result, kept, dropped = run(tmp_path, data, spec)
    ids = [f"{n * 7919:016x}" for n in range(4)]
    assert kept == [ids[0], ids[2]]
    assert dropped == {ids[1]: f"score_first: too similar to {ids[0]} (0.985)", ids[3]: "score_first 2 by vec"}
    assert result.facts["diverse"]["too_similar"] == 1


def test_summary_table_explains_a_shortfall(tmp_path: Path) -> None:
    data = score_artifact(tmp_path / "scored", vectors_at(0, 1, 90, 91), [2], scores=[1, 2, 3, 4])
    spec = select(diverse=Diverse(embedding="vec", method="score_first", score="length", prefer="low", rows=3))
    result, kept, _ = run(tmp_path, data, spec)
    assert len(kept) == 2
    experiment = Experiment.model_construct(stages={"few": spec})
    table = diversity_table(experiment, {"few": Artifact(tmp_path, {"facts": result.facts}, {})})
    assert table is not None
    assert table["notes"][0].startswith("few: fewer than the requested 3 rows: all other rows have a similarity above")


def test_rows_without_a_vector_or_a_score_do_not_pass_and_are_listed(tmp_path: Path) -> None:
    vectors = unit_vectors(6)
    vectors[2] = NAN
    for name, spec, missing in (
        ("k", Diverse(embedding="vec", method="k_center", keep_fraction=1.0), {2: "no embedding"}),
        (
            "s",
            Diverse(embedding="vec", method="score_first", score="length", max_similarity=1.0),
            {2: "no embedding or no length", 4: "no embedding or no length"},
        ),
    ):
        data = score_artifact(tmp_path / name / "scored", vectors, [3], scores=[0, 1, 2, 3, NAN, 5])
        result, kept, dropped = run(tmp_path / name, data, select(diverse=spec))
        assert dropped == {f"{n * 7919:016x}": f"{spec.method}: {reason}" for n, reason in missing.items()}
        assert (len(kept), result.facts["diverse"]["missing"]) == (6 - len(missing), len(missing))


def test_diversity_is_applied_after_rules_and_quota(tmp_path: Path) -> None:
    data = score_artifact(tmp_path / "scored", unit_vectors(), [20])
    diverse = Diverse(embedding="vec", method="k_center", rows=5)
    keep, quota = {"length": Keep(threshold=10.0)}, Quota(group_by="source", rows=4, sort_by="length")
    result, kept, dropped = run(tmp_path, data, select(keep=keep, quota=quota, diverse=diverse))
    assert len(kept) == 5
    assert result.facts["diverse"]["candidates"] == 12
    reasons = list(dropped.values())
    assert [reasons.count(reason) for reason in ("length threshold 10", "quota", "k_center 5 by vec")] == [10, 18, 7]


def test_facts_compare_coverage_with_a_random_selection(tmp_path: Path) -> None:
    # Nine tenths of the rows are similar, so a random selection has few others.
    vectors = np.vstack([vectors_at(*np.linspace(0, 5, 54)), vectors_at(90, 120, 150, 180, 240, 300)])
    spec = select(diverse=Diverse(embedding="vec", method="k_center", rows=7))
    result = run(tmp_path / "a", score_artifact(tmp_path / "a/scored", vectors, [30]), spec, seed=1)[0].facts["diverse"]
    assert result["coverage_rows"] == 60
    assert result["coverage"]["radius"] < 0.1 < 0.5 < result["random"]["radius"]
    assert result["coverage"]["similarity"] > result["random"]["similarity"]
    other = run(tmp_path / "b", score_artifact(tmp_path / "b/scored", vectors, [30]), spec, seed=2)[0].facts["diverse"]
    assert other["random"] != result["random"], "the random selection depends on the seed"
    assert other["coverage"] == result["coverage"]


def test_selection_without_candidates_reports_what_dropped_all_rows(tmp_path: Path) -> None:
    spec = select(keep={"length": Keep(threshold=1000.0)}, diverse=Diverse(embedding="vec", method="k_center", rows=2))
    with pytest.raises(StageError, match="no row of 40 passes") as caught:
        run(tmp_path, score_artifact(tmp_path / "scored", unit_vectors(), [20]), spec)
    assert "`length threshold 1000` dropped 40" in caught.value.cause


def test_review_of_a_diverse_selection_samples_near_the_rule_threshold(tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    data = score_artifact(artifacts / "score-f", unit_vectors(), [20])
    spec = select(
        keep={"length": Keep(keep_fraction_of_rest=0.5)}, diverse=Diverse(embedding="vec", method="k_center", rows=5)
    )
    result, kept, _ = run(tmp_path, data, spec)
    (artifacts / "score-f" / "manifest.json").write_text(json.dumps(data.manifest))
    (artifacts / "score-f" / "runtime_stats.json").write_text("{}")
    (tmp_path / "out").rename(artifacts / "select-g")
    identity = spec.model_dump(mode="json", exclude={"kind", "seed"})
    manifest = {"identity": identity, "inputs": {"data": "f"}, "facts": result.facts}
    filtered = read_filter_results(Artifact(artifacts / "select-g", manifest, {}))
    assert [id for id, keep in zip(filtered.ids, filtered.kept, strict=True) if keep] == kept
    assert (filtered.distance[20:] < 0).sum() == 5
    assert (filtered.distance == ROWS).sum() == 15
    assert sorted(filtered.distance[:20]) == [n + 0.5 for n in range(20)]


# Validation of the fields.


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "k_center"}, "needs `rows` or `keep_fraction`"),
        ({"method": "k_center", "rows": 3, "score": "length"}, "remove `score`"),
        ({"method": "k_center", "rows": 3, "max_similarity": 0.5}, "remove `max_similarity`"),
        ({"method": "score_first", "rows": 3}, "needs a `score`"),
        (
            {"method": "score_first", "score": "length", "rows": 3, "keep_fraction": 0.5},
            "one of `rows`, `keep_fraction`",
        ),
    ],
)
def test_fields_of_the_other_method_are_rejected(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Diverse(embedding="vec", **fields)
