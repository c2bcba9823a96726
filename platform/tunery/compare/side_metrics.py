"""What was measured of each side, in the names by which a search aims at it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tunery.compare.sides import RunSelection
from tunery.events.formatting import as_number
from tunery.search.trials import last_value
from tunery.spec import Evaluate, Training, WinRate

OF_EVALUATE = ("loss", "perplexity", "forgetting")
OF_WIN_RATE = ("win_rate", "reward")


@dataclass(frozen=True)
class Measured:
    value: float
    half: float | None = None
    """Half of its 95% interval, where it is a mean over seeds."""


@dataclass(frozen=True)
class Metric:
    name: str
    left: Measured | None
    right: Measured | None

    @property
    def difference(self) -> float | None:
        return None if self.left is None or self.right is None else self.right.value - self.left.value

    def as_json(self) -> dict[str, Any]:
        sides = {"left": self.left, "right": self.right}
        told = {name: None if found is None else found.value for name, found in sides.items()}
        halves = {f"{name}_half": found.half for name, found in sides.items() if found and found.half is not None}
        return {"name": self.name, **told, **halves, "difference": self.difference}


def compare_metrics(left: RunSelection, right: RunSelection) -> list[Metric]:
    """All that at least one of them has, in the order of the left one's file."""
    one, other = dict(measured(left)), dict(measured(right))
    return [Metric(name, one.get(name), other.get(name)) for name in {**one, **other}]


def measured(side: RunSelection) -> Iterator[tuple[str, Measured]]:
    found = {name: Measured(value) for name, value in _of_stages(side)}
    search = side.experiment.search
    if side.trial is not None and search is not None:
        name = search.value_name
        if (value := last_value(side.trial, name)) is not None:  # of an unfinished one no stage has told it
            found.setdefault(name, Measured(value))
        for standing in _standings(side):
            if standing["trial"] == side.trial.name:
                half = as_number(standing["half"])
                found[f"{name}, mean of {len(standing['values'])} seeds"] = Measured(standing["mean"], half)
    yield from found.items()


def _of_stages(side: RunSelection) -> Iterator[tuple[str, float]]:
    for name, stage in side.experiment.stages.items():
        facts = side.facts(name)
        if isinstance(stage, Training):
            told = {f"{name}.{metric}": facts.get(metric) for metric in stage.metrics}
        elif isinstance(stage, Evaluate | WinRate):
            kinds = OF_EVALUATE if isinstance(stage, Evaluate) else OF_WIN_RATE
            told = {
                f"{name}.{result['model']}.{result['set']}.{kind}": result.get(kind)
                for result in facts.get("results", ())
                for kind in kinds
            }
        else:
            continue
        for metric, value in told.items():
            if (number := as_number(value)) is not None:
                yield metric, number


def _standings(side: RunSelection) -> list[dict[str, Any]]:
    ended = [event for event in side.recorded.events if event["event"] == "search_finished"]
    return list(ended[-1].get("standings") or ()) if ended else []
