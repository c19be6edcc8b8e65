"""How often may a denoiser predict? The largest knob that keeps a bound on the quality of its samples.

The bound is on the drop of similarity to the samples of the dense engine: the upper end of its interval of 95 %. The
knob is searched on some seeds and conditions, and has to hold on others, which nothing was chosen by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from optpass import metrics, similarity
from optpass.results import Metric
from optpass.runtime.denoise import Denoiser
from optpass.runtime.features import STREAK, THRESHOLD
from optpass.similarity import Array

SEARCHED, HELD = 8, 16
"""Samples that the knob is searched on, and others that it has to hold on."""

APART = 10_000
"""Between the seeds of the two."""

DOUBLINGS, HALVINGS, STEPS_BACK = 6, 5, 6
"""Of the search: to enclose the knob, to narrow it down, and to go back where it does not hold."""


@dataclass(frozen=True)
class Calibrated:
    """What was found.

    Attributes:
        engine: id of the one that it was found for.
        knob: ``threshold``, or ``streak`` of a policy without one.
        value: 0 where nothing may be predicted.
        held: the figure on the samples that nothing was chosen by.
    """

    engine: str
    knob: str
    value: float
    held: Metric

    def __str__(self) -> str:
        drop = f"drop {self.held.drop.value:.4f} up to {self.held.drop.high:.4f} on {self.held.samples} others"
        return f"{self.engine}: {self.knob} {self.value:g}, found on {SEARCHED} samples; {drop}"


def calibrate(
    model: Denoiser,
    dense: Denoiser,
    conditions: Mapping[str, Array],
    max_drop: float,
    progress: Callable[[str], None] = lambda line: None,
) -> Calibrated:
    """Find the knob of an engine.

    Args:
        model: keeps features between steps.
        dense: computes all.
        conditions: one row a sample; rows that the search sees are not those that it is held to, where there are two.
        max_drop: of the similarity, such as 0.02.
        progress: called with each value that is tried.
    """
    half = max(max((len(a) for n, a in conditions.items() if model.batched(n)), default=0) // 2, 1)
    parts = [
        {n: a[rows] if model.batched(n) else a for n, a in conditions.items()}
        for rows in (slice(half), slice(-half, None))
    ]
    found = {}
    for part, count, seed in zip(parts, (SEARCHED, HELD), (0, APART), strict=True):
        found[seed] = part, count, similarity.samples(dense, part, count=count, seed=seed)[0]
    knob = THRESHOLD if THRESHOLD in model.engine.initial else STREAK
    whole = knob == STREAK

    def drop(value: float, seed: int) -> Metric:
        part, count, expected = found[seed]
        progress(f"try {knob} {value:g}")
        knobs: dict[str, Any] = {knob: round(value) if whole else value}
        samples, taken = similarity.samples(model, part, count=count, seed=seed, knobs=knobs)
        (figure,) = metrics.similar(model.name, samples, expected, taken)
        return figure

    value = _largest(lambda v: drop(v, 0).drop.high <= max_drop, model.engine.initial[knob], whole)
    held = drop(value, APART)
    for _ in range(STEPS_BACK):
        if held.drop.high <= max_drop or not value:
            break
        value = value - 1 if whole else 0.7 * value
        held = drop(value, APART)
    if held.drop.high > max_drop and value:
        value, held = 0.0, drop(0.0, APART)
    return Calibrated(model.name, knob, float(np.round(value, 6)), held)


def _largest(holds: Callable[[float], bool], start: float, whole: bool) -> float:
    """About the largest value that holds, 0 where none of those tried does."""
    low, high = 0.0, 0.0
    value = start or 1.0
    for _ in range(DOUBLINGS):
        if holds(value):
            low, value = value, 2 * value
        else:
            high, value = value, value / 2
        if (low and high) or (whole and high and high <= 1):
            break
    for _ in range(HALVINGS if high else 0):
        middle = (low + high) / 2
        if whole:
            middle = float(round(middle))
        if middle in (low, high):
            break
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
