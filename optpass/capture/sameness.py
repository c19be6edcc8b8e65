"""Whether the captured graph gives what the module gives: at the example, and at both ends of the dynamic ranges."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import Node

from optpass.capture.lines import innermost
from optpass.errors import OptpassError, Place
from optpass.program import Stage, place_of

ROUNDINGS = 64
"""Tolerance in units of the last place at the largest value of an output. Capture replays the same kernels and differs
by nothing in any model tried; a library may take another attention kernel while it is traced, which rounds anew."""

GROWTH = 64
"""How many times larger than the example an input may be for capture to run it: attention grows with its square."""


def check_same(stage: Stage, expected: Sequence[Tensor]) -> None:
    """Refuse a graph that does not repeat the outputs of the module on the example.

    Raises:
        OptpassError: the model draws random numbers, or reads something that changes from call to call.
    """
    index = _differs(stage.results, expected)
    if index is None:
        return
    name = stage.outputs[index].name
    drawn = next((node for node in stage.exported.graph.nodes if _is_random(node)), None)
    if drawn is not None:
        raise OptpassError(
            "random-model",
            f"the model draws random numbers, so that {name} changes from call to call",
            "make the noise an input, or switch it off",
            place_of(drawn),
        )
    raise OptpassError(
        "not-repeatable",
        f"the captured graph does not give the {name} that the model gave",
        "the model must not keep values in Python attributes, compute outside of torch, or take another path "
        "while it is traced, as a library may do where no mask is given",
    )


def check_range(stage: Stage, module: nn.Module) -> None:
    """Run graph and module at the smallest and the largest sizes declared; a size inside the range may not differ.

    Raises:
        OptpassError: the module fails there, such as past the end of a position table, or gives something else.
    """
    ends = ("minimum", "maximum") if stage.ranges else ()
    for end in ends:
        sizes = {name: getattr(range_, end) for name, range_ in stage.ranges.items()}
        if _growth(stage, sizes) <= GROWTH:
            _check_at(stage, module, sizes)


def _check_at(stage: Stage, module: nn.Module, sizes: Mapping[str, int]) -> None:
    said = ", ".join(f"{_places(stage, name)}={size}" for name, size in sizes.items())
    tensors = stage.resized(sizes)
    try:
        with torch.no_grad():
            expected = module(*(tensor.clone() for tensor in tensors))
    except Exception as error:  # the user's own code
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise OptpassError(
            "dynamic-range",
            f"the model itself fails at {said}: {type(error).__name__}: {first}",
            "declare a smaller range, or give --inputs of about that size",
            Place(line=innermost(traceback.extract_tb(error.__traceback__))),
        ) from error
    try:
        index = _differs(stage.run(tensors), expected)
    except RuntimeError:  # a size that the graph took for a constant
        index = 0
    if index is not None:
        raise OptpassError(
            "dynamic-range",
            f"at {said} the captured graph does not give the {stage.outputs[index].name} of the model",
            "leave that size out of the range; a size of 1 often takes another path",
        )


def _places(stage: Stage, dimension: str) -> str:
    return next(f"{spec.name}:{spec.shape.index(dimension)}" for spec in stage.inputs if dimension in spec.shape)


def _growth(stage: Stage, sizes: Mapping[str, int]) -> float:
    shapes = [[sizes.get(str(size), size) for size in spec.shape] for spec in stage.inputs]
    return max(
        math.prod(int(size) for size in shape) / max(1, tensor.numel())
        for shape, tensor in zip(shapes, stage.example, strict=True)
    )


def _differs(got: Sequence[Tensor], expected: Sequence[Tensor]) -> int | None:
    """Index of the first output that is not the same."""
    return next((i for i, pair in enumerate(zip(got, expected, strict=True)) if not _same(*pair)), None)


def _same(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return bool(torch.equal(got, expected))
    finite = expected[expected.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    tolerance = ROUNDINGS * torch.finfo(expected.dtype).eps * largest
    return torch.allclose(got.double(), expected.double(), rtol=0, atol=tolerance, equal_nan=True)


def _is_random(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    dropout = {"dropout_p", "p", "train"} & {argument.name for argument in target._schema.arguments}
    return not dropout or _drops(node)


def _drops(node: Node) -> bool:
    """Whether a dropout, or an attention with one, is switched on."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = dict(zip([argument.name for argument in schema.arguments], node.args, strict=False)) | dict(node.kwargs)
    return bool(given.get("p", given.get("dropout_p", 0.0))) and bool(given.get("train", True))
