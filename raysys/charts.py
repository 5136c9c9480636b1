"""Charts as static inline SVG: they need no library, no network and no script, and follow the page's colours.

A chart is 360 x 232 units and is shown at about that size, so text stays readable on a phone. Series differ by colour
and by the shape of their markers. Hover text is in `data-tip`, shown by report.js.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

WIDTH, HEIGHT = 360.0, 232.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 14.0, 12.0, 44.0
STYLES = 6  # series with a style of their own; report.css has their colours
LETTER = 6.4  # about the width of a digit in units
_Map = Callable[[float], float]
ZERO = 0.11  # where 1 stands on an axis that starts with 0, as a share of its length


@dataclass(frozen=True)
class Dot:
    """A measured point: `x` in [0, 1] along the axis, the interval around `y`, what to say on hover."""

    x: float
    y: float
    low: float
    high: float
    tip: str
    broken: bool = False
    void: bool = False  # its value says nothing: only the mark of a collapse is drawn, at the bottom of the chart


@dataclass(frozen=True)
class Line:
    """A series in the style of number `style`."""

    style: int
    dots: Sequence[Dot]


@dataclass(frozen=True)
class Axis:
    """Positions in [0, 1] with their labels; `cut` is where the scale is broken, if it is."""

    title: str
    ticks: Sequence[tuple[float, str]]
    cut: float | None = None


def edits_position(edits: int, last: int) -> float:
    """Where a number of edits stands: logarithmic from 1 to `last`, with 0 at the left end."""
    if edits == 0 or last == 0:
        return 0.0
    return ZERO + (1 - ZERO) * (math.log(edits) / math.log(last) if last > 1 else 1.0)


def edits_axis(snapshots: Sequence[int]) -> Axis:
    """Axis of the number of edits, labelled at the snapshots as far as there is room; both ends come first."""
    last = max(snapshots, default=0)
    places = [(edits_position(n, last), f"{n:,}".replace(",", " ")) for n in sorted(snapshots)]
    round_first = sorted(places, key=lambda p: (p[0] not in (0.0, 1.0), not p[1].startswith("1"), p[0]))
    return Axis("edits", _with_room(round_first), ZERO / 2 if 0 in snapshots and last > 1 else None)


def steps_axis(title: str, labels: Sequence[str]) -> Axis:
    """Axis of named steps at equal distances."""
    return Axis(title, _with_room([(step_position(i, len(labels)), label) for i, label in enumerate(labels)]))


def step_position(i: int, n: int) -> float:
    """Where step `i` of `n` stands."""
    return (i + 0.5) / n


def _with_room(places: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The labels that fit beside each other, the earlier ones preferred."""
    span = WIDTH - LEFT - RIGHT
    taken: list[tuple[float, float]] = []
    kept = []
    for x, label in places:
        half = (len(label) * LETTER + 6) / 2 / span
        if all(x + half <= low or x - half >= high for low, high in taken):
            taken.append((x - half, x + half))
            kept.append((x, label))
    return sorted(kept)


def scale(lows: Sequence[float], highs: Sequence[float], least: float = 0.2) -> tuple[float, float, float]:
    """(bottom, top, step) of a share axis around the values: round numbers, at least `least` tall, within [0, 1]."""
    low = min((v for v in lows if math.isfinite(v)), default=0.0)
    high = max((v for v in highs if math.isfinite(v)), default=1.0)
    middle, tall = (low + high) / 2, max(high - low, least)
    step = next(s for s in (0.05, 0.1, 0.2, 0.25, math.inf) if tall / s <= 4.5 or s == math.inf)
    step = 0.25 if step == math.inf else step
    bottom = max(0.0, math.floor(round((middle - tall / 2) / step, 6)) * step)
    top = math.ceil(round((middle + tall / 2) / step, 6)) * step
    if high <= 1:
        top = min(top, 1.0)
    return bottom, max(top, bottom + step), step


def plot(name: str, lines: Sequence[Line], axis: Axis, bounds: tuple[float, float, float], chance: float | None) -> str:
    """One chart of shares. `name` is for those who can't see it; NaN points are left out."""
    bottom, top, step = bounds

    def x(share: float) -> float:
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        kept = min(max(value, bottom), top)
        return TOP + (top - kept) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(name)}">']
    for i in range(round((top - bottom) / step) + 1):
        value = bottom + i * step
        parts.append(
            f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text class="tick" x="{LEFT - 8:g}" y="{y(value) + 3.6:.1f}" text-anchor="end">{value * 100:.0f}%</text>'
        )
    floor = HEIGHT - BOTTOM
    for place, label in axis.ticks:
        parts.append(
            f'<line class="notch" x1="{x(place):.1f}" x2="{x(place):.1f}" y1="{floor:g}" y2="{floor + 4:g}"/>'
            f'<text class="tick" x="{x(place):.1f}" y="{floor + 16:g}" text-anchor="middle">{escape(label)}</text>'
        )
    parts.append(f'<text class="tick name" x="{WIDTH - RIGHT:g}" y="{HEIGHT - 8:g}" text-anchor="end">'
                 f"{escape(axis.title)}</text>")  # fmt: skip
    if axis.cut is not None:
        parts.append(f'<path class="cut" d="M{x(axis.cut) - 4:.1f} {floor + 4:g}l3 -8m3 8l3 -8"/>')
    bands, strokes = (_band(line, x, y) for line in lines), (_stroke(line, x, y) for line in lines)
    guess = _chance(chance, lines, x, y) if chance and bottom <= chance <= top else ""
    return "".join([*parts, *bands, *strokes, guess, "</svg>"])


def _chance(chance: float, lines: Sequence[Line], x: _Map, y: _Map) -> str:
    """The line of guessing; its name stands where the fewest curves pass."""
    at, name = y(chance), f"chance {chance * 100:.3g}%"
    wide = len(name) * LETTER * 0.9
    passed = [
        p for line in lines for p in _along([(x(d.x), y(d.y)) for d in line.dots if math.isfinite(d.y) and not d.void])
    ]

    def crowd(place: tuple[float, float]) -> int:
        left, base = place
        return sum(left - 3 <= a <= left + wide + 3 and base - 13 <= b <= base + 4 for a, b in passed)

    lefts = (LEFT + 4, WIDTH - RIGHT - wide - 4, (LEFT + WIDTH - RIGHT - wide) / 2)
    places = [(left, base) for left in lefts for base in (at - 4, at + 12) if TOP + 8 < base < HEIGHT - BOTTOM - 2]
    left, base = min(places, key=crowd)
    return (
        f'<line class="chance" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text class="tick halo" x="{left:.1f}" y="{base:.1f}">{name}</text>'
    )


def _along(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Points on a polyline, a few units apart."""
    yield from points
    for (a, b), (c, d) in pairwise(points):
        steps = max(1, int(math.hypot(c - a, d - b) / 4))
        yield from ((a + (c - a) * i / steps, b + (d - b) * i / steps) for i in range(1, steps))


def _band(line: Line, x: _Map, y: _Map) -> str:
    dots = [d for d in line.dots if math.isfinite(d.low) and math.isfinite(d.high) and not d.void]
    if len(dots) < 2:
        return "".join(
            f'<line class="s{line.style % STYLES} whisker" x1="{x(d.x):.1f}" x2="{x(d.x):.1f}" y1="{y(d.low):.1f}" '
            f'y2="{y(d.high):.1f}"/>'
            for d in dots
        )
    there = " ".join(f"{x(d.x):.1f},{y(d.high):.1f}" for d in dots)
    back = " ".join(f"{x(d.x):.1f},{y(d.low):.1f}" for d in reversed(dots))
    return f'<polygon class="s{line.style % STYLES} band" points="{there} {back}"/>'


def _stroke(line: Line, x: _Map, y: _Map) -> str:
    dots = [d for d in line.dots if math.isfinite(d.y) or d.void]
    pieces = [list(piece) for void, piece in groupby(dots, lambda d: d.void) if not void]
    paths = (" ".join(f"{x(d.x):.1f},{y(d.y):.1f}" for d in piece) for piece in pieces if len(piece) > 1)
    drawn = "".join(f'<polyline class="line" points="{path}"/>' for path in paths)
    places = [f"{x(d.x):.1f} {y(-math.inf if d.void else d.y):.1f}" for d in dots]
    return f'<g class="s{line.style % STYLES}">{drawn}' + "".join(
        f'<g class="dot" data-tip="{escape(d.tip)}" transform="translate({place})">'
        f'<circle class="reach" r="11"/>{BROKEN if d.broken else marker(line.style)}</g>'
        for d, place in zip(dots, places, strict=True)
    ) + "</g>"  # fmt: skip


_SHAPES = (
    '<circle class="mark" r="4"/>',
    '<rect class="mark" x="-3.7" y="-3.7" width="7.4" height="7.4"/>',
    '<path class="mark" d="M0-5L4.7 3.6H-4.7Z"/>',
    '<path class="mark" d="M0-5.2L5.2 0 0 5.2-5.2 0Z"/>',
    '<path class="mark" d="M0 5L4.7-3.6H-4.7Z"/>',
    '<path class="mark" d="M-1.7-5h3.4v3.3H5v3.4H1.7V5h-3.4V1.7H-5v-3.4h3.3Z"/>',
)
BROKEN = '<g class="broken"><circle r="6"/><path d="M-3-3L3 3M3-3L-3 3"/></g>'


def marker(style: int) -> str:
    """The marker of a series, around (0, 0)."""
    return _SHAPES[style % STYLES]


def key(style: int | None) -> str:
    """A small picture of a series' line and marker (None: of a collapse) for the legend."""
    inner = BROKEN if style is None else f'<path class="line" d="M-13 0H13"/>{marker(style)}'
    css = "" if style is None else f' class="s{style % STYLES}"'
    wide = 9 if style is None else 14
    box = f'viewBox="-{wide} -8 {2 * wide} 16" width="{2 * wide}" height="16"'
    return f'<svg class="key" {box} aria-hidden="true"><g{css}>{inner}</g></svg>'


Interval = tuple[float, float]


def lane(intervals: Sequence[Interval], css: str) -> str:
    """Times (shares of the whole) at which an actor was busy, as a strip that stretches with the page."""
    box = 'viewBox="0 0 1000 10" preserveAspectRatio="none" aria-hidden="true"'
    bars = (f'<rect x="{a * 1000:.2f}" width="{max((b - a) * 1000, 0.6):.2f}" height="10"/>' for a, b in intervals)
    return f'<svg class="lane {css}" {box}>{"".join(bars)}</svg>'
