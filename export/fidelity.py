"""Does an engine compute the program? Eager outputs, recorded once per stage, that every engine is held against."""

from __future__ import annotations

import math

import numpy as np
import torch

from optpass.export import branches
from optpass.export.translate import trials, work
from optpass.program import Stage, op_name
from optpass.runtime.check import Recorded, Reference, valued
from optpass.runtime.features import COUNTED, STATE
from optpass.runtime.manifest import STEERED

ROUNDOFF = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-9, "int8": 2.0**-8}
"""Unit roundoff: half the distance from 1 to the next number, of integers half a step of the largest."""

SAFETY = 2.0
"""The count of contractions holds those side by side too, and a residual stream takes each block's error at its share
only, so that the deviation is over-estimated: dense engines that are right stay 10 times below it."""


def tolerance(stage: Stage, precision: str) -> float:
    """The difference that rounding explains, relative to the largest value of an output.

    Each of ``n`` contractions in a row adds an error of its own; they are independent, so they add up as
    ``sqrt(n)``. In float32 a sum of ``k`` products is rounded ``k`` times, each by at most the roundoff ``u``, in
    either direction: ``u * sqrt(k)``; of vectors of ``LANES`` partial sums only one is on the way of an error, which
    leaves ``u * sqrt(k / LANES)``. In half precisions both factors of a product are rounded, while the sums are
    float32: ``u * sqrt(2)``. Both engine and eager execution round, in float32 alike. A graph that computes in a half
    precision itself does so on an engine in float32 as well, and there both round: ``u * sqrt(4)``. The other ops round
    their results, but for those between 8-bit products, which stay float32.
    """
    rounding = work(stage)
    own = _precision(stage)
    precision = max(precision, own, key=ROUNDOFF.__getitem__)
    terms = 2 * max(rounding.longest / LANES, 1) if precision == "f32" else 2 if own == "f32" else 4
    others = 0 if precision == "int8" else _ops(stage)
    return SAFETY * ROUNDOFF[precision] * math.sqrt(rounding.contractions * terms + others)


def _ops(stage: Stage) -> int:
    return sum(node.op == "call_function" for node in stage.exported.graph.nodes)


def _precision(stage: Stage) -> str:
    """The coarsest precision of the values of a graph."""
    values = [node.meta.get("val") for node in branches.nodes(stage.exported.graph_module)]
    dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    return next((name for dtype, name in HALVES.items() if dtype in dtypes), "f32")


HALVES = {torch.bfloat16: "bf16", torch.float16: "f16"}

LANES = 8
"""Partial sums that the narrowest vector unit in use keeps side by side."""


CHOICES = ("topk", "sort", "argsort", "argmax", "max", "min")
"""Ops whose result is a place, which rounding can move."""


def chooses(stage: Stage) -> bool:
    """Whether the graph decides by comparing values which tokens go where."""
    nodes = branches.nodes(stage.exported.graph_module)
    return any(op_name(node) in CHOICES for node in nodes if node.op == "call_function")


def effect(stage: Stage, dense: Stage) -> float:
    """How far the passes moved the outputs from those of the unmodified model, relative to the largest value of each.

    As much as an engine may differ that made other choices than eager execution did, and no more.
    """
    moved = [
        float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(1e-9))
        for a, b in zip(stage.results, dense.results, strict=True)
        if a.is_floating_point() and a.numel()
    ]
    return max(moved, default=0.0)


@torch.no_grad()
def reference(stage: Stage) -> Reference:
    """Run a stage eagerly at the smallest, the example and the largest sizes of its dynamic dimensions.

    A stage that decides in its graph is run once more at each of them as the last step of a run, which is computed, so
    that both of its branches are seen.
    """
    recorded = []
    both = ({}, {STATE + COUNTED: 9}) if stage.name == STEERED else ({},)
    for sizes in [{**sizes, **more} for more in both for sizes in trials(stage)]:
        results = stage.run(stage.resized(sizes)) if sizes else stage.results
        outputs = {spec.name: _array(t) for spec, t in zip(stage.outputs, results, strict=True)}
        recorded.append(Recorded.of(sizes, valued(outputs)))
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
