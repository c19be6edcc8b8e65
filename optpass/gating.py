"""The gate: an artifact held against a budget, with a verdict for each limit that noise cannot turn round.

A limit on latency is measured round by round until its interval lies on one side of it, or the time is up and the
verdict is *inconclusive*. The intervals hold for all looks together, and all limits of a budget share one small
probability of a wrong verdict.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from optpass import baseline as baselines
from optpass import budget as budgets
from optpass import files, measure, metrics, sequential
from optpass.baseline import Baseline, Stored
from optpass.budget import Budget
from optpass.errors import OptpassError
from optpass.evaluation import Evaluation
from optpass.measure import Round
from optpass.results import Metric, Result
from optpass.runtime import check as checks
from optpass.runtime import manifest as manifests
from optpass.runtime.choice import choose
from optpass.runtime.manifest import Hardware, Manifest
from optpass.runtime.peak import peak_mib
from optpass.runtime.session import Session, open_session

Verdict = Literal["pass", "fail", "inconclusive"]
Progress = Callable[[str, int, int], None]

ALPHA = 0.005
"""Probability that any limit on time of one gate that is held is called broken; and that one broken is called held."""

NOISE_ROUNDS = 5
PROCESSES = 3
"""In each of which the peak of memory is measured."""


class Check(Result):
    """One limit and what was measured.

    Attributes:
        name: the key in the budget, such as ``latency.p50_ms``.
        at: sizes or data it was measured at; empty for the example's.
        unit: of limit and value; ``x`` for a ratio.
        least: whether the limit is a minimum.
        value, low, high: the figure and where it lies; an end is None where too little was measured to tell.
        said: all of it in a sentence.
    """

    name: str
    at: str
    unit: str
    limit: float
    least: bool
    value: float
    low: float | None
    high: float | None
    verdict: Verdict
    said: str


class Noise(Result):
    """What the machine makes of one engine against itself, before it is asked about two.

    Attributes:
        percent: by which the ratio in one round misses 1, in 95 % of rounds, as far as a few tell.
    """

    rounds: int
    percent: float


class GateResult(Result):
    """The outcome of a gate; ``ok`` only where every limit is shown to be held."""

    ok: bool
    verdict: Verdict
    artifact: str
    source: str
    engine: str
    budget: str
    checks: list[Check]
    noise: Noise | None
    hardware: Hardware
    seconds: float
    hint: str = ""


def gate(
    path: str | os.PathLike[str],
    budget: Budget | Mapping[str, Any] | str | os.PathLike[str],
    *,
    engine: str | None = None,
    baseline: str | os.PathLike[str] | None = None,
    save: str | os.PathLike[str] | None = None,
    blame: bool = False,
    progress: Progress | None = None,
) -> GateResult:
    """Hold an artifact against a budget.

    Args:
        path: the artifact.
        budget: a ``budget.toml``, its tables, or a ``Budget``.
        engine: engine of the artifact, in place of the one that the budget names.
        baseline: artifact or file of figures, in place of the one that the budget names.
        save: where to write the figures as a baseline for later gates on this machine; limits against a stored
            baseline are then measured and not judged.
        blame: where quality or speed broke its limit, apply the passes again one by one and name the one to blame; the
            source of the artifact is captured again for that, which takes torch.
        progress: called with what is done, the share done in per cent, and 100.

    Raises:
        OptpassError: the budget makes no sense, or not for this artifact and machine.
    """
    begin = time.perf_counter()
    name = str(budget) if isinstance(budget, str | os.PathLike) else ""
    told = budgets.load_budget(name) if name else budget
    asked = told if isinstance(told, Budget) else budgets.parse(dict(told))  # type: ignore[arg-type]
    line = _Gate.of(Path(path), asked, engine, baseline, saving=save is not None, progress=progress)
    found = line.run()
    if save is not None:
        files.write(Path(save), line.stored().model_dump_json(indent=2) + "\n")
    verdict: Verdict = "pass"
    if any(one.verdict == "fail" for one in found):
        verdict = "fail"
    elif any(one.verdict == "inconclusive" for one in found):
        verdict = "inconclusive"
    return GateResult(
        ok=verdict == "pass",
        verdict=verdict,
        artifact=str(path),
        source=line.manifest.source,
        engine=line.engine,
        budget=name,
        checks=found,
        noise=line.noise,
        hardware=manifests.hardware(),
        seconds=round(time.perf_counter() - begin, 3),
        hint=_hint(found, line, name, asked, blame),
    )


def _hint(found: Sequence[Check], line: _Gate, name: str, budget: Budget, blame: bool) -> str:
    """Which step is to blame, or how to find out."""
    broken = any(one.verdict == "fail" and one.name.split(".")[0] in ("quality", "speedup") for one in found)
    if not broken or not line.manifest.passes:
        return ""
    if not blame:
        return f"optpass bisect {line.folder}{f' --budget {name}' if name else ''} names the pass and the site"
    from optpass import api

    asked = budget.model_copy(update={"engine": line.engine})
    result = api.bisect(line.folder, budget=asked, progress=lambda what, done, total: line._tell(what, 95))
    if not result.blame:
        return "no pass is to blame by itself"
    return "; ".join(
        f"to blame: {result.steps[b.step - 1].name} at {result.steps[b.step - 1].site}, {b.why}" for b in result.blame
    )


@dataclass(frozen=True)
class _Timed:
    """A limit on time.

    Attributes:
        values: the log of the figure in each round.
        over: what it is compared with, for the reader.
        spread: of a stored figure, in logs: what its own interval adds below and above.
    """

    name: str
    unit: str
    limit: float
    least: bool
    values: Callable[[Sequence[Round]], list[float]]
    over: str = ""
    spread: tuple[float, float] = (0.0, 0.0)


@dataclass
class _Contest:
    """Engines that are timed in turn at some sizes, and all limits that this decides.

    Limits in milliseconds are decided by the engine alone: after another one it finds colder caches than in service.
    """

    other: str
    sizes: dict[str, int]
    limits: list[_Timed] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)


@dataclass
class _Gate:
    folder: Path
    manifest: Manifest
    budget: Budget
    engine: str
    baseline: Baseline | None
    saving: bool
    progress: Progress | None
    contests: list[_Contest] = field(default_factory=list)
    noise: Noise | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    figures: list[Metric] = field(default_factory=list)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        folder: Path,
        budget: Budget,
        engine: str | None,
        baseline: str | os.PathLike[str] | None,
        *,
        saving: bool,
        progress: Progress | None,
    ) -> _Gate:
        """Everything that can be wrong with the question is found here, before the measuring."""
        manifest = manifests.read(folder)
        name = engine or budget.engine or choose(manifest).engine
        manifest.engine(name)
        cores = manifests.cores()
        if budget.threads is not None and budget.threads > cores:
            what = f"the budget is for {budget.threads} threads, this process may use {cores} cores"
            raise OptpassError("threads", what, "run the gate on a machine that has them, or lower threads")
        wanted = "baseline" in [*(table.over for table in budget.speedup), *(table.over for table in budget.quality)]
        found = None
        if wanted or baseline is not None:
            found = baselines.resolve(baseline, budget.baseline, manifest, name, budget.threads or cores, saving)
        new = cls(folder, manifest, budget, name, found, saving, progress)
        new._check_quality()
        new._place()
        return new

    def run(self) -> list[Check]:
        budget = self.budget
        found = [self._size(table) for table in budget.size]
        for table in budget.memory:
            self._tell("measure the peak of memory", 0)
            found.append(self._memory(table))
        with measure.pinned(budget.threads):
            for number, contest in enumerate(self.contests):
                found += self._decide(contest, number)
        for quality, evaluation in zip(budget.quality, self.evaluations, strict=True):
            self._tell("take the metric", 90)
            found += self._quality(quality, evaluation)
        order = list(Budget.model_fields)
        return sorted(found, key=lambda one: order.index(one.name.split(".")[0]))

    def _tell(self, what: str, percent: float) -> None:
        if self.progress:
            self.progress(what, round(percent), 100)

    # Size and memory

    def _size(self, table: budgets.Size) -> Check:
        mib = self.manifest.engine(self.engine).mib(self.folder)
        return _judged("size.mib", "", "MiB", table.mib, False, (mib, mib, mib))

    def _memory(self, table: budgets.Memory) -> Check:
        peaks = self._peaks
        return _judged("memory.peak_mib", "", "MiB", table.peak_mib, False, (peaks[0], peaks[1], peaks[-1]))

    @cached_property
    def _peaks(self) -> list[float]:
        return sorted(peak_mib(self.folder, self.engine, self.budget.threads) for _ in range(PROCESSES))

    # Time

    def _place(self) -> None:
        """Give each limit on time to the contest that decides it."""
        for latency in self.budget.latency:
            contest = self._contest("", latency)
            for percentile, limit in ((50, latency.p50_ms), (95, latency.p95_ms)):
                if limit is not None:
                    contest.limits.append(
                        _Timed(f"latency.p{percentile}_ms", "ms", limit, False, _milliseconds(percentile))
                    )
        for throughput in self.budget.throughput:
            contest = self._contest("", throughput)
            samples = measure.rows(self._inputs(contest.sizes))
            values = _rate(samples)
            contest.limits.append(_Timed("throughput.at_least", "samples/s", throughput.at_least, True, values))
        for speedup in self.budget.speedup:
            self._place_speedup(speedup)

    def _place_speedup(self, table: budgets.Speedup) -> None:
        percentile = 95 if table.of == "p95" else 50
        over = f"over {table.over}" + ("" if table.of == "quiet" else f", {table.of}")
        if table.over == "baseline" and not isinstance(self.baseline, baselines.Artifact):
            contest = self._contest("", table)
            if self.baseline is not None:
                base = self.baseline.latency_at(_at(contest.sizes), percentile)
                spread = (math.log(base.low / base.value), math.log(base.high / base.value))
                values = _over_stored(base.value, percentile)
                contest.limits.append(_Timed("speedup.at_least", "x", table.at_least, True, values, over, spread))
            return
        other = "dense" if table.over == "dense" else "baseline"
        if other == "dense":
            self._dense()
        contest = self._contest(other, table)
        contest.limits.append(_Timed("speedup.at_least", "x", table.at_least, True, _ratio(table.of), over))

    def _contest(self, other: str, table: budgets.Sized) -> _Contest:
        sizes = dict(table.sizes)
        if table.batch is not None:
            sizes |= measure.first_size(self.manifest, self.engine, table.batch)
        self._inputs(sizes)
        for contest in self.contests:
            if (contest.other, contest.sizes) == (other, sizes):
                return contest
        self.contests.append(_Contest(other, sizes))
        return self.contests[-1]

    def _inputs(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The same arrays for all engines: where an array lies in memory is no lot that is drawn again."""
        at = _at(sizes)
        if at not in self.inputs:
            self.inputs[at] = measure.recorded_inputs(self.folder, self.manifest, self.engine, sizes)
        return self.inputs[at]

    def _opener(self, which: str, sizes: Mapping[str, int]) -> Callable[[], measure.Run]:
        folder, manifest, engine = self.folder, self.manifest, self.engine
        if which == "dense":
            engine = self._dense()
        elif which == "baseline":
            assert isinstance(self.baseline, baselines.Artifact)
            folder, manifest = self.baseline.folder, self.baseline.manifest
        decode = self.manifest.engines[self.engine].steps
        return measure.opener(folder, manifest, engine, self._inputs(sizes), self.budget.threads, decode)

    def _decide(self, contest: _Contest, number: int) -> list[Check]:
        own = self._opener("", contest.sizes)
        openers = [self._opener(contest.other, contest.sizes), own] if contest.other else [own]
        if self.noise is None:
            self.noise = self._machine(openers[0])
        alpha = ALPHA / sum(len(one.limits) for one in self.contests) if contest.limits else ALPHA
        at = _at(contest.sizes)
        found: list[Check] = []
        begin = time.perf_counter()
        for one in measure.rounds(openers, self.budget.seconds):
            contest.rounds.append(one)
            found = [_timed(limit, contest.rounds, alpha, at) for limit in contest.limits]
            open_ones = sum(one.verdict == "inconclusive" for one in found)
            share = (number + (time.perf_counter() - begin) / self.budget.seconds) / len(self.contests)
            self._tell(f"time {self.engine}, {open_ones} limits open", 5 + 85 * min(share, 1))
            if not open_ones and (not self.saving or len(contest.rounds) >= baselines.ROUNDS):
                break
        return found

    def _machine(self, opener: Callable[[], measure.Run]) -> Noise:
        self._tell("time an engine against itself", 0)
        ratios: list[float] = []
        for one in measure.rounds([opener, opener], self.budget.seconds):
            ratios.append(one.log_ratio())
            if len(ratios) == NOISE_ROUNDS:
                break
        deviation = float(np.sqrt(np.mean(np.square(ratios))))
        return Noise(rounds=len(ratios), percent=round(100 * 1.96 * deviation, 2))

    # Quality

    def _check_quality(self) -> None:
        for table in self.budget.quality:
            self.evaluations.append(self._evaluation(table))
            self.evaluations[-1].check(info.name for info in self.manifest.engines[self.engine].inputs)
            if table.over == "dense":
                self._dense()

    def _dense(self) -> str:
        """The twin of the engine that the passes left alone."""
        twins = measure.pairs(self.manifest)
        if self.engine not in twins:
            what = f"{self.folder} holds no dense engine beside {self.engine} to be compared with"
            raise OptpassError("no-dense", what, 'optimize again, or use over = "baseline"')
        return twins[self.engine]

    def _evaluation(self, table: budgets.Quality) -> Evaluation:
        agreement = table.metric in metrics.AGREEMENT
        if agreement:
            return Evaluation(metrics.load_data(table.data) if table.data else None, None)
        try:
            found = Evaluation.of(self.manifest.source, table.data, table.metric, table.samples)
        except OptpassError as error:
            if table.data is None:
                raise OptpassError("data", error.refusal.what, 'add data = "FILE.npz" to [quality]') from error
            raise
        if found.data is None or found.metric is None:
            what = "the budget limits quality, but there is no data with a metric"
            raise OptpassError("data", what, f'add data, or metric = "{metrics.AGREEMENT[0]}", to [quality]')
        return found

    def _quality(self, table: budgets.Quality, evaluation: Evaluation) -> list[Check]:
        own = open_session(self.folder, self.manifest, self.engine, self.budget.threads)
        stepping = self.manifest.engines[self.engine].steps
        reference = checks.read(self.folder, self.manifest, self._dense() if stepping else self.engine)
        found = evaluation.run(lambda: self._other(table, own), lambda: own, reference)
        measured = next((one for one in found if table.metric in (None, one.name)), None)
        if measured is None:
            known = ", ".join(one.name for one in found)
            raise OptpassError("data", f"{table.metric} says nothing of this output", f"use one of {known}")
        stored = self.baseline if table.over == "baseline" and isinstance(self.baseline, Stored) else None
        self.figures.append(measured)
        said = []
        scale, lower = metrics.scale(measured.name), metrics.lower_is_better(measured.name)
        unit = "points" if scale == 100 else measured.name
        at = f"{measured.name}, {measured.samples} samples"
        if table.max_drop is not None and not (self.saving and table.over == "baseline" and stored is None):
            loss = metrics.loss(stored.against(measured) if stored else measured)
            figure = (loss.low, loss.value, loss.high) if table.decide == "interval" else (loss.value,) * 3
            shown = (loss.low, loss.value, loss.high)
            where = at if table.over == "dense" else f"over baseline, {at}"
            said.append(_judged("quality.max_drop", where, unit, table.max_drop, False, figure, shown))
        if table.at_least is not None:
            one = measured.optimized
            shown = (scale * one.low, scale * one.value, scale * one.high)
            figure = shown if table.decide == "interval" else (shown[1],) * 3
            said.append(_judged("quality.at_least", at, unit, table.at_least, not lower, figure, shown))
        return said

    def _other(self, table: budgets.Quality, own: Session) -> Session:
        if table.over == "dense":
            return open_session(self.folder, self.manifest, self._dense(), self.budget.threads)
        if isinstance(self.baseline, baselines.Artifact):
            return open_session(self.baseline.folder, self.baseline.manifest, self.engine, self.budget.threads)
        return own

    def stored(self) -> Stored:
        """The figures, as a baseline."""
        return baselines.store(
            self.manifest,
            self.engine,
            self.budget.threads or manifests.cores(),
            # where both are there, the rounds of the engine alone
            {_at(c.sizes): c.rounds for c in sorted(self.contests, key=lambda c: not c.other)},
            self.figures,
        )


def _at(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sorted(sizes.items()))


def _milliseconds(percentile: float) -> Callable[[Sequence[Round]], list[float]]:
    return lambda done: [one.log_time(percentile) + math.log(1e3) for one in done]


def _rate(samples: int) -> Callable[[Sequence[Round]], list[float]]:
    return lambda done: [math.log(samples) - one.log_time(50) for one in done]


def _ratio(of: str) -> Callable[[Sequence[Round]], list[float]]:
    if of == "quiet":
        return lambda done: [one.log_ratio() for one in measure.quiet(done)]
    return lambda done: [one.log_ratio(int(of[1:])) for one in done]


def _over_stored(milliseconds: float, percentile: float) -> Callable[[Sequence[Round]], list[float]]:
    return lambda done: [math.log(milliseconds / 1e3) - one.log_time(percentile) for one in done]


def _timed(limit: _Timed, done: Sequence[Round], alpha: float, at: str) -> Check:
    values = np.array(limit.values(done))
    low, high = sequential.interval(values, alpha)
    figure = low + limit.spread[0], float(np.median(values)), high + limit.spread[1]
    found = tuple(math.exp(x) if abs(x) < math.inf else x for x in (figure[0], figure[1], figure[2]))
    low_end = 0.0 if found[0] == -math.inf else found[0]
    where = ", ".join(part for part in (limit.over, at) if part)
    return _judged(limit.name, where, limit.unit, limit.limit, limit.least, (low_end, found[1], found[2]))


def _judged(
    name: str,
    at: str,
    unit: str,
    limit: float,
    least: bool,
    figure: tuple[float, float, float],
    shown: tuple[float, float, float] | None = None,
) -> Check:
    """Held or broken where all of the figure, low to high, lies on one side of the limit; equal to it is held."""
    low, value, high = figure
    if (low >= limit) if least else (high <= limit):
        verdict: Verdict = "pass"
    elif (high < limit) if least else (low > limit):
        verdict = "fail"
    else:
        verdict = "inconclusive"
    low, value, high = shown or figure
    ends = low if low > 0 or high < math.inf else None, high if high < math.inf else None
    new = Check(
        name=name,
        at=at,
        unit=unit,
        limit=limit,
        least=least,
        value=value,
        low=ends[0],
        high=ends[1],
        verdict=verdict,
        said="",
    )
    return new.model_copy(update={"said": sentence(new)})


def sentence(one: Check) -> str:
    """``latency.p50_ms at batch=8 is 9.12 ms [9.05, 9.20], over 8.00 by 14 %``."""
    at = f" at {one.at}" if one.at else ""
    figure = f"{one.name}{at} is {number(one.value)} {one.unit}{interval(one)}"
    bound = f"{'at least' if one.least else 'at most'} {number(one.limit)}"
    if one.verdict == "pass":
        return f"{figure}, within {bound}"
    if one.verdict == "inconclusive":
        return f"{figure}: too wide to say whether it keeps to {bound}"
    beyond = abs(one.value - one.limit)
    share = f" ({100 * beyond / abs(one.limit):.1f} %)" if one.limit else ""
    return f"{figure}: breaks {bound} by {number(beyond)} {one.unit}{share}"


def interval(one: Check) -> str:
    """`` [9.05, 9.20]``, empty where the figure is exact, ``?`` for an end that is not known."""
    if one.low == one.value == one.high:
        return ""
    return f" [{', '.join('?' if end is None else number(end) for end in (one.low, one.high))}]"


def number(value: float) -> str:
    """Three digits or more, never an exponent for what people compare."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}"
