"""Parallel coordinates of a search: an axis a searched field, the last one the metric, a line a trial. Pure, SVG text.

A line is interrupted where a trial lacks a field (`when`): joining what is left would claim a value that it had not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunery.events.formatting import as_number, plain
from tunery.reporting.axes import CHARACTER, Scale, circle, line, paths, shorten, svg, text, tick_texts
from tunery.reporting.charts import Axis

WIDTH = 1064.0
"""Of the page's text: the chart takes all of it."""
TOP, BOTTOM, HEIGHT = 46.0, 288.0, 300.0
MOST_CATEGORIES = 6
"""A numeric field with more values than this, or drawn from a range, gets a continuous axis."""


@dataclass(frozen=True)
class Line:
    """A trial: its value on each axis, None where it has none. `style`: quiet, stopped or best."""

    values: list[object]
    style: str
    tip: str


def axis_of(name: str, values: Sequence[object], space: str = "") -> Axis:
    """The axis of a field with these values. `space`: what the search says of its range."""
    numbers = [number for value in values if (number := as_number(value)) is not None]
    if numbers and len(numbers) == len(values) and ("uniform" in space or len(set(numbers)) > MOST_CATEGORIES):
        if "uniform" in space:  # as it was drawn
            return Axis(name, log=min(numbers) > 0 and "log" in space)
        return Axis(name, log=min(numbers) > 0 and max(numbers) / min(numbers) > 30)
    distinct = {plain(value): as_number(value) for value in values}
    return Axis(
        name,
        categories=sorted(distinct, key=lambda said: (distinct[said] is None, distinct[said] or 0.0, said)),
    )


def parallel_chart(axes: Sequence[Axis], lines: Sequence[Line]) -> str:
    """The best line over the stopped and quiet ones; "" without two axes and a line."""
    if len(axes) < 2 or not lines:
        return ""
    columns = [[one.values[index] for one in lines if one.values[index] is not None] for index in range(len(axes))]
    labels = [_labels(axis, column) for axis, column in zip(axes, columns, strict=True)]
    start, end = _room(axes[0], labels[0]), WIDTH - _room(axes[-1], labels[-1])
    places = [start + index * (end - start) / (len(axes) - 1) for index in range(len(axes))]
    scales = [_scale(axis, column) for axis, column in zip(axes, columns, strict=True)]
    parts = [_axis_parts(axes, labels, places, index) for index in range(len(axes))]
    behind = [part for drawn in parts for part in drawn[0]]
    drawn_lines: list[str] = []
    for one in sorted(lines, key=lambda one: ("stopped", "quiet", "best").index(one.style)):
        points = [
            None if value is None else (x, scales[index](_position(axes[index], value)))
            for index, (x, value) in enumerate(zip(places, one.values, strict=True))
        ]
        drawn_lines += _line_parts(points, one)
    over = [part for drawn in parts for part in drawn[1]]
    said = f"{len(lines)} trials over {', '.join(axis.label for axis in axes)}"
    return svg(HEIGHT, [*behind, *drawn_lines, *over], said, WIDTH)


def _room(axis: Axis, labels: Sequence[tuple[str, float]]) -> float:
    """Beside an outer axis, for its words and half of its name."""
    words = max((len(said) for said, _ in labels), default=0) * CHARACTER + 14
    name = len(axis.label) + (6 if axis.log else 0)
    return min(180.0, max(words, name * CHARACTER / 2 + 4))


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
    axes: Sequence[Axis], labels: Sequence[list[tuple[str, float]]], places: Sequence[float], index: int
) -> tuple[list[str], list[str]]:
    """What lies behind the lines, and the words over them."""
    x, apart = places[index], places[1] - places[0]
    high = index % 2 == 1 and len(axes) > 7
    room = (2 if len(axes) > 7 else 1) * apart - 8
    behind = [line(x, TOP, x, BOTTOM, "axis")]
    name = axes[index].label + (" (log)" if axes[index].log else "")
    over = [text(x, TOP - (32 if high else 14), shorten(name, room), css="name", anchor="middle")]
    final = index == len(axes) - 1
    for said, y in labels[index]:
        behind.append(line(x - 3, y, x + 3, y, "axis"))
        # Of the last axis to the right, where no line is; of the others to the left.
        place, anchor = (x + 8, "start") if final else (x - 7, "end")
        over.append(text(place, y + 4, shorten(said, min(apart - 16, 170.0)), css="tick over", anchor=anchor))
    return behind, over


def _labels(axis: Axis, column: Sequence[object]) -> list[tuple[str, float]]:
    """Words beside the axis, and where they stand."""
    scale = _scale(axis, column)
    if axis.categories:
        return [(said, scale(index)) for index, said in enumerate(axis.categories)]
    ticks = scale.ticks(5)
    return [(said, scale(tick)) for said, tick in zip(tick_texts(ticks), ticks, strict=True)]


def _scale(axis: Axis, column: Sequence[object]) -> Scale:
    if axis.categories:
        return Scale(-0.5, len(axis.categories) - 0.5, BOTTOM, TOP)
    numbers = [number for value in column if (number := as_number(value)) is not None] or [0.0]
    low, high = min(numbers), max(numbers)
    return Scale(low, high, BOTTOM - 8, TOP + 8, axis.log)


def _position(axis: Axis, value: object) -> float:
    return float(axis.categories.index(plain(value))) if axis.categories else as_number(value) or 0.0
