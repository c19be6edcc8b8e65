"""The meaning, in plain torch; with proxies it lays the same ops into a graph, one argmax a step.

Papers: DivPrune, CVPR 2025; Carbonell and Goldstein, The Use of MMR, SIGIR 1998.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optpass.tokens import arange, take

FAR = 1e30
"""Distance of a token to itself, where the nearest other one is looked for."""

CHOSEN = 1e10
"""Taken off the bias of a token that was chosen: more than what biases differ by."""


def select(features: Tensor, bias: Tensor, count: int, weight: float, apart: bool) -> Tensor:
    """Choose tokens one by one: each next one by its ``bias`` plus ``weight`` times how far all chosen ones are.

    That is its distance to the nearest of them; the distance of two tokens is one less their product, in float32.
    DivPrune is a weight of 1 and ``apart``. Maximal marginal relevance with its ``lambda`` is a bias of ``lambda``
    times the relevance, a weight of ``1 - lambda``, and not ``apart``. Of equal tokens that of the lowest place wins.

    Args:
        features: ``[batch, tokens, width]``; the caller makes them of unit length, for distances of cosines.
        bias: float32 ``[batch, tokens]``, within 4e9: what speaks for a token by itself.
        count: tokens to choose, ``1 <= count <= tokens``.
        weight: of the distance, not negative.
        apart: the first token is chosen by its distance to the nearest other one; else by its bias alone.

    Returns:
        int64 ``[batch, count]``, none twice, best first.
    """
    x = features if features.dtype == torch.float32 else features.to(torch.float32)
    distance = 1 - torch.matmul(x, x.transpose(1, 2))  # [batch, tokens, tokens]
    order = arange(x.shape[1], bias).unsqueeze(0)
    nearest = torch.where(order == order.transpose(0, 1), FAR, distance).amin(-1) if apart else None
    chosen: list[Tensor] = []
    for step in range(count):
        if step:
            row = take(distance, chosen[-1]).squeeze(1)
            nearest = row if nearest is None or step == 1 else torch.minimum(nearest, row)
            bias = bias - (order == chosen[-1]).to(torch.float32) * CHOSEN
        score = bias
        if nearest is not None:
            score = nearest + bias if weight == 1 else nearest * weight + bias
        chosen.append(score.argmax(1, keepdim=True))
    return torch.cat(chosen, 1)
