"""Packages of Torch-TensorRT: machine code around engines of TensorRT, run by torch on the GPU that built them.

They are those of AOTInductor, with ops that ``torch_tensorrt`` makes known to torch when it is imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from optpass.errors import OptpassError
from optpass.runtime import cuda
from optpass.runtime.engines import inductor
from optpass.runtime.engines.base import Array, Timed
from optpass.runtime.manifest import Engine

LIBRARY = "torch_tensorrt"
EXTRA = "gpu"
NATIVE = True

INSTALL = "pip install torch-tensorrt, on a machine with an NVIDIA GPU and torch with CUDA"

DISTRIBUTIONS = (("torch_tensorrt", "tensorrt"), ("torch_tensorrt_rtx", "tensorrt_rtx"))
"""Under which names it is installed, each with the library of TensorRT that it builds by."""


def is_installed() -> bool:
    """Whether the package is here; whether it can be imported is known only with a GPU."""
    return importlib.util.find_spec(LIBRARY) is not None


def is_made_here() -> bool:
    """With a GPU, torch with CUDA, and a compiler."""
    return bool(cuda.device()) and inductor.has_cuda() and bool(inductor.compiler())


def version() -> str:
    """Of all that such an engine belongs to, such as ``torch 2.13.0, torch_tensorrt 2.13.0, tensorrt 11.0.0.114``."""
    found = [f"torch {inductor.version()}"]
    for names in DISTRIBUTIONS:
        versions = [f"{name} {_installed(name)}" for name in names if _installed(name)]
        if _installed(names[0]):
            return ", ".join(found + versions)
    return found[0]


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def unfit(engine: Engine) -> str:
    """Another GPU, or another release of what made it."""
    elsewhere = cuda.unfit(engine.target)
    if elsewhere:
        return elsewhere
    if not inductor.has_cuda():
        return f"needs CUDA, and torch {inductor.version()} is installed without it"
    if version() != engine.version:
        return f"is built by {engine.version}, and here is {version()}"
    return ""


def open_engine(path: Path, precision: str, threads: int) -> inductor.Opened:
    """Load a package, which runs code of it; ``torch_tensorrt`` is imported."""
    return inductor.open_engine(path, precision, threads)


def profile(path: Path, precision: str, threads: int, arrays: Sequence[Array], warm_up: int, calls: int) -> list[Timed]:
    """Refuse: times of layers on a GPU are those of NVIDIA's own tools."""
    raise OptpassError("no-profile", "the times of layers on a GPU are not read here", "use Nsight Systems")
