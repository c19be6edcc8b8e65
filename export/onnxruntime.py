"""ONNX Runtime: an ``.onnx`` file, with the weights beside it where they are too large for one."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from optpass.errors import OptpassError
from optpass.export.base import Backend, Source

FILE = "model.onnx"

LARGEST_FILE = 200_000_000
"""In bytes of weights: protobuf ends at 2 GiB, and holds a file three times when it is written and twice when read."""


class OnnxRuntime(Backend):
    """ONNX Runtime on the CPU."""

    name = "onnxruntime"
    precisions = ("f32",)
    in_place = True
    limits = (
        f"weights above {LARGEST_FILE / 1e9:g} GB lie in a file beside the graph",
        "no bfloat16 arithmetic: weights in it are stored so, and computed with in float32",
    )

    def check(self, precision: str) -> None:
        require("onnxruntime", "cpu")

    def rehearse(self, source: Source, folder: Path, precision: str, target: Sequence[str] = ()) -> None:
        self.ops(source)

    def lower(self, source: Source, folder: Path, precision: str, target: Sequence[str] = ()) -> str:
        save(widened(source.onnx), folder / FILE)
        return FILE


def require(library: str, extra: str) -> None:
    """Refuse a backend whose library is not installed, before any work is done for it."""
    if importlib.util.find_spec(library) is None:
        raise OptpassError("backend-library", f"{library} is not installed", f"pip install 'optpass[{extra}]'")


def widened(model: ir.Model) -> ir.Model:
    """The model with float32 in the place of bfloat16, for which ONNX Runtime has no kernels on a CPU.

    Weights stay what they are in the file, half as large, and are widened once, when it is opened.
    """
    narrow = ir.DataType.BFLOAT16
    if not any(_is_narrow(value) for value in model.graph.initializers.values()) and not _casts(model):
        return model
    made = model.clone()
    for node in _casts(made):
        node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    for value in list(made.graph.initializers.values()):
        if _is_narrow(value):
            wide = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{value.name}/wide")
            wide.outputs[0].name = f"{value.name}/wide"
            ir.convenience.replace_all_uses_with(value, wide.outputs[0])
            wide.replace_input_with(0, value)
            made.graph.insert_before(made.graph[0], wide)
    for node in ir.traversal.RecursiveGraphIterator(made.graph):
        constant = node.attributes.get("value")
        if node.op_type == "Constant" and constant is not None and constant.as_tensor().dtype == narrow:
            tensor = ir.tensor(constant.as_tensor().numpy().astype(np.float32))
            node.attributes["value"] = ir.AttrTensor("value", tensor)
    return made


def _is_narrow(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.dtype == ir.DataType.BFLOAT16


def _casts(model: ir.Model) -> list[ir.Node]:
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return [n for n in nodes if n.op_type == "Cast" and n.attributes["to"].as_int() == int(ir.DataType.BFLOAT16)]


def save(model: ir.Model, path: Path) -> None:
    """Write an ONNX file."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if size > LARGEST_FILE else None)
