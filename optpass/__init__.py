"""A compiler-pass optimizer for transformers: any captured model to a verified, faster engine.

The public names are imported when first used, so that ``import optpass`` costs nothing and a runtime
that only loads engines never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optpass.api import bench, bisect, diff, doctor, inspect, optimize, preview, report, verify
    from optpass.errors import OptpassError
    from optpass.gating import gate
    from optpass.results import OptimizeResult
    from optpass.runtime.session import Session, load

__version__ = "0.1.0"

_HOMES = {
    "optimize": "optpass.api",
    "inspect": "optpass.api",
    "preview": "optpass.api",
    "verify": "optpass.api",
    "bench": "optpass.api",
    "bisect": "optpass.api",
    "diff": "optpass.api",
    "doctor": "optpass.api",
    "report": "optpass.api",
    "gate": "optpass.gating",
    "OptimizeResult": "optpass.results",
    "OptpassError": "optpass.errors",
    "Session": "optpass.runtime.session",
    "load": "optpass.runtime.session",
}

__all__ = [
    "OptimizeResult",
    "OptpassError",
    "Session",
    "bench",
    "bisect",
    "diff",
    "doctor",
    "gate",
    "inspect",
    "load",
    "optimize",
    "preview",
    "report",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'optpass' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
