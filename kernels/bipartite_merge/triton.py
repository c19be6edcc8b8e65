"""The same on a GPU.

The matching never holds a matrix of similarities: each program keeps the best partner of a few tokens. Where the
reference sorts, places are counted, so that equal values are in order of their places on every GPU. The merge is a
product with a matrix of zeros and ones made on the fly: no atomics, the same sums in each run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from optpass.kernels.base import Build
from optpass.kernels.bipartite_merge.reference import APART
from optpass.kernels.tiles import dot

ROWS, COLUMNS, WIDTH = 32, 32, 32
"""Tokens of a program, tokens it looks at in one go, and features of one product."""


@triton.jit
def _best(
    features, visible, best, partner, tokens, width, visible_stride,
    APART: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    even, odd = (tokens + 1) // 2, tokens // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = tl.program_id(1).to(tl.int64)
    features += sample * tokens * width
    visible += sample * visible_stride
    top = tl.full([ROWS], float("-inf"), tl.float32)
    who = tl.zeros([ROWS], tl.int32)
    for start in range(0, odd, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        similar = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, width, WIDTH):
            d = first + tl.arange(0, WIDTH)
            inside = d < width
            left = tl.load(
                features + 2 * row[:, None] * width + d[None, :], (row < even)[:, None] & inside[None, :], 0.0
            )
            right = tl.load(
                features + (2 * column + 1)[None, :] * width + d[:, None],
                (column < odd)[None, :] & inside[:, None],
                0.0,
            )
            similar = dot(left, right, similar)
        if MASKED:
            seen = tl.load(visible + 2 * row, row < even, 0)
            other = tl.load(visible + 2 * column + 1, column < odd, 0)
            similar = tl.where(seen[:, None] == other[None, :], similar, similar - APART)
        similar = tl.where((column < odd)[None, :], similar, float("-inf"))
        value, at = tl.max(similar, 1, return_indices=True, return_indices_tie_break_left=True)
        who = tl.where(value > top, start + at, who)
        top = tl.maximum(value, top)
    tl.store(best + sample * even + row, top, row < even)
    tl.store(partner + sample * even + row, who, row < even)


@triton.jit
def _rank(best, rank, moved, tokens, r, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    even = (tokens + 1) // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = tl.program_id(1).to(tl.int64)
    best += sample * even
    own = tl.load(best + row, row < even, float("-inf"))
    before = tl.zeros([ROWS], tl.int32)
    for start in range(0, even, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        other = tl.load(best + column, column < even, float("-inf"))
        first = (other[None, :] > own[:, None]) | ((other[None, :] == own[:, None]) & (column[None, :] < row[:, None]))
        before += tl.sum((first & (column < even)[None, :]).to(tl.int32), 1)
    # where every even token goes they are in order of their places
    before = tl.where(r == even, row, before)
    tl.store(rank + sample * even + row, before, row < even)
    tl.store(moved + sample * r + before, (2 * row).to(tl.int64), (row < even) & (before < r))


@triton.jit
def _place(rank, partner, index, slot, tokens, r, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    even = (tokens + 1) // 2
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = tl.program_id(1).to(tl.int64)
    rank += sample * even
    is_even = (token % 2 == 0) & (token < tokens)
    own = tl.load(rank + token // 2, is_even, r)
    joined = 2 * tl.load(partner + sample * even + token // 2, is_even, 0) + 1
    before, before_joined = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    for start in range(0, even, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        goes = tl.load(rank + column, column < even, r) < r
        before += tl.sum((goes[None, :] & (2 * column[None, :] < token[:, None])).to(tl.int32), 1)
        before_joined += tl.sum((goes[None, :] & (2 * column[None, :] < joined[:, None])).to(tl.int32), 1)
    stays = (token < tokens) & (own >= r)
    tl.store(index + sample * (tokens - r) + token - before, token.to(tl.int64), stays)
    tl.store(slot + sample * r + own, (joined - before_joined).to(tl.int64), own < r)


@triton.jit
def _merge(
    x, sizes, index, moved, slot, out, tokens, stay, r, width,
    SIZED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    sample = tl.program_id(2).to(tl.int64)
    x += sample * tokens * width
    sizes += sample * tokens
    source = tl.load(index + sample * stay + row, row < stay, 0)
    here = (row < stay)[:, None] & (d < width)[None, :]
    mixed = tl.load(x + source[:, None] * width + d[None, :], here, 0.0).to(tl.float32)
    total = tl.full([ROWS], 1.0, tl.float32)
    if SIZED:
        total = tl.load(sizes + source, row < stay, 1.0)
        mixed *= total[:, None]
    for start in range(0, r, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        joins = tl.load(slot + sample * r + column, column < r, -1)
        away = tl.load(moved + sample * r + column, column < r, 0)
        weight = (joins[None, :] == row[:, None]).to(tl.float32)
        if SIZED:
            weight *= tl.load(sizes + away, column < r, 0.0)[None, :]
        there = (column < r)[:, None] & (d < width)[None, :]
        gone = tl.load(x + away[:, None] * width + d[None, :], there, 0.0).to(tl.float32)
        mixed = dot(weight, gone, mixed)
        total += tl.sum(weight, 1)
    result = (mixed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (sample * stay + row)[:, None] * width + d[None, :], result, here)


@triton.jit
def _unmerge(y, index, moved, slot, out, stay, r, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    sample = tl.program_id(2).to(tl.int64)
    stays, goes = row < stay, (row >= stay) & (row < stay + r)
    nth = row - stay
    source = tl.where(stays, row, tl.load(slot + sample * r + nth, goes, 0))
    place = tl.where(stays, tl.load(index + sample * stay + row, stays, 0), tl.load(moved + sample * r + nth, goes, 0))
    here = (stays | goes)[:, None] & (d < width)[None, :]
    found = tl.load(y + (sample * stay + source)[:, None] * width + d[None, :], here)
    tl.store(out + (sample * (stay + r) + place)[:, None] * width + d[None, :], found, here)


def match(features: Tensor, visible: Tensor | None, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.match``."""
    features = features.contiguous()
    batch, tokens, width = features.shape
    even = (tokens + 1) // 2
    best = features.new_empty((batch, even), dtype=torch.float32)
    partner, rank = (features.new_empty((batch, even), dtype=torch.int32) for _ in range(2))
    sizes = (tokens - r, r, r)
    index, moved, slot = (features.new_empty((batch, size), dtype=torch.int64) for size in sizes)
    seen = features if visible is None else visible.to(torch.uint8).contiguous()
    stride = 0 if visible is None or visible.shape[0] == 1 else tokens
    grid = (triton.cdiv(even, ROWS), batch)
    wrap_triton(_best)[grid](
        features, seen, best, partner, tokens, width, stride,
        APART=APART, MASKED=visible is not None, ROWS=ROWS, COLUMNS=COLUMNS, WIDTH=WIDTH,
    )  # fmt: skip
    wrap_triton(_rank)[grid](best, rank, moved, tokens, r, ROWS=ROWS, COLUMNS=COLUMNS)
    grid = (triton.cdiv(tokens, ROWS), batch)
    wrap_triton(_place)[grid](rank, partner, index, slot, tokens, r, ROWS=ROWS, COLUMNS=COLUMNS)
    return index, moved, slot


def merge(x: Tensor, sizes: Tensor | None, index: Tensor, moved: Tensor, slot: Tensor) -> Tensor:
    """As ``reference.merge``; sums are float32 whatever the dtype."""
    flat = _rows(x)
    batch, tokens, width = flat.shape
    stay, r = index.shape[1], moved.shape[1]
    out = flat.new_empty((batch, stay, width))
    weights = flat if sizes is None else sizes.contiguous()
    grid = (triton.cdiv(stay, ROWS), triton.cdiv(width, WIDTH), batch)
    wrap_triton(_merge)[grid](
        flat, weights, index.contiguous(), moved.contiguous(), slot.contiguous(), out, tokens, stay, r, width,
        SIZED=sizes is not None, ROWS=ROWS, COLUMNS=COLUMNS, WIDTH=WIDTH,
    )  # fmt: skip
    return out.reshape((batch, stay, *x.shape[2:]))


def unmerge(y: Tensor, index: Tensor, moved: Tensor, slot: Tensor) -> Tensor:
    """As ``reference.unmerge``, bit by bit."""
    flat = _rows(y)
    batch, stay, width = flat.shape
    r = moved.shape[1]
    out = flat.new_empty((batch, stay + r, width))
    grid = (triton.cdiv(stay + r, ROWS), triton.cdiv(width, WIDTH), batch)
    wrap_triton(_unmerge)[grid](
        flat, index.contiguous(), moved.contiguous(), slot.contiguous(), out, stay, r, width, ROWS=ROWS, WIDTH=WIDTH
    )
    return out.reshape((batch, stay + r, *y.shape[2:]))


def _rows(x: Tensor) -> Tensor:
    """``[batch, tokens, features]``, whatever the features are."""
    return x.reshape((x.shape[0], x.shape[1], -1 if x.numel() else 1)).contiguous()


def builds(dtype: str) -> list[Build]:
    """Every function for one dtype."""
    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    sizes = dict.fromkeys(("tokens", "width", "visible_stride", "stay", "r"), "i32")
    best = {"features": f"*{dtype}", "visible": "*u8", "best": "*fp32", "partner": "*i32", **sizes}
    pairs = {"index": "*i64", "moved": "*i64", "slot": "*i64", "rank": "*i32", "best": "*fp32", "partner": "*i32"}
    contents = {"x": f"*{dtype}", "y": f"*{dtype}", "out": f"*{dtype}", "sizes": "*fp32", **pairs, **sizes}
    return [
        *(Build(_best, best, {**tile, "WIDTH": WIDTH, "APART": APART, "MASKED": masked}) for masked in (False, True)),
        *(Build(function, {**pairs, **sizes}, tile) for function in (_rank, _place) if dtype == "fp32"),
        *(Build(_merge, contents, {**tile, "WIDTH": WIDTH, "SIZED": sized}) for sized in (False, True)),
        Build(_unmerge, contents, {"ROWS": ROWS, "WIDTH": WIDTH}),
    ]
