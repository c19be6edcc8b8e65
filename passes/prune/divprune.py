"""The most diverse tokens: each next one is farthest from all chosen before (greedy max-min, cosine distance).

Paper: DivPrune, CVPR 2025. Chosen tokens are masked, so that duplicates are never chosen twice.
"""

from __future__ import annotations

import torch

from optpass.errors import Place, Refusal
from optpass.kernels.select_diverse import select_diverse
from optpass.passes.base import Site
from optpass.passes.prune.selectors import Selector, spare
from optpass.rewrite import Builder
from optpass.tokens import Value

LIMIT = 1024
"""Steps of the greedy loop, which is unrolled into the graph."""


class DivPrune(Selector):
    """Greedy farthest point on the keys, or on the stream where the block's keys hold other tokens as well."""

    name = "divprune"

    def refuses(self, site: Site, b: Builder, count: Value) -> Refusal | None:
        """The loop is unrolled: its length must be known, and bounded."""
        place = Place(site.block.path)
        if not isinstance(count, int):
            what = f"{self.name} needs a number of tokens that is known when the graph is built"
            return Refusal("symbolic-count", what, "make the length static, or use selector=norm or random", place)
        if count > LIMIT:
            what = f"{self.name} would unroll {count} steps, more than {LIMIT}"
            return Refusal("too-many-steps", what, "keep fewer tokens, or use selector=norm or random", place)
        return None

    def choose(self, site: Site, b: Builder, count: Value) -> Value:
        """The greedy loop, one argmax a step."""
        free = b.count - b.prefix - b.suffix
        if count == free:
            return b.arange(free).unsqueeze(0).expand(b.batch, free)
        x = token_features(site, b)[:, b.prefix : b.count - b.suffix]
        bias = spare(site, b, b.stream[:, :, 0].to(torch.float32) * 0.0)[:, b.prefix : b.count - b.suffix]
        return self.greedy(site, b, x, bias, count)

    def greedy(self, site: Site, b: Builder, x: Value, bias: Value, count: Value) -> Value:
        """Farthest of all first; ``bias`` ``[batch, free]`` puts tokens in front of all others, or behind."""
        return select_diverse(x, bias, count, 1.0, True)


def token_features(site: Site, b: Builder) -> Value:
    """Unit vectors to tell tokens apart, ``[batch, tokens, width]``: the mean key of the heads, or the stream."""
    attention = site.block.attention
    key = b.read(attention.key) if attention is not None else None
    x = b.stream.to(torch.float32) if key is None else key.to(torch.float32).mean(2)
    return x / x.square().sum(-1, keepdim=True).clamp(1e-12).sqrt()
