"""Transform tokens many to many: selected tokens stay, the others spread over the selected ones most like them.

Paper: Token Transforming, arXiv 2506.05709. The abstract gives the form, a matrix in which a token may feed several
others; how the authors fill it is unpublished, so the scores, the temperature and the spread here are our own.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from optpass.kernels.many_to_many import Spread
from optpass.passes.base import Reduction, ReductionOptions, Site
from optpass.passes.prune import surrounded
from optpass.passes.prune.divprune import token_features
from optpass.passes.prune.selectors import AUTO, SelectorName, chosen, selectors
from optpass.rewrite import Builder
from optpass.tokens import TokenMap


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
        """The map of the chosen tokens and of the similarities to them."""
        kept = self.kept(site, b)
        selector = chosen(self.options.selector, site, b, kept)
        index = surrounded(b, selector.choose(site, b, kept).sort(1)[0] + b.prefix)  # [batch, target]
        target = b.prefix + b.suffix + kept
        attention = site.block.attention
        visible = b.visible(attention.mask) if attention is not None and attention.padded else None
        options = self.options
        factors = (token_features(site, b), index, visible, b.prefix, b.suffix, options.spread, options.temperature)
        return Spread.of(b.count, target, factors, weighs=options.proportional)
