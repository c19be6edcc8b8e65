"""What is installed, what can be built and what runs on this machine, and what each backend makes of a model."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from optpass.errors import OptpassError
from optpass.export.base import Backend, Source
from optpass.export.onnxruntime import LARGEST_FILE
from optpass.program import Stage
from optpass.results import BackendInfo, ModelOnBackend
from optpass.runtime import cuda
from optpass.runtime import manifest as manifests
from optpass.runtime.engines import inductor
from optpass.runtime.engines.base import kind_of


def facts() -> dict[str, str]:
    """The machine, by name of the fact."""
    hardware = manifests.hardware()
    return {
        "python": platform.python_version(),
        "system": hardware.system,
        "cpu": f"{hardware.cpu}, {hardware.cores} cores, {', '.join(hardware.flags) or 'no features of note'}",
        "NVIDIA GPU": cuda.device() or "none",
        "C++ compiler": inductor.compiler() or "none",
    }


def machine(backends: Sequence[Backend], target: Sequence[str]) -> list[BackendInfo]:
    """Each backend in each of its precisions."""
    rows = []
    for backend in backends:
        devices = _devices(backend, target)
        for precision in backend.precisions:
            builds = backend.builds(precision, devices)
            rows.append(
                BackendInfo(
                    backend=backend.name,
                    precision=precision,
                    library=_library(backend),
                    builds=builds.what if builds else "",
                    runs=backend.runs(precision, devices),
                    remedy=builds.remedy if builds else "",
                )
            )
    return rows


def _devices(backend: Backend, target: Sequence[str]) -> Sequence[str]:
    """Those asked for; else all that the backend builds for by name, where no GPU is here."""
    return target or (() if cuda.device() else backend.devices)


def _library(backend: Backend) -> str:
    """The package that opens engines of a backend, with its version."""
    package = kind_of(backend.name).LIBRARY
    try:
        return f"{package} {metadata.version(DISTRIBUTIONS.get(package, package))}"
    except metadata.PackageNotFoundError:
        return f"{package}, not installed"


DISTRIBUTIONS = {"tensorrt_rtx_bindings": "tensorrt_rtx_cu13_bindings"}
"""Packages that are installed under another name than they are imported by."""


def weights(stage: Stage) -> int:
    """Bytes of the parameters and constants of a stage, those that are shared counted once."""
    held = {**stage.exported.state_dict, **stage.exported.constants}
    storages = [tensor.untyped_storage() for tensor in held.values() if isinstance(tensor, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def model(stage: Stage, backends: Sequence[Backend], target: Sequence[str]) -> list[ModelOnBackend]:
    """What each backend makes of a stage; nothing is built, so that a refusal costs little."""
    source, size = Source(stage), weights(stage)
    rows = []
    for backend in backends:
        ops: dict[str, int] = {}
        devices: list[str] = []
        refusal = ""
        try:
            backend.check(backend.precisions[0])
            devices = backend.target(_devices(backend, target))
        except OptpassError as error:
            refusal = str(error)
        try:
            ops = dict(backend.ops(source).most_common())
            if not refusal:
                with tempfile.TemporaryDirectory(prefix="optpass-") as folder:
                    backend.rehearse(source, Path(folder), backend.precisions[0], devices)
        except OptpassError as error:
            refusal = refusal or str(error)
        external = [f"{size / 1e9:.1f} GB of weights go to a file of their own"] if size > LARGEST_FILE else []
        limits = [*backend.limits, *external]
        rows.append(ModelOnBackend(backend=backend.name, form=backend.form, ops=ops, limits=limits, refusal=refusal))
    return rows
