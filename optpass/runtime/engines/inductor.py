"""Engines of AOTInductor: machine code in a ``.pt2`` package, for the CPU or an NVIDIA GPU, run by torch.

The only module of the runtime that imports torch, and only when such an engine is opened. Opening one loads a shared
library, which may do whatever this process may; hence ``NATIVE``: it takes the caller to ask for it.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from optpass.errors import OptpassError
from optpass.runtime import cuda
from optpass.runtime import manifest as manifests
from optpass.runtime.engines.base import Array, Timed
from optpass.runtime.manifest import Engine

LIBRARY = "torch"
EXTRA = "cpu"
NATIVE = True

GPU = "cuda"
"""What torch calls the device of an engine that is built for a GPU."""

COMPILERS = ("g++", "clang++", "c++")


def unfit(engine: Engine) -> str:
    """Code for CPU features that are not here, or for another release of torch."""
    gpus = cuda.named(engine.target)
    elsewhere = cuda.unfit(gpus) if gpus else ""
    if elsewhere:
        return elsewhere
    if gpus and not has_cuda():
        return f"is built for {', '.join(gpus)}, and torch {metadata.version('torch')} has no CUDA"
    lacking = [feature for feature in engine.target if feature not in (*features(), *gpus)]
    if lacking:
        return f"is machine code for a CPU with {', '.join(lacking)}, which this one does not have"
    here = version()
    if here.rsplit(".", 1)[0] != engine.version.rsplit(".", 1)[0]:
        return f"is machine code for torch {engine.version}, and here is {here}"
    return ""


def compiler() -> str:
    """The C++ compiler that makes such code here; empty where there is none."""
    return next((name for name in (os.environ.get("CXX", ""), *COMPILERS) if name and shutil.which(name)), "")


def is_made_here() -> bool:
    """With a compiler."""
    return bool(compiler())


def features() -> list[str]:
    """The machine type and the CPU features that compiled code may use here."""
    return [platform.machine(), *manifests.hardware().flags]


def has_cuda() -> bool:
    """Whether torch is built for NVIDIA GPUs, as far as its version says: to ask torch itself is to import it."""
    return not metadata.version("torch").endswith("+cpu")


def version() -> str:
    """That of torch, without the mark of its build."""
    return metadata.version("torch").partition("+")[0]


class Opened:
    """A loaded package. ``threads`` are those of torch, which it has once for the whole process."""

    def __init__(self, compiled: Any, threads: int) -> None:
        self.compiled = compiled
        self.threads = threads
        # the package knows what it was compiled for
        self.device = compiled.get_metadata().get("AOTI_DEVICE_KEY", "cpu")

    def run(self, arrays: Sequence[Array], wanted: Sequence[int] | None = None) -> list[Array]:
        import torch

        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        # torch neither reads strided memory without being told nor likes memory that it may not write
        tensors = [torch.from_numpy(np.require(a, requirements=("C", "W"))).to(self.device) for a in arrays]
        with torch.inference_mode():
            results = self.compiled(*tensors)
        numbers = range(len(results)) if wanted is None else wanted
        return [_array(results[number]) for number in numbers]


def _array(tensor: Any) -> Array:
    import torch

    whole = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
    return np.array(whole.contiguous().cpu().numpy())


def open_engine(path: Path, precision: str, threads: int) -> Opened:
    """Load a ``.pt2`` package, which runs code of it."""
    import torch._inductor

    return Opened(torch._inductor.aoti_load_package(str(path)), threads)


def profile(path: Path, precision: str, threads: int, arrays: Sequence[Array], warm_up: int, calls: int) -> list[Timed]:
    """Refuse: ops are fused into functions that no profiler of torch tells apart."""
    raise OptpassError("no-profile", "AOTInductor does not tell what its ops take", "profile another engine")
