"""OpenVINO: ``.xml`` and ``.bin``, read from the same ONNX graph that ONNX Runtime runs.

Of the two ways in, the one through ONNX takes 1.8 s for a DeiT-S and the one from the exported program 4.5 s; the
engines are equally fast, since both end in the fused attention. The weights stay float32: the precision of the
arithmetic is chosen when the engine is opened.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from optpass.errors import OptpassError
from optpass.export import onnxruntime
from optpass.export.base import Backend, Source

FILE = "model.xml"


class OpenVino(Backend):
    """OpenVINO on the CPU."""

    name = "openvino"
    precisions = ("f32", "bf16")
    shares_files = True

    def check(self, precision: str) -> None:
        onnxruntime.require("openvino", "openvino")
        from optpass.runtime.engines.openvino import supports_bf16

        if precision == "bf16" and not supports_bf16():
            raise OptpassError(
                "engine-machine",
                "this CPU has no bfloat16 instructions, so OpenVINO would run float32 instead",
                "use openvino in f32",
            )

    def lower(self, source: Source, folder: Path, precision: str, target: Sequence[str] = ()) -> str:
        import openvino

        # Beside the target, so that weights of many GB need no room elsewhere.
        with tempfile.TemporaryDirectory(dir=folder) as work:
            file = Path(work) / onnxruntime.FILE
            onnxruntime.save(source.onnx, file)
            try:
                # which maps the weights, where convert_model holds them twice
                model = openvino.Core().read_model(file)
            except Exception as error:  # of OpenVINO's own types
                raise OptpassError(
                    "not-lowered", f"OpenVINO cannot convert the model: {_last_line(error)}", "use onnxruntime"
                ) from error
            openvino.save_model(model, str(folder / FILE), compress_to_fp16=False)
        return FILE


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else type(error).__name__
