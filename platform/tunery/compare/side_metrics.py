"""Metrics of each side, under the names that a search uses for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tunery.compare.sides import RunSelection
from tunery.events.formatting import as_number
from tunery.search.trials import last_value
from tunery.spec import STAGE_KINDS


@dataclass(frozen=True)
class MetricValue:
    value: float
    ci_half_width: float | None = None
    """Half-width of the 95% interval of a mean over seeds; None for a single value."""


@dataclass(frozen=True)
class Metric:
    name: str
    left: MetricValue | None
    right: MetricValue | None

    @property
    def difference(self) -> float | None:
        return None if self.left is None or self.right is None else self.right.value - self.left.value

    def as_json(self) -> dict[str, Any]:
        sides = {"left": self.left, "right": self.right}
        values = {name: None if side is None else side.value for name, side in sides.items()}
        halves = {
            f"{name}_ci_half_width": side.ci_half_width
            for name, side in sides.items()
            if side and side.ci_half_width is not None
        }
        return {"name": self.name, **values, **halves, "difference": self.difference}


def compare_metrics(left: RunSelection, right: RunSelection) -> list[Metric]:
    """Metrics that at least one side has, in the order of the left side's file."""
    one, other = dict(metrics_of(left)), dict(metrics_of(right))
    return [Metric(name, one.get(name), other.get(name)) for name in {**one, **other}]


def metrics_of(side: RunSelection) -> Iterator[tuple[str, MetricValue]]:
    metrics = {name: MetricValue(value) for name, value in _stage_metrics(side)}
    search = side.experiment.search
    if side.trial is not None and search is not None:
        name = search.value_name
        if (value := last_value(side.trial, name)) is not None:  # no stage of an unfinished trial has logged it
            metrics.setdefault(name, MetricValue(value))
        for standing in _standings(side):
            if standing["trial"] == side.trial.name:
                ci_half_width = as_number(standing["ci_half_width"])
                metrics[f"{name}, mean of {len(standing['values'])} seeds"] = MetricValue(
                    standing["mean"], ci_half_width
                )
    yield from metrics.items()


def _stage_metrics(side: RunSelection) -> Iterator[tuple[str, float]]:
    for name, stage in side.experiment.stages.items():
        facts, metrics = side.facts(name), STAGE_KINDS[stage.kind].metrics
        if stage.output_type == "metrics":
            values = {
                f"{name}.{result['model']}.{result['set']}.{metric}": result.get(metric)
                for result in facts.get("results", ())
                for metric in metrics
            }
        else:
            values = {f"{name}.{metric}": facts.get(metric) for metric in metrics}
        for metric, value in values.items():
            if (number := as_number(value)) is not None:
                yield metric, number


def _standings(side: RunSelection) -> list[dict[str, Any]]:
    finished = [event for event in side.record.events if event["event"] == "search_finished"]
    return list(finished[-1].get("standings") or ()) if finished else []
