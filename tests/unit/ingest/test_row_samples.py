"""Sampled rows in the facts of filters and quarantines: few, short, and independent of the order of rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from tunery.ingest.row_samples import (
    MAX_EXCERPT_CHARS,
    ROWS_PER_DECILE,
    DecileSamples,
    decile_edges,
    excerpt,
    quarantine_facts,
)
from tunery.store.rows import SCHEMA, row_id

COUNT = 400


def table_of(texts: list[str]) -> pa.Table:
    rows = [{"text": text, "injected_corruption": "cut" if "9" in text else ""} for text in texts]
    return pa.Table.from_pylist([{**row, "id": row_id(row)} for row in rows], SCHEMA)


def sample_facts(order: list[int], shard: int, values: np.ndarray) -> dict:
    edges = decile_edges(lambda: iter([values]), len(values))
    samples = DecileSamples("length", edges)
    for start in range(0, len(order), shard):
        shard_indices = order[start : start + shard]
        scores = values[shard_indices]
        samples.add(table_of([f"row {n}" for n in shard_indices]), scores, scores > 130)
    return samples.facts()


def test_each_decile_has_a_tenth_of_the_rows_and_samples_of_kept_and_dropped_ones() -> None:
    values = np.arange(COUNT, dtype=float)
    facts = sample_facts(list(range(COUNT)), 64, values)
    assert facts["score"] == "length"
    assert [decile["kept"] + decile["dropped"] for decile in facts["deciles"]] == [COUNT // 10] * 10
    assert [bool(decile["kept_rows"]) for decile in facts["deciles"]] == [False] * 3 + [True] * 7
    assert [bool(decile["dropped_rows"]) for decile in facts["deciles"]] == [True] * 4 + [False] * 6
    for decile in facts["deciles"]:
        for row in decile["kept_rows"] + decile["dropped_rows"]:
            assert decile["low"] <= row["score"] <= decile["high"]
            assert row["text"] == f"row {row['score']:g}"
            assert row["injected_corruption"] == ("cut" if "9" in row["text"] else "")
        assert max(len(decile["kept_rows"]), len(decile["dropped_rows"])) <= ROWS_PER_DECILE


@given(st.permutations(range(60)), st.integers(1, 60))
def test_sampled_rows_do_not_depend_on_order_or_shards(order: list[int], shard: int) -> None:
    values = np.array([n % 7 for n in range(60)], dtype=float)
    assert sample_facts(order, shard, values) == sample_facts(list(range(60)), 60, values)


def test_equal_scores_share_a_decile_and_nan_has_none() -> None:
    values = np.array([1.0] * 30 + [math.nan] * 10)
    facts = sample_facts(list(range(40)), 7, values)
    assert [(decile["low"], decile["high"], decile["dropped"]) for decile in facts["deciles"]] == [(1.0, 1.0, 30)]
    assert sample_facts(list(range(10)), 7, np.full(10, math.nan))["deciles"] == []


def test_deciles_of_many_values_are_estimated_from_a_sample() -> None:
    values = np.random.default_rng(17).permutation(1_000_000).astype(float)
    edges = decile_edges(lambda: iter(np.array_split(values, 77)), len(values))
    assert np.abs(edges / 1e6 - np.arange(1, 10) / 10).max() < 0.01


@given(st.text(max_size=2000), st.text(max_size=2000))
def test_excerpt_length_is_bounded(question: str, response: str) -> None:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    for row in ({"text": question}, {"messages": messages}, {"messages": messages[:1]}):
        assert len(excerpt(row)) <= MAX_EXCERPT_CHARS


def test_quarantine_facts_have_reasons_by_frequency_and_the_first_rows(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    lines = [
        {"source": "a.csv", "line": n, "reason": "empty" if n % 3 else f"number {n}", "excerpt": "x" * 5000}
        for n in range(300)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = quarantine_facts(file)
    assert facts["reasons"][0] == {"reason": "empty", "rows": 200}
    assert len(facts["reasons"]) == 11
    assert sum(reason["rows"] for reason in facts["reasons"]) == 300
    assert [row["line"] for row in facts["first"]] == [0, 1, 2, 3, 4]
    assert all(len(row["text"]) == MAX_EXCERPT_CHARS for row in facts["first"])
    file.write_text("")
    assert quarantine_facts(file) == {"reasons": [], "first": []}
