"""A backend: lowers a stage to the files of an engine. Found by scanning this package; one file each."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from optpass import export
from optpass.errors import OptpassError
from optpass.export.translate import translate
from optpass.program import Stage

Progress = Callable[[str, float], None]
"""Called with the step that begins and the seconds that the one before it took."""


class Source:
    """A stage to be lowered, and its ONNX graph, which backends share."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    @functools.cached_property
    def onnx(self) -> ir.Model:
        """The stage as an ONNX model; not to be changed.

        Raises:
            OptpassError: an op has no translation.
        """
        return translate(self.stage)


class Backend:
    """Base of all backends.

    Attributes:
        name: as on the command line; that of a kind in ``optpass.runtime.engines``.
        precisions: those it lowers to, the first by default.
        shares_files: whether all precisions of a stage open the same files.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    shares_files: ClassVar[bool] = False

    def check(self, precision: str) -> None:
        """Raise an OptpassError if engines of that precision cannot be built or run on this machine."""

    def lower(self, source: Source, folder: Path, precision: str) -> str:
        """Write the engine into ``folder``, which exists, and return the name of the file to open.

        Raises:
            OptpassError: the stage cannot be lowered, with the place in the user's model.
        """
        raise NotImplementedError


@functools.cache
def backends() -> Mapping[str, Backend]:
    """All backends by name."""
    found: dict[str, Backend] = {}
    for module in pkgutil.iter_modules(export.__path__):
        loaded = importlib.import_module(f"{export.__name__}.{module.name}")
        for value in vars(loaded).values():
            own = isinstance(value, type) and value.__module__ == loaded.__name__
            if own and issubclass(value, Backend) and value is not Backend:
                found[value.name] = value()
    return found


def backend(name: str, precision: str) -> Backend:
    """The backend of a name, able to build engines of that precision here.

    Raises:
        OptpassError: no such backend or precision, or not on this machine.
    """
    known = backends()
    if name not in known:
        raise OptpassError("unknown-backend", f"there is no backend {name!r}", f"backends are {', '.join(known)}")
    found = known[name]
    if precision not in found.precisions:
        raise OptpassError(
            "unknown-precision", f"{name} has no precision {precision!r}", f"it has {', '.join(found.precisions)}"
        )
    found.check(precision)
    return found
