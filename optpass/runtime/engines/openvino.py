"""Engines of OpenVINO on the CPU, in float32 or, where the CPU has it, in bfloat16."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optpass.runtime.engines.base import Array, Timed, typical
from optpass.runtime.manifest import Engine

LIBRARY = "openvino"
EXTRA = "openvino"
NATIVE = False


def unfit(engine: Engine) -> str:
    """Bfloat16 on a CPU that has none."""
    if engine.precision == "bf16" and not supports_bf16():
        return "computes in bfloat16, for which this CPU has no instructions (avx512_bf16 or amx_bf16)"
    return ""


class Opened:
    """A compiled model with one request."""

    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()
        self.outputs = len(compiled.outputs)
        self.given: list[Array | None] = [None] * len(compiled.inputs)

    def run(self, arrays: Sequence[Array], wanted: Sequence[int] | None = None) -> list[Array]:
        import openvino

        for index, array in enumerate(arrays):
            # what was given before is read where it lies, such as a cache that grows in place
            if self.given[index] is not array:
                # OpenVINO reads shared memory as if it were contiguous and aligned.
                whole = array if array.flags.c_contiguous else np.ascontiguousarray(array)
                self.request.set_input_tensor(index, openvino.Tensor(whole, shared_memory=True))
                self.given[index] = whole
        # what is wanted is copied below, and nothing here
        self.request.infer(share_outputs=True)
        numbers = range(self.outputs) if wanted is None else wanted
        return [np.array(self.request.get_output_tensor(index).data) for index in numbers]


@functools.cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def supports_bf16() -> bool:
    """Whether this CPU computes in bfloat16; elsewhere OpenVINO would silently run float32."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def open_engine(path: Path, precision: str, threads: int) -> Opened:
    """Open an ``.xml`` file; the precision is chosen here, the weights are stored as float32."""
    return Opened(_compiled(path, precision, threads))


def profile(path: Path, precision: str, threads: int, arrays: Sequence[Array], warm_up: int, calls: int) -> list[Timed]:
    """Time each node of the compiled graph by the counters of the request."""
    opened = Opened(_compiled(path, precision, threads, PERF_COUNT=True))
    for _ in range(warm_up):
        opened.run(arrays)
    times: list[dict[tuple[str, str], float]] = []
    for _ in range(calls):
        opened.run(arrays)
        times.append(defaultdict(float))
        for info in opened.request.profiling_info:
            if info.status.name == "EXECUTED":
                times[-1][info.node_name, info.node_type] += info.real_time.total_seconds() * 1e3
    return typical(times)


def _compiled(path: Path, precision: str, threads: int, **more: Any) -> Any:
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    return _core().compile_model(str(path), "CPU", {**settings, **more})
