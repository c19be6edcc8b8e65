"""Keep keys and values: a causal language model that continues a text without computing it again.

The model's own cache is not used: the captured graph is rewritten (``optpass.stepping``), so that any causal model
gets one. Papers: Attention Is All You Need, arXiv 1706.03762, section 3.2.3 (what a causal mask allows); PyramidInfer
and others prune inside of it, which here is the business of other passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from optpass import stepping
from optpass.causal import Causal
from optpass.passes.base import Options, Staging
from optpass.program import Stage


class CacheOptions(Options):
    """``cache`` has no options: the context is the largest length that the model was captured for."""


class Cache(Staging):
    """Keep the keys and values of a causal language model, so that each new token costs one token."""

    name = "cache"
    after: ClassVar[Sequence[str]] = ("prune", "merge", "transform")
    options_type = CacheOptions
    identity: ClassVar[dict[str, Any]] = {}

    def step(self, causal: Causal) -> Stage:
        """Continue a text by some tokens, one after the other."""
        return stepping.step(causal)
