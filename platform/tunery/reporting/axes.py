"""Scales, ticks and SVG elements shared by all charts, as pure functions.

Colours come from the page's CSS. Charts have a fixed viewBox width and scale with the page. Chart text is escaped
here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 560
CHARACTER = 6.7
"""Mean width of a character in pixels at the charts' font size, to estimate label widths: SVG cannot measure text."""


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, on a linear or logarithmic scale."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._transform(self.low), self._transform(self.high)
        fraction = 0.5 if high == low else (self._transform(value) - low) / (high - low)
        return self.start + fraction * (self.end - self.start)

    def _transform(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self.log else value

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` ticks within low to high."""
        ticks = log_ticks(self.low, self.high, count) if self.log else nice_ticks(self.low, self.high, count)
        return [tick for tick in ticks if self.low <= tick * (1 + 1e-9) and tick <= self.high * (1 + 1e-9) + 1e-12]


def padded_scale(values: Sequence[float], start: float, end: float, log: bool = False) -> Scale:
    """A scale over all values with a margin at both ends."""
    low, high = min(values), max(values)
    if log:
        margin = max((high / low) ** 0.06, 1.001)
        return Scale(low / margin, high * margin, start, end, True)
    margin = (high - low) * 0.08 or max(abs(high) * 0.02, 1e-6)
    return Scale(low - margin, high + margin, start, end)


def spans_decades(low: float, high: float, factor: float) -> bool:
    """Whether an axis is logarithmic by default: values are positive and differ by more than `factor`."""
    return low > 0 and high / low > factor


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten apart) that cover low to high."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Powers of ten, with multiples of 2, 3 and 5 if there are few powers."""
    if low <= 0 or not high > low:
        return [low]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= count + 1:
            return inside
    stride = max(1, math.ceil(len(inside) / count))
    return inside[::stride]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Tick labels with the same number of decimals; thousands as 20k, tiny values as 1e-4."""
    if not ticks:
        return []
    largest = max(abs(tick) for tick in ticks)
    smallest = min((abs(tick) for tick in ticks if tick), default=0.0)
    if smallest and smallest < 0.01 and largest < 0.1:
        return ["0" if tick == 0 else f"{tick:.1e}".replace(".0e", "e").replace("e-0", "e-") for tick in ticks]
    if largest >= 10_000:
        unit, sign = (1e6, "M") if largest >= 5e6 else (1e3, "k")
        return ["0" if tick == 0 else f"{tick / unit:,.4g}{sign}" for tick in ticks]
    decimals = next(
        (d for d in range(6) if all(abs(round(tick, d) - tick) < 1e-9 * max(1, largest) for tick in ticks)), 6
    )
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the given ones, at least `gap` apart and, if they fit, within low to high."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = [min(max(positions[index], low), high) for index in order]
    for _ in range(60):
        for upper in range(len(placed) - 1):
            overlap = gap - (placed[upper + 1] - placed[upper])
            if overlap > 0:
                placed[upper] -= overlap / 2
                placed[upper + 1] += overlap / 2
        if placed and placed[-1] > high:
            placed[-1] = high
        if placed and placed[0] < low:
            placed[0] = low
    result = [0.0] * len(positions)
    for position, index in zip(placed, order, strict=True):
        result[index] = position
    return result


def svg(height: float, body: Sequence[str], label: str, width: float = WIDTH) -> str:
    """The complete SVG; `label` is its description for screen readers."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">' + "".join(body) + "</svg>"
    )


def text(x: float, y: float, content: str, *, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def rect(x: float, y: float, width: float, height: float, css: str, tip: str = "") -> str:
    """A rectangle with the tooltip `tip`."""
    size = f'width="{max(0.0, width):.1f}" height="{max(0.0, height):.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} class="{css}"{_tooltip(tip)}/>'


def circle(x: float, y: float, radius: float, css: str, tip: str = "") -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{css}"{_tooltip(tip)}/>'


def _tooltip(tip: str) -> str:
    return f' data-tip="{escape(tip)}"' if tip else ""


def path(points: Sequence[tuple[float, float]], css: str, tip: str = "") -> str:
    return paths([points], css, tip)


def paths(pieces: Sequence[Sequence[tuple[float, float]]], css: str, tip: str = "") -> str:
    """A line in several pieces with gaps between them."""
    commands = "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) for points in pieces if points)
    return f'<path d="{commands}" class="{css}"{_tooltip(tip)}/>' if commands else ""


def shorten(label: str, max_width: float) -> str:
    """`label`, truncated with an ellipsis to `max_width` pixels."""
    max_length = max(1, int(max_width / CHARACTER))
    return label if len(label) <= max_length else label[: max(1, max_length - 1)] + "…"


def frame(x: Scale, y: Scale, x_label: str, y_label: str, *, x_ticks: int = 5, y_ticks: int = 5) -> list[str]:
    """Grid, ticks and axis labels. `y.start` is the bottom of the plot and `y.end` its top."""
    parts: list[str] = []
    y_values, x_values = y.ticks(y_ticks), x.ticks(x_ticks)
    for tick, label in zip(y_values, tick_texts(y_values), strict=True):
        parts.append(line(x.start, y(tick), x.end, y(tick), "grid"))
        parts.append(text(x.start - 7, y(tick) + 4, label, css="tick", anchor="end"))
    for tick, label in zip(x_values, tick_texts(x_values), strict=True):
        parts.append(line(x(tick), y.start, x(tick), y.start + 4, "axis"))
        parts.append(text(x(tick), y.start + 18, label, css="tick", anchor="middle"))
    parts.append(line(x.start, y.start, x.end, y.start, "axis"))
    parts.append(text((x.start + x.end) / 2, y.start + 36, x_label, css="label", anchor="middle"))
    parts.append(text(x.start - 54, y.end - 12, y_label, css="label"))
    return parts
