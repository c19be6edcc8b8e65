"""Merge the most similar token pairs, each pair into its mean, weighted by what the tokens already stand for.

Paper: Token Merging, arXiv 2210.09461, sections 3 (bipartite soft matching) and 3.1 (proportional attention).
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from optpass.kernels.bipartite_merge import Pairs, bipartite_match
from optpass.passes.base import Reduction, ReductionOptions, Site
from optpass.passes.prune import surrounded
from optpass.passes.prune.divprune import token_features
from optpass.rewrite import Builder
from optpass.tokens import TokenMap


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
        x = token_features(site, b)[:, b.prefix : b.count - b.suffix]
        attention = site.block.attention
        visible = b.visible(attention.mask) if attention is not None and attention.padded else None
        seen = None if visible is None else visible[:, b.prefix : b.count - b.suffix]
        inner, moved, slot = bipartite_match(x, seen, r)
        index = surrounded(b, inner + b.prefix)
        return Pairs(b.count, b.count - r, index, moved + b.prefix, slot + b.prefix, weighs=self.options.proportional)
