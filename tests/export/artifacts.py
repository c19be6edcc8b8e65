"""A small artifact, as optimize would write it."""

from __future__ import annotations

from pathlib import Path

from optpass.export import artifact
from tests.export import models

BACKENDS = (("onnxruntime", "f32"), ("openvino", "f32"))


def write(out: Path, backends: tuple[tuple[str, str], ...] = BACKENDS, keep: int = 4, force: bool = False) -> Path:
    dense, pruned = models.vision(), models.vision(keep=keep)
    with artifact.writer(out, source="tests", force=force) as new:
        for backend, precision in backends:
            new.add(pruned, backend, precision)
            new.add(dense, backend, precision, role="dense")
        new.finish(fidelity=new.fidelity())
    return out
