"""What the terminal shows of a run, as pure functions of its state: stages, search, closing table.

Two layouts. From WIDE columns on, each fact of a stage has a column of its own. Below that a stage is one
mark, its name, its time, and one flexible column that holds the progress while it runs and its main fact
once it has ended.
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
    cells,
    count,
    duration,
    is_numeric,
    measure,
    overrides_text,
    plain,
    short_paths,
    speed,
)
from tunery.events.leaderboard import mean_text, origin
from tunery.events.run_state import Failure, RunState, SearchState, StageState, TrialState
from tunery.events.stage_summary import note

WIDE = 110
RUNNING_TRIALS = 4

MARKS = {"waiting": "·", "running": "●", "done": "✓", "reused": "↺", "failed": "✗", "stopped": "■"}
STYLES = {
    "waiting": "dim",
    "running": "cyan",
    "done": "green",
    "reused": "green",
    "failed": "red",
    "stopped": "yellow",
    "interrupted": "yellow",
}


def render(state: RunState, width: int, now: float, height: int | None = None) -> RenderableType:
    """The live picture of a run. With `height`, stages that don't fit are counted instead of shown."""
    parts: list[RenderableType] = [_headline(state, width, now)]
    below: list[RenderableType] = []
    if state.connecting:
        below.append(Text(f"  connecting to Ray at {state.connecting}", style="cyan"))
    if state.search:
        below += [Text(""), *_search_lines(state.search, width, now)]
    for failure in state.failures:
        below += [Text(""), *_failure_lines(failure, width)]
    # A line is kept for the headline, one for what is hidden, and one for the cursor below.
    room = len(state.stages) if height is None else max(3, height - len(below) - 3)
    shown = _most_telling(list(state.stages.values()), room)
    if shown:
        parts.append((_wide_table if width >= WIDE else _narrow_table)(shown, width, now))
    hidden = len(state.stages) - len(shown)
    if hidden:
        parts.append(Text(f"  … and {hidden} more stages", style="dim"))
    return Group(*parts, *below)


def final_table(state: RunState, width: int) -> RenderableType:
    """The comparisons that the run ends with, a table each under its title."""
    return Group(*(_titled(title, told, width) for title, told in state.comparisons.items()))


def _titled(title: str, told: dict[str, Any], width: int) -> RenderableType:
    return Group(Text(""), Text(title, style="bold"), _comparison(told, width))


def _comparison(told: dict[str, Any], width: int) -> RenderableType:
    """One table and its notes. Rows become blocks where columns don't fit."""
    columns: list[str] = told.get("columns") or []
    rows: list[list[object]] = told.get("rows") or []
    notes: list[str] = list(told.get("notes") or [])
    if not columns or not rows:
        return Group(*map(_note, notes))
    padded = [[*row, *[None] * (len(columns) - len(row))][: len(columns)] for row in rows]
    by_column = [[row[index] for row in padded] for index in range(len(columns))]
    texts = [
        ["" if cell is None else text for cell, text in zip(column, cells(column), strict=True)] for column in by_column
    ]
    # A header may break between its words, a cell may not break at all.
    needs = [
        max([*(len(word) for word in name.split()), *(Text(text).cell_len for text in column)], default=0)
        for name, column in zip(columns, texts, strict=True)
    ]
    # What a narrow terminal may leave out, the report has.
    left_out: list[str] = []
    optional = [name for name in told.get("optional") or [] if name in columns]
    while sum(needs) + 3 * len(needs) > width and optional:
        left_out.append(optional.pop())
        place = columns.index(left_out[-1])
        columns, texts, by_column, needs = (
            [*items[:place], *items[place + 1 :]] for items in (columns, texts, by_column, needs)
        )
    if left_out:
        notes.append(f"left out here, in the report: {', '.join(reversed(left_out))}")
    if sum(needs) + 3 * len(needs) > width:
        return Group(*_blocks(columns, texts), Text(""), *map(_note, notes))
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1))
    widths = _widths(columns, needs, width)
    for name, column, values, wide in zip(columns, texts, by_column, widths, strict=True):
        numeric = is_numeric(values) or all(text[:1] in "+-−0123456789–" for text in column)
        table.add_column(name, justify="right" if numeric else "left", vertical="bottom", width=wide)
    for index in range(len(rows)):
        table.add_row(*(Text(column[index], no_wrap=True) for column in texts))
    return Group(table, *map(_note, notes))


def _widths(columns: Sequence[str], needs: Sequence[int], width: int) -> list[int]:
    """A header takes one line where there is room, and else breaks: the longest beyond what its column needs first."""
    widths = [max(Text(name).cell_len, need) for name, need in zip(columns, needs, strict=True)]
    while sum(widths) + 3 * len(widths) > width:
        widest = max(range(len(widths)), key=lambda index: widths[index] - needs[index])
        if widths[widest] == needs[widest]:
            break
        widths[widest] -= 1
    return widths


def _note(line: str) -> RenderableType:
    """Folded lines are indented as well."""
    return Padding(Text(line, style="dim"), (0, 0, 0, 2), expand=False)


def _blocks(columns: Sequence[str], texts: Sequence[Sequence[str]]) -> list[RenderableType]:
    wide = max(len(name) for name in columns)
    lines: list[RenderableType] = []
    for index in range(len(texts[0])):
        lines.append(Text(""))
        for name, column in zip(columns, texts, strict=True):
            line = Text(f"  {name:<{wide}}  ", style="dim")
            lines.append(line.append(column[index], style="bold" if name == columns[0] else "default not dim"))
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


def _most_telling(stages: list[StageState], room: int) -> list[StageState]:
    """At most `room` stages, in their order: what runs or failed, what ended last, what comes next."""
    if len(stages) <= room:
        return stages
    urgency = {"running": 0, "failed": 0, "done": 1, "reused": 1, "waiting": 2}
    order = sorted(
        range(len(stages)),
        key=lambda index: (
            urgency[stages[index].status],
            -index if stages[index].status != "waiting" else index,
        ),
    )
    return [stages[index] for index in sorted(order[:room])]


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
            Text(stage.name, style="dim" if stage.status == "waiting" else "bold" if running else ""),
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
            Text(stage.name, style="dim" if stage.status == "waiting" else "bold" if running else ""),
            _time(stage.elapsed(now)),
            _running_line(stage, width, now) if running else Text(note(stage), style="red" if stage.error else "dim"),
        )
    return table


def _running_line(stage: StageState, width: int, now: float) -> RenderableType:
    """Progress, amount, speed and time left in one cell, for narrow terminals."""
    left = stage.time_left(now)
    facts = [
        _amount(stage) if stage.done or stage.total else "",
        speed(stage.rate, stage.unit) if stage.rate else "",
        f"{duration(left)} left" if left is not None else "",
    ]
    said = "  ".join(fact for fact in facts if fact)
    if not stage.total:
        return Text(said or note(stage) or "starting")
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_row(_bar(stage, width=8 if width >= 72 else 4), Text(said, no_wrap=True, overflow="ellipsis"))
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
    lines += [_trial_line(trial, search, names, now) for trial in running[:RUNNING_TRIALS]]
    if len(running) > RUNNING_TRIALS:
        lines.append(Text(f"  … and {len(running) - RUNNING_TRIALS} more running", style="dim"))
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
        said = search.curve(trial)
        latest = f"{measure(said[-1][1])}  " if said else f"{note(stage)}  " if stage.points else ""
        line.append(latest, style="bold default")
    if origin(trial):
        line.append(f"{origin(trial)}  ", style="default")
    line.append(overrides_text(trial.overrides, names), style="dim default")
    return line


def _failure_lines(failure: Failure, width: int) -> list[RenderableType]:
    """What failed, why, and what to do; long lines fold with a hanging indent."""
    said = [
        (f"✗ {failure.stage}", failure.message),
        ("cause", failure.cause),
        ("remedy", failure.remedy),
        ("log", failure.log),
    ]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), width=width)
    table.add_column(no_wrap=True, max_width=24, overflow="ellipsis", style="dim")
    table.add_column(overflow="fold", ratio=1)
    for index, (label, text) in enumerate(said):
        if text:
            table.add_row(Text(label, style="red bold" if index == 0 else "dim"), Text(plain(text)))
    return [table]
