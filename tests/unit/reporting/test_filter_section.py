"""The section of the report on filters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tunery.events.event_reducer import RunState, replay
from tunery.reporting.filter_section import filters, quarantines
from tunery.reporting.heatmap import heatmap_chart
from tunery.reporting.report import report_html
from tunery.reporting.score_section import auc_tables, heatmap_figures, rule_thresholds
from tunery.reporting.wandb_values import flatten
from tunery.scoring.score_stats import PAIR_BINS, describe_scores
from tunery.spec import Gopher, Language, Length
from tunery.store.rows import write_rows

HOSTILE = '<script>alert("x")</script> & more'
ROW = {"text": HOSTILE, "score": 5.0, "injected_corruption": "cut"}
RANGE = {"score": "length", "rule": "length from 3 to 40", "thresholds": [3.0, 40.0], "passed": 7, "dropped": 3}
PAIR = {"x": "length", "y": "gopher", "x_edges": [1, 10, 50], "y_edges": [0, 1, 2], "counts": [[3, 0], [1, 900]]}
SCORES: dict[str, Any] = {
    "length": {
        "auc": 0.6,
        "auc_by_kind": {"cut": 0.9, "swapped": 0.5},
        "histogram": {"edges": [1, 10, 50], "counts": [4, 900], "corrupted": [1, 0]},
    },
    "gopher": {"auc": 0.7, "auc_by_kind": {"cut": 0.4}},
}
QUARANTINE = {
    "reasons": [{"reason": HOSTILE, "rows": 4}],
    "first": [{"source": "a.csv", "line": 3, "reason": HOSTILE, "text": "q,"}],
}
SAMPLES = {
    "score": "length",
    "deciles": [
        {"low": 1.0, "high": 9.0, "kept": 1, "dropped": 3, "kept_rows": [ROW], "dropped_rows": [ROW]},
        {"low": 10.0, "high": 10.0, "kept": 6, "dropped": 0, "kept_rows": [ROW], "dropped_rows": []},
    ],
}


def state(**select: Any) -> RunState:
    stages = [("rows", "dataset", []), ("scored", "score", ["rows"]), ("clean", "select", ["scored"])]
    facts: dict[str, dict[str, Any]] = {
        "rows": {"rows": 10, "quarantined": 4, "quarantine": QUARANTINE},
        "scored": {"rows_in": 10, "rows_out": 10, "scores": SCORES, "pairs": [PAIR]},
        "clean": {"rows_in": 10, "kept": 7, "dropped": 3, "rules": [RANGE], "samples": SAMPLES, **select},
    }
    result = [{"name": name, "kind": kind, "inputs": inputs} for name, kind, inputs in stages]
    events: list[dict[str, Any]] = [{"t": 1.0, "event": "run_started", "run": "x", "stages": result}]
    for name, kind, _ in stages:
        events.append({"t": 2.0, "event": "stage_finished", "stage": name, "kind": kind, "facts": facts[name]})
    return replay(events)


def test_auc_table_has_all_scores_by_corruption_kind() -> None:
    ((name, table),) = auc_tables(state())
    assert name == "scored"
    assert table.columns == ["score", "all kinds", "cut", "swapped"]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["length", "0.6", "0.9", "0.5"],
        ["gopher", "0.7", "0.4", ""],
    ]
    assert [[cell.best for cell in row] for row in table.rows][1][1]


def test_range_rule_has_two_threshold_lines() -> None:
    assert rule_thresholds(RANGE) == [3.0, 40.0]
    assert rule_thresholds({"thresholds": [105.0]}) == [105.0]
    assert rule_thresholds({"thresholds": []}) == []
    page = report_html(state())
    assert page.count('class="threshold"') == 4, "two in the histogram, two in the heat map"
    assert "clean: length from 3 to 40" in page


def test_heatmap_has_a_cell_for_every_count() -> None:
    (figure,) = heatmap_figures(state())
    assert figure.svg.count('class="heat') == 3
    assert "900 rows" in figure.svg
    assert "h8" in figure.svg
    assert heatmap_chart([1, 2], [], [], ("a", "b")) == ""


def test_decile_rows_show_outcomes_and_mixed_deciles_are_expanded() -> None:
    (actual,) = filters(state())
    assert [(part.title, part.percent_kept, part.mixed) for part in actual.deciles] == [
        ("1 – 9", 25, True),
        ("10", 100, False),
    ]
    assert [row.kept for row in actual.deciles[0].rows] == [True, False]
    page = report_html(state())
    assert page.count("corruption: cut") == 3
    assert len(re.findall(r"<details open><summary><span class=\"meter\">", page)) == 1


def test_row_texts_are_escaped_and_appear_only_in_their_section() -> None:
    page = report_html(state())
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert") == 5, "three rows, a reason, and the first row's reason"


def test_diverse_selection_is_shown_next_to_a_random_one() -> None:
    result = {
        "rule": "score_first 7 by vec",
        "kept": 7,
        "candidates": 1200,
        "coverage_rows": 1000,
        "coverage": {"radius": 0.3, "similarity": 0.98},
        "random": {"radius": 0.5, "similarity": 0.97},
        "chance_similarity": {"median": 0.82, "high": 0.94},
        "too_similar": 3,
        "max_similarity": 0.9,
    }
    (actual,) = filters(state(diverse=result))
    assert len(actual.tables) == 2
    (without_rules,) = filters(state(diverse=result, rules=[]))
    (table,) = without_rules.tables
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["score_first 7 by vec", "0.3", "0.98"],
        ["random subset", "0.5", "0.97"],
    ]
    assert "kept 7 of 1,200 rows; coverage computed on 1,000 of them" in table.notes
    assert "3 rows were too similar to a kept row (above 0.9)" in table.notes
    assert filters(state(rules=[])) == []
    assert "score_first 7 by vec" in report_html(state(diverse=result))


def test_quarantine_is_shown_with_reasons() -> None:
    ((name, tables),) = quarantines(state())
    assert name == "rows"
    assert [cell.text for cell in tables[1].rows[0]] == ["a.csv:3", HOSTILE, "q,"]


def test_sections_without_facts_are_omitted() -> None:
    page = report_html(state(samples=None))
    assert "<h2>Filters" not in page


def test_texts_of_rows_are_not_uploaded() -> None:
    flat = flatten({"kept": 7, "samples": SAMPLES, "quarantine": QUARANTINE, "pairs": [PAIR]})
    assert flat == {"kept": 7}


def test_rows_are_counted_by_two_scores_at_once(tmp_path: Path) -> None:
    count = 3000  # three shards
    random = np.random.default_rng(17)
    columns = {"length": np.exp(random.normal(3, 1, count)), "gopher": random.integers(0, 5, count).astype(float)}
    columns["language"] = np.full(count, 0.5)  # does not vary
    columns["length"][7] = np.nan
    write_rows(({"text": str(n), "id": f"{n:016x}"} for n in range(count)), tmp_path)
    (tmp_path / "scores").mkdir()
    start = 0
    for path in sorted((tmp_path / "rows").iterdir()):
        size = pq.read_metadata(path).num_rows
        pq.write_table(
            pa.table({name: values[start : start + size] for name, values in columns.items()}),
            tmp_path / "scores" / path.name,
        )
        start += size
    by = [
        Length.model_validate({"length": "words"}),
        Gopher.model_validate({"gopher": {}}),
        Language.model_validate({"language": "en"}),
    ]
    (pair,) = describe_scores(tmp_path, by)["pairs"]
    assert (pair["x"], pair["y"]) == ("length", "gopher")
    counts = np.array(pair["counts"])
    assert counts.shape == (PAIR_BINS, PAIR_BINS)
    assert counts.sum() == count - 1
    ratios = np.array(pair["x_edges"][1:]) / pair["x_edges"][:-1]
    assert np.allclose(ratios, ratios[0]), "spaced by the logarithm"
    for value in range(5):
        row = int(np.clip(np.searchsorted(pair["y_edges"], value, side="right") - 1, 0, PAIR_BINS - 1))
        is_finite = np.isfinite(columns["length"])
        assert counts[row].sum() == (columns["gopher"][is_finite] == value).sum()
