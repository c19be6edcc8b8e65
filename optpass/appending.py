"""Attention that writes its new rows into the buffers it is given: the op ``optpass_step::append_attention``.

It has the meaning of ONNX Runtime's GroupQueryAttention, rotation included, which reads the kept rows and the new ones
from one buffer and takes the place of some thirty nodes of a step. As a function it returns new buffers; an engine
whose outputs lie where its inputs lie writes only the new rows. Who keeps the rows gives the room for them.

Papers: RoFormer, arXiv 2104.09864 (rotation); GQA, arXiv 2305.13245.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("optpass_step::append_attention", mutates_args=())
def append_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    start: Tensor,
    positions: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of new tokens over the rows before them, and over each other in their order.

    Args:
        query: ``[batch, heads, tokens, head_dim]``.
        key: ``[batch, groups, tokens, head_dim]``; ``heads`` is a multiple of ``groups``.
        value: of the same shape.
        past_key: ``[batch, groups, room, head_dim]``, of which the first ``start`` rows are filled.
        past_value: of the same shape.
        start: int64 ``[batch]``, where the new rows go; all of them have room.
        positions: int64 ``[batch, tokens]`` of the new tokens, for the rotation.
        cos: ``[context, head_dim / 2]``, by which query and key are rotated before they meet; or nothing.
        sin: of the same shape.
        bias: ``[batch or 1, heads or 1, tokens, room]``, added to the logits, or nothing.
        scale: of the logits.

    Returns:
        ``[batch, heads, tokens, head_dim]``, and the buffers with the new rows in them.
    """
    if cos is not None and sin is not None:
        query, key = (_rotated(x, cos[positions], sin[positions]) for x in (query, key))
    batch, heads, tokens, head_dim = query.shape
    place = start.unsqueeze(1) + torch.arange(tokens)
    index = place.unsqueeze(1).unsqueeze(-1).expand_as(key)
    present_key, present_value = past_key.scatter(2, index, key), past_value.scatter(2, index, value)
    groups, room = present_key.shape[1:3]
    rows = (query * scale).reshape(batch, groups, heads // groups * tokens, head_dim)
    scores = (rows @ present_key.transpose(-1, -2)).reshape(batch, heads, tokens, room)
    if bias is not None:
        scores = scores + bias
    seen = torch.arange(room) <= place.unsqueeze(-1)  # [batch, tokens, room]
    weights = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)
    mixed = weights.reshape(batch, groups, heads // groups * tokens, room) @ present_value
    return mixed.reshape(batch, heads, tokens, head_dim), present_key, present_value


@append_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(past_key), torch.empty_like(past_value)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each half of a vector against the other, ``cos`` and ``sin`` ``[batch, tokens, head_dim / 2]``."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
