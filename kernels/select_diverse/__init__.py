"""The tokens that are most unlike each other, one after the other: the op ``optpass::select_diverse``.

Papers: DivPrune, CVPR 2025 (greedy max-min); Carbonell and Goldstein, SIGIR 1998 (maximal marginal relevance).
"""

from __future__ import annotations

from typing import Any

import torch

from optpass.kernels.base import FLOATS, Checker, Kernel, shape_of
from optpass.kernels.select_diverse import reference


def _check(features: Any, bias: Any, count: Any, weight: Any, apart: Any) -> None:
    check = Checker("select_diverse")
    check.tensor("features", features, (None, None, None), FLOATS)
    batch, tokens, _ = shape_of(features)
    check.tensor("bias", bias, (batch, tokens), (torch.float32,))
    check.range("count", count, 1, tokens)
    if not 0 <= weight < float("inf"):
        raise check.fail(f"got weight={weight}", "pass a number that is not negative")


def _meta(features: Any, bias: Any, count: Any, weight: Any, apart: Any) -> Any:
    return features.new_empty((features.shape[0], count), dtype=torch.int64)


select_diverse = Kernel(
    "select_diverse",
    reference=reference.select,
    check=_check,
    meta=_meta,
    launcher="optpass.kernels.select_diverse.triton:select",
)
