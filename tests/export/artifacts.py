"""A small artifact, as optimize would write it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """An artifact whose manifest was changed by hand."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return folder
