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


class PassRecord(Result):
    """One pass: what was asked, where it went, how it was verified.

    Attributes:
        sites: module path of each site.
        tokens: token counts before the first site and after each one; a name where the count is dynamic.
        reason: why it was refused or rolled back; empty where kept.
        restored: where tokens were brought back to the old space, and why.
    """

    name: str
    options: dict[str, Any]
    sites: list[str] = []
    tokens: list[int | str] = []
    status: Literal["kept", "refused", "rolled_back"]
    reason: str = ""
    probes: Probes = Probes()
    restored: list[str] = []


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


class Timing(Result):
    """Latency of one engine in milliseconds per call."""

    median_ms: float
    p95_ms: float
    runs: int


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


class OptimizeResult(Result):
    """The outcome of ``optimize``; ``ok`` only if every pass was kept, or skipped on request, and all engines hold."""

    ok: bool
    artifact: str
    source: str
    passes: list[PassRecord]
    fidelity: list[Fidelity]
    metric: list[Metric] = []
    latency: list[Latency] = []


class VerifyResult(Result):
    """The outcome of ``verify`` on an existing artifact."""

    ok: bool
    artifact: str
    files: int
    fidelity: list[Fidelity]
    metric: list[Metric] = []


class BenchResult(Result):
    """The outcome of ``bench``."""

    artifact: str
    latency: list[Latency]
