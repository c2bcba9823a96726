"""Population based training (PBT; Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846).

At each evaluation except the last, the worst quarter of the trials is replaced by perturbed copies of the best quarter.
A copy starts from the other trial's checkpoint with new hyperparameters from that step on. Its values describe this
completely (`schedule_overrides` of the training say what changes and when), so training it from scratch gives the same
result: a trial of a population is named, cached, rerun and replicated with other seeds like any other trial.

A decision depends only on what all members reported for the same evaluation, not on when they reported it. A search
that is rerun or resumed makes the same decisions. No I/O, no Ray.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tunery.events.ranking import cost
from tunery.search.journal import JournalRecord
from tunery.search.space import Point, curve_stage, rounded, seeded_sampler, trial_id
from tunery.spec import OVERRIDABLE, Dimension, Experiment, Search
from tunery.spec.overrides import final_values

QUANTILE_FRACTION = 0.25
PERTURBATION_FACTORS = (0.8, 1.2)
"""As in the paper."""
RESAMPLE_PROBABILITY = 0.25
"""Probability that a value is sampled again instead of perturbed."""
MAX_RETRIES = 20
INITIAL_ORIGINS = ("initial", "sampled")
"""Origins of the initial members of a population."""


@dataclass(frozen=True)
class Exploit:
    """Replace a member by a perturbed copy of another one."""

    member: str
    source: str
    source_step: int
    """Step of the source's checkpoint that the copy starts from."""
    overrides: Point


@dataclass(frozen=True)
class _EvalPoint:
    value: float
    step: int


class Population:
    """Population of trials. `stage` is the training whose evaluations are compared; it has `num_evals` of them."""

    def __init__(self, search: Search, stage: str, num_evals: int, seed: int) -> None:
        self._search, self._stage, self._num_evals, self._seed = search, stage, num_evals, seed
        self._members: list[str] = []
        """Current trial of each slot."""
        self._points: dict[str, Point] = {}
        self._evals: dict[str, dict[int, _EvalPoint]] = {}
        """By trial and number of the evaluation."""
        self._ended: set[str] = set()
        self._complete = False
        self._generation = 1
        """The evaluation that is decided next."""
        self.replaced: set[str] = set()
        self.pending_children: list[Exploit] = []
        """Copies that have not been started."""
        self.to_stop: list[str] = []
        """Replaced members that have not been stopped."""

    def replay(self, records: Iterable[JournalRecord]) -> None:
        """Restore the state, and the decisions, of an earlier attempt from its journal."""
        for record in records:
            if record.start.origin in INITIAL_ORIGINS:
                self.add_member(record.start.trial, record.start.overrides)
            for report in record.reports:
                self.record(record.start.trial, report)
            if record.outcome is not None:
                self.mark_ended(record.start.trial)
        self.decide()

    def add_member(self, trial: str, overrides: Point) -> None:
        """Add an initial member."""
        self._members.append(trial)
        self._points[trial] = overrides

    def mark_complete(self) -> None:
        """No further initial member will be added."""
        self._complete = True

    def record(self, trial: str, report: Mapping[str, Any]) -> None:
        """Record the report of an evaluation: {"share", "steps", the metric} (training/training_stats.py). A missing
        metric counts as NaN."""
        if (generation := self._eval_number(report)) < self._num_evals:
            point = _EvalPoint(float(report.get(self._search.metric, math.nan)), int(report["steps"]))
            self._evals.setdefault(trial, {})[generation] = point

    def mark_ended(self, trial: str) -> None:
        """The trial reports nothing more, unless it is retried."""
        self._ended.add(trial)

    def mark_running(self, trial: str) -> None:
        self._ended.discard(trial)

    def awaits_decision(self, trial: str) -> bool:
        """Whether a member has reported the evaluation that is decided next."""
        return trial in self._members and self._last_eval(trial) >= self._generation

    def is_far_ahead(self, trial: str) -> bool:
        """Whether a member has reported a later evaluation than the one that is decided next."""
        return trial in self._members and self._last_eval(trial) > self._generation

    def decide(self) -> None:
        """Make all decisions for which every member has reported."""
        while self._ready():
            exploits = self._decide_generation()
            self.pending_children += exploits
            self.to_stop += [exploit.member for exploit in exploits]
            self._generation += 1

    def stale_checkpoints(self) -> list[tuple[str, int]]:
        """(trial, step) of checkpoints that no copy will start from any more."""
        return [
            (trial, evals[generation].step)
            for trial, evals in self._evals.items()
            for generation in evals
            if generation < self._generation - 1
        ]

    def _eval_number(self, report: Mapping[str, Any]) -> int:
        """Number of the evaluation, from 1 (training/batches.py, `evenly_spaced_steps`)."""
        return math.floor(float(report["share"]) * self._num_evals + 1e-9)

    def _ready(self) -> bool:
        if not self._complete and len(self._members) < self._search.trials:
            return False
        reported = [trial for trial in self._members if self._last_eval(trial) >= self._generation]
        missing = [trial for trial in self._members if trial not in reported and trial not in self._ended]
        return bool(reported) and not missing and self._generation < self._num_evals

    def _last_eval(self, trial: str) -> int:
        """Number of the last reported evaluation. A training with fewer steps than `num_evals` skips numbers."""
        return max(self._evals.get(trial, {}), default=0)

    def _decide_generation(self) -> list[Exploit]:
        generation = self._generation
        points = {trial: evals[generation] for trial, evals in self._evals.items() if generation in evals}
        ranked = sorted(
            (slot for slot, trial in enumerate(self._members) if trial in points),
            key=lambda slot: (self._cost(points[self._members[slot]]), slot),
        )
        count = num_to_replace(len(ranked))
        best, worst = [self._members[slot] for slot in ranked[:count]], ranked[len(ranked) - count :]
        exploits = []
        for slot in sorted(worst):
            rng = random.Random(f"{self._seed} {generation} {slot}")
            source, member = rng.choice(best), self._members[slot]
            if not self._cost(points[source]) < self._cost(points[member]):
                continue
            for _ in range(MAX_RETRIES):  # with enumerated values two copies may get the same point
                overrides = self._perturb(self._points[source], generation, slot, rng)
                if (copy := trial_id(overrides)) not in self._points:
                    break
            else:
                continue
            exploits.append(Exploit(member, source, points[source].step, overrides))
            self.replaced.add(member)
            self._members[slot], self._points[copy] = copy, overrides
        return exploits

    def _cost(self, point: _EvalPoint) -> float:
        """The metric with the sign that makes lower better; infinity for NaN."""
        if math.isnan(point.value):
            return math.inf
        return cost(self._search.mode, point.value)

    def _perturb(self, point: Point, generation: int, slot: int, rng: random.Random) -> Point:
        sample = seeded_sampler(self._seed, generation * 1_000_000 + slot)
        current = final_values(point)
        changed = {}
        for path in overridable_paths(self._search, self._stage):
            if path in current:
                resample = rng.random() < RESAMPLE_PROBABILITY
                dimension = self._search.space[path]
                value = sample(path, dimension) if resample else _perturb_value(current[path], dimension, rng)
                changed[path.split(".")[1]] = value
        path = f"{self._stage}.schedule_overrides"
        override = {"after": generation / self._num_evals, **changed}
        return {**point, path: [*point.get(path, ()), override]}


def num_to_replace(count: int) -> int:
    """Number of members that are replaced at an evaluation which `count` members reported."""
    return min(math.ceil(count * QUANTILE_FRACTION), count // 2)


def max_children(experiment: Experiment) -> int:
    """Maximum number of copies that a search can create."""
    search, stage = experiment.search, curve_stage(experiment)
    assert search is not None, "called for experiments with a search"
    training: Any = experiment.stages[stage or ""]
    return int(training.num_evals - 1) * num_to_replace(search.trials)


def overridable_paths(search: Search, stage: str) -> list[str]:
    """Dimensions whose values a training can change while it runs."""
    return [path for field in OVERRIDABLE if (path := f"{stage}.{field}") in search.space]


def _perturb_value(value: Any, dimension: Dimension, rng: random.Random) -> Any:
    """Multiply by a perturbation factor; for enumerated values take a neighbour."""
    up = rng.random() < 0.5
    if dimension.enumerated is None:
        return rounded(value * PERTURBATION_FACTORS[up], dimension)
    index = dimension.enumerated.index(value) + (1 if up else -1)
    return dimension.enumerated[min(max(index, 0), len(dimension.enumerated) - 1)]
