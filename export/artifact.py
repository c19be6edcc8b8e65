"""Writing an artifact: engines and manifest in a directory beside the target, renamed when all is well.

    with artifact.writer(out, source="fashion-vit", force=False) as new:
        engine = new.add(stage, "onnxruntime", "f32")                     # an id, such as onnxruntime-f32
        dense = new.add(before, "onnxruntime", "f32", role="dense")       # dense/onnxruntime-f32
        fidelity = new.fidelity()                                         # every engine, at three sizes
        session = new.session(engine)                                     # as load() would give it
        new.finish(passes=..., fidelity=fidelity, metric=..., latency=...)

Nothing is at the target before ``finish`` was called and the block left. A block left without it, or by an exception,
leaves no trace.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import optpass
from optpass.errors import OptpassError
from optpass.export import fidelity as fidelities
from optpass.export.base import Progress, Source, backend
from optpass.program import Stage, TensorSpec
from optpass.results import Fidelity, Latency, Metric, PassRecord
from optpass.runtime import check
from optpass.runtime import manifest as manifests
from optpass.runtime.manifest import Bounds, Engine, Manifest, TensorInfo, engine_id
from optpass.runtime.session import Session, open_session

PREFIX = ".optpass-"
"""Of the directories beside the target that hold an artifact in the making, or the one it replaces."""


class Writer:
    """An artifact in the making.

    Attributes:
        folder: the temporary directory.
        engines: what was added so far.
    """

    def __init__(self, folder: Path, source: str, progress: Progress) -> None:
        self.folder = folder
        self.source = source
        self.engines: dict[str, Engine] = {}
        self.manifest: Manifest | None = None
        self._sources: dict[tuple[str, str], Source] = {}
        self._entries: dict[str, str] = {}
        self._opened: dict[str, Session] = {}
        self._references: dict[tuple[str, str], check.Reference] = {}
        self._progress = progress
        self._since = time.perf_counter()

    def step(self, text: str) -> None:
        """Tell the caller what begins, and how long took what ended."""
        before, self._since = self._since, time.perf_counter()
        self._progress(text, self._since - before)

    def add(self, stage: Stage, backend_name: str, precision: str, *, role: str = "main") -> str:
        """Lower a stage into the artifact and return the id of its engine.

        Raises:
            OptpassError: no such backend or precision here, or the stage cannot be lowered.
        """
        found = backend(backend_name, precision)
        name = engine_id(backend_name, precision, role, stage.name)
        place = engine_id(backend_name, "any" if found.shares_files else precision, role, stage.name)
        lowering = self._sources.setdefault((role, stage.name), Source(stage))
        if lowering.stage is not stage:
            raise ValueError(f"another stage {stage.name} has the role {role} already")
        if place not in self._entries:
            self.step(f"lowering to {name}")
            folder = self.folder / place
            folder.mkdir(parents=True)
            self._entries[place] = found.lower(lowering, folder, precision)
        entry = self._entries[place]
        files = sorted(p.relative_to(self.folder).as_posix() for p in (self.folder / place).rglob("*") if p.is_file())
        self.engines[name] = Engine(
            stage=stage.name,
            role=role,
            backend=backend_name,
            precision=precision,
            entry=f"{place}/{entry}",
            files=files,
            inputs=[_info(spec) for spec in stage.inputs],
            outputs=[_info(spec) for spec in stage.outputs],
            dynamic={n: Bounds(minimum=r.minimum, maximum=r.maximum) for n, r in stage.ranges.items()},
            tolerance=fidelities.tolerance(stage, precision),
        )
        return name

    def session(self, engine: str, threads: int | None = None) -> Session:
        """Open an engine that was added; the two opened last stay open, since opening takes as long as many calls."""
        if threads is not None:
            return open_session(self.folder, self._draft(), engine, threads)
        if engine not in self._opened:
            while len(self._opened) > 1:
                del self._opened[next(iter(self._opened))]
            self._opened[engine] = open_session(self.folder, self._draft(), engine)
        return self._opened[engine]

    def reference(self, role: str = "main", stage: str = "main") -> check.Reference:
        """The recorded inputs and eager outputs of a stage that was added; run once, and kept in the artifact."""
        key = role, stage
        if key not in self._references:
            self.step(f"running {'the model' if role == 'main' else 'the dense model'} eagerly at three sizes")
            self._references[key] = fidelities.reference(self._sources[key].stage)
        return self._references[key]

    def fidelity(self, engines: Sequence[str] | None = None) -> list[Fidelity]:
        """Open engines, all by default, and hold each against eager execution at the sizes of ``reference``."""
        results = []
        for name in self.engines if engines is None else engines:
            engine = self.engines[name]
            recorded = self.reference(engine.role, engine.stage)
            self.step(f"checking {name} against eager")
            session = self.session(name)
            found = check.fidelity(name, session, recorded, engine.tolerance)
            if not all(entry.ok for entry in found) and self._chooses_otherwise(name, recorded):
                wider = fidelities.effect(self._stage(engine), self._stage(engine, "dense"))
                self.engines[name] = engine.model_copy(update={"tolerance": max(wider, engine.tolerance)})
                found = check.fidelity(name, session, recorded, self.engines[name].tolerance)
            results += found
        return results

    def _stage(self, engine: Engine, role: str | None = None) -> Stage:
        return self._sources[role or engine.role, engine.stage].stage

    def _chooses_otherwise(self, name: str, recorded: check.Reference) -> bool:
        """Whether a half precision may have picked other tokens, and nothing else is wrong with the engine.

        Which tokens are most alike is a question of the last bits: rounded to half precision the answer changes, and
        outputs then differ by what one choice differs from another. The same files run in float32 must be right.
        """
        engine = self.engines[name]
        if engine.precision == "f32" or engine.dense or ("dense", engine.stage) not in self._sources:
            return False
        stage = self._stage(engine)
        if not fidelities.chooses(stage) or not backend(engine.backend, engine.precision).shares_files:
            return False
        single = engine.model_copy(update={"precision": "f32"})
        session = open_session(self.folder, self._draft().model_copy(update={"engines": {name: single}}), name)
        exact = check.fidelity(name, session, recorded, fidelities.tolerance(stage, "f32"))
        return all(entry.ok for entry in exact)

    def finish(
        self,
        *,
        passes: Sequence[PassRecord] = (),
        fidelity: Sequence[Fidelity] = (),
        metric: Sequence[Metric] = (),
        latency: Sequence[Latency] = (),
        recipe: str = "",
    ) -> Manifest:
        """Write the recorded outputs and the manifest; the artifact appears when the block is left."""
        self.step("writing the manifest")
        for (role, stage), recorded in self._references.items():
            path = self.folder / check.reference_path(role, stage)
            path.parent.mkdir(parents=True, exist_ok=True)
            recorded.save(path)
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        update = {
            "files": {p.relative_to(self.folder).as_posix(): manifests.sha256(p) for p in files},
            "default": _default(self.engines, latency),
            "passes": list(passes),
            "fidelity": list(fidelity),
            "metric": list(metric),
            "latency": list(latency),
            "recipe": recipe,
        }
        self.manifest = self._draft().model_copy(update=update)
        manifests.write(self.manifest, self.folder)
        return self.manifest

    def _draft(self) -> Manifest:
        return Manifest(
            optpass=optpass.__version__,
            created=manifests.now(),
            source=self.source,
            libraries=manifests.libraries(),
            hardware=manifests.hardware(),
            engines=dict(self.engines),
            default=_default(self.engines, ()),
            files={},
        )


def _info(spec: TensorSpec) -> TensorInfo:
    return TensorInfo(name=spec.name, dtype=_numpy_name(spec.dtype), shape=list(spec.shape))


def _numpy_name(dtype: str) -> str:
    return {"bfloat16": "float32"}.get(dtype, dtype)


def _default(engines: dict[str, Engine], latency: Sequence[Latency]) -> str:
    """The engine that was fastest where it was measured, otherwise the first that is not there for comparison."""
    serving = [name for name, engine in engines.items() if not engine.dense] or list(engines)
    measured = [entry for entry in latency if entry.engine in serving]
    if measured:
        # Engines are compared at one batch size: that of the first entry.
        alike = [entry for entry in measured if entry.batch == measured[0].batch]
        return min(alike, key=lambda entry: entry.optimized.median_ms).engine
    return serving[0] if serving else ""


@contextlib.contextmanager
def writer(
    out: str | os.PathLike[str], *, source: str = "", force: bool = False, progress: Progress | None = None
) -> Iterator[Writer]:
    """An artifact in the making, at ``out`` when the block ends and ``finish`` was called.

    Args:
        out: the directory to make; its parent exists or is made.
        source: what the user named, for the manifest.
        force: replace an artifact that is there. What is no artifact is never replaced.
        progress: called with each step as it begins.

    Raises:
        OptpassError: ``out`` is there and may not be replaced, cannot be written to, or the disk is full.
    """
    target = Path(os.path.abspath(out))
    check_target(target, force)
    with _reported(target), _terminable():
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=target.parent))
        try:
            made = Writer(folder, source, progress or (lambda text, seconds: None))
            yield made
            if made.manifest is not None:
                os.chmod(folder, 0o777 & ~_umask())
                _replace(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    """What a directory made by ``mkdir`` would lack; ``mkdtemp`` makes one that only its owner may enter."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_target(out: str | os.PathLike[str], force: bool) -> None:
    """Refuse a target that may not be replaced; called before any work starts, and again before it is written."""
    target = Path(os.path.abspath(out))
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise OptpassError("output", f"{target} is there and is no directory", "give another output")
    if not any(target.iterdir()):
        return
    if not (target / manifests.NAME).is_file():
        raise OptpassError("output", f"{target} is there and is no artifact", "give another output")
    if not force:
        raise OptpassError("output", f"{target} is there", "give another output, or --force to replace it")


def _replace(folder: Path, target: Path) -> None:
    """Put the new directory in the place of the old one; a crash between the two renames leaves none."""
    if not target.exists():
        os.rename(folder, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=PREFIX, dir=target.parent))
    old = aside / "old"
    try:
        os.rename(target, old)
        try:
            os.rename(folder, target)
        except BaseException:
            os.rename(old, target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _reported(target: Path) -> Iterator[None]:
    """Errors of the file system as ours: those that any of the libraries raises, in whatever type."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OptpassError(
            "output", f"{target} cannot be written: {os.strerror(error.errno)}", _remedy(error)
        ) from error


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, or give an output on another disk"
    return "give an output in a directory that you may write to"


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack like Ctrl-C does, so that nothing half made is left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> Any:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
