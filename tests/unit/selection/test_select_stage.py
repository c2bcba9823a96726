"""Rows that pass each rule, and detection of injected corruption by a filter, against hand-worked values."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process import dataset, stage_context

from tunery.errors import StageError
from tunery.ingest.corruption_metrics import auc, auc_by_kind, filter_quality, histogram
from tunery.selection.select_stage import run_select
from tunery.selection.thresholds import describe, find_threshold
from tunery.spec import Keep, Select
from tunery.store import StageResult
from tunery.store.rows import SHARD, read_rows, shards, write_rows

NAN, INF = math.nan, math.inf
FEW_VALUES = st.sampled_from([0.0, 1.0, 1.5, 2.0, -3.0, 1e300, INF])
"""Few values, so that many scores are tied."""
SCORES = st.lists(FEW_VALUES | st.floats(allow_nan=False), min_size=1, max_size=40)
QUANTILES = st.floats(0.001, 1.0)


# Rules.


def apply_rule(badness: np.ndarray, rule: Keep, good: str = "low") -> tuple[np.ndarray, float]:
    """Fit and apply the threshold of a rule in chunks, like the stage."""
    middle = len(badness) // 2
    chunks = lambda: iter([badness[:middle], badness[middle:]])  # noqa: E731
    threshold = find_threshold(chunks, rule, good, len(badness), None)
    return np.concatenate([threshold.mask(chunk) for chunk in chunks()]), threshold.max_badness


@given(SCORES, QUANTILES)
def test_keep_fraction_keeps_exactly_the_rounded_share_of_finite_scores(scores: list[float], quantile: float) -> None:
    badness = np.array([score if math.isfinite(score) else 1e308 for score in scores])
    passed, threshold = apply_rule(badness, Keep(keep_fraction=quantile))
    assert passed.sum() == round(quantile * len(scores))
    if passed.any():
        assert threshold == badness[passed].max()
        assert (badness[~passed] >= threshold).all(), "a dropped row is better than a kept one"
    else:
        assert threshold == -INF


@given(SCORES, QUANTILES)
def test_ties_at_the_threshold_go_to_the_first_rows(scores: list[float], quantile: float) -> None:
    badness = np.array(scores)
    passed, threshold = apply_rule(badness, Keep(keep_fraction=min(quantile, 0.999)))
    passed_at_threshold = passed[badness == threshold]
    assert not (np.diff(passed_at_threshold.astype(int)) > 0).any()


@given(SCORES, QUANTILES, QUANTILES)
def test_smaller_keep_fraction_keeps_a_subset(
    scores: list[float], first_quantile: float, second_quantile: float
) -> None:
    few, _ = apply_rule(np.array(scores), Keep(keep_fraction=min(first_quantile, second_quantile)))
    many, _ = apply_rule(np.array(scores), Keep(keep_fraction=max(first_quantile, second_quantile)))
    assert (few <= many).all()


@pytest.mark.parametrize(
    ("scores", "rule", "passed", "threshold"),
    [
        ([3, 1, 2, 4], Keep(keep_fraction=0.5), [0, 1, 1, 0], 2),
        ([1, 1, 1, 1], Keep(keep_fraction=0.5), [1, 1, 0, 0], 1),
        ([2, 1, 1, 2], Keep(keep_fraction=0.75), [1, 1, 1, 0], 2),
        ([3, 1, 2], Keep(keep_fraction=1.0), [1, 1, 1], 3),
        ([3, NAN, 2], Keep(keep_fraction=1.0), [1, 1, 1], 3),
        ([3, NAN, 2], Keep(keep_fraction=0.9), [1, 0, 1], 3),
        ([NAN, NAN, 2], Keep(keep_fraction=0.6), [0, 0, 1], 2),
        ([NAN, NAN], Keep(keep_fraction=0.5), [0, 0], -INF),
        ([3, 1], Keep(keep_fraction=0.1), [0, 0], -INF),
        ([1, 2, 3, NAN], Keep(threshold=2.0), [1, 1, 0, 0], 2),
        ([1, 2], Keep(threshold=0.5), [0, 0], 0.5),
    ],
)
def test_rows_that_pass_by_hand(scores: list[float], rule: Keep, passed: list[int], threshold: float) -> None:
    actual, actual_threshold = apply_rule(np.array(scores, dtype=float), rule)
    assert actual.tolist() == [bool(value) for value in passed]
    assert actual_threshold == threshold


@given(st.lists(FEW_VALUES | st.just(NAN), min_size=1), st.floats(0.01, 0.99), st.sampled_from([0.0, 1.5, 1e301]))
def test_row_without_a_score_never_passes(scores: list[float], quantile: float, threshold: float) -> None:
    badness = np.array(scores)
    for rule in (Keep(keep_fraction=quantile), Keep(threshold=threshold)):
        assert not (apply_rule(badness, rule)[0] & np.isnan(badness)).any()


def test_rule_is_described_as_it_was_written() -> None:
    assert describe("perplexity", Keep(keep_fraction=0.8)) == "perplexity keep_fraction 0.8"
    assert describe("perplexity", Keep(threshold=12.5)) == "perplexity threshold 12.5"


# AUC.


def ordered_pairs(badness: list[float], corrupted: list[bool]) -> float:
    """Return the fraction of (corrupted, clean) pairs whose corrupted row has the higher badness; ties count half."""
    positives = [value for value, is_corrupted in zip(badness, corrupted, strict=True) if is_corrupted]
    negatives = [value for value, is_corrupted in zip(badness, corrupted, strict=True) if not is_corrupted]
    pairs = list(itertools.product(positives, negatives))
    return sum(1.0 if high > low else 0.5 if high == low else 0.0 for high, low in pairs) / len(pairs)


@given(st.lists(st.tuples(FEW_VALUES | st.floats(allow_nan=False), st.booleans()), min_size=1, max_size=30))
def test_auc_is_the_fraction_of_correctly_ordered_pairs(rows: list[tuple[float, bool]]) -> None:
    badness, corrupted = [score for score, _ in rows], [is_corrupted for _, is_corrupted in rows]
    actual = auc(np.array(badness), np.array(corrupted))
    if all(corrupted) or not any(corrupted):
        assert actual is None
    else:
        assert actual == pytest.approx(ordered_pairs(badness, corrupted))
        assert auc(np.array(badness), ~np.array(corrupted)) == pytest.approx(1 - actual)


@pytest.mark.parametrize(
    ("badness", "corrupted", "value"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([1, 2, 3, 4], [1, 1, 0, 0], 0.0),
        ([1, 1, 1, 1], [0, 1, 0, 1], 0.5),
        ([1, 2, 2, 3], [0, 0, 1, 1], 0.875),
    ],
)
def test_auc_by_hand(badness: list[float], corrupted: list[int], value: float) -> None:
    assert auc(np.array(badness, dtype=float), np.array(corrupted, dtype=bool)) == value


def test_auc_of_a_corruption_kind_excludes_other_kinds() -> None:
    badness = np.array([1.0, 2.0, 3.0, 4.0, 0.0])
    assert auc_by_kind(badness, ["", "", "cut", "swapped", "repeated"]) == {"cut": 1.0, "repeated": 0.0, "swapped": 1.0}
    assert auc_by_kind(badness, ["cut"] * 5) == {}
    assert auc_by_kind(badness, [""] * 5) == {}


# Quality of a filter.


def test_quality_of_a_filter_by_hand() -> None:
    # Ten rows, four of them corrupted. The filter drops five, three of them corrupted.
    corruption = ["", "cut", "", "cut", "", "swapped", "", "swapped", "", ""]
    dropped = np.array([1, 1, 0, 1, 0, 1, 0, 0, 1, 0], dtype=bool)
    badness = np.array([7, 8, 1, 9, 2, 10, 3, 4, 6, 5], dtype=float)
    quality = filter_quality(dropped, badness, corruption)
    assert quality == {
        "total": 4,
        "dropped": 3,
        "precision": 3 / 5,
        "recall": 3 / 4,
        "recall_by_kind": {"cut": 1.0, "swapped": 0.5},
        # Of 4 x 6 pairs, 6 + 6 + 6 are in order, and 4 (worse than 1, 2, 3) gives 3.
        "auc": 21 / 24,
        "random_precision": 4 / 10,
        "random_recall": 5 / 10,
    }


def test_undefined_quality_metrics_are_none() -> None:
    clean = filter_quality(np.array([True, False]), np.array([1.0, 2.0]), ["", ""])
    assert (clean["recall"], clean["auc"], clean["precision"], clean["random_precision"]) == (None, None, 0.0, 0.0)
    kept = filter_quality(np.array([False, False]), None, ["", "cut"])
    assert (kept["precision"], kept["recall"], kept["auc"]) == (None, 0.0, None)


# Histogram.


@given(st.lists(st.floats(1e-6, 1e300) | st.sampled_from([0.0, -1.0, NAN, INF]), max_size=50), st.randoms())
def test_histogram_counts_every_finite_number_once(values: list[float], random: Any) -> None:
    corrupted = np.array([random.random() < 0.5 for _ in values], dtype=bool)
    actual = histogram(lambda: iter([(np.array(values, dtype=float), corrupted)]), bins=10)
    is_finite = np.array([math.isfinite(value) for value in values], dtype=bool)
    assert sum(actual["counts"]) == is_finite.sum()
    assert sum(actual["corrupted"]) == (is_finite & corrupted).sum()
    assert all(part <= count for part, count in zip(actual["corrupted"], actual["counts"], strict=True))
    if is_finite.any():
        assert len(actual["edges"]) == len(actual["counts"]) + 1 == 11
        assert actual["edges"] == sorted(actual["edges"])


def test_histogram_bins_are_even_in_the_logarithm() -> None:
    actual = histogram(lambda: iter([(np.array([1.0, 5.0]), None), (np.array([50.0, 1000.0]), None)]), bins=3)
    assert actual["edges"] == pytest.approx([1, 10, 100, 1000])
    assert actual["counts"] == [2, 1, 1]
    assert actual["corrupted"] == [0, 0, 0]


# The stage.


def select(
    folder: Path,
    scores: list[float],
    keep: dict[str, Keep],
    corruption: list[str | None],
    length: list[float] | None = None,
) -> tuple[StageResult, Path]:
    scored, out = folder / "scored", folder / "out"
    out.mkdir(parents=True)
    write_rows(
        (
            {"id": f"{n:016x}", "text": f"row {n}", "line": n, "injected_corruption": kind}
            for n, kind in enumerate(corruption)
        ),
        scored,
    )
    (scored / "scores").mkdir()
    for index, shard in enumerate(shards(scored)):
        columns = {"perplexity": scores, "length": length or scores}
        parts = {name: values[index * SHARD : (index + 1) * SHARD] for name, values in columns.items()}
        table = pa.table({name: pa.array(part, pa.float64()) for name, part in parts.items()})
        pq.write_table(table, scored / "scores" / shard.name)
    context = stage_context(
        Select(kind="select", data="scored", keep=keep),
        {"scored": dataset(scored, "score")},
        folder,
        name="clean",
        out=out,
    )
    return run_select(context), out


def test_selected_rows_keep_their_order_and_dropped_rows_are_listed(tmp_path: Path) -> None:
    count = SHARD + 100  # two shards
    scores = [float((n * 37) % count) for n in range(count)]
    scores[5] = NAN
    result, out = select(tmp_path, scores, {"perplexity": Keep(keep_fraction=0.75)}, [""] * count)
    kept = [row["line"] for row in read_rows(out)]
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    facts = result.facts
    assert facts["rows"] == facts["kept"] == len(kept) == round(0.75 * count)
    assert facts["kept"] + facts["dropped"] == facts["rows_in"] == count
    assert kept == sorted(kept)
    assert sorted([*kept, *(line["line"] for line in dropped)]) == list(range(count))
    assert max(scores[n] for n in kept) == facts["rules"][0]["thresholds"][0]
    assert min(scores[line["line"]] for line in dropped if line["line"] != 5) >= facts["rules"][0]["thresholds"][0]
    assert 5 not in kept
    assert {line["rule"] for line in dropped} == {"perplexity keep_fraction 0.75"}
    assert facts["rules"][0]["dropped"] == len(dropped)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        # The other rules keep rows 1, 2, 4, 6, 7: half of those with a score, best first, ties by position.
        ({"perplexity": Keep(keep_fraction_of_rest=0.5), "length": Keep(threshold=1.0)}, [2, 4]),
        ({"length": Keep(threshold=1.0), "perplexity": Keep(keep_fraction_of_rest=0.5)}, [2, 4]),
        ({"length": Keep(threshold=1.0), "perplexity": Keep(keep_fraction_of_rest=1.0)}, [1, 2, 4, 6]),
        ({"length": Keep(threshold=1.0), "perplexity": Keep(keep_fraction=0.5)}, [2, 4]),
        ({"perplexity": Keep(keep_fraction_of_rest=0.5)}, [0, 2, 3, 4]),
        ({"perplexity": Keep(keep_fraction=0.75)}, [0, 1, 2, 3, 4, 5]),
        (
            {"perplexity": Keep(keep_fraction_of_rest=0.5), "length": Keep(keep_fraction_of_rest=0.5, prefer="high")},
            [0, 3],
        ),
    ],
)
def test_keep_fraction_of_rest_refers_to_rows_that_other_rules_keep(
    keep: dict[str, Keep], kept: list[int], tmp_path: Path
) -> None:
    result, out = select(tmp_path, [0, 5, 2, 1, 2, 3, 5, NAN], keep, [""] * 8, length=[9, 1, 0, 9, 1, 9, 0, 1])
    assert [row["line"] for row in read_rows(out)] == kept
    assert result.facts["dropped"] == 8 - len(kept)


def test_dropped_rows_are_attributed_to_the_first_rule(tmp_path: Path) -> None:
    keep = {"perplexity": Keep(keep_fraction_of_rest=0.5), "length": Keep(threshold=1.0)}
    result, out = select(tmp_path, [9, 1, 2, 3, 4], keep, [""] * 5, length=[5, 0, 0, 0, 0])
    rules = {line["line"]: line["rule"] for line in map(json.loads, (out / "dropped.jsonl").read_text().splitlines())}
    assert rules == {
        0: "length threshold 1",
        3: "perplexity keep_fraction_of_rest 0.5",
        4: "perplexity keep_fraction_of_rest 0.5",
    }
    assert [(rule["passed"], rule["dropped"], rule["thresholds"]) for rule in result.facts["rules"]] == [
        (2, 2, [2]),
        (4, 1, [1]),
    ]


def test_selection_is_evaluated_only_if_all_corruption_is_known(tmp_path: Path) -> None:
    corruption: list[str | None] = ["", "", "cut", "cut"]
    result, _ = select(tmp_path / "known", [1, 2, 3, 0.5], {"perplexity": Keep(threshold=1.5)}, corruption)
    quality = result.facts["injected_corruption"]
    assert (quality["total"], quality["dropped"], quality["precision"], quality["auc"]) == (2, 1, 0.5, 0.5)
    result, _ = select(
        tmp_path / "unknown", [1, 2, 3, 0.5], {"perplexity": Keep(threshold=1.5)}, [*corruption[:3], None]
    )
    assert result.facts["injected_corruption"] is None


def test_empty_selection_reports_what_each_rule_dropped(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no row of 3 passes") as caught:
        select(tmp_path, [1, 2, 3], {"perplexity": Keep(threshold=0.5)}, [""] * 3)
    assert "`perplexity threshold 0.5` dropped 3" in caught.value.cause
    assert caught.value.remedy
