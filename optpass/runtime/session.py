"""An artifact, opened: arrays by name in, arrays by name out, every input checked before the engine sees it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from optpass.errors import OptpassError
from optpass.runtime import manifest as manifests
from optpass.runtime.engines.base import Array, Opened, open_engine
from optpass.runtime.manifest import Bounds, Engine, Manifest, TensorInfo


class Session:
    """An engine of an artifact.

    Attributes:
        name: id of the engine in the manifest.
        engine: its entry there.
        threads: cores that work on one call.
    """

    def __init__(self, manifest: Manifest, name: str, opened: Opened, threads: int) -> None:
        self.manifest = manifest
        self.name = name
        self.engine: Engine = manifest.engines[name]
        self.threads = threads
        self._opened = opened

    @property
    def inputs(self) -> list[TensorInfo]:
        """Name, dtype and shape of each input."""
        return self.engine.inputs

    @property
    def outputs(self) -> list[TensorInfo]:
        """Name, dtype and shape of each output."""
        return self.engine.outputs

    def run(self, **arrays: Any) -> dict[str, Array]:
        """Run the engine.

        Raises:
            OptpassError: an input is missing, unknown, or not of the dtype, rank or size the engine takes.
        """
        checked = check_inputs(self.engine, arrays)
        try:
            results = self._opened.run(checked)
        except Exception as error:  # engines raise errors of their own types
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            what = f"engine {self.name} cannot compute these inputs: {first}"
            raise OptpassError(
                "engine-run", what, "compare them with the example the model was captured with"
            ) from error
        return {info.name: array for info, array in zip(self.outputs, results, strict=True)}

    def __repr__(self) -> str:
        inputs = ", ".join(f"{info.name}: {describe(info)}" for info in self.inputs)
        return f"<Session {self.name} ({inputs})>"


def load(path: str | os.PathLike[str], *, engine: str | None = None, threads: int | None = None) -> Session:
    """Open an artifact after holding each of its files against the manifest.

    Args:
        path: the directory that ``optpass optimize`` wrote.
        engine: id of an engine in it; by default the fastest recorded.
        threads: cores for one call; by default all that this process may use.
    """
    folder = Path(path)
    manifest = manifests.read(folder)
    return open_session(folder, manifest, engine, threads)


def open_session(folder: Path, manifest: Manifest, engine: str | None = None, threads: int | None = None) -> Session:
    """Open an engine of an artifact whose manifest was read, and so checked, before."""
    name = engine or manifest.default
    if name not in manifest.engines:
        known = ", ".join(manifest.engines)
        raise OptpassError("engine-name", f"the artifact has no engine {name!r}", f"it has {known}")
    if threads is not None and threads < 1:
        raise OptpassError("threads", f"threads is {threads}", "give 1 or more")
    count = threads or manifests.cores()
    found = manifest.engines[name]
    opened = open_engine(name, found.backend, found.precision, folder / found.entry, count)
    return Session(manifest, name, opened, count)


def describe(info: TensorInfo) -> str:
    """``float32[batch, 3, 224, 224]``."""
    return f"{info.dtype}[{', '.join(map(str, info.shape))}]"


def check_inputs(engine: Engine, arrays: Mapping[str, Any]) -> list[Array]:
    """The arrays in the order of the engine's inputs."""
    wanted = {info.name: info for info in engine.inputs}
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise OptpassError("input-missing", f"input {missing[0]} is missing", f"give {_signature(engine)}")
    extra = [name for name in arrays if name not in wanted]
    if extra:
        raise OptpassError("input-unknown", f"the engine has no input {extra[0]!r}", f"give {_signature(engine)}")
    sizes: dict[str, tuple[int, str]] = {}
    return [_checked(info, arrays[info.name], engine.dynamic, sizes) for info in engine.inputs]


def _signature(engine: Engine) -> str:
    return ", ".join(f"{info.name}: {describe(info)}" for info in engine.inputs)


def _checked(info: TensorInfo, given: Any, dynamic: Mapping[str, Bounds], sizes: dict[str, tuple[int, str]]) -> Array:
    if not isinstance(given, np.ndarray | np.generic):
        kind = type(given).__name__
        raise OptpassError("input-type", f"input {info.name} is a {kind}", f"give a numpy array, {describe(info)}")
    array = np.asarray(given)
    if array.dtype != np.dtype(info.dtype):
        raise OptpassError(
            "input-dtype",
            f"input {info.name} is {array.dtype}, the engine takes {info.dtype}",
            f"convert it: {info.name}.astype(numpy.{_scalar(info.dtype)})",
        )
    if array.ndim != len(info.shape):
        raise OptpassError(
            "input-rank",
            f"input {info.name} has {array.ndim} dimensions, the engine takes {len(info.shape)}",
            f"give {describe(info)}",
        )
    for axis, (size, wanted) in enumerate(zip(array.shape, info.shape, strict=True)):
        if isinstance(wanted, int):
            _check_static(info, axis, size, wanted)
        else:
            _check_dynamic(info, axis, size, wanted, dynamic[wanted], sizes)
    return array


def _scalar(dtype: str) -> str:
    return "bool_" if dtype == "bool" else dtype


def _check_static(info: TensorInfo, axis: int, size: int, wanted: int) -> None:
    if size != wanted:
        raise OptpassError(
            "input-shape",
            f"input {info.name} has {size} along dimension {axis}, the engine takes {wanted}",
            f"give {describe(info)}, or optimize with that dimension dynamic",
        )


def _check_dynamic(
    info: TensorInfo, axis: int, size: int, name: str, bounds: Bounds, sizes: dict[str, tuple[int, str]]
) -> None:
    if not bounds.minimum <= size <= bounds.maximum:
        raise OptpassError(
            "input-shape",
            f"input {info.name} has {size} along dimension {axis}, "
            f"the engine takes {bounds.minimum} to {bounds.maximum}",
            f"give {describe(info)} inside that range, or optimize with a wider one",
        )
    known, where = sizes.setdefault(name, (size, f"{info.name}, dimension {axis}"))
    if known != size:
        raise OptpassError(
            "input-shape",
            f"input {info.name} has {size} along dimension {axis}, but {where} is {known}",
            f"both are {name}: give them the same size",
        )
