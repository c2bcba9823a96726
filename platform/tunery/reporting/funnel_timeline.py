"""Bar charts (data funnel, timeline, parameter importance) as SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunery.events.formatting import count, duration, share
from tunery.reporting.axes import CHARACTER, WIDTH, Scale, line, rect, shorten, svg, text, tick_texts


@dataclass(frozen=True)
class Level:
    """A level of a funnel: number of rows, how many of them are corrupted, and the depth below the source."""

    label: str
    rows: float
    note: str = ""
    corrupted: float = 0
    depth: int = 0


@dataclass(frozen=True)
class Span:
    """A bar of the timeline: from `start` to `end`, in seconds since the run's start."""

    label: str
    start: float
    end: float
    style: str = "done"
    tip: str = ""


@dataclass(frozen=True)
class Bar:
    """A labelled share in [0, 1]. `quiet`: not statistically significant."""

    label: str
    share: float
    note: str = ""
    quiet: bool = False


def bars_chart(bars: Sequence[Bar]) -> str:
    """Horizontal bars of shares."""
    if not bars:
        return ""
    names = min(210.0, max(len(bar.label) for bar in bars) * CHARACTER + 12)
    notes = max(len(bar.note) for bar in bars) * CHARACTER + 48
    x = Scale(0, 1, names, WIDTH - notes)
    step, thick, parts = 30.0, 18.0, list[str]()
    for index, bar in enumerate(bars):
        top = 6 + index * step
        percent = f"{100 * bar.share:.0f}%"
        parts.append(text(0, top + 13, shorten(bar.label, names - 8), css="name"))
        parts.append(rect(x.start, top, x.end - x.start, thick, "trough"))
        tip = f"{bar.label}: {percent}" + (f"\n{bar.note}" if bar.note else "")
        parts.append(
            rect(x.start, top, x(bar.share) - x.start, thick, "bar not-significant" if bar.quiet else "bar good", tip)
        )
        parts.append(text(x.end + 10, top + 13, percent, css="value"))
        parts.append(text(x.end + 46, top + 13, bar.note, css="tick"))
    description = "; ".join(f"{bar.label} {100 * bar.share:.0f}%" for bar in bars)
    return svg(6 + len(bars) * step, parts, description)


def funnel_chart(levels: Sequence[Level]) -> str:
    """Horizontal bars on one scale: rows read, readable, and kept by each select stage."""
    if not levels:
        return ""
    widest = max(level.rows for level in levels) or 1
    names = min(170.0, max((len(level.label) + 2 * level.depth) * CHARACTER for level in levels) + 12)
    numbers = max(len(_row_count(level)) for level in levels) * CHARACTER + 10
    x = Scale(0, widest, names, WIDTH - numbers)
    step, thick, parts = 30.0, 18.0, list[str]()
    for index, level in enumerate(levels):
        top = 6 + index * step
        indent = level.depth * 2 * CHARACTER
        parts.append(text(indent, top + 13, shorten(level.label, names - indent - 8), css="name"))
        tip = f"{level.label}: {count(level.rows)} rows" + (
            f"\n{count(level.corrupted)} of them corrupted" if level.corrupted else ""
        )
        good = level.rows - level.corrupted
        parts.append(rect(x.start, top, x.end - x.start, thick, "trough"))
        parts.append(rect(x.start, top, x(good) - x.start, thick, "bar good", tip))
        if level.corrupted:
            parts.append(rect(x(good), top, x(level.rows) - x(good), thick, "bar bad", tip))
        parts.append(text(x.end + 10, top + 13, count(level.rows), css="value"))
        if level.note:
            parts.append(text(x.end + 16 + len(count(level.rows)) * CHARACTER, top + 13, level.note, css="tick"))
    return svg(
        6 + len(levels) * step,
        parts,
        "; ".join(f"{level.label} {count(level.rows)} rows" for level in levels),
    )


def _row_count(level: Level) -> str:
    return f"{count(level.rows)}  {level.note}"


def lost_note(before: float, after: float) -> str:
    """Rows lost at a level, as a note such as '−800 (20%)'."""
    return f"−{count(before - after)} ({share(before - after, before)})" if before > after else ""


def timeline_chart(spans: Sequence[Span], total: float) -> str:
    """Timeline of stages and trials; a span too short to be visible is drawn as a hairline."""
    if not spans:
        return ""
    names = min(150.0, max(len(span.label) for span in spans) * CHARACTER + 12)
    total = max([total, *(span.end for span in spans)]) or 1.0
    unit, name = (3600.0, "hours") if total >= 3 * 3600 else (60.0, "minutes") if total >= 180 else (1.0, "seconds")
    x = Scale(0, total / unit, names, WIDTH - 58)
    step, thick = (24.0, 14.0) if len(spans) <= 16 else (17.0, 10.0)
    bottom = 8 + len(spans) * step
    ticks = x.ticks(6)
    parts = [line(x(tick), 2, x(tick), bottom, "grid") for tick in ticks]
    for tick, label in zip(ticks, tick_texts(ticks), strict=True):
        parts.append(text(x(tick), bottom + 15, label, css="tick", anchor="middle"))
    for index, span in enumerate(spans):
        top = 6 + index * step
        left, right = x(span.start / unit), x(span.end / unit)
        tip = f"{span.label}: {duration(span.end - span.start)}" + (f"\n{span.tip}" if span.tip else "")
        parts.append(text(0, top + thick - 3, shorten(span.label, names - 8), css="name"))
        parts.append(rect(left, top, max(1.5, right - left), thick, f"span {span.style}", tip))
        parts.append(text(max(left + 1.5, right) + 6, top + thick - 3, duration(span.end - span.start), css="tick"))
    parts.append(
        text(
            (x.start + x.end) / 2,
            bottom + 33,
            f"{name} since the command started",
            css="label",
            anchor="middle",
        )
    )
    return svg(bottom + 42, parts, f"timeline over {duration(total)}")
