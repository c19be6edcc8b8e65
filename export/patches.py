"""Pictures of tokens: which stay, which are dropped, and which are merged with which, over the image they come from."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from markupsafe import Markup

from optpass.runtime.engines.base import Array
from optpass.runtime.maps import SiteMap, TokenMaps

CELL = 14
COLUMNS = 16
"""Tokens in a row of a strip, where there is no grid; fewer where there are fewer."""
COLOURS = 6
"""Classes of the page that outline groups."""
WHOLE = 1 - 1e-3
"""A share from which a token counts as one that was not spread."""


@dataclass(frozen=True)
class Tokens:
    """What became of the tokens of one sample at one site.

    Attributes:
        place, share: of ``SiteMap``, for this sample.
    """

    place: Array
    share: Array

    @cached_property
    def members(self) -> dict[int, list[int]]:
        """The tokens that were merged into one, by the place of that one; in the order of their first token."""
        found: dict[int, list[int]] = {}
        for token, place in enumerate(self.place):
            if place >= 0 and self.share[token] > WHOLE:
                found.setdefault(int(place), []).append(token)
        return {place: tokens for place, tokens in found.items() if len(tokens) > 1}

    def counts(self) -> dict[str, int]:
        """How many tokens stay alone, merge, spread over others and are dropped; groups, and the largest of them."""
        merged = sum(map(len, self.members.values()))
        dropped = int((self.place < 0).sum())
        spread = int(((self.place >= 0) & (self.share <= WHOLE)).sum())
        return {
            "alone": len(self.place) - merged - dropped - spread,
            "merged": merged,
            "groups": len(self.members),
            "largest": max(map(len, self.members.values()), default=0),
            "spread": spread,
            "dropped": dropped,
        }


def tokens(site: SiteMap, sample: int) -> Tokens:
    """The tokens of one sample at a site."""
    return Tokens(site.place[sample], site.share[sample])


def image(inputs: Sequence[Array], samples: int) -> Array | None:
    """The input that is an image: float ``[samples, 1 or 3, height, width]``."""
    for array in inputs:
        if array.ndim == 4 and array.dtype.kind == "f" and array.shape[1] in (1, 3) and len(array) >= samples:
            return array
    return None


def png(pixels: Array) -> str:
    """A data URI of an image ``[1 or 3, height, width]`` of any range, its least value black and its largest white."""
    low, high = float(pixels.min()), float(pixels.max())
    scaled = np.rint((pixels.astype(np.float64) - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    channels, height, width = scaled.shape
    rows = np.ascontiguousarray(scaled.transpose(1, 2, 0)).reshape(height, width * channels)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(raw, 9)) + _chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def original(maps: TokenMaps, sample: int, pixels: Array) -> Markup:
    """The image alone; pictures of the same sample show it again by its name."""
    rows, columns = _shape(maps)
    shown = Markup(
        '<image id="sample-{}" href="{}" width="{}" height="{}" preserveAspectRatio="none" '
        'style="image-rendering:pixelated"/>'
    ).format(sample, png(pixels), columns * CELL, rows * CELL)
    return _svg(maps, f"sample {sample + 1}", shown)


def picture(maps: TokenMaps, sample: int, found: Tokens, label: str, with_image: bool) -> Markup:
    """What became of the patches of one sample at one site."""
    _, columns = _shape(maps)
    first = maps.prefix if maps.grid else 0
    count = maps.grid[0] * maps.grid[1] if maps.grid else len(found.place)

    def corner(token: int) -> tuple[int, int]:
        return (token - first) % columns * CELL, (token - first) // columns * CELL

    def boxes(chosen: Sequence[int], inset: float = 0) -> str:
        side = CELL - 2 * inset
        return "".join(f"M{x + inset:g} {y + inset:g}h{side:g}v{side:g}h-{side:g}z" for x, y in map(corner, chosen))

    visible = range(first, first + count)
    pieces = [Markup('<use href="#sample-{}"/>').format(sample)] if with_image else [_path("token", boxes(visible))]
    gone = [token for token in visible if found.place[token] < 0]
    spread = [token for token in visible if found.place[token] >= 0 and found.share[token] <= WHOLE]
    drawn = (("gone", gone), ("gone hatched", gone), ("spread", spread))
    pieces += [_path(name, boxes(chosen)) for name, chosen in drawn if chosen]
    outlines: dict[int, list[int]] = {}
    counts = []
    for number, members in enumerate(found.members.values()):
        inside = [token for token in members if token in visible]
        if inside:
            outlines.setdefault(number % COLOURS, []).extend(inside)
            x, y = corner(inside[0])
            counts.append(Markup('<text x="{}" y="{}">{}</text>').format(x + CELL / 2, y + CELL - 4, len(members)))
    pieces += [_path(f"group g{colour}", boxes(chosen, 1)) for colour, chosen in outlines.items()]
    return _svg(maps, label, Markup("").join([*pieces, *counts]))


def _shape(maps: TokenMaps) -> tuple[int, int]:
    if maps.grid:
        return maps.grid
    count = maps.sites[0].place.shape[1]
    return -(-count // COLUMNS), min(count, COLUMNS)


def _path(kind: str, data: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(kind, data)


def _svg(maps: TokenMaps, label: str, inside: Markup) -> Markup:
    rows, columns = _shape(maps)
    head = Markup('<svg class="patches" role="img" aria-label="{}" viewBox="0 0 {} {}">')
    return head.format(label, columns * CELL, rows * CELL) + inside + Markup("</svg>")


def summary(maps: TokenMaps) -> list[dict[str, object]]:
    """For each site its place, its pass, and what became of the tokens of each sample."""
    return [
        {
            "path": site.path,
            "name": site.name,
            "tokens": site.tokens,
            "samples": [tokens(site, sample).counts() for sample in range(len(site.place))],
        }
        for site in maps.sites
    ]
