"""Which trial is next, as Tune asks for it: what a killed search had begun, what was wished for, the first points, and
then what the algorithm suggests; at the end the best ones again with other seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from tunery.search.journal import Journal, TrialStart
from tunery.search.population import Population
from tunery.search.ranking import rank, value_of
from tunery.search.space import Point, trial_id
from tunery.search.steering import SearchControl
from tunery.search.suggest import Suggester
from tunery.spec import Search


class Queue(Searcher):  # type: ignore[misc]
    """Tune (2.60) asks again and again: None means nothing now, FINISHED nothing any more."""

    def __init__(
        self,
        search: Search,
        journal: Journal,
        suggester: Suggester,
        steering: SearchControl,
        at_once: int,
        reseeded: Callable[[Point, int], Point],
        untold: Callable[[TrialStart], None] = lambda begun: None,
        population: Population | None = None,
        unfit: Callable[[Point], str] = lambda overrides: "",
    ) -> None:
        """`untold` tells of trials that ended without Tune. `population`: has heard the journal. `unfit`: why
        values give no trial; "" when they do."""
        super().__init__(metric=search.metric, mode=search.mode)
        self._search, self._journal, self._suggester, self._steering = search, journal, suggester, steering
        self._at_once, self._reseeded, self._untold = at_once, reseeded, untold
        self._population, self._unfit = population, unfit
        self._waiting = journal.open
        self._running: dict[str, str] = {}
        self._exhausted = False
        self._told: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """`trial_id` is Tune's. The config of a trial is {"trial", "overrides", "origin", "of", "since"}."""
        self._take_offspring()
        for wish in self._steering.new():
            self._grant(wish)
        if len(self._running) >= self._at_once:
            return None
        begun = self._next()
        if begun is None:
            is_over = not self._running and not self._take_offspring() and self._is_over()
            return Searcher.FINISHED if is_over else None
        self._running[trial_id] = begun.trial
        return {name: getattr(begun, name) for name in ("trial", "overrides", "origin", "of", "since")}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """What became of it stands in the journal, by now or soon: Tune tells callbacks after searchers."""
        self._running.pop(trial_id, None)

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """True: it minds that itself. Tune is told the number so that it starts as many at once (else one by one)."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is what a search goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on from its journal")

    def _next(self) -> TrialStart | None:
        while self._waiting:
            begun = self._waiting.pop(0)
            if not self._steering.stops(begun.trial):
                return begun
            self._journal.stop(begun.trial, self._search.metrics)
            if self._population is not None:
                self._population.end(begun.trial)
            self._untold(begun)
        self._tell()
        while (drawn := self._drawn) < self._search.trials and not self._exhausted:
            first = self._search.initial_points[drawn] if drawn < len(self._search.initial_points) else None
            found = self._suggester.ask(drawn, first)
            if found is None:
                self._exhausted = True
            elif trial_id(found) not in self._journal.records:  # somebody may have wished for the same
                begun = self._begin(found, "first" if first else "drawn", number=drawn)
                if self._population is not None:
                    self._population.join(begun.trial, begun.overrides)
                return begun
        if self._population is not None:
            self._population.close()
        if not self._running:
            self._replicate()
            if self._waiting:
                return self._waiting.pop(0)
        return None

    def _tell(self) -> None:
        """The algorithm, of what has ended since."""
        for record in self._journal.ended:
            if record.begun.trial not in self._told:
                self._told.add(record.begun.trial)
                self._suggester.tell(record.begun.number, record.begun.overrides, record.reports, record.ended or {})

    @property
    def _drawn(self) -> int:
        return sum(record.begun.origin in ("first", "drawn") for record in self._journal.records.values())

    def _is_over(self) -> bool:
        return not self._waiting and (self._exhausted or self._drawn >= self._search.trials)

    def _replicate(self) -> None:
        """The best trials so far, with the seeds that they have not had."""
        if self._search.num_seeds == 1:
            return
        ended = [
            {"trial": record.begun.trial, "overrides": record.begun.overrides, **(record.ended or {})}
            for record in self._journal.ended
            if record.begun.origin != "replicate"
        ]
        ended = [{**trial, "value": value_of(self._search, trial["values"])} for trial in ended]
        best = sorted(ended, key=lambda trial: rank(self._search, trial))[: self._search.replicate_top_k]
        for trial in best:
            if rank(self._search, trial)[0]:
                continue
            for replicate in range(1, self._search.num_seeds):
                self._wait(self._reseeded(trial["overrides"], replicate), "replicate", trial["trial"])

    def _take_offspring(self) -> bool:
        """Whether there is any."""
        if self._population is None:
            return False
        self._population.decide()
        found, self._population.offspring = self._population.offspring, []
        for child in found:
            self._wait(child.overrides, "descendant", child.of, child.since)
        return bool(found)

    def _grant(self, wish: dict[str, Any]) -> None:
        overrides, origin, of = wish["overrides"], wish["origin"], wish["of"]
        if not (error := self._unfit(overrides)):
            self._wait(overrides, origin, of)
        elif trial_id(overrides) not in self._journal.records:  # the file was edited since
            begun = self._begin(overrides, origin, of=of)
            self._journal.end(begun.trial, state="failed", values={}, seconds=0.0, error=error)
            self._untold(begun)

    def _wait(self, overrides: Point, origin: Any, of: str, since: int = 0) -> None:
        if trial_id(overrides) not in self._journal.records:
            self._waiting.append(self._begin(overrides, origin, of=of, since=since))

    def _begin(
        self, overrides: Point, origin: Any, number: int | None = None, of: str = "", since: int = 0
    ) -> TrialStart:
        number = 1_000_000_000 + len(self._journal.records) if number is None else number
        begun = TrialStart(trial_id(overrides), number, overrides, origin, of, since)
        self._journal.begin(begun)
        return begun
