"""The public API: capture, passes, engines, verification and one artifact, in the words of the command line."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from optpass import bisection, calibration, cost, diagnosis, difference, dump, grammar, manager, measure, presets
from optpass.budget import Budget, Quality, load_budget
from optpass.cache import Cache, home
from optpass.calibration import Calibrated
from optpass.capture import capture
from optpass.errors import OptpassError
from optpass.evaluation import Arrays, Evaluation
from optpass.export import artifact, finish
from optpass.export.base import backend as find_backend
from optpass.export.base import backends, named
from optpass.manager import OnFail
from optpass.passes.base import Finishing, Pass, registry
from optpass.program import Program, Stage
from optpass.results import (
    ArtifactResult,
    BenchResult,
    BisectResult,
    DiffResult,
    DoctorResult,
    EngineInfo,
    Latency,
    Metric,
    OptimizeResult,
    PassRecord,
    PreviewResult,
    ReportResult,
    VerifyResult,
)
from optpass.runtime import check as checks
from optpass.runtime import choice, schedules
from optpass.runtime import manifest as manifests
from optpass.runtime.denoise import Denoiser
from optpass.runtime.engines.base import layers as engine_layers
from optpass.runtime.features import STREAK, recognise
from optpass.runtime.providers import Provider
from optpass.runtime.session import load
from optpass.structure import Structure, analyse

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps done, and the steps in all."""

Viewer = Literal["netron", "model-explorer"]


def optimize(
    source: Any,
    passes: str | Sequence[Pass] = "",
    *,
    recipe: str | os.PathLike[str] | None = None,
    preset: str | None = None,
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
    target: str | Sequence[str] = (),
    sampler: str = "",
    max_drop: float | None = None,
    progress: Progress | None = None,
) -> OptimizeResult:
    """Capture a model, apply verified passes, lower it, check and measure the engines, and write one artifact.

    Args:
        source: zoo name, Hugging Face or diffusers directory, Hugging Face id, ``.pt2`` file,
            ``package.module:factory``, or ``(module, args, kwargs)``.
        passes: such as ``prune(keep=0.5,at=3),merge(r=8)``, or passes made by hand.
        recipe: the same as a TOML file, in place of ``passes``.
        preset: ``safe``, ``balanced`` or ``fast``, in place of both; what they do depends on the kind of model.
        backend: ``onnxruntime``, ``openvino``, ``openvino:bf16``, ``inductor``; several make one artifact with several
            engines.
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
        target: devices to build for, such as ``sm_89,sm_120``, which need not be here; an engine that cannot run here
            is built, and neither checked nor measured: it is in ``unrun``.
        sampler: by which a denoiser draws samples, such as ``ddim(prediction=velocity,noise=cosine)``; that of the zoo
            model, or one guessed from the timestep of the example, by default.
        max_drop: of the similarity of samples to those of the dense engine, such as 0.02: ``cache`` of a denoiser
            predicts as often as keeps it.
        progress: called with each step.

    Returns:
        ``ok`` is false, and no artifact is written, where a pass failed under ``stop`` or an engine is not faithful.

    Raises:
        OptpassError: anything the caller can mend.
    """
    asked = _passes(passes, recipe, preset)
    engines, devices = _engines(backend), _devices(target)
    _check_devices(engines, devices)
    finishing = _finishing(asked, engines)
    artifact.check_target(out, force)
    evaluation = Evaluation.of(source, data, metric, samples)
    evaluation, apart = evaluation.apart(
        max((made.samples(name) for made in finishing for name, _ in engines), default=0)
    )
    steps = _Steps(progress, 3 + 2 * len(asked) + 6 * len(engines))
    steps.next("capture the model")
    program = capture(source, dynamic=dynamic, inputs=inputs)
    before = program.main
    evaluation.check(spec.name for spec in before.inputs)
    chosen = presets.preset(preset, analyse(before).kind) if preset is not None else None
    promise = chosen.promise if chosen else None
    asked = list(chosen.passes) if chosen else asked
    outcome = manager.apply(program, asked, on_fail=on_fail, progress=steps.next)
    records = list(outcome.records)
    failed = OptimizeResult(
        ok=False,
        artifact="",
        source=program.source,
        passes=records,
        fidelity=[],
        preset=preset or "",
        promise=promise,
    )
    if not outcome.ok and on_fail == "stop":
        return failed
    if any(backends()[name].keeps_kernels(backends()[name].target(devices)) for name, _ in engines):
        steps.next("apply the passes again, with kernels whole")
        outcome = manager.with_whole_kernels(program, asked, outcome)
    drawing = _sampler(sampler, source, outcome.program)
    if max_drop is not None and not (outcome.program.driver == "denoise" and 0 < max_drop < 1):
        what = f"max_drop={max_drop:g} is no bound on the samples of a denoiser that keeps features"
        raise OptpassError("usage", what, "give 0 to 1, with cache among the passes of a denoiser")
    with artifact.writer(
        out,
        source=program.source,
        force=force,
        target=devices,
        sampler=drawing,
        progress=lambda text, _: steps.next(text),
    ) as new:
        added = {new.add(stage, *e): stage for e in engines for stage in outcome.program.deployed}
        mains = [name for name, stage in added.items() if stage is outcome.program.deployed[-1]]
        names = [(main, new.add(before, *e, role="dense")) for main, e in zip(mains, engines, strict=True)]
        names = [(main, dense) for main, dense in names if new.runs(main) and new.runs(dense)]
        layers = cost.layers(analyse(before), analyse(outcome.program.main), records)
        new.release()
        for stage in outcome.program.stages.values():
            stage.release()
        gc.collect()
        fidelity = new.fidelity()
        faithful = all(entry.ok for entry in fidelity)
        for made in finishing if faithful else ():
            done, rows = finish.finish(new, made, added, before, apart)
            records = [done if record.name == made.name else record for record in records]
            fidelity = [row for row in fidelity if row.engine not in {row.engine for row in rows}] + rows
            if not done.done and on_fail == "stop":
                return failed.model_copy(update={"passes": records})
        figures: list[Metric] = []
        latency: list[Latency] = []
        found: list[Calibrated] = []
        if faithful:
            for main, dense in names:
                if max_drop is not None:
                    found.append(_calibrated(new, main, dense, evaluation, max_drop, steps))
                steps.next(f"take the metric on {main}")
                recorded = new.reference("dense")
                figures += evaluation.run(partial(new.session, dense), partial(new.session, main), recorded)
                if seconds > 0:
                    steps.next(f"time {main}")
                    arrays = recorded.inputs({})
                    pair = new.session(dense), new.session(main)
                    latency.append(measure.compare(*pair, arrays, budget=seconds, batch=_batch(before)))
            asked, records = _as_found(asked, records, found)
            drafts = measure.drafts(new.session(names[0][0]), new.reference("dense").inputs({})) if names else []
            new.finish(
                passes=records,
                layers=layers,
                fidelity=fidelity,
                metric=figures,
                latency=latency,
                accepted=drafts,
                maps=outcome.maps,
                recipe=grammar.as_recipe(asked),
            )
    return OptimizeResult(
        ok=faithful,
        artifact=str(out) if faithful else "",
        source=program.source,
        passes=records,
        fidelity=fidelity,
        metric=figures,
        latency=latency,
        unrun=new.unrun(),
        preset=preset or "",
        promise=promise,
    )


def preview(
    source: Any,
    passes: str | Sequence[Pass] = "",
    *,
    recipe: str | os.PathLike[str] | None = None,
    preset: str | None = None,
    backend: str | Sequence[str] = "onnxruntime",
    dynamic: Mapping[str, str] | Sequence[str] | None = None,
    inputs: Mapping[str, Any] | None = None,
    on_fail: OnFail = "stop",
    progress: Progress | None = None,
) -> PreviewResult:
    """Capture and rewrite a model without verifying, lowering or writing, and count tokens and operations.

    The arguments are those of ``optimize``.

    Raises:
        OptpassError: as ``optimize``.
    """
    asked = _passes(passes, recipe, preset)
    engines = _engines(backend)
    _finishing(asked, engines)
    steps = _Steps(progress, 3 + len(asked))
    steps.next("capture the model")
    program = capture(source, dynamic=dynamic, inputs=inputs)
    before = analyse(program.main)
    if preset is not None:
        asked = list(presets.preset(preset, before.kind).passes)
    outcome = manager.apply(program, asked, on_fail=on_fail, verify=False, progress=steps.next)
    steps.next("count operations")
    after = analyse(outcome.program.main)
    return PreviewResult(
        ok=outcome.ok or on_fail == "skip",
        source=program.source,
        kind=before.kind,
        passes=list(outcome.records),
        layers=cost.layers(before, after, outcome.records),
        dense_flops=cost.total(before),
        flops=cost.total(after),
        engines=[f"{name}-{precision}" for name, precision in engines],
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


PLACES = ("int32", "int64", "bool")


def inspect_artifact(path: str | os.PathLike[str]) -> ArtifactResult:
    """What engines an artifact has, which of them run here, and which one ``load`` opens.

    Raises:
        OptpassError: no artifact, or it is damaged.
    """
    folder = Path(path)
    manifest = manifests.read(folder)
    unfit = {row.engine: row.why for row in choice.unrun(manifest, manifest.engines)}
    try:
        chosen = choice.choose(manifest)
    except OptpassError as error:
        chosen = choice.Choice("", f"{error.refusal.what}; {error.refusal.remedy}")
    found = []
    for name, engine in manifest.engines.items():
        told, layers = engine_layers(engine, folder / engine.entry)
        counts = Counter((layer["type"], layer["precision"]) for layer in layers)
        # what computes sizes and places is most of the layers and least of the work
        ordered = sorted(counts, key=lambda key: (key[1] in PLACES, -counts[key]))
        if not layers:
            told = "in its file"
            counts = Counter({(op, ""): n for op, n in difference.ops(folder, engine).items()})
            ordered = [key for key, _ in counts.most_common()]
        found.append(
            EngineInfo(
                engine=name,
                stage=engine.stage,
                precision=engine.precision,
                target=engine.target,
                version=engine.version,
                mib=engine.mib(folder),
                unfit=unfit.get(name, ""),
                layers=[(*key, counts[key]) for key in ordered],
                layers_of=told if counts else "",
            )
        )
    return ArtifactResult(
        artifact=str(folder),
        source=manifest.source,
        created=manifest.created,
        optpass=manifest.optpass,
        default=manifest.default,
        opens=chosen.engine,
        why=chosen.why,
        engines=found,
        passes=manifest.passes,
    )


def doctor(
    source: Any = None,
    *,
    backend: str | Sequence[str] = (),
    target: str | Sequence[str] = (),
    dynamic: Mapping[str, str] | Sequence[str] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> DoctorResult:
    """What is installed, what can be built and what runs on this machine; of a model, what each backend makes of it.

    Args:
        source: as in ``optimize``; without one the machine alone is looked at.
        backend: those to look at, by name; all by default.
        target: devices to build for, such as ``sm_89,sm_120``.
        dynamic: as in ``optimize``.
        inputs: as in ``optimize``.

    Raises:
        OptpassError: no such backend, or the model cannot be captured.
    """
    names = [backend] if isinstance(backend, str) else list(backend)
    asked = {named(name.partition(":")[0]).name for name in names}
    looked = [found for name, found in backends().items() if not asked or name in asked]
    devices = _devices(target)
    facts, rows = diagnosis.facts(), diagnosis.machine(looked, devices)
    if source is None:
        return DoctorResult(ok=True, facts=facts, backends=rows)
    program = capture(source, dynamic=dynamic, inputs=inputs)
    made = diagnosis.model(program.main, looked, devices)
    return DoctorResult(
        ok=not names or not any(row.refusal for row in made),
        facts=facts,
        backends=rows,
        source=program.source,
        weights_mib=diagnosis.weights(program.main) / 2**20,
        model=made,
    )


def verify(
    path: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | Arrays | None = None,
    metric: str | None = None,
    samples: int | None = None,
    backend: str | None = None,
    provider: str | Provider | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Check an artifact again on this machine: hashes, every engine against its recorded outputs, and the metric.

    Engines that do not run here are named in ``unrun``, and so is machine code unless its ``backend`` is given. With a
    ``provider`` of ONNX Runtime its engines alone are checked, on it, and ``providers`` tells what it took.

    Raises:
        OptpassError: a file is missing or changed, or an engine does not open here.
    """
    folder = Path(path)
    manifest = manifests.read(folder)
    evaluation = Evaluation.of(None, data, metric, samples)
    twins = measure.pairs(manifest)
    steps = _Steps(progress, len(manifest.engines) + len(twins))
    asked = Provider(provider) if isinstance(provider, str) else provider
    result = checks.verify(folder, backend=backend, provider=asked, progress=steps.next)
    not_run = [name for name in manifest.engines if name not in {row.engine for row in result.fidelity}]
    twins = {name: dense for name, dense in twins.items() if name not in not_run and dense not in not_run}
    if not evaluation.data or not result.ok:
        return result
    figures: list[Metric] = []
    for name, dense in twins.items():
        steps.next(f"take the metric on {name}")
        figures += evaluation.run(
            partial(load, folder, engine=dense, provider=asked),
            partial(load, folder, engine=name, provider=asked),
            checks.read(folder, manifest, name),
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
    sizes = None if batch is None else measure.first_size(manifest, chosen, batch)
    steps = _Steps(progress, 100)
    return measure.bench(
        folder,
        engine=engine,
        sizes=sizes,
        budget=seconds,
        progress=lambda what, share: steps.at(what, int(share * 100)),
    )


def report(
    path: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    profile: bool = True,
    graph: Viewer | None = None,
    engine: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ReportResult:
    """Write one HTML page about an artifact, or its graph for a viewer.

    Args:
        path: the artifact.
        out: the file to write; by default the name of the artifact with an ending of its own, beside it.
        profile: run the engines here with their profilers, to tell where the time goes.
        graph: write the graph for ``netron`` or ``model-explorer`` in place of the page.
        engine: of which to write the graph; by default the one that is opened by default, if it is an ONNX graph.
        force: replace a file that is there and was not written by this function.
        progress: called with each step.

    Raises:
        OptpassError: the artifact is damaged, or the file cannot be written.
    """
    from optpass.export import graph as graphs
    from optpass.export import report as reports

    folder, target = Path(path), Path(out) if out is not None else None
    steps = _Steps(progress, 3)
    if graph is None:
        if engine is not None:
            raise OptpassError("usage", "an engine is named without a graph", "give graph, or leave the engine out")
        written = reports.report(folder, target, profile=profile, force=force, progress=steps.next)
    else:
        written = graphs.export(folder, target, graph, engine, profile=profile, force=force, progress=steps.next)
    return ReportResult(artifact=str(folder), report=str(written))


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


def bisect(
    source: Any,
    passes: str | Sequence[Pass] = "",
    *,
    recipe: str | os.PathLike[str] | None = None,
    preset: str | None = None,
    backend: str | None = None,
    dynamic: Mapping[str, str] | Sequence[str] | None = None,
    inputs: Mapping[str, Any] | None = None,
    data: str | os.PathLike[str] | Arrays | None = None,
    metric: str | None = None,
    samples: int | None = None,
    budget: Budget | str | os.PathLike[str] | None = None,
    max_drop: float | None = None,
    at_least: float | None = None,
    seconds: float = 1.0,
    cache: str | os.PathLike[str] | None = None,
    cached_latency: bool = False,
    progress: Progress | None = None,
) -> BisectResult:
    """Find the pass and the site that made quality or speed fall, by applying a schedule one site after the other.

    Args:
        source: an artifact, whose source is captured again with its recorded inputs and whose recipe is taken; or a
            model, as in ``optimize``.
        passes: the schedule; in place of the artifact's own where both are there.
        recipe: the same as a TOML file.
        preset: as in ``optimize``.
        backend: one, such as ``openvino:bf16``; by default that of the first engine of the artifact.
        dynamic: as in ``optimize``; by default what the artifact has.
        inputs: as in ``optimize``; by default what the artifact recorded.
        data: as in ``optimize``.
        metric: as in ``optimize``.
        samples: as in ``optimize``.
        budget: a ``budget.toml``, whose first tables for quality and speed-up give what is not given here.
        max_drop: most that the schedule may lose, in points of 100 for a share such as top1.
        at_least: least speed-up over the dense engine.
        seconds: how long to time each step; 0 times none.
        cache: directory for engines and scores; ``optpass`` in the user's cache by default.
        cached_latency: take latencies from the cache too.
        progress: called with each step.

    Returns:
        ``ok`` is false where a step is to blame.

    Raises:
        OptpassError: anything the caller can mend; a pass that is refused among it.
    """
    asked = _passes(passes, recipe, preset)
    bounds = budget if isinstance(budget, Budget) or budget is None else load_budget(budget)
    folder = _artifact(source)
    if folder is not None:
        manifest = manifests.read(folder)
        engine = _engine_to_bisect(manifest, bounds)
        source, backend = manifest.source, backend or f"{engine.backend}:{engine.precision}"
        dynamic = engine.declared if dynamic is None else dynamic
        if inputs is None:
            inputs = checks.read(folder, manifest, manifests.engine_id(engine.backend, engine.precision)).example
        if not asked and preset is None and manifest.recipe:
            kept = [(record.name, record.options) for record in manifest.passes if record.done]
            known = grammar.read_recipe(manifest.recipe, f"the recipe of {folder}")
            asked = [made for made in known if (made.name, made.options.model_dump(exclude_none=True)) in kept]
    if not asked and preset is None:
        raise OptpassError("usage", "there is no pass to look at", "give --passes, --recipe or --preset")
    ((name, precision),) = _engines(backend or "onnxruntime")
    limits = _limits(bounds, max_drop, at_least)
    if quality := _quality(bounds):
        data, metric, samples = data or quality.data, metric or quality.metric, samples or quality.samples
    evaluation = Evaluation.of(source, data, metric, samples)
    steps = _Steps(progress, 3 + 3 * len(asked))
    steps.next("capture the model")
    try:
        program = capture(source, dynamic=dynamic, inputs=inputs)
    except OptpassError as error:
        if folder is None:
            raise
        what = f"the source of {folder} cannot be captured again: {error.refusal.what}"
        raise OptpassError("no-source", what, "bisect the model itself, with the passes of the artifact") from error
    evaluation.check(spec.name for spec in program.main.inputs)
    if folder is not None:
        bisection.check_source(program, folder, manifest, engine)
    if preset is not None:
        asked = list(presets.preset(preset, analyse(program.main).kind).passes)
    return bisection.bisect(
        program,
        asked,
        backend=name,
        precision=precision,
        evaluation=evaluation,
        limits=limits,
        cache=Cache(Path(cache) if cache is not None else home()),
        seconds=seconds,
        cached_latency=cached_latency,
        progress=steps.next,
    )


def diff(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> DiffResult:
    """Compare two artifacts: passes, tokens, graphs, figures, and what they were made with and on.

    Raises:
        OptpassError: one of them is no artifact, or damaged.
    """
    return difference.diff(Path(first), Path(second))


def _artifact(source: Any) -> Path | None:
    """The source as the directory of an artifact, if it is one."""
    if not isinstance(source, str | os.PathLike):
        return None
    folder = Path(source)
    return folder if (folder / manifests.NAME).is_file() else None


def _engine_to_bisect(manifest: manifests.Manifest, budget: Budget | None) -> manifests.Engine:
    """The engine that the budget names, or the first that serves."""
    name = budget.engine if budget and budget.engine else next(iter(measure.pairs(manifest)), manifest.default)
    return manifest.engine(name)


def _limits(budget: Budget | None, max_drop: float | None, at_least: float | None) -> bisection.Limits:
    """Those of the call, or else of the budget."""
    quality = _quality(budget)
    speed = next((t for t in (budget.speedup if budget else []) if t.over == "dense"), None)
    return bisection.Limits(
        max_drop=quality.max_drop if max_drop is None and quality else max_drop,
        at_least=speed.at_least if at_least is None and speed else at_least,
    )


def _quality(budget: Budget | None) -> Quality | None:
    """The first table of a budget that limits a drop from the dense engine."""
    tables = budget.quality if budget else []
    return next((table for table in tables if table.max_drop is not None and table.over == "dense"), None)


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


def _passes(passes: str | Sequence[Pass], recipe: str | os.PathLike[str] | None, preset: str | None) -> list[Pass]:
    """What was asked for; nothing yet where a preset waits for the kind of the model."""
    if sum((bool(passes), recipe is not None, preset is not None)) > 1:
        raise OptpassError("usage", "passes, a recipe and a preset exclude each other", "give one of them")
    if preset is not None:
        presets.check(preset)
        return []
    if recipe is not None:
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


def _finishing(passes: Sequence[Pass], engines: Sequence[tuple[str, str]]) -> list[Finishing]:
    """The passes that act on files, each checked for every backend before any work starts."""
    found = [made for made in manager.ordered(passes) if isinstance(made, Finishing)]
    for made in found:
        for name, _ in engines:
            made.check(name)
    return found


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


def _calibrated(
    new: artifact.Writer, main: str, dense: str, evaluation: Evaluation, max_drop: float, steps: _Steps
) -> Calibrated:
    """Set the knob of an engine."""
    model, other = new.session(main), new.session(dense)
    assert isinstance(model, Denoiser)
    assert isinstance(other, Denoiser)
    given = evaluation.data or new.reference("dense").inputs({})
    conditions = {name: given[name] for name in model.roles.conditions}
    found = calibration.calibrate(model, other, conditions, max_drop, steps.next)
    new.begin_with(main, {found.knob: found.value})
    return found


def _as_found(
    asked: list[Pass], records: list[PassRecord], found: Sequence[Calibrated]
) -> tuple[list[Pass], list[PassRecord]]:
    """Passes and records with the smallest knob that was found, so that the recipe makes the engine again."""
    if not found:
        return asked, records
    least = min(found, key=lambda calibrated: calibrated.value)
    knob = {least.knob: round(least.value) if least.knob == STREAK else least.value}
    said = "; ".join(map(str, found))
    passes = [
        grammar.make(made.name, made.options.model_dump(exclude_unset=True) | knob) if made.name == "cache" else made
        for made in asked
    ]
    updated = [
        r.model_copy(update={"options": {**r.options, **knob}, "data": "; ".join(filter(None, (r.data, said)))})
        if r.name == "cache"
        else r
        for r in records
    ]
    return passes, updated


def _sampler(asked: str, source: Any, program: Program) -> str:
    """Of a denoiser: what was asked for, what a zoo model was trained for, or else by the size of its timesteps."""
    roles = recognise(program.main.inputs, program.main.outputs)
    if roles is None:
        return ""
    if not asked and isinstance(source, str):
        from optpass.zoo import registry as zoo

        asked = str(getattr(zoo.load(source), "SAMPLER", "")) if source in zoo.names() else ""
    names = [spec.name for spec in program.main.inputs]
    times = program.main.example[names.index(roles.timestep)]
    chosen = asked or ("ddim" if float(times.max()) > 1 else "euler")
    schedules.asked(chosen)
    return chosen


def _devices(target: str | Sequence[str]) -> list[str]:
    """``sm_89,sm_120`` as two devices."""
    parts = [target] if isinstance(target, str) else target
    return list(dict.fromkeys(name.strip() for part in parts for name in part.split(",") if name.strip()))


def _check_devices(engines: Sequence[tuple[str, str]], devices: Sequence[str]) -> None:
    """Refuse devices that no backend of the call builds for, before any work starts."""
    known = {name: backends()[name].target(devices) for name, _ in engines}
    if devices and not any(set(devices) & set(bound) for bound in known.values()):
        building = ", ".join(name for name, found in backends().items() if found.devices)
        what = f"{', '.join(known)} is built for no device by name, and {', '.join(devices)} is asked for"
        raise OptpassError("usage", what, f"add -b {building}, or leave --target out")


def _batch(stage: Stage) -> str:
    first = stage.example[0]
    return str(first.shape[0] if first.dim() else 1)
