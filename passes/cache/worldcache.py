"""Predict each token by how its path bends: keep still ones, follow straight ones, damp those that turn.

What turning tokens have moved since, weighed by how much they turn, says when to compute. Paper: WorldCache:
Accelerating World Models for Free via Heterogeneous Token Caching (ICML 2026), with the formulas of its authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from optpass.errors import Refusal
from optpass.passes.cache.policies import Policy, PolicyOptions, State, since
from optpass.rewrite import Refused
from optpass.runtime.features import COUNT, STREAK, THRESHOLD, counter

STILL = 1e-6
"""A token whose squared speed is below this share of the mean one is still, whatever its curvature rounds to."""


class WorldCacheOptions(PolicyOptions):
    """Options of ``worldcache``."""

    warmup: int = Field(5, ge=1, description="first steps, which are computed")
    streak: int = Field(6, ge=0, description="most steps in a row that are predicted; 0 predicts none")
    threshold: float = Field(1.0, ge=0, description="drift at which a step is computed; 0 computes all")
    stable: float = Field(0.3, ge=0, le=1, description="share of the tokens, those that bend least, that are kept")
    chaotic: float = Field(0.6, ge=0, le=1, description="share from which on tokens count as turning")
    drift_mean: Literal["all", "chaotic"] = Field("all", description="tokens that drift is averaged over")
    groups: list[str] = Field(
        [], description="spans of tokens with shares of their own, such as [image:0..64,depth:64..128]"
    )

    @model_validator(mode="after")
    def _check(self) -> WorldCacheOptions:
        if self.stable > self.chaotic:
            raise ValueError(f"stable={self.stable:g} lies above chaotic={self.chaotic:g}")
        spans = sorted((_span(text)[1:], text) for text in self.groups)
        for ((_, stop), first), ((start, _), second) in pairwise(spans):
            if start < stop:
                raise ValueError(f"groups {first} and {second} overlap")
        return self


class WorldCache(Policy):
    """Three groups of tokens by curvature, each predicted in its own way; drift of the turning ones decides."""

    name = "worldcache"
    options_type = WorldCacheOptions
    whole = True
    needs = 3

    def start(self, features: Sequence[Tensor], probes: Sequence[Tensor]) -> dict[str, Tensor]:
        """Features, their velocity, how far it is from the one before, and per token curvature and group (0 stable,
        1 linear, 2 chaotic).
        """
        found: dict[str, Tensor] = {}
        most = max(int(apart(feature).shape[1]) for feature in features)
        beyond = [text for text in self.options.groups if _span(text)[2] > most]
        if beyond:
            what = f"groups has {beyond[0]}, and what is predicted has {most} tokens"
            raise Refused(Refusal("groups", what, "name spans inside of them"))
        for f, feature in enumerate(features):
            found |= {f"{name}_{f}": torch.zeros_like(feature) for name in ("feature", "velocity", "turn")}
            found |= {f"{name}_{f}": torch.zeros_like(apart(feature)[..., 0]) for name in ("curvature", "group")}
        return found | {"drift": torch.zeros_like(apart(features[0])[:, 0, 0])}

    def due(self, state: State, probes: Sequence[Tensor]) -> Tensor:
        """Whether any sample has drifted too far, or how far is no number."""
        return torch.where(state["drift"] < state[THRESHOLD], 0.0, 1.0).sum(0, keepdim=True) > 0

    def predict(self, state: State) -> list[Tensor]:
        """Each token by its group."""
        k = since(state)
        turned = self._turned(state, k)
        found = []
        for f in self._numbers(state):
            feature, group = state[f"feature_{f}"], state[f"group_{f}"]
            along, across = (like(x, feature) for x in (k * group.clamp(max=1), turned * turning(group)))
            found.append(feature + along * state[f"velocity_{f}"] + across * state[f"turn_{f}"])
        return found

    def _turned(self, state: State, k: Tensor) -> Tensor:
        """Of ``k`` steps of a turning token, how many are by the velocity before: its share grows from 0 to 1."""
        share: Tensor = (k / counter(state, STREAK).to(torch.float32).clamp(min=1)).clamp(max=1)
        return k * (share * share * (3 - 2 * share))

    def predicted(self, state: State, probes: Sequence[Tensor]) -> dict[str, Tensor]:
        """The drift of this step is added."""
        k = since(state)
        turned = self._turned(state, k) - self._turned(state, k - 1)
        drift = state["drift"]
        for f in self._numbers(state):
            moved = apart(state[f"velocity_{f}"] + turned * state[f"turn_{f}"]).norm(dim=-1)
            chaotic = turning(state[f"group_{f}"])
            each = state[f"curvature_{f}"] * moved * chaotic
            count = chaotic.sum(1).clamp(min=1) if self.options.drift_mean == "chaotic" else each.shape[1]
            drift = drift + each.sum(1) / count
        return {"drift": drift}

    def computed(self, state: State, features: Sequence[Tensor], probes: Sequence[Tensor]) -> dict[str, Tensor]:
        """Velocities move on, and tokens are grouped anew; drift starts at nothing."""
        found: dict[str, Tensor] = {}
        distance, count = since(state).clamp(min=1), counter(state, COUNT)
        for f, feature in enumerate(features):
            before = state[f"velocity_{f}"]
            velocity = torch.where(count >= 1, (feature - state[f"feature_{f}"]) / distance, 0.0)
            bend = apart((velocity - before) / distance).norm(dim=-1)
            speed = apart(velocity).square().sum(-1)
            curvature = bend / (speed + 1e-8)
            curvature = torch.where(speed < STILL * speed.mean(1, keepdim=True), 0.0, curvature)
            spans = list(self._spans(curvature.shape[1]))
            groups = [self._grouped(curvature[:, start:stop]) for start, stop in spans]
            found |= {
                f"feature_{f}": feature,
                f"velocity_{f}": velocity,
                f"turn_{f}": before - velocity,
                f"curvature_{f}": curvature,
                f"group_{f}": torch.cat(groups, 1) if len(groups) > 1 else groups[0],
            }
        return found | {"drift": torch.zeros_like(state["drift"])}

    def _grouped(self, curvature: Tensor) -> Tensor:
        ordered = curvature.sort(1)[0]
        low, high = (quantile(ordered, share) for share in (self.options.stable, self.options.chaotic))
        return (curvature >= low).to(curvature.dtype) + (curvature >= high).to(curvature.dtype)

    def _spans(self, count: Any) -> Iterator[tuple[Any, Any]]:
        """The named groups, and what lies between and behind them."""
        at: Any = 0
        for start, stop in sorted(_span(text)[1:] for text in self.options.groups):
            if isinstance(count, int) and stop > count:
                break  # of features with fewer tokens, such as those of another stream
            if start > at:
                yield at, start
            yield start, stop
            at = stop
        if not isinstance(count, int) or at < count:
            yield at, count

    def score(self, state: State) -> Tensor:
        """Curvature by speed, which has no unit."""
        speed: Tensor = apart(state["velocity_0"]).norm(dim=-1)
        return state["curvature_0"] * speed

    def _numbers(self, state: State) -> range:
        return range(sum(name.startswith("feature_") for name in state))


def apart(feature: Tensor) -> Tensor:
    """A feature as tokens ``[batch, tokens, channels]``: of an image or a video each pixel is one."""
    if feature.dim() <= 3:
        return feature
    return feature.movedim(2 if feature.dim() == 5 else 1, -1).flatten(1, -2)


def turning(group: Tensor) -> Tensor:
    """1 for tokens of the last of the three groups, 0 for others."""
    return (group - 1).clamp(min=0)


def like(each: Tensor, feature: Tensor) -> Tensor:
    """Values by token, ``[batch, tokens]``, shaped to broadcast against a feature."""
    if feature.dim() <= 3:
        return each.unsqueeze(-1)
    axis = 2 if feature.dim() == 5 else 1
    sizes = [size for dim, size in enumerate(feature.shape) if dim != axis]
    return each.reshape(sizes).unsqueeze(axis)


def quantile(ordered: Tensor, share: float) -> Tensor:
    """A quantile of values in order, ``[batch, n]`` to ``[batch, 1]``; between two of them in a straight line."""
    last: Any = ordered.shape[1] - 1
    if not isinstance(last, int):
        at = last * round(share * 1000) // 1000
        return ordered[:, at : at + 1]
    place = share * last
    low = min(int(place), last)
    high = min(low + 1, last)
    return torch.lerp(ordered[:, low : low + 1], ordered[:, high : high + 1], place - low)


def _span(text: str) -> tuple[str, int, int]:
    name, _, limits = text.partition(":")
    start, _, stop = limits.partition("..")
    if not name or not start.isdigit() or not stop.isdigit() or int(start) >= int(stop):
        raise ValueError(f"{text!r} is no span of tokens such as image:0..64")
    return name, int(start), int(stop)
