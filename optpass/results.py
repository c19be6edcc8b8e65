"""What was done and what was measured, as values that go to the manifest, to ``--json`` and to the tables alike."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Result(BaseModel):
    """Base of all results: unknown fields are an error, so that a manifest of another schema is not half understood."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(Result):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


class Probes(Result):
    """Largest absolute difference of any output in each structural probe; None where the pass has no such probe."""

    identity: float | None = None
    permutation: float | None = None
    equivalence: float | None = None
    incremental: float | None = None
    reuse: float | None = None


class PassRecord(Result):
    """One pass: what was asked, where it went, how it was verified.

    Attributes:
        sites: module path of each site.
        tokens: token counts before the first site and after each one; a name where the count is dynamic.
        status: ``placed`` in a preview, which verifies nothing.
        reason: why it was refused or rolled back; empty where kept.
        restored: where tokens were brought back to the old space, and why.
        error: of an output, relative to its largest value, where the pass has a limit to it; with ``max_error``.
        ops: how many ops compute in each precision, where the pass changes it.
        stayed: module path and op of those that stayed as they were.
        data: what it was calibrated on, in words.
    """

    name: str
    options: dict[str, Any]
    sites: list[str] = []
    tokens: list[int | str] = []
    status: Literal["kept", "placed", "refused", "rolled_back"]
    reason: str = ""
    probes: Probes = Probes()
    restored: list[str] = []
    error: float | None = None
    max_error: float | None = None
    ops: dict[str, int] = {}
    stayed: list[str] = []
    data: str = ""

    @property
    def done(self) -> bool:
        """Whether the pass is part of the result."""
        return self.status in ("kept", "placed")


class Fidelity(Result):
    """One output of one engine against eager execution of the same program, over all shapes tried.

    Attributes:
        engine: name of the engine in the artifact.
        difference: largest absolute difference.
        tolerance: what the precision allows at the magnitude of this output.
        shapes: sizes of the dynamic dimensions at which the engine was run.
    """

    engine: str
    output: str
    difference: float
    tolerance: float
    shapes: list[dict[str, int]]
    ok: bool


class Unrun(Result):
    """An engine that was not run, and so has no figures.

    Attributes:
        why: in words, such as ``it is built for sm_89, and here is no NVIDIA GPU``.
        remedy: what to do to have it run.
    """

    engine: str
    why: str
    remedy: str


class Metric(Result):
    """A figure of quality, taken on the engines.

    Attributes:
        engine: name of the optimized engine in the artifact.
        name: ``top1`` and the like on labelled data; ``agreement`` against the dense engine where there are none.
        dense, optimized: the metric with its 95 % interval, over samples.
        drop: dense minus optimized, paired by sample.
        label: what the figure may be read as, in a sentence.
    """

    engine: str
    name: str
    samples: int
    dense: Interval
    optimized: Interval
    drop: Interval
    label: str


class Layer(Result):
    """One block of the tower that was reduced, at the sizes of the example.

    Attributes:
        path: module path of the block.
        dense_tokens, tokens: that enter the block, without and with the passes.
        dense_flops, flops: of one call, a multiplication and an addition counted as two.
    """

    path: str
    dense_tokens: int
    tokens: int
    dense_flops: float
    flops: float


class Timing(Result):
    """Latency of one engine in milliseconds per call.

    Attributes:
        quantiles_ms: at 0, 5, ... 100 % of the runs.
    """

    median_ms: float
    p95_ms: float
    runs: int
    quantiles_ms: list[float] = []


class Accepted(Result):
    """What a drafter brought on the example texts, at trees of ``nodes``: how many steps brought 1, 2, ... tokens."""

    engine: str
    drafter: str
    nodes: int
    steps: list[int]

    @property
    def tokens_per_step(self) -> float:
        """The mean: 1 is plain decoding."""
        return sum(count * steps for count, steps in enumerate(self.steps, 1)) / max(sum(self.steps), 1)


class Latency(Result):
    """Two engines of one backend, timed in turn in one process.

    Attributes:
        speedup: dense over optimized, the median of paired ratios with a bootstrap interval.
        verdict: ``faster`` or ``slower`` only where the interval excludes 1; otherwise ``no gain``.
    """

    engine: str
    batch: str
    dense: Timing
    optimized: Timing
    speedup: Interval
    verdict: Literal["faster", "slower", "no gain"]


class Promise(Result):
    """What a preset was measured to bring; a model of one's own is another matter.

    Attributes:
        engine: that the figures were taken on.
        machine: the processor and its cores in use.
        drop: of the metric, in points of 100 for a share: value and 95 % interval.
        control_drop: with as many tokens at the same places chosen by chance.
        speedup: over the unmodified model, by batch size: value and 95 % interval.
        command: what measures it again.
    """

    model: str
    engine: str
    machine: str
    date: str
    metric: str
    samples: int
    drop: tuple[float, float, float]
    control_drop: tuple[float, float, float]
    speedup: dict[str, tuple[float, float, float]]
    command: str


class OptimizeResult(Result):
    """The outcome of ``optimize``; ``ok`` only if every pass was kept, or skipped on request, and all engines hold.

    Attributes:
        preset: name of the preset that was asked for, with its promise.
    """

    ok: bool
    artifact: str
    source: str
    passes: list[PassRecord]
    fidelity: list[Fidelity]
    metric: list[Metric] = []
    latency: list[Latency] = []
    unrun: list[Unrun] = []
    preset: str = ""
    promise: Promise | None = None


class PreviewResult(Result):
    """The outcome of ``preview``; ``ok`` is false where ``optimize`` would stop.

    Attributes:
        kind: of the model, such as ``vision``.
        passes: placed and built, but not verified.
        layers: of the tower that is reduced.
        dense_flops, flops: of one call of the whole model at the sizes of the example, without and with the passes.
        engines: what would be built.
    """

    ok: bool
    source: str
    kind: str
    passes: list[PassRecord]
    layers: list[Layer]
    dense_flops: float
    flops: float
    engines: list[str]


class EngineInfo(Result):
    """An engine of an artifact, as this machine sees it.

    Attributes:
        target: devices that it is built for; empty where any will do.
        version: of the library that it is bound to; empty where any will do.
        mib: of its files.
        unfit: why it is not run here by default, in words; empty where it is.
        layers: how many there are of each type and precision, most first.
        layers_of: what is counted there, in words.
    """

    engine: str
    stage: str
    precision: str
    target: list[str]
    version: str
    mib: float
    unfit: str
    layers: list[tuple[str, str, int]]
    layers_of: str


class ArtifactResult(Result):
    """What is in an artifact.

    Attributes:
        default: the engine that was best where it was built.
        opens: the one that ``load`` opens here, empty where none is; ``why`` says why.
    """

    artifact: str
    source: str
    created: str
    optpass: str
    default: str
    opens: str
    why: str
    engines: list[EngineInfo]
    passes: list[PassRecord]


class BackendInfo(Result):
    """What this machine does with a backend in a precision.

    Attributes:
        library: that it needs, with its version where it is installed.
        builds, runs: why engines cannot be built, and why they do not run; empty where they can and do.
        remedy: what to do about the first of both; empty where there is none.
    """

    backend: str
    precision: str
    library: str
    builds: str
    runs: str
    remedy: str


class ModelOnBackend(Result):
    """What a backend makes of a model, before it is built.

    Attributes:
        form: what the backend reads, with its opset.
        ops: how many there are of each type, in that form.
        limits: of the backend, and what they mean for this model.
        refusal: why it does not take the model, in one line; empty where it does.
    """

    backend: str
    form: str
    ops: dict[str, int]
    limits: list[str]
    refusal: str


class DoctorResult(Result):
    """The outcome of ``doctor``; ``ok`` is false where a backend that was asked for does not take the model.

    Attributes:
        facts: of the machine, by name.
        weights_mib: of the model, in float32 or as they are; None without a model.
    """

    ok: bool
    facts: dict[str, str]
    backends: list[BackendInfo]
    source: str = ""
    weights_mib: float | None = None
    model: list[ModelOnBackend] = []


class VerifyResult(Result):
    """The outcome of ``verify`` on an existing artifact.

    Attributes:
        providers: of ONNX Runtime, where one was asked for: what each took of the nodes of an engine, in words.
    """

    ok: bool
    artifact: str
    files: int
    fidelity: list[Fidelity]
    metric: list[Metric] = []
    unrun: list[Unrun] = []
    providers: dict[str, str] = {}


class BenchResult(Result):
    """The outcome of ``bench``."""

    artifact: str
    latency: list[Latency]
    unrun: list[Unrun] = []


class Step(Result):
    """One site of one pass, and the engine of the schedule up to and including it.

    Attributes:
        options: of the pass at this site.
        site: module path.
        tokens: after the site; a name where the count is dynamic.
        metric: after this step.
        loss: against the dense engine, positive where worse, in points of 100 for a share.
        own_loss: against the engine of the step before, paired by sample.
        speedup: over the dense engine.
        own_speedup: over the engine of the step before, timed in turn with it.
    """

    number: int
    name: str
    options: dict[str, Any]
    site: str
    tokens: int | str
    metric: Interval
    loss: Interval
    own_loss: Interval
    speedup: Interval | None = None
    own_speedup: Interval | None = None


class Blame(Result):
    """The step that made quality or speed fall.

    Attributes:
        certain: whether the whole 95 % interval says so, or the estimate alone.
        why: the figures, in a sentence.
    """

    figure: Literal["quality", "speed"]
    step: int
    certain: bool
    why: str


class BisectResult(Result):
    """The outcome of ``bisect``; ``ok`` where nothing is to blame.

    Attributes:
        engine: backend and precision that all was taken on.
        metric: name of the figure of quality.
        unit: ``points`` of 100 for a share, otherwise empty: the loss is in the metric's own unit.
        label: what the figure may be read as.
        dense: the metric of the unmodified model.
        largest: the step that costs most quality, whether or not it is to blame; 0 where there is no step.
        built, found: engines that were built, and that the cache had.
    """

    ok: bool
    source: str
    engine: str
    metric: str
    unit: str
    samples: int
    label: str
    dense: Interval
    steps: list[Step]
    blame: list[Blame]
    largest: int
    built: int
    found: int


class ReportResult(Result):
    """The outcome of ``report``: the file that was written."""

    artifact: str
    report: str


class PassDiff(Result):
    """A pass that only one of two artifacts has, or has with other options; ``options`` holds both values of each."""

    name: str
    change: Literal["added", "removed", "changed"]
    options: dict[str, tuple[Any, Any]]


class LayerDiff(Result):
    """A block into which other tokens go, or that costs other operations; None where an artifact has no such block."""

    path: str
    tokens: tuple[int | None, int | None]
    flops: tuple[float | None, float | None]


class GraphDiff(Result):
    """The ops in the files of an engine.

    Attributes:
        nodes: how many; None where an artifact has no such engine.
        ops: by type, where their number differs.
    """

    engine: str
    nodes: tuple[int | None, int | None]
    ops: dict[str, tuple[int, int]]


class FigureDiff(Result):
    """A figure of an engine that differs.

    Attributes:
        comparable: false for latencies that were taken on different machines.
    """

    engine: str
    figure: str
    values: tuple[Interval | float | None, Interval | float | None]
    comparable: bool


class TextDiff(Result):
    """A version, a fact of the machine, or what an artifact says of itself, where it differs."""

    kind: Literal["library", "machine", "artifact"]
    name: str
    values: tuple[str | None, str | None]


class DiffResult(Result):
    """The outcome of ``diff``.

    Attributes:
        same: passes, tokens and the files of all engines are equal; measured figures may differ.
        same_machine: whether their latencies may be compared.
    """

    first: str
    second: str
    same: bool
    same_machine: bool
    passes: list[PassDiff]
    layers: list[LayerDiff]
    graphs: list[GraphDiff]
    figures: list[FigureDiff]
    made: list[TextDiff]
