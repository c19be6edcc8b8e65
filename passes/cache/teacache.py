"""Compute when what the first block reads has changed enough since the last computed step, summed over the steps.

Paper: Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, arXiv 2411.19108.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from optpass.passes.cache.policies import Polynomial, PolynomialOptions, State, change
from optpass.runtime.features import THRESHOLD


class TeaCacheOptions(PolynomialOptions):
    """Options of ``teacache``."""

    warmup: int = Field(1, ge=1, description="first steps, which are computed")
    streak: int = Field(1000, ge=0, description="most steps in a row that are predicted; 0 predicts none")
    threshold: float = Field(0.2, ge=0, description="change at which a step is computed; 0 computes all")
    coefficients: list[float] = Field(
        [1.0, 0.0], description="polynomial that turns change of the input into that of the output, highest power first"
    )


class TeaCache(Polynomial):
    """The change of the modulated input of the first block, through a fitted polynomial."""

    name = "teacache"
    options_type = TeaCacheOptions
    probe = "modulated"

    def start(self, features: Sequence[Tensor], probes: Sequence[Tensor]) -> dict[str, Tensor]:
        """Adds the last probe, and the change that has added up."""
        return super().start(features, probes) | {"probe": torch.zeros_like(probes[0]), "change": torch.zeros(1)}

    def due(self, state: State, probes: Sequence[Tensor]) -> Tensor:
        """Whether the change has reached the threshold with this step, or is no number."""
        return ~(self._added(state, probes) < state[THRESHOLD])

    def _added(self, state: State, probes: Sequence[Tensor]) -> Tensor:
        relative = change(probes[0], state["probe"])
        found = torch.zeros(1)
        for coefficient in self.options.coefficients:
            found = found * relative + coefficient
        return state["change"] + found

    def computed(self, state: State, features: Sequence[Tensor], probes: Sequence[Tensor]) -> dict[str, Tensor]:
        """The sum starts anew."""
        return super().computed(state, features, probes) | {"probe": probes[0], "change": torch.zeros(1)}

    def predicted(self, state: State, probes: Sequence[Tensor]) -> dict[str, Tensor]:
        """The probe is that of this step: the sum is along the way."""
        return {"probe": probes[0], "change": self._added(state, probes)}
