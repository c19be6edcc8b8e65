"""Merge the most similar token pairs, each pair into its mean, weighted by what the tokens already stand for.

Paper: Token Merging, arXiv 2210.09461, sections 3 (bipartite soft matching) and 3.1 (proportional attention).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from optpass.passes.base import Reduction, ReductionOptions, Site
from optpass.passes.prune import surrounded
from optpass.passes.prune.divprune import token_features
from optpass.rewrite import Builder
from optpass.tokens import Merge as MergeMap
from optpass.tokens import TokenMap, take


class MergeOptions(ReductionOptions):
    """Options of ``merge``."""

    proportional: bool = Field(True, description="attention weighs each token by how many it stands for")


class Merge(Reduction):
    """Merge the most similar pairs of tokens; every token can be given back, so dense outputs work."""

    name = "merge"
    options_type = MergeOptions
    mixing = "merging"
    identity: ClassVar[dict[str, Any]] = {"r": 0}

    def room(self, free: int) -> int:
        """Half: each pair has one token of the even and one of the odd places."""
        return free // 2

    def build(self, site: Site, b: Builder) -> TokenMap:
        """Match even with odd tokens, merge the best pairs."""
        free = b.count - b.prefix - b.suffix
        r = free - self.kept(site, b)
        if isinstance(r, int):
            r = min(r, free // 2)
        x = token_features(site, b)
        x = x[:, b.prefix : b.count - b.suffix]
        # the maximum is taken down the columns, which engines do for many at once
        similar = torch.matmul(x[:, 1::2], x[:, 0::2].transpose(1, 2))  # [batch, odd, even]
        attention = site.block.attention
        visible = b.visible(attention.mask) if attention is not None and attention.padded else None
        if visible is not None:
            seen = visible[:, b.prefix : b.count - b.suffix]
            # padding is merged with padding alone
            similar = torch.where(seen[:, 1::2].unsqueeze(2) == seen[:, 0::2].unsqueeze(1), similar, similar - 4)
        if not isinstance(free, int):
            # one token alone has no partner: a row that nobody chooses stands in for it
            similar = b.emit.call(torch.nn.functional.pad, similar, (0, 0, 0, 1), value=-9.0)
        best, partner = similar.max(1)
        even = (free + 1) // 2
        odd = (b.arange(free - even) * 2 + 1).unsqueeze(0).expand(b.batch, free - even)
        if isinstance(even, int) and r == even:
            # every even token goes, so that nothing is left to sort and the places are constants
            index = surrounded(b, odd + b.prefix)
            moved = (b.arange(even) * 2 + b.prefix).unsqueeze(0).expand(b.batch, even)
            slot = partner + b.prefix
            return MergeMap(b.count, b.count - r, index, moved, slot, weighs=self.options.proportional)
        order = best.topk(even, 1)[1]
        # split, since the size of a slice between dynamic bounds is known to nobody
        chosen, rest = order.split_with_sizes([r, even - r], 1)
        moved, unmerged = chosen * 2, rest * 2
        # the order of tokens is kept: what comes after may depend on it, the next matching first of all
        index = surrounded(b, torch.cat([unmerged, odd], 1).sort(1)[0] + b.prefix)
        joined = take(partner, chosen) * 2 + 1
        gone = (moved.unsqueeze(1) < joined.unsqueeze(2)).to(torch.int64).sum(2)
        slot = joined - gone + b.prefix
        return MergeMap(b.count, b.count - r, index, moved + b.prefix, slot, weighs=self.options.proportional)
