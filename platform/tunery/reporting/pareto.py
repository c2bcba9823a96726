"""Scatter plot of two objectives of a search with their Pareto front, as SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tunery.reporting.axes import WIDTH, circle, frame, padded_scale, path, spans_decades, svg
from tunery.reporting.charts import Dot


def pareto_chart(dots: Sequence[Dot], labels: tuple[str, str], *, higher: bool = False, joined: bool = True) -> str:
    """Dots whose style contains `front` form the Pareto front and are joined by steps that bound the dominated region.

    `higher`: higher is better for the horizontal metric. `joined`: False if there are further objectives."""
    if not dots:
        return ""
    height, bottom, top = 320.0, 272.0, 30.0
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
    x = padded_scale(xs, 64, WIDTH - 12, spans_decades(min(xs), max(xs), 30))
    y = padded_scale(ys, bottom, top, spans_decades(min(ys), max(ys), 30))
    parts = frame(x, y, labels[0], labels[1])
    front = sorted((dot.x, dot.y) for dot in dots if "front" in dot.style.split())
    if joined and len(front) > 1:
        parts.append(path(_steps([(x(px), y(py)) for px, py in front], higher), "front-line"))
    for dot in sorted(dots, key=lambda dot: ("front" in dot.style, "best" in dot.style)):
        size = 6 if "best" in dot.style else 5 if "front" in dot.style else 4.5
        parts.append(circle(x(dot.x), y(dot.y), size, f"trial {dot.style}", dot.tip))
    description = f"{labels[1]} by {labels[0]}: {len(dots)} trials, {len(front)} on the Pareto front"
    return svg(height, parts, description)


def _steps(points: Sequence[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """Insert between each two points the corner that both dominate."""
    corners = list(points[:1])
    for (x1, y1), (x2, y2) in pairwise(points):
        corners += [(x1, y2) if higher else (x2, y1), (x2, y2)]
    return corners
