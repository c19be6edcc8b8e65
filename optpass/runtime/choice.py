"""Which engine of an artifact this machine runs, and why.

Engines built for a GPU that is here come first where the machine that built them could not time them; then the fastest
recorded; then the order in which they were asked for. Machine code is never chosen: it takes the caller's request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from optpass.errors import OptpassError
from optpass.results import Unrun
from optpass.runtime.engines.base import is_made_here, is_native, kinds, unfit
from optpass.runtime.manifest import Engine, Manifest


@dataclass(frozen=True)
class Choice:
    """An engine by its id, and why it and no other, in a sentence."""

    engine: str
    why: str


def choose(manifest: Manifest, backend: str | None = None) -> Choice:
    """The engine to open on this machine.

    Args:
        manifest: of the artifact.
        backend: such as ``openvino`` or ``openvino:bf16``, to have the first engine of it, machine code included.

    Raises:
        OptpassError: none of them runs here; says what does.
    """
    serving = {name: engine for name, engine in manifest.engines.items() if engine.serves} or manifest.engines
    if backend is not None:
        kind, _, precision = backend.partition(":")
        serving = {
            name: engine
            for name, engine in serving.items()
            if engine.backend == kind and precision in ("", engine.precision)
        }
        if not serving:
            known = ", ".join(dict.fromkeys(engine.backend for engine in manifest.engines.values()))
            raise OptpassError("engine-name", f"the artifact has no engine of {backend}", f"it has {known}")
    passed: list[Unrun] = []
    for name, grounds in _ranked(manifest, serving):
        found = unrun(manifest, [name], backend)
        if not found:
            over = "".join(f"; {row.engine} {row.why}" for row in passed)
            return Choice(name, f"{name} {f'is of {backend}, as asked for' if backend else grounds}{over}")
        passed += found
    raise none_here(passed)


def none_here(rows: Sequence[Unrun]) -> OptpassError:
    """That no engine is to be run on this machine, and what to do about the first."""
    reasons = "; ".join(f"{row.engine} {row.why}" for row in rows)
    return OptpassError("engine-machine", f"no engine of the artifact is one to run here: {reasons}", rows[0].remedy)


def _ranked(manifest: Manifest, serving: dict[str, Engine]) -> list[tuple[str, str]]:
    """Engines in the order of preference, each with the grounds for it."""
    timed = {entry.engine: entry.optimized.median_ms for entry in reversed(manifest.latency)}
    default = manifest.default

    def rank(name: str) -> tuple[bool, bool, float]:
        return not (serving[name].target and name not in timed), name != default, timed.get(name, float("inf"))

    found = []
    for name in sorted(serving, key=rank):
        if not rank(name)[0]:
            grounds = f"is built for what is here, {', '.join(serving[name].target)}"
        elif name in timed:
            grounds = "is the fastest that was timed" if name == default else "was timed when it was built"
        else:
            grounds = "is the first in the artifact" if name == next(iter(serving)) else "runs on any machine"
        found.append((name, grounds))
    return found


def unrun(manifest: Manifest, names: Iterable[str], backend: str | None = None) -> list[Unrun]:
    """Of some engines those that are not to be run here: they do not fit, or are machine code of another backend."""
    found = []
    for name in names:
        engine = manifest.engine(name)
        if why := unfit(engine):
            found.append(Unrun(engine=name, why=why, remedy=rebuild(manifest, engine)))
        elif is_native(engine.backend) and (backend or "").partition(":")[0] != engine.backend:
            remedy = f"ask for it if you trust the artifact: backend={engine.backend}, or --backend {engine.backend}"
            found.append(Unrun(engine=name, why="is machine code, which is run on request only", remedy=remedy))
    return found


def rebuild(manifest: Manifest, engine: Engine) -> str:
    """The command that builds an engine which runs on this machine: of the same backend if it can, else of another.

    Machine code is not proposed in the place of something else.
    """
    others = [kind for kind in kinds() if not is_native(kind)]
    backend = next((kind for kind in (engine.backend, *others) if is_made_here(kind)), None)
    if backend is None:
        return "run there where it fits; to build one here install torch and an engine: pip install 'optpass[cpu]'"
    source = manifest.source or "MODEL"
    recipe = " with the passes of its manifest" if manifest.passes else ""
    return f"run there where it fits, or here: optpass optimize {source} -b {backend} -o DIR{recipe}"
