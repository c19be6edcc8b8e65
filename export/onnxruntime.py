"""ONNX Runtime: an ``.onnx`` file, with the weights beside it where they are too large for one."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

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
    limits = (f"weights above {LARGEST_FILE / 1e9:g} GB lie in a file beside the graph",)

    def check(self, precision: str) -> None:
        require("onnxruntime", "cpu")

    def rehearse(self, source: Source, folder: Path, precision: str, target: Sequence[str] = ()) -> None:
        self.ops(source)

    def lower(self, source: Source, folder: Path, precision: str, target: Sequence[str] = ()) -> str:
        save(source.onnx, folder / FILE)
        return FILE


def require(library: str, extra: str) -> None:
    """Refuse a backend whose library is not installed, before any work is done for it."""
    if importlib.util.find_spec(library) is None:
        raise OptpassError("backend-library", f"{library} is not installed", f"pip install 'optpass[{extra}]'")


def save(model: ir.Model, path: Path) -> None:
    """Write an ONNX file."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if size > LARGEST_FILE else None)
