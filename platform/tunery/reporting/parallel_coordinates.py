"""Parallel coordinates of a search as SVG text: an axis per searched field, then the metric; a line per trial.

Lines have gaps where a trial lacks a conditional field (`when`), because a continuous line would suggest a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunery.events.formatting import as_number, plain
from tunery.reporting.axes import CHARACTER, Scale, circle, line, paths, shorten, spans_decades, svg, text, tick_texts
from tunery.reporting.charts import Axis

WIDTH = 1064.0
"""Width of the page's text, which the chart spans."""
TOP, BOTTOM, HEIGHT = 46.0, 288.0, 300.0
MAX_CATEGORIES = 6
"""A numeric field with more distinct values, or sampled from a range, gets a continuous axis."""


@dataclass(frozen=True)
class Line:
    """A trial: its value on each axis, None if it has none. `style`: quiet, stopped or best."""

    values: list[object]
    style: str
    tip: str


def parameter_axis(name: str, values: Sequence[object], space: str = "") -> Axis:
    """The axis of a field with these values. `space`: description of its search space."""
    numbers = [number for value in values if (number := as_number(value)) is not None]
    if numbers and len(numbers) == len(values) and ("uniform" in space or len(set(numbers)) > MAX_CATEGORIES):
        if "uniform" in space:  # logarithmic if it was sampled so
            return Axis(name, log=min(numbers) > 0 and "log" in space)
        return Axis(name, log=spans_decades(min(numbers), max(numbers), 30))
    distinct = {plain(value): as_number(value) for value in values}
    return Axis(
        name,
        categories=sorted(distinct, key=lambda text: (distinct[text] is None, distinct[text] or 0.0, text)),
    )


def parallel_chart(axes: Sequence[Axis], lines: Sequence[Line]) -> str:
    """Render the chart, with the best trial on top; "" with fewer than two axes or without lines."""
    if len(axes) < 2 or not lines:
        return ""
    columns = [[one.values[index] for one in lines if one.values[index] is not None] for index in range(len(axes))]
    labels = [_labels(axis, column) for axis, column in zip(axes, columns, strict=True)]
    start, end = _margin(axes[0], labels[0]), WIDTH - _margin(axes[-1], labels[-1])
    axis_xs = [start + index * (end - start) / (len(axes) - 1) for index in range(len(axes))]
    scales = [_scale(axis, column) for axis, column in zip(axes, columns, strict=True)]
    axis_parts = [_axis_parts(axes, labels, axis_xs, index) for index in range(len(axes))]
    background = [part for parts, _ in axis_parts for part in parts]
    line_parts: list[str] = []
    for one in sorted(lines, key=lambda one: ("stopped", "quiet", "best").index(one.style)):
        points = [
            None if value is None else (x, scales[index](_position(axes[index], value)))
            for index, (x, value) in enumerate(zip(axis_xs, one.values, strict=True))
        ]
        line_parts += _line_parts(points, one)
    foreground = [part for _, parts in axis_parts for part in parts]
    description = f"{len(lines)} trials over {', '.join(axis.label for axis in axes)}"
    return svg(HEIGHT, [*background, *line_parts, *foreground], description, WIDTH)


def _margin(axis: Axis, labels: Sequence[tuple[str, float]]) -> float:
    """Width beside an outer axis, for its tick labels and half of its name."""
    label_width = max((len(label) for label, _ in labels), default=0) * CHARACTER + 14
    name_length = len(axis.label) + (6 if axis.log else 0)
    return min(180.0, max(label_width, name_length * CHARACTER / 2 + 4))


def _line_parts(points: Sequence[tuple[float, float] | None], one: Line) -> list[str]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            pieces.append([])
        else:
            pieces[-1].append(point)
    long = [piece for piece in pieces if len(piece) > 1]
    css = {"best": "curve best c1", "quiet": "curve quiet", "stopped": "curve quiet early"}[one.style]
    dots = [point for piece in pieces if len(piece) == 1 or one.style == "best" for point in piece]
    mark = "dot c1" if one.style == "best" else "dot-quiet"
    return [
        paths(long, "reach", one.tip),
        paths(long, css),
        *(circle(x, y, 3.2 if one.style == "best" else 2.4, mark) for x, y in dots),
    ]


def _axis_parts(
    axes: Sequence[Axis], labels: Sequence[list[tuple[str, float]]], axis_xs: Sequence[float], index: int
) -> tuple[list[str], list[str]]:
    """SVG elements of one axis: those behind the lines (axis, ticks), and those over them (labels)."""
    x, spacing = axis_xs[index], axis_xs[1] - axis_xs[0]
    raised = index % 2 == 1 and len(axes) > 7
    max_width = (2 if len(axes) > 7 else 1) * spacing - 8
    background = [line(x, TOP, x, BOTTOM, "axis")]
    name = axes[index].label + (" (log)" if axes[index].log else "")
    foreground = [text(x, TOP - (32 if raised else 14), shorten(name, max_width), css="name", anchor="middle")]
    is_last = index == len(axes) - 1
    for label, y in labels[index]:
        background.append(line(x - 3, y, x + 3, y, "axis"))
        # Labels of the last axis are to its right, where there are no lines; those of the others to the left.
        label_x, anchor = (x + 8, "start") if is_last else (x - 7, "end")
        label = shorten(label, min(spacing - 16, 170.0))
        foreground.append(text(label_x, y + 4, label, css="tick over", anchor=anchor))
    return background, foreground


def _labels(axis: Axis, column: Sequence[object]) -> list[tuple[str, float]]:
    """Tick labels of an axis, as (text, y)."""
    scale = _scale(axis, column)
    if axis.categories:
        return [(category, scale(index)) for index, category in enumerate(axis.categories)]
    ticks = scale.ticks(5)
    return [(label, scale(tick)) for label, tick in zip(tick_texts(ticks), ticks, strict=True)]


def _scale(axis: Axis, column: Sequence[object]) -> Scale:
    if axis.categories:
        return Scale(-0.5, len(axis.categories) - 0.5, BOTTOM, TOP)
    numbers = [number for value in column if (number := as_number(value)) is not None] or [0.0]
    low, high = min(numbers), max(numbers)
    return Scale(low, high, BOTTOM - 8, TOP + 8, axis.log)


def _position(axis: Axis, value: object) -> float:
    return float(axis.categories.index(plain(value))) if axis.categories else as_number(value) or 0.0
