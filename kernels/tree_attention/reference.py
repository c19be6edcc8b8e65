"""The meaning, in plain torch; with proxies it lays the same ops into a graph.

Paper: SpecInfer, arXiv 2305.09781, section 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, bias: Tensor, scale: float
) -> Tensor:
    """Attention of new tokens over kept rows and new ones; kept rows are not copied.

    Heads that share keys are rows of one product. A row of which every key is hidden by the same finite number is the
    mean of all values, as softmax has it, and no NaN.

    Args:
        query: ``[batch, heads, tokens, head_dim]``, or batch and heads in one, ``[batch * heads, tokens, head_dim]``.
        key: ``[batch, groups, tokens, head_dim]`` or in one as well; ``heads`` is a multiple of ``groups``.
        value: ``[batch, groups, tokens, value_dim]`` or in one as well.
        past_key: ``[batch, groups, past, head_dim]``; ``past`` may be 0.
        past_value: ``[batch, groups, past, value_dim]``.
        bias: ``[batch or 1, heads or 1, tokens, past + tokens]``, added to the logits: what hides keys, the mask of a
            tree among others. Finite, or ``-inf`` where the row sees another key.
        scale: of the logits.

    Returns:
        ``[batch, heads, tokens, value_dim]``, or batch and heads in one, the dtype of ``query``.
    """
    folded = query.dim() == 3
    if folded:
        query, key, value = (unfolded(x, past_key) for x in (query, key, value))
    batch, heads, tokens, head_dim = query.shape
    groups = key.shape[1]
    rows = (query * scale).reshape(batch, groups, heads // groups * tokens, head_dim)
    scores = torch.cat([rows @ past_key.transpose(-1, -2), rows @ key.transpose(-1, -2)], -1)
    past = past_key.shape[2]
    shape = (batch, heads, tokens, past + tokens)
    weights = torch.softmax(scores.reshape(shape) + bias, -1)
    weights = weights.reshape(batch, groups, heads // groups * tokens, past + tokens)
    if weights.dtype != value.dtype:
        weights = weights.to(value.dtype)
    mixed = weights[..., :past] @ past_value + weights[..., past:] @ value
    mixed = mixed.reshape(batch, heads, tokens, value.shape[-1])
    return mixed.flatten(0, 1) if folded else mixed


def unfolded(rows: Tensor, like: Tensor) -> Tensor:
    """``[batch * heads, ...]`` to ``[batch, heads, ...]``."""
    return rows.reshape(like.shape[0], -1, rows.shape[1], rows.shape[2])
