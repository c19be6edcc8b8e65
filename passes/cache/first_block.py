"""Compute when what the first block adds to the stream differs enough from the last computed step.

First-block cache of the ParaAttention project, and DBCache of cache-dit with one block in front; no paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from optpass.passes.cache.policies import Polynomial, PolynomialOptions, State, change
from optpass.runtime.features import THRESHOLD


class FirstBlockOptions(PolynomialOptions):
    """Options of ``first-block``."""

    warmup: int = Field(1, ge=1, description="first steps, which are computed")
    streak: int = Field(1000, ge=0, description="most steps in a row that are predicted; 0 predicts none")
    threshold: float = Field(0.08, ge=0, description="difference at which a step is computed; 0 computes all")


class FirstBlock(Polynomial):
    """The residual of the first block, which is computed in every step."""

    name = "first-block"
    options_type = FirstBlockOptions
    probe = "first-block"

    def start(self, features: Sequence[Tensor], probes: Sequence[Tensor]) -> dict[str, Tensor]:
        """Adds the probe of the last computed step."""
        return super().start(features, probes) | {"probe": torch.zeros_like(probes[0])}

    def due(self, state: State, probes: Sequence[Tensor]) -> Tensor:
        """Whether the difference has reached the threshold, or is no number."""
        return ~(change(probes[0], state["probe"]) < state[THRESHOLD])

    def computed(self, state: State, features: Sequence[Tensor], probes: Sequence[Tensor]) -> dict[str, Tensor]:
        """The probe is kept."""
        return super().computed(state, features, probes) | {"probe": probes[0]}
