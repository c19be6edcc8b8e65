"""Compute products with weights in 8-bit integers, by the tools that come with the engines.

Paper: Integer Quantization for Deep Learning Inference, arXiv 2004.09602, sections 3 and 5 (scales for each channel of
a weight, ranges of activations from calibration); NNCF applies SmoothQuant, arXiv 2211.10438, to transformers.
ONNX Runtime's tool quantizes activations when they are there, or (``mode=static``) by ranges found beforehand; NNCF's,
for OpenVINO, by ranges alone. Weights that are whole numbers, with which tokens are counted, are left as they are.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from optpass.errors import OptpassError
from optpass.export.fidelity import tolerance
from optpass.export.onnxruntime import LARGEST_FILE, require
from optpass.passes.base import Arrays, Finishing, Options
from optpass.program import Stage

TOOLS = {"onnxruntime": ("onnxruntime", "cpu"), "openvino": ("nncf", "quantize")}
"""The library that quantizes the files of a backend, and the extra that installs it."""


class QuantizeOptions(Options):
    """Options of ``quantize``."""

    dtype: Literal["int8"] = Field("int8", description="of weights and activations")
    mode: Literal["dynamic", "static"] = Field(
        "dynamic", description="ranges of activations in onnxruntime: those of each call, or calibrated beforehand"
    )
    samples: int = Field(128, ge=1, description="how many samples to calibrate on, where that is done; at most half")
    max_error: float | None = Field(
        None,
        gt=0,
        description="largest difference from eager execution, relative to the largest value of an output; by default "
        "what 8 bits in so many products in a row explain",
    )


class Quantize(Finishing):
    """Compute products with weights in 8-bit integers; the difference is measured and held to a limit."""

    name = "quantize"
    options_type = QuantizeOptions
    identity: ClassVar[dict[str, Any]] = {}
    conflicts: ClassVar[Sequence[str]] = ("precision",)

    def check(self, backend: str) -> None:
        if backend not in TOOLS:
            what = f"quantize has no tool for {backend}"
            raise OptpassError("quantize-backend", what, f"it has one for {', '.join(TOOLS)}")
        require(*TOOLS[backend])

    def samples(self, backend: str) -> int:
        """None for onnxruntime unless ``mode=static``."""
        return self.options.samples if backend == "openvino" or self.options.mode == "static" else 0

    def limit(self, stage: Stage) -> float:
        """``max_error``, or what 8 bits explain."""
        return self.options.max_error or tolerance(stage, self.options.dtype)

    def finish(self, backend: str, source: Path, target: Path, samples: Sequence[Arrays]) -> Mapping[str, int]:
        with _quiet():
            return (_by_nncf if backend == "openvino" else _by_onnxruntime)(source, target, samples)


ERRORS = 3
"""From here on ONNX Runtime logs; below are the notes on graphs that its own tool leaves unused tensors in."""


def _by_onnxruntime(source: Path, target: Path, samples: Sequence[Arrays]) -> Mapping[str, int]:
    import onnx
    import onnxruntime
    from onnxruntime import quantization

    graph = onnx.load(str(source)).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    names = [
        n.name for n in products if n.input[1] in weights and _learned(onnx.numpy_helper.to_array(weights[n.input[1]]))
    ]
    # of sessions that calibrate, which take no options
    onnxruntime.set_default_logger_severity(ERRORS)
    common: dict[str, Any] = {
        "op_types_to_quantize": ["MatMul", "Gemm"],
        "nodes_to_quantize": names,
        "per_channel": True,
        "weight_type": quantization.QuantType.QInt8,
        "use_external_data_format": sum(len(tensor.raw_data) for tensor in graph.initializer) > LARGEST_FILE,
        "extra_options": {"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
    }
    if samples:

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.left = iter(samples)

            def get_next(self) -> Arrays | None:
                return next(self.left, None)

        quantization.quantize_static(
            str(source), str(target), Reader(), activation_type=quantization.QuantType.QUInt8, **common
        )
    else:
        quantization.quantize_dynamic(str(source), str(target), **common)
    return {"int8": len(names), "f32": len(products) - len(names)}


def _by_nncf(source: Path, target: Path, samples: Sequence[Arrays]) -> Mapping[str, int]:
    # the tool reports on its use over the network unless it is told that it runs by itself
    os.environ.setdefault("NNCF_CI", "1")
    import nncf
    import openvino

    model = openvino.Core().read_model(str(source))
    products = [op for op in model.get_ops() if op.get_type_name() == "MatMul"]
    left = [op.get_friendly_name() for op in products if not _has_learned_weight(op)]
    names = [value.get_any_name() for value in model.inputs]
    # what lies between holds places, counts and masks as well
    others = sorted({op.get_type_name() for op in model.get_ops()} - {"MatMul", "Constant", "Parameter", "Result"})
    made = nncf.quantize(
        model,
        nncf.Dataset(list(samples), lambda sample: {name: sample[name] for name in names}),
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=left, types=others, validate=False),
    )
    openvino.save_model(made, str(target), compress_to_fp16=False)
    return {"int8": len(products) - len(left), "f32": len(left)}


def _has_learned_weight(op: Any) -> bool:
    maker = op.input_value(1).get_node()
    return maker.get_type_name() == "Constant" and _learned(maker.data)


def _learned(weight: np.ndarray[Any, Any]) -> bool:
    """Whether a weight is no table of whole numbers, with which places and tokens are counted."""
    return not np.array_equal(weight, np.round(weight))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice and the progress bars of the tools."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
