"""Dynamic dimensions: parsed, given example sizes inside their ranges, and checked after tracing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram

from optpass.capture.signature import Call
from optpass.errors import OptpassError
from optpass.program import Range, TensorSpec

GRAMMAR = re.compile(r"(?P<input>\w+):(?P<axis>\d+)=(?:(?P<name>[A-Za-z_]\w*):)?(?P<low>\d+)\.\.(?P<high>\d+)")


@dataclass(frozen=True)
class Declared:
    """A dynamic dimension: its range, and the ``(input, axis)`` pairs that share it."""

    range: Range
    places: tuple[tuple[str, int], ...]


def declare(dynamic: Mapping[str, str] | Sequence[str], call: Call) -> dict[str, Declared]:
    """Parse ``input:axis=[name:]min..max`` and hold it against the inputs of the call."""
    texts = [f"{k}={v}" for k, v in dynamic.items()] if isinstance(dynamic, Mapping) else list(dynamic)
    declared: dict[str, Declared] = {}
    seen: set[tuple[str, int]] = set()
    for text in texts:
        name, at, range_ = _parse(text)
        _check_place(text, at, call, seen)
        seen.add(at)
        known = declared.get(name)
        if known and known.range != range_:
            raise OptpassError("dynamic-grammar", f"{name} is given two ranges", "give one range to each name")
        declared[name] = Declared(range_, (*(known.places if known else ()), at))
    return declared


def _parse(text: str) -> tuple[str, tuple[str, int], Range]:
    match = GRAMMAR.fullmatch(text.replace(" ", ""))
    if not match:
        raise OptpassError(
            "dynamic-grammar",
            f"{text!r} is no dynamic dimension",
            "write input:axis=min..max or input:axis=name:min..max, such as input_ids:1=2..512",
        )
    at = (match["input"], int(match["axis"]))
    range_ = Range(int(match["low"]), int(match["high"]))
    if not 1 <= range_.minimum < range_.maximum or range_.maximum < 3:
        raise OptpassError(
            "dynamic-range", f"the range of {text} is empty", "write min..max with 1 <= min < max, max >= 3"
        )
    return match["name"] or f"{at[0]}_{at[1]}", at, range_


def _check_place(text: str, at: tuple[str, int], call: Call, seen: set[tuple[str, int]]) -> None:
    name, axis = at
    if name not in call.names:
        raise OptpassError("dynamic-input", f"{text}: no input is named {name}", f"inputs are {', '.join(call.names)}")
    rank = call.tensors[call.names.index(name)].ndim
    if axis >= rank:
        raise OptpassError("dynamic-axis", f"{text}: {name} has {rank} dimensions", f"use an axis below {rank}")
    if at in seen:
        raise OptpassError("dynamic-grammar", f"{name}:{axis} is declared twice", "declare it once")


def resize(call: Call, declared: Mapping[str, Declared]) -> tuple[Tensor, ...]:
    """The example tensors, tiled or cropped so that each dynamic dimension lies strictly inside its range."""
    tensors = dict(zip(call.names, call.tensors, strict=True))
    for dimension in declared.values():
        first, axis = dimension.places[0]
        size = _inside(tensors[first].shape[axis], dimension.range)
        for name, at in dimension.places:
            tensor = tensors[name]
            if tensor.shape[at] != size:
                tensors[name] = tensor.index_select(at, torch.arange(size, device=tensor.device) % tensor.shape[at])
    return tuple(tensors[name] for name in call.names)


def _inside(size: int, range_: Range) -> int:
    """``size`` if it lies inside the range, otherwise the nearest size that does; never 1, never the minimum."""
    low = max(range_.minimum + 1, 2)
    return min(max(size, low), max(range_.maximum - 1, low))


def check_symbolic(exported: ExportedProgram, specs: Sequence[TensorSpec], declared: Mapping[str, Declared]) -> None:
    """Refuse a graph in which a declared dimension became a constant or lost a part of its range."""
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    users = dict(zip([spec.name for spec in specs], exported.graph_signature.user_inputs, strict=True))
    for dimension in declared.values():
        for name, axis in dimension.places:
            size = nodes[str(users[name])].meta["val"].shape[axis]
            if isinstance(size, int):
                raise constant(name, axis, size, specs)
            found = exported.range_constraints.get(size.node.expr)
            if found and (found.lower > dimension.range.minimum or found.upper < dimension.range.maximum):
                raise narrowed(name, axis, dimension.range, f"{found.lower}..{found.upper}")


def constant(name: str, axis: int, size: int, specs: Sequence[TensorSpec], line: str = "") -> OptpassError:
    """A dynamic dimension that the model fixes; another input of the same size is named as the likely cause."""
    where = f" by {line}" if line else ""
    beside = [f"{spec.name}:{at}" for spec in specs for at, other in enumerate(spec.shape) if other == size]
    together = f"declare {' and '.join([f'{name}:{axis}', *beside])} under one name, " if beside else ""
    return OptpassError(
        "dynamic-constant",
        f"{name}:{axis} is declared dynamic, but the model fixes it to {size}{where}",
        f"{together}leave {name}:{axis} static, or make that line independent of the size",
    )


def narrowed(name: str, axis: int, declared: Range, found: str, line: str = "") -> OptpassError:
    """A dynamic dimension of which the model supports a part only."""
    where = f" by {line}" if line else ""
    return OptpassError(
        "dynamic-range",
        f"{name}:{axis} is declared {declared.minimum}..{declared.maximum}, but the model holds for {found}{where}",
        f"declare {name}:{axis}={found}",
    )
