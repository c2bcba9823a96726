"""The charts with axes (curves, histogram of a score, scatter of a search): pure functions to SVG text."""

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
    path,
    rect,
    shorten,
    spread,
    svg,
    text,
    tick_texts,
)

COLOURS = 7
"""The colours of the page's palette (classes c0 .. c6); further series take them again from the first."""
MAX_POINTS = 240
BANDS = 60
SMALL_WIDTH = 280.0
"""Of a chart among several in a row."""
SMALL_LABELS = 6
"""As many ends of curves can be labelled in a small chart; of more the pointer tells."""


@dataclass(frozen=True)
class Series:
    """One line of a chart. `style`: train (thin), eval (with dots), quiet (grey, no label), best (thick)."""

    label: str
    points: list[tuple[float, float]]
    colour: int = 0
    style: str = "train"
    tip: str = ""


@dataclass(frozen=True)
class Cut:
    """A threshold of a select stage: what `label` says lies at `value`."""

    value: float
    label: str
    quiet: bool = False


@dataclass(frozen=True)
class Dot:
    """One trial in a scatter: where it is, what the pointer reads there, and how it ended."""

    x: float
    y: float
    tip: str
    style: str = "done"


@dataclass(frozen=True)
class Axis:
    """The horizontal axis of a scatter. With `categories`, x counts them from 0."""

    label: str
    log: bool = False
    categories: list[str] = field(default_factory=list)


def thinned(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: neighbours are averaged, the last point stays as it is."""
    if len(points) <= most:
        return list(points)
    every = -(-len(points) // most)
    groups = [points[start : start + every] for start in range(0, len(points) - 1, every)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [*means, points[-1]]


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, *, small: bool = False, whole: bool = False
) -> str:
    """Several curves over one axis, labelled where they end; a small chart says there only how much it is.

    The first steps of a training fall steeply and would flatten the rest: the axis is set by what comes
    after the first twelfth, and what rises above it is cut off there and said so. Not where `whole` is asked for, nor
    in a small chart: of other measures than a loss the fall may be the news.
    """
    drawn = [Series(s.label, thinned(s.points), s.colour, s.style, s.tip) for s in series if s.points]
    if not drawn:
        return ""
    labelled = [s for s in drawn if s.label] if not small or len(drawn) <= SMALL_LABELS else []
    end_label = _end_value if small else _end_label
    room = max((len(end_label(s)) for s in labelled), default=0) * CHARACTER + 18
    width, height, top = (SMALL_WIDTH, 164.0, 30.0) if small else (float(WIDTH), 320.0, 30.0)
    bottom = height - (34 if small else 48)
    xs = [x for s in drawn for x, _ in s.points]
    x = Scale(min([0.0, *xs]), max(xs) or 1.0, 54, width - min(room, 210) - 4)
    low, high, cut_off = _value_range(drawn, x, whole=small or whole)
    y = Scale(low, high, bottom, top)
    ticks = 3 if small else 5
    parts = frame(x, y, "" if small else x_label, y_label, x_ticks=ticks, y_ticks=ticks)
    if cut_off:
        parts.append(text(x.end, top - 12, f"the start goes up to {measure(cut_off, 3)}", css="tick", anchor="end"))
    if not any(s.tip for s in drawn):
        parts += _bands(drawn, x, y, x_label, BANDS // 2 if small else BANDS)
    for s in sorted(drawn, key=lambda s: ("quiet", "train", "eval", "best").index(s.style)):
        places = _clipped([(x(px), y(py)) for px, py in s.points], top)
        css = "quiet" if s.style == "quiet" else f"c{s.colour % COLOURS}"
        if s.tip:
            parts.append(path(places, "reach", s.tip))
        parts.append(path(places, f"curve {s.style} {css}"))
        if s.style in ("eval", "best") and len(places) <= 40:
            parts += [circle(px, py, 2.6, f"dot {css}") for px, py in places if py > top]
    ends = [(s, y(s.points[-1][1])) for s in labelled]
    for (s, end), place in zip(ends, spread([end for _, end in ends], 15, top, bottom), strict=True):
        at = x(s.points[-1][0])
        parts.append(path([(at + 3, end), (x.end + 5, place), (x.end + 9, place)], "leader"))
        said = shorten(end_label(s), room)
        parts.append(text(x.end + 13, place + 4, said, css=f"end c{s.colour % COLOURS} {s.style}"))
    said = f"{y_label} by {x_label}: " + "; ".join(_end_label(s) for s in drawn if s.label)
    return svg(height, parts, said, width)


def _end_label(series: Series) -> str:
    return f"{series.label} {measure(series.points[-1][1])}"


def _end_value(series: Series) -> str:
    return measure(series.points[-1][1], 3)


def _clipped(places: Sequence[tuple[float, float]], top: float) -> list[tuple[float, float]]:
    """The part of a falling curve below the chart's top, entering exactly at its edge."""
    kept: list[tuple[float, float]] = []
    for before, now in zip([places[0], *places], places, strict=False):
        if now[1] < top:
            continue
        if before[1] < top:
            share = (top - before[1]) / (now[1] - before[1])
            kept.append((before[0] + share * (now[0] - before[0]), top))
        kept.append(now)
    return kept or list(places)


def _value_range(series: Sequence[Series], x: Scale, *, whole: bool) -> tuple[float, float, float]:
    """(low, high, what the start rises to when it is cut off, else 0). `whole`: nothing is."""
    everything = [value for s in series for _, value in s.points]
    settled = [
        value for s in series for place, value in s.points if place >= x.low + (x.high - x.low) / 12
    ] or everything
    low, high, highest = min(everything), max(settled), max(everything)
    margin = (high - low) * 0.06 or max(abs(high) * 0.05, 1e-6)
    worth_cutting = not whole and highest > high + 0.35 * (high - low)
    return low - margin, (high if worth_cutting else highest) + margin, highest if worth_cutting else 0.0


def _bands(series: Sequence[Series], x: Scale, y: Scale, x_label: str, bands: int) -> list[str]:
    """Invisible upright strips under the curves; the pointer reads there what each curve is at that place."""
    wide = (x.end - x.start) / bands
    strips: list[str] = []
    for index in range(bands):
        left = x.start + index * wide
        said: list[str] = []
        where = x.low + (index + 0.5) / bands * (x.high - x.low)
        for s in series:
            place, value = min(s.points, key=lambda point: abs(point[0] - where))
            if abs(x(place) - left - wide / 2) <= wide * 2:
                said.append(f"{s.label or s.style}: {measure(value)}")
        if said:
            strips.append(
                rect(
                    left,
                    y.end,
                    wide,
                    y.start - y.end,
                    "band",
                    f"{count(where)} {x_label}\n" + "\n".join(said),
                )
            )
    return strips


def histogram_chart(
    edges: Sequence[float],
    counts: Sequence[float],
    planted: Sequence[float],
    cuts: Sequence[Cut],
    x_label: str,
) -> str:
    """Rows by score, on a log axis where the edges allow it; planted bad rows stand on top of good ones."""
    if len(edges) != len(counts) + 1 or not counts:
        return ""
    bad = list(planted) if len(planted) == len(counts) else [0.0] * len(counts)
    log = edges[0] > 0 and edges[-1] / edges[0] > 10
    lanes = _lanes(cuts, Scale(edges[0], edges[-1], 54, WIDTH - 10, log))
    top = 34.0 + 16 * (max(lanes, default=-1) + 1)
    bottom, height = top + 214, top + 262
    x = Scale(edges[0], edges[-1], 54, WIDTH - 10, log)
    y = Scale(0, max(counts) * 1.04 or 1, bottom, top)
    parts = frame(x, y, x_label + (" (log scale)" if log else ""), "rows", x_ticks=7)
    for index, (number, bad_number) in enumerate(zip(counts, bad, strict=True)):
        left, right = x(edges[index]) + 0.5, x(edges[index + 1]) - 0.5
        tip = f"{measure(edges[index], 3)} – {measure(edges[index + 1], 3)}\n{count(number)} rows"
        tip += f"\n{count(bad_number)} of them planted" if any(bad) else ""
        parts.append(rect(left, y(number - bad_number), right - left, y(0) - y(number - bad_number), "bar good", tip))
        if bad_number:
            parts.append(rect(left, y(number), right - left, y(0) - y(bad_number), "bar bad", tip))
    labels: list[str] = []
    for cut, lane in zip(cuts, lanes, strict=True):
        at = x(min(max(cut.value, edges[0]), edges[-1]))
        head, quiet = top - 12 - 16 * lane, " quiet" if cut.quiet else ""
        parts.append(line(at, head, at, bottom, f"cut{quiet}"))
        anchor, near = ("end", at - 6) if at > (x.start + x.end) / 2 else ("start", at + 6)
        labels.append(text(near, head + 8, cut.label, css=f"cut-label{quiet}", anchor=anchor))
    parts += labels  # over all lines: a higher cut's line passes behind the label of a lower one
    return svg(height, parts, f"histogram of {x_label}" + "".join(f"; cut at {measure(cut.value)}" for cut in cuts))


def _lanes(cuts: Sequence[Cut], x: Scale) -> list[int]:
    """A line of text for each cut's label above the plot, so that no two labels lie on each other."""
    taken: list[list[tuple[float, float]]] = []
    lanes: list[int] = []
    for cut in cuts:
        at, wide = x(min(max(cut.value, x.low), x.high)), len(cut.label) * CHARACTER + 14
        span = (at - wide, at + 2) if at > (x.start + x.end) / 2 else (at - 2, at + wide)
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
    """One parameter of a search against its metric; the best trial is ringed."""
    if not dots:
        return ""
    height, bottom, top = 232.0, 186.0, 30.0
    ys = [dot.y for dot in dots]
    margin = (max(ys) - min(ys)) * 0.08 or max(abs(ys[0]) * 0.02, 1e-6)
    y = Scale(min(ys) - margin, max(ys) + margin, bottom, top)
    x = _dot_scale(dots, axis, width)
    if axis.categories:
        parts = frame(Scale(0, 0, x.start, x.end), y, axis.label, y_label, x_ticks=0)
        parts = [part for part in parts if 'text-anchor="middle" class="tick"' not in part]
        room = (x.end - x.start) / len(axis.categories)
        for index, said in enumerate(axis.categories):
            parts.append(text(x(index), bottom + 18, shorten(said, room), css="tick", anchor="middle"))
    else:
        parts = frame(x, y, axis.label + (" (log scale)" if axis.log else ""), y_label, x_ticks=4)
    for dot in sorted(dots, key=lambda dot: dot.style == "best"):
        parts.append(circle(x(dot.x), y(dot.y), 6 if dot.style == "best" else 4.5, f"trial {dot.style}", dot.tip))
    return svg(height, parts, f"{y_label} by {axis.label}", width)


def _dot_scale(dots: Sequence[Dot], axis: Axis, width: float) -> Scale:
    start, end = 54.0, width - 12
    if axis.categories:
        return Scale(-0.5, len(axis.categories) - 0.5, start, end)
    low, high = min(dot.x for dot in dots), max(dot.x for dot in dots)
    if axis.log:
        return Scale(low / (high / low) ** 0.06 / 1.001, high * (high / low) ** 0.06 * 1.001, start, end, True)
    margin = (high - low) * 0.06 or max(abs(high) * 0.05, 1e-6)
    return Scale(low - margin, high + margin, start, end)


__all__ = [
    "Axis",
    "Cut",
    "Dot",
    "Series",
    "histogram_chart",
    "line_chart",
    "scatter_chart",
    "thinned",
    "tick_texts",
]
