"""What an opened engine is, and the finding of its kind by name."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from optpass.errors import OptpassError
from optpass.runtime import engines
from optpass.runtime.manifest import Engine
from optpass.runtime.providers import Provider

Array = NDArray[Any]


class Opened(Protocol):
    """An engine ready to run: arrays in the order of its inputs to arrays in the order of its outputs."""

    def run(self, arrays: Sequence[Array], wanted: Sequence[int] | None = None) -> list[Array]:
        """Outputs by their number, all by default."""
        ...


@dataclass(frozen=True)
class Timed:
    """An op as the engine runs it, which may be several of the graph in one: its own names, milliseconds per call."""

    node: str
    op: str
    milliseconds: float


def typical(calls: Sequence[Mapping[tuple[str, str], float]]) -> list[Timed]:
    """The median over calls of the milliseconds of each node and op: a call that was disturbed says nothing."""
    keys = dict.fromkeys(key for call in calls for key in call)
    return [Timed(node, op, median(call.get((node, op), 0.0) for call in calls)) for node, op in keys]


class Kind(Protocol):
    """A module of this package.

    Attributes:
        LIBRARY: the package it needs; EXTRA: the extra of optpass that brings it.
        NATIVE: whether its files hold machine code, so that they are opened only where the caller asks for them.
    """

    LIBRARY: str
    EXTRA: str
    NATIVE: bool

    def unfit(self, engine: Engine) -> str:
        """Why an engine cannot run on this machine, in words; empty where it can. The library is installed."""
        ...

    def open_engine(self, path: Path, precision: str, threads: int) -> Opened:
        """Open a file; ``threads`` cores work on one call."""
        ...

    def profile(
        self, path: Path, precision: str, threads: int, arrays: Sequence[Array], warm_up: int, calls: int
    ) -> list[Timed]:
        """Run a file with the profiler of the library; ``warm_up`` calls before the ``calls`` that count."""
        ...


def kinds() -> list[str]:
    """Names of the kinds there are: those of backends."""
    return [module.name.replace("_", "-") for module in pkgutil.iter_modules(engines.__path__) if module.name != "base"]


def is_native(backend: str) -> bool:
    """Whether engines of a kind are machine code, to be opened on request only."""
    return backend in kinds() and kind_of(backend).NATIVE


def unfit(engine: Engine) -> str:
    """Why an engine cannot run on this machine, in words that follow its name; empty where nothing is known of it."""
    if engine.backend not in kinds():
        return f"is of a kind that this optpass does not know, {engine.backend}"
    kind = kind_of(engine.backend)
    if importlib.util.find_spec(kind.LIBRARY) is None:
        built = f"is built for {', '.join(engine.target)} and " if engine.target and not kind.NATIVE else ""
        return f"{built}needs {kind.LIBRARY}, which is not installed"
    return kind.unfit(engine)


def is_made_here(backend: str) -> bool:
    """Whether this machine builds engines of a kind that it runs: with torch, its library, and what the kind asks for.

    What that is a function ``is_made_here`` of its module says; kinds without one ask for nothing else.
    """
    if backend not in kinds() or any(
        importlib.util.find_spec(name) is None for name in ("torch", kind_of(backend).LIBRARY)
    ):
        return False
    asked = getattr(kind_of(backend), "is_made_here", None)
    return asked is None or bool(asked())


def layers(engine: Engine, path: Path) -> tuple[str, list[dict[str, str]]]:
    """What the layers of a file are, in words, and the layers with name, type and precision.

    Of the kinds whose modules have a function ``layers``; none for the others.
    """
    found = getattr(kind_of(engine.backend), "layers", None) if engine.backend in kinds() else None
    return cast(tuple[str, list[dict[str, str]]], found(path)) if found else ("", [])


def open_engine(name: str, backend: str, precision: str, path: Path, threads: int) -> Opened:
    """Open the engine ``name`` of an artifact.

    Raises:
        OptpassError: the kind is unknown, its library is not installed, or the engine does not fit this machine.
    """
    kind = require(name, backend)
    with _told(name, kind):
        return kind.open_engine(path, precision, threads)


def open_on(name: str, path: Path, threads: int, provider: Provider) -> Opened:
    """Open the engine ``name`` of ONNX Runtime on an execution provider; what it took is ``taken`` of the result.

    Raises:
        OptpassError: as ``open_engine``; or the provider is not there, or takes fewer of the nodes than asked.
    """
    from optpass.runtime.engines import onnxruntime

    kind = require(name, "onnxruntime")
    with _told(name, kind):
        return onnxruntime.open_on(path, threads, provider)


def profile_engine(
    name: str,
    backend: str,
    precision: str,
    path: Path,
    threads: int,
    arrays: Sequence[Array],
    warm_up: int,
    calls: int,
) -> list[Timed]:
    """Profile the engine ``name`` of an artifact.

    Raises:
        OptpassError: as ``open_engine``.
    """
    kind = require(name, backend)
    with _told(name, kind):
        return kind.profile(path, precision, threads, arrays, warm_up, calls)


def require(name: str, backend: str) -> Kind:
    """The module for the engine ``name``, its library imported.

    Raises:
        OptpassError: the kind is unknown, or its library is not installed.
    """
    if backend not in kinds():
        raise OptpassError("engine-kind", f"{backend} is unknown to this optpass", f"it knows {', '.join(kinds())}")
    kind = kind_of(backend)
    try:
        importlib.import_module(kind.LIBRARY)
    except Exception as error:  # torch_tensorrt raises all kinds where a library of TensorRT or the GPU is not there
        raise OptpassError(
            "engine-library",
            f"engine {name} needs {kind.LIBRARY}, which cannot be imported ({error})",
            f"pip install 'optpass[{kind.EXTRA}]', or load another engine",
        ) from error
    return kind


def kind_of(backend: str) -> Kind:
    """The module of a kind."""
    return cast(Kind, importlib.import_module(f"{engines.__name__}.{backend.replace('-', '_')}"))


@contextlib.contextmanager
def _told(name: str, kind: Kind) -> Iterator[None]:
    try:
        yield
    except OptpassError:
        raise
    except Exception as error:  # engines raise types of their own, or RuntimeError
        text = str(error).strip().splitlines()
        raise OptpassError(
            "engine-open",
            f"{kind.LIBRARY} {_version(kind.LIBRARY)} cannot open engine {name}: {text[-1][:200] if text else error!r}",
            f"use the version of {kind.LIBRARY} that the manifest names, or rebuild the artifact here",
        ) from error


def _version(library: str) -> str:
    return str(getattr(importlib.import_module(library), "__version__", ""))
