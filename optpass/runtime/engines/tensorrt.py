"""Engines of TensorRT or TensorRT-RTX on the first NVIDIA GPU.

Which of the two libraries an engine is of, its version, and the compute capabilities that it was built for are in the
manifest; they are compared before anything is opened.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optpass.errors import OptpassError
from optpass.runtime import cuda
from optpass.runtime.engines.base import Array, Timed
from optpass.runtime.manifest import Engine

FULL, RTX = "tensorrt", "tensorrt_rtx"
MODULES = {FULL: ("tensorrt", "tensorrt_bindings"), RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings")}
"""The modules under which the wheels of each library bring it: with the package that names them, or without."""

LAYERS = "layers.json"
"""Beside an engine: the layers that the builder was given, for machines that cannot open it."""


def module_name(library: str) -> str:
    """The module of a library that is installed here; empty where none is."""
    return next((name for name in MODULES[library] if importlib.util.find_spec(name) is not None), "")


@functools.cache
def load_library(library: str) -> Any:
    """Import a library."""
    return importlib.import_module(module_name(library))


LIBRARY = module_name(FULL) or module_name(RTX) or RTX
EXTRA = "tensorrt"
NATIVE = False


def is_made_here() -> bool:
    """Engines for other GPUs are made anywhere; one that runs here takes a GPU."""
    return bool(cuda.device())


def version(library: str) -> str:
    """As the manifest has it: ``tensorrt_rtx 1.7.1.116``."""
    return f"{library} {load_library(library).__version__}"


def unfit(engine: Engine) -> str:
    """Another GPU, another library, or another version of it."""
    elsewhere = cuda.unfit(engine.target)
    if elsewhere:
        return elsewhere
    library = engine.version.partition(" ")[0]
    if not module_name(library):
        return f"is built by {engine.version}, which is not installed"
    if version(library) != engine.version:
        return f"is built by {engine.version}, and here is {version(library).partition(' ')[2]}"
    return ""


class Opened:
    """An engine with one execution context; arrays go to the GPU and back in each call."""

    def __init__(self, library: Any, engine: Any) -> None:
        self.library, self.engine = library, engine
        self.context = engine.create_execution_context()
        self.memory = cuda.Memory()
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        self.inputs = [name for name in names if modes[name] == library.TensorIOMode.INPUT]
        self.outputs = [name for name in names if modes[name] == library.TensorIOMode.OUTPUT]

    def run(self, arrays: Sequence[Array], wanted: Sequence[int] | None = None) -> list[Array]:
        self.memory.enter()
        for name, array in zip(self.inputs, arrays, strict=True):
            whole = np.ascontiguousarray(array)
            self.context.set_input_shape(name, whole.shape)
            self.context.set_tensor_address(name, self.memory.upload(name, whole))
        shapes = {name: tuple(self.context.get_tensor_shape(name)) for name in self.outputs}
        dtypes = {name: np.dtype(self.library.nptype(self.engine.get_tensor_dtype(name))) for name in self.outputs}
        for name, shape in shapes.items():
            size = int(np.prod(shape, dtype=np.int64)) * dtypes[name].itemsize
            self.context.set_tensor_address(name, self.memory.address(name, size))
        if not self.context.execute_async_v3(self.memory.stream.value):
            raise RuntimeError("TensorRT cannot execute the engine")
        numbers = range(len(self.outputs)) if wanted is None else wanted
        names = [self.outputs[number] for number in numbers]
        return [self.memory.download(name, shapes[name], dtypes[name]) for name in names]


def open_engine(path: Path, precision: str, threads: int) -> Opened:
    """Open an ``.engine`` file on the first GPU."""
    library, engine = _deserialized(path)
    return Opened(library, engine)


def _deserialized(path: Path) -> tuple[Any, Any]:
    kind = json.loads((path.parent / LAYERS).read_text(encoding="utf-8"))["library"]
    library = load_library(kind)
    engine = library.Runtime(library.Logger(library.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise RuntimeError(f"{kind} does not take it")
    return library, engine


def layers(path: Path) -> tuple[str, list[dict[str, str]]]:
    """The layers of an engine with name, type and precision: as built where it opens, otherwise as they were asked for.

    Returns:
        What the layers are, in words, and the layers.
    """
    if cuda.device():
        try:
            library, engine = _deserialized(path)
            text = engine.create_engine_inspector().get_engine_information(library.LayerInformationFormat.JSON)
            return "as built", [_described(layer) for layer in json.loads(text)["Layers"]]
        except (RuntimeError, ImportError, AttributeError, KeyError, ValueError):
            pass
    asked = json.loads((path.parent / LAYERS).read_text(encoding="utf-8"))["layers"]
    return "as given to the builder, which fuses them", asked


def _described(layer: Any) -> dict[str, str]:
    """A layer as the inspector tells it: a name alone where the engine was built without details."""
    if isinstance(layer, str):
        return {"name": layer, "type": "", "precision": ""}
    outputs = layer.get("Outputs") or [{}]
    kind = str(layer.get("Format/Datatype") or outputs[0].get("Format/Datatype") or outputs[0].get("Datatype") or "")
    return {"name": str(layer.get("Name", "")), "type": str(layer.get("LayerType", "")), "precision": kind}


def profile(path: Path, precision: str, threads: int, arrays: Sequence[Array], warm_up: int, calls: int) -> list[Timed]:
    """Refuse: times of layers on a GPU are those of NVIDIA's own tools."""
    raise OptpassError("no-profile", "the times of layers on a GPU are not read here", "use Nsight Systems")
