"""The most diverse tokens: each next one is farthest from all chosen before (greedy max-min, cosine distance).

Paper: DivPrune, CVPR 2025. Chosen tokens are masked, so that duplicates are never chosen twice.
"""

from __future__ import annotations

import torch

from optpass.errors import Place, Refusal
from optpass.passes.base import Site
from optpass.passes.prune.selectors import Selector, spare
from optpass.rewrite import Builder
from optpass.tokens import Value, take

LIMIT = 1024
"""Steps of the greedy loop, which is unrolled into the graph."""


class DivPrune(Selector):
    """Greedy farthest point on the keys, or on the stream where the block's keys hold other tokens as well."""

    name = "divprune"

    def refuses(self, site: Site, b: Builder, count: Value) -> Refusal | None:
        """The loop is unrolled: its length must be known, and bounded."""
        place = Place(site.block.path)
        if not isinstance(count, int):
            what = "divprune needs a number of tokens that is known when the graph is built"
            return Refusal("symbolic-count", what, "make the length static, or use selector=norm or random", place)
        if count > LIMIT:
            what = f"divprune would unroll {count} steps, more than {LIMIT}"
            return Refusal("too-many-steps", what, "keep fewer tokens, or use selector=norm or random", place)
        return None

    def choose(self, site: Site, b: Builder, count: Value) -> Value:
        """The greedy loop, one argmax a step."""
        free = b.count - b.prefix - b.suffix
        if count == free:
            return b.arange(free).unsqueeze(0).expand(b.batch, free)
        x = token_features(site, b)[:, b.prefix : b.count - b.suffix]
        distance = 1 - torch.matmul(x, x.transpose(1, 2))  # [batch, free, free]
        bias = spare(site, b, b.stream[:, :, 0].to(torch.float32) * 0.0)[:, b.prefix : b.count - b.suffix]
        farthest = (distance + 4 * b.eye(free)).amin(-1)  # to the nearest other token
        order = b.arange(free).unsqueeze(0)
        chosen = []
        for step in range(count):
            pick = (farthest + bias).argmax(1, keepdim=True)  # [batch, 1]
            chosen.append(pick)
            bias = bias - (order == pick).to(torch.float32) * 1e10
            row = take(distance, pick).squeeze(1)
            farthest = torch.minimum(farthest, row) if step else row
        return torch.cat(chosen, 1)


def token_features(site: Site, b: Builder) -> Value:
    """Unit vectors to tell tokens apart, ``[batch, tokens, width]``: the mean key of the heads, or the stream."""
    attention = site.block.attention
    key = b.read(attention.key) if attention is not None else None
    x = b.stream.to(torch.float32) if key is None else key.to(torch.float32).mean(2)
    return x / x.square().sum(-1, keepdim=True).clamp(1e-12).sqrt()
