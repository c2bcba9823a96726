"""Search space: sample the values of a trial, and build the experiment of a trial. No I/O, no Ray."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tunery.spec import TRAINERS, Dimension, Experiment, Review, Score, Search, Select, Training
from tunery.spec.graph import with_upstream
from tunery.spec.overrides import with_overrides
from tunery.spec.trainings import data_refs

Point = dict[str, Any]
"""Values of a trial by path, for the active dimensions."""
Sampler = Callable[[str, Dimension], Any]
DIGITS = 6
"""Significant digits of a value sampled from a range, for readability."""


def sample_point(space: Mapping[str, Dimension], sample: Sampler) -> Point:
    """Sample the active dimensions, each after those that it depends on."""
    point: Point = {}
    for path in topological_order(space):
        if space[path].is_active(point):
            point[path] = sample(path, space[path])
    return {path: point[path] for path in space if path in point}


def topological_order(space: Mapping[str, Dimension]) -> list[str]:
    """Return the paths, each after those of its conditions (`when`)."""
    done: dict[str, None] = {}

    def visit(path: str) -> None:
        for other in space[path].when:
            visit(other)
        done[path] = None

    for path in space:
        visit(path)
    return list(done)


def seeded_sampler(seed: int, number: int) -> Sampler:
    """Return a sampler that depends only on the seed and the number of the trial. Each dimension has its own random
    stream, so adding a dimension to the space does not change the values of the others."""

    def sample(path: str, dimension: Dimension) -> Any:
        rng = random.Random(f"{seed} {number} {path}")
        if dimension.enumerated is not None:
            return rng.choice(dimension.enumerated)
        assert dimension.bounds is not None, "a dimension has exactly one kind"
        low, high = dimension.bounds
        if dimension.loguniform is not None:
            return rounded(math.exp(rng.uniform(math.log(low), math.log(high))), dimension)
        return rounded(rng.uniform(low, high), dimension)

    return sample


def with_fixed(fixed: Mapping[str, Any], sample: Sampler) -> Sampler:
    """Return a sampler that takes the values in `fixed` and samples the others."""
    return lambda path, dimension: fixed[path] if path in fixed else sample(path, dimension)


def random_point(space: Mapping[str, Dimension], seed: int, number: int, fixed: Mapping[str, Any]) -> Point:
    """Return the point of the trial with this number: the values in `fixed`, the grid combination of this number, and
    random values for the other dimensions."""
    return sample_point(space, with_fixed({**grid_point(space, number), **fixed}, seeded_sampler(seed, number)))


def rounded(value: float, dimension: Dimension) -> float:
    """Round to `DIGITS` significant digits, within the range."""
    assert dimension.bounds is not None, "a range"
    low, high = dimension.bounds
    return min(high, max(low, float(f"{value:.{DIGITS}g}")))


def grid(space: Mapping[str, Dimension]) -> Iterator[Point]:
    """Yield every combination of enumerated values; combinations that conditions make equal, once."""
    enumerated = {path: dimension.enumerated for path, dimension in space.items()}
    seen: set[str] = set()
    for combination in itertools.product(*(values or () for values in enumerated.values())):
        values = dict(zip(enumerated, combination, strict=True))
        point = sample_point(space, with_fixed(values, _not_enumerated))
        if (name := trial_id(point)) not in seen:
            seen.add(name)
            yield point


def _not_enumerated(path: str, dimension: Dimension) -> Any:
    raise AssertionError(f"a grid enumerates {path}")


def grid_point(space: Mapping[str, Dimension], number: int) -> Point:
    """Return the values of the `grid` dimensions for the trial with this number, cycling through the combinations."""
    grids = {path: dimension.grid for path, dimension in space.items() if dimension.grid is not None}
    if not grids:
        return {}
    combinations = list(itertools.product(*grids.values()))
    return dict(zip(grids, combinations[number % len(combinations)], strict=True))


def trial_id(overrides: Mapping[str, Any]) -> str:
    """Return the name of a trial, a hash of its values: a resumed search continues the same W&B runs."""
    return "trial-" + hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:8]


def metric_stages(search: Search) -> list[str]:
    """Return the stages that log the metrics, that of the first metric first."""
    return list(dict.fromkeys(metric.split(".")[0] for metric in search.metrics))


def trial_experiment(experiment: Experiment, overrides: Mapping[str, Any]) -> Experiment:
    """Return the experiment with these values, reduced to the stages that the search's metrics depend on.

    An evaluate stage keeps only the models and sets that the metrics name (and the baseline, for `forgetting`), a
    win_rate stage only the models, so that trials do not evaluate the others again.
    """
    search = experiment.search
    assert search is not None, "only a search has trials"
    trial = with_overrides(experiment, overrides)
    stages = dict(trial.stages)
    for name in metric_stages(search):
        named = [metric.split(".")[1:] for metric in search.metrics if metric.split(".")[0] == name]
        stages[name] = trial.stages[name].reduced_to(named)
    return trial.model_copy(
        update={
            "stages": with_upstream(stages, metric_stages(search)),
            "search": None,
            "compute": trial.compute.model_copy(update={"workers": trial.compute.workers_per_trial}),
        }
    )


def metric_value(facts: Mapping[str, Any], metric: str) -> float:
    """Return the value of a metric from the facts of its stage's artifact."""
    _, *rest = metric.split(".")
    if len(rest) == 1:
        return float(facts[rest[0]])
    model, data, name = rest
    return next(float(result[name]) for result in facts["results"] if (result["model"], result["set"]) == (model, data))


def curve_stage(experiment: Experiment) -> str | None:
    """Return the training whose intermediate evaluations are reported to Tune: that of the first metric, if it is a
    training."""
    assert experiment.search is not None, "only a search has a metric"
    name = experiment.search.metric.split(".")[0]
    return name if isinstance(experiment.stages[name], Training) else None


def estimate_max_progress(experiment: Experiment, rows: int, tokens_per_row: float) -> float:
    """Estimate the length of the longest trial in `progress_unit`: all `rows` that its training could read, for the
    maximum number of epochs in the space and, in steps, the smallest global batch size."""
    search, name = experiment.search, curve_stage(experiment)
    stage = experiment.stages.get(name or "")
    if search is None or not isinstance(stage, Training):
        return 0.0

    def values(field: str, auto: float = 1.0) -> list[float]:
        dimension = search.space.get(f"{name}.{field}")
        options = dimension.values if dimension else (getattr(stage, field, auto),)
        return [auto if value == "auto" else float(value) for value in options]

    samples = rows * max(values("epochs", 4.0))
    if search.progress_unit == "steps":
        return max(1.0, samples * _max_steps_per_row(stage, name, search) / min(values("global_batch_size", 8.0)))
    max_length = max(values("max_length", 512.0))
    tokens = max_length if TRAINERS[stage.kind].counts_max_length else min(tokens_per_row, max_length)
    return max(1.0, samples * tokens)


def _max_steps_per_row(stage: Training[Any], name: str | None, search: Search) -> int:
    """Return the maximum of steps x global batch size / rows over the searched values of the stage's own fields."""

    def steps_per_row(stage: Training[Any]) -> int:
        return stage.sequences_per_row * stage.steps_per_batch

    for field in type(stage).model_fields:  # one after another: both factors depend on a field each
        if (dimension := search.space.get(f"{name}.{field}")) is not None:
            candidates = [stage.model_copy(update={field: value}) for value in dimension.values]
            stage = max(candidates, key=steps_per_row)
    return steps_per_row(stage)


def unfiltered_stages(experiment: Experiment, stage: str) -> list[str]:
    """Return the stages with all rows that a trial's training could read: its inputs, or, where the search changes
    how rows are selected, the rows before the selection."""
    assert experiment.search is not None, "called for experiments with a search"
    searched, stages = {path.split(".")[0] for path in experiment.search.space}, experiment.stages
    training = stages[stage]
    assert isinstance(training, Training), "the stage is a training"
    sources = []
    for data in data_refs(training.data).values():
        while isinstance(upstream := stages[data], Review | Score) or (
            isinstance(upstream, Select) and searched & with_upstream(stages, [data]).keys()
        ):
            data = upstream.data
        sources.append(data)
    return sources


def with_seed(experiment: Experiment, overrides: Mapping[str, Any], replicate: int) -> Point:
    """Return the same trial with another seed for each training that depends on searched values; unchanged for
    replicate 0."""
    if replicate == 0:
        return dict(overrides)
    trial = trial_experiment(experiment, overrides)
    searched = {path.split(".")[0] for path in overrides}
    seeds: Point = {}
    for name, stage in trial.stages.items():
        if isinstance(stage, Training) and searched & with_upstream(trial.stages, [name]).keys():
            own = trial.seed if stage.seed is None else stage.seed
            seeds[f"{name}.seed"] = own + 1000 * replicate
    return {**overrides, **seeds}
