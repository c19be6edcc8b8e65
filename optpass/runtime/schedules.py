"""From noise to a sample: the steps of deterministic diffusion samplers around a model that somebody else runs."""

from __future__ import annotations

import ast
import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from optpass.errors import OptpassError

Prediction = Literal["epsilon", "velocity", "sample", "flow"]
"""What the model predicts: the noise, ``alpha * noise - sigma * sample``, the sample, or ``noise - sample``."""

Noise = Literal["linear", "scaled_linear", "cosine"]
"""How the noise grows over the timesteps of the training; cosine is ``squaredcos_cap_v2`` in diffusers."""

Spacing = Literal["leading", "linspace", "trailing"]
"""Which of these timesteps are taken: arXiv 2305.08891, table 2."""

Levels = NDArray[np.float64]
Sample = NDArray[np.float32]


def alphas_cumprod(
    noise: Noise | Sequence[float] | Levels,
    train_steps: int = 1000,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
) -> Levels:
    """The part of the variance that is signal, at each timestep that the model was trained on.

    Args:
        noise: the name of a schedule, or the values themselves: ``[train_steps]``, falling, between 0 and 1. For zero
            terminal signal end on ``2**-24``, as diffusers does, since a 0 cannot be divided by.
        train_steps: how many timesteps there are.
        beta_start: variance of the noise that the first timestep adds; cosine does not look at it.
        beta_end: the same of the last one.

    Returns:
        float64 ``[train_steps]``.

    Raises:
        OptpassError: the name is unknown, or a value is out of its range.
    """
    _need(train_steps >= 1, f"train_steps is {train_steps}", "give 1 or more")
    if not isinstance(noise, str):
        values = np.array(noise, np.float64)
        what = f"the noise has shape {list(values.shape)}, train_steps is {train_steps}"
        _need(values.shape == (train_steps,), what, "give one value of alphas_cumprod per training step")
        falling = (values > 0).all() and (values < 1).all() and (np.diff(values) < 0).all()
        _need(bool(falling), "the values of the noise do not fall from below 1 to above 0", "give alphas_cumprod")
        return values
    _one_of("noise", noise, get_args(Noise))
    _need(0 < beta_start <= beta_end < 1, f"betas go from {beta_start} to {beta_end}", "give 0 < start <= end < 1")
    if noise == "linear":
        betas = np.linspace(beta_start, beta_end, train_steps)
    elif noise == "scaled_linear":
        betas = np.linspace(beta_start**0.5, beta_end**0.5, train_steps) ** 2
    else:
        signal = np.cos((np.arange(train_steps + 1) / train_steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
    # In float32, as models are trained and compared with: the last of cosine is 1e-5 off what float64 gives.
    found: Levels = np.cumprod(1 - betas.astype(np.float32), dtype=np.float64)
    return found


class Run(ABC):
    """The way of one batch from noise to samples. It knows how far it is; the schedule that started it does not.

    Attributes:
        timesteps: ``[steps]``, what the model is given at each step, falling: int64 timesteps it was trained on, or
            float64 for flow matching.
    """

    def __init__(self, timesteps: NDArray[np.int64] | Levels) -> None:
        self.timesteps = timesteps
        self._done = 0

    def initial(self, noise: NDArray[Any]) -> Sample:
        """What the first step starts from: the noise as it is, since all of these schedules end on variance one.

        Args:
            noise: float of any shape, standard normal.

        Returns:
            float32 of the same shape.
        """
        return noise.astype(np.float32)

    def step(self, index: int, prediction: NDArray[Any], sample: NDArray[Any]) -> Sample:
        """The sample after a step.

        Args:
            index: of the step; they are taken in order, each once.
            prediction: float of the shape of ``sample``, what the model says of it at ``timesteps[index]``.
            sample: float of any shape, what the step before returned, or ``initial``.

        Returns:
            float32 of the same shape, computed in float64.

        Raises:
            OptpassError: it is not the turn of this step, or the shapes differ.
        """
        if index != self._done or index >= len(self.timesteps):
            what = f"step {index} came after {self._done} of {len(self.timesteps)} steps"
            raise OptpassError("step-order", what, "take each step once, in order, and start a run per sample")
        if prediction.shape != sample.shape:
            what = f"the prediction has shape {list(prediction.shape)}, the sample {list(sample.shape)}"
            raise OptpassError(
                "prediction-shape", what, "give one value per value of the sample, without a learned variance"
            )
        found = self._next(index, prediction.astype(np.float64), sample.astype(np.float64))
        self._done += 1
        return found.astype(np.float32)

    @abstractmethod
    def _next(self, index: int, prediction: Levels, sample: Levels) -> Levels:
        """The sample after a step."""


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """How to get from noise to a sample. Options only: what a run remembers is in the ``Run``.

    Attributes:
        prediction: what the model predicts, one of ``predictions``.
        train_steps: how many timesteps the model was trained on.
    """

    predictions: ClassVar[tuple[Prediction, ...]]

    prediction: Prediction
    train_steps: int = 1000

    def __post_init__(self) -> None:
        _one_of("prediction", self.prediction, self.predictions, f" for {type(self).__name__}")
        _need(self.train_steps >= 1, f"train_steps is {self.train_steps}", "give 1 or more")

    @abstractmethod
    def start(self, steps: int) -> Run:
        """A new run.

        Raises:
            OptpassError: the schedule has no such number of steps.
        """


@dataclass(frozen=True, kw_only=True)
class Discrete(Schedule):
    """A schedule for models that were trained on whole timesteps, at which signal and noise have variance one together.

    Attributes:
        noise: a name, or float ``[train_steps]``: see ``alphas_cumprod``; kept as a tuple.
        beta_start: see ``alphas_cumprod``.
        beta_end: see ``alphas_cumprod``.
        spacing: which timesteps are taken.
        steps_offset: added to each timestep of ``leading`` spacing.
    """

    predictions = ("epsilon", "velocity", "sample")

    prediction: Prediction = "epsilon"
    noise: Noise | Sequence[float] | Levels = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    spacing: Spacing = "leading"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("spacing", self.spacing, get_args(Spacing))
        _need(self.steps_offset >= 0, f"steps_offset is {self.steps_offset}", "give 0 or more")
        levels = self._levels()
        if not isinstance(self.noise, str):
            object.__setattr__(self, "noise", tuple(levels.tolist()))

    def _levels(self) -> Levels:
        return alphas_cumprod(self.noise, self.train_steps, self.beta_start, self.beta_end)

    def _spaced(self, steps: int, beyond: int) -> NDArray[np.int64]:
        """The timesteps that are taken, where ``beyond`` more are counted but not taken, except in trailing spacing."""
        given = f"steps is {steps}, train_steps is {self.train_steps}"
        _need(1 <= steps <= self.train_steps, given, f"give 1 to {self.train_steps} steps")
        points = steps + beyond
        chosen: NDArray[Any]
        if self.spacing == "linspace":
            chosen = np.linspace(0, self.train_steps - 1, points)[::-1].round()
        elif self.spacing == "leading":
            chosen = np.arange(points)[::-1] * (self.train_steps // points) + self.steps_offset
        else:
            chosen = np.arange(self.train_steps, 0, -self.train_steps / steps).round() - 1
        # Rounding may give trailing spacing one more, before the first timestep.
        found = chosen[:steps].astype(np.int64)
        fits = found[0] < self.train_steps and (np.diff(found) < 0).all()
        _need(bool(fits), f"{given}: two fall together or one is too late", "take fewer steps, or a smaller offset")
        return found


@dataclass(frozen=True, kw_only=True)
class DDIM(Discrete):
    """The deterministic sampler (eta 0), as ``DDIMScheduler`` in diffusers.

    Also as there, a step leads ``train_steps // steps`` timesteps down, which with ``linspace`` spacing, or where the
    division leaves a rest, is not quite the timestep that the next step says it is at.

    Paper: Denoising Diffusion Implicit Models, arXiv 2010.02502, equation 12.

    Attributes:
        clip: largest magnitude of the predicted sample, unbounded where None; ``clip_sample_range`` in diffusers.
        set_alpha_to_one: whether the last step leads to no noise at all, else to that of the first timestep.
    """

    clip: float | None = None
    set_alpha_to_one: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(self.clip is None or self.clip > 0, f"clip is {self.clip}", "give more than 0, or none")

    def start(self, steps: int) -> Run:
        timesteps, levels = self._spaced(steps, beyond=0), self._levels()
        after = timesteps - self.train_steps // steps
        last = 1.0 if self.set_alpha_to_one else levels[0]
        return _DDIMRun(self, timesteps, levels[timesteps], np.where(after < 0, last, levels[after]))


@dataclass(frozen=True, kw_only=True)
class DPMSolver(Discrete):
    """DPM-Solver++ 2M, as ``DPMSolverMultistepScheduler`` in diffusers with its defaults.

    Of second order by the prediction of the step before; the first and the last step are of first order.

    Paper: DPM-Solver++, arXiv 2211.01095, algorithm 2.
    """

    spacing: Spacing = "linspace"

    def start(self, steps: int) -> Run:
        timesteps = self._spaced(steps, beyond=1)
        return _DPMSolverRun(self.prediction, timesteps, np.append(self._levels()[timesteps], 1.0))


@dataclass(frozen=True, kw_only=True)
class Euler(Schedule):
    """Euler's method along the straight paths of flow matching, as ``FlowMatchEulerDiscreteScheduler`` in diffusers.

    Paper: Flow Matching for Generative Modeling, arXiv 2210.02747; the shift is from arXiv 2403.03206, section 5.3.2.

    Attributes:
        train_steps: the last step starts from ``1 / train_steps`` of noise, which a shift moves twice, as in diffusers.
        shift: more than 1 takes more of the steps where there is much noise.
        timestep_scale: what the model is given for pure noise: 1, or ``train_steps`` as in diffusers.
    """

    predictions = ("flow",)

    prediction: Prediction = "flow"
    shift: float = 1.0
    timestep_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("shift", self.shift), ("timestep_scale", self.timestep_scale)):
            _need(0 < value < np.inf, f"{name} is {value}", "give a finite number above 0")

    def start(self, steps: int) -> Run:
        _need(steps >= 1, f"steps is {steps}", "give 1 or more")
        last = float(self._shifted(np.array(1 / self.train_steps)))
        sigmas = self._shifted(np.linspace(1.0, last, steps))
        return _EulerRun(sigmas * self.timestep_scale, np.append(sigmas, 0.0))

    def _shifted(self, sigmas: Levels) -> Levels:
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)


SCHEDULES: dict[str, type[Schedule]] = {"ddim": DDIM, "euler": Euler, "dpm-solver++": DPMSolver}


def asked(sampler: str | Schedule) -> Schedule:
    """A schedule, or one in words: ``ddim``, ``dpm-solver++(prediction=velocity,noise=cosine)``.

    Raises:
        OptpassError: the text is not of that form, or names an unknown schedule, option or value.
    """
    if isinstance(sampler, Schedule):
        return sampler
    if not sampler:
        raise OptpassError("usage", "no sampler is named", "name one, such as sampler='ddim(prediction=epsilon)'")
    match = re.fullmatch(r"\s*([\w+-]+)\s*(?:\((.*)\))?\s*", sampler)
    pairs = [part.partition("=") for part in (match[2] or "").split(",") if part.strip()] if match else []
    if match is None or any(not value for _, _, value in pairs):
        what = f"{sampler!r} is no sampler"
        raise OptpassError("usage", what, "write it such as ddim(prediction=velocity,noise=cosine)")
    return schedule(match[1], **{name.strip(): _value(value.strip()) for name, _, value in pairs})


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text.title() if text.lower() in ("true", "false", "none") else text)
    except (ValueError, SyntaxError):
        return text


def schedule(name: str, **options: Any) -> Schedule:
    """A schedule by its name.

    Args:
        name: one of ``SCHEDULES``.
        options: the attributes of the class.

    Raises:
        OptpassError: there is no such schedule or option, or the value of an option cannot be used.
    """
    _one_of("schedule", name, SCHEDULES)
    kind = SCHEDULES[name]
    known = [field.name for field in fields(kind)]
    for option in options:
        _one_of("option", option, known, f" of {name}")
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise OptpassError("schedule", f"{name}: {error}", "give numbers where numbers are asked for") from error


class _DDIMRun(Run):
    def __init__(self, options: DDIM, timesteps: NDArray[np.int64], here: Levels, after: Levels) -> None:
        super().__init__(timesteps)
        self._options = options
        self._here, self._after = _parts(here), _parts(after)

    def _next(self, index: int, prediction: Levels, sample: Levels) -> Levels:
        (alpha, sigma), (next_alpha, next_sigma) = self._here[index], self._after[index]
        clean = _clean(self._options.prediction, prediction, sample, alpha, sigma)
        noise = (sample - alpha * clean) / sigma
        if self._options.clip is not None:
            clean = clean.clip(-self._options.clip, self._options.clip)
        return next_alpha * clean + next_sigma * noise


class _DPMSolverRun(Run):
    def __init__(self, kind: Prediction, timesteps: NDArray[np.int64], levels: Levels) -> None:
        super().__init__(timesteps)
        self._kind = kind
        self._parts = _parts(levels)
        self._ratios = [sigma / alpha for alpha, sigma in self._parts]
        self._before: Levels | None = None

    def _next(self, index: int, prediction: Levels, sample: Levels) -> Levels:
        (alpha, sigma), (next_alpha, next_sigma) = self._parts[index : index + 2]
        ratio, next_ratio = self._ratios[index : index + 2]
        clean = mean = _clean(self._kind, prediction, sample, alpha, sigma)
        if self._before is not None and next_ratio > 0:
            width, width_before = math.log(ratio / next_ratio), math.log(self._ratios[index - 1] / ratio)
            mean = clean + width / width_before / 2 * (clean - self._before)
        self._before = clean
        return next_sigma / sigma * sample + next_alpha * (1 - next_ratio / ratio) * mean


class _EulerRun(Run):
    def __init__(self, timesteps: Levels, sigmas: Levels) -> None:
        super().__init__(timesteps)
        self._widths: list[float] = np.diff(sigmas).tolist()

    def _next(self, index: int, prediction: Levels, sample: Levels) -> Levels:
        return sample + self._widths[index] * prediction


def _parts(levels: Levels) -> list[tuple[float, float]]:
    """How much of the sample and how much of the noise there is, at each level."""
    return list(zip(np.sqrt(levels).tolist(), np.sqrt(1 - levels).tolist(), strict=True))


def _clean(kind: Prediction, prediction: Levels, sample: Levels, alpha: float, sigma: float) -> Levels:
    """The sample without noise that the prediction amounts to."""
    if kind == "epsilon":
        found: Levels = (sample - sigma * prediction) / alpha
        return found
    if kind == "velocity":
        return alpha * sample - sigma * prediction
    return prediction


def _need(fits: bool, what: str, remedy: str) -> None:
    if not fits:
        raise OptpassError("schedule", what, remedy)


def _one_of(kind: str, name: str, known: Collection[str], where: str = "") -> None:
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, 1)
    remedy = f"did you mean {near[0]}?" if near else f"{kind}s are {', '.join(known)}"
    raise OptpassError(f"unknown-{kind}", f"there is no {kind} {name!r}{where}", remedy)
