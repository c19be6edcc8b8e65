"""What does it bring to compute only some steps of a denoiser, and what does it cost, beside taking fewer steps?

Samples of fashion-dit for all classes, and rollouts of fashion-world from two given frames. Every arm makes the same
samples from the same noise, one run of each in turn in one process; what is compared are the times of one turn. Quality
is taken on these very samples: how near they are to those of the dense engine with all steps, and what they are worth
by themselves. Thresholds are chosen on other runs, such that policies compute about the same numbers of steps.

The peer, cache-dit, runs on the same module in torch. Then the steps that it chose to compute, run by run, are computed
by a split artifact of ours, whose region leaves out the same first blocks: its decisions on our engine.

    python -m venv peers && peers/bin/pip install torch==2.13.0 && peers/bin/pip install -r benchmarks/denoise_peers.txt
    python -m benchmarks.denoise --peers peers/bin/python
    python -m benchmarks.denoise --peers peers/bin/python --backend openvino --models fashion-world
    python -m benchmarks.denoise --quick --out out/denoise          # a look, without figures that mean anything
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray

import optpass
from benchmarks import report
from benchmarks.denoise_cachedit import COMPILED, EAGER, SETTINGS, packed, unpacked, walk
from benchmarks.denoise_runs import FRAMES, Course, Images, Worlds, near, shown
from optpass import grammar, manager, measure, similarity
from optpass.capture import capture
from optpass.errors import OptpassError
from optpass.export import artifact
from optpass.program import Program
from optpass.runtime import manifest as manifests
from optpass.runtime.denoise import Denoiser
from optpass.runtime.features import COUNTED, COUNTERS, NEW, ROOM, STATE, STREAK, THRESHOLD, WARMUP

Array = NDArray[Any]
Conditions = Mapping[str, Any]
Draw = Callable[[int, Array, Conditions], tuple[Array, list[int]]]
"""From noise and conditions to samples, and the steps that were computed; the number of the run comes first."""

STEPS = similarity.STEPS

DENSE, FEWER, REPLAYED = "dense", "fewer steps", "cache-dit's steps"
FEWER_STEPS = (40, 25, 16, 12, 8, 5)
TARGETS = (25, 16, 12, 8)
"""Steps that each policy is set to compute, or nearly so many."""

POLICIES = {
    "interval": "policy=interval",
    "taylorseer 1": "policy=taylorseer,order=1",
    "taylorseer 2": "policy=taylorseer,order=2",
    "taylorseer 3": "policy=taylorseer,order=3",
    "teacache": "policy=teacache",
    "teacache, order 2": "policy=teacache,order=2",
    "first-block": "policy=first-block",
    "worldcache": "policy=worldcache",
    "worldcache 0.2, 0.8": "policy=worldcache,stable=0.2,chaotic=0.8",
    "worldcache, blocks": "policy=worldcache,region=blocks",
    "worldcache, branch": "policy=worldcache,form=branch",
}
GROUPS = {"worldcache, groups": "policy=worldcache,groups=[image:0..64,depth:64..128]"}
"""Where image and depth are tokens of their own."""


# The arms


@dataclass
class Arm:
    """Makes run after run of a course, and keeps what came of them."""

    group: str
    name: str
    course: Course
    draw: Draw
    knobs: dict[str, Any] = field(default_factory=dict)
    torch: bool = False
    made: list[Array] = field(default_factory=list)
    computed: list[list[int]] = field(default_factory=list)

    def __call__(self) -> None:
        run = len(self.made)
        sample, computed = self.draw(run, self.course.noise(run), self.course.conditions(run, self.made))
        self.made.append(sample)
        self.computed.append(computed)


def ours(model: Denoiser, course: Course, steps: int = STEPS, sampler: str = "", **knobs: Any) -> Draw:
    """An engine and its driver, as users have them."""

    def draw(run: int, noise: Array, conditions: Conditions) -> tuple[Array, list[int]]:
        sample = model.denoise(noise, steps=steps, sampler=sampler or None, knobs=knobs, **course.options, **conditions)
        return sample, model.last.computed

    return draw


def controls(dense: Denoiser, course: Course, counts: Sequence[int]) -> Iterator[Arm]:
    """The dense engine with all steps, then with fewer of them."""
    yield Arm("", DENSE, course, ours(dense, course))
    for steps in counts:
        yield Arm(FEWER, f"{FEWER}, {steps}", course, ours(dense, course, steps))
    for steps in counts[1:] or counts:
        for name, sampler in course.others(steps).items():
            group = f"{FEWER}, {name}"
            yield Arm(group, f"{group}, {steps}", course, ours(dense, course, steps, sampler))


def reusing(name: str, model: Denoiser, course: Course, targets: Sequence[int]) -> Iterator[Arm]:
    """A policy over the range of its knob."""
    choose = Choice(model, course)
    seen: list[dict[str, Any]] = []
    for target in targets:
        knobs = choose(target)
        if knobs in seen:
            continue
        seen.append(knobs)
        said = {knob: value for knob, value in knobs.items() if knob == THRESHOLD or (knob == STREAK and value < STEPS)}
        told = ", ".join(f"{knob} {value:.3g}" for knob, value in said.items())
        yield Arm(name, f"{name}, {told}", course, ours(model, course, **knobs), knobs)


class Choice:
    """Knobs of an engine by the number of steps that it shall compute, found on runs that are in no table."""

    WIDEST = (1e-5, 1e3)
    TRIES = 9

    def __init__(self, model: Denoiser, course: Course) -> None:
        self.model, self.course, self.trials = model, course, course.apart()
        self.known: dict[tuple[float, int, int], float] = {}

    def __call__(self, target: int) -> dict[str, Any]:
        """The warm-up is a third of the steps at most; a signal decides where the engine has one."""
        initial = self.model.engine.initial
        warmup = min(int(initial[WARMUP]), max(3, target // 3))
        if THRESHOLD not in initial:
            streak = min(range(1, STEPS), key=lambda n: abs(uniform(warmup, n) - target))
            return {WARMUP: warmup, STREAK: streak}
        # room for the signal: waiting alone computes three quarters of the steps at most
        own = int(initial[STREAK])
        streak = next((n for n in range(own, STEPS) if uniform(warmup, n) <= 0.75 * target), max(own, STEPS))
        return {WARMUP: warmup, STREAK: streak, THRESHOLD: self._threshold(target, warmup, streak)}

    def _threshold(self, target: int, warmup: int, streak: int) -> float:
        low, high = self.WIDEST
        tried: dict[float, float] = {}
        for _ in range(self.TRIES):
            value = float(np.sqrt(low * high))
            tried[value] = count = self._count(value, warmup, streak)
            if abs(count - target) < 0.5:
                break
            low, high = (value, high) if count > target else (low, value)
        return min(tried, key=lambda value: abs(tried[value] - target))

    def _count(self, threshold: float, warmup: int, streak: int) -> float:
        key = threshold, warmup, streak
        if key not in self.known:
            draw = ours(self.model, self.course, threshold=threshold, warmup=warmup, streak=streak)
            self.known[key] = float(np.mean([len(draw(0, *trial)[1]) for trial in self.trials]))
        return self.known[key]


def uniform(warmup: int, streak: int) -> int:
    """Steps that are computed where nothing but their number decides."""
    last = warmup - 1
    count = warmup
    for step in range(warmup, STEPS):
        if step == STEPS - 1 or step - last > streak:
            last, count = step, count + 1
    return count


class Stepper:
    """The engines of an artifact, called by hand: whether a step is computed is said from outside."""

    def __init__(self, model: Denoiser, course: Course) -> None:
        self.model, self.course = model, course
        self.own = [info for info in model.engine.inputs if not info.name.startswith(STATE)]
        self.state: dict[str, Array] = {}

    def begin(self, batch: int) -> None:
        """A state before the first step; the last step is never reached, nor any threshold."""
        self.state = self.model.started(batch, 10**6, {**self.model.engine.initial, THRESHOLD: 1e30})

    def given(self, sample: Array, timestep: float, conditions: Conditions) -> list[Array]:
        """The inputs of the model in order."""
        roles = self.model.roles
        arrays = {roles.sample: sample, **conditions}
        times = {i.name: np.full([len(sample)] * len(i.shape), timestep, i.dtype) for i in self.own}
        return [arrays.get(info.name, times[info.name]) for info in self.own]

    def call(self, given: Sequence[Array], computed: bool, keep: bool = True) -> Array:
        """One step; its state is kept, or that from before it."""
        model, state = self.model, dict(self.state)
        engine, opened = model.engine, model.opened
        if model.full is not None and model.computing is not None:
            engine, opened = (model.computing, model.full) if computed else (engine, opened)
        elif state:
            counters = state[STATE + COUNTED] = state[STATE + COUNTED].copy()
            counters[COUNTERS.index(ROOM)] = 0 if computed else 1
        results = dict(
            zip((i.name for i in engine.outputs), model.call(opened, [*given, *state.values()]), strict=True)
        )
        if keep:
            for name, array in results.items():
                if name.startswith(NEW):
                    self.state[STATE + name.removeprefix(NEW)] = array
        return results[engine.outputs[0].name]

    def replay(self, schedules: Sequence[Sequence[int]]) -> Draw:
        """Runs whose computed steps are given, those of run after run."""
        course = self.course

        def draw(run: int, noise: Array, conditions: Conditions) -> tuple[Array, list[int]]:
            computed = set(schedules[run % len(schedules)])
            self.begin(len(noise) * (1 if course.guidance == 1 else 2))

            def predict(index: int, sample: Array, timestep: float, under: Conditions) -> Array:
                return self.call(self.given(sample, timestep, under), index in computed)

            return walk(predict, noise, course.sampler, STEPS, conditions, **course.options), sorted(computed)

        return draw


# The peer


class CacheDit:
    """The peer in its own environment; see ``denoise_cachedit``."""

    def __init__(self, python: str, course: Course, folder: Path, threads: int, compiled: bool) -> None:
        weights = folder / f"{course.slug}.pt"
        torch.save(course.entry.factory()[0].state_dict(), weights)
        script = Path(__file__).parent / "denoise_cachedit.py"
        self.process = subprocess.Popen(
            [python, str(script), "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        options = dict(course.options)
        if "unconditional" in options:
            options["unconditional"] = {name: packed(array) for name, array in options["unconditional"].items()}
        begun = self._asked(
            model=course.name, weights=str(weights), threads=threads, steps=STEPS, options=options, compile=compiled
        )
        self.sampler, self.versions, self.names = course.sampler, begun["ready"], begun["arms"]

    def _asked(self, **job: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the peer has ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def draw(self, arm: str) -> Draw:
        """A setting of it."""

        def draw(run: int, noise: Array, conditions: Conditions) -> tuple[Array, list[int]]:
            under = {name: packed(array) for name, array in conditions.items()}
            answer = self._asked(arm=arm, noise=packed(noise), conditions=under, sampler=self.sampler)
            return unpacked(answer["sample"]), answer["computed"]

        return draw

    def arms(self, course: Course, settings: Sequence[str]) -> Iterator[Arm]:
        """The plain module, then its settings."""
        for name in self.names:
            if name in SETTINGS and name not in settings:
                continue
            group = "" if name in (EAGER, COMPILED) else "cache-dit, TaylorSeer" if "+TS" in name else "cache-dit"
            told = f"cache-dit {name}" if group else f"torch, {name}"
            yield Arm(group, told, course, self.draw(name), torch=True)

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def replayed_as(setting: Mapping[str, Any]) -> str:
    """The artifact of ours that computes what the peer does under a setting."""
    return f"policy=taylorseer,basis=taylor,form=split,order={setting.get('order', 0)},region={setting['first']}:"


# Building


def built(
    course: Course, backend: str, texts: Mapping[str, str], folder: Path, threads: int, notes: list[str]
) -> dict[str, Denoiser]:
    """The dense engine and one artifact for each policy, verified and held against eager execution, and opened."""
    source = (course.entry.factory()[0], (), {n: torch.from_numpy(array) for n, array in course.example.items()})
    program = capture(source, dynamic=course.dynamic())
    found: dict[str, Denoiser] = {}
    for name, text in {DENSE: "", **texts}.items():
        report.say(f"{course.title}, {backend}: building {name}")
        out = folder / f"{course.slug}-{backend.replace(':', '-')}-{len(list(folder.iterdir()))}"
        try:
            found[name], told = _built(course, program, text, backend, out, threads)
        except OptpassError as error:
            if name == DENSE:
                raise
            told = [str(error)]
        for line in told:
            notes.append(f"{course.title}, {backend}, {name}: {line}")
            report.say(f"  {line}")
    return found


def _built(
    course: Course, program: Program, text: str, backend: str, out: Path, threads: int
) -> tuple[Denoiser, list[str]]:
    """An engine, and where it differs from eager execution by more than rounding explains."""
    outcome = manager.apply(program, grammar.parse(f"cache({text})")) if text else None
    if outcome is not None and not outcome.ok:
        raise OptpassError("pass", "; ".join(f"{r.status}: {r.reason}" for r in outcome.records), "see the pass")
    kind, _, precision = backend.partition(":")
    stages = [program.main] if outcome is None else outcome.program.deployed
    with artifact.writer(out, source=course.name, force=True, sampler=course.sampler) as new:
        role = "dense" if outcome is None else "main"
        names = [new.add(stage, kind, precision or "f32", role=role) for stage in stages]
        checked = new.fidelity()
        new.finish(passes=outcome.records if outcome else (), fidelity=checked)
    session = optpass.load(out, engine=names[-1], threads=threads)
    assert isinstance(session, Denoiser)
    unlike = [f"{r.engine} differs by {r.difference:.2g} of {r.tolerance:.2g}" for r in checked if not r.ok]
    return session, unlike


# Measuring


def timed(arms: Sequence[Arm], seconds: float, fewest: int) -> measure.Round:
    """All arms in turn; quality is taken on the runs of the warm-up as well."""
    last = time.monotonic()

    def progress(share: float) -> None:
        nonlocal last
        if time.monotonic() - last > 15:
            last = time.monotonic()
            report.say(f"  {len(arms)} arms, {len(arms[0].made)} runs of each, {share:.0%} of the time")

    return measure.interleave(arms, seconds, fewest=max(fewest, 2), progress=progress)


def rows_of(arms: Sequence[Arm], done: measure.Round, backend: str, runs: int) -> list[dict[str, Any]]:
    """Speed over the first arm, and quality beside it; arms in torch are held against torch."""
    found = []
    eager = next((number for number, arm in enumerate(arms) if arm.torch), 0)
    for number, arm in enumerate(arms):
        made, dense = (a.made[:runs] for a in (arm, arms[eager if arm.torch else 0]))
        row = {
            "model": arm.course.title, "slug": arm.course.slug, "backend": backend, "group": arm.group, "arm": arm.name,
            "knobs": arm.knobs, "runs": len(made), "computed": float(np.mean([len(c) for c in arm.computed[:runs]])),
            "ms": round(1e3 * float(np.median(done.times[number])), 2), "speedup": _ratio(done, 0, number),
            **near(*(np.concatenate([shown(x) for x in side]) for side in (made, dense))),
            **arm.course.verdict(made, arms[0].made[:runs]),
        }  # fmt: skip
        if arm.torch:
            row["over_eager"] = _ratio(done, eager, number)
        found.append(row)
    return found


def _ratio(done: measure.Round, first: int, second: int) -> dict[str, float]:
    """How many times faster the second is."""
    ratio = measure.speedup([measure.Round((done.times[first], done.times[second]))])
    return {key: round(value, 4) for key, value in ratio.model_dump().items()}


ROW = 3
"""Predicted steps in a row that are timed; as many as a run has that computes every fourth step."""


def one_step(engines: Mapping[str, Denoiser], course: Course, backend: str, seconds: float) -> list[dict[str, Any]]:
    """A step that is computed and a row of predicted ones behind it, by the engine alone, beside the dense engine's.

    The first of a row is shown by itself: the computed step has taken what it reads out of the caches of the processor.
    """
    found = []
    conditions = course.conditions(0, [])
    dense = Stepper(engines[DENSE], course)
    for name, model in engines.items():
        if name == DENSE:
            continue
        stepper = Stepper(model, course)
        stepper.begin(course.batch)
        for number in range(5):
            stepper.call(stepper.given(course.noise(number), 0.5 + 0.01 * number, conditions), True)
        given = stepper.given(course.noise(5), 0.6, conditions)
        calls = [partial(dense.call, given, True, False), partial(stepper.call, given, True, False)]
        calls += [partial(stepper.call, given, False, False)] * ROW
        begin, turns = time.perf_counter(), list[list[float]]()
        while len(turns) < 2 * measure.FEWEST or time.perf_counter() - begin < seconds:
            turns.append([measure.seconds_of(call) for call in calls])
        times = np.array(turns[len(turns) // 10 :]).T
        done = measure.Round((times[0], times[1], times[2], times[2:].mean(0)))
        shares = {kind: _ratio(done, number, 0) for number, kind in enumerate(("computed", "first", "predicted"), 1)}
        dense_ms = round(1e3 * float(np.median(times[0])), 3)
        found.append({"model": course.title, "backend": backend, "engine": name, "dense_ms": dense_ms, **shares})
    return found


# Tables


def table(rows: Sequence[Mapping[str, Any]], course: Course) -> str:
    """One line for each arm; behind the cells that all courses share come those of the course."""
    head = ["arm", "steps computed", "ms", "faster than dense", "SSIM", "PSNR, dB", *course.columns]
    torches = any("over_eager" in row for row in rows)
    head += ["faster than torch, eager"] if torches else []
    lines = []
    for row in rows:
        cells = [row["arm"], *_cells(row), *_similar(row), *course.cells(row)]
        lines.append(cells + ([report.ratio(row["over_eager"]) if "over_eager" in row else ""] if torches else []))
    return report.table(head, lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "ms" not in row:
        return ["", "", ""]
    return [f"{row['computed']:.1f}", f"{row['ms']:.1f}", report.ratio(row["speedup"])]


def _similar(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['ssim']:.4f}", "equal" if row["psnr"] is None else f"{row['psnr']:.2f}"]


def replays(rows: Sequence[Mapping[str, Any]], course: Course) -> str:
    """As ``table``, with how near samples are to those of the peer itself."""
    head = ["steps of", "steps computed", "ms", "faster than dense", "SSIM", "PSNR, dB", *course.columns]
    lines = [[row["arm"], *_cells(row), *_similar(row), *course.cells(row), row["theirs"]] for row in rows]
    return report.table([*head, "dB to the peer's samples"], lines)


def steps_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The cost of a step."""
    lines = []
    for row in rows:
        shares = [
            f"{100 * row[kind]['value']:.1f} [{100 * row[kind]['low']:.1f}, {100 * row[kind]['high']:.1f}] %"
            for kind in ("computed", "predicted", "first")
        ]
        lines.append([row["engine"], f"{row['dense_ms']:.2f}", *shares])
    return report.table(
        ["engine", "dense step, ms", "a computed step of it", f"predicted, {ROW} in a row", "the first of these"], lines
    )


READING = """Arms take the same noise. *Faster* is the median of the ratios of turns, with a bootstrap interval of 95 %.
SSIM and PSNR are to the samples of the dense engine with all steps, of the same noise (of arms in torch: to those of
torch); means over samples, shown as they are, cut to [-1, 1]. *Steps computed* are means over runs; one of cache-dit
counts where the blocks behind its first ones were computed."""

MEANING = {
    "fashion-dit": """*Agreement* is the share of images that fashion-vit sees as the class that was asked for,
*Frechet* the distance of its features to those of the shipped test images; with so few images it is far from what it
tends to, and only rows of one table compare.""",
    "fashion-world": """*dB to the true frames* is the mean PSNR of the frames of rollouts to those that the scenes
really went through; *of dense* is that mean as a percentage of the one of the dense engine, and *error* the mean
squared error to the true frames as a multiple of that of the dense engine. Decibels are logarithms: read the percentage
beside the error, and beside the row of a frame that stands still. A smoother frame is nearer to the truth for that
alone, so that more than 100 % of dense is no gain by itself: *detail* is the mean difference between neighbouring
pixels as a percentage of that of the true frames; more of it is noise, less is blur.""",
}


# The run


def measured(
    course: Course, backend: str, given: argparse.Namespace, folder: Path, data: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """The sections of one model on one backend."""
    texts = {**POLICIES, **(GROUPS if course.name == "fashion-world" else {})}
    texts = {name: text for name, text in texts.items() if not given.policies or name.startswith(tuple(given.policies))}
    texts |= dict(given.also)
    engines = built(course, backend, texts, folder, given.threads, data["notes"])
    arms = list(controls(engines[DENSE], course, given.fewer))
    for name, model in engines.items():
        if name != DENSE:
            report.say(f"{course.title}, {backend}: choosing knobs of {name}")
            arms += reusing(name, model, course, given.targets)
    peer = CacheDit(given.peers, course, folder, given.threads, given.compile) if given.peers else None
    theirs = list(peer.arms(course, given.settings)) if peer else []
    fewest = given.rollouts * FRAMES if isinstance(course, Worlds) else -(-given.samples // course.batch)
    done = timed([*arms, *theirs], given.seconds, fewest - measure.WINDOW)
    report.say(f"{course.title}, {backend}: judging {len(arms) + len(theirs)} arms")
    runs = course.whole(len(arms[0].made))
    rows = rows_of([*arms, *theirs], done, backend, runs)
    data["rows"] += rows
    place = f"{course.title} on {backend}"
    floor = [row for row in [course.floor(arms[0].made[:runs])] if row]
    yield place, f"{MEANING[course.name]}\n\n{table([*rows[: len(arms)], *floor], course)}"
    steps = one_step(engines, course, backend, given.seconds / 120)
    data["steps"] += steps
    yield f"{place}: one step, by the engine alone", steps_table(steps)
    if peer:
        data["peers"] = peer.versions
        peer.close()
        yield f"{place}: cache-dit in torch, beside dense", table([rows[0], *rows[len(arms) :]], course)
        settings = [arm for arm in theirs if arm.group and COMPILED not in arm.name]
        again = _replayed(course, backend, engines[DENSE], settings, given, folder, data)
        yield f"{place}: the steps that cache-dit chose, on our engine", replays(again, course)


def _replayed(
    course: Course,
    backend: str,
    dense: Denoiser,
    theirs: Sequence[Arm],
    given: argparse.Namespace,
    folder: Path,
    data: dict[str, Any],
) -> list[dict[str, Any]]:
    """The decisions of the peer, run by run, on split artifacts of ours."""
    texts = {arm.name: replayed_as(SETTINGS[arm.name.removeprefix("cache-dit ")]) for arm in theirs}
    engines = built(course, backend, {text: text for text in texts.values()}, folder, given.threads, data["notes"])
    arms = [Arm("", DENSE, course, ours(dense, course))]
    sources: list[Arm | None] = [None]
    for arm in theirs:
        if texts[arm.name] in engines:
            stepper = Stepper(engines[texts[arm.name]], course)
            group = arm.group.replace("cache-dit", REPLAYED)
            arms.append(Arm(group, arm.name.replace("cache-dit", REPLAYED), course, stepper.replay(arm.computed)))
            sources.append(arm)
    runs = len(theirs[0].made)
    done = timed(arms, given.seconds / 4, runs - measure.WINDOW)
    rows = rows_of(arms, done, backend, course.whole(runs))
    for row, arm, source in zip(rows, arms, sources, strict=True):
        row["theirs"] = ""
        if source is not None:
            found, wanted = (np.concatenate([shown(x) for x in a.made[: row["runs"]]]) for a in (arm, source))
            row["theirs"] = f"{float(similarity.psnr(found, wanted).mean()):.1f}"
            data["schedules"].append(
                {
                    "model": course.title, "arm": source.name,
                    "runs": ["".join("01"[step in c] for step in range(STEPS)) for c in source.computed],
                }
            )  # fmt: skip
    data["rows"] += rows[1:]
    return rows


def _notes(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was refused, and what is not as near to eager execution as it should be."""
    return [("Refused or unfaithful", "\n".join(f"- {line}" for line in data["notes"]))] if data["notes"] else []


def courses(given: argparse.Namespace) -> Iterator[Course]:
    """What was asked for."""
    if "fashion-dit" in given.models:
        yield from (Images(given.batch, guidance) for guidance in given.guidance)
    if "fashion-world" in given.models:
        yield Worlds(given.scenes)


def named(text: str) -> tuple[str, str]:
    """``NAME: OPTIONS`` of a further arm."""
    name, _, options = text.partition(":")
    return name.strip(), options.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["fashion-dit", "fashion-world"])
    parser.add_argument(
        "--backend", nargs="+", default=["onnxruntime"], help="such as onnxruntime openvino openvino:bf16"
    )
    parser.add_argument("--samples", type=int, default=48, help="images of each arm, at least")
    parser.add_argument("--rollouts", type=int, default=2, help="of each arm, at least")
    parser.add_argument("--seconds", type=float, default=150.0, help="for each table; more only for the fewest samples")
    parser.add_argument("--peers", help="the Python of the environment of denoise_peers.txt")
    parser.add_argument("--policies", nargs="+", default=[], help="beginnings of their names")
    parser.add_argument("--also", type=named, action="append", default=[], help="NAME: OPTIONS of cache, a further arm")
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), help="steps that policies compute")
    parser.add_argument("--fewer", type=int, nargs="+", default=list(FEWER_STEPS), help="steps of the control")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="of fashion-dit; a table for each")
    parser.add_argument("--batch", type=int, default=4, help="images of one run")
    parser.add_argument("--scenes", type=int, default=1, help="rollouts side by side in one run")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help="of cache-dit")
    parser.add_argument("--compile", action="store_true", help="the peer under torch.compile as well: minutes more")
    parser.add_argument("--threads", type=int, default=manifests.cores())
    parser.add_argument("--quick", action="store_true", help="few arms and runs: whether it works, nothing else")
    parser.add_argument("--name", default="denoise", help="of the results; a figure is named by its model")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory of the results")
    given = parser.parse_args()
    if given.quick:
        given.seconds, given.samples, given.rollouts = 0.0, 2, 0
        given.targets, given.fewer, given.settings = [12], [12], ["S", "M+TS"]
    torch.set_num_threads(given.threads)
    data: dict[str, Any] = {
        "machine": report.machine(), "threads": given.threads, "of_steps": STEPS, "batch": given.batch,
        "scenes": given.scenes, "rows": [], "steps": [], "schedules": [], "notes": [], "peers": {},
    }  # fmt: skip
    sections = [("Reading", READING)]
    text = ""
    for course in courses(given):
        for backend in given.backend:
            with tempfile.TemporaryDirectory(prefix="optpass-benchmark-") as scratch:
                for section in measured(course, backend, given, Path(scratch), data):
                    sections.append(section)
                    text = report.write(given.name, data, [*sections, *_notes(data)], given.out)
    print(text)
    if given.peers:
        script = Path(__file__).parent / "denoise_cachedit.py"
        subprocess.run(
            [given.peers, str(script), "draw", str(given.out / f"{given.name}.json"), str(given.out)], check=True
        )
    else:
        report.say("no figures: they are drawn in the environment of --peers")


if __name__ == "__main__":
    main()
