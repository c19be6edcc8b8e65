"""Does an engine compute the program? Eager outputs, recorded once per stage, that every engine is held against."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.fx import Node

from optpass.export import branches
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


@dataclass(frozen=True)
class Work:
    """How much rounding a stage does: contractions in a row, at most, and the longest sum in one of them."""

    contractions: int
    longest: int


def work(stage: Stage) -> Work:
    """Count the contractions of a stage; an upper estimate of those on one path."""
    count, longest = 0, 1
    for node in branches.nodes(stage.exported.graph_module):
        if node.op != "call_function" or op_name(node) not in CONTRACTIONS:
            continue
        count += 1
        weight = node.args[CONTRACTIONS[op_name(node)]]
        shape = weight.meta["val"].shape if isinstance(weight, Node) else ()
        sizes = [size if isinstance(size, int) else 1 for size in shape]
        if op_name(node).startswith("conv"):
            longest = max(longest, functools.reduce(int.__mul__, sizes[1:], 1))
        elif sizes:
            longest = max(longest, sizes[-1] if op_name(node) in LAST_SUMMED else sizes[0])
    return Work(max(count, 1), longest)


CONTRACTIONS = {
    "linear": 1, "matmul": 1, "bmm": 1, "mm": 1, "addmm": 2, "baddbmm": 2, "conv1d": 1, "conv2d": 1, "conv3d": 1,
    "convolution": 1, "scaled_dot_product_attention": 1, "append_attention": 1, "einsum": 0,
}  # fmt: skip
"""Ops that sum products, and the argument whose shape says how many."""

LAST_SUMMED = ("linear", "scaled_dot_product_attention", "append_attention")


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
    for sizes in [{**sizes, **more} for more in both for sizes in stage.trials()]:
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
