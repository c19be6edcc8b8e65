"""What a selector is. Each file beside this one holds one, and is found by being there."""

from __future__ import annotations

import functools
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator

from optpass.errors import Refusal
from optpass.passes.base import Site, scanned
from optpass.rewrite import Builder, Refused
from optpass.tokens import Value

AUTO = "auto"
"""Leaves the choice of the selector to the site."""


class Selector:
    """Chooses tokens at a site. A subclass gives ``score``, or ``choose`` where a score is not enough."""

    name: ClassVar[str]

    def refuses(self, site: Site, b: Builder, count: Value) -> Refusal | None:
        """Why the selector cannot work here."""
        return None

    def score(self, site: Site, b: Builder) -> Value:
        """``[batch or 1, tokens]``, float32, of all tokens; the highest stay."""
        raise NotImplementedError

    def choose(self, site: Site, b: Builder, count: Value) -> Value:
        """``[batch, count]``: which free tokens stay, counted from the first free one, best first."""
        score = self.score(site, b).to(torch.float32)
        score = spare(site, b, score)[:, b.prefix : b.count - b.suffix]
        if isinstance(score.shape[0], int) and score.shape[0] == 1:
            score = score.expand(b.batch, -1)
        return score.topk(count, 1)[1]


def spare(site: Site, b: Builder, score: Value) -> Value:
    """Scores with tokens of another modality in front of all others, and padding behind."""
    bound = 1e9
    attention = site.block.attention
    if attention is not None and attention.padded:
        visible = b.visible(attention.mask)
        if visible is not None:
            score = torch.where(visible, score, score - bound)
    member = site.space.members.get("image")
    if member is not None:
        inside = b.follow(member)[:, :, 0]
        score = torch.where(inside, score, score + bound)
    return score


def _known(name: str) -> str:
    if name != AUTO and name not in selectors():
        raise ValueError(f"selector={name} is none of {AUTO}, {', '.join(selectors())}")
    return name


SelectorName = Annotated[str, AfterValidator(_known)]
"""An option that names a selector, or ``auto``."""


def chosen(name: str, site: Site, b: Builder, count: Value) -> Selector:
    """The selector of a name; ``auto`` is the attention of the class or last token where it can be read, else the norm.

    Raises:
        Refused: it cannot work at this site.
    """
    if name == AUTO:
        readable = selectors()["cls-attention"]().refuses(site, b, count) is None
        name = "cls-attention" if readable else "norm"
    selector = selectors()[name]()
    refusal = selector.refuses(site, b, count)
    if refusal is not None:
        raise Refused(refusal)
    return selector


@functools.cache
def selectors() -> dict[str, type[Selector]]:
    """Every selector by name."""
    return scanned(__name__.rpartition(".")[0], Selector)
