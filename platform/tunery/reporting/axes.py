"""Scales, ticks and the few SVG elements that every chart is made of, as pure functions.

Colours come from the page's CSS. Charts are drawn on a canvas of fixed width and scale with the page. Text is
escaped here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 560
CHARACTER = 6.7
"""Mean width of a character at the charts' font size: SVG can't measure text, labels take room by this."""


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, linearly or by the logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._inner(self.low), self._inner(self.high)
        where = 0.5 if high == low else (self._inner(value) - low) / (high - low)
        return self.start + where * (self.end - self.start)

    def _inner(self, value: float) -> float:
        return math.log(max(value, 1e-300)) if self.log else value

    def ticks(self, wanted: int = 5) -> list[float]:
        found = log_ticks(self.low, self.high, wanted) if self.log else nice_ticks(self.low, self.high, wanted)
        return [tick for tick in found if self.low <= tick * (1 + 1e-9) and tick <= self.high * (1 + 1e-9) + 1e-12]


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten apart) that cover low to high."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Powers of ten, with their twofold and fivefold where there are few."""
    if low <= 0 or not high > low:
        return [low]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= wanted + 1:
            return inside
    every = max(1, math.ceil(len(inside) / wanted))
    return inside[::every]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """All ticks of an axis with the same decimals; thousands as 20k, what is tiny as 1e-4."""
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


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart and, where they fit, within low to high."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [min(max(wanted[index], low), high) for index in order]
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
    result = [0.0] * len(wanted)
    for place, index in zip(placed, order, strict=True):
        result[index] = place
    return result


def svg(height: float, body: Sequence[str], label: str, width: float = WIDTH) -> str:
    """The whole picture; `label` says it in words to those who can't see it."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">' + "".join(body) + "</svg>"
    )


def text(x: float, y: float, said: str, *, css: str = "", anchor: str = "start", turn: float = 0) -> str:
    turned = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}"{turned}>{escape(said)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def rect(x: float, y: float, width: float, height: float, css: str, tip: str = "") -> str:
    """A bar; `tip` is what the page shows when the pointer is on it."""
    told = f' data-tip="{escape(tip)}"' if tip else ""
    size = f'width="{max(0.0, width):.1f}" height="{max(0.0, height):.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} class="{css}"{told}/>'


def circle(x: float, y: float, radius: float, css: str, tip: str = "") -> str:
    told = f' data-tip="{escape(tip)}"' if tip else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{css}"{told}/>'


def path(points: Sequence[tuple[float, float]], css: str, tip: str = "") -> str:
    return paths([points], css, tip)


def paths(pieces: Sequence[Sequence[tuple[float, float]]], css: str, tip: str = "") -> str:
    """One line in several pieces, with gaps between them."""
    told = f' data-tip="{escape(tip)}"' if tip else ""
    drawn = "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) for points in pieces if points)
    return f'<path d="{drawn}" class="{css}"{told}/>' if drawn else ""


def shorten(said: str, room: float) -> str:
    """`said`, cut with an ellipsis to what fits in `room` pixels."""
    fits = max(1, int(room / CHARACTER))
    return said if len(said) <= fits else said[: max(1, fits - 1)] + "…"


def frame(x: Scale, y: Scale, x_label: str, y_label: str, *, x_ticks: int = 5, y_ticks: int = 5) -> list[str]:
    """Grid, ticks and the axes' names. `y.start` is the bottom of the plot and `y.end` its top."""
    parts: list[str] = []
    y_values, x_values = y.ticks(y_ticks), x.ticks(x_ticks)
    for tick, said in zip(y_values, tick_texts(y_values), strict=True):
        parts.append(line(x.start, y(tick), x.end, y(tick), "grid"))
        parts.append(text(x.start - 7, y(tick) + 4, said, css="tick", anchor="end"))
    for tick, said in zip(x_values, tick_texts(x_values), strict=True):
        parts.append(line(x(tick), y.start, x(tick), y.start + 4, "axis"))
        parts.append(text(x(tick), y.start + 18, said, css="tick", anchor="middle"))
    parts.append(line(x.start, y.start, x.end, y.start, "axis"))
    parts.append(text((x.start + x.end) / 2, y.start + 36, x_label, css="label", anchor="middle"))
    parts.append(text(x.start - 54, y.end - 12, y_label, css="label"))
    return parts
