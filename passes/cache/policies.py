"""What a policy of feature caching is: when a step is computed, and what features are where it is not.

A policy keeps its state as named tensors between steps and computes on them in plain torch, which is traced into the
graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from optpass.passes.base import Options, scanned
from optpass.runtime.features import COUNT, SINCE, STEP, counter

State = Mapping[str, Tensor]

Probe = Literal["", "modulated", "first-block"]
"""What a policy is shown in each step: nothing, what the first layer of the first block reads, or what that block adds
to the stream, which then is computed in each step."""


class PolicyOptions(Options):
    """Options that all policies share."""

    warmup: int = Field(3, ge=1, description="first steps, which are computed")
    streak: int = Field(3, ge=0, description="most steps in a row that are predicted; 0 predicts none")


class PolynomialOptions(PolicyOptions):
    """Options of the policies that predict by a polynomial."""

    order: int = Field(0, ge=0, le=4, description="degree of the polynomial that predicts features; 0 is a copy")
    basis: Literal["newton", "taylor"] = Field(
        "newton", description="divided differences, exact at any distances, or those of TaylorSeer"
    )


class Policy:
    """When to compute and what to predict; one file each.

    The state that ``optpass.runtime.features`` tells of is kept for all policies, the options ``warmup``, ``streak``
    and ``threshold`` among it, so that an engine may run with other ones; what is named here is a policy's own.


    Attributes:
        name: as in ``cache(policy=...)``.
        probe: what it is shown.
        whole: by default the output of the model is predicted, not the stream behind its blocks.
        needs: computed steps before the first that is predicted.
    """

    name: ClassVar[str]
    options_type: ClassVar[type[PolicyOptions]] = PolicyOptions
    probe: ClassVar[Probe] = ""
    whole: ClassVar[bool] = False
    needs: ClassVar[int] = 1

    def __init__(self, options: Any) -> None:
        self.options = options

    def start(self, features: Sequence[Tensor], probes: Sequence[Tensor]) -> dict[str, Tensor]:
        """The state before the first step: zeros, so that a driver makes it by its shapes alone."""
        raise NotImplementedError

    def due(self, state: State, probes: Sequence[Tensor]) -> Tensor | None:
        """Whether this step has to be computed, bool ``[1]``; None where what is counted is all.

        A policy that is shown nothing is asked as soon as the step before is done.
        """
        return None

    def predict(self, state: State) -> list[Tensor]:
        """The features of this step, by the last computed ones."""
        raise NotImplementedError

    def score(self, state: State) -> Tensor | None:
        """How little a prediction of each token is worth, ``[batch, tokens]``; None where all are alike."""
        return None

    def computed(self, state: State, features: Sequence[Tensor], probes: Sequence[Tensor]) -> dict[str, Tensor]:
        """The state behind a computed step, all of it."""
        raise NotImplementedError

    def predicted(self, state: State, probes: Sequence[Tensor]) -> dict[str, Tensor]:
        """What changes in the state behind a step that was predicted."""
        return {}


class Polynomial(Policy):
    """Predicts by a polynomial through the features of the last computed steps; by default of degree 0, a copy.

    Paper: TaylorSeers, arXiv 2503.06923, equation 7, which divides all differences by the last distance; Newton's form
    with the true ones is exact for polynomials up to ``order``.
    """

    options_type: ClassVar[type[PolicyOptions]] = PolynomialOptions

    def start(self, features: Sequence[Tensor], probes: Sequence[Tensor]) -> dict[str, Tensor]:
        """Differences of each feature up to the order, and the steps that they were taken at, newest first."""
        order = self.options.order
        found = {f"difference_{f}_{i}": torch.zeros_like(x) for f, x in enumerate(features) for i in range(order + 1)}
        return found | {"times": torch.zeros(order + 1, dtype=torch.int32)}

    def predict(self, state: State) -> list[Tensor]:
        """The polynomial at this step."""
        count = sum(name.startswith("difference_") and name.endswith("_0") for name in state)
        return [self._at(state, f) for f in range(count)]

    def _at(self, state: State, feature: int) -> Tensor:
        away = (counter(state, STEP) - state["times"]).to(torch.float32)
        found = state[f"difference_{feature}_0"]
        weight = torch.ones(1)
        for i in range(1, self.options.order + 1):
            weight = weight * (away[i - 1 : i] if self.newton else away[:1] / i)
            found = found + weight * state[f"difference_{feature}_{i}"]
        return found

    def score(self, state: State) -> Tensor | None:
        """How much each token last moved beyond what the polynomial of one degree less foresaw."""
        order = self.options.order
        return state[f"difference_0_{order}"].norm(dim=-1) if order else None

    @property
    def newton(self) -> bool:
        """Whether differences are divided by their own distances."""
        return bool(self.options.basis == "newton")

    def computed(self, state: State, features: Sequence[Tensor], probes: Sequence[Tensor]) -> dict[str, Tensor]:
        """Differences to the steps before; those that reach back further than there were steps are zero."""
        times, step, count = state["times"], counter(state, STEP), counter(state, COUNT)
        found: dict[str, Tensor] = {}
        for f, new in enumerate(features):
            found[f"difference_{f}_0"] = new
            for i in range(1, self.options.order + 1):
                at = i - 1 if self.newton else 0
                distance = (step - times[at : at + 1]).to(torch.float32).clamp(min=1)
                new = torch.where(count >= i, (new - state[f"difference_{f}_{i - 1}"]) / distance, 0.0)
                found[f"difference_{f}_{i}"] = new
        return found | {"times": torch.cat([step, times[:-1]])}


def since(state: State) -> Tensor:
    """Steps since the last computed one, float ``[1]``; at least 1 where anything is predicted."""
    found: Tensor = counter(state, SINCE).to(torch.float32)
    return found


def change(new: Tensor, old: Tensor) -> Tensor:
    """Mean distance relative to the mean of ``old``, the largest of all samples, ``[1]``.

    Each sample is looked at by itself, so that what else is in a batch makes no step less exact.
    """
    distance = (new - old).abs().flatten(1).mean(1)
    each = distance / old.abs().flatten(1).mean(1).clamp(min=1e-12)
    # engines do not agree on which is larger, a number or what is none
    return torch.where(each.isnan(), torch.inf, each).amax(0, keepdim=True)


def policies() -> dict[str, type[Policy]]:
    """Every policy by name."""
    return scanned("optpass.passes.cache", Policy)
