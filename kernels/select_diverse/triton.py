"""The same on a GPU.

One program chooses all tokens of a sample: it keeps how far each token is from those chosen, and computes one row of
similarities a step. The distances to the nearest other token, which the first choice takes, ask for all rows, and are
the work of many programs before. No matrix of similarities is ever held.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from optpass.kernels.base import Build
from optpass.kernels.tiles import dot

ROWS, COLUMNS, WIDTH = 32, 32, 32
"""Tokens of a program, tokens it looks at in one go, and features of one product."""

TOKENS, FEATURES, WARPS = 128, 64, 8
"""Tokens of a step that are compared in one go, features of them in one go, and warps of the program that chooses."""


@triton.jit
def _nearest(features, nearest, tokens, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = tl.program_id(1).to(tl.int64)
    features += sample * tokens * width
    found = tl.full([ROWS], float("inf"), tl.float32)
    for start in range(0, tokens, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        similar = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, width, WIDTH):
            d = first + tl.arange(0, WIDTH)
            left = tl.load(
                features + row[:, None] * width + d[None, :], (row < tokens)[:, None] & (d < width)[None, :], 0.0
            )
            right = tl.load(
                features + column[None, :] * width + d[:, None], (column < tokens)[None, :] & (d < width)[:, None], 0.0
            )
            similar = dot(left, right, similar)
        other = (column < tokens)[None, :] & (row[:, None] != column[None, :])
        found = tl.minimum(found, tl.min(tl.where(other, 1 - similar, float("inf")), 1))
    tl.store(nearest + sample * tokens + row, found, row < tokens)


@triton.jit
def _choose(
    features, bias, nearest, out, weight, tokens, width, count,
    APART: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    features += sample * tokens * width
    bias += sample * tokens
    nearest += sample * tokens
    last = 0
    for step in range(count):
        top = float("-inf")
        best = 0
        for start in range(0, tokens, TOKENS):
            token = start + tl.arange(0, TOKENS)
            there = token < tokens
            own = tl.load(bias + token, there, float("-inf"))
            if step > 0:
                similar = tl.zeros([TOKENS], tl.float32)
                for first in range(0, width, FEATURES):
                    d = first + tl.arange(0, FEATURES)
                    asked = tl.load(features + last * width + d, d < width, 0.0).to(tl.float32)
                    rows = tl.load(
                        features + token[:, None] * width + d[None, :], there[:, None] & (d < width)[None, :], 0.0
                    )
                    similar += tl.sum(rows.to(tl.float32) * asked[None, :], 1)
                held = tl.load(nearest + token, there & (step > 1), float("inf"))
                # one that was chosen is nearest of all, for good
                held = tl.where(token == last, float("-inf"), tl.minimum(held, 1 - similar))
                tl.store(nearest + token, held, there)
                score = tl.where(held == float("-inf"), held, held * weight + own)
            elif APART:
                score = tl.load(nearest + token, there, 0.0) * weight + own
            else:
                score = own
            value, at = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
            best = tl.where(value > top, start + at, best)
            top = tl.maximum(value, top)
        tl.store(out + sample * count + step, best)
        last = best
        # what this step has stored is read in the next, by other threads maybe
        tl.debug_barrier()


def select(features: Tensor, bias: Tensor, count: int, weight: float, apart: bool) -> Tensor:
    """As ``reference.select``."""
    features = features.contiguous()
    batch, tokens, width = features.shape
    nearest = features.new_empty((batch, tokens), dtype=torch.float32)
    out = features.new_empty((batch, count), dtype=torch.int64)
    if apart:
        wrap_triton(_nearest)[(triton.cdiv(tokens, ROWS), batch)](
            features, nearest, tokens, width, ROWS=ROWS, COLUMNS=COLUMNS, WIDTH=WIDTH
        )
    wrap_triton(_choose)[(batch,)](
        features, bias.contiguous(), nearest, out, float(weight), tokens, width, count,
        APART=apart, TOKENS=TOKENS, FEATURES=FEATURES, num_warps=WARPS,
    )  # fmt: skip
    return out


def builds(dtype: str) -> list[Build]:
    """Every function for one dtype."""
    signature = {"features": f"*{dtype}", "bias": "*fp32", "nearest": "*fp32", "out": "*i64", "weight": "fp32"}
    signature |= dict.fromkeys(("tokens", "width", "count"), "i32")
    tile = {"TOKENS": TOKENS, "FEATURES": FEATURES}
    return [
        Build(_nearest, signature, {"ROWS": ROWS, "COLUMNS": COLUMNS, "WIDTH": WIDTH}),
        *(
            Build(_choose, signature, {"APART": apart, **tile}, WARPS)
            for apart in (False, True)
            if apart or dtype == "fp32"
        ),
    ]
