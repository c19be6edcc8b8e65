"""The captured model: stages of flat, named tensors in and out, and the record of what was done to them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental import _config

from optpass.errors import Place

WRAPPED = "model"
"""Attribute under which capture holds the user's module inside its flat wrapper."""

Size = int | str
"""One dimension: a number, or the name of a dynamic dimension."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: dtype by its torch name (``float32``), shape with names for dynamic dimensions."""

    name: str
    dtype: str
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class Range:
    """The sizes a dynamic dimension may take, both ends included."""

    minimum: int
    maximum: int


@dataclass(frozen=True)
class Stage:
    """One callable graph of a program.

    Attributes:
        name: ``main`` for a model without state.
        exported: graph whose user inputs and outputs are flat tensors, in the order of ``inputs`` and ``outputs``.
        inputs, outputs: names, dtypes and shapes.
        ranges: the range of each dynamic dimension named in the shapes.
        example: one tensor per input, inside the ranges.
        initial: the knobs that a run begins with, by name.
        in_place: the same for backends that write new rows into the buffers they are given; None where there is none.
        whole: the same with each kernel as one node, for backends that run it on a GPU; None where there is none.
    """

    name: str
    exported: ExportedProgram
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    example: tuple[Tensor, ...]
    ranges: Mapping[str, Range] = field(default_factory=dict)
    initial: Mapping[str, float] = field(default_factory=dict)
    in_place: Stage | None = None
    whole: Stage | None = None

    @cached_property
    def module(self) -> GraphModule:
        """The graph with its weights as attributes, to run or to rewrite a copy of."""
        module = self.exported.module(check_guards=False)
        assert isinstance(module, GraphModule)
        return module

    @cached_property
    def results(self) -> tuple[Tensor, ...]:
        """The outputs on the example, computed once."""
        return self.run(self.example)

    @torch.no_grad()
    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run eagerly; one tensor per input, returns one per output."""
        return tuple(self.module(*tensors))

    def release(self) -> None:
        """Let go of the weights: the graph stays, and cannot be run any more.

        They are dropped, not changed, so that whoever else holds the model keeps it whole.
        """
        self.exported.state_dict.clear()
        self.exported.constants.clear()
        self.__dict__.pop("module", None)
        for form in (self.in_place, self.whole):
            if form is not None:
                form.release()

    def limits(self, spec: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest and the largest shape of an input."""
        bounds = [self.ranges[size] if isinstance(size, str) else Range(size, size) for size in spec.shape]
        return tuple(bound.minimum for bound in bounds), tuple(bound.maximum for bound in bounds)

    def resized(self, sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
        """The example with its dynamic dimensions tiled or cropped to ``sizes``; values stay in their domain.

        By the name of an input ``sizes`` may also hold a number that all of it is.
        """
        tensors = []
        for spec, tensor in zip(self.inputs, self.example, strict=True):
            if spec.name in sizes:
                tensor = torch.full_like(tensor, sizes[spec.name])
            for axis, size in enumerate(spec.shape):
                if isinstance(size, str) and size in sizes:
                    pick = torch.arange(sizes[size]) % tensor.shape[axis]
                    tensor = tensor.index_select(axis, pick)
            tensors.append(tensor)
        return tuple(tensors)

    def trials(self) -> list[dict[str, int]]:
        """The sizes of the dynamic dimensions at which a stage is tried: smallest, example, largest."""
        if not self.ranges:
            return [{}]
        example: dict[str, int] = {}
        for spec, tensor in zip(self.inputs, self.example, strict=True):
            example |= {size: tensor.shape[axis] for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        smallest = {name: bounds.minimum for name, bounds in self.ranges.items()}
        largest = {name: bounds.maximum for name, bounds in self.ranges.items()}
        found = []
        for sizes in (smallest, {name: example[name] for name in self.ranges}, largest):
            if sizes not in found:
                found.append(sizes)
        return found

    def retraced(self, module: torch.nn.Module) -> Stage:
        """The stage with ``module``, a rewritten copy of ``self.module``, captured anew under the same signature."""
        exported = trace(module, self.example, self.inputs, self.ranges, computed=True)
        # what the tracer took for granted of computed sizes, such as that half of the tokens are not one, is no
        # condition of the module: that it runs over the whole range is held by running it
        for node in list(exported.graph.nodes):
            if op_name(node) == "_assert_scalar":
                exported.graph.erase_node(node)
        exported.graph.eliminate_dead_code()
        exported.graph_module.recompile()
        outputs = output_specs(exported, [spec.name for spec in self.outputs], self.inputs)
        # another form of the stage is not that of the new graph
        return replace(self, exported=exported, outputs=outputs, in_place=None, whole=None)


@dataclass(frozen=True)
class Program:
    """A model as named stages, with the driver that runs them and the record of the passes applied.

    Attributes:
        source: what the user named: a zoo name, a directory, ``module:factory``.
        record: one JSON-able entry per pass, in order, as written to the manifest.
    """

    stages: Mapping[str, Stage]
    source: str = ""
    driver: str = "run"
    record: tuple[Mapping[str, Any], ...] = ()

    @property
    def main(self) -> Stage:
        """The stage that computes the model as it was captured."""
        return self.stages["main"]

    @property
    def deployed(self) -> list[Stage]:
        """The stages that the driver runs: ``main``, or those that were made of it, the one it runs most at the end."""
        made = [stage for name, stage in self.stages.items() if name != "main"]
        return made or [self.main]


def trace(
    module: torch.nn.Module,
    example: Sequence[Tensor],
    inputs: Sequence[TensorSpec],
    ranges: Mapping[str, Range],
    *,
    strict: bool = False,
    computed: bool = False,
) -> ExportedProgram:
    """``torch.export`` of a module of flat positional tensors, with the named dimensions dynamic.

    With ``computed`` the module holds sizes that are computed from dynamic ones, such as half of the tokens: they may
    become 1, and relations between them are left to the run, where the tracer would narrow the range.
    """
    with torch.no_grad(), _config.patch(backed_size_oblivious=computed):  # type: ignore[attr-defined]
        return torch.export.export(
            module,
            tuple(example),
            dynamic_shapes=dynamic_shapes(inputs, ranges),
            strict=strict,
            prefer_deferred_runtime_asserts_over_guards=computed,
        )


def dynamic_shapes(inputs: Sequence[TensorSpec], ranges: Mapping[str, Range]) -> tuple[dict[int, Any], ...] | None:
    """The dynamic axes of each input as torch.export takes them, those of one name the same; None without any."""
    dims = {name: Dim(name, min=r.minimum, max=r.maximum) for name, r in ranges.items()}
    shapes = tuple(
        {axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in inputs
    )
    return shapes if dims else None


def output_specs(
    exported: ExportedProgram, names: Sequence[str], inputs: Sequence[TensorSpec]
) -> tuple[TensorSpec, ...]:
    """Specs of the outputs of a traced graph; a symbolic size gets the name of the input dimension it equals."""
    placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    results = next(node for node in exported.graph.nodes if node.op == "output").args[0]
    symbols: dict[str, str] = {}
    for spec, user in zip(inputs, exported.graph_signature.user_inputs, strict=True):
        value = placeholders[str(user)].meta["val"]
        symbols |= {str(s): size for s, size in zip(value.shape, spec.shape, strict=True) if isinstance(size, str)}
    specs = []
    for name, node in zip(names, results, strict=True):
        value = node.meta["val"]
        # a size that was computed may be a number whatever the dynamic ones are
        sizes = [int(str(s)) if str(s).isdigit() else str(s) for s in value.shape]
        shape = tuple(s if isinstance(s, int) else symbols.get(s, s) for s in sizes)
        specs.append(TensorSpec(name, str(value.dtype).removeprefix("torch."), shape))
    return tuple(specs)


def op_name(node: Node) -> str:
    """``linear`` for an ATen op whatever its overload, ``namespace.name`` for another, the bare name of a function."""
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, name = node.target._schema.name.split("::")
        return name if namespace == "aten" else f"{namespace}.{name}"
    return getattr(node.target, "__name__", str(node.target))


def module_path(node: Node) -> str:
    """Path of the user's module that a node comes from, such as ``encoder.layer.3.attention``."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return strip_wrapper(paths[-1]) if paths else ""


def strip_wrapper(path: str) -> str:
    """A module path without the name under which capture wraps the user's model."""
    path = path.removeprefix("L['self'].").removeprefix("L['self']")
    return path.removeprefix(WRAPPED).removeprefix(".")


def place_of(node: Node) -> Place:
    """Where in the user's model a node comes from: module, op, and the innermost line outside torch."""
    lines = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File")
    ]
    own = [line for line in lines if f"{os.sep}torch{os.sep}" not in line]
    match = re.match(r'File "(.*)", line (\d+)', own[-1]) if own else None
    line = f"{os.path.basename(match[1])}:{match[2]}" if match else ""
    return Place(module_path(node), op_name(node) if node.op == "call_function" else node.op, line)
