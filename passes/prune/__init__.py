"""Drop tokens: keep those that a selector scores highest, and every protected one.

Papers: DivPrune (CVPR 2025), FastV (arXiv 2403.06764) and the value norm of token pruning surveys, one selector each.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from optpass.errors import Place, Refusal
from optpass.passes.base import Reduction, ReductionOptions, Site
from optpass.passes.prune.selectors import AUTO, SelectorName, chosen, selectors
from optpass.rewrite import Builder, Refused
from optpass.structure import Structure
from optpass.tokens import Gather, TokenMap, Value


class PruneOptions(ReductionOptions):
    """Options of ``prune``."""

    selector: SelectorName = Field(
        AUTO, description="how tokens are chosen: auto (cls-attention, or norm), " + ", ".join(selectors())
    )


class Prune(Reduction):
    """Drop all but a fraction of the tokens; the order of those that stay is kept."""

    name = "prune"
    options_type = PruneOptions
    identity: ClassVar[dict[str, Any]] = {"keep": 1.0}

    def default_at(self, structure: Structure) -> int | str | list[int | str]:
        """One site in a causal model, whose prompt has served by then; the common three elsewhere."""
        assert structure.main is not None
        if structure.main.space.causal and self.options.r is None:
            return len(structure.main.blocks) // 2
        return super().default_at(structure)

    def free(self, site: Site, b: Builder) -> Value:
        """Where one modality was scattered into another, its tokens alone are free."""
        span = site.space.spans.get("image")
        if span is None or not isinstance(b.count, int):
            return super().free(site, b)
        return max(span[1] - (site.space.size - b.count), 1)

    def build(self, site: Site, b: Builder) -> TokenMap:
        """A gather of the chosen tokens."""
        kept = self.kept(site, b)
        selector = chosen(self.options.selector, site, b, kept)
        outside = b.count - b.prefix - b.suffix
        spared = outside - self.free(site, b)
        if self.options.keep == 1 and isinstance(kept, int) and kept == 0:
            raise Refused(
                Refusal("no-room", "prune finds no free token", "leave this block out", Place(site.block.path))
            )
        inner = selector.choose(site, b, kept + spared).sort(1)[0]
        index = surrounded(b, inner + b.prefix)
        return Gather(b.count, b.prefix + b.suffix + kept + spared, index)


def surrounded(b: Builder, inner: Value) -> Value:
    """``inner`` ``[batch, kept]`` with the protected tokens in front of it and behind."""
    pieces = [inner]
    if b.prefix:
        pieces.insert(0, _range(b, 0, b.prefix))
    if b.suffix:
        pieces.append(_range(b, b.count - b.suffix, b.count))
    return torch.cat(pieces, 1) if len(pieces) > 1 else inner


def _range(b: Builder, start: Value, stop: Value) -> Value:
    return b.arange(start, stop).unsqueeze(0).expand(b.batch, stop - start)
