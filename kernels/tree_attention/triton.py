"""The same on a GPU.

Few tokens look at many kept rows, so the rows are cut into pieces, each the work of one program, whose sums a second
function joins: by the largest logit of each piece, as a softmax in one go has it. The new tokens are the last piece.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from optpass.kernels.base import Build
from optpass.kernels.tiles import dot
from optpass.kernels.tree_attention.reference import unfolded

ROWS, COLUMNS, PIECE = 16, 32, 512
"""Queries of a program, keys it looks at in one go, and kept rows of a piece."""


@triton.jit
def _look(
    asked, key, value, bias, key_stride, value_stride, start, stop, seen, scale, width, depth,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sums over keys, from ``start`` to ``stop``: weighted values, weights, and the logit both are relative to."""
    d, e = tl.arange(0, WIDTH), tl.arange(0, DEPTH)
    mixed = tl.zeros([ROWS, DEPTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for first in range(start, stop, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        there = column < stop
        keys = tl.load(
            key + column.to(tl.int64)[None, :] * key_stride + d[:, None], there[None, :] & (d < width)[:, None], 0.0
        )
        hides = tl.load(bias[:, None] + column[None, :], seen[:, None] & there[None, :], 0.0).to(tl.float32)
        logits = dot(asked, keys, tl.zeros([ROWS, COLUMNS], tl.float32)) * scale + hides
        logits = tl.where(there[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        # until a key is seen that is not hidden by -inf nothing counts
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(logits - base[:, None])
        faded = tl.exp(top - base)
        values = tl.load(
            value + column.to(tl.int64)[:, None] * value_stride + e[None, :], there[:, None] & (e < depth)[None, :], 0.0
        )
        mixed = dot(weights.to(values.dtype), values, mixed * faded[:, None])
        total = total * faded + tl.sum(weights, 1)
        top = higher
    return mixed, total, top


@triton.jit
def _piece(
    query, key, value, past_key, past_value, bias, mixed, total, top, scale, heads, groups, tokens, past, width, depth,
    key_batch, key_head, key_row, value_batch, value_head, value_row, bias_batch, bias_head,
    PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    piece, pieces = tl.program_id(1), tl.num_programs(1)
    lead = tl.program_id(2).to(tl.int64)
    sample, group = lead // groups, lead % groups
    rows = heads // groups * tokens
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d, e = tl.arange(0, WIDTH), tl.arange(0, DEPTH)
    seen = row < rows
    inside = seen[:, None] & (d < width)[None, :]
    asked = tl.load(query + (lead * rows + row)[:, None] * width + d[None, :], inside, 0.0)
    head = group * (heads // groups) + row // tokens
    hides = bias + sample * bias_batch + head * bias_head + (row % tokens).to(tl.int64) * (past + tokens)
    if piece < pieces - 1:
        found, weight, highest = _look(
            asked, past_key + sample * key_batch + group * key_head, past_value + sample * value_batch
            + group * value_head, hides, key_row, value_row, piece * PIECE, tl.minimum(piece * PIECE + PIECE, past),
            seen, scale, width, depth, ROWS, COLUMNS, WIDTH, DEPTH,
        )  # fmt: skip
    else:
        found, weight, highest = _look(
            asked, key + lead * tokens * width, value + lead * tokens * depth, hides + past, width, depth, 0, tokens,
            seen, scale, width, depth, ROWS, COLUMNS, WIDTH, DEPTH,
        )  # fmt: skip
    place = (lead * pieces + piece) * rows + row
    tl.store(mixed + place[:, None] * depth + e[None, :], found, seen[:, None] & (e < depth)[None, :])
    tl.store(total + place, weight, seen)
    tl.store(top + place, highest, seen)


@triton.jit
def _join(mixed, total, top, out, rows, pieces, depth, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    lead = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, DEPTH)
    seen = row < rows
    inside = seen[:, None] & (e < depth)[None, :]
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    for piece in range(pieces):
        highest = tl.maximum(highest, tl.load(top + (lead * pieces + piece) * rows + row, seen, 0.0))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    found = tl.zeros([ROWS, DEPTH], tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    for piece in range(pieces):
        place = (lead * pieces + piece) * rows + row
        share = tl.exp(tl.load(top + place, seen, 0.0) - base)
        weight += share * tl.load(total + place, seen, 1.0)
        found += share[:, None] * tl.load(mixed + place[:, None] * depth + e[None, :], inside, 0.0)
    result = found / tl.where(weight > 0, weight, 1.0)[:, None]
    tl.store(out + (lead * rows + row)[:, None] * depth + e[None, :], result.to(out.dtype.element_ty), inside)


def attend(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, bias: Tensor, scale: float
) -> Tensor:
    """As ``reference.attend``; sums are float32 whatever the dtype, and a row that sees nothing but ``-inf`` is 0."""
    shape = (*query.shape[:-1], past_value.shape[-1])
    if query.dim() == 3:
        query, key, value = (unfolded(x, past_key) for x in (query, key, value))
    batch, heads, tokens, width = query.shape
    groups, past, depth = past_key.shape[1], past_key.shape[2], past_value.shape[3]
    rows, leads, pieces = heads // groups * tokens, batch * groups, triton.cdiv(past, PIECE) + 1
    past_key, past_value = (_rows(x) for x in (past_key, past_value))
    bias = bias.contiguous()
    steps = [stride if size > 1 else 0 for size, stride in zip(bias.shape[:2], bias.stride()[:2], strict=True)]
    mixed = query.new_empty((leads, pieces, rows, depth), dtype=torch.float32)
    total, top = (query.new_empty((leads, pieces, rows), dtype=torch.float32) for _ in range(2))
    out = query.new_empty((batch, heads, tokens, depth))
    blocks: dict[str, Any] = {"ROWS": ROWS, "DEPTH": max(triton.next_power_of_2(depth), 16)}
    wrap_triton(_piece)[(triton.cdiv(rows, ROWS), pieces, leads)](
        query.contiguous(), key.contiguous(), value.contiguous(), past_key, past_value, bias, mixed, total, top,
        scale, heads, groups, tokens, past, width, depth, *past_key.stride()[:3], *past_value.stride()[:3], *steps,
        PIECE=PIECE, COLUMNS=COLUMNS, WIDTH=max(triton.next_power_of_2(width), 16), **blocks,
    )  # fmt: skip
    wrap_triton(_join)[(triton.cdiv(rows, ROWS), leads)](mixed, total, top, out, rows, pieces, depth, **blocks)
    return out.reshape(shape)


def _rows(kept: Tensor) -> Tensor:
    """Kept rows as they lie, a part of a larger buffer as a rule; copied only where a row is not in one piece."""
    return kept if kept.stride(-1) == 1 or kept.shape[-1] == 1 else kept.contiguous()


def builds(dtype: str) -> list[Build]:
    """Every function for one dtype."""
    signature = {name: f"*{dtype}" for name in ("query", "key", "value", "past_key", "past_value", "bias", "out")}
    signature |= dict.fromkeys(("mixed", "total", "top"), "*fp32") | {"scale": "fp32"}
    counts = ("heads", "groups", "tokens", "past", "width", "depth", "rows", "pieces")
    strides = [f"{name}_{axis}" for name in ("key", "value") for axis in ("batch", "head", "row")]
    signature |= dict.fromkeys((*counts, *strides, "bias_batch", "bias_head"), "i32")
    tile = {"ROWS": ROWS, "DEPTH": 64}
    piece = Build(_piece, signature, {**tile, "PIECE": PIECE, "COLUMNS": COLUMNS, "WIDTH": 64})
    return [piece, Build(_join, signature, tile)]
