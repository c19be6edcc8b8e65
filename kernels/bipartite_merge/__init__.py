"""Bipartite matching of tokens, the size-weighted merge of the pairs, and the way back.

Three ops: ``optpass::bipartite_match``, ``optpass::bipartite_merge`` and ``optpass::bipartite_unmerge``.

Paper: Token Merging, arXiv 2210.09461.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from optpass.kernels.base import FLOATS, Checker, Kernel, shape_of
from optpass.kernels.bipartite_merge import reference
from optpass.tokens import Merge, Value


def _check_match(features: Any, visible: Any, r: Any) -> None:
    check = Checker("bipartite_match")
    check.tensor("features", features, (None, None, None), FLOATS)
    batch, tokens, _ = shape_of(features)
    if visible is not None:
        check.tensor("visible", visible, (None if shape_of(visible)[:1] == (1,) else batch, tokens), (torch.bool,))
    check.range("r", r, 0, tokens // 2 if isinstance(tokens, int) else None)


def _check_pairs(check: Checker, batch: Any, index: Any, moved: Any, slot: Any) -> None:
    check.tensor("index", index, (batch, None), (torch.int64,))
    check.tensor("moved", moved, (batch, None), (torch.int64,))
    check.tensor("slot", slot, (batch, shape_of(moved)[1]), (torch.int64,))


def _check_merge(x: Any, sizes: Any, index: Any, moved: Any, slot: Any) -> None:
    check = Checker("bipartite_merge")
    check.tensor("x", x, (None, None, None, ...), FLOATS)
    batch, tokens = shape_of(x)[:2]
    _check_pairs(check, batch, index, moved, slot)
    stay, r = shape_of(index)[1], shape_of(moved)[1]
    if all(isinstance(size, int) for size in (tokens, stay, r)) and stay + r != tokens:
        what = f"got {tokens} tokens, of which {stay} stay and {r} go"
        raise check.fail(what, "pass the index and moved that bipartite_match made of these tokens")
    if sizes is not None:
        check.tensor("sizes", sizes, (batch, tokens), (torch.float32,))


def _check_unmerge(y: Any, index: Any, moved: Any, slot: Any) -> None:
    check = Checker("bipartite_unmerge")
    check.tensor("y", y, (None, None, None, ...), FLOATS)
    batch, stay = shape_of(y)[:2]
    _check_pairs(check, batch, index, moved, slot)
    check.tensor("index", index, (batch, stay), (torch.int64,))


def _meta_match(features: Any, visible: Any, r: Any) -> Any:
    batch, tokens, _ = features.shape
    sizes = (tokens - r, r, r)
    return tuple(features.new_empty((batch, size), dtype=torch.int64) for size in sizes)


def _meta_merge(x: Any, sizes: Any, index: Any, moved: Any, slot: Any) -> Any:
    return x.new_empty((x.shape[0], index.shape[1], *x.shape[2:]))


def _meta_unmerge(y: Any, index: Any, moved: Any, slot: Any) -> Any:
    return y.new_empty((y.shape[0], index.shape[1] + moved.shape[1], *y.shape[2:]))


bipartite_match = Kernel(
    "bipartite_match",
    reference=reference.match,
    check=_check_match,
    meta=_meta_match,
    launcher="optpass.kernels.bipartite_merge.triton:match",
)

bipartite_merge = Kernel(
    "bipartite_merge",
    reference=reference.merge,
    check=_check_merge,
    meta=_meta_merge,
    launcher="optpass.kernels.bipartite_merge.triton:merge",
)

bipartite_unmerge = Kernel(
    "bipartite_unmerge",
    reference=reference.unmerge,
    check=_check_unmerge,
    meta=_meta_unmerge,
    launcher="optpass.kernels.bipartite_merge.triton:unmerge",
)


@dataclass(frozen=True)
class Pairs(Merge):
    """The map of a match: contents are merged and given back by the kernels."""

    def carry(self, x: Value, sizes: Value | None = None) -> Value:
        if x.dtype not in FLOATS:
            return super().carry(x, sizes)
        return bipartite_merge(x, sizes, self.index, self.moved, self.slot)

    def restore(self, y: Value, stale: Value | None = None) -> Value:
        if y.dtype not in FLOATS:
            return super().restore(y, stale)
        return bipartite_unmerge(y, self.index, self.moved, self.slot)
