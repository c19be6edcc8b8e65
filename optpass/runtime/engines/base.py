"""What an opened engine is, and the finding of its kind by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from optpass.errors import OptpassError
from optpass.runtime import engines

Array = NDArray[Any]


class Opened(Protocol):
    """An engine ready to run: arrays in the order of its inputs to arrays in the order of its outputs."""

    def run(self, arrays: Sequence[Array]) -> list[Array]: ...


class Kind(Protocol):
    """A module of this package.

    Attributes:
        LIBRARY: the package it needs; EXTRA: the extra of optpass that brings it.
    """

    LIBRARY: str
    EXTRA: str

    def open_engine(self, path: Path, precision: str, threads: int) -> Opened:
        """Open a file; ``threads`` cores work on one call."""
        ...


def kinds() -> list[str]:
    """Names of the kinds there are."""
    return [module.name for module in pkgutil.iter_modules(engines.__path__) if module.name != "base"]


def open_engine(name: str, backend: str, precision: str, path: Path, threads: int) -> Opened:
    """Open the engine ``name`` of an artifact.

    Raises:
        OptpassError: the kind is unknown, its library is not installed, or the engine does not fit this machine.
    """
    if backend not in kinds():
        raise OptpassError("engine-kind", f"{backend} is unknown to this optpass", f"it knows {', '.join(kinds())}")
    kind = cast(Kind, importlib.import_module(f"{engines.__name__}.{backend}"))
    try:
        importlib.import_module(kind.LIBRARY)
    except ImportError as error:
        raise OptpassError(
            "engine-library",
            f"engine {name} needs {kind.LIBRARY}, which cannot be imported ({error})",
            f"pip install 'optpass[{kind.EXTRA}]', or load another engine",
        ) from error
    try:
        return kind.open_engine(path, precision, threads)
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
