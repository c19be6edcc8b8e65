"""What the Triton faces share."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(left, right, total):
    """``total`` plus a product, summed in float32; products of half precisions are exact in it, on either path."""
    if INTERPRETED:
        # the interpreter multiplies the bits of bfloat16, for which numpy has no type
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")
