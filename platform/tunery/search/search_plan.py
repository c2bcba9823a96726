"""Plan of a search, computed without Ray: its trials, the stages they share, packing and device time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.events.formatting import duration
from tunery.pipeline.cache_keys import fingerprints
from tunery.search.pack_eligibility import pack_size, search_unpackable_reason
from tunery.search.space import curve_stage, metric_stages, random_point, trial_experiment, trial_id
from tunery.search.suggest import GridSearch
from tunery.spec import Experiment, Search, Training
from tunery.spec.graph import with_upstream
from tunery.store import Store

MAX_PLANNED_TRIALS = 200
"""Number of trials that a plan examines; a plan of a larger search says so."""


@dataclass(frozen=True)
class SearchPlan:
    trials: int
    num_examined: int
    """Number of trials that the fields below describe. The points of tpe and nsga2 depend on results, so random points
    are used instead."""
    max_concurrent: int
    concurrency_reason: str
    shared: list[str]
    """Stages that all trials have in common."""
    per_trial: dict[str, int]
    """Stages that differ between trials: number of distinct artifacts by stage."""
    cached: dict[str, int]
    """Number of these artifacts in the store, by stage."""
    duplicates: list[list[str]]
    """Groups of trials with the same result."""
    packed: int
    """Number of packed trials."""
    pack_size: int
    """Maximum number of trials in a pack."""
    unpacked: dict[str, int]
    """Number of trials that cannot be packed, by reason."""
    hours: float | None
    """GPU hours (CPU hours without a GPU) if no trial is stopped early or packed; None if the store has no timing of
    this training."""
    cannot_learn: str
    """Why the algorithm cannot learn from results; "" if it can, or is not one that learns."""

    def lines(self) -> list[str]:
        """Return the plan as text, one item per line."""
        shared = f"shared by all trials: {', '.join(self.shared)}" if self.shared else "the trials share no stage"
        per_trial = [
            f"{name} x {n}" + (f" ({self.cached[name]} done)" if self.cached.get(name) else "")
            for name, n in self.per_trial.items()
        ]
        lines = [
            f"up to {self.max_concurrent} concurrent trials: {self.concurrency_reason}",
            shared,
            f"per trial: {', '.join(per_trial)}",
        ]
        if self.packed:
            lines.append(f"packed: {self.packed} trials, up to {self.pack_size} on one copy of the base model")
        lines += [f"not packed: {count} trials ({reason})" for reason, count in self.unpacked.items()]
        lines += [self.cannot_learn] if self.cannot_learn else []
        lines += [f"equal trials: {', '.join(names)}" for names in self.duplicates]
        if self.num_examined < self.trials:
            lines.append(f"the lines above describe the first {self.num_examined} trials")
        device_time = "unknown, the store has no timing of this training" if self.hours is None else _hours(self.hours)
        return [*lines, f"device time: {device_time}"]


def plan_search(experiment: Experiment, store: Store, folder: Path, workers: int, reason: str) -> SearchPlan:
    """Plan the search of an experiment whose compute is resolved. `workers` is the number of workers for trials,
    `reason` says why."""
    search = experiment.search
    assert search is not None, "called for experiments with a search"
    points = _expected_points(search, experiment.seed)
    trials = {trial_id(overrides): trial_experiment(experiment, overrides) for overrides in points}
    cache_keys = {name: fingerprints(trial, folder) for name, trial in trials.items()}
    kinds = {stage: experiment.stages[stage].kind for keys in cache_keys.values() for stage in keys}
    distinct = {stage: {keys[stage] for keys in cache_keys.values() if stage in keys} for stage in kinds}
    searched = {path.split(".")[0] for path in search.space}
    shared = [stage for stage in distinct if not searched & with_upstream(experiment.stages, [stage]).keys()]
    per_trial = {stage: len(keys) for stage, keys in distinct.items() if stage not in shared}
    cached = {stage: sum(store.find(kinds[stage], key) is not None for key in distinct[stage]) for stage in per_trial}
    by_result: dict[tuple[str, ...], list[str]] = {}
    for name, keys in cache_keys.items():
        by_result.setdefault(tuple(keys[stage] for stage in metric_stages(search)), []).append(name)
    reasons = Counter(search_unpackable_reason(trial, searched) for trial in trials.values())
    packed = reasons.pop("", 0)
    size = pack_size(experiment) if packed else 1
    total = min(search.trials, len(points)) if search.algorithm == "grid" else search.trials
    return SearchPlan(
        trials=total,
        num_examined=len(points),
        max_concurrent=min(total, workers * size),
        concurrency_reason=reason + (f", {size} per pack" if size > 1 else ""),
        shared=shared,
        per_trial=per_trial,
        cached=cached,
        duplicates=[names for names in by_result.values() if len(names) > 1],
        packed=packed,
        pack_size=size,
        unpacked=dict(reasons),
        hours=_device_hours(experiment, [*trials.values()], store, folder, total),
        cannot_learn=_cannot_learn(search),
    )


def _cannot_learn(search: Search) -> str:
    if search.algorithm not in ("tpe", "nsga2") or search.scheduler not in ("hyperband", "pbt"):
        return ""
    learns = ", except from `warm_start`" if search.warm_start else ""
    return (
        f"{search.algorithm} cannot learn from results{learns}: "
        f"{search.scheduler} starts all trials before the first one ends"
    )


def _expected_points(search: Search, seed: int) -> list[dict[str, Any]]:
    """Return the points that the search would sample, as far as they are known before any trial has ended."""
    if search.algorithm == "grid":
        grid = GridSearch(search)
        points = [grid.ask(number, None) for number in range(min(search.trials, MAX_PLANNED_TRIALS))]
        return [point for point in points if point is not None]
    fixed = [*search.initial_points, *[None] * search.trials][: min(search.trials, MAX_PLANNED_TRIALS)]
    return [random_point(search.space, seed, number, values or {}) for number, values in enumerate(fixed)]


def _device_hours(
    experiment: Experiment, trials: Sequence[Experiment], store: Store, folder: Path, total: int
) -> float | None:
    """Estimate from the seconds per epoch of the experiment's own training, if it is in the store."""
    name = curve_stage(experiment) or next(
        (name for name, stage in reversed(experiment.stages.items()) if isinstance(stage, Training)), None
    )
    if name is None:
        return None
    artifact = store.find(experiment.stages[name].kind, fingerprints(experiment, folder)[name])
    own = experiment.stages[name]
    if artifact is None or not isinstance(own, Training):
        return None
    facts = artifact.facts
    seconds_per_epoch = facts["train_seconds"] / float(facts["epochs"])
    seconds = []
    for trial in trials:
        stage = trial.stages.get(name)
        if isinstance(stage, Training):
            seconds.append(seconds_per_epoch * (4.0 if stage.epochs == "auto" else float(stage.epochs)))
    return total * sum(seconds) / len(seconds) / 3600 if seconds else None


def _hours(hours: float) -> str:
    return f"about {hours:.1f} hours" if hours >= 1 else f"about {duration(hours * 3600)}"
