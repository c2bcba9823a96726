"""The tables that a run ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import LoadText

from tunery.comparison import diversity_table
from tunery.store import Artifact

TEXT = """\
name: x
seed: 1
stages:
  rows: {kind: dataset, source: a.jsonl}
  scored: {kind: score, data: rows, by: [{embedding: {pretrained: org/name}}, {length: words}]}
  long: {kind: select, data: scored, keep: {length: {top_k: 9}}}
  spread: {kind: select, data: scored, diverse: {by: embedding, method: k_center, rows: 9}}
"""


def made(**diverse: Any) -> dict[str, Artifact]:
    told = {"rows": {}, "scored": {}, "long": {}, "spread": {"diverse": diverse}}
    return {name: Artifact(Path(name), {"facts": facts}, {}) for name, facts in told.items()}


def test_a_diverse_choice_stands_beside_as_many_rows_drawn_at_random(load_text: LoadText) -> None:
    experiment, _ = load_text(TEXT)
    told = {
        "method": "k_center",
        "kept": 9,
        "wanted": 9,
        "candidates": 1200,
        "cover": {"radius": 0.3, "similarity": 0.98},
        "random": {"radius": 0.5, "similarity": 0.97},
    }
    table = diversity_table(experiment, made(**told))
    assert table is not None
    assert table["rows"] == [
        ["spread (k_center)", "9 of 1,200", 0.3, 0.98],
        ["as many at random", "9 of 1,200", 0.5, 0.97],
    ]
    assert len(table["notes"]) == 1
    score_first = {"method": "score_first", "similarity": 0.9, "by_chance": {"median": 0.82, "high": 0.94}}
    table = diversity_table(experiment, made(**{**told, "wanted": 20, **score_first}))
    assert table is not None
    assert table["notes"][0] == (
        "spread: 20 rows were asked for, all others are more similar to a kept one than 0.9 "
        "(two rows have 0.82 by chance)"
    )


def test_without_a_diverse_choice_there_is_no_table(load_text: LoadText) -> None:
    experiment, _ = load_text(TEXT.replace("  spread:", "  # spread:"))
    assert diversity_table(experiment, made()) is None
