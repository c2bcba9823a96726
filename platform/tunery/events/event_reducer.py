"""Reduce the event log of a run to its current state, for the terminal view and the report.

`replay` reduces a complete log, `apply` adds one event. A log may contain several invocations of one command
(interrupted, then resumed). A new `run_started` resets every stage to pending but keeps the points of its curve,
because a resumed training continues from a checkpoint and repeats only the last steps. Points are stored by step; a
later event overwrites an earlier one. Events of different writers may arrive slightly out of order, so no handler
requires that another event has been applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from tunery.events.event_log import Event
from tunery.events.formatting import as_number, duration, strings
from tunery.events.run_state import (
    ConstraintState,
    Failure,
    ObjectiveState,
    Point,
    RunState,
    SearchState,
    StageState,
    TrialState,
)
from tunery.events.stage_summary import mappings_in

__all__ = ["Failure", "Point", "RunState", "SearchState", "StageState", "TrialState", "apply", "replay"]

RATE_WINDOW_SECONDS = 30.0
"""Window for the throughput: long enough to be stable, short enough to follow changes."""
RATE_EVENTS = 4
"""Minimum number of events in the window, for infrequent events."""
ETA_EVENTS = 2
ETA_SECONDS = 10.0
ETA_SHARE = 0.05
"""The remaining time is estimated after ETA_EVENTS events and ETA_SECONDS seconds, or ETA_SHARE of the work, since the
first progress. An earlier estimate is dominated by start-up and compilation: 13 hours for a training of 5 minutes."""


def replay(events: Iterable[Event]) -> RunState:
    """Return the state after all `events`."""
    state = RunState()
    for event in events:
        apply(state, event)
    return state


def apply(state: RunState, event: Event) -> None:
    """Update `state` with one event. Unknown kinds of event are ignored."""
    handler = _HANDLERS.get(str(event.get("event")))
    if handler is None:
        return
    state.last_event = max(state.last_event or 0.0, _time(event))
    handler(state, event)


def _run_started(state: RunState, event: Event) -> None:
    state.run, state.file = str(event.get("run", "")), str(event.get("file", ""))
    state.text, state.command = str(event.get("text", "")), _words(event.get("command", ""))
    versions = event.get("versions")
    state.versions = dict(versions) if isinstance(versions, dict) else {}
    state.status, state.message, state.started, state.seconds = "running", "", _time(event), None
    state.ray_start_seconds, state.comparisons, state.overhead = None, {}, {}
    state.connecting = ""
    state.invocations += 1
    before, state.stages = state.stages, {}
    for fields in mappings_in(event.get("stages")):
        name = str(fields.get("name", ""))
        stage = before.get(name) or StageState(name)
        stage.kind, stage.inputs = str(fields.get("kind", "")), strings(fields.get("inputs"))
        stage.reset()
        state.stages[name] = stage
    for trial in state.search.trials.values() if state.search else ():
        if trial.status == "running":  # interrupted; it resumes with the search
            trial.status, trial.started = "pending", None
            for stage in trial.stages.values():
                stage.reset()


def _ray_connecting(state: RunState, event: Event) -> None:
    limit = as_number(event.get("limit"))
    state.connecting = str(event.get("address", "")) + (f" (at most {duration(limit)})" if limit else "")


def _ray_started(state: RunState, event: Event) -> None:
    state.connecting = ""
    state.ray_start_seconds = as_number(event.get("seconds"))


def _stage_started(state: RunState, event: Event) -> None:
    stage = _stage(state, event)
    fingerprint = str(event.get("fingerprint", ""))
    stage.reset()
    if stage.fingerprint and fingerprint != stage.fingerprint:
        stage.points, stage.preview = {}, {}  # the experiment was edited: the points belong to another artifact
    stage.kind = str(event.get("kind", stage.kind))
    stage.fingerprint, stage.detail = fingerprint, str(event.get("detail", ""))
    stage.status, stage.started = "running", _time(event)


def _progress(state: RunState, event: Event) -> None:
    stage, now = _stage(state, event), _time(event)
    done, total = as_number(event.get("done")), as_number(event.get("total"))
    if done is None or stage.status in ("done", "reused", "failed"):
        return
    unit = str(event.get("unit", stage.unit))
    stage.detail = str(event.get("detail", ""))
    if stage.recent and (done < stage.recent[-1][1] or unit != stage.unit):
        stage.recent.clear()  # restarted from a checkpoint, with fewer workers, or with another kind of work
        stage.first_progress, stage.advances = None, 0
    advanced = bool(stage.recent) and done > stage.recent[-1][1]
    stage.done, stage.total = done, total or 0
    stage.unit = unit
    if stage.first_progress is None and advanced:
        stage.recent.clear()  # the time before was spent on loading, compilation or cached rows
        stage.first_progress = now, done
    elif advanced:
        stage.advances += 1
    stage.recent.append((now, done))
    while len(stage.recent) > RATE_EVENTS and stage.recent[0][0] < now - RATE_WINDOW_SECONDS:
        stage.recent.popleft()
    first_time, first_done = stage.recent[0]
    measured = stage.first_progress is not None and now > first_time
    stage.rate = (done - first_done) / (now - first_time) if measured else None
    stage.eta_seconds = (stage.total - done) / stage.rate if stage.rate and _can_estimate(stage, now) else None


def _can_estimate(stage: StageState, now: float) -> bool:
    if stage.first_progress is None or not stage.total or stage.advances < ETA_EVENTS:
        return False
    begin, before = stage.first_progress
    share = (stage.done - before) / max(1.0, stage.total - before)
    return now - begin >= ETA_SECONDS or share >= ETA_SHARE


def _metrics(state: RunState, event: Event) -> None:
    step, values = as_number(event.get("step")), event.get("values")
    if step is None or not isinstance(values, dict):
        return
    numbers = _numbers(values)
    if event.get("stage"):
        points = _stage(state, event).points
    elif event.get("trial"):
        points = _trial(state, event).points
    else:
        return
    points.setdefault(int(step), {}).update(numbers)


def _preview(state: RunState, event: Event) -> None:
    preview = {"records": mappings_in(event.get("records")), "template": str(event.get("template") or "")}
    _stage(state, event).preview = preview


def _stage_finished(state: RunState, event: Event) -> None:
    stage = _stage(state, event)
    stage.kind = str(event.get("kind", stage.kind))
    stage.fingerprint = str(event.get("fingerprint", stage.fingerprint))
    stage.status = "reused" if event.get("reused") else "done"
    stage.finished, stage.seconds = _time(event), as_number(event.get("seconds"))
    stage.artifact, stage.error = str(event.get("artifact", "")), None
    facts = event.get("facts")
    stage.facts = dict(facts) if isinstance(facts, dict) else {}
    stage.done = stage.total or stage.done


def _stage_failed(state: RunState, event: Event) -> None:
    stage = _stage(state, event)
    stage.kind = str(event.get("kind", stage.kind))
    stage.status, stage.finished = "failed", _time(event)
    message, cause, remedy, log = (str(event.get(key) or "") for key in ("message", "cause", "remedy", "log"))
    stage.error = Failure(stage.name, message, cause, remedy, log, stage.trial)


def _search_started(state: RunState, event: Event) -> None:
    space = event.get("space")
    dimensions = {str(path): str(text) for path, text in space.items()} if isinstance(space, dict) else {}
    before, search = (
        state.search,
        SearchState(metric=str(event.get("metric", "")), mode=str(event.get("mode", "min"))),
    )
    search.space, search.scheduler = dimensions, str(event.get("scheduler") or "")
    search.planned, search.max_concurrent = _whole(event.get("trials")), _whole(event.get("max_concurrent"))
    search.reason, search.started = str(event.get("reason") or ""), _time(event)
    search.metrics = strings(event.get("metrics")) or [search.metric] * bool(search.metric)
    search.further_objectives = [
        ObjectiveState(str(item.get("metric", "")), str(item.get("mode", "min")), as_number(item.get("weight")))
        for item in mappings_in(event.get("objectives"))
    ]
    search.constraints = [
        ConstraintState(str(item.get("metric", "")), as_number(item.get("min")), as_number(item.get("max")))
        for item in mappings_in(event.get("constraints"))
    ]
    same = before and (before.metric, before.mode, before.space) == (search.metric, search.mode, search.space)
    if before and (same or not before.metric):
        search.trials = before.trials  # a resumed search keeps its finished trials
    state.search = search


def _trial_started(state: RunState, event: Event) -> None:
    trial = _trial(state, event)
    overrides = event.get("overrides")
    if isinstance(overrides, dict):
        if trial.overrides and trial.overrides != overrides:
            trial.stages, trial.points = {}, {}
        trial.overrides = dict(overrides)
    _origin(trial, event)
    trial.status, trial.started, trial.seconds = "running", _time(event), None
    trial.value, trial.error = None, ""
    trial.values, trial.feasible, trial.steps, trial.tokens = {}, True, None, None


def _origin(trial: TrialState, event: Event) -> None:
    trial.origin = str(event.get("origin") or trial.origin)
    trial.of = str(event.get("of") or trial.of)


def _trial_finished(state: RunState, event: Event) -> None:
    trial = _trial(state, event)
    if isinstance(event.get("overrides"), dict):
        trial.overrides = dict(event["overrides"])
    status = event.get("state")
    trial.status = status if status in ("done", "stopped", "failed") else "done"
    _origin(trial, event)
    trial.value, trial.seconds = as_number(event.get("value")), as_number(event.get("seconds"))
    trial.steps, trial.tokens = as_number(event.get("steps")), as_number(event.get("tokens"))
    values = event.get("values")
    trial.values = _numbers(values) if isinstance(values, dict) else {}
    trial.feasible = event.get("feasible") is not False
    failures = [stage.error.message for stage in trial.stages.values() if stage.error]
    trial.error = str(event.get("error") or "") or "".join(failures[:1])
    for stage in trial.stages.values():
        if stage.status == "running":  # a scheduler stopped the trial in the middle of it
            stage.status, stage.finished = "done", _time(event)


def _search_finished(state: RunState, event: Event) -> None:
    state.search = state.search or SearchState()
    state.search.finished = True
    state.search.best_name = str(event.get("best") or "")
    state.search.seconds = as_number(event.get("seconds"))
    state.search.ended_by = str(event.get("ended_by") or "")
    state.search.ties, state.search.pareto_front = strings(event.get("ties")), strings(event.get("pareto_front"))
    state.search.ci_half_widths = {
        str(standing.get("trial")): half
        for standing in mappings_in(event.get("standings"))
        if (half := as_number(standing.get("ci_half_width"))) is not None
    }
    fingerprints = event.get("best_fingerprints")
    state.search.best_fingerprints = dict(fingerprints) if isinstance(fingerprints, dict) else {}


def _comparison(state: RunState, event: Event) -> None:
    rows = [list(row) for row in event.get("rows") or [] if isinstance(row, list | tuple)]
    state.comparisons[str(event.get("title") or "Result")] = {
        "columns": strings(event.get("columns")),
        "rows": rows,
        "notes": strings(event.get("notes")),
        "optional": strings(event.get("optional")),
    }


def _overhead(state: RunState, event: Event) -> None:
    state.overhead = {key: value for key, value in event.items() if key not in ("t", "event", "stage", "trial")}


def _run_finished(state: RunState, event: Event) -> None:
    state.connecting = ""
    status = event.get("state")
    state.status = status if status in ("done", "failed", "interrupted") else "done"
    state.seconds, state.message = as_number(event.get("seconds")), str(event.get("message") or "")


_HANDLERS: dict[str, Callable[[RunState, Event], None]] = {
    "run_started": _run_started,
    "ray_connecting": _ray_connecting,
    "ray_started": _ray_started,
    "stage_started": _stage_started,
    "progress": _progress,
    "metrics": _metrics,
    "preview": _preview,
    "stage_finished": _stage_finished,
    "stage_failed": _stage_failed,
    "search_started": _search_started,
    "trial_started": _trial_started,
    "trial_finished": _trial_finished,
    "search_finished": _search_finished,
    "comparison": _comparison,
    "overhead": _overhead,
    "run_finished": _run_finished,
}


def _stage(state: RunState, event: Event) -> StageState:
    name, trial = str(event.get("stage") or ""), str(event.get("trial") or "")
    stages = _trial(state, event).stages if trial else state.stages
    return stages.setdefault(name, StageState(name, trial=trial))


def _trial(state: RunState, event: Event) -> TrialState:
    state.search = state.search or SearchState()
    name = str(event.get("trial") or "")
    return state.search.trials.setdefault(name, TrialState(name))


def _numbers(values: Mapping[object, object]) -> dict[str, float]:
    return {str(key): number for key, value in values.items() if (number := as_number(value)) is not None}


def _time(event: Event) -> float:
    return as_number(event.get("t")) or 0.0


def _whole(value: object) -> int:
    return int(as_number(value) or 0)


def _words(value: object) -> str:
    return " ".join(strings(value)) if isinstance(value, list | tuple) else str(value)
