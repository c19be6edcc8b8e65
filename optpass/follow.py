"""Where each token of the space before all maps is after each of them, at the inputs that the maps were tapped on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optpass.rewrite import Rewritten
from optpass.runtime.maps import SAMPLES, SiteMap
from optpass.tokens import Gather, TokenMap

Tapped = Mapping[str, Tensor]
"""The tensors that define one map, by attribute."""


def tapped(rewritten: Rewritten, taps: Sequence[Tensor]) -> list[Tapped]:
    """The appended outputs of a rewritten graph, for each map."""
    found: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in zip(rewritten.tapped, taps, strict=True):
        number, attribute = name.split(".")
        found[int(number)][attribute] = tensor
    return [found[number] for number in range(len(rewritten.maps))]


def source(token_map: TokenMap, values: Tapped) -> int:
    """Tokens before a map, in the example."""
    if "group" in values:
        return values["group"].shape[1]
    if "weight" in values:
        return values["weight"].shape[2]
    if isinstance(token_map.source, int):
        return token_map.source
    # dynamic: its size in the example, which no index tells where the last tokens are dropped
    return int(token_map.source.value.node.hint)


def places(token_map: TokenMap, values: Tapped) -> Tensor | None:
    """Int64 ``[batch, source]``: the target of each token, -1 where it is dropped; None where it has several."""
    if "group" in values:
        return values["group"]
    if not isinstance(token_map, Gather):
        return None
    index = values["index"]
    nowhere = torch.full((len(index), source(token_map, values)), -1)
    return nowhere.scatter(1, index, torch.arange(index.shape[1]).expand_as(index))


def then(place: Tensor, step: Tensor, nothing: Any = -1) -> Tensor:
    """``step`` read at the places that tokens have by now; ``nothing`` for those that are gone."""
    return torch.where(place >= 0, step.gather(1, place.clamp(0)), nothing)


def follow(rewritten: Rewritten, taps: Sequence[Tensor], sites: Sequence[tuple[str, str]]) -> list[SiteMap]:
    """Compose the maps site by site; up to the first one whose tensors were not tapped.

    Args:
        rewritten: a graph with taps.
        taps: what it appended to its outputs.
        sites: module path and name of the pass of each map.
    """
    found: list[SiteMap] = []
    place = share = None
    for token_map, values, (path, name) in zip(rewritten.maps, tapped(rewritten, taps), sites, strict=True):
        step, kept = places(token_map, values), None
        if step is None and "weight" in values:
            kept, step = values["weight"].max(1)
            step = torch.where(kept > 0, step, -1)
        if step is None:
            break
        if place is None or share is None:
            place = torch.arange(step.shape[1]).expand(len(step), -1)
            share = torch.ones(step.shape)
        if kept is not None:
            share = share * then(place, kept, 0.0)
        place = then(place, step)
        share = torch.where(place >= 0, share, 0.0)
        numbers, shares = place[:SAMPLES].numpy().astype(np.int32), share[:SAMPLES].numpy().astype(np.float32)
        found.append(SiteMap(path, name, int(values["index"].shape[1]), numbers, shares))
    return found
