"""From the experiment's search to a trial's values, and from those to the trial's experiment. Pure."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tunery.spec import (
    Dimension,
    Evaluate,
    Experiment,
    Ppo,
    Review,
    Score,
    Search,
    Select,
    Training,
    WinRate,
)
from tunery.spec.graph import with_upstream
from tunery.spec.overrides import with_overrides
from tunery.spec.references import model_name
from tunery.spec.trainings import data_refs

Point = dict[str, Any]
"""A trial's values by path: of the dimensions that are there."""
Draw = Callable[[str, Dimension], Any]
DIGITS = 6
"""Of a value drawn from a range: as many as anybody wants to read."""


def sample_point(space: Mapping[str, Dimension], draw: Draw) -> Point:
    """Values for the dimensions that are there, each drawn after those that it depends on."""
    drawn: Point = {}
    for path in in_order(space):
        if space[path].is_there(drawn):
            drawn[path] = draw(path, space[path])
    return {path: drawn[path] for path in space if path in drawn}


def in_order(space: Mapping[str, Dimension]) -> list[str]:
    """Each dimension after those of its conditions."""
    done: dict[str, None] = {}

    def visit(path: str) -> None:
        for other in space[path].when:
            visit(other)
        done[path] = None

    for path in space:
        visit(path)
    return list(done)


def at_random(seed: int, number: int) -> Draw:
    """The same for the same number of a trial, whatever was drawn before. Each dimension has chance of its own, so that
    another that is added to a space changes nothing here."""

    def draw(path: str, dimension: Dimension) -> Any:
        chance = random.Random(f"{seed} {number} {path}")
        if dimension.listed is not None:
            return chance.choice(dimension.listed)
        assert dimension.bounds is not None, "a dimension has exactly one kind"
        low, high = dimension.bounds
        if dimension.loguniform is not None:
            return rounded(math.exp(chance.uniform(math.log(low), math.log(high))), dimension)
        return rounded(chance.uniform(low, high), dimension)

    return draw


def with_fixed(given: Mapping[str, Any], draw: Draw) -> Draw:
    """What is given, and the rest drawn."""
    return lambda path, dimension: given[path] if path in given else draw(path, dimension)


def point_by_chance(space: Mapping[str, Dimension], seed: int, number: int, first: Mapping[str, Any]) -> Point:
    """The trial of this number: what is given, its turn of the grids, and the rest by chance."""
    return sample_point(space, with_fixed({**grid_point(space, number), **first}, at_random(seed, number)))


def rounded(value: float, dimension: Dimension) -> float:
    """To a few digits, within the range."""
    assert dimension.bounds is not None, "a range"
    low, high = dimension.bounds
    return min(high, max(low, float(f"{value:.{DIGITS}g}")))


def grid(space: Mapping[str, Dimension]) -> Iterator[Point]:
    """Every combination of listed values, those that conditions make alike once."""
    listed = {path: dimension.listed for path, dimension in space.items()}
    seen: set[str] = set()
    for combination in itertools.product(*(values or () for values in listed.values())):
        values = dict(zip(listed, combination, strict=True))
        found = sample_point(space, with_fixed(values, _nothing))
        if (name := trial_id(found)) not in seen:
            seen.add(name)
            yield found


def _nothing(path: str, dimension: Dimension) -> Any:
    raise AssertionError(f"a grid lists {path}")


def grid_point(space: Mapping[str, Dimension], number: int) -> Point:
    """Values of the `grid` dimensions of the trial with this number: combination after combination."""
    grids = {path: dimension.grid for path, dimension in space.items() if dimension.grid is not None}
    if not grids:
        return {}
    combinations = list(itertools.product(*grids.values()))
    return dict(zip(grids, combinations[number % len(combinations)], strict=True))


def trial_id(overrides: Mapping[str, Any]) -> str:
    """The same values, the same name: a resumed search goes on in the same W&B runs."""
    return "trial-" + hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:8]


def metric_stages(search: Search) -> list[str]:
    """The stages that measure, the first metric's first."""
    return list(dict.fromkeys(metric.split(".")[0] for metric in search.metrics))


def trial_experiment(experiment: Experiment, overrides: Mapping[str, Any]) -> Experiment:
    """The experiment with other values, cut down to what the search's metrics need.

    Of an evaluate stage those are the models and sets that are named (and the baseline, where it is about forgetting),
    of a win_rate stage the models, so that trials do not measure others again and again.
    """
    search = experiment.search
    assert search is not None, "only a search has trials"
    trial = with_overrides(experiment, overrides)
    stages = dict(trial.stages)
    for name in metric_stages(search):
        stage = trial.stages[name]
        named = [metric.split(".")[1:] for metric in search.metrics if metric.split(".")[0] == name]
        if isinstance(stage, Evaluate):
            baseline = stage.baseline if any(metric == "forgetting" for *_, metric in named) else None
            wanted = {model for model, *_ in named}
            models = tuple(item for item in stage.models if model_name(item) in wanted or item == baseline)
            data = {name: stage.data[name] for name in stage.data if name in {data for _, data, _ in named}}
            stages[name] = stage.model_copy(update={"models": models, "data": data, "baseline": baseline})
        if isinstance(stage, WinRate):
            wanted = {model for model, *_ in named}
            models = tuple(item for item in stage.models if model_name(item) in wanted)
            stages[name] = stage.model_copy(update={"models": models})
    return trial.model_copy(
        update={
            "stages": with_upstream(stages, metric_stages(search)),
            "search": None,
            "compute": trial.compute.model_copy(update={"workers": trial.compute.workers_per_trial}),
        }
    )


def metric_of(facts: Mapping[str, Any], metric: str) -> float:
    """The metric's value in the facts of its stage's artifact."""
    _, *rest = metric.split(".")
    if len(rest) == 1:
        return float(facts[rest[0]])
    model, data, name = rest
    return next(float(result[name]) for result in facts["results"] if (result["model"], result["set"]) == (model, data))


def curve_stage(experiment: Experiment) -> str | None:
    """The training whose evaluations a trial reports while it runs: the one that the first metric names."""
    assert experiment.search is not None, "only a search has a metric"
    name = experiment.search.metric.split(".")[0]
    return name if isinstance(experiment.stages[name], Training) else None


def longest(experiment: Experiment, rows: int, tokens_per_row: float) -> float:
    """About how far the longest trial goes, in what rungs are measured in: all `rows` that the searched training could
    see, for the most epochs of the space, in the smallest batches where steps are counted."""
    search, name = experiment.search, curve_stage(experiment)
    stage = experiment.stages.get(name or "")
    if search is None or not isinstance(stage, Training):
        return 0.0

    def values(field: str, auto: float = 1.0) -> list[float]:
        dimension = search.space.get(f"{name}.{field}")
        given = dimension.values if dimension else (getattr(stage, field, auto),)
        return [auto if value == "auto" else float(value) for value in given]

    seen = rows * max(values("epochs", 4.0))
    if search.progress_unit == "steps":
        answers = max(values("group_size")) * max(values("iterations"))
        return max(1.0, seen * answers / min(values("global_batch_size", 8.0)))
    longest_row = max(values("max_length", 512.0))
    # ppo tells the tokens that its answers may have (training/ppo/ppo_worker.py).
    return max(1.0, seen * (longest_row if isinstance(stage, Ppo) else min(tokens_per_row, longest_row)))


def before_selection(experiment: Experiment, stage: str) -> list[str]:
    """The stages whose rows a trial's training could see, all of them: those behind it that the search doesn't change,
    and what searched ones choose from."""
    assert experiment.search is not None, "asked for a search"
    searched, stages = {path.split(".")[0] for path in experiment.search.space}, experiment.stages
    training = stages[stage]
    assert isinstance(training, Training), "only a training learns"
    found = []
    for data in data_refs(training.data).values():
        while isinstance(earlier := stages[data], Review | Score) or (
            isinstance(earlier, Select) and searched & with_upstream(stages, [data]).keys()
        ):
            data = earlier.data
        found.append(data)
    return found


def with_seed(experiment: Experiment, overrides: Mapping[str, Any], replicate: int) -> Point:
    """The same trial with another seed in each training that depends on what is searched. 0 changes nothing."""
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
