"""Does an engine compute the program? Eager outputs, recorded once per stage, that every engine is held against."""

from __future__ import annotations

import math

import numpy as np
import torch

from optpass.export.translate import trials, work
from optpass.program import Stage
from optpass.runtime.check import Recorded, Reference

ROUNDOFF = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-9}
"""Unit roundoff: half the distance from 1 to the next number."""

SAFETY = 2.0
"""The count of contractions holds those side by side too, and a residual stream takes each block's error at its share
only, so that the deviation is over-estimated: engines that are right stay 10 times below it (DeiT-S, Fashion ViT)."""


def tolerance(stage: Stage, precision: str) -> float:
    """The difference that rounding explains, relative to the largest value of an output.

    Each of ``n`` contractions in a row adds an error of its own; they are independent, so they add up as
    ``sqrt(n)``. In float32 a sum of ``k`` products is rounded ``k`` times, each by at most the roundoff ``u``, in
    either direction: ``u * sqrt(k)``; of vectors of ``LANES`` partial sums only one is on the way of an error, which
    leaves ``u * sqrt(k / LANES)``. In half precisions both factors of a product are rounded, while the sums are
    float32: ``u * sqrt(2)``. Both engine and eager execution round, in float32 alike.
    """
    rounding = work(stage)
    terms = 2 * max(rounding.longest / LANES, 1) if precision == "f32" else 2
    return SAFETY * ROUNDOFF[precision] * math.sqrt(rounding.contractions * terms)


LANES = 8
"""Partial sums that the narrowest vector unit in use keeps side by side."""


@torch.no_grad()
def reference(stage: Stage) -> Reference:
    """Run a stage eagerly at the smallest, the example and the largest sizes of its dynamic dimensions."""
    recorded = []
    for sizes in trials(stage):
        tensors = stage.resized(sizes)
        results = stage.run(tensors) if stage.ranges else stage.results
        outputs = {spec.name: _array(t) for spec, t in zip(stage.outputs, results, strict=True)}
        recorded.append(Recorded.of(sizes, outputs))
    example = {spec.name: _array(tensor) for spec, tensor in zip(stage.inputs, stage.example, strict=True)}
    axes = {
        spec.name: {axis: size for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in stage.inputs
    }
    return Reference(example, axes, recorded)


def _array(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.detach().cpu().contiguous().numpy()
