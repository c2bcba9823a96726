"""Joint histogram of two scores as an SVG heatmap: darker cells have more rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tunery.events.formatting import count, measure
from tunery.reporting.axes import Scale, frame, line, rect, spans_decades, svg

SHADES = 8
"""CSS classes h1 .. h8 of the page."""


def heatmap_chart(
    x_edges: Sequence[float],
    y_edges: Sequence[float],
    counts: Sequence[Sequence[float]],
    labels: tuple[str, str],
    thresholds: tuple[Sequence[float], Sequence[float]] = ((), ()),
    *,
    width: float = 400,
) -> str:
    """Heatmap of `counts`, (y bins, x bins), with dashed lines at the `thresholds` of x and y.

    Shades are logarithmic, because most cells have few rows and some have very many."""
    if len(x_edges) != len(counts[0] if counts else ()) + 1 or len(y_edges) != len(counts) + 1:
        return ""
    height, bottom, top = width - 40.0, width - 86.0, 34.0
    logs = [spans_decades(edges[0], edges[-1], 10) for edges in (x_edges, y_edges)]
    x = Scale(x_edges[0], x_edges[-1], 58, width - 12, logs[0])
    y = Scale(y_edges[0], y_edges[-1], bottom, top, logs[1])
    axis_labels = [label + (" (log scale)" if log else "") for label, log in zip(labels, logs, strict=True)]
    largest = max((number for row in counts for number in row), default=0)
    cells: list[str] = []
    for row, numbers in enumerate(counts):
        for column, number in enumerate(numbers):
            if number > 0:
                left, right = x(x_edges[column]), x(x_edges[column + 1])
                low, high = y(y_edges[row]), y(y_edges[row + 1])
                tip = f"{labels[0]} {measure(x_edges[column], 3)} – {measure(x_edges[column + 1], 3)}\n"
                tip += f"{labels[1]} {measure(y_edges[row], 3)} – {measure(y_edges[row + 1], 3)}\n{count(number)} rows"
                cells.append(rect(left, high, right - left, low - high, f"heat h{_shade(number, largest)}", tip))
    parts = [*frame(x, y, axis_labels[0], axis_labels[1], x_ticks=4), *cells]
    parts += [line(x(value), bottom, x(value), top, "threshold") for value in thresholds[0] if x.low <= value <= x.high]
    parts += [
        line(x.start, y(value), x.end, y(value), "threshold") for value in thresholds[1] if y.low <= value <= y.high
    ]
    return svg(height, parts, f"rows by {labels[0]} and {labels[1]}", width)


def _shade(number: float, largest: float) -> int:
    return 1 + round((SHADES - 1) * (math.log1p(number) / math.log1p(largest)))
