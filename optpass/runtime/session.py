"""An artifact, opened: arrays by name in, arrays by name out, every input checked before the engine sees it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optpass.errors import OptpassError, first_line
from optpass.runtime import choice
from optpass.runtime import manifest as manifests
from optpass.runtime.engines.base import Array, Opened, open_engine, open_on, require, unfit
from optpass.runtime.features import opens
from optpass.runtime.manifest import FULL, PREFILL, REUSE, STEP, Bounds, Engine, Manifest, TensorInfo, engine_id
from optpass.runtime.providers import Provider


class Session:
    """An engine of an artifact.

    Attributes:
        name: id of the engine in the manifest.
        engine: its entry there.
        threads: cores that work on one call.
        why: this engine and no other of the artifact, in a sentence.
        taken: what each execution provider took of the nodes, in words, where one was asked for.
    """

    why = taken = ""

    def __init__(self, manifest: Manifest, name: str, opened: Opened, threads: int) -> None:
        self.manifest = manifest
        self.name = name
        self.engine: Engine = manifest.engines[name]
        self.threads = threads
        self.opened = opened

    @property
    def raw(self) -> Session:
        """The engine itself, where the session does more than to run it."""
        return self

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
        results = self.call(self.opened, check_inputs(self.engine, arrays))
        return {info.name: array for info, array in zip(self.outputs, results, strict=True)}

    def call(self, opened: Opened, arrays: Sequence[Array], wanted: Sequence[int] | None = None) -> list[Array]:
        """Run arrays that were checked; ``wanted`` outputs by their number, all by default.

        Raises:
            OptpassError: the engine cannot compute them.
        """
        try:
            return opened.run(arrays, wanted)
        except Exception as error:  # engines raise errors of their own types
            what = f"engine {self.name} cannot compute these inputs: {first_line(error)}"
            raise OptpassError(
                "engine-run", what, "compare them with the example the model was captured with"
            ) from error

    def __repr__(self) -> str:
        inputs = ", ".join(f"{info.name}: {describe(info)}" for info in self.inputs)
        return f"<Session {self.name} ({inputs})>"


def load(
    path: str | os.PathLike[str],
    *,
    engine: str | None = None,
    backend: str | None = None,
    threads: int | None = None,
    provider: str | Provider | None = None,
) -> Session:
    """Open an artifact after holding each of its files against the manifest.

    Args:
        path: the directory that ``optpass optimize`` wrote.
        engine: id of an engine in it; by default the one that fits this machine best, never machine code.
        backend: such as ``inductor`` or ``openvino:bf16``: the engine of it. Machine code, which may do all that this
            process may, is loaded only where its engine or backend is named.
        threads: cores for one call; by default all that this process may use.
        provider: of ONNX Runtime, such as ``cuda``, or a ``Provider`` with options and the share of the nodes that it
            has to take; all of them by default. What it took is in ``why``.

    Raises:
        OptpassError: the artifact is damaged, has no such engine, or none that runs here.
    """
    if engine is not None and backend is not None:
        raise OptpassError("usage", "an engine and a backend are named", "name one of them")
    folder = Path(path)
    manifest = manifests.read(folder)
    asked = Provider(provider) if isinstance(provider, str) else provider
    if asked is not None and engine is None:
        backend = backend or "onnxruntime"
    if backend is None:
        return open_session(folder, manifest, engine, threads, asked)
    return _opened(folder, manifest, choice.choose(manifest, backend), threads, asked)


def open_session(
    folder: Path,
    manifest: Manifest,
    engine: str | None = None,
    threads: int | None = None,
    provider: Provider | None = None,
) -> Session:
    """Open an engine of an artifact whose manifest was read, and so checked, before; the best for here by default."""
    chosen = choice.choose(manifest) if engine is None else choice.Choice(engine, f"{engine} was named")
    return _opened(folder, manifest, chosen, threads, provider)


WEIGHTLESS = 0.25
"""In MiB; graphs without weights are smaller."""


def _opened(
    folder: Path, manifest: Manifest, chosen: choice.Choice, threads: int | None, provider: Provider | None
) -> Session:
    name = chosen.engine
    found = manifest.engine(name)
    require(name, found.backend)
    if why := unfit(found):
        raise _unfit(manifest, name, why)
    if threads is not None and threads < 1:
        raise OptpassError("threads", f"threads is {threads}", "give 1 or more")
    count = threads or manifests.cores()
    if provider is not None and found.backend != "onnxruntime":
        raise OptpassError("provider", f"engine {name} is not of onnxruntime", "providers are those of onnxruntime")

    def opening(entry: Engine) -> Opened:
        if provider is not None:
            return open_on(name, folder / entry.entry, count, provider)
        # what holds no weights multiplies nothing: to share its ops among threads takes longer than to do them
        alone = entry.stage == REUSE and entry.mib(folder) < WEIGHTLESS
        return open_engine(name, entry.backend, entry.precision, folder / entry.entry, 1 if alone else count)

    opened = opening(found)
    if found.stage == STEP:
        from optpass.runtime.generate import Generator  # which is a session

        prompt = manifest.engines.get(engine_id(found.backend, found.precision, found.role, PREFILL))
        prefill = opening(prompt) if prompt else None
        session: Session = Generator(manifest, name, opened, count, prefill, prompt)
    elif opens(found.stage, found.inputs, found.outputs):
        from optpass.runtime.denoise import Denoiser  # which is a session too

        computing = manifest.engines.get(engine_id(found.backend, found.precision, found.role, FULL))
        split = computing is not None and found.stage == REUSE
        full = opening(computing) if computing is not None and split else None
        session = Denoiser(manifest, name, opened, count, full, computing if split else None)
    else:
        session = Session(manifest, name, opened, count)
    session.taken = str(getattr(opened, "taken", ""))
    session.why = "; ".join(filter(None, (chosen.why, session.taken)))
    return session


def _unfit(manifest: Manifest, name: str, why: str) -> OptpassError:
    """An engine that was named and does not fit: another of the artifact may."""
    engine = manifest.engines[name]
    others = [
        other
        for other, entry in manifest.engines.items()
        if (entry.role, entry.stage) == (engine.role, engine.stage) and other != name
    ]
    fitting = [other for other in others if not choice.unrun(manifest, [other])]
    remedy = f"load the engine {fitting[0]}" if fitting else choice.rebuild(manifest, engine)
    return OptpassError("engine-machine", f"engine {name} {why}", remedy)


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
