"""`tunery trials RUN`: the trials of a search, as the run's event log and the wishes about it tell them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from tunery.errors import RequestError
from tunery.events.event_log import Event
from tunery.events.formatting import as_number, count, duration, measure, overrides_text, short_paths
from tunery.events.run_state import RunState, SearchState, StageState, TrialState
from tunery.reporting.terminal_view import MARKS, STYLES, WIDE
from tunery.search.space import trial_id
from tunery.spec.error_messages import nearest

OPEN = ("running", "stopping", "waiting")
"""States of trials that have not ended. stopping: somebody wants it to end, and it has not seen that yet."""
COLUMNS = ("trial", "state", "value", "progress", "time")


@dataclass(frozen=True)
class TrialRow:
    """A trial as the list shows it."""

    name: str
    state: str
    value: float | None
    """The metric at the end; of one that has none yet the last that was measured on the way."""
    done: float
    total: float
    """0 when it is not known."""
    unit: str
    seconds: float | None
    overrides: dict[str, Any]
    origin: str
    of: str
    """The trial that it is cloned from or repeats."""
    error: str
    best: bool


@dataclass(frozen=True)
class Trials:
    """The trials of a run: those that go on first, then those that ended, best first."""

    run: str
    file: str
    metric: str
    mode: str
    planned: int
    stage: str
    """not begun, running, ended; or waiting: begun, and at the moment nobody runs it."""
    holder: str
    """Who runs it; "" when nobody does."""
    trials: tuple[TrialRow, ...]

    def named(self, asked: str) -> TrialRow:
        """The trial that is meant: by its name, the part after `trial-`, or the beginning of either. Raises
        RequestError."""
        known = {trial.name: trial for trial in self.trials}
        return known[trial_named(asked, known, self.run)]

    def as_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "metric": self.metric,
            "mode": self.mode,
            "planned": self.planned,
            "search": self.stage,
            "running": bool(self.holder),
            "trials": [asdict(trial) for trial in self.trials],
        }

    def render(self, width: int) -> RenderableType:
        return Group(*_headlines(self), *_table(self.trials, width))


def trial_named(asked: str, known: Iterable[str], run: str) -> str:
    """The name that is meant; raises RequestError where none is, or several are."""
    names = list(known)
    for word in (asked, f"trial-{asked}"):
        if word in names:
            return word
    found = [name for name in names if asked and name.startswith((asked, f"trial-{asked}"))]
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(
            f"`{asked}` may be any of {len(found)} trials of `{run}`",
            cause=", ".join(found),
            remedy="give more of its name",
        )
    cause = "" if names else "none has begun"
    near = nearest(asked if asked.startswith("trial-") else f"trial-{asked}", names)
    raise RequestError(f"the run `{run}` has no trial `{asked}`", cause=cause, remedy=near)


def trials_of(
    state: RunState,
    events: Sequence[Event],
    wishes: Sequence[Mapping[str, Any]],
    stops: Callable[[str], bool],
    holder: str,
    now: float,
) -> Trials:
    """`wishes`: trials to add, as search/steering.py has them. `stops`: whether somebody wants a trial to end."""
    search = state.search or SearchState()
    origins = _origins(events)
    running = bool(holder)
    listed = [
        _listed(trial, search, origins.get(trial.name, ("", "")), stops(trial.name), running, now)
        for trial in search.ranked
    ]
    for wish in wishes:
        name = trial_id(wish["overrides"])
        if all(trial.name != name for trial in listed):
            state_ = "stopped" if stops(name) else "waiting"
            told = (dict(wish["overrides"]), wish["origin"], wish["of"])
            listed.append(TrialRow(name, state_, None, 0, 0, "", None, *told, error="", best=False))
    listed.sort(key=lambda trial: OPEN.index(trial.state) if trial.state in OPEN else len(OPEN))
    begun = "ended" if search.finished else "not begun" if state.search is None else "running" if running else "waiting"
    return Trials(state.run, state.file, search.value_name, search.mode, search.planned, begun, holder, tuple(listed))


def _origins(events: Iterable[Event]) -> dict[str, tuple[str, str]]:
    """By trial: where its values come from, and from which other trial."""
    return {
        str(event.get("trial")): (str(event["origin"]), str(event.get("of") or ""))
        for event in events
        if event["event"] in ("trial_started", "trial_finished") and "origin" in event
    }


def _listed(
    trial: TrialState, search: SearchState, origin: tuple[str, str], stops: bool, running: bool, now: float
) -> TrialRow:
    state: str = trial.status
    if state in ("running", "waiting") and not (running and trial.status == "running"):
        state = "stopped" if stops else "waiting"  # a search that goes on leaves out what nobody wants
    elif state == "running" and stops:
        state = "stopping"
    stage = _measured(trial, search.metric) or trial.current
    done, total, unit = _progress(stage)
    value = last_value(trial, search.value_name)
    seconds = trial.seconds
    if seconds is None and state in ("running", "stopping") and trial.started is not None:
        seconds = max(0.0, now - trial.started)
    return TrialRow(
        trial.name,
        state,
        value,
        done,
        total,
        unit,
        seconds,
        trial.overrides,
        *origin,
        error=trial.error,
        best=trial is search.best,
    )


def _measured(trial: TrialState, metric: str) -> StageState | None:
    """The training that the metric is about: `sft` of `sft.eval_loss` and of `eval.sft.heldout.loss`."""
    begun = {name: stage for name, stage in trial.stages.items() if stage.status != "waiting"}
    return next((begun[name] for name in metric.split(".") if name in begun and begun[name].points), None)


def _progress(stage: StageState | None) -> tuple[float, float, str]:
    if stage is None:
        return 0, 0, ""
    steps = as_number(stage.facts.get("steps"))  # one that was found in the store tells no progress
    return (steps, steps, "steps") if steps is not None and not stage.total else (stage.done, stage.total, stage.unit)


def last_value(trial: TrialState, metric: str) -> float | None:
    """At the end, or the last on the way: another measure may be known by then, and is not it. Of a weighted sum there
    is none before the end."""
    if trial.value is not None:
        return trial.value
    stage, _, name = metric.partition(".")
    points = trial.stages[stage].curve if stage in trial.stages else []
    values = [point.values[name] for point in points if name in point.values]
    return values[-1] if values else None


def _headlines(told: Trials) -> list[Text]:
    ended = sum(trial.state not in OPEN for trial in told.trials)
    first = Text(told.run, style="bold")
    first.append(f"  {told.metric} ({told.mode})" if told.metric else "", style="not bold dim")
    if told.planned:
        first.append(f"  {ended} of {max(told.planned, len(told.trials))} trials ended", style="not bold")
    return [first, Text(_standing(told), style="dim")]


def _standing(told: Trials) -> str:
    again = f"`tunery run {told.file}`, given again,"
    match told.stage:
        case "running":
            return f"the search runs ({told.holder})"
        case "ended":
            return "the search has ended"
        case "waiting":
            return f"nobody runs the search at the moment: {again} goes on with it"
    return (
        f"the search has not begun: {told.holder} is at its stages"
        if told.holder
        else (f"the search has not begun, and nobody runs it: {again} does")
    )


def _table(trials: Sequence[TrialRow], width: int) -> list[RenderableType]:
    """A line a trial; where its values don't fit beside the rest they stand below it."""
    if not trials:
        return []
    names = short_paths(path for trial in trials for path in trial.overrides)
    cells = [_cells(trial) for trial in trials]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    origins = [_origin(trial) for trial in trials]
    wide, longest = width >= WIDE, max(map(len, ["origin", *origins]))
    lines: list[RenderableType] = [Text("")]
    header = _row(COLUMNS, widths) + (f"  {'origin':<{longest}}  values" if wide else "")
    lines.append(Text("  " + header, style="dim", no_wrap=True))
    for trial, row, origin in zip(trials, cells, origins, strict=True):
        style = STYLES.get(trial.state, "yellow")
        line = Text(MARKS.get(trial.state, "■") + " ", style=style)
        line.append(_row(row, widths), style="bold default" if trial.best else "default")
        values = overrides_text(trial.overrides, names)
        if wide:
            line.append(f"  {origin:<{longest}}  {values}", style="default")
        lines.append(line)
        if not wide:
            lines.append(
                Padding(
                    Text("  ".join(part for part in (values, origin) if part), style="dim"), (0, 0, 0, 4), expand=False
                )
            )
        if trial.error:
            lines.append(_below(_last_line(trial.error), "red"))
    return lines


def _below(text: str, style: str) -> Padding:
    return Padding(Text(text, style=style), (0, 0, 0, 4), expand=False)


def _cells(trial: TrialRow) -> tuple[str, ...]:
    progress = ""
    if trial.total:
        whole = trial.done >= trial.total
        progress = f"{count(trial.total) if whole else f'{count(trial.done)}/{count(trial.total)}'} {trial.unit}"
    return (
        trial.name,
        trial.state + (", best" if trial.best else ""),
        measure(trial.value) if trial.value is not None else "",
        progress,
        duration(trial.seconds) if trial.seconds is not None else "",
    )


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Words to the left, numbers to the right."""
    return "  ".join(
        cell.ljust(width) if index < 2 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )


def _origin(trial: TrialRow) -> str:
    return f"{trial.origin} of {trial.of}" if trial.of else trial.origin


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
