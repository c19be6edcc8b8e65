"""The same on a GPU, without the matrix of the map.

One function finds for each token what its softmax is relative to: the least similarity that counts, the largest, and
the sum. Two others make the weights of a few targets and tokens again from these, for the products with the contents.
Similarities are made in one place and in tiles of one form, so that the bits which the bound was taken from come again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from optpass.kernels.base import Build
from optpass.kernels.many_to_many.reference import FAR, bounded
from optpass.kernels.tiles import dot

ROWS, COLUMNS, WIDTH = 32, 32, 32
"""Targets and tokens of a tile of weights, and features of one product."""

CONTENT, WARPS = 128, 8
"""Numbers of a token that one program mixes, for each such piece of them the weights are made again; and its warps."""


@triton.jit
def _similar(
    features, index, visible, row, column, targets, tokens, width, prefix, suffix,
    FAR: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Similarity less what stands against it, ``[ROWS, COLUMNS]``; and whether the token of a column is that target."""
    own = tl.load(index + row, row < targets, -1)
    similar = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, width, WIDTH):
        d = first + tl.arange(0, WIDTH)
        inside = d < width
        left = tl.load(features + own[:, None] * width + d[None, :], (row < targets)[:, None] & inside[None, :], 0.0)
        right = tl.load(
            features + column.to(tl.int64)[None, :] * width + d[:, None],
            (column < tokens)[None, :] & inside[:, None],
            0.0,
        )
        similar = dot(left, right, similar)
    similar += tl.where((row < prefix) | (row >= targets - suffix), FAR, 0.0)[:, None]
    if MASKED:
        seen = tl.load(visible + own, row < targets, 0)
        other = tl.load(visible + column, column < tokens, 0)
        similar += tl.where(seen[:, None] == other[None, :], 0.0, FAR / 2)
    return tl.where((row < targets)[:, None], similar, float("-inf")), own[:, None] == column[None, :]


@triton.jit
def _columns(
    features, index, visible, bound, top, total, stays, targets, tokens, width, visible_stride, prefix, suffix, spread,
    temperature, FAR: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr, FEEDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sample = tl.program_id(1).to(tl.int64)
    features += sample * tokens * width
    index += sample * targets
    visible += sample * visible_stride
    least = tl.full([COLUMNS], float("-inf"), tl.float32)
    most = tl.full([COLUMNS], float("-inf"), tl.float32)
    # the largest ones so far; what is beyond the spread is never the least
    place = tl.arange(0, FEEDS)
    largest = tl.full([FEEDS, COLUMNS], float("-inf"), tl.float32)
    largest = tl.where((place < spread)[:, None], largest, float("inf"))
    for start in range(0, targets, ROWS):
        row = start + tl.arange(0, ROWS)
        similar, same = _similar(
            features, index, visible, row, column, targets, tokens, width, prefix, suffix,
            FAR, MASKED, ROWS, COLUMNS, WIDTH,
        )  # fmt: skip
        most = tl.maximum(most, tl.max(similar, 0))
        if BOUNDED:
            for _ in range(tl.minimum(spread, ROWS)):
                value, at = tl.max(similar, 0, return_indices=True)
                low, where = tl.min(largest, 0, return_indices=True)
                enters = (place[:, None] == where[None, :]) & (value > low)[None, :]
                largest = tl.where(enters, value[None, :], largest)
                similar = tl.where(tl.arange(0, ROWS)[:, None] == at[None, :], float("-inf"), similar)
    if BOUNDED:
        least = tl.min(largest, 0)
    gone = tl.zeros([COLUMNS], tl.float32)
    who = tl.full([COLUMNS], -1, tl.int32)
    for start in range(0, targets, ROWS):
        row = start + tl.arange(0, ROWS)
        similar, same = _similar(
            features, index, visible, row, column, targets, tokens, width, prefix, suffix,
            FAR, MASKED, ROWS, COLUMNS, WIDTH,
        )  # fmt: skip
        similar = tl.where(similar >= least[None, :], similar, similar + FAR)
        gone += tl.sum(tl.exp((similar - most[None, :]) / temperature), 0)
        who = tl.maximum(who, tl.max(tl.where(same, row[:, None], -1), 0))
    there = column < tokens
    tl.store(bound + sample * tokens + column, least, there)
    tl.store(top + sample * tokens + column, most, there)
    tl.store(total + sample * tokens + column, gone, there)
    tl.store(stays + sample * tokens + column, who, there)


@triton.jit
def _weights(
    features, index, visible, bound, top, total, stays, row, column, targets, tokens, width, prefix, suffix,
    temperature, FAR: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of the map, ``[ROWS, COLUMNS]``, zero outside of it."""
    there = column < tokens
    similar, same = _similar(
        features, index, visible, row, column, targets, tokens, width, prefix, suffix,
        FAR, MASKED, ROWS, COLUMNS, WIDTH,
    )  # fmt: skip
    least = tl.load(bound + column, there, 0.0)
    most = tl.load(top + column, there, 0.0)
    similar = tl.where(similar >= least[None, :], similar, similar + FAR)
    weight = tl.exp((similar - most[None, :]) / temperature) / tl.load(total + column, there, 1.0)[None, :]
    weight = tl.where((tl.load(stays + column, there, -1) >= 0)[None, :], same.to(tl.float32), weight)
    return tl.where(there[None, :], weight, 0.0)


@triton.jit
def _mix(
    x, sizes, features, index, visible, bound, top, total, stays, out, targets, tokens, width, content,
    visible_stride, prefix, suffix, temperature, FAR: tl.constexpr, MASKED: tl.constexpr, SIZED: tl.constexpr,
    COUNTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CONTENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(1) * CONTENT + tl.arange(0, CONTENT)
    sample = tl.program_id(2).to(tl.int64)
    start_of = sample * tokens
    mixed = tl.zeros([ROWS, CONTENT], tl.float32)
    weighed = tl.zeros([ROWS], tl.float32)
    for start in range(0, tokens, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        weight = _weights(
            features + start_of * width, index + sample * targets, visible + sample * visible_stride,
            bound + start_of, top + start_of, total + start_of, stays + start_of, row, column, targets, tokens, width,
            prefix, suffix, temperature, FAR, MASKED, ROWS, COLUMNS, WIDTH,
        )  # fmt: skip
        if SIZED:
            weight *= tl.load(sizes + start_of + column, column < tokens, 0.0)[None, :]
        weighed += tl.sum(weight, 1)
        if not COUNTS:
            here = (column < tokens)[:, None] & (e < content)[None, :]
            contents = tl.load(x + (start_of + column)[:, None] * content + e[None, :], here, 0.0)
            mixed = dot(weight, contents.to(tl.float32), mixed)
    place = sample * targets + row
    if COUNTS:
        tl.store(out + place, weighed, row < targets)
    else:
        mixed = mixed / tl.where(row < targets, weighed, 1.0)[:, None]
        here = (row < targets)[:, None] & (e < content)[None, :]
        tl.store(out + place[:, None] * content + e[None, :], mixed.to(out.dtype.element_ty), here)


@triton.jit
def _back(
    y, features, index, visible, bound, top, total, stays, out, targets, tokens, width, content, visible_stride,
    prefix, suffix, temperature, FAR: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CONTENT: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    e = tl.program_id(1) * CONTENT + tl.arange(0, CONTENT)
    sample = tl.program_id(2).to(tl.int64)
    start_of = sample * tokens
    mixed = tl.zeros([COLUMNS, CONTENT], tl.float32)
    for start in range(0, targets, ROWS):
        row = start + tl.arange(0, ROWS)
        weight = _weights(
            features + start_of * width, index + sample * targets, visible + sample * visible_stride,
            bound + start_of, top + start_of, total + start_of, stays + start_of, row, column, targets, tokens, width,
            prefix, suffix, temperature, FAR, MASKED, ROWS, COLUMNS, WIDTH,
        )  # fmt: skip
        here = (row < targets)[:, None] & (e < content)[None, :]
        contents = tl.load(y + (sample * targets + row)[:, None] * content + e[None, :], here, 0.0)
        mixed = dot(tl.trans(weight), contents.to(tl.float32), mixed)
    here = (column < tokens)[:, None] & (e < content)[None, :]
    place = (start_of + column)[:, None] * content + e[None, :]
    tl.store(out + place, mixed.to(out.dtype.element_ty), here)


class _Map:
    """The factors as the functions take them, and what is found of each token."""

    def __init__(
        self, features: Tensor, index: Tensor, visible: Tensor | None, prefix: int, suffix: int, spread: int,
        temperature: float,
    ) -> None:  # fmt: skip
        features, index = features.contiguous(), index.contiguous()
        self.batch, self.tokens, width = features.shape
        self.targets = index.shape[1]
        seen = features if visible is None else visible.to(torch.uint8).contiguous()
        self.stride = 0 if visible is None or visible.shape[0] == 1 else self.tokens
        found = [features.new_empty((self.batch, self.tokens), dtype=torch.float32) for _ in range(3)]
        found.append(features.new_empty((self.batch, self.tokens), dtype=torch.int32))
        self.tensors = (features, index, seen, *found)
        self.sizes = (self.targets, self.tokens, width)
        self.rest = (self.stride, prefix, suffix)
        self.temperature = float(temperature)
        self.tile: dict[str, Any] = {"FAR": FAR, "MASKED": visible is not None}
        self.tile |= {"ROWS": ROWS, "COLUMNS": COLUMNS, "WIDTH": WIDTH, "num_warps": WARPS}
        wrap_triton(_columns)[(triton.cdiv(self.tokens, COLUMNS), self.batch)](
            *self.tensors, *self.sizes, *self.rest, spread, self.temperature,
            BOUNDED=bounded(self.targets, prefix, suffix, spread), FEEDS=_feeds(spread, self.targets), **self.tile,
        )  # fmt: skip

    def mix(self, x: Tensor, sizes: Tensor | None, out: Tensor, counts: bool) -> None:
        content = 1 if counts else out.shape[2]
        wrap_triton(_mix)[(triton.cdiv(self.targets, ROWS), triton.cdiv(content, CONTENT), self.batch)](
            x, x if sizes is None else sizes.contiguous(), *self.tensors, out, *self.sizes, content, *self.rest,
            self.temperature, SIZED=sizes is not None, COUNTS=counts, CONTENT=16 if counts else CONTENT, **self.tile,
        )  # fmt: skip

    def back(self, y: Tensor, out: Tensor) -> None:
        content = out.shape[2]
        wrap_triton(_back)[(triton.cdiv(self.tokens, COLUMNS), triton.cdiv(content, CONTENT), self.batch)](
            y, *self.tensors, out, *self.sizes, content, *self.rest, self.temperature, CONTENT=CONTENT, **self.tile
        )


def mix(x: Tensor, sizes: Tensor | None, *factors: Any) -> Tensor:
    """As ``reference.mix``; sums are float32 whatever the dtype."""
    flat, found = _rows(x), _Map(*factors)
    out = flat.new_empty((found.batch, found.targets, flat.shape[2]))
    found.mix(flat, sizes, out, False)
    return out.reshape((found.batch, found.targets, *x.shape[2:]))


def resize(sizes: Tensor | None, *factors: Any) -> Tensor:
    """As ``reference.resize``."""
    found = _Map(*factors)
    out = found.tensors[0].new_empty((found.batch, found.targets), dtype=torch.float32)
    found.mix(out, sizes, out, True)
    return out


def back(y: Tensor, *factors: Any) -> Tensor:
    """As ``reference.back``; sums are float32 whatever the dtype."""
    flat, found = _rows(y), _Map(*factors)
    out = flat.new_empty((found.batch, found.tokens, flat.shape[2]))
    found.back(flat, out)
    return out.reshape((found.batch, found.tokens, *y.shape[2:]))


def _rows(x: Tensor) -> Tensor:
    """``[batch, tokens, features]``, whatever the features are."""
    return x.reshape((x.shape[0], x.shape[1], -1 if x.numel() else 1)).contiguous()


def _feeds(spread: int, targets: int) -> int:
    return 1 << max((min(spread, targets) - 1).bit_length(), 1)


def builds(dtype: str) -> list[Build]:
    """Every function for one dtype."""
    signature = {name: f"*{dtype}" for name in ("x", "y", "features", "out")}
    signature |= {"sizes": "*fp32", "index": "*i64", "visible": "*u8", "stays": "*i32", "temperature": "fp32"}
    signature |= dict.fromkeys(("bound", "top", "total"), "*fp32")
    counts = ("targets", "tokens", "width", "content", "visible_stride", "prefix", "suffix", "spread")
    signature |= dict.fromkeys(counts, "i32")
    tile = {"FAR": FAR, "ROWS": ROWS, "COLUMNS": COLUMNS, "WIDTH": WIDTH}
    full = {**tile, "MASKED": True, "CONTENT": CONTENT}
    found = [
        Build(_columns, signature, {**tile, "MASKED": True, "BOUNDED": True, "FEEDS": 4}, WARPS),
        Build(_mix, signature, {**full, "SIZED": True, "COUNTS": False}, WARPS),
        Build(_back, signature, full, WARPS),
    ]
    if dtype == "fp32":
        # what is left out is left out alike in every dtype
        found.append(Build(_columns, signature, {**tile, "MASKED": False, "BOUNDED": False, "FEEDS": 2}, WARPS))
        found.append(Build(_mix, signature, {**full, "SIZED": False, "COUNTS": True, "CONTENT": 16}, WARPS))
    return found
