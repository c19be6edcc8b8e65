"""Latency, so that it can be believed: two engines in turn in one process, and an interval for their ratio."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from optpass.errors import OptpassError
from optpass.results import BenchResult, Interval, Latency, Timing
from optpass.runtime import check
from optpass.runtime import manifest as manifests
from optpass.runtime.manifest import Manifest, engine_id
from optpass.runtime.session import Session, open_session

Times = NDArray[np.float64]
Progress = Callable[[str, float], None]
"""Called with what is being timed and the share of it that is done, 0 to 1."""

FEWEST, MOST = 10, 2000
"""Pairs of runs: fewer give no interval of a median, more tell nothing new."""

WARM_UP = 3
RESAMPLES = 2000
SEED = 0


def interleave(
    first: Callable[[], Any], second: Callable[[], Any], budget: float, progress: Callable[[float], None] | None = None
) -> tuple[Times, Times]:
    """Seconds of each run of two functions, in pairs whose order alternates.

    What slows the machine for a while slows both of a pair; what the first of a pair leaves behind in caches and in
    clock frequency meets each function in every other pair.

    Args:
        first: what to time.
        second: what to time beside it.
        budget: seconds to spend, warm-up included; exceeded only for the fewest pairs.
        progress: called after each pair with the share of the budget that is spent.
    """
    begin = time.perf_counter()
    for _ in range(WARM_UP):
        first()
        second()
    times: tuple[list[float], list[float]] = ([], [])
    collecting = gc.isenabled()
    gc.disable()
    try:
        while len(times[0]) < FEWEST or (time.perf_counter() - begin < budget and len(times[0]) < MOST):
            order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
            for which in order:
                times[which].append(_seconds(second if which else first))
            if progress:
                progress(min((time.perf_counter() - begin) / max(budget, 1e-9), 1.0))
    finally:
        if collecting:
            gc.enable()
    return np.array(times[0]), np.array(times[1])


def _seconds(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def speedup(dense: Times, optimized: Times) -> Interval:
    """Dense over optimized: the median of the ratios of pairs, with a bootstrap interval of 95 %."""
    ratios = dense / optimized
    draws = np.random.default_rng(SEED).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), (2.5, 97.5))
    return Interval(value=float(np.median(ratios)), low=float(low), high=float(high))


def verdict(ratio: Interval) -> Literal["faster", "slower", "no gain"]:
    """What may be said: ``no gain`` where the interval holds 1."""
    if ratio.low > 1:
        return "faster"
    return "slower" if ratio.high < 1 else "no gain"


def timing(times: Times) -> Timing:
    """Median and 95th percentile."""
    return Timing(
        median_ms=float(np.median(times) * 1e3), p95_ms=float(np.percentile(times, 95) * 1e3), runs=len(times)
    )


def compare(
    dense: Session,
    optimized: Session,
    inputs: Mapping[str, NDArray[Any]],
    *,
    budget: float = 10.0,
    batch: str | None = None,
    progress: Callable[[float], None] | None = None,
) -> Latency:
    """Time two engines of one backend on the same inputs.

    Args:
        dense: session of the unmodified model.
        optimized: session with the same number of threads.
        inputs: of both.
        budget: seconds to spend.
        batch: how to name the sizes in the result; the first size of the first input by default.
        progress: called with the share that is done.
    """
    if dense.threads != optimized.threads:
        raise ValueError(f"the engines run on {dense.threads} and {optimized.threads} threads: no fair comparison")
    times = interleave(lambda: dense.run(**inputs), lambda: optimized.run(**inputs), budget, progress)
    ratio = speedup(*times)
    first = next(iter(inputs.values()))
    return Latency(
        engine=optimized.name,
        batch=batch if batch is not None else str(first.shape[0] if first.ndim else 1),
        dense=timing(times[0]),
        optimized=timing(times[1]),
        speedup=ratio,
        verdict=verdict(ratio),
    )


def pairs(manifest: Manifest) -> dict[str, str]:
    """The serving engines of an artifact that have a dense twin, and the twin of each."""
    found = {}
    for name, engine in manifest.engines.items():
        twin = engine_id(engine.backend, engine.precision, "dense", engine.stage)
        if not engine.dense and twin in manifest.engines:
            found[name] = twin
    return found


def bench(
    path: str | os.PathLike[str],
    *,
    engine: str | None = None,
    sizes: Mapping[str, int] | None = None,
    inputs: Mapping[str, NDArray[Any]] | None = None,
    threads: int | None = None,
    budget: float = 10.0,
    progress: Progress | None = None,
) -> BenchResult:
    """Time the engines of an artifact against their dense twins.

    Args:
        path: the artifact.
        engine: one engine; by default all that have a twin.
        sizes: sizes of dynamic dimensions by name; those of the example otherwise.
        inputs: arrays by name; by default those recorded in the artifact.
        threads: cores for one call; all by default.
        budget: seconds for each engine.
        progress: called with the engine and the share of it that is done.
    """
    folder = Path(path)
    manifest = manifests.read(folder)
    twins = pairs(manifest)
    if engine is not None and engine not in twins:
        raise OptpassError(
            "engine-name", f"the artifact has no engine {engine!r} with a dense twin", f"it has {', '.join(twins)}"
        )
    if not twins:
        raise OptpassError("no-dense", f"{folder} holds no dense engine to compare with", "optimize again with it")
    results = []
    for name in [engine] if engine is not None else list(twins):
        arrays = dict(inputs) if inputs is not None else recorded_inputs(folder, manifest, name, sizes or {})
        both = [open_session(folder, manifest, n, threads) for n in (twins[name], name)]
        tell = (lambda share, name=name: progress(name, share)) if progress else None
        results.append(compare(both[0], both[1], arrays, budget=budget, batch=_label(sizes), progress=tell))
    return BenchResult(artifact=str(folder), latency=results)


def _label(sizes: Mapping[str, int] | None) -> str | None:
    if not sizes:
        return None
    return str(*sizes.values()) if len(sizes) == 1 else ", ".join(f"{name}={size}" for name, size in sizes.items())


def recorded_inputs(folder: Path, manifest: Manifest, engine: str, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """The example inputs recorded for an engine, tiled or cropped to ``sizes``."""
    entry = manifest.engines[engine]
    for name, size in sizes.items():
        bounds = entry.dynamic.get(name)
        if bounds is None:
            known = ", ".join(entry.dynamic) or "none"
            raise OptpassError("dynamic-name", f"{engine} has no dynamic dimension {name!r}", f"it has {known}")
        if not bounds.minimum <= size <= bounds.maximum:
            raise OptpassError(
                "dynamic-range",
                f"{name}={size} is outside {bounds.minimum} to {bounds.maximum}",
                "give a size inside, or optimize with a wider range",
            )
    return check.read(folder, manifest, engine).inputs(sizes)
