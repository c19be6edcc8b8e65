"""Samples drawn by an engine that denoises, with or without features kept between its steps; no torch.

    model = optpass.load("engine/")
    images = model.denoise((4, 1, 28, 28), sampler="ddim(prediction=velocity,noise=cosine)", steps=50, label=labels)
    model.last.computed                                           # which steps were computed
    frames = model.rollout(16, (1, 2, 32, 32), sampler="euler", steps=20, conditions=next_conditions)

One step at a time: ``run = model.begin(steps)``, then ``run.step(sample, timestep, label=labels)`` for each of them.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optpass.errors import OptpassError
from optpass.runtime.engines.base import Array, Opened
from optpass.runtime.features import (
    COMPUTED,
    COUNTED,
    COUNTERS,
    DAMAGED,
    KNOBS,
    NEW,
    REFUSED,
    ROOM,
    STATE,
    STEPS,
    STREAK,
    THRESHOLD,
    WARMUP,
    Roles,
    counted,
    recognise,
)
from optpass.runtime.manifest import Engine, Manifest, TensorInfo
from optpass.runtime.schedules import Schedule, asked
from optpass.runtime.session import Session, check_inputs

Progress = Callable[[int, int], None]
"""Called with the steps done, and the steps in all."""

Conditions = Callable[[int, list[Array]], Mapping[str, Array]]
"""What a frame is made under, given its number and the frames before it."""

RUNS = itertools.count(1)


@dataclass
class Taken:
    """What became of the steps of a run: numbers of those that were computed, and of those at which what was kept was
    found to be no number, so that they were computed as well.
    """

    steps: int = 0
    computed: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)


class Denoiser(Session):
    """A session that draws samples.

    Attributes:
        last: of the steps of the last ``denoise``; of a rollout those of all frames.
        stateless: the engine with the inputs of the model alone.
    """

    def __init__(
        self,
        manifest: Manifest,
        name: str,
        opened: Opened,
        threads: int,
        full: Opened | None = None,
        computing: Engine | None = None,
    ) -> None:
        super().__init__(manifest, name, opened, threads)
        found = recognise(self.engine.inputs, self.engine.outputs)
        assert found is not None
        self.roles: Roles = found
        self.full, self.computing = full, computing
        self.last = Taken()
        own = [info for info in self.engine.inputs if not info.name.startswith(STATE)]
        self.stateless = self.engine.model_copy(update={"inputs": own})
        self.results = [info.name for info in self.engine.outputs]

    @property
    def keeps(self) -> bool:
        """Whether features are kept between steps."""
        return self.engine.steps

    @property
    def state(self) -> list[TensorInfo]:
        """What is kept."""
        return [info for info in self.engine.inputs if info.name.startswith(STATE)]

    def batched(self, name: str) -> bool:
        """Whether an input has a row for each sample, as far as its first size says."""
        first = {info.name: info.shape[:1] for info in self.engine.inputs}
        return first[name] == first[self.roles.sample]

    def begin(
        self, steps: int, *, threshold: float | None = None, streak: int | None = None, warmup: int | None = None
    ) -> Run:
        """A run of so many steps, each to be taken once.

        Args:
            steps: in all; the last one is computed, as the first ones are.
            threshold: signal at which a step is computed, in place of that which the engine was built with.
            streak: most steps in a row that are predicted, the same.
            warmup: first steps, which are computed, the same.

        Raises:
            OptpassError: no steps, or the engine has no such knob.
        """
        if steps < 1:
            raise OptpassError("usage", f"steps is {steps}", "give 1 or more")
        initial = dict(self.engine.initial)
        for name, value in ((THRESHOLD, threshold), (STREAK, streak), (WARMUP, warmup)):
            if value is None:
                continue
            if name not in initial:
                known = ", ".join(knob for knob in KNOBS if knob in initial) or "none"
                raise OptpassError("usage", f"the engine has no {name}", f"it has {known}")
            if value < 0:
                raise OptpassError("usage", f"{name} is {value}", "give 0 or more")
            initial[name] = value
        return Run(self, steps, initial)

    def started(self, batch: int, steps: int, knobs: Mapping[str, float]) -> dict[str, Array]:
        """The state before the first of so many steps, by the names of the inputs."""
        begun = {**knobs, STEPS: steps}
        found = {}
        for info in self.state:
            shape = [size if isinstance(size, int) else batch for size in info.shape]
            found[info.name] = np.full(shape, begun.get(info.name.removeprefix(STATE), 0), info.dtype)
        if found:
            found[STATE + COUNTED][:] = counted(begun)
        return found

    def denoise(
        self,
        noise: Array | Sequence[int],
        /,
        *,
        sampler: str | Schedule | None = None,
        steps: int = 50,
        seed: int = 0,
        guidance: float = 1.0,
        unconditional: Mapping[str, Array] | None = None,
        progress: Progress | None = None,
        knobs: Mapping[str, Any] | None = None,
        conditions: Mapping[str, Array] | None = None,
        **others: Any,
    ) -> NDArray[np.float32]:
        """From noise to samples.

        Args:
            noise: standard normal, of the shape of the noisy input; or that shape, to draw it.
            sampler: such as ``ddim``, ``euler(shift=3)`` or ``dpm-solver++(prediction=velocity,noise=cosine)``; by
                default what the artifact was made with.
            steps: how many.
            seed: of the noise that is drawn, each sample from a seed of its own: ``seed``, ``seed + 1``, ...
            guidance: how far to go from what the model predicts under ``unconditional`` to what it predicts under the
                conditions, and beyond: arXiv 2207.12598. 1 is the latter alone.
            unconditional: conditions that say nothing, such as an empty label; those that are not named stay.
            progress: called after each step.
            knobs: those of ``begin``.
            conditions: other inputs of the model by name, such as one that is named as an argument here.
            **others: all that are not in it.

        Returns:
            float32 of the shape of the noise.

        Raises:
            OptpassError: an input is missing or of another shape, or the sampler does not exist.
        """
        under: dict[str, Array] = {**(conditions or {}), **others}
        schedule = asked(sampler or self.manifest.sampler)
        start = drawn(noise, seed) if not isinstance(noise, np.ndarray) else noise
        way = schedule.start(steps)
        guide = _Guide(self, steps, guidance, unconditional, dict(knobs or {}), len(start))
        sample = way.initial(start)
        for index, timestep in enumerate(way.timesteps):
            predicted = guide.predict(sample, float(timestep), under)
            sample = way.step(index, predicted, sample)
            if progress is not None:
                progress(index + 1, steps)
        self.last = guide.taken()
        if self.last.damaged:
            where = ", ".join(map(str, self.last.damaged))
            warnings.warn(f"what was kept is no number at step {where}: computed instead", RuntimeWarning, stacklevel=2)
        return sample

    def rollout(
        self, frames: int, shape: Sequence[int], *, conditions: Conditions, seed: int = 0, **options: Any
    ) -> NDArray[np.float32]:
        """Frames that follow one another, each made under what came before.

        Args:
            frames: how many.
            shape: of one, with its batch.
            conditions: gives the other inputs of the model.
            seed: of the noise of the first frame; the next one has the next seed.
            **options: those of ``denoise``.

        Returns:
            float32 ``[batch, frames, ...]``.

        Raises:
            OptpassError: no frames, or as ``denoise``.
        """
        if frames < 1:
            raise OptpassError("usage", f"frames is {frames}", "give 1 or more")
        made: list[Array] = []
        taken = Taken()
        for frame in range(frames):
            first = seed + frame * int(shape[0])
            under: dict[str, Any] = dict(conditions(frame, made))
            made.append(self.denoise(shape, seed=first, conditions=under, **options))
            taken.computed += [taken.steps + step for step in self.last.computed]
            taken.damaged += [taken.steps + step for step in self.last.damaged]
            taken.steps += self.last.steps
        self.last = taken
        return np.stack(made, 1)


class Run:
    """The state of one run, which takes no step of another: stale features are refused, not used.

    Attributes:
        number: of the run in this process.
        taken: what became of its steps.
    """

    def __init__(self, model: Denoiser, steps: int, initial: Mapping[str, float]) -> None:
        self.model, self.steps = model, steps
        self.number = next(RUNS)
        self.taken = Taken()
        self._initial = initial
        self._first: dict[str, Array] = {}
        self._times: list[float] = []
        self._state: dict[str, Array] = {}

    def step(self, sample: Array, timestep: Array | float, /, **conditions: Array) -> Array:
        """What the model predicts of a noisy sample.

        Args:
            sample: float32 of the shape that the run began with.
            timestep: one number, or one for each sample; further along the way than in the step before.
            **conditions: all other inputs, those that the run began with.

        Returns:
            As the model returns it, without a learned variance.

        Raises:
            OptpassError: the run is over, or the step belongs to another one: a new shape, other conditions, or a time
                that is not further on.
        """
        model, roles = self.model, self.model.roles
        own = model.stateless.inputs
        given = {roles.sample: sample, roles.timestep: _times(own, roles.timestep, sample, timestep), **conditions}
        checked = check_inputs(model.stateless, given)
        arrays = {info.name: array for info, array in zip(own, checked, strict=True)}
        self._check(arrays)
        results = self._run(arrays)
        self.taken.steps += 1
        width = sample.shape[roles.channels]
        first: Array = results[model.results[0]]
        return first[(slice(None),) * roles.channels + (slice(width),)]

    def _check(self, arrays: Mapping[str, Array]) -> None:
        model, roles = self.model, self.model.roles
        if self.taken.steps >= self.steps:
            raise _stale(self, f"all of its {self.steps} steps are taken")
        now = float(np.max(arrays[roles.timestep]))
        if not self._first:
            self._first = {name: array.copy() for name, array in arrays.items() if name != roles.timestep}
            self._state = model.started(len(arrays[roles.sample]), self.steps, self._initial)
        elif arrays[roles.sample].shape != self._first[roles.sample].shape:
            shapes = self._first[roles.sample].shape, arrays[roles.sample].shape
            raise _stale(self, f"it began with {roles.sample} of {list(shapes[0])}, this one is {list(shapes[1])}")
        else:
            for name in roles.conditions:
                if not np.array_equal(arrays[name], self._first[name]):
                    raise _stale(self, f"{name} is not what it began with")
        turned = len(self._times) > 1 and (self._times[-1] - self._times[0]) * (now - self._times[-1]) <= 0
        if self._times and (turned or now == self._times[-1]):
            raise _stale(self, f"{roles.timestep} {now:g} does not go on from {self._times[-1]:g}")
        self._times.append(now)

    def _run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """One call, or a second one where a prediction is refused."""
        model, number = self.model, self.taken.steps
        given = [*arrays.values(), *self._state.values()]
        if model.full is not None and self._surely():
            return self._computed(given)
        results = dict(zip(model.results, model.call(model.opened, given), strict=True))
        if DAMAGED in results and bool(results[DAMAGED]):
            self.taken.damaged.append(number)
        if REFUSED in results and bool(results[REFUSED]):
            return self._computed(given)
        if COMPUTED not in results or bool(results[COMPUTED]):
            self.taken.computed += [] if REFUSED in results else [number]
        self._keep(results)
        return results

    def _surely(self) -> bool:
        """Whether the step has to be computed whatever it brings, so that it need not be tried."""
        return int(self._state[STATE + COUNTED][COUNTERS.index(ROOM)]) < 1

    def _computed(self, given: Sequence[Array]) -> dict[str, Array]:
        model = self.model
        assert model.full is not None
        assert model.computing is not None
        self.taken.computed.append(self.taken.steps)
        names = [info.name for info in model.computing.outputs]
        results = dict(zip(names, model.call(model.full, given), strict=True))
        self._keep(results)
        return results

    def _keep(self, results: Mapping[str, Array]) -> None:
        for name, array in results.items():
            if name.startswith(NEW):
                self._state[STATE + name.removeprefix(NEW)] = array


class _Guide:
    """One run, or two that a prediction lies between: with and without what the conditions say."""

    def __init__(
        self,
        model: Denoiser,
        steps: int,
        guidance: float,
        unconditional: Mapping[str, Array] | None,
        knobs: dict[str, Any],
        count: int,
    ) -> None:
        if guidance != 1 and not unconditional:
            what = f"guidance is {guidance:g}, and nothing is said of what to go away from"
            raise OptpassError("usage", what, "give unconditional, such as unconditional={'label': none}")
        unknown = set(unconditional or {}) - set(model.roles.conditions)
        if unknown:
            what = f"unconditional has {min(unknown)}, which is no condition of the model"
            raise OptpassError("usage", what, f"it has {', '.join(model.roles.conditions) or 'none'}")
        self.guidance = guidance
        self.unconditional = dict(unconditional or {}) if guidance != 1 else {}
        self.runs = [model.begin(steps, **knobs)]
        first = next(info for info in model.engine.inputs if info.name == model.roles.sample).shape[0]
        # of a fixed batch there is no room for both in one call, nor for two values of what all samples share
        room = isinstance(first, str) and 2 * count <= model.engine.dynamic[first].maximum
        self.together = bool(self.unconditional) and room and all(map(model.batched, self.unconditional))
        if self.unconditional and not self.together:
            self.runs.append(model.begin(steps, **knobs))

    def predict(self, sample: Array, timestep: float, conditions: Mapping[str, Array]) -> Array:
        """What is predicted of a sample, with guidance."""
        if not self.unconditional:
            return self.runs[0].step(sample, timestep, **conditions)
        other = {**conditions, **self.unconditional}
        if self.together:
            both = {
                name: np.concatenate([array, other[name]]) if self.runs[0].model.batched(name) else array
                for name, array in conditions.items()
            }
            wanted, free = np.split(self.runs[0].step(np.concatenate([sample, sample]), timestep, **both), 2)
        else:
            wanted = self.runs[0].step(sample, timestep, **conditions)
            free = self.runs[1].step(sample, timestep, **other)
        guided: Array = free + self.guidance * (wanted - free)
        return guided

    def taken(self) -> Taken:
        """The steps, those of two runs as one: computed where either was."""
        first = self.runs[0].taken
        computed = sorted({step for run in self.runs for step in run.taken.computed})
        return Taken(first.steps, computed, sorted({step for run in self.runs for step in run.taken.damaged}))


def drawn(shape: Sequence[int], seed: int) -> NDArray[np.float32]:
    """Noise, each sample from a seed of its own, so that it does not depend on the batch it is drawn in.

    Raises:
        OptpassError: there is no sample in it.
    """
    if not len(shape) or shape[0] < 1:
        raise OptpassError("usage", f"noise of shape {list(shape)} has no sample", "give 1 sample or more")
    one = [np.random.default_rng(seed + number).standard_normal(tuple(shape[1:])) for number in range(shape[0])]
    return np.stack(one).astype(np.float32)


def _times(infos: Sequence[TensorInfo], name: str, sample: Array, timestep: Array | float) -> Array:
    """The timestep as the engine takes it."""
    info = next(info for info in infos if info.name == name)
    if isinstance(timestep, np.ndarray):
        return timestep
    return np.full([len(sample)] * len(info.shape), timestep, info.dtype)


def _stale(run: Run, what: str) -> OptpassError:
    return OptpassError("stale-state", f"this step does not belong to run {run.number}: {what}", "begin a new run")


__all__ = ["Denoiser", "Run", "Taken", "drawn"]
