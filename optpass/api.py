"""The public API: capture, passes, engines, verification and one artifact, in the words of the command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from optpass import dump, grammar, manager, measure, metrics
from optpass.capture import capture
from optpass.errors import OptpassError
from optpass.export import artifact
from optpass.export.base import backend as find_backend
from optpass.export.base import backends
from optpass.manager import OnFail
from optpass.passes.base import Pass, registry
from optpass.program import Stage
from optpass.results import BenchResult, Latency, Metric, OptimizeResult, VerifyResult
from optpass.runtime import check as checks
from optpass.runtime import manifest as manifests
from optpass.runtime.session import Session, load
from optpass.structure import Structure, analyse

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps done, and the steps in all."""

Arrays = Mapping[str, NDArray[Any]]


def optimize(
    source: Any,
    passes: str | Sequence[Pass] = "",
    *,
    recipe: str | os.PathLike[str] | None = None,
    backend: str | Sequence[str] = "onnxruntime",
    out: str | os.PathLike[str],
    dynamic: Mapping[str, str] | Sequence[str] | None = None,
    inputs: Mapping[str, Any] | None = None,
    data: str | os.PathLike[str] | Arrays | None = None,
    metric: str | None = None,
    samples: int | None = None,
    on_fail: OnFail = "stop",
    force: bool = False,
    seconds: float = 2.0,
    progress: Progress | None = None,
) -> OptimizeResult:
    """Capture a model, apply verified passes, lower it, check and measure the engines, and write one artifact.

    Args:
        source: zoo name, Hugging Face or diffusers directory, Hugging Face id, ``.pt2`` file,
            ``package.module:factory``, or ``(module, args, kwargs)``.
        passes: such as ``prune(keep=0.5,at=3),merge(r=8)``, or passes made by hand.
        recipe: the same as a TOML file, in place of ``passes``.
        backend: ``onnxruntime``, ``openvino``, ``openvino:bf16``; several make one artifact with several engines.
        out: directory of the artifact.
        dynamic: ``input:axis=[name:]min..max`` each; ``None`` takes what the source declares.
        inputs: example arrays by input name, in place of those of the source.
        data: arrays by input name with ``labels``, as a mapping, an ``.npz`` file or ``module:function``; a zoo model
            brings its own.
        metric: name of the metric on the data, such as ``top1``.
        samples: how many samples of the data to use; all by default.
        on_fail: ``stop`` where a pass is refused or fails a probe, or ``skip`` it and go on.
        force: replace an artifact that is there.
        seconds: how long to measure the latency of each engine; 0 measures none.
        progress: called with each step.

    Returns:
        ``ok`` is false, and no artifact is written, where a pass failed under ``stop`` or an engine is not faithful.

    Raises:
        OptpassError: anything the caller can mend.
    """
    asked = _passes(passes, recipe)
    engines = _engines(backend)
    artifact.check_target(out, force)
    evaluation = _Evaluation.of(source, data, metric, samples)
    steps = _Steps(progress, 3 + 2 * len(asked) + 6 * len(engines))
    steps.next("capture the model")
    program = capture(source, dynamic=dynamic, inputs=inputs)
    before = program.main
    evaluation.check(before)
    outcome = manager.apply(program, asked, on_fail=on_fail, progress=steps.next)
    records = list(outcome.records)
    if not outcome.ok and on_fail == "stop":
        return OptimizeResult(ok=False, artifact="", source=program.source, passes=records, fidelity=[])
    with artifact.writer(out, source=program.source, force=force, progress=lambda text, _: steps.next(text)) as new:
        names = [(new.add(outcome.program.main, *e), new.add(before, *e, role="dense")) for e in engines]
        fidelity = new.fidelity()
        faithful = all(entry.ok for entry in fidelity)
        figures: list[Metric] = []
        latency: list[Latency] = []
        if faithful:
            for main, dense in names:
                pair = new.session(dense), new.session(main)
                steps.next(f"take the metric on {main}")
                figures += evaluation.run(*pair, new.reference())
                if seconds > 0:
                    steps.next(f"time {main}")
                    arrays = new.reference().inputs({})
                    latency.append(measure.compare(*pair, arrays, budget=seconds, batch=_batch(before)))
            recipe_text = grammar.as_recipe(asked)
            new.finish(passes=records, fidelity=fidelity, metric=figures, latency=latency, recipe=recipe_text)
    return OptimizeResult(
        ok=faithful,
        artifact=str(out) if faithful else "",
        source=program.source,
        passes=records,
        fidelity=fidelity,
        metric=figures,
        latency=latency,
    )


@dataclass(frozen=True)
class InspectResult:
    """What analysis found: ``text`` for people, ``data`` for programs; ``structure`` to go on with."""

    text: str
    data: dict[str, Any]
    structure: Structure


def inspect(
    source: Any,
    *,
    dynamic: Mapping[str, str] | Sequence[str] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> InspectResult:
    """Capture a model and show its blocks, attention and token axes.

    Raises:
        OptpassError: as ``optimize``.
    """
    program = capture(source, dynamic=dynamic, inputs=inputs)
    structure = analyse(program.main)
    data = {"source": program.source, **dump.describe(structure)}
    return InspectResult(dump.tree(structure), data, structure)


def verify(
    path: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | Arrays | None = None,
    metric: str | None = None,
    samples: int | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Check an artifact again on this machine: hashes, every engine against its recorded outputs, and the metric.

    Raises:
        OptpassError: a file is missing or changed, or an engine does not open here.
    """
    folder = Path(path)
    manifest = manifests.read(folder)
    evaluation = _Evaluation.of(None, data, metric, samples)
    twins = measure.pairs(manifest)
    steps = _Steps(progress, len(manifest.engines) + len(twins))
    result = checks.verify(folder, progress=steps.next)
    if not evaluation.data or not result.ok:
        return result
    figures: list[Metric] = []
    for name, dense in twins.items():
        steps.next(f"take the metric on {name}")
        figures += evaluation.run(
            load(folder, engine=dense), load(folder, engine=name), checks.read(folder, manifest, name)
        )
    return result.model_copy(update={"metric": figures})


def bench(
    path: str | os.PathLike[str],
    *,
    seconds: float = 5.0,
    batch: int | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Time the engines of an artifact against the dense ones of the same backend, in turn, in this process.

    Args:
        path: the artifact.
        seconds: for each engine.
        batch: size of the first dimension of the inputs, which must be dynamic; that of the example by default.
        engine: one engine; by default every one that has a dense twin.
        progress: called with each step.

    Raises:
        OptpassError: the artifact is damaged, or the engine or size is not in it.
    """
    folder = Path(path)
    manifest = manifests.read(folder)
    chosen = engine or next(iter(measure.pairs(manifest)), "")
    sizes = None if batch is None else _first_size(manifest, chosen, batch)
    steps = _Steps(progress, 100)
    return measure.bench(
        folder,
        engine=engine,
        sizes=sizes,
        budget=seconds,
        progress=lambda what, share: steps.at(what, int(share * 100)),
    )


@dataclass(frozen=True)
class PassOption:
    """One option of a pass, as its field declares it."""

    name: str
    type: str
    default: Any
    description: str


@dataclass(frozen=True)
class PassInfo:
    """A pass as its file declares it."""

    name: str
    summary: str
    paper: str
    options: list[PassOption]


def describe_passes() -> list[PassInfo]:
    """Every pass that can be asked for, with its options."""
    return [_describe(kind) for _, kind in sorted(registry().items())]


def _describe(kind: type[Pass]) -> PassInfo:
    import inspect as introspect
    import sys

    module = introspect.getdoc(sys.modules[kind.__module__]) or ""
    paper = next(
        (line.partition(":")[2].partition(". ")[0].strip() for line in module.splitlines() if line.startswith("Paper")),
        "",
    )
    options = [
        PassOption(name, _type_name(field.annotation), field.default, field.description or "")
        for name, field in kind.options_type.model_fields.items()
    ]
    return PassInfo(kind.name, (introspect.getdoc(kind) or "").partition("\n")[0], paper, options)


def _type_name(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = text.replace("typing.", "").replace("Literal[", "").replace("'", "").replace(" | None", "")
    return text.removesuffix("]") if "Literal" in str(annotation) else text


def _passes(passes: str | Sequence[Pass], recipe: str | os.PathLike[str] | None) -> list[Pass]:
    if recipe is not None:
        if passes:
            raise OptpassError("usage", "passes and a recipe are both given", "give one of them")
        return grammar.load_recipe(Path(recipe))
    if isinstance(passes, str):
        return grammar.parse(passes) if passes.strip() else []
    return list(passes)


def _engines(backend: str | Sequence[str]) -> list[tuple[str, str]]:
    """``openvino:bf16`` as ``(openvino, bf16)``, each checked before any work starts."""
    engines = []
    for text in [backend] if isinstance(backend, str) else backend:
        name, _, precision = text.partition(":")
        known = backends().get(name)
        precision = precision or (known.precisions[0] if known else "")
        find_backend(name, precision)
        if (name, precision) in engines:
            raise OptpassError("usage", f"backend {text} is named twice", "name it once")
        engines.append((name, precision))
    if not engines:
        raise OptpassError("usage", "no backend is named", "name one, such as onnxruntime")
    return engines


@dataclass(frozen=True)
class _Evaluation:
    """What quality is judged by: labelled data and a metric, or agreement with the dense engine."""

    data: Arrays | None
    metric: str | None

    @classmethod
    def of(cls, source: Any, data: Any, metric: str | None, samples: int | None) -> _Evaluation:
        if data is None and isinstance(source, str):
            from optpass.zoo import registry as zoo

            if source in zoo.names():
                entry = zoo.load(source)
                return cls(entry.test_split(samples or 2000), metric or entry.METRIC)
        if data is None:
            if metric is not None:
                raise OptpassError("data", f"metric {metric} is asked for without data", "give --data")
            return cls(None, None)
        found = metrics.load_data(data)
        if metric is not None:
            metrics.metric(metric)
        if samples is not None:
            found = {name: array[:samples] for name, array in found.items()}
        if metric is None and metrics.LABELS in found:
            metric = "top1"
        return cls(found, metric)

    def check(self, stage: Stage) -> None:
        """Refuse data that lacks an input before any work starts."""
        missing = [spec.name for spec in stage.inputs if self.data is not None and spec.name not in self.data]
        if missing:
            what = f"the data has no array {missing[0]}, an input of the model"
            raise OptpassError("data", what, f"give arrays {', '.join(spec.name for spec in stage.inputs)}")

    def run(self, dense: Session, optimized: Session, reference: checks.Reference) -> list[Metric]:
        """Figures of one engine beside its dense twin."""
        if self.data is None:
            return metrics.agreement(dense, optimized, metrics.random_inputs(reference), random=True)
        if self.metric is None:
            return metrics.agreement(dense, optimized, dict(self.data), random=False)
        return [metrics.evaluate(self.metric, dense, optimized, dict(self.data))]


class _Steps:
    """Counts steps for the caller's progress; more than were planned stretch the plan."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._done, self._total = 0, total

    def next(self, what: str) -> None:
        self.at(what, self._done)
        self._done += 1

    def at(self, what: str, done: int) -> None:
        if self._progress is not None:
            self._progress(what, done, max(self._total, done + 1))


def _batch(stage: Stage) -> str:
    first = stage.example[0]
    return str(first.shape[0] if first.dim() else 1)


def _first_size(manifest: manifests.Manifest, engine: str, batch: int) -> dict[str, int]:
    if engine not in manifest.engines:
        raise OptpassError(
            "engine-name", f"the artifact has no engine {engine!r}", f"it has {', '.join(manifest.engines)}"
        )
    first = manifest.engines[engine].inputs[0].shape[0]
    if isinstance(first, int):
        if first == batch:
            return {}
        raise OptpassError(
            "batch", f"the engine is built for batch {first}", "optimize with --dynamic for its first dimension"
        )
    return {first: batch}
