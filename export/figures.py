"""Figures of the report as inline SVG: drawn here, without scripts, 360 units wide so that text is legible on a phone.

Colours are classes of the page, which knows light and dark. What is before the passes is hollow, what is after them
filled, so that colour is never the only difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from markupsafe import Markup

WIDTH = 360
LEFT, RIGHT = 4, 16
DOT = 6
"""Width and height that a dot takes."""


def distribution(title: str, rows: Sequence[tuple[str, Sequence[float], bool]]) -> Markup:
    """Twenty dots a row, each of them a twentieth of the calls, on one axis of milliseconds from zero.

    Args:
        title: what it shows, for those who cannot see it.
        rows: label, quantiles at 0, 5, ... 100 %, and whether it is the optimized engine.
    """
    # the slowest calls may be ten times as slow as the rest, which would press that rest together
    ticks = _ticks(max(max(quantiles[-2], quantiles[10] * 1.1) for _, quantiles, _ in rows) * 1.05)
    scale = (WIDTH - LEFT - RIGHT) / ticks[-1]
    pieces, y = [], 0.0
    for label, quantiles, after in rows:
        middles = [(low + high) / 2 * scale for low, high in pairwise(quantiles)]
        columns = [min(int(x / DOT), int(ticks[-1] * scale / DOT)) for x in middles]
        height = DOT * max(columns.count(column) for column in columns)
        y += 20
        pieces.append(_text(LEFT, y - 6, label, "label"))
        y += max(height, 12) + 4
        for place, column in enumerate(columns):
            level = columns[:place].count(column)
            x, up = LEFT + (column + 0.5) * DOT, y - (level + 0.5) * DOT
            pieces.append(_tag("circle", cx=x, cy=up, r=DOT / 2 - 0.6, **{"class": "after" if after else "before"}))
        x = LEFT + quantiles[10] * scale
        pieces.append(_tag("path", d=f"M{x:.1f} {y + 5:.1f}l-4 6h8z", **{"class": "mark"}))
        pieces.append(_tag("path", d=f"M{LEFT} {y + 0.5}H{WIDTH - RIGHT}", **{"class": "line"}))
        y += 12
    pieces += _axis(ticks, scale, 0, y, "ms")
    return _svg(title, y + 30, pieces)


def steps(title: str, before: Sequence[float], after: Sequence[float], labels: Sequence[str]) -> Markup:
    """A column for each layer: an outline for before, filled as far as it is now."""
    left, height = 40, 130
    ticks = _ticks(max(*before, *after, 1e-12), 4)
    wide = (WIDTH - left - 4) / len(before)
    gap = min(wide * 0.2, 6)
    pieces = []
    for tick in ticks:
        y = 12 + height * (1 - tick / ticks[-1])
        pieces.append(_tag("path", d=f"M{left} {y:.1f}H{WIDTH - 4}", **{"class": "grid"}))
        pieces.append(_text(left - 5, y + 4, f"{tick:g}", anchor="end"))
    every = math.ceil(len(before) / 12)
    for number, (old, new, label) in enumerate(zip(before, after, labels, strict=True)):
        x = left + number * wide + gap / 2
        for value, name in ((new, "after"), (old, "before")):
            tall = height * value / ticks[-1]
            box = {"x": x, "y": 12 + height - tall, "width": wide - gap, "height": tall}
            pieces.append(_tag("rect", **box, **{"class": name}))
        if number % every == 0:
            pieces.append(_text(x + (wide - gap) / 2, height + 27, label, anchor="middle"))
    pieces.append(_text(left - 5, height + 27, "layer", anchor="end"))
    return _svg(title, height + 34, pieces)


def pairs(title: str, rows: Sequence[tuple[str, Sequence[tuple[float, str]]]]) -> Markup:
    """Two bars a row: before and after, each with its value as text behind it."""
    ticks = _ticks(max(value for _, bars in rows for value, _ in bars))
    room = WIDTH - LEFT - 60
    pieces = []
    for number, (label, bars) in enumerate(rows):
        y = 12 + number * 42
        pieces.append(_text(LEFT, y, label, "label"))
        for offset, name, (value, text) in zip((5, 17), ("before", "after"), bars, strict=True):
            long = max(room * value / ticks[-1], 0.6)
            pieces.append(_tag("rect", x=LEFT, y=y + offset, width=long, height=9, **{"class": name}))
            pieces.append(_text(LEFT + long + 5, y + offset + 8.5, text))
    return _svg(title, len(rows) * 42, pieces)


def _axis(ticks: Sequence[float], scale: float, left: float, y: float, unit: str) -> Iterator[Markup]:
    for tick in ticks:
        x = LEFT + tick * scale
        last = tick == ticks[-1]
        yield _tag("path", d=f"M{x:.1f} {y:.1f}v5", **{"class": "line"})
        yield _text(x, y + 18, f"{tick:g} {unit}" if last else f"{tick:g}", anchor="end" if last else "middle")


def _ticks(highest: float, most: int = 5) -> list[float]:
    """Round numbers from 0 to the first one that is not below ``highest``."""
    rough = highest / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [number * step for number in range(math.ceil(highest / step - 1e-9) + 1)]


def _svg(title: str, height: float, pieces: Sequence[Markup]) -> Markup:
    head = Markup('<svg role="img" aria-label="{}" viewBox="0 0 {} {}">').format(title, WIDTH, round(height))
    return head + Markup("").join(pieces) + Markup("</svg>")


def _tag(name: str, **attributes: object) -> Markup:
    told = Markup(" ").join(
        Markup('{}="{}"').format(key, f"{value:.1f}" if isinstance(value, float) else value)
        for key, value in attributes.items()
    )
    return Markup("<{} {}/>").format(name, told)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(x, y, anchor, kind, text)
