"""The meaning, in plain torch; with proxies these functions lay the same ops into a graph.

Paper: Token Transforming, arXiv 2506.05709. The abstract gives the form, a matrix in which a token may feed several
others; how the authors fill it is unpublished, so the scores, the temperature and the spread here are our own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optpass.tokens import Matrix, arange, one_hot

FAR = -1e4
"""A similarity that counts as none; finite also in half precision."""


def weights(
    features: Tensor, index: Tensor, visible: Tensor | None, prefix: int, suffix: int, spread: int, temperature: float
) -> Tensor:
    """How much of each token goes to each of those that stay; a token that stays goes to itself.

    The others go to the ``spread`` most similar ones, and to what is as similar as the last of these, by a softmax.

    Args:
        features: ``[batch, tokens, width]``, as a rule of unit length; similarity is their product, in float32.
        index: int64 ``[batch, targets]``, the tokens that stay, none twice.
        visible: bool ``[batch or 1, tokens]``; a hidden token goes to hidden ones if it can, a seen one to seen ones.
        prefix: how many targets in front nothing else flows into.
        suffix: how many behind.
        spread: how many targets a token feeds; all where that is no less than those that are neither in front nor
            behind.
        temperature: of the softmax.

    Returns:
        float32 ``[batch, targets, tokens]``, whose columns sum to one.
    """
    x = features if features.dtype == torch.float32 else features.to(torch.float32)
    targets = index.shape[1]
    stays = one_hot(index, x.shape[1], torch.float32).transpose(1, 2)  # [batch, targets, tokens]
    similar = torch.matmul(torch.matmul(stays, x), x.transpose(1, 2))
    if prefix + suffix:
        row = arange(targets, index)
        outside = (row < prefix) | (row >= targets - suffix)
        similar = similar + (outside.to(torch.float32) * FAR).unsqueeze(0).unsqueeze(-1)
    if visible is not None:
        seen = visible.to(torch.float32).unsqueeze(1)
        similar = similar + (torch.matmul(seen, stays.transpose(1, 2)).transpose(1, 2) - seen).abs() * FAR / 2
    if bounded(targets, prefix, suffix, spread):
        bound = similar.topk(spread, 1)[0].amin(1, keepdim=True)
        similar = torch.where(similar >= bound, similar, similar + FAR)
    weight = (similar / temperature).softmax(1)
    return torch.where(stays.sum(1, keepdim=True) > 0, stays, weight)


def bounded(targets: int, prefix: int, suffix: int, spread: int) -> bool:
    """Whether there are more targets than a token feeds, or may be."""
    return not isinstance(targets, int) or spread < targets - prefix - suffix


def mix(
    x: Tensor, sizes: Tensor | None, features: Tensor, index: Tensor, visible: Tensor | None,
    prefix: int, suffix: int, spread: int, temperature: float,
) -> Tensor:  # fmt: skip
    """Each token that stays becomes the mean of what goes to it, weighted by the sizes as well.

    Args:
        x: ``[batch, tokens, features, ...]``.
        sizes: float32 ``[batch, tokens]``, positive: how many tokens each stands for; None where all are one.
        features: as ``weights`` takes it, like the following.
        index: int64 ``[batch, targets]``.
        visible: bool ``[batch or 1, tokens]``, or None.
        prefix: targets in front.
        suffix: targets behind.
        spread: targets that a token feeds.
        temperature: of the softmax.

    Returns:
        ``[batch, targets, ...]``, the dtype of ``x``.
    """
    return _map(features, index, visible, prefix, suffix, spread, temperature).carry(x, sizes)  # type: ignore[no-any-return]


def resize(
    sizes: Tensor | None, features: Tensor, index: Tensor, visible: Tensor | None,
    prefix: int, suffix: int, spread: int, temperature: float,
) -> Tensor:  # fmt: skip
    """How many tokens each one that stays stands for, float32 ``[batch, targets]``; arguments are those of ``mix``."""
    return _map(features, index, visible, prefix, suffix, spread, temperature).resize(sizes)  # type: ignore[return-value]


def back(
    y: Tensor, features: Tensor, index: Tensor, visible: Tensor | None,
    prefix: int, suffix: int, spread: int, temperature: float,
) -> Tensor:  # fmt: skip
    """Back to the tokens before: each takes of the targets as much as it gave to them.

    Args:
        y: ``[batch, targets, features, ...]``.
        features: as ``weights`` takes it, like the following.
        index: int64 ``[batch, targets]``.
        visible: bool ``[batch or 1, tokens]``, or None.
        prefix: targets in front.
        suffix: targets behind.
        spread: targets that a token feeds.
        temperature: of the softmax.

    Returns:
        ``[batch, tokens, ...]``, the dtype of ``y``.
    """
    return _map(features, index, visible, prefix, suffix, spread, temperature).restore(y)  # type: ignore[no-any-return]


def _map(
    features: Tensor, index: Tensor, visible: Tensor | None, prefix: int, suffix: int, spread: int, temperature: float
) -> Matrix:
    weight = weights(features, index, visible, prefix, suffix, spread, temperature)
    return Matrix(features.shape[1], index.shape[1], weight, index, False)
