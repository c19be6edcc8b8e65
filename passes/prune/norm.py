"""The norm of a token's value: attention moves long values further."""

from __future__ import annotations

import torch

from optpass.passes.base import Site
from optpass.passes.prune.selectors import Selector
from optpass.rewrite import Builder
from optpass.tokens import Value


class Norm(Selector):
    """L2 norm of the value, mean over heads; of the stream about its mean where values hold other tokens as well."""

    name = "norm"

    def score(self, site: Site, b: Builder) -> Value:
        """Norms, float32."""
        attention = site.block.attention
        value = b.read(attention.value) if attention is not None else None
        if value is None:
            # about the mean: behind a norm layer all tokens of the stream are equally long
            stream = b.stream.to(torch.float32)
            return (stream - stream.mean(1, keepdim=True)).square().sum(-1).sqrt()
        return value.to(torch.float32).square().sum(-1).sqrt().mean(-1)
