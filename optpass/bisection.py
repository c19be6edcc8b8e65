"""Which pass at which site made quality or speed fall: the schedule is applied again one site after the other.

Each prefix of the schedule is built as an engine of its own. What one step costs is the difference between two
successive engines, paired by sample for quality and timed in turn for speed. Engines and scores are kept in a cache by
the hash of the graph and weights that they come from: a schedule that is changed at its end makes only the end anew.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import optpass
from optpass import cache as caches
from optpass import dump, manager, measure, metrics
from optpass.cache import Cache
from optpass.errors import OptpassError, Refusal
from optpass.evaluation import Evaluation
from optpass.export import artifact, base, translate
from optpass.export.fidelity import tolerance
from optpass.manager import Placed
from optpass.passes.base import Pass, ReductionOptions
from optpass.program import Program, Stage
from optpass.results import BisectResult, Blame, Interval, Metric, Step
from optpass.rewrite import Refused
from optpass.runtime import check
from optpass.runtime import manifest as manifests
from optpass.runtime.manifest import Engine, Manifest
from optpass.runtime.session import open_session
from optpass.structure import Structure, analyse

Progress = Callable[[str], None]

POINTS = "points"

ROUNDS = 6
"""Fewest rounds of a comparison: engines that are equal look slower in all of six by chance once in 64 times."""


@dataclass(frozen=True)
class Limits:
    """What the whole schedule may cost, and must bring.

    Attributes:
        max_drop: most that may be lost: points of 100 for a share, otherwise the unit of the metric.
        at_least: least speed-up over the dense engine.
    """

    max_drop: float | None = None
    at_least: float | None = None


@dataclass(frozen=True)
class Prefix:
    """The schedule up to one step, as an engine in the cache."""

    key: str
    folder: Path
    manifest: Manifest
    tokens: int | str

    @property
    def engine(self) -> str:
        """Its one engine."""
        return self.manifest.default


def bisect(
    program: Program,
    passes: Sequence[Pass],
    *,
    backend: str,
    precision: str,
    evaluation: Evaluation,
    limits: Limits,
    cache: Cache,
    seconds: float = 1.0,
    cached_latency: bool = False,
    progress: Progress = lambda line: None,
) -> BisectResult:
    """Build, judge and time every prefix of a schedule.

    Args:
        program: as captured.
        passes: the schedule.
        backend: what the engines are for, by name.
        precision: of the engines.
        evaluation: what quality is judged by.
        limits: from where on a step is to blame; without ``max_drop`` a loss that is no chance is enough.
        cache: of engines and scores.
        seconds: how long to time each step; 0 times none.
        cached_latency: take latencies from the cache too, where they are there.
        progress: called with a line before each step.

    Raises:
        OptpassError: a pass is refused.
    """
    progress("place the passes")
    structure = analyse(program.main)
    placed = expanded(structure, passes)
    shop = _Workshop(structure, backend, precision, evaluation, cache, progress)
    prefixes = [shop.prefix(placed[:count]) for count in range(len(placed) + 1)]
    dense = prefixes[0]
    against = [shop.compared(dense, prefix, dense) for prefix in prefixes]
    steps = []
    for number, (before, prefix) in enumerate(pairwise(prefixes), start=1):
        made, site = placed[number - 1].made, placed[number - 1].sites[0]
        own = shop.compared(before, prefix, dense)
        timed: tuple[Interval | None, Interval | None] = (None, None)
        if seconds > 0:
            progress(f"time step {number}")
            timed = shop.timed(dense, before, prefix, seconds, cached_latency)
        step = Step(
            number=number,
            name=made.name,
            options=_options(made, site.number),
            site=site.block.path,
            tokens=prefix.tokens,
            metric=against[number].optimized,
            loss=metrics.loss(against[number]),
            own_loss=metrics.loss(own),
            speedup=timed[0],
            own_speedup=timed[1],
        )
        steps.append(step)
    figure = against[-1]
    unit = POINTS if metrics.scale(figure.name) == 100 else ""
    blame = blamed(steps, limits, figure.name, unit)
    return BisectResult(
        ok=not blame,
        source=program.source,
        engine=dense.engine,
        metric=figure.name,
        unit=unit,
        samples=figure.samples,
        label=figure.label,
        dense=figure.dense,
        steps=steps,
        blame=blame,
        largest=max(steps, key=lambda step: step.own_loss.value).number if steps else 0,
        built=cache.made["engines"],
        found=cache.found["engines"],
    )


@dataclass(frozen=True)
class _Eager:
    """A stage that runs like a session."""

    stage: Stage

    def run(self, **arrays: Any) -> dict[str, Any]:
        given = zip(self.stage.inputs, self.stage.example, strict=True)
        results = self.stage.run([torch.from_numpy(arrays[spec.name]).to(tensor.dtype) for spec, tensor in given])
        outputs = zip(self.stage.outputs, results, strict=True)
        return {spec.name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for spec, x in outputs}


def check_source(program: Program, folder: Path, manifest: Manifest, engine: Engine) -> None:
    """Refuse to blame a pass for what became of the model since the artifact was made.

    Raises:
        OptpassError: the source no longer gives the outputs that were recorded of it.
    """
    twin = engine.twin
    if twin not in manifest.engines:
        return
    recorded = check.read(folder, manifest, twin)
    found = check.fidelity(twin, _Eager(program.main), recorded, tolerance(program.main, "f32"))
    if not all(output.ok for output in found):
        what = f"{manifest.source} is no longer the model that {folder} was made of"
        raise OptpassError("source-changed", what, "bisect the model itself, or optimize it again")


def expanded(structure: Structure, passes: Sequence[Pass]) -> list[Placed]:
    """Every site of every pass by itself, in the order in which the tokens meet them.

    A site keeps its number, and with it its place in lists of options: all of them together are the schedule itself.

    Raises:
        OptpassError: a pass is refused.
    """
    order = {node: i for i, node in enumerate(structure.module.graph.nodes)}
    singles: list[Placed] = []
    for made in manager.ordered(passes):
        sites = made.sites(structure)
        if isinstance(sites, Refusal):
            raise OptpassError.of(sites)
        if singles and singles[0].sites[0].tower is not sites[0].tower:
            what = f"{made.name} acts on another tower than the passes before it"
            raise OptpassError("two-towers", what, "bisect it alone")
        singles += [Placed(made, (site,)) for site in sites]
    return sorted(singles, key=lambda single: order[single.sites[0].node])


def blamed(steps: Sequence[Step], limits: Limits, metric: str, unit: str) -> list[Blame]:
    """The step to blame for quality and the one for speed, where there is one."""
    found = [_quality(steps, limits.max_drop, metric, unit), _speed(steps, limits.at_least)]
    return [blame for blame in found if blame is not None]


def _quality(steps: Sequence[Step], limit: float | None, metric: str, unit: str) -> Blame | None:
    """The step at which the loss passes the limit; without one, the costliest of those whose cost is no chance."""
    if limit is None:
        costly = [step for step in steps if step.own_loss.low > 0]
        if not costly:
            return None
        worst = max(costly, key=lambda step: step.own_loss.value)
        return Blame(
            figure="quality", step=worst.number, certain=True, why=f"it costs {_lost(worst, unit)} of {metric}"
        )
    sure = next((step for step in steps if step.loss.low > limit), None)
    first = sure or next((step for step in steps if step.loss.value > limit), None)
    if first is None:
        return None
    bounds = f"[{first.loss.low:.2f}, {first.loss.high:.2f}]"
    why = f"with it {metric} has fallen by {first.loss.value:.2f} {bounds}{_spaced(unit)}, more than {limit:g}"
    why += f"; {_lost(first, unit)} are its own"
    return Blame(figure="quality", step=first.number, certain=sure is not None, why=why)


def _speed(steps: Sequence[Step], least: float | None) -> Blame | None:
    """The step that slows the engine most; where none does and the schedule is too slow, the one that brings least."""
    timed = [(step.own_speedup, step.number) for step in steps if step.own_speedup is not None]
    reached = steps[-1].speedup if steps else None
    if not timed or reached is None or (least is not None and reached.low >= least):
        return None
    ratio, number = min(timed, key=lambda pair: pair[0].value)
    factor = f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
    slower = ratio.high < 1
    if least is None or reached.value >= least:
        why = f"it changes the speed to {factor} of that before"
        return Blame(figure="speed", step=number, certain=True, why=why) if slower else None
    short = f"the schedule reaches {reached.value:.2f}x [{reached.low:.2f}, {reached.high:.2f}] of {least:g}x"
    return Blame(figure="speed", step=number, certain=slower, why=f"{short}; this step brings least, {factor}")


def _lost(step: Step, unit: str) -> str:
    own = step.own_loss
    return f"{own.value:.2f} [{own.low:.2f}, {own.high:.2f}]{_spaced(unit)}"


def _spaced(unit: str) -> str:
    return f" {unit}" if unit else ""


class _Workshop:
    """Makes engines, scores and latencies, or finds them in the cache."""

    def __init__(
        self,
        structure: Structure,
        backend: str,
        precision: str,
        evaluation: Evaluation,
        cache: Cache,
        progress: Progress,
    ) -> None:
        self.structure = structure
        self.backend, self.precision = backend, precision
        self.evaluation = evaluation
        self.cache = cache
        self.progress = progress
        self.data = _hash_of_data(evaluation)
        self.making = {
            "optpass": optpass.__version__,
            "libraries": manifests.libraries(),
            "code": _hash_of_lowering(backend),
        }

    def prefix(self, placed: Sequence[Placed]) -> Prefix:
        """The engine of the first steps; none of them is the dense one."""
        self.progress(f"build the engine of {len(placed)} steps" if placed else "build the dense engine")
        stage, tokens = self.rewritten(placed)
        key = caches.key(stage=hash_of(stage), backend=self.backend, precision=self.precision, **self.making)

        def make(new: artifact.Writer) -> None:
            new.add(stage, self.backend, self.precision)
            new.reference()
            new.finish()

        return Prefix(key, *self.cache.engine(key, make), tokens)

    def rewritten(self, placed: Sequence[Placed]) -> tuple[Stage, int | str]:
        """The stage with the first steps, and how many tokens are left."""
        stage = self.structure.stage
        if not placed:
            return stage, 0
        try:
            found = manager.rewrite(self.structure, placed)
        except Refused as refused:
            raise OptpassError.of(refused.refusal) from refused
        size = getattr(found.maps[-1].target, "value", found.maps[-1].target)
        return stage.retraced(found.untap()), size if isinstance(size, int) else str(size)

    def compared(self, before: Prefix, after: Prefix, dense: Prefix) -> Metric:
        """The figure of quality of two engines."""
        if self.evaluation.metric is not None:
            return metrics.paired(self.evaluation.metric, after.engine, self.scores(before), self.scores(after))
        name = caches.key(kind="agreement", engines=[before.key, after.key], data=self.data)

        def run() -> str:
            first, second = (
                partial(open_session, which.folder, which.manifest, which.engine) for which in (before, after)
            )
            found = self.evaluation.run(first, second, check.read(dense.folder, dense.manifest, dense.engine))
            return found[0].model_dump_json()

        return Metric.model_validate_json(self.cache.figures(name, run))

    def scores(self, prefix: Prefix) -> metrics.Scores:
        """What an engine scores on each sample."""
        metric, data = self.evaluation.metric, self.evaluation.data
        assert metric is not None
        assert data is not None
        name = caches.key(kind="scores", engine=prefix.key, data=self.data, metric=metric)

        def run() -> list[list[float]]:
            self.progress(
                f"take {metric} at {prefix.tokens} tokens" if prefix.tokens else f"take {metric} of the dense"
            )
            found = metrics.scores(metric, open_session(prefix.folder, prefix.manifest, prefix.engine), dict(data))
            return [found.values.tolist(), found.weights.tolist()]

        return metrics.Scores(*(np.array(column) for column in self.cache.figures(name, run)))

    def timed(
        self, dense: Prefix, before: Prefix, after: Prefix, seconds: float, cached: bool
    ) -> tuple[Interval, Interval]:
        """The speed-up over the dense engine and over the one before, all three in turn."""
        arrays = check.read(dense.folder, dense.manifest, dense.engine).inputs({})
        which = [dense, after] if before is dense else [dense, before, after]
        keys = [one.key for one in which]
        name = caches.key(kind="latency", engines=keys, machine=manifests.hardware().model_dump(), seconds=seconds)

        def run() -> list[dict[str, float]]:
            openers = [measure.opener(one.folder, one.manifest, one.engine, arrays, None) for one in which]
            done: list[measure.Round] = []
            while len(done) < ROUNDS:
                done += measure.rounds(openers, seconds)
            return [
                measure.speedup([measure.Round((one.times[i], one.times[-1])) for one in done]).model_dump()
                for i in (0, len(which) - 2)
            ]

        over_dense, over_before = self.cache.figures(name, run, anew=not cached)
        return Interval(**over_dense), Interval(**over_before)


def hash_of(stage: Stage) -> str:
    """The SHA-256 of a stage: its graph, its weights and constants, its example and its ranges."""
    found = hashlib.sha256(dump.graph(stage.module).encode())
    for name, size in sorted(stage.ranges.items()):
        found.update(f"{name} {size.minimum} {size.maximum}\n".encode())
    held = {**stage.exported.state_dict, **stage.exported.constants}
    held |= {f"example {number}": tensor for number, tensor in enumerate(stage.example)}
    for name, tensor in sorted(held.items()):
        if isinstance(tensor, Tensor):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _hash_of_data(evaluation: Evaluation) -> str:
    found = hashlib.sha256()
    for name, array in sorted((evaluation.data or {}).items()):
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _hash_of_lowering(backend: str) -> str:
    """Of the code that makes engines of graphs, so that a change of it is not taken for none."""
    modules = (base, translate, inspect.getmodule(base.backends()[backend]))
    found = hashlib.sha256("".join(inspect.getsource(module) for module in modules if module).encode())
    return found.hexdigest()


def _options(made: Pass, number: int) -> dict[str, Any]:
    """The options of a pass as they are at one of its sites, without those left at their default."""
    options: dict[str, Any] = made.options.model_dump(exclude_defaults=True, exclude={"at"})
    if isinstance(made.options, ReductionOptions):
        for name in ("keep", "r"):
            if isinstance(options.get(name), list):
                options[name] = options[name][number]
    return options
