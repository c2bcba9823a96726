"""Renders a run for the terminal, as pure functions of its state: stages, search, failures, summary tables.

There are two layouts. From WIDE columns on, a stage has separate columns for progress, speed and time. Below that it
has its status mark, name, time, and one flexible column: its progress while it runs, then its main result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tunery.events.formatting import (
    count,
    duration,
    measure,
    overrides_text,
    plain,
    short_paths,
    speed,
)
from tunery.events.leaderboard import mean_text, origin
from tunery.events.run_state import Failure, RunState, SearchState, StageState, TrialState
from tunery.events.stage_summary import note
from tunery.reporting import tables

WIDE = 110
MAX_RUNNING_TRIALS = 4

MARKS = {"pending": "·", "running": "●", "done": "✓", "reused": "↺", "failed": "✗", "stopped": "■"}
STYLES = {
    "pending": "dim",
    "running": "cyan",
    "done": "green",
    "reused": "green",
    "failed": "red",
    "stopped": "yellow",
    "interrupted": "yellow",
}


def render(state: RunState, width: int, now: float, height: int | None = None) -> RenderableType:
    """Render the live view of a run. With `height` (lines), stages that do not fit are counted, not shown."""
    parts: list[RenderableType] = [_headline(state, width, now)]
    below: list[RenderableType] = []
    if state.connecting:
        below.append(Text(f"  connecting to Ray at {state.connecting}", style="cyan"))
    if state.search:
        below += [Text(""), *_search_lines(state.search, width, now)]
    for failure in state.failures:
        below += [Text(""), *_failure_lines(failure, width)]
    # Three lines are reserved: the headline, the count of hidden stages, and the cursor.
    max_stages = len(state.stages) if height is None else max(3, height - len(below) - 3)
    visible = _select_stages(list(state.stages.values()), max_stages)
    if visible:
        parts.append((_wide_table if width >= WIDE else _narrow_table)(visible, width, now))
    hidden = len(state.stages) - len(visible)
    if hidden:
        parts.append(Text(f"  … and {hidden} more stages", style="dim"))
    return Group(*parts, *below)


def final_table(state: RunState, width: int) -> RenderableType:
    """Render the run's summary tables with their titles."""
    return Group(*(_titled(title, summary, width) for title, summary in state.comparisons.items()))


def _titled(title: str, summary: dict[str, Any], width: int) -> RenderableType:
    return Group(Text(""), Text(title, style="bold"), _summary_table(summary, width))


def _summary_table(summary: dict[str, Any], width: int) -> RenderableType:
    """One table with its notes. If the columns do not fit, each row becomes a block of lines."""
    content = tables.table(
        summary.get("columns") or [],
        summary.get("rows") or [],
        notes=summary.get("notes") or [],
        optional=summary.get("optional") or [],
    )
    notes = list(content.notes)
    if not content.columns or not content.rows:
        return Group(*map(_note, notes))
    omitted: list[str] = []
    while _min_width(content) > width and content.optional:
        omitted.append(content.optional[-1])
        content = content.without(omitted[-1])
    if omitted:
        notes.append(f"columns shown only in the report: {', '.join(reversed(omitted))}")
    if _min_width(content) > width:
        return Group(*_blocks(content), Text(""), *map(_note, notes))
    rendered = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1))
    widths = _column_widths(content.columns, _min_widths(content), width)
    for name, numeric, column_width in zip(content.columns, content.numeric, widths, strict=True):
        rendered.add_column(name, justify="right" if numeric else "left", vertical="bottom", width=column_width)
    for row in content.rows:
        rendered.add_row(*(Text(cell.text, no_wrap=True) for cell in row))
    return Group(rendered, *map(_note, notes))


def _min_widths(content: tables.Table) -> list[int]:
    """Minimum width of each column: headers wrap between words; cells do not wrap."""
    return [
        max([*(len(word) for word in name.split()), *(Text(text).cell_len for text in content.texts(index))], default=0)
        for index, name in enumerate(content.columns)
    ]


def _min_width(content: tables.Table) -> int:
    return sum(_min_widths(content)) + 3 * len(content.columns)


def _column_widths(columns: Sequence[str], min_widths: Sequence[int], width: int) -> list[int]:
    """Widths at which each header fits on one line; if that is too wide, the columns with the most slack shrink."""
    widths = [max(Text(name).cell_len, minimum) for name, minimum in zip(columns, min_widths, strict=True)]
    while sum(widths) + 3 * len(widths) > width:
        widest = max(range(len(widths)), key=lambda index: widths[index] - min_widths[index])
        if widths[widest] == min_widths[widest]:
            break
        widths[widest] -= 1
    return widths


def _note(line: str) -> RenderableType:
    """A note whose wrapped lines are indented too."""
    return Padding(Text(line, style="dim"), (0, 0, 0, 2), expand=False)


def _blocks(content: tables.Table) -> list[RenderableType]:
    name_width = max(len(name) for name in content.columns)
    lines: list[RenderableType] = []
    for row in content.rows:
        lines.append(Text(""))
        for index, (name, cell) in enumerate(zip(content.columns, row, strict=True)):
            line = Text(f"  {name:<{name_width}}  ", style="dim")
            lines.append(line.append(cell.text, style="default not dim" if index else "bold"))
    return lines


def _headline(state: RunState, width: int, now: float) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(state.run or "run", style="bold")
    line.append(f"  {state.status}", style=STYLES.get(state.status, ""))
    elapsed = state.elapsed(now)
    if elapsed is not None:
        line.append(f"  {duration(elapsed)}", style="dim")
    if state.status in ("interrupted", "failed") and state.message:
        line.append(f"  {state.message.splitlines()[0]}", style="dim")
    line.truncate(width, overflow="ellipsis")
    return line


def _select_stages(stages: list[StageState], max_stages: int) -> list[StageState]:
    """At most `max_stages` stages in file order: first running and failed ones, then the last finished, then the
    next."""
    if len(stages) <= max_stages:
        return stages
    priority = {"running": 0, "failed": 0, "done": 1, "reused": 1, "pending": 2}
    order = sorted(
        range(len(stages)),
        key=lambda index: (
            priority[stages[index].status],
            -index if stages[index].status != "pending" else index,
        ),
    )
    return [stages[index] for index in sorted(order[:max_stages])]


def _wide_table(stages: Sequence[StageState], width: int, now: float) -> Table:
    table = Table(box=None, show_header=True, header_style="dim", padding=(0, 2, 0, 0), expand=False, width=width)
    table.add_column(" ", width=1)
    table.add_column("stage", no_wrap=True, max_width=30, overflow="ellipsis")
    table.add_column("kind", no_wrap=True, max_width=12, overflow="ellipsis", style="dim")
    table.add_column("", width=22 if width >= 140 else 12)
    table.add_column("done", no_wrap=True, justify="right", min_width=12, max_width=28, overflow="ellipsis")
    table.add_column("speed", no_wrap=True, justify="right", min_width=12, max_width=20, overflow="ellipsis")
    table.add_column("time", no_wrap=True, justify="right", min_width=7)
    table.add_column("left", no_wrap=True, justify="right", min_width=7)
    table.add_column("", no_wrap=True, overflow="ellipsis", ratio=1)
    for stage in stages:
        style = STYLES[stage.status]
        running = stage.status == "running"
        table.add_row(
            Text(MARKS[stage.status], style=style),
            Text(stage.name, style="dim" if stage.status == "pending" else "bold" if running else ""),
            stage.kind,
            _bar(stage) if stage.total else "",
            _amount(stage) if stage.total else "",
            speed(stage.rate, stage.unit) if running and stage.rate else "",
            _time(stage.elapsed(now)),
            _time(stage.time_left(now)),
            Text(
                note(stage),
                style="red" if stage.status == "failed" else "dim" if stage.status != "running" else "",
            ),
        )
    return table


def _narrow_table(stages: Sequence[StageState], width: int, now: float) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), expand=False, width=width)
    table.add_column(width=1)
    table.add_column(no_wrap=True, max_width=16, overflow="ellipsis")
    table.add_column(no_wrap=True, justify="right", min_width=7)
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for stage in stages:
        style = STYLES[stage.status]
        running = stage.status == "running"
        table.add_row(
            Text(MARKS[stage.status], style=style),
            Text(stage.name, style="dim" if stage.status == "pending" else "bold" if running else ""),
            _time(stage.elapsed(now)),
            _running_line(stage, width, now) if running else Text(note(stage), style="red" if stage.error else "dim"),
        )
    return table


def _running_line(stage: StageState, width: int, now: float) -> RenderableType:
    """Progress bar, amount, speed and time left in one cell, for narrow terminals."""
    left = stage.time_left(now)
    parts = [
        _amount(stage) if stage.done or stage.total else "",
        speed(stage.rate, stage.unit) if stage.rate else "",
        f"{duration(left)} left" if left is not None else "",
    ]
    progress = "  ".join(part for part in parts if part)
    if not stage.total or (stage.detail and not stage.done):
        return Text(progress if stage.done else note(stage) or "starting")
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_row(_bar(stage, width=8 if width >= 72 else 4), Text(progress, no_wrap=True, overflow="ellipsis"))
    return line


def _bar(stage: StageState, width: int | None = None) -> ProgressBar:
    style = STYLES[stage.status]
    return ProgressBar(
        total=stage.total,
        completed=stage.done,
        width=width,
        complete_style=style,
        finished_style=f"dim {style}",
        style="bright_black",
    )


def _amount(stage: StageState) -> str:
    if not stage.total:
        return f"{count(stage.done)} {stage.unit}"
    if stage.done >= stage.total:
        return f"{count(stage.total)} {stage.unit}"
    return f"{count(stage.done)}/{count(stage.total)} {stage.unit}"


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


def _search_lines(search: SearchState, width: int, now: float) -> list[RenderableType]:
    names = short_paths(search.space or {path: "" for trial in search.trials.values() for path in trial.overrides})
    ended = search.count("done", "stopped", "failed")
    title = Text("search ", style="bold").append(f"{search.metric} ({search.mode})", style="not bold dim")
    first = Text.assemble(title, "  ") if width >= WIDE else Text("  ")
    first.append(f"{ended} of {search.total} trials")
    for status, style in (("running", "cyan"), ("stopped", "yellow"), ("failed", "red")):
        number = search.count(status)  # type: ignore[arg-type]
        if number:
            first.append(f"  {number} {status}", style=style)
    left = search.time_left(now)
    if left:
        first.append(f"  about {duration(left)} left", style="dim")
    lines = [first] if width >= WIDE else [title, first]
    if search.best and search.best.value is not None:
        best = Text("  best  ", style="green")
        standing = search.standings.get(search.best.name)
        best.append(f"{mean_text(standing) if standing else measure(search.best.value)}  ", style="bold")
        best.append(f"{search.best.name}  {overrides_text(search.best.overrides, names)}")
        lines.append(best)
    running = [trial for trial in search.trials.values() if trial.status == "running"]
    lines += [_trial_line(trial, search, names, now) for trial in running[:MAX_RUNNING_TRIALS]]
    if len(running) > MAX_RUNNING_TRIALS:
        lines.append(Text(f"  … and {len(running) - MAX_RUNNING_TRIALS} more running", style="dim"))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return list(lines)


def _trial_line(trial: TrialState, search: SearchState, names: dict[str, str], now: float) -> Text:
    line = Text("  ● ", style="cyan")
    line.append(f"{trial.name}  ", style="default")
    stage = trial.current
    if stage:
        line.append(f"{stage.name} {_amount(stage) if stage.total else ''}".rstrip() + "  ", style="default")
        curve = search.curve(trial)
        latest = f"{measure(curve[-1][1])}  " if curve else f"{note(stage)}  " if stage.points else ""
        line.append(latest, style="bold default")
    if origin(trial):
        line.append(f"{origin(trial)}  ", style="default")
    line.append(overrides_text(trial.overrides, names), style="dim default")
    return line


def _failure_lines(failure: Failure, width: int) -> list[RenderableType]:
    """Message, cause, remedy and log of a failure; long lines wrap with a hanging indent."""
    lines = [
        (f"✗ {failure.stage}", failure.message),
        ("cause", failure.cause),
        ("remedy", failure.remedy),
        ("log", failure.log),
    ]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), width=width)
    table.add_column(no_wrap=True, max_width=24, overflow="ellipsis", style="dim")
    table.add_column(overflow="fold", ratio=1)
    for index, (label, text) in enumerate(lines):
        if text:
            table.add_row(Text(label, style="red bold" if index == 0 else "dim"), Text(plain(text)))
    return [table]
