"""Tokens that matter and are unlike each other: relevance against similarity to what was chosen (greedy, cosine).

Paper: Carbonell and Goldstein, The Use of MMR, SIGIR 1998, maximal marginal relevance. The relevance there is that to a
query; here it is the score of ``auto``, as a share of the largest one.
"""

from __future__ import annotations

import torch

from optpass.kernels.select_diverse import select_diverse
from optpass.passes.base import Site
from optpass.passes.prune.divprune import DivPrune
from optpass.passes.prune.selectors import AUTO, chosen
from optpass.rewrite import Builder
from optpass.tokens import Value

LAMBDA = 0.5
"""Weight of the relevance; the rest is that of being unlike the tokens that were chosen."""


class Mmr(DivPrune):
    """Maximal marginal relevance: the attention of the class or last token where it can be read, else the norm."""

    name = "mmr"

    def greedy(self, site: Site, b: Builder, x: Value, bias: Value, count: Value) -> Value:
        """The most relevant token first."""
        score = chosen(AUTO, site, b, count).score(site, b)[:, b.prefix : b.count - b.suffix]
        # padding and tokens of another modality have no part in what the largest one is
        share = torch.where(bias == 0, score, 0.0)
        share = share / share.amax(1, keepdim=True).clamp(1e-12)
        return select_diverse(x, share * LAMBDA + bias, count, 1 - LAMBDA, False)
