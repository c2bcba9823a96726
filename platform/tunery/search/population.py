"""Population based training (Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846): at each evaluation but the last
the worst quarter of the trials makes room for changed copies of the best quarter. Pure.

A copy goes on from the other's checkpoint, with another learning rate from there on. What it is does not hang on that:
its values say what changed and when (`schedule_overrides` of its training), and from its beginning it would come to the
same. So a trial of a population is named, found in the store, run again and repeated with other seeds like any other.

Who makes room is worked out from what all members reported of the same evaluation, whenever that was: a search that is
run again, or goes on after a kill, decides as it did before.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tunery.search.journal import JournalRecord
from tunery.search.space import Point, at_random, curve_stage, rounded, trial_id
from tunery.spec import OVERRIDABLE, Dimension, Experiment, Search
from tunery.spec.overrides import final_values

QUARTER = 0.25
FACTORS = (0.8, 1.2)
"""Of a value that is changed, as in the paper."""
REDRAWN = 0.25
"""Chance of a value that is drawn anew instead."""
TRIES = 20
MEMBERS = ("first", "drawn")
"""Origins of the trials that a population begins with."""


@dataclass(frozen=True)
class Exploit:
    """A member makes room for a changed copy of another."""

    member: str
    of: str
    since: int
    """The step of the other's that the copy goes on from."""
    overrides: Point


@dataclass(frozen=True)
class _EvalPoint:
    value: float
    step: int


class Population:
    """`stage`: the training whose evaluations count, of which there are `num_evals`."""

    def __init__(self, search: Search, stage: str, evaluations: int, seed: int) -> None:
        self._search, self._stage, self._evaluations, self._seed = search, stage, evaluations, seed
        self._members: list[str] = []
        """By place: who has it now."""
        self._points: dict[str, Point] = {}
        self._heard: dict[str, dict[int, _EvalPoint]] = {}
        self._ended: set[str] = set()
        self._complete = False
        self._generation = 1
        self.replaced: set[str] = set()
        self.offspring: list[Exploit] = []
        """Copies that nobody has begun yet."""
        self.leaving: list[str] = []
        """Members that nobody has stopped yet."""

    def replay(self, records: Iterable[JournalRecord]) -> None:
        """What a journal tells of an earlier try, and what it decided by that."""
        for record in records:
            if record.begun.origin in MEMBERS:
                self.join(record.begun.trial, record.begun.overrides)
            for report in record.reports:
                self.hear(record.begun.trial, report)
            if record.ended is not None:
                self.end(record.begun.trial)
        self.decide()

    def join(self, trial: str, overrides: Point) -> None:
        """One of those that the population begins with."""
        self._members.append(trial)
        self._points[trial] = overrides

    def close(self) -> None:
        """There are no more to begin with."""
        self._complete = True

    def hear(self, trial: str, report: Mapping[str, Any]) -> None:
        """Of an evaluation: {"share", "steps", the metric}, as training/training_stats.py tells it. Without the metric:
        NaN."""
        if (generation := self._number(report)) < self._evaluations:
            found = _EvalPoint(float(report.get(self._search.metric, math.nan)), int(report["steps"]))
            self._heard.setdefault(trial, {})[generation] = found

    def end(self, trial: str) -> None:
        """Nothing more is heard of it, unless it is tried again."""
        self._ended.add(trial)

    def begin(self, trial: str) -> None:
        self._ended.discard(trial)

    def waits(self, trial: str) -> bool:
        """Whether a member has gone as far as is decided."""
        return trial in self._members and self._reached(trial) >= self._generation

    def is_far_ahead(self, trial: str) -> bool:
        """Whether a member has gone an evaluation further than that: by more others begin late."""
        return trial in self._members and self._reached(trial) > self._generation

    def decide(self) -> None:
        """Who makes room, where all members have gone so far."""
        while self._ready():
            found = self._decide()
            self.offspring += found
            self.leaving += [descent.member for descent in found]
            self._generation += 1

    def kept_in_vain(self) -> list[tuple[str, int]]:
        """Trial and step of checkpoints that no copy will begin with any more."""
        return [
            (trial, heard[generation].step)
            for trial, heard in self._heard.items()
            for generation in heard
            if generation < self._generation - 1
        ]

    def _number(self, report: Mapping[str, Any]) -> int:
        """Of an evaluation, from 1 (training/batches.py, `at_even_steps`)."""
        return math.floor(float(report["share"]) * self._evaluations + 1e-9)

    def _ready(self) -> bool:
        if not self._complete and len(self._members) < self._search.trials:
            return False
        here = [trial for trial in self._members if self._reached(trial) >= self._generation]
        missing = [trial for trial in self._members if trial not in here and trial not in self._ended]
        return bool(here) and not missing and self._generation < self._evaluations

    def _reached(self, trial: str) -> int:
        """Its last evaluation. Of so few steps that there is none for each evaluation, some are left out."""
        return max(self._heard.get(trial, {}), default=0)

    def _decide(self) -> list[Exploit]:
        generation = self._generation
        heard = {trial: told[generation] for trial, told in self._heard.items() if generation in told}
        ranked = sorted(
            (place for place, trial in enumerate(self._members) if trial in heard),
            key=lambda place: (self._merit(heard[self._members[place]]), place),
        )
        count = num_to_replace(len(ranked))
        best, worst = [self._members[place] for place in ranked[:count]], ranked[len(ranked) - count :]
        found = []
        for place in sorted(worst):
            chance = random.Random(f"{self._seed} {generation} {place}")
            of, member = chance.choice(best), self._members[place]
            if not self._merit(heard[of]) < self._merit(heard[member]):
                continue
            for _ in range(TRIES):  # of listed values two copies may get the same ones
                overrides = self._changed(self._points[of], generation, place, chance)
                if (copy := trial_id(overrides)) not in self._points:
                    break
            else:
                continue
            found.append(Exploit(member, of, heard[of].step, overrides))
            self.replaced.add(member)
            self._members[place], self._points[copy] = copy, overrides
        return found

    def _merit(self, heard: _EvalPoint) -> float:
        """Less is better."""
        if math.isnan(heard.value):
            return math.inf
        return heard.value if self._search.mode == "min" else -heard.value

    def _changed(self, point: Point, generation: int, place: int, chance: random.Random) -> Point:
        draw = at_random(self._seed, generation * 1_000_000 + place)
        now = final_values(point)
        changed = {}
        for path in changeable(self._search, self._stage):
            if path in now:
                anew = chance.random() < REDRAWN
                dimension = self._search.space[path]
                changed[path.split(".")[1]] = draw(path, dimension) if anew else _shifted(now[path], dimension, chance)
        path = f"{self._stage}.schedule_overrides"
        change = {"after": generation / self._evaluations, **changed}
        return {**point, path: [*point.get(path, ()), change]}


def num_to_replace(count: int) -> int:
    """Of so many, how many make room at an evaluation."""
    return min(math.ceil(count * QUARTER), count // 2)


def most_descendants(experiment: Experiment) -> int:
    """How many copies a search can come to."""
    search, stage = experiment.search, curve_stage(experiment)
    assert search is not None, "asked for a search"
    training: Any = experiment.stages[stage or ""]
    return int(training.evaluations - 1) * num_to_replace(search.trials)


def changeable(search: Search, stage: str) -> list[str]:
    """The dimensions whose values a training can change in its course."""
    return [path for field in OVERRIDABLE if (path := f"{stage}.{field}") in search.space]


def _shifted(value: Any, dimension: Dimension, chance: random.Random) -> Any:
    """A little more or less; of listed values the next one."""
    up = chance.random() < 0.5
    if dimension.listed is None:
        return rounded(value * FACTORS[up], dimension)
    place = dimension.listed.index(value) + (1 if up else -1)
    return dimension.listed[min(max(place, 0), len(dimension.listed) - 1)]
