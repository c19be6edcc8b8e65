"""Transform tokens many to many: selected tokens stay, the others spread over the selected ones most like them.

Paper: Token Transforming, arXiv 2506.05709. The abstract gives the form, a matrix in which a token may feed several
others; how the authors fill it is unpublished, so the scores, the temperature and the spread here are our own.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from optpass.passes.base import Reduction, ReductionOptions, Site
from optpass.passes.prune import surrounded
from optpass.passes.prune.divprune import token_features
from optpass.passes.prune.selectors import AUTO, SelectorName, chosen, selectors
from optpass.rewrite import Builder
from optpass.tokens import Matrix, TokenMap, one_hot

FAR = -1e4
"""A similarity that counts as none; finite also in half precision."""


class TransformOptions(ReductionOptions):
    """Options of ``transform``."""

    selector: SelectorName = Field(
        AUTO, description="which tokens stay: auto (cls-attention, or norm), " + ", ".join(selectors())
    )
    spread: int = Field(4, ge=1, description="how many tokens each of the others feeds; 1 merges it into the nearest")
    temperature: float = Field(0.1, gt=0, description="of the softmax over cosine similarities")
    proportional: bool = Field(True, description="attention weighs each token by how many it stands for")


class Transform(Reduction):
    """Select informative tokens and spread the rest over them; every token can be given back."""

    name = "transform"
    options_type = TransformOptions
    mixing = "transforming"
    identity: ClassVar[dict[str, Any]] = {"keep": 1.0}

    def build(self, site: Site, b: Builder) -> TokenMap:
        """The assignment matrix ``[batch, target, source]``; its columns sum to one."""
        kept = self.kept(site, b)
        selector = chosen(self.options.selector, site, b, kept)
        index = surrounded(b, selector.choose(site, b, kept).sort(1)[0] + b.prefix)  # [batch, target]
        target = b.prefix + b.suffix + kept
        features = token_features(site, b)
        stays = one_hot(index, b.count, torch.float32).transpose(1, 2)  # [batch, target, source]
        similar = torch.matmul(torch.matmul(stays, features), features.transpose(1, 2))
        free = self._free_rows(b, target)
        if free is not None:
            similar = similar + free
        attention = site.block.attention
        visible = b.visible(attention.mask) if attention is not None and attention.padded else None
        if visible is not None:
            seen = visible.to(torch.float32).unsqueeze(1)
            similar = similar + (torch.matmul(seen, stays.transpose(1, 2)).transpose(1, 2) - seen).abs() * FAR / 2
        if not isinstance(kept, int) or self.options.spread < kept:
            bound = similar.topk(self.options.spread, 1)[0].amin(1, keepdim=True)
            similar = torch.where(similar >= bound, similar, similar + FAR)
        weight = (similar / self.options.temperature).softmax(1)
        weight = torch.where(stays.sum(1, keepdim=True) > 0, stays, weight)
        return Matrix(b.count, target, weight, index, in_order=False, weighs=self.options.proportional)

    def _free_rows(self, b: Builder, target: Any) -> Any:
        """A penalty on protected targets, ``[1, target, 1]``: nothing flows into a class token."""
        if not b.prefix + b.suffix:
            return None
        row = b.arange(target)
        outside = (row < b.prefix) | (row >= target - b.suffix)
        return (outside.to(torch.float32) * FAR).unsqueeze(0).unsqueeze(-1)
