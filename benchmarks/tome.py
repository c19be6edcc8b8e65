"""The peer: Token Merging as its authors' patch does it, in eager torch, by gather and scatter.

Paper: Token Merging: Your ViT But Faster, arXiv 2210.09461. Written from the paper for these benchmarks: after the
attention of each block, ``r`` tokens of the even places are merged into the odd ones whose keys are most like theirs;
tokens carry sizes, and attention adds the logarithm of a key's size to its logits. Two liberties in the peer's favour:
attention is torch's fused one, where the patch multiplies matrices one by one, and no bias is added before the first
merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """A pre-norm transformer block, its parts as the model has them; ``qkv`` gives ``[batch, heads, tokens, dim]``."""

    norm1: Layer
    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    out: Layer
    norm2: Layer
    mlp: Layer


@dataclass(frozen=True)
class Parts:
    """A vision transformer whose first token is a class token."""

    embed: Layer
    blocks: Sequence[Block]
    head: Layer


@dataclass(frozen=True)
class Match:
    """Which even tokens stay, which go, and the odd token that each of those joins; ``[batch, count, 1]`` each."""

    unmerged: Tensor
    source: Tensor
    target: Tensor


def match(key: Tensor, r: int) -> Match:
    """Bipartite soft matching on ``[batch, tokens, width]``; the class token, at place 0, is never merged away."""
    key = key / key.norm(dim=-1, keepdim=True)
    scores = key[:, ::2] @ key[:, 1::2].transpose(1, 2)
    scores[:, 0, :] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(-1, descending=True).unsqueeze(-1)
    source = order[:, :r]
    # in order again, which keeps the class token in front
    unmerged = order[:, r:].sort(1)[0]
    return Match(unmerged, source, partner.unsqueeze(-1).gather(1, source))


def summed(x: Tensor, found: Match) -> Tensor:
    """Tokens after the merge, those that were merged added up; scatter with a mean is exported wrongly."""
    width = x.shape[-1]
    even, odd = x[:, ::2], x[:, 1::2]
    stay = even.gather(1, found.unmerged.expand(-1, -1, width))
    away = even.gather(1, found.source.expand(-1, -1, width))
    joined = odd.scatter_reduce(1, found.target.expand(-1, -1, width), away, reduce="sum")
    return torch.cat([stay, joined], 1)


def merged(x: Tensor, sizes: Tensor, found: Match) -> tuple[Tensor, Tensor]:
    """The mean of what is merged, weighted by size, and the new sizes ``[batch, tokens, 1]``."""
    total = summed(sizes, found)
    return summed(x * sizes, found) / total, total


class TokenMerging(nn.Module):
    """A model with Token Merging in its blocks.

    Args:
        model: owner of the modules; kept so that its weights are parameters here too.
        parts: the same, taken apart.
        r: tokens to merge in each block, as in the authors' patch: at most half, and none in blocks not listed.
    """

    def __init__(self, model: nn.Module, parts: Parts, r: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.parts = parts
        self.r = [*r, *[0] * (len(parts.blocks) - len(r))]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images to logits."""
        x = self.parts.embed(pixel_values)
        sizes = x.new_ones(x.shape[0], x.shape[1], 1)
        merged_before = False
        for block, asked in zip(self.parts.blocks, self.r, strict=True):
            query, key, value = block.qkv(block.norm1(x))
            bias = sizes.log().transpose(1, 2).unsqueeze(1) if merged_before else None
            mixed = F.scaled_dot_product_attention(query, key, value, bias)
            x = x + block.out(mixed.transpose(1, 2).flatten(2))
            r = min(asked, (x.shape[1] - 1) // 2)
            if r > 0:
                x, sizes = merged(x, sizes, match(key.mean(1), r))
                merged_before = True
            x = x + block.mlp(block.norm2(x))
        return self.parts.head(x)
