"""Engines of ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optpass.runtime.engines.base import Array

LIBRARY = "onnxruntime"
EXTRA = "cpu"


class Opened:
    """A session of ONNX Runtime."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.names = [value.name for value in session.get_inputs()]

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        return list(self.session.run(None, dict(zip(self.names, arrays, strict=True))))


def open_engine(path: Path, precision: str, threads: int) -> Opened:
    """Open an ``.onnx`` file with all graph optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin between two calls take the cores from whatever runs there, another engine among them.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return Opened(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))
