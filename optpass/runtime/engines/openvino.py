"""Engines of OpenVINO on the CPU, in float32 or, where the CPU has it, in bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optpass.errors import OptpassError
from optpass.runtime.engines.base import Array

LIBRARY = "openvino"
EXTRA = "openvino"


class Opened:
    """A compiled model with one request."""

    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()
        self.outputs = len(compiled.outputs)

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        # OpenVINO reads shared memory as if it were contiguous and aligned.
        inputs = {index: np.ascontiguousarray(array) for index, array in enumerate(arrays)}
        results = self.request.infer(inputs, share_inputs=True)
        return [np.array(results[index]) for index in range(self.outputs)]


@functools.cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def supports_bf16() -> bool:
    """Whether this CPU computes in bfloat16; elsewhere OpenVINO would silently run float32."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def open_engine(path: Path, precision: str, threads: int) -> Opened:
    """Open an ``.xml`` file; the precision is chosen here, the weights are stored as float32."""
    if precision == "bf16" and not supports_bf16():
        raise OptpassError(
            "engine-machine",
            "this CPU has no bfloat16 instructions (avx512_bf16 or amx_bf16), so OpenVINO would not run in bf16",
            "load the engine openvino-f32",
        )
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    return Opened(_core().compile_model(str(path), "CPU", settings))
