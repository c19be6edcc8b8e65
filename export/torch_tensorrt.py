"""Torch-TensorRT: the exported program with engines of TensorRT in it, in one package that torch runs without Python.

What TensorRT does not take, kernels among it, AOTInductor compiles around the engines; of kernels that is their Triton
face. All is built for the GPU that is here. Networks are strongly typed: in ``f16`` and ``bf16`` the products with
weights and the attention are half, all else stays float32, tokens are chosen, counted and merged in float32.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from optpass.errors import OptpassError, first_line
from optpass.export import branches
from optpass.export.base import Backend, Source
from optpass.export.inductor import SETTINGS, check_compiler, contiguous, moved
from optpass.export.standard import LOW
from optpass.program import Stage, dynamic_shapes, op_name
from optpass.runtime import cuda
from optpass.runtime.engines import inductor
from optpass.runtime.engines import torch_tensorrt as engine

FILE = "model.pt2"

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}

PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "conv1d", "conv2d", "conv3d")
"""Ops that are computed in half precision where they have a weight."""

ATTENTION = "scaled_dot_product_attention"


class TorchTensorRT(Backend):
    """Torch-TensorRT, on the GPU that is here."""

    name = "torch-tensorrt"
    precisions = ("f32", "f16", "bf16")
    form = "the exported program, in ATen, kernels whole"
    limits = (
        "built on the GPU that it runs on, for these releases of torch, torch-tensorrt and TensorRT",
        "opened on request only",
    )

    def check(self, precision: str) -> None:
        if not engine.is_installed():
            raise OptpassError("backend-library", "torch-tensorrt is not installed", engine.INSTALL)
        check_compiler()

    def target(self, asked: Sequence[str]) -> list[str]:
        here = cuda.device()
        if not here or not inductor.has_cuda():
            lacks = f"torch {inductor.version()} is installed without CUDA" if here else "there is none"
            what = f"torch-tensorrt builds for the NVIDIA GPU that is here, and {lacks}"
            raise OptpassError("target", what, "build where there is one, or for GPUs by name with tensorrt")
        if asked and here not in asked:
            what = f"torch-tensorrt builds for the GPU that is here, {here}, and not for {', '.join(asked)}"
            raise OptpassError("target", what, f"name {here} too, or build for the others with tensorrt")
        return [here]

    def version(self, target: Sequence[str]) -> str:
        return engine.version()

    def keeps_kernels(self, target: Sequence[str]) -> bool:
        return True

    def lower(self, source: Source, folder: Path, precision: str, target: Sequence[str] = ()) -> str:
        stage = contiguous(source.whole)
        stage = halved(stage, DTYPES[precision]) if precision in DTYPES else stage
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                _build(stage, folder / FILE)
        except Exception as error:  # of types of their own, or of the compiler
            what = f"torch-tensorrt cannot compile the model: {first_line(error)[:200]}"
            raise OptpassError("not-lowered", what, "use tensorrt or onnxruntime") from error
        return FILE

    def ops(self, source: Source) -> Counter[str]:
        nodes = branches.nodes(source.whole.exported.graph_module)
        return Counter(op_name(node) for node in nodes if node.op == "call_function")

    def rehearse(self, source: Source, folder: Path, precision: str, target: Sequence[str] = ()) -> None:
        """Nothing: what TensorRT does not take, torch runs."""


def _build(stage: Stage, file: Path) -> None:
    import torch_tensorrt

    compiled = torch_tensorrt.dynamo.compile(
        moved(stage, inductor.GPU),
        arg_inputs=_inputs(torch_tensorrt, stage),
        # casts are in the graph; releases before TensorRT 11 choose precisions by themselves unless they are told
        use_explicit_typing=True,
        disable_tf32=True,
    )
    torch_tensorrt.save(
        compiled,
        str(file),
        output_format="aot_inductor",
        arg_inputs=[tensor.to(inductor.GPU) for tensor in stage.example],
        dynamic_shapes=dynamic_shapes(stage.inputs, stage.ranges),
        inductor_configs=SETTINGS,
    )


def _inputs(library: Any, stage: Stage) -> list[Any]:
    """Smallest, example and largest shape of each input, or the one it has."""
    found = []
    for spec, example in zip(stage.inputs, stage.example, strict=True):
        if not any(isinstance(size, str) for size in spec.shape):
            found.append(library.Input(shape=tuple(example.shape), dtype=example.dtype, name=spec.name))
            continue
        least, most = stage.limits(spec)
        shapes = {"min_shape": least, "opt_shape": tuple(example.shape), "max_shape": most}
        found.append(library.Input(**shapes, dtype=example.dtype, name=spec.name))
    return found


def halved(stage: Stage, dtype: torch.dtype) -> Stage:
    """The stage with products with weights, and attention, in a half precision; all else stays as it is.

    As ``standard.halved`` has it: tokens are chosen, counted and merged by products of other values.
    """
    module = stage.exported.module(check_guards=False)
    assert isinstance(module, GraphModule)
    for node in list(module.graph.nodes):
        name = op_name(node) if node.op == "call_function" and _is_single(node) else ""
        if name == ATTENTION or (name in PRODUCTS and any(_is_weight(module, n) for n in node.all_input_nodes)):
            _halve(module, node, dtype, name == ATTENTION)
    module.graph.eliminate_dead_code()
    module.recompile()
    return stage.retraced(module)


def _halve(module: GraphModule, node: Node, dtype: torch.dtype, attention: bool) -> None:
    graph, mask = module.graph, node.args[3] if attention and len(node.args) > 3 else node.kwargs.get("attn_mask")
    with graph.inserting_before(node):
        for given in node.all_input_nodes:
            if not _is_single(given):
                continue
            # a score that is not seen would be infinite in float16
            seen = graph.call_function(torch.ops.aten.clamp.default, (given, -LOW)) if given is mask else given
            half = graph.call_function(torch.ops.aten.to.dtype, (seen, dtype))
            node.replace_input_with(given, half)
    with graph.inserting_after(node):
        wide = graph.call_function(torch.ops.aten.to.dtype, (node, torch.float32))
    node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)


def _is_single(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype is torch.float32


def _is_weight(module: GraphModule, node: Node) -> bool:
    """Whether it is a constant that is no table of whole numbers, such as places and counts."""
    if node.op != "get_attr":
        return False
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.is_floating_point() and not torch.equal(value, value.round())
