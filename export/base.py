"""A backend: lowers a stage to the files of an engine. Found by scanning this package; one file each."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from optpass import export
from optpass.errors import OptpassError, Refusal
from optpass.export.translate import OPSET, translate
from optpass.export.translations import CONTRIB
from optpass.program import Stage
from optpass.runtime.engines.base import unfit
from optpass.runtime.manifest import Engine

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

    @property
    def whole(self) -> Stage:
        """The stage with each kernel as one node, where it has such a form; otherwise the stage."""
        return self.stage.whole or self.stage


class Backend:
    """Base of all backends.

    Attributes:
        name: as on the command line; that of a kind in ``optpass.runtime.engines``.
        precisions: those it lowers to, the first by default.
        shares_files: whether all precisions of a stage open the same files.
        in_place: whether its engines write new rows into the buffers that they are given.
        devices: those that engines can be built for by name, such as ``sm_89``; empty where they are built for no
            device by name.
        form: what it reads, with its opset, in words.
        limits: what it does not take, or takes in another way, in sentences.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    shares_files: ClassVar[bool] = False
    in_place: ClassVar[bool] = False
    devices: ClassVar[tuple[str, ...]] = ()
    form: ClassVar[str] = f"ONNX, opset {OPSET} and {CONTRIB} 1"
    limits: ClassVar[tuple[str, ...]] = ()

    def check(self, precision: str) -> None:
        """Raise an OptpassError if engines of that precision cannot be built on this machine.

        Whether one runs here is another matter, which ``optpass.runtime.engines`` knows.
        """

    def lower(self, source: Source, folder: Path, precision: str, target: Sequence[str] = ()) -> str:
        """Write the engine into ``folder``, which exists, and return the name of the file to open.

        Args:
            source: the stage.
            folder: to write to.
            precision: one of ``precisions``.
            target: the devices that ``target`` gave.

        Raises:
            OptpassError: the stage cannot be lowered, with the place in the user's model.
        """
        raise NotImplementedError

    def target(self, asked: Sequence[str]) -> list[str]:
        """What engines are bound to, for the manifest: of ``devices`` those asked for, by default those that are here.

        Raises:
            OptpassError: a device that is not known, or none is asked for and there is none.
        """
        return []

    def version(self, target: Sequence[str]) -> str:
        """The version of the library that engines for ``target`` are bound to; empty where any will do."""
        return ""

    def keeps_kernels(self, target: Sequence[str]) -> bool:
        """Whether engines for ``target`` run the Triton face of kernels: they are then made of ``source.whole``."""
        return False

    # what can be said beforehand

    def builds(self, precision: str, target: Sequence[str] = ()) -> Refusal | None:
        """Why engines cannot be built on this machine."""
        try:
            self.check(precision)
            self.target(target)
        except OptpassError as error:
            return error.refusal
        return None

    def runs(self, precision: str, target: Sequence[str] = ()) -> str:
        """Why engines do not run on this machine, in words; empty where they do."""
        try:
            bound = self.target(target)
            version = self.version(bound)
        except OptpassError:
            bound, version = list(target or self.devices), ""
        return unfit(
            Engine(
                backend=self.name,
                precision=precision,
                entry="",
                files=[],
                inputs=[],
                outputs=[],
                tolerance=0.0,
                target=bound,
                version=version,
            )
        )

    def ops(self, source: Source) -> Counter[str]:
        """How many ops of each type it is given.

        Raises:
            OptpassError: an op has no translation.
        """
        return Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(source.onnx.graph))

    def rehearse(self, source: Source, folder: Path, precision: str, target: Sequence[str] = ()) -> None:
        """As much of ``lower`` as tells whether it goes through, in the time that it takes to read the model.

        Raises:
            OptpassError: as ``lower``.
        """
        self.lower(source, folder, precision, target)


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


def named(name: str) -> Backend:
    """The backend of a name.

    Raises:
        OptpassError: there is none.
    """
    known = backends()
    if name not in known:
        raise OptpassError("unknown-backend", f"there is no backend {name!r}", f"backends are {', '.join(known)}")
    return known[name]


def backend(name: str, precision: str) -> Backend:
    """The backend of a name, able to build engines of that precision here.

    Raises:
        OptpassError: no such backend or precision, or not on this machine.
    """
    found = named(name)
    if precision not in found.precisions:
        raise OptpassError(
            "unknown-precision", f"{name} has no precision {precision!r}", f"it has {', '.join(found.precisions)}"
        )
    found.check(precision)
    return found
