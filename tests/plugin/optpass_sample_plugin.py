"""A third party's package: one pass, named by an entry point."""

from __future__ import annotations

from typing import Any, ClassVar

from optpass.passes.base import Reduction, ReductionOptions, Site
from optpass.rewrite import Builder
from optpass.tokens import Gather, TokenMap


class SecondOptions(ReductionOptions):
    """Options of ``keep-every-second``."""

    step: int = 2


class KeepEverySecond(Reduction):
    """Keep every n-th token."""

    name = "keep-every-second"
    options_type = SecondOptions
    identity: ClassVar[dict[str, Any]] = {"step": 1}

    def build(self, site: Site, b: Builder) -> TokenMap:
        """A gather by a fixed stride."""
        count = (b.count + self.options.step - 1) // self.options.step
        index = (b.arange(count) * self.options.step).unsqueeze(0).expand(b.batch, count)
        return Gather(b.count, count, index)
