"""Latency, so that it can be believed: engines in turn in one process, opened anew in each of many rounds.

What slows the machine for a while slows both engines of a pair. Who runs first is drawn by lot and turned round for
the next pair, so that what one leaves behind in caches and clocks meets the other as often. How an engine lies in
memory is a lot of its own, drawn when it is opened: hence rounds. Between engines that are equal every round is then
as likely to favour one as the other, whatever else the machine does meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from optpass import similarity
from optpass.errors import OptpassError
from optpass.results import Accepted, BenchResult, Interval, Latency, Timing
from optpass.runtime import check, choice
from optpass.runtime import manifest as manifests
from optpass.runtime.denoise import Denoiser, drawn
from optpass.runtime.generate import Generator, accepted
from optpass.runtime.manifest import STEP, Engine, Manifest
from optpass.runtime.session import Session, open_session

Times = NDArray[np.float64]
Run = Callable[[], Any]
Progress = Callable[[str, float], None]
"""Called with what is being timed and the share of it that is done, 0 to 1."""

FEWEST, MOST = 10, 2000
"""Pairs of runs: fewer give no interval of a median, more tell nothing new."""

ROUND, TURNS = 0.1, 8
"""Seconds and turns of a round at least; opening the engines anew takes no more than half of the time either.

Engines that are opened twice differ by more than turns of one opening do: many short rounds tell more than few long.
"""

SHARE = 1 / 12
"""Most of the time that one round may take for its turns: fewer than eight rounds decide nothing."""

WINDOW, STABLE = 3, 0.98
"""A warm-up is over when the fastest of so many runs is no faster than this share of the fastest before."""

QUIET = 1 / 3
"""Share of the turns that tell what the engines do by themselves, where a busy machine disturbs the rest."""

RESAMPLES = 2000
SEED = 0


@dataclass(frozen=True)
class Round:
    """Seconds of each run of each engine: ``times[engine][run]``; runs of one number took place in one turn."""

    times: tuple[Times, ...]

    def log_ratio(self, percentile: float = 50) -> float:
        """Log of first over second: of the median the middle ratio of turns, of another percentile their ratio."""
        first, second = self.times
        if percentile == 50:
            return float(np.median(np.log(first / second)))
        return float(np.log(np.percentile(first, percentile) / np.percentile(second, percentile)))

    def log_time(self, percentile: float, engine: int = -1) -> float:
        """Log of a percentile of the seconds of one engine."""
        return float(np.log(np.percentile(self.times[engine], percentile)))


def interleave(
    functions: Sequence[Run],
    seconds: float,
    *,
    fewest: int = FEWEST,
    progress: Callable[[float], None] | None = None,
) -> Round:
    """Run each function once a turn until the time is up, warm-up included.

    Args:
        functions: what to time, side by side.
        seconds: to spend; exceeded only for the fewest turns.
        fewest: turns to take in any case.
        progress: called after each turn with the share of the time that is spent.
    """
    begin = time.perf_counter()
    rng = np.random.default_rng()
    lot = rng.permutation(len(functions))  # of the warm-up too: who ran last before the first turn is ahead in it
    functions = [functions[which] for which in lot]
    collecting = gc.isenabled()
    gc.disable()
    try:
        _warm_up(functions, begin + seconds / 3)
        turns: list[list[float]] = []
        while len(turns) < fewest or (time.perf_counter() - begin < seconds and len(turns) < MOST):
            order = [int(which) for which in rng.permutation(len(functions))]
            for turn in (order, order[::-1]):
                took = {which: seconds_of(functions[which]) for which in turn}
                turns.append([took[which] for which in range(len(functions))])
            if progress:
                progress(min((time.perf_counter() - begin) / max(seconds, 1e-9), 1.0))
    finally:
        if collecting:
            gc.enable()
    return Round(tuple(np.array(turns).T[np.argsort(lot)]))


def _warm_up(functions: Sequence[Run], deadline: float) -> None:
    best = float("inf")
    while True:
        fastest = sum(min(seconds_of(function) for _ in range(WINDOW)) for function in functions)
        if fastest > STABLE * best or time.perf_counter() > deadline:
            return
        best = fastest


def seconds_of(function: Run) -> float:
    """How long one call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def rounds(openers: Sequence[Callable[[], Run]], seconds: float) -> Iterator[Round]:
    """Round after round, each with engines opened anew, until the time is up.

    Args:
        openers: each opens an engine and gives what runs it once.
        seconds: to spend on all rounds; exceeded only for the first.
    """
    begin = time.perf_counter()
    rng = np.random.default_rng()
    last, turn = begin, 0.0
    while last == begin or last - begin < seconds:
        opening = time.perf_counter()
        opened: dict[int, Run] = {int(which): openers[which]() for which in rng.permutation(len(openers))}
        length = max(ROUND, time.perf_counter() - opening, min(TURNS * turn, SHARE * seconds))
        one = interleave([opened[which] for which in range(len(openers))], length, fewest=2)
        del opened
        last, turn = time.perf_counter(), sum(float(np.median(times)) for times in one.times)
        yield one


def quiet(done: Sequence[Round]) -> list[Round]:
    """Of each round the turns that belong to the fastest third of all up to it; no round where none does.

    A turn counts by the time of all its engines together, so that none is favoured; what comes later has no say, so
    that an interval may still be looked at after every round.
    """
    pool, found = np.empty(0), []
    for one in done:
        cost = np.log(np.stack(one.times)).sum(0)
        pool = np.concatenate([pool, cost])
        fast = cost <= np.quantile(pool, QUIET)
        if fast.any():
            found.append(Round(tuple(times[fast] for times in one.times)))
    return found


def speedup(done: Sequence[Round]) -> Interval:
    """First over second: the middle ratio of turns, of rounds, with a bootstrap interval of 95 % over both."""
    rng = np.random.default_rng(SEED)
    ratios = [np.log(one.times[0] / one.times[1]) for one in done]
    medians = np.stack([np.median(r[rng.integers(len(r), size=(RESAMPLES, len(r)))], axis=1) for r in ratios])
    pick = rng.integers(len(done), size=(RESAMPLES, len(done)))
    low, high = np.percentile(np.median(medians[pick, np.arange(RESAMPLES)[:, None]], axis=1), (2.5, 97.5))
    value = np.median([np.median(r) for r in ratios])
    return Interval(value=float(np.exp(value)), low=float(np.exp(low)), high=float(np.exp(high)))


def verdict(ratio: Interval) -> Literal["faster", "slower", "no gain"]:
    """What may be said: ``no gain`` where the interval holds 1."""
    if ratio.low > 1:
        return "faster"
    return "slower" if ratio.high < 1 else "no gain"


def timing(times: Times) -> Timing:
    """Median, 95th percentile, and the quantiles between which a distribution can be drawn."""
    quantiles = [float(q) for q in np.percentile(times * 1e3, np.arange(0, 101, 5))]
    return Timing(median_ms=quantiles[10], p95_ms=quantiles[19], runs=len(times), quantiles_ms=quantiles)


def latency(done: Sequence[Round], engine: str, batch: str) -> Latency:
    """What rounds of a dense and an optimized engine say."""
    ratio = speedup(done)
    dense, optimized = (timing(np.concatenate([one.times[which] for one in done])) for which in (0, 1))
    return Latency(engine=engine, batch=batch, dense=dense, optimized=optimized, speedup=ratio, verdict=verdict(ratio))


def compare(
    dense: Session,
    optimized: Session,
    inputs: Mapping[str, NDArray[Any]],
    *,
    budget: float = 10.0,
    batch: str | None = None,
    progress: Callable[[float], None] | None = None,
) -> Latency:
    """Time two engines that are open, in one round.

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
    decode = optimized.engine.steps
    jobs = [job(session, inputs, decode) for session in (dense, optimized)]
    once = interleave(jobs, budget, progress=progress)
    name = batch if batch is not None else str(rows(inputs))
    return latency([once], optimized.name, f"{name}, {_work(optimized.engine)}" if decode else name)


def rows(inputs: Mapping[str, NDArray[Any]]) -> int:
    """The first size of the first input, which is how many samples a call does."""
    first = next(iter(inputs.values()))
    return int(first.shape[0]) if first.ndim else 1


NEW_TOKENS = 16
"""With which a text is continued, where that is the work of an engine."""


def _work(engine: Engine) -> str:
    return f"{NEW_TOKENS} tokens" if engine.stage == STEP else f"{similarity.STEPS} steps"


def job(session: Session, inputs: Mapping[str, NDArray[Any]], decode: bool) -> Run:
    """What is timed: one call, or ``decode``, all steps of a sample, or some tokens behind each text; without a cache
    each computes it anew.
    """
    if not decode:
        return lambda: session.run(**inputs)
    if isinstance(session, Denoiser):
        noise = drawn(inputs[session.roles.sample].shape, 0)
        conditions: dict[str, Any] = {name: inputs[name] for name in session.roles.conditions}
        return lambda: session.denoise(noise, steps=similarity.STEPS, conditions=conditions)
    if isinstance(session, Generator):
        return lambda: session.generate(inputs[session.ids.name], max_new_tokens=NEW_TOKENS)
    return lambda: _recomputed(session, inputs)


def _recomputed(session: Session, inputs: Mapping[str, NDArray[Any]]) -> None:
    first = session.outputs[0].name
    arrays = dict(inputs)
    for _ in range(NEW_TOKENS):
        chosen = session.run(**arrays)[first][:, -1].argmax(-1)[:, None]
        for name, array in arrays.items():
            after = array[:, -1:]
            new = after if (after == 1).all() else after + 1 if (np.diff(array[0]) == 1).all() else chosen
            arrays[name] = np.concatenate([array, new.astype(array.dtype)], 1)


EXAMPLES, FURTHER, NODES = 4, 48, 16
"""Texts and tokens of each on which drafters are counted, and the size of their trees."""


def drafts(session: Session, inputs: Mapping[str, NDArray[Any]]) -> list[Accepted]:
    """What drafters bring on the example texts; nothing where the engine verifies none."""
    if not isinstance(session, Generator) or not session.verifies:
        return []
    ids = inputs[session.ids.name]
    fixed = isinstance(session.ids.shape[0], int)
    further = min(FURTHER, session.context - ids.shape[1])
    return accepted(session, ids if fixed else ids[:EXAMPLES], tokens=further, nodes=NODES)


def opener(
    folder: Path,
    manifest: Manifest,
    engine: str,
    inputs: Mapping[str, NDArray[Any]],
    threads: int | None,
    decode: bool = False,
) -> Callable[[], Run]:
    """Opens an engine of an artifact whose manifest was read, and gives what runs it on ``inputs``; see ``job``."""
    return lambda: job(open_session(folder, manifest, engine, threads), inputs, decode)


@contextlib.contextmanager
def pinned(threads: int | None) -> Iterator[None]:
    """Keep this process, and the threads that it starts meanwhile, on as many cores as one call uses."""
    if threads is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pairs(manifest: Manifest) -> dict[str, str]:
    """The serving engines of an artifact that have a dense twin, and the twin of each."""
    found = {}
    for name, engine in manifest.engines.items():
        if not engine.dense and engine.twin in manifest.engines:
            found[name] = engine.twin
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
    # machine code is run where its engine is named, and nowhere else
    named = manifest.engines[engine].backend if engine is not None else None
    asked = [engine] if engine is not None else list(twins)
    unrun = choice.unrun(manifest, [which for name in asked for which in (name, twins[name])], named)
    without = {row.engine for row in unrun}
    chosen = [name for name in asked if not {name, twins[name]} & without]
    if not chosen:
        raise choice.none_here(unrun)
    results = []
    with pinned(threads):
        for name in chosen:
            arrays = dict(inputs) if inputs is not None else recorded_inputs(folder, manifest, name, sizes or {})
            decode = manifest.engines[name].steps
            openers = [opener(folder, manifest, which, arrays, threads, decode) for which in (twins[name], name)]
            begin, done = time.perf_counter(), []
            for one in rounds(openers, budget):
                done.append(one)
                if progress:
                    progress(name, min((time.perf_counter() - begin) / max(budget, 1e-9), 1.0))
            at = label(sizes) or str(rows(arrays))
            results.append(latency(done, name, f"{at}, {_work(manifest.engines[name])}" if decode else at))
    return BenchResult(artifact=str(folder), latency=results, unrun=unrun)


def label(sizes: Mapping[str, int] | None) -> str:
    """``8`` for one size, ``batch=8, tokens=128`` for several; empty for those of the example."""
    if not sizes:
        return ""
    return str(*sizes.values()) if len(sizes) == 1 else ", ".join(f"{name}={size}" for name, size in sizes.items())


def first_size(manifest: Manifest, engine: str, batch: int) -> dict[str, int]:
    """The size by name that makes the first dimension of the inputs ``batch``; empty where it is fixed to that.

    Raises:
        OptpassError: no such engine, or its first dimension is fixed to another size.
    """
    first = manifest.engine(engine).inputs[0].shape[0]
    if isinstance(first, int):
        if first == batch:
            return {}
        raise OptpassError(
            "batch", f"the engine is built for batch {first}", "optimize with --dynamic for its first dimension"
        )
    return {first: batch}


def recorded_inputs(folder: Path, manifest: Manifest, engine: str, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """The example inputs recorded for an engine, tiled or cropped to ``sizes``."""
    if manifest.engines[engine].steps:
        engine = manifest.engines[engine].twin
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
