"""A fixed random subset: the control arm that every other selector has to beat."""

from __future__ import annotations

import torch

from optpass.passes.base import Site
from optpass.passes.prune.selectors import Selector
from optpass.rewrite import Builder
from optpass.tokens import Value


class Random(Selector):
    """The same tokens for every sample and call; another subset at each site."""

    name = "random"

    def score(self, site: Site, b: Builder) -> Value:
        """Hashed positions."""
        return hashed(b.arange(b.count), site.number).unsqueeze(0)


def hashed(position: Value, seed: int) -> Value:
    """Float32 in [0, 2**24), one for each position; integers alone, so that every engine draws the same."""
    mixed = (position * 1_664_525 + (seed + 1) * 1_013_904_223) % 4_294_967_296
    mixed = ((mixed // 65_536) * 22_695_477 + mixed) % 2_147_483_648
    return ((mixed // 128 + mixed) % 16_777_216).to(torch.float32)
