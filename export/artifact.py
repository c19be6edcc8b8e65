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
import ctypes
import errno
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import optpass
from optpass import files
from optpass.errors import OptpassError
from optpass.export import fidelity as fidelities
from optpass.export.base import Progress, Source, backend
from optpass.program import Stage, TensorSpec
from optpass.results import Accepted, Fidelity, Latency, Layer, Metric, PassRecord, Unrun
from optpass.runtime import check, choice
from optpass.runtime import manifest as manifests
from optpass.runtime.engines.base import is_native, unfit
from optpass.runtime.manifest import IN_PLACE, Bounds, Engine, Manifest, TensorInfo, engine_id
from optpass.runtime.maps import PATH as MAPS
from optpass.runtime.maps import TokenMaps
from optpass.runtime.session import Session, open_session

PREFIX = ".optpass-"
"""Of the directories beside the target that hold an artifact in the making, or the one it replaces."""

LARGE = 200_000_000
"""Bytes of the files of an engine above which no other stays open beside it: open, it holds them once or twice more."""

CHECK = "optpass verify, there where it fits, runs it and holds it against what is recorded"
"""What to do with an engine that was built for another machine."""


class Writer:
    """An artifact in the making.

    Attributes:
        folder: the temporary directory.
        engines: what was added so far.
        target: devices to build for, where a backend builds for devices by name.
    """

    def __init__(
        self, folder: Path, source: str, progress: Progress, target: Sequence[str] = (), sampler: str = ""
    ) -> None:
        self.folder = folder
        self.target = target
        self.sampler = sampler
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
        form = stage.name
        if found.in_place and stage.in_place is not None:
            stage, form = stage.in_place, form + IN_PLACE
        target = found.target(self.target)
        name = engine_id(backend_name, precision, role, stage.name)
        place = engine_id(backend_name, "any" if found.shares_files else precision, role, stage.name)
        lowering = self._sources.setdefault((role, form), Source(stage))
        if lowering.stage is not stage:
            raise ValueError(f"another stage {form} has the role {role} already")
        if place not in self._entries:
            self.step(f"lowering to {name}")
            folder = self.folder / place
            folder.mkdir(parents=True)
            self._entries[place] = found.lower(lowering, folder, precision, target)
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
            target=target,
            version=found.version(target),
            initial=dict(stage.initial),
        )
        return name

    def session(self, engine: str, threads: int | None = None) -> Session:
        """Open an engine that was added.

        The two opened last stay open, since opening takes as long as many calls; of those above ``LARGE`` only one.
        """
        if threads is not None:
            return open_session(self.folder, self._draft(), engine, threads)
        if engine not in self._opened:
            large = self.engines[engine].mib(self.folder) * 2**20 > LARGE
            while len(self._opened) > (0 if large else 1):
                del self._opened[next(iter(self._opened))]
            self._opened[engine] = open_session(self.folder, self._draft(), engine)
        return self._opened[engine]

    def begin_with(self, engine: str, initial: Mapping[str, float]) -> None:
        """Set knobs that a run of an engine begins with."""
        before = self.engines[engine]
        self.engines[engine] = before.model_copy(update={"initial": {**before.initial, **initial}})
        self.forget(engine)

    def forget(self, engine: str) -> None:
        """Close an engine whose files are about to change."""
        self._opened.pop(engine, None)

    def reference(self, role: str = "main", form: str = "main") -> check.Reference:
        """The recorded inputs and eager outputs of a stage that was added; run once, and kept in the artifact."""
        key = role, form
        if key not in self._references:
            self.step(f"running {'the model' if role == 'main' else 'the dense model'} eagerly at three sizes")
            self._references[key] = fidelities.reference(self._sources[key].stage)
        return self._references[key]

    def release(self) -> None:
        """Record what eager execution gives, and let go of the weights: engines are files by now.

        Nothing can be added any more.
        """
        for name, engine in self.engines.items():
            if self.runs(name):
                self.reference(engine.role, engine.form)
        for source in self._sources.values():
            source.stage.release()
            source.__dict__.pop("onnx", None)

    def fidelity(self, engines: Sequence[str] | None = None) -> list[Fidelity]:
        """Open engines and hold each against eager execution at the sizes of ``reference``.

        By default all that this machine runs; those it does not are in ``unrun``.
        """
        results = []
        here = [name for name in self.engines if self.runs(name)]
        for name in here if engines is None else engines:
            engine = self.engines[name]
            recorded = self.reference(engine.role, engine.form)
            self.step(f"checking {name} against eager")
            # held by no name of its own, so that the next may be opened in its place
            found = check.fidelity(name, self.session(name).raw, recorded, engine.tolerance)
            if not all(entry.ok for entry in found) and self._chooses_otherwise(name, recorded):
                wider = fidelities.effect(self._stage(engine), self._stage(engine, "dense"))
                self.engines[name] = engine.model_copy(update={"tolerance": max(wider, engine.tolerance)})
                found = check.fidelity(name, self.session(name).raw, recorded, self.engines[name].tolerance)
            results += found
        return results

    def runs(self, name: str) -> bool:
        """Whether this machine runs an engine that was added."""
        return not unfit(self.engines[name])

    def unrun(self) -> list[Unrun]:
        """The engines that were built and cannot be run here."""
        manifest = self._draft()
        cannot = [name for name in self.engines if not self.runs(name)]
        return [row.model_copy(update={"remedy": CHECK}) for row in choice.unrun(manifest, cannot)]

    def _stage(self, engine: Engine, role: str | None = None) -> Stage:
        return self._sources[role or engine.role, engine.form].stage

    def _chooses_otherwise(self, name: str, recorded: check.Reference) -> bool:
        """Whether a half precision may have picked other tokens, and nothing else is wrong with the engine.

        Which tokens are most alike is a question of the last bits: rounded to half precision the answer changes, and
        outputs then differ by what one choice differs from another. The same files run in float32 must be right.
        """
        engine = self.engines[name]
        if engine.precision == "f32" or engine.dense or ("dense", engine.form) not in self._sources:
            return False
        stage = self._stage(engine)
        if not fidelities.chooses(stage) or not backend(engine.backend, engine.precision).shares_files:
            return False
        single = engine.model_copy(update={"precision": "f32"})
        session = open_session(self.folder, self._draft().model_copy(update={"engines": {name: single}}), name).raw
        exact = check.fidelity(name, session, recorded, fidelities.tolerance(stage, "f32"))
        return all(entry.ok for entry in exact)

    def finish(
        self,
        *,
        passes: Sequence[PassRecord] = (),
        layers: Sequence[Layer] = (),
        fidelity: Sequence[Fidelity] = (),
        metric: Sequence[Metric] = (),
        latency: Sequence[Latency] = (),
        accepted: Sequence[Accepted] = (),
        maps: TokenMaps | None = None,
        recipe: str = "",
    ) -> Manifest:
        """Write the recorded outputs and the manifest; the artifact appears when the block is left."""
        self.step("writing the manifest")
        for (role, form), recorded in self._references.items():
            path = self.folder / check.reference_path(role, form)
            path.parent.mkdir(parents=True, exist_ok=True)
            recorded.save(path)
        if maps is not None and maps.sites:
            maps.save(self.folder / MAPS)
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        update = {
            "files": {p.relative_to(self.folder).as_posix(): manifests.sha256(p) for p in files},
            "default": _default(self.engines, latency),
            "passes": list(passes),
            "layers": list(layers),
            "fidelity": list(fidelity),
            "metric": list(metric),
            "latency": list(latency),
            "accepted": list(accepted),
            "unrun": self.unrun(),
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
            sampler=self.sampler,
        )


def _info(spec: TensorSpec) -> TensorInfo:
    return TensorInfo(name=spec.name, dtype=_numpy_name(spec.dtype), shape=list(spec.shape))


def _numpy_name(dtype: str) -> str:
    return {"bfloat16": "float32"}.get(dtype, dtype)


def _default(engines: dict[str, Engine], latency: Sequence[Latency]) -> str:
    """The engine that was fastest where it was measured, otherwise the first that is not there for comparison."""
    serving = [name for name, engine in engines.items() if engine.serves] or list(engines)
    # machine code is opened on request only, and so never by default where there is anything else
    serving = [name for name in serving if not is_native(engines[name].backend)] or serving
    serving.sort(key=lambda name: bool(unfit(engines[name])))
    measured = [entry for entry in latency if entry.engine in serving]
    if measured:
        # Engines are compared at one batch size: that of the first entry.
        alike = [entry for entry in measured if entry.batch == measured[0].batch]
        return min(alike, key=lambda entry: entry.optimized.median_ms).engine
    return serving[0] if serving else ""


@contextlib.contextmanager
def writer(
    out: str | os.PathLike[str],
    *,
    source: str = "",
    force: bool = False,
    target: Sequence[str] = (),
    sampler: str = "",
    progress: Progress | None = None,
) -> Iterator[Writer]:
    """An artifact in the making, at ``out`` when the block ends and ``finish`` was called.

    Args:
        out: the directory to make; its parent exists or is made.
        source: what the user named, for the manifest.
        force: replace an artifact that is there. What is no artifact is never replaced.
        target: devices to build for, where a backend builds for devices by name.
        sampler: of a denoiser, for the manifest.
        progress: called with each step as it begins.

    Raises:
        OptpassError: ``out`` is there and may not be replaced, cannot be written to, or the disk is full.
    """
    place = Path(os.path.abspath(out))
    check_target(place, force)
    with _reported(place), _terminable():
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place.parent)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place.parent))
        try:
            with _held(folder):
                made = Writer(folder, source, progress or (lambda text, seconds: None), target, sampler)
                yield made
                if made.manifest is not None:
                    os.chmod(folder, 0o777 & ~files.umask())
                    _replace(folder, place, force)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


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


def _replace(folder: Path, target: Path, force: bool) -> None:
    """Put the new directory in the place of the old one, or of nothing.

    Where the system swaps two names at once, a crash leaves the old artifact or the new one; elsewhere it may leave
    none. Of two processes that write one artifact the last one wins, or, where it may not replace, the first.
    """
    while True:
        check_target(target, force)
        try:
            # onto nothing, or a directory that is empty
            os.rename(folder, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not target.is_dir():
                raise
        if force:
            break
    if not _swap(folder, target):
        _replace_in_two_steps(folder, target)


def _swap(first: Path, second: Path) -> bool:
    """Exchange two directories at once; false where this system or file system does not do it."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if libc.renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _replace_in_two_steps(folder: Path, target: Path) -> None:
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


FRESH = 600.0
"""Seconds for which a directory that nobody holds may still be one that is about to be held."""


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Mark a directory as in the making; the mark goes with this process, however it ends."""
    if os.name != "posix":
        yield
        return
    import fcntl

    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(number)


def _sweep(parent: Path) -> None:
    """Remove what processes left that were killed: directories in the making that nobody makes any more."""
    if os.name != "posix":
        return
    import fcntl

    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or time.time() - folder.stat().st_mtime < FRESH:
                continue
            number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(number)


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
    """Let SIGTERM unwind the stack like Ctrl-C does, so that nothing half made is left; not where it is handled."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> Any:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
