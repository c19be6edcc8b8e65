"""Names that a stage with cached features and its driver agree on, and which inputs of a denoiser are which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from optpass.runtime.manifest import MAIN, REUSE, STEERED

STATE, NEW = "state_", "new_"
"""What names of inputs begin with that hold what is kept between steps, and of outputs that take their place."""

STEP, STEPS, COUNT, SINCE, ROOM = "step", "steps", "count", "since", "room"
"""Steps done, steps in all, how many were computed, how many steps ago the last one was, and how many may be predicted
from here on before one has to be computed whatever it brings."""

WARMUP, STREAK, THRESHOLD = "warmup", "streak", "threshold"
"""What a run begins with and that stays: how many steps are computed at first, how many at most are predicted in a row,
and at which value of its signal a policy computes (``float32 [1]``, where it has a signal)."""

KNOBS = (WARMUP, STREAK, THRESHOLD)

COUNTERS = (STEP, STEPS, COUNT, SINCE, ROOM, WARMUP, STREAK)
"""What is counted for every policy, in the order of one tensor, ``int32 [7]``: each tensor that is handed to an engine
costs as much as some ops of a step that is predicted."""

COUNTED = "counters"
"""Name of that tensor."""

MANY = 2**22
"""More than any run has steps, and little enough for OpenVINO, which adds whole numbers in float32, to count exactly
from its double below nothing."""


def counted(begun: Mapping[str, float]) -> list[int]:
    """The counters before the first step; those that are not named are 0."""
    return [int(min(begun.get(name, 0), MANY)) for name in COUNTERS]


def counter(state: Mapping[str, Any], name: str) -> Any:
    """One of them, ``[1]``."""
    place = COUNTERS.index(name)
    return state[COUNTED][place : place + 1]


COMPUTED, REFUSED, DAMAGED = "computed", "refused", "damaged"
"""Outputs, bool ``[1]``: whether the step was computed, whether it has to be, whether what was kept is no number."""


class Described(Protocol):
    """A tensor by name, numpy's name of the dtype, and sizes or names of dynamic ones."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Sequence[int | str]: ...


@dataclass(frozen=True)
class Roles:
    """Which inputs of a denoiser are which.

    Attributes:
        sample: the noisy input, which the first output is shaped like but for more channels along ``channels``.
        timestep: the time of it, ``[batch]`` or one number.
        conditions: all other inputs, the same at each step.
        channels: the dimension of the channels of sample and output.
    """

    sample: str
    timestep: str
    conditions: tuple[str, ...]
    channels: int


def recognise(inputs: Sequence[Described], outputs: Sequence[Described]) -> Roles | None:
    """What the inputs are for, by names and shapes; None where this is no denoiser."""
    own = [info for info in inputs if not info.name.startswith(STATE)]
    times = [info for info in own if "timestep" in info.name and len(info.shape) <= 1]
    if not times:
        times = [info for info in own if len(info.shape) <= 1 and info.dtype.startswith("float")]
    if len(times) != 1 or not outputs:
        return None
    found = outputs[0].shape
    for more in (0, 1):
        for info in own:
            if len(info.shape) != len(found) or len(found) < 3 or not info.dtype.startswith("float"):
                continue
            differing = [axis for axis, pair in enumerate(zip(info.shape, found, strict=True)) if pair[0] != pair[1]]
            if len(differing) == more and all(_multiple(found[axis], info.shape[axis]) for axis in differing):
                rest = tuple(i.name for i in own if i.name not in (info.name, times[0].name))
                return Roles(info.name, times[0].name, rest, differing[0] if differing else _channels(len(found)))
    return None


def opens(stage: str, inputs: Sequence[Described], outputs: Sequence[Described]) -> bool:
    """Whether an engine of that stage and signature is one to draw samples with."""
    return stage in (MAIN, REUSE, STEERED) and recognise(inputs, outputs) is not None


def _multiple(large: int | str, small: int | str) -> bool:
    return isinstance(large, int) and isinstance(small, int) and large % small == 0


def _channels(rank: int) -> int:
    """Images ``[batch, channels, height, width]``, videos ``[batch, frames, channels, height, width]``."""
    return {3: 2, 5: 2}.get(rank, 1)
