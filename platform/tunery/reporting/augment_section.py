"""Augmented rows in the report: how many variants by template, answer and number of examples, and a few of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunery.events.formatting import as_number, count, plain
from tunery.events.run_state import RunState
from tunery.events.stage_summary import listed
from tunery.reporting.tables import Table, table

Facts = Mapping[str, Any]
ANSWERS = {
    "direct": "the final answer, asked without the cue",
    "reasoned": "with reasoning, asked with the cue",
    "whole": "as it was",
}


def augmented(state: RunState) -> list[tuple[str, list[Table], Table]]:
    """For each augment stage that has ended: its name, what it made, and rows before and after."""
    found = []
    for stage in state.stages.values():
        samples = stage.facts.get("samples")
        if stage.kind == "augment" and isinstance(samples, Mapping):
            rows = [[plain(row.get("before")), plain(row.get("after"))] for row in listed(samples.get("rows"))]
            found.append((stage.name, _made(stage.facts), table(["a row", "its first variant"], rows)))
    return found


def _made(facts: Facts) -> list[Table]:
    templates = [[row.get("template"), row.get("variants")] for row in listed(facts.get("templates"))]
    shots = [[f"{shots} before the question", number] for shots, number in _counts(facts, "shots").items()]
    answers = [[ANSWERS.get(form, form), number] for form, number in _counts(facts, "answers").items()]
    fewer = [f"{count(number)} have fewer: {reason}" for reason, number in _counts(facts, "fewer_examples").items()]
    notes = [
        f"{count(number)} rows came out as they were: {why}" for why, number in _counts(facts, "unchanged").items()
    ]
    held, repeated = as_number(facts.get("heldout")), as_number(facts.get("repeated"))
    notes += [f"{count(held)} rows are held out, and in dropped.jsonl"] if held else []
    notes += (
        [f"{count(repeated)} variants said the same as another of their row, and were left out"] if repeated else []
    )
    return [
        table(["template", "variants"], templates, notes=notes),
        table(["examples", "variants"], shots, notes=fewer),
        table(["answer", "variants"], answers),
    ]


def _counts(facts: Facts, key: str) -> dict[str, float]:
    told = facts.get(key)
    numbers = {str(name): as_number(value) for name, value in told.items()} if isinstance(told, Mapping) else {}
    return {name: number for name, number in numbers.items() if number is not None}
