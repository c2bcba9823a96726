"""Charts with axes (training curves, score histograms, scatter plots of a search) as SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tunery.events.formatting import count, measure
from tunery.reporting.axes import (
    CHARACTER,
    WIDTH,
    Scale,
    circle,
    frame,
    line,
    padded_scale,
    path,
    rect,
    shorten,
    spans_decades,
    spread,
    svg,
    text,
    tick_texts,
)

COLOURS = 7
"""Colours of the page's palette (CSS classes c0 .. c6); further series reuse them from the first."""
MAX_POINTS = 240
BANDS = 60
SMALL_WIDTH = 280.0
"""Width of a chart that is one of several in a row."""
MAX_SMALL_LABELS = 6
"""Curves of a small chart that are labelled at their ends; with more, only the tooltips show values."""


@dataclass(frozen=True)
class Series:
    """One line of a chart. `style`: train (thin), eval (with dots), quiet (grey, no label), best (thick)."""

    label: str
    points: list[tuple[float, float]]
    colour: int = 0
    style: str = "train"
    tip: str = ""


@dataclass(frozen=True)
class ThresholdLine:
    """A threshold of a select stage, drawn as a labelled vertical line at `value`."""

    value: float
    label: str
    quiet: bool = False


@dataclass(frozen=True)
class Dot:
    """One trial in a scatter plot: position, tooltip, and CSS class (status)."""

    x: float
    y: float
    tip: str
    style: str = "done"


@dataclass(frozen=True)
class Axis:
    """The horizontal axis of a scatter plot. With `categories`, x is the index of a category."""

    label: str
    log: bool = False
    categories: list[str] = field(default_factory=list)


def downsample(points: Sequence[tuple[float, float]], max_points: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `max_points` points: neighbours are averaged, the last point is unchanged."""
    if len(points) <= max_points:
        return list(points)
    group_size = -(-len(points) // max_points)
    groups = [points[start : start + group_size] for start in range(0, len(points) - 1, group_size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [*means, points[-1]]


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, *, small: bool = False, full_range: bool = False
) -> str:
    """Curves over one x-axis, labelled at their ends with name and last value (a small chart: last value only).

    A loss falls steeply in its first steps, which would flatten the rest of the curve. The y-axis is therefore set by
    the values after the first twelfth of the x-axis; higher initial values are clipped, and a note gives their maximum.
    With `full_range` and in small charts nothing is clipped.
    """
    curves = [Series(s.label, downsample(s.points), s.colour, s.style, s.tip) for s in series if s.points]
    if not curves:
        return ""
    labelled = [s for s in curves if s.label] if not small or len(curves) <= MAX_SMALL_LABELS else []
    end_label = _end_value if small else _end_label
    label_width = max((len(end_label(s)) for s in labelled), default=0) * CHARACTER + 18
    width, height, top = (SMALL_WIDTH, 164.0, 30.0) if small else (float(WIDTH), 320.0, 30.0)
    bottom = height - (34 if small else 48)
    xs = [x for s in curves for x, _ in s.points]
    x = Scale(min([0.0, *xs]), max(xs) or 1.0, 54, width - min(label_width, 210) - 4)
    low, high, clipped_max = _value_range(curves, x, full_range=small or full_range)
    y = Scale(low, high, bottom, top)
    ticks = 3 if small else 5
    parts = frame(x, y, "" if small else x_label, y_label, x_ticks=ticks, y_ticks=ticks)
    if clipped_max:
        note = f"initial values up to {measure(clipped_max, 3)}"
        parts.append(text(x.end, top - 12, note, css="tick", anchor="end"))
    if not any(s.tip for s in curves):
        parts += _tooltip_bands(curves, x, y, x_label, BANDS // 2 if small else BANDS)
    for s in sorted(curves, key=lambda s: ("quiet", "train", "eval", "best").index(s.style)):
        points = _clip([(x(px), y(py)) for px, py in s.points], top)
        css = "quiet" if s.style == "quiet" else f"c{s.colour % COLOURS}"
        if s.tip:
            parts.append(path(points, "reach", s.tip))
        parts.append(path(points, f"curve {s.style} {css}"))
        if s.style in ("eval", "best") and len(points) <= 40:
            parts += [circle(px, py, 2.6, f"dot {css}") for px, py in points if py > top]
    ends = [(s, y(s.points[-1][1])) for s in labelled]
    for (s, end), label_y in zip(ends, spread([end for _, end in ends], 15, top, bottom), strict=True):
        end_x = x(s.points[-1][0])
        parts.append(path([(end_x + 3, end), (x.end + 5, label_y), (x.end + 9, label_y)], "leader"))
        label = shorten(end_label(s), label_width)
        parts.append(text(x.end + 13, label_y + 4, label, css=f"end c{s.colour % COLOURS} {s.style}"))
    description = f"{y_label} by {x_label}: " + "; ".join(_end_label(s) for s in curves if s.label)
    return svg(height, parts, description, width)


def _end_label(series: Series) -> str:
    return f"{series.label} {measure(series.points[-1][1])}"


def _end_value(series: Series) -> str:
    return measure(series.points[-1][1], 3)


def _clip(points: Sequence[tuple[float, float]], top: float) -> list[tuple[float, float]]:
    """The part of a falling curve below the chart's top (in pixels, y points down), starting exactly at its edge."""
    kept: list[tuple[float, float]] = []
    for before, now in zip([points[0], *points], points, strict=False):
        if now[1] < top:
            continue
        if before[1] < top:
            share = (top - before[1]) / (now[1] - before[1])
            kept.append((before[0] + share * (now[0] - before[0]), top))
        kept.append(now)
    return kept or list(points)


def _value_range(series: Sequence[Series], x: Scale, *, full_range: bool) -> tuple[float, float, float]:
    """(low, high, maximum of the clipped initial values or 0). With `full_range` nothing is clipped."""
    values = [value for s in series for _, value in s.points]
    settled = [value for s in series for at, value in s.points if at >= x.low + (x.high - x.low) / 12] or values
    low, high, highest = min(values), max(settled), max(values)
    margin = (high - low) * 0.06 or max(abs(high) * 0.05, 1e-6)
    clip = not full_range and highest > high + 0.35 * (high - low)
    return low - margin, (high if clip else highest) + margin, highest if clip else 0.0


def _tooltip_bands(series: Sequence[Series], x: Scale, y: Scale, x_label: str, bands: int) -> list[str]:
    """Invisible vertical bands with tooltips that give each curve's value there."""
    width = (x.end - x.start) / bands
    rects: list[str] = []
    for index in range(bands):
        left = x.start + index * width
        lines: list[str] = []
        center = x.low + (index + 0.5) / bands * (x.high - x.low)
        for s in series:
            nearest, value = min(s.points, key=lambda point: abs(point[0] - center))
            if abs(x(nearest) - left - width / 2) <= width * 2:
                lines.append(f"{s.label or s.style}: {measure(value)}")
        if lines:
            tip = f"{count(center)} {x_label}\n" + "\n".join(lines)
            rects.append(rect(left, y.end, width, y.start - y.end, "band", tip))
    return rects


def histogram_chart(
    edges: Sequence[float],
    counts: Sequence[float],
    corrupted: Sequence[float],
    thresholds: Sequence[ThresholdLine],
    x_label: str,
) -> str:
    """Histogram of a score, with corrupted rows stacked on intact ones.

    The x-axis is logarithmic if the edges are positive and span more than a factor of 10.
    """
    if len(edges) != len(counts) + 1 or not counts:
        return ""
    bad = list(corrupted) if len(corrupted) == len(counts) else [0.0] * len(counts)
    log = spans_decades(edges[0], edges[-1], 10)
    lanes = _label_lanes(thresholds, Scale(edges[0], edges[-1], 54, WIDTH - 10, log))
    top = 34.0 + 16 * (max(lanes, default=-1) + 1)
    bottom, height = top + 214, top + 262
    x = Scale(edges[0], edges[-1], 54, WIDTH - 10, log)
    y = Scale(0, max(counts) * 1.04 or 1, bottom, top)
    parts = frame(x, y, x_label + (" (log scale)" if log else ""), "rows", x_ticks=7)
    for index, (number, bad_number) in enumerate(zip(counts, bad, strict=True)):
        left, right = x(edges[index]) + 0.5, x(edges[index + 1]) - 0.5
        tip = f"{measure(edges[index], 3)} – {measure(edges[index + 1], 3)}\n{count(number)} rows"
        tip += f"\n{count(bad_number)} of them corrupted" if any(bad) else ""
        parts.append(rect(left, y(number - bad_number), right - left, y(0) - y(number - bad_number), "bar good", tip))
        if bad_number:
            parts.append(rect(left, y(number), right - left, y(0) - y(bad_number), "bar bad", tip))
    labels: list[str] = []
    for threshold, lane in zip(thresholds, lanes, strict=True):
        at = x(min(max(threshold.value, edges[0]), edges[-1]))
        head, quiet = top - 12 - 16 * lane, " quiet" if threshold.quiet else ""
        parts.append(line(at, head, at, bottom, f"threshold{quiet}"))
        anchor, label_x = ("end", at - 6) if at > (x.start + x.end) / 2 else ("start", at + 6)
        labels.append(text(label_x, head + 8, threshold.label, css=f"threshold-label{quiet}", anchor=anchor))
    parts += labels  # after all lines: the line of a higher threshold passes behind the label of a lower one
    description = "".join(f"; threshold {measure(threshold.value)}" for threshold in thresholds)
    return svg(height, parts, f"histogram of {x_label}{description}")


def _label_lanes(thresholds: Sequence[ThresholdLine], x: Scale) -> list[int]:
    """Assign each threshold's label to a lane above the plot, so that labels do not overlap."""
    taken: list[list[tuple[float, float]]] = []
    lanes: list[int] = []
    for threshold in thresholds:
        at, width = x(min(max(threshold.value, x.low), x.high)), len(threshold.label) * CHARACTER + 14
        span = (at - width, at + 2) if at > (x.start + x.end) / 2 else (at - 2, at + width)
        lane = next(
            (n for n, spans in enumerate(taken) if all(span[1] < a or b < span[0] for a, b in spans)),
            len(taken),
        )
        if lane == len(taken):
            taken.append([])
        taken[lane].append(span)
        lanes.append(lane)
    return lanes


def scatter_chart(dots: Sequence[Dot], axis: Axis, y_label: str, *, width: float = SMALL_WIDTH) -> str:
    """The search metric over one parameter, with the best trial highlighted."""
    if not dots:
        return ""
    height, bottom, top = 232.0, 186.0, 30.0
    y = padded_scale([dot.y for dot in dots], bottom, top)
    x = _dot_scale(dots, axis, width)
    if axis.categories:
        parts = frame(Scale(0, 0, x.start, x.end), y, axis.label, y_label, x_ticks=0)
        parts = [part for part in parts if 'text-anchor="middle" class="tick"' not in part]
        max_width = (x.end - x.start) / len(axis.categories)
        for index, category in enumerate(axis.categories):
            parts.append(text(x(index), bottom + 18, shorten(category, max_width), css="tick", anchor="middle"))
    else:
        parts = frame(x, y, axis.label + (" (log scale)" if axis.log else ""), y_label, x_ticks=4)
    for dot in sorted(dots, key=lambda dot: dot.style == "best"):
        parts.append(circle(x(dot.x), y(dot.y), 6 if dot.style == "best" else 4.5, f"trial {dot.style}", dot.tip))
    return svg(height, parts, f"{y_label} by {axis.label}", width)


def _dot_scale(dots: Sequence[Dot], axis: Axis, width: float) -> Scale:
    start, end = 54.0, width - 12
    if axis.categories:
        return Scale(-0.5, len(axis.categories) - 0.5, start, end)
    return padded_scale([dot.x for dot in dots], start, end, axis.log)


__all__ = [
    "Axis",
    "Dot",
    "Series",
    "ThresholdLine",
    "downsample",
    "histogram_chart",
    "line_chart",
    "scatter_chart",
    "tick_texts",
]
