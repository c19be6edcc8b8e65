"""The meaning, in plain torch; with proxies these functions lay the same ops into a graph.

Paper: Token Merging, arXiv 2210.09461, sections 3 (bipartite soft matching) and 3.1 (sizes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from optpass.tokens import Merge, arange, take

APART = 4.0
"""Taken off the similarity of a seen and a hidden token: more than what unit vectors can differ by."""

NOBODY = -9.0
"""Similarity to a row that nobody chooses."""


def match(features: Tensor, visible: Tensor | None, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Match each token at an even place with the most similar one at an odd place, and merge the ``r`` best pairs.

    Of equally similar partners the one of the lowest place is taken, and of equally similar pairs the first ones.

    Args:
        features: ``[batch, tokens, width]``, as a rule of unit length; similarity is their product, in float32.
        visible: bool ``[batch or 1, tokens]``; a hidden token is merged with a hidden one if it can be.
        r: pairs to merge, at most half of the tokens.

    Returns:
        ``index`` int64 ``[batch, tokens - r]``, the tokens that stay, in order; ``moved`` int64 ``[batch, r]``, those
        merged away, the best pair first; ``slot`` int64 ``[batch, r]``, the place among those that stay which each of
        them joins.
    """
    x = features if features.dtype == torch.float32 else features.to(torch.float32)
    free = x.shape[1]
    # the maximum is taken down the columns, which engines do for many at once
    similar = torch.matmul(x[:, 1::2], x[:, 0::2].transpose(1, 2))  # [batch, odd, even]
    if visible is not None:
        seen = visible[:, 1::2].unsqueeze(2) == visible[:, 0::2].unsqueeze(1)
        similar = torch.where(seen, similar, similar - APART)
    if not isinstance(free, int) or free < 2:
        # one token alone has no partner: a row that nobody chooses stands in for it
        similar = torch.nn.functional.pad(similar, (0, 0, 0, 1), value=NOBODY)
    best, partner = similar.max(1)
    even = (free + 1) // 2
    batch = features.shape[0]
    odd = (arange(free - even, partner) * 2 + 1).unsqueeze(0).expand(batch, free - even)
    if isinstance(even, int) and isinstance(r, int) and r == even:
        # every even token goes, so that nothing is left to sort and the places are constants
        return odd, (arange(even, partner) * 2).unsqueeze(0).expand(batch, even), partner
    order = best.sort(dim=1, descending=True, stable=True)[1]
    # split, since the size of a slice between dynamic bounds is known to nobody
    chosen, rest = order.split_with_sizes([r, even - r], 1)
    moved, unmerged = chosen * 2, rest * 2
    # the order of tokens is kept: what comes after may depend on it, the next matching first of all
    index = torch.cat([unmerged, odd], 1).sort(1)[0]
    joined = take(partner, chosen) * 2 + 1
    gone = (moved.unsqueeze(1) < joined.unsqueeze(2)).to(torch.int64).sum(2)
    return index, moved, joined - gone


def merge(x: Tensor, sizes: Tensor | None, index: Tensor, moved: Tensor, slot: Tensor) -> Tensor:
    """Each token that stays becomes the mean of itself and of those that join it, weighted by their sizes.

    Args:
        x: ``[batch, tokens, features, ...]``.
        sizes: float32 ``[batch, tokens]``, positive: how many tokens each stands for; None where all are one.
        index: int64 ``[batch, stay]``, as ``match`` returns it, like the following.
        moved: int64 ``[batch, r]``.
        slot: int64 ``[batch, r]``.

    Returns:
        ``[batch, stay, ...]``, the dtype of ``x``.
    """
    return Merge(0, index.shape[1], index, moved, slot).carry(x, sizes)  # type: ignore[no-any-return]


def unmerge(y: Tensor, index: Tensor, moved: Tensor, slot: Tensor) -> Tensor:
    """Back to the tokens before: each token that was merged away takes what the one that it joined has become.

    Args:
        y: ``[batch, stay, features, ...]``.
        index: int64 ``[batch, stay]``, as ``match`` returns it, like the following.
        moved: int64 ``[batch, r]``.
        slot: int64 ``[batch, r]``.

    Returns:
        ``[batch, stay + r, ...]``.
    """
    return Merge(0, index.shape[1], index, moved, slot).restore(y)  # type: ignore[no-any-return]
