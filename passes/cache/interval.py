"""Compute every so many steps, and copy what came of it in between: the control arm of all other policies.

Paper: DeepCache, arXiv 2312.00858 (uniform intervals).
"""

from __future__ import annotations

from optpass.passes.cache.policies import Polynomial


class Interval(Polynomial):
    """A uniform schedule."""

    name = "interval"
