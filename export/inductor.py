"""AOTInductor: the exported program compiled to machine code, in one ``.pt2`` package that torch runs without Python.

The code uses the features of the CPU that compiles it, and belongs to the release of torch that made it; both are in
the manifest. It takes a C++ compiler here, none where it runs.

It is for the CPU, unless ``target`` names the NVIDIA GPU that is here and torch has CUDA: then the whole program lies
on the GPU, with kernels as the ops that they are, in which AOTInductor finds their Triton functions and compiles them.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from optpass.errors import OptpassError, first_line
from optpass.export import branches
from optpass.export.base import Backend, Source
from optpass.program import Stage, op_name, place_of
from optpass.runtime import cuda
from optpass.runtime.engines import inductor as engine

FILE = "model.pt2"

SETTINGS: dict[str, bool | str] = {
    # the number of threads is that of the session, not that of the machine that compiled
    "cpp.dynamic_threads": True,
    # the wrapper only allocates and calls: optimized it takes longer to compile and runs no faster
    "aot_inductor.compile_wrapper_opt_level": "O0",
}


def contiguous(stage: Stage) -> Stage:
    """The stage captured with inputs as the runtime gives them: strides of the example become part of the code."""
    if all(tensor.is_contiguous() for tensor in stage.example):
        return stage
    example = tuple(tensor.contiguous() for tensor in stage.example)
    return replace(stage, example=example).retraced(stage.module)


def check_compiler() -> None:
    """Raise an OptpassError where there is nothing to compile code with."""
    if not engine.compiler():
        raise OptpassError(
            "compiler",
            f"AOTInductor needs a C++ compiler, and here is none of {', '.join(engine.COMPILERS)}",
            "install g++, or name a compiler by the environment variable CXX",
        )


def moved(stage: Stage, device: str) -> ExportedProgram:
    """The program of a stage on another device, with its weights there; the stage stays as it is.

    It is captured anew, since a copy of a graph calls an input named as a builtin of Python by another name.
    """
    from torch.export.passes import move_to_device_pass

    return move_to_device_pass(stage.retraced(stage.module).exported, device)


def guarded(exported: ExportedProgram) -> ExportedProgram:
    """The program that first refuses ids that a table has no row for.

    Compiled code looks at each where it reads the row, in a loop of several threads, out of which an error ends the
    process.
    """
    aten = torch.ops.aten
    inputs = set(exported.graph_signature.user_inputs)
    made = copy.copy(exported)
    made._graph_module = branches.copied(exported.graph_module)
    graph = made.graph
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if node.target is not aten.embedding.default:
            continue
        table, ids = node.args[:2]
        if not isinstance(table, Node) or not isinstance(ids, Node) or ids.name not in inputs:
            continue
        rows = int(table.meta["val"].shape[0])
        with graph.inserting_before(first):
            for extreme, holds, bound in ((aten.amin.default, operator.ge, 0), (aten.amax.default, operator.lt, rows)):
                found = graph.call_function(aten._local_scalar_dense.default, (graph.call_function(extreme, (ids,)),))
                what = f"{ids.name} holds an id outside 0 to {rows - 1}"
                graph.call_function(aten._assert_scalar.default, (graph.call_function(holds, (found, bound)), what))
    made.graph_module.recompile()
    return made


class Inductor(Backend):
    """AOTInductor on the CPU, or on the GPU that is here."""

    name = "inductor"
    precisions = ("f32",)
    form = "the exported program, in ATen"
    limits = ("machine code of this machine and this release of torch", "opened on request only")

    def check(self, precision: str) -> None:
        check_compiler()

    def lower(self, source: Source, folder: Path, precision: str, target: Sequence[str] = ()) -> str:
        import torch._inductor

        if cuda.named(target):
            exported = moved(contiguous(source.whole), engine.GPU)
        else:
            exported = guarded(contiguous(source.stage).exported)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch._inductor.aoti_compile_and_package(
                    exported, package_path=str(folder / FILE), inductor_configs=SETTINGS
                )
        except Exception as error:  # of torch's own types, or of the compiler
            named = [node for node in exported.graph.nodes if node.op == "call_function" and node.name in str(error)]
            raise OptpassError(
                "not-lowered",
                f"AOTInductor cannot compile the model: {first_line(error)[:200]}",
                "use onnxruntime or openvino",
                place_of(named[0]) if named else None,
            ) from error
        return FILE

    def ops(self, source: Source) -> Counter[str]:
        nodes = branches.nodes(source.stage.exported.graph_module)
        return Counter(op_name(node) for node in nodes if node.op == "call_function")

    def rehearse(self, source: Source, folder: Path, precision: str, target: Sequence[str] = ()) -> None:
        """Nothing: what torch exports it compiles, in minutes."""

    def target(self, asked: Sequence[str]) -> list[str]:
        here = cuda.device()
        if not here or here not in asked:
            return engine.features()
        if not engine.has_cuda():
            what = f"{here} is asked for, and torch {engine.version()} is installed without CUDA"
            raise OptpassError("target", what, "install torch with CUDA, or leave --target out for the CPU")
        return [*engine.features(), here]

    def keeps_kernels(self, target: Sequence[str]) -> bool:
        return bool(cuda.named(target))

    def version(self, target: Sequence[str]) -> str:
        return engine.version()
