"""How much the class token attends to each token; in a causal model, how much the last token does.

Paper: FastV, arXiv 2403.06764 (the last token's row); EViT, arXiv 2202.07800 (the class token's row).
"""

from __future__ import annotations

import torch

from optpass.errors import Place, Refusal
from optpass.passes.base import Site
from optpass.passes.prune.selectors import Selector
from optpass.rewrite import Builder
from optpass.tokens import Value


class ClsAttention(Selector):
    """One row of the attention, recomputed, mean over heads: the fused attention stays whole."""

    name = "cls-attention"

    def refuses(self, site: Site, b: Builder, count: Value) -> Refusal | None:
        """Without a class token there is no row to read; nor in joint attention with another modality."""
        attention = site.block.attention
        if attention is None or not (site.space.prefix or site.space.causal):
            what = "cls-attention needs a class token, and none is protected here"
            return Refusal("no-class-token", what, "use selector=norm or divprune", Place(site.block.path))
        if b.read(attention.query) is None or b.read(attention.key) is None:
            what = "cls-attention needs queries and keys of the pruned tokens alone"
            return Refusal("joint-attention", what, "use selector=norm or divprune", Place(site.block.path))
        return None

    def score(self, site: Site, b: Builder) -> Value:
        """Probabilities, mean over heads, float32."""
        attention = site.block.attention
        assert attention is not None
        query, key = b.read(attention.query), b.read(attention.key)  # [batch, tokens, heads, head_dim]
        assert query is not None
        assert key is not None
        row = query[:, -1:] if site.space.causal else query[:, :1]
        heads, groups, width = query.shape[2], key.shape[2], key.shape[3]
        row = row.reshape(b.batch, groups, heads // groups, width).to(torch.float32)
        keys = key.permute(0, 2, 3, 1).to(torch.float32)  # [batch, groups, head_dim, tokens]
        scale = attention.node.kwargs.get("scale")
        logits = torch.matmul(row, keys) * (scale if isinstance(scale, float) else width**-0.5)
        return logits.softmax(-1).mean(2).mean(1)
