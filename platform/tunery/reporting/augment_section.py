"""Augmented rows in the report: variants by template, response and number of few-shot examples, with samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunery.events.formatting import as_number, count, plain
from tunery.events.run_state import RunState
from tunery.events.stage_summary import mappings_in
from tunery.reporting.tables import Table, table

Facts = Mapping[str, Any]
RESPONSES = {
    "direct": "final answer, prompt without the cue",
    "reasoned": "with reasoning, prompt with the cue",
    "whole": "unchanged",
}


def augmented(state: RunState) -> list[tuple[str, list[Table], Table]]:
    """For each finished augment stage: its name, counts of its variants, and sample rows before and after."""
    result = []
    for stage in state.stages.values():
        samples = stage.facts.get("samples")
        if stage.kind == "augment" and isinstance(samples, Mapping):
            rows = [[plain(row.get("before")), plain(row.get("after"))] for row in mappings_in(samples.get("rows"))]
            result.append((stage.name, _variant_counts(stage.facts), table(["row", "first variant"], rows)))
    return result


def _variant_counts(facts: Facts) -> list[Table]:
    templates = [[row.get("template"), row.get("variants")] for row in mappings_in(facts.get("templates"))]
    shots = [[f"{shots} before the question", number] for shots, number in _counts(facts, "shots").items()]
    responses = [[RESPONSES.get(form, form), number] for form, number in _counts(facts, "response_forms").items()]
    fewer = [
        f"{count(number)} variants have fewer: {reason}" for reason, number in _counts(facts, "fewer_examples").items()
    ]
    notes = [f"{count(number)} rows are unchanged: {why}" for why, number in _counts(facts, "unchanged").items()]
    heldout, repeated = as_number(facts.get("heldout")), as_number(facts.get("repeated"))
    notes += [f"{count(heldout)} held-out rows were dropped (dropped.jsonl)"] if heldout else []
    notes += [f"{count(repeated)} variants were dropped as duplicates of another variant"] if repeated else []
    return [
        table(["template", "variants"], templates, notes=notes),
        table(["examples", "variants"], shots, notes=fewer),
        table(["response", "variants"], responses),
    ]


def _counts(facts: Facts, key: str) -> dict[str, float]:
    counts = facts.get(key)
    numbers = {str(name): as_number(value) for name, value in counts.items()} if isinstance(counts, Mapping) else {}
    return {name: number for name, number in numbers.items() if number is not None}
