"""Ray Tune searcher that decides which trial starts next.

Order: unfinished trials of a killed search, requested trials, `initial_points`, the suggestions of the algorithm, and
at the end replicates of the best trials with other seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from tunery.events.ranking import objective_value, rank_of
from tunery.search.journal import Journal, TrialStart
from tunery.search.population import INITIAL_ORIGINS, Population
from tunery.search.space import Point, trial_id
from tunery.search.steering import SearchControl
from tunery.search.suggest import Suggester
from tunery.spec import Search


class Queue(Searcher):  # type: ignore[misc]
    """Tune (2.60) polls `suggest`: None means no trial at the moment, FINISHED no further trial."""

    def __init__(
        self,
        search: Search,
        journal: Journal,
        suggester: Suggester,
        control: SearchControl,
        max_concurrent: int,
        with_seed: Callable[[Point, int], Point],
        on_untracked_end: Callable[[TrialStart], None] = lambda start: None,
        population: Population | None = None,
        invalid_reason: Callable[[Point], str] = lambda overrides: "",
    ) -> None:
        """`with_seed` returns a point with the seed of a replicate. `on_untracked_end` is called for trials that end
        without Tune. `population` has replayed the journal. `invalid_reason` returns why values give no valid trial,
        "" if they do."""
        super().__init__(metric=search.metric, mode=search.mode)
        self._search, self._journal, self._suggester, self._control = search, journal, suggester, control
        self._max_concurrent, self._with_seed, self._on_untracked_end = max_concurrent, with_seed, on_untracked_end
        self._population, self._invalid_reason = population, invalid_reason
        self._pending = journal.open_trials
        self._running: dict[str, str] = {}
        self._exhausted = False
        self._observed: set[str] = set()
        """Trials whose outcome the suggester knows."""

    def suggest(self, trial_id: str) -> Any:
        """Return the config of the next trial: {"trial", "overrides", "origin", "of", "since"}. `trial_id` is Tune's
        id."""
        self._enqueue_children()
        for request in self._control.new_trials():
            self._apply_request(request)
        if len(self._running) >= self._max_concurrent:
            return None
        start = self._next()
        if start is None:
            is_over = not self._running and not self._enqueue_children() and self._is_over()
            return Searcher.FINISHED if is_over else None
        self._running[trial_id] = start.trial
        return {name: getattr(start, name) for name in ("trial", "overrides", "origin", "of", "since")}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The outcome is read from the journal: Tune calls searchers before the callback that writes it."""
        self._running.pop(trial_id, None)

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """True: this searcher limits concurrency itself. Tune gets the number only so that it starts as many trials at
        once instead of one by one."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: a search resumes from its journal."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search resumes from its journal")

    def _next(self) -> TrialStart | None:
        while self._pending:
            start = self._pending.pop(0)
            if not self._control.stop_requested(start.trial):
                return start
            self._journal.mark_stopped(start.trial, self._search.metrics)
            if self._population is not None:
                self._population.mark_ended(start.trial)
            self._on_untracked_end(start)
        self._tell_suggester()
        while (number := self._num_sampled) < self._search.trials and not self._exhausted:
            initial = self._search.initial_points[number] if number < len(self._search.initial_points) else None
            point = self._suggester.ask(number, initial)
            if point is None:
                self._exhausted = True
            elif trial_id(point) not in self._journal.records:  # the same point may have been requested
                start = self._record_start(point, "initial" if initial else "sampled", number=number)
                if self._population is not None:
                    self._population.add_member(start.trial, start.overrides)
                return start
        if self._population is not None:
            self._population.mark_complete()
        if not self._running:
            self._enqueue_replicates()
            if self._pending:
                return self._pending.pop(0)
        return None

    def _tell_suggester(self) -> None:
        """Pass the outcomes of newly ended trials to the algorithm."""
        for record in self._journal.ended_records:
            start = record.start
            if start.trial not in self._observed:
                self._observed.add(start.trial)
                self._suggester.tell(start.number, start.overrides, record.reports, record.outcome or {})

    @property
    def _num_sampled(self) -> int:
        return sum(record.start.origin in INITIAL_ORIGINS for record in self._journal.records.values())

    def _is_over(self) -> bool:
        return not self._pending and (self._exhausted or self._num_sampled >= self._search.trials)

    def _enqueue_replicates(self) -> None:
        """Enqueue the best trials so far with the seeds that they have not been trained with."""
        if self._search.num_seeds == 1:
            return
        ended = [
            {"trial": record.start.trial, "overrides": record.start.overrides, **(record.outcome or {})}
            for record in self._journal.ended_records
            if record.start.origin != "replicate"
        ]
        ended = [{**trial, "value": objective_value(self._search, trial["values"])} for trial in ended]
        best = sorted(ended, key=lambda trial: rank_of(self._search, trial))[: self._search.replicate_top_k]
        for trial in best:
            if not rank_of(self._search, trial).is_finished:
                continue
            for replicate in range(1, self._search.num_seeds):
                self._enqueue(self._with_seed(trial["overrides"], replicate), "replicate", trial["trial"])

    def _enqueue_children(self) -> bool:
        """Enqueue the copies that the population decided on; returns whether there were any."""
        if self._population is None:
            return False
        self._population.decide()
        children, self._population.pending_children = self._population.pending_children, []
        for child in children:
            self._enqueue(child.overrides, "pbt_child", child.source, child.source_step)
        return bool(children)

    def _apply_request(self, request: dict[str, Any]) -> None:
        overrides, origin, of = request["overrides"], request["origin"], request["of"]
        if not (error := self._invalid_reason(overrides)):
            self._enqueue(overrides, origin, of)
        elif trial_id(overrides) not in self._journal.records:  # the experiment was edited after the request
            start = self._record_start(overrides, origin, of=of)
            self._journal.end(start.trial, state="failed", values={}, seconds=0.0, error=error)
            self._on_untracked_end(start)

    def _enqueue(self, overrides: Point, origin: Any, of: str, since: int = 0) -> None:
        if trial_id(overrides) not in self._journal.records:
            self._pending.append(self._record_start(overrides, origin, of=of, since=since))

    def _record_start(
        self, overrides: Point, origin: Any, number: int | None = None, of: str = "", since: int = 0
    ) -> TrialStart:
        number = 1_000_000_000 + len(self._journal.records) if number is None else number
        start = TrialStart(trial_id(overrides), number, overrides, origin, of, since)
        self._journal.begin(start)
        return start
