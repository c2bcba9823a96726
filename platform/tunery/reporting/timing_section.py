"""Time in the report: overhead outside the stages' own work, and a timeline of stages and trials."""

from __future__ import annotations

from collections.abc import Mapping

from tunery.events.formatting import as_number, duration, plain
from tunery.events.run_state import RunState
from tunery.reporting.funnel_timeline import Span, timeline_chart
from tunery.reporting.tables import Figure, Table, table

MAX_TIMELINE_TRIALS = 40
"""Trials in the timeline; the table of trials has all of them."""


def overhead(state: RunState) -> Table | None:
    """Time outside the stages' own work."""
    values = state.overhead
    first, between = as_number(values.get("first_step_seconds")), values.get("between_stages_seconds")
    ray = as_number(values.get("ray_start_seconds"))
    ray = state.ray_start_seconds if ray is None else ray
    rows: list[list[object]] = (
        [["from the command's start to the first training step", duration(first)]] if first is not None else []
    )
    rows += [["start of Ray", duration(ray)]] if ray is not None else []
    gaps = [gap for value in between if (gap := as_number(value)) is not None] if isinstance(between, list) else []
    if gaps:
        rows.append([f"between stages ({len(gaps)} gaps, longest {duration(max(gaps))})", duration(sum(gaps))])
    launches = values.get("stage_launch_seconds")
    for stage, seconds in launches.items() if isinstance(launches, Mapping) else ():
        number = as_number(seconds)
        rows.append([f"launch of {stage}", duration(number) if number is not None else plain(seconds)])
    for name, seconds in values.items():
        if name not in (
            "first_step_seconds",
            "between_stages_seconds",
            "ray_start_seconds",
            "stage_launch_seconds",
        ):
            rows.append([name.replace("_", " "), plain(seconds, name)])
    return table(["overhead", "time"], rows) if rows else None


def timeline(state: RunState) -> Figure | None:
    """Timeline of the stages and trials of the last invocation."""
    run_start, now = state.started, state.last_event or 0.0
    if run_start is None:
        return None
    spans = []
    for stage in state.stages.values():
        end = stage.finished or (now if stage.status == "running" else None)
        start = stage.started if stage.started is not None else (end - (stage.seconds or 0.0) if end else None)
        if start is not None and end is not None:
            spans.append(
                Span(stage.name, max(0.0, start - run_start), max(0.0, end - run_start), stage.status, stage.status)
            )
    for trial in list(state.search.trials.values())[:MAX_TIMELINE_TRIALS] if state.search else ():
        if trial.started is not None and trial.started >= run_start:
            end = trial.started + trial.seconds if trial.seconds is not None else now
            spans.append(
                Span(trial.name, trial.started - run_start, end - run_start, trial.status, f"trial, {trial.status}")
            )
    styles: set[str] = {span.style for span in spans}
    order = ["done", "reused", "running", "stopped", "failed"]
    keys = [(f"span-key {style}", style) for style in order if style in styles]
    return Figure("timeline", timeline_chart(spans, state.elapsed(now) or 0.0), keys=keys) if spans else None
