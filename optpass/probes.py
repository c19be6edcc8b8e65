"""Is a rewrite structurally right? Three probes that need no data and tolerate nothing but rounding.

Identity: at its identity setting a pass changes nothing. Permutation: with each map replaced by a random permutation of
the free tokens, restored at the outputs, nothing changes. Equivalence: the tokens chosen at the real setting, marked in
the full program instead of moved, give the same outputs: dropped ones hidden as keys, merged ones set to their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from optpass.follow import places, tapped, then
from optpass.rewrite import Build, Builder, Rewritten
from optpass.tokens import Averaged, Gather, Masked, TokenMap

TOLERANCE = 2e-5
"""Of a probe, relative to the largest output: float32 rounds each of some hundred ops in a row by 6e-8 of its value."""


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest absolute difference of any output; NaN in one of two counts as infinite, unequal shapes too."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            return float("inf")
        if x.numel():
            x, y = x.double(), y.double()
            gap = torch.where(x.isfinite() & y.isfinite(), (x - y).abs(), torch.where(_alike(x, y), 0.0, float("inf")))
            worst = max(worst, float(gap.max()))
    return worst


def relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of an output, relative to its largest value; integers must be equal."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        gap = difference([a], [b])
        largest = float(b.double().abs().masked_fill(~b.isfinite(), 0).amax()) if b.numel() else 1.0
        worst = max(worst, gap / max(largest, 1e-9) if b.is_floating_point() else math.inf if gap else 0.0)
    return worst


def _alike(x: Tensor, y: Tensor) -> Tensor:
    return (x == y) | (x.isnan() & y.isnan())


def tolerance(reference: Sequence[Tensor]) -> float:
    """What a probe may differ by, for outputs of this size."""
    largest = max((float(x.double().abs().nan_to_num(posinf=0).max()) for x in reference if x.numel()), default=1.0)
    return TOLERANCE * max(largest, 1e-9)


@torch.no_grad()
def run(module: GraphModule, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Outputs of a rewritten graph, executed eagerly."""
    return tuple(module(*inputs))


def permutation(seed: int) -> Build:
    """A map that shuffles the free tokens of each sample in its own way."""

    def build(b: Builder) -> TokenMap:
        free = b.count - b.prefix - b.suffix
        place = b.arange(free)
        sample = b.arange(b.batch)
        noise = ((place.unsqueeze(0) + 1) * 7919 * (sample.unsqueeze(1) * 31 + seed + 17)) % 104_729
        order = noise.argsort(1) + b.prefix
        front = b.arange(b.prefix).unsqueeze(0).expand(b.batch, b.prefix)
        back = b.arange(b.count - b.suffix, b.count).unsqueeze(0).expand(b.batch, b.suffix)
        return Gather(b.count, b.count, torch.cat([front, order, back], 1), in_order=False, bijective=True)

    return build


def references(rewritten: Rewritten, taps: Sequence[Tensor]) -> list[Build] | None:
    """What the equivalence probe puts in the place of each map, in the space before all; None where it has none."""
    builds: list[Build] = []
    alive: Tensor | None = None  # [batch, root tokens], the current token that each root token is part of, or -1
    leader: Tensor | None = None  # [batch, tokens now], the root token that each current token stands on
    for number, (token_map, values) in enumerate(zip(rewritten.maps, tapped(rewritten, taps), strict=True)):
        place = places(token_map, values)
        if place is None or not token_map.proportional:
            return None
        if alive is None or leader is None:
            alive = torch.arange(place.shape[1]).expand(len(place), -1).clone()
            leader = alive.clone()
        leader = leader.gather(1, values["index"])
        alive = then(alive, place)
        if isinstance(token_map, Gather):
            builds.append(constant(Masked, number, kept=alive >= 0))
        else:
            own = -1 - torch.arange(alive.shape[1]).expand_as(alive)
            stands = torch.where(alive >= 0, leader.gather(1, alive.clamp(0)), torch.arange(alive.shape[1]))
            builds.append(constant(Averaged, number, group=torch.where(alive >= 0, alive, own), index=stands))
    return builds


def constant(kind: type[TokenMap], number: int, **tensors: Tensor) -> Build:
    """A map of given tensors, ``[batch, tokens]`` of the space before all maps; ``number`` tells it from others."""

    def build(b: Builder) -> TokenMap:
        shape = b.stream.shape[:2]
        fields: dict[str, Any] = {
            name: b.constant(tensor, f"reference_{number}_{name}", shape) for name, tensor in tensors.items()
        }
        return kind(b.count, b.count, **fields)

    return build
