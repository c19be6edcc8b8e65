"""The many-to-many map of tokens: selected ones stay, the others spread over those most like them.

Three ops, none of which holds the matrix of the map on a GPU: ``optpass::many_to_many``,
``optpass::many_to_many_sizes`` and ``optpass::many_to_many_back``.

Paper: Token Transforming, arXiv 2506.05709; the weights are our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from optpass.kernels.base import FLOATS, Checker, Kernel, is_kept, shape_of
from optpass.kernels.many_to_many import reference
from optpass.tokens import Matrix, Value


def _check_factors(
    check: Checker, features: Any, index: Any, visible: Any, prefix: Any, suffix: Any, spread: Any, temperature: Any
) -> None:
    check.tensor("features", features, (None, None, None), FLOATS)
    batch, tokens, _ = shape_of(features)
    check.tensor("index", index, (batch, None), (torch.int64,))
    targets = shape_of(index)[1]
    if isinstance(targets, int) and isinstance(tokens, int) and targets > tokens:
        what = f"got {tokens} tokens, of which {targets} stay"
        raise check.fail(what, "pass an index of different tokens of the features")
    if visible is not None:
        check.tensor("visible", visible, (None if shape_of(visible)[:1] == (1,) else batch, tokens), (torch.bool,))
    check.range("prefix", prefix, 0, targets)
    check.range("suffix", suffix, 0, targets - prefix if isinstance(targets, int) else None)
    if spread < 1:
        raise check.fail(f"got spread={spread}", "pass a number of tokens that each of the others feeds, 1 or more")
    if not 0 < temperature < float("inf"):
        raise check.fail(f"got temperature={temperature}", "pass a positive number")


def _check_mix(x: Any, sizes: Any, *factors: Any) -> None:
    check = Checker("many_to_many")
    _check_factors(check, *factors)
    batch, tokens, _ = shape_of(factors[0])
    check.tensor("x", x, (batch, tokens, None, ...), FLOATS)
    if sizes is not None:
        check.tensor("sizes", sizes, (batch, tokens), (torch.float32,))


def _check_sizes(sizes: Any, *factors: Any) -> None:
    check = Checker("many_to_many_sizes")
    _check_factors(check, *factors)
    if sizes is not None:
        check.tensor("sizes", sizes, shape_of(factors[0])[:2], (torch.float32,))


def _check_back(y: Any, *factors: Any) -> None:
    check = Checker("many_to_many_back")
    _check_factors(check, *factors)
    check.tensor("y", y, (*shape_of(factors[1]), None, ...), FLOATS)


def _meta_mix(x: Any, sizes: Any, features: Any, index: Any, *rest: Any) -> Any:
    return x.new_empty((*index.shape, *x.shape[2:]))


def _meta_sizes(sizes: Any, features: Any, index: Any, *rest: Any) -> Any:
    return features.new_empty(index.shape, dtype=torch.float32)


def _meta_back(y: Any, features: Any, *rest: Any) -> Any:
    return y.new_empty((*features.shape[:2], *y.shape[2:]))


many_to_many = Kernel(
    "many_to_many",
    reference=reference.mix,
    check=_check_mix,
    meta=_meta_mix,
    launcher="optpass.kernels.many_to_many.triton:mix",
)

many_to_many_sizes = Kernel(
    "many_to_many_sizes",
    reference=reference.resize,
    check=_check_sizes,
    meta=_meta_sizes,
    launcher="optpass.kernels.many_to_many.triton:resize",
)

many_to_many_back = Kernel(
    "many_to_many_back",
    reference=reference.back,
    check=_check_back,
    meta=_meta_back,
    launcher="optpass.kernels.many_to_many.triton:back",
)


@dataclass(frozen=True)
class Spread(Matrix):
    """The map by its factors, the arguments of the kernels.

    A graph that keeps kernels has the ops, each of which makes the weights anew. Any other has the matrix, made once.
    """

    factors: tuple[Any, ...] = ()

    @classmethod
    def of(cls, source: Any, target: Any, factors: tuple[Any, ...], weighs: bool) -> Spread:
        """The map of these factors: features, index, visible, prefix, suffix, spread and temperature."""
        return cls(source, target, reference.weights(*factors), factors[1], False, weighs, factors)

    def carry(self, x: Value, sizes: Value | None = None) -> Value:
        if not is_kept() or x.dtype not in FLOATS:
            return super().carry(x, sizes)
        return many_to_many(x, sizes, *self.factors)

    def restore(self, y: Value, stale: Value | None = None) -> Value:
        if not is_kept() or y.dtype not in FLOATS:
            return super().restore(y, stale)
        return many_to_many_back(y, *self.factors)

    def resize(self, sizes: Value | None) -> Value | None:
        return many_to_many_sizes(sizes, *self.factors) if is_kept() else super().resize(sizes)
