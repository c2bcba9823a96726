"""What a search would do, worked out without Ray: its trials, what they share, who trains in a pack, what it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.events.formatting import duration
from tunery.pipeline.cache_keys import fingerprints
from tunery.search.pack_eligibility import pack_size, search_unpackable_reason
from tunery.search.space import curve_stage, metric_stages, point_by_chance, trial_experiment, trial_id
from tunery.search.suggest import GridSearch
from tunery.spec import Experiment, Search, Training
from tunery.spec.graph import with_upstream
from tunery.store import Store

LOOKED_AT = 200
"""Trials that a plan works out; of more it says so."""


@dataclass(frozen=True)
class SearchPlan:
    trials: int
    looked_at: int
    """Of them, for all that follows. Those of tpe and nsga2 depend on results: drawn by chance in their place."""
    at_once: int
    why_at_once: str
    shared: list[str]
    """Stages that all trials have in common."""
    own: dict[str, int]
    """Stages that differ, and how many of each there are."""
    made: dict[str, int]
    """How many of those are in the store already."""
    same: list[list[str]]
    """Trials that come to the same, together."""
    packed: int
    pack: int
    """Members of a pack at most."""
    alone: dict[str, int]
    """Why trials train by themselves, and how many."""
    hours: float | None
    """Of a GPU (without one of a CPU), if no trial is stopped early or packed; None where nothing like it was ever
    timed in this store."""
    untaught: str
    """Why the algorithm learns nothing; "" where it does, or never would."""

    def lines(self) -> list[str]:
        shared = f"made once for all: {', '.join(self.shared)}" if self.shared else "the trials have nothing in common"
        own = [
            f"{name} x {n}" + (f" ({self.made[name]} done)" if self.made.get(name) else "")
            for name, n in self.own.items()
        ]
        lines = [f"{self.at_once} at once: {self.why_at_once}", shared, f"made for trials: {', '.join(own)}"]
        if self.packed:
            lines.append(f"packed, up to {self.pack} on one copy of the base: {self.packed} trials")
        lines += [f"alone: {count} trials ({why})" for why, count in self.alone.items()]
        lines += [self.untaught] if self.untaught else []
        lines += [f"the same: {', '.join(names)}" for names in self.same]
        if self.looked_at < self.trials:
            lines.append(f"all this of the first {self.looked_at} trials")
        took = "unknown, for no such training was timed here yet" if self.hours is None else _hours(self.hours)
        return [*lines, f"device time: {took}"]


def plan_search(experiment: Experiment, store: Store, folder: Path, workers: int, why: str) -> SearchPlan:
    """`experiment` with its compute resolved. `workers`: for trials, and why so many."""
    search = experiment.search
    assert search is not None, "asked for experiments with a search"
    drawn = _draws(search, experiment.seed)
    trials = {trial_id(overrides): trial_experiment(experiment, overrides) for overrides in drawn}
    prints = {
        name: {stage: item[0] for stage, item in fingerprints(trial, folder).items()} for name, trial in trials.items()
    }
    kinds = {stage: experiment.stages[stage].kind for told in prints.values() for stage in told}
    distinct = {stage: {told[stage] for told in prints.values() if stage in told} for stage in kinds}
    searched = {path.split(".")[0] for path in search.space}
    shared = [stage for stage in distinct if not searched & with_upstream(experiment.stages, [stage]).keys()]
    own = {stage: len(found) for stage, found in distinct.items() if stage not in shared}
    made = {stage: sum(store.find(kinds[stage], print_) is not None for print_ in distinct[stage]) for stage in own}
    results: dict[tuple[str, ...], list[str]] = {}
    for name, told in prints.items():
        results.setdefault(tuple(told[stage] for stage in metric_stages(search)), []).append(name)
    reasons = Counter(search_unpackable_reason(trial, searched) for trial in trials.values())
    packed = reasons.pop("", 0)
    size = pack_size(experiment) if packed else 1
    total = min(search.trials, len(drawn)) if search.algorithm == "grid" else search.trials
    return SearchPlan(
        trials=total,
        looked_at=len(drawn),
        at_once=min(total, workers * size),
        why_at_once=why + (f", {size} a pack" if size > 1 else ""),
        shared=shared,
        own=own,
        made=made,
        same=[names for names in results.values() if len(names) > 1],
        packed=packed,
        pack=size,
        alone=dict(reasons),
        hours=_device_hours(experiment, [*trials.values()], store, folder, total),
        untaught=_untaught(search),
    )


def _untaught(search: Search) -> str:
    if search.algorithm not in ("tpe", "nsga2") or search.scheduler not in ("hyperband", "pbt"):
        return ""
    learns = " beyond what `warm_start` tells" if search.warm_start else ""
    return f"{search.algorithm} learns nothing{learns}: {search.scheduler} begins all trials before one has ended"


def _draws(search: Search, seed: int) -> list[dict[str, Any]]:
    """The trials that the search would draw, as far as that is known before any of them has ended."""
    if search.algorithm == "grid":
        grid = GridSearch(search)
        asked = [grid.ask(number, None) for number in range(min(search.trials, LOOKED_AT))]
        return [found for found in asked if found is not None]
    firsts = [*search.initial_points, *[None] * search.trials][: min(search.trials, LOOKED_AT)]
    return [point_by_chance(search.space, seed, number, first or {}) for number, first in enumerate(firsts)]


def _device_hours(
    experiment: Experiment, trials: Sequence[Experiment], store: Store, folder: Path, total: int
) -> float | None:
    """By the seconds that the file's own training takes for a row: all trials' rows at that speed."""
    name = curve_stage(experiment) or next(
        (name for name, stage in reversed(experiment.stages.items()) if isinstance(stage, Training)), None
    )
    if name is None:
        return None
    known = fingerprints(experiment, folder)
    artifact = store.find(experiment.stages[name].kind, known[name][0])
    own = experiment.stages[name]
    if artifact is None or not isinstance(own, Training):
        return None
    facts = artifact.facts
    seconds = facts["train_seconds"] / float(facts["epochs"])
    found = []
    for trial in trials:
        stage = trial.stages.get(name)
        if isinstance(stage, Training):
            found.append(seconds * (4.0 if stage.epochs == "auto" else float(stage.epochs)))
    return total * sum(found) / len(found) / 3600 if found else None


def _hours(hours: float) -> str:
    """In words: hours where there are some."""
    return f"about {hours:.1f} hours" if hours >= 1 else f"about {duration(hours * 3600)}"
