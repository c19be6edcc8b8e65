"""Held to diffusers over whole runs, and to models whose answer is known."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray

from optpass.errors import OptpassError
from optpass.runtime.schedules import (
    DDIM,
    Discrete,
    DPMSolver,
    Euler,
    Noise,
    Prediction,
    Run,
    Schedule,
    Spacing,
    alphas_cumprod,
    schedule,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers

Array = NDArray[Any]

STEPS = (5, 20, 50)
RANDOM = np.random.default_rng(7)
MIXING = RANDOM.normal(size=(8, 8)) / 4
START = RANDOM.normal(size=(2, 3, 8)).astype(np.float32)
CLEAN = RANDOM.normal(size=START.shape)

TOLERANCE = 1e-5
"""Of the largest value, or of one: diffusers rounds each operation to float32, and differences of levels most."""

ROUNDING = 2.0**-24
"""Of a value, where it is stored in float32."""

THEIRS = {
    "epsilon": "epsilon",
    "velocity": "v_prediction",
    "sample": "sample",
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}


def model(sample: Array, timestep: float) -> Array:
    return np.tanh(sample @ MIXING + timestep / 1000).astype(np.float32)


def samples(run: Run, start: Array = START, model: Callable[[Array, float], Array] = model) -> list[Array]:
    found = [run.initial(start)]
    for index, timestep in enumerate(run.timesteps):
        found.append(run.step(index, model(found[-1], float(timestep)), found[-1]))
        assert found[-1].dtype == np.float32
    return found


def diffused(scheduler: Any, steps: int) -> list[Array]:
    scheduler.set_timesteps(steps)
    sample = torch.from_numpy(START) * getattr(scheduler, "init_noise_sigma", 1.0)
    found = [sample.numpy()]
    for timestep in scheduler.timesteps:
        prediction = torch.from_numpy(model(found[-1], float(timestep)))
        sample = scheduler.step(prediction, timestep, sample).prev_sample
        found.append(sample.numpy())
    return found


def hold(ours: Schedule, theirs: Any, steps: int) -> None:
    run = ours.start(steps)
    found, expected = samples(run), diffused(theirs, steps)
    np.testing.assert_allclose(run.timesteps, theirs.timesteps.numpy(), rtol=1e-6)
    for step, (one, two) in enumerate(zip(found, expected, strict=True)):
        assert np.abs(one - two).max() <= TOLERANCE * max(1.0, np.abs(two).max()), f"after step {step}"


def theirs(kind: type[Discrete], **options: Any) -> Any:
    if kind is DDIM:
        return DDIMScheduler(**{"clip_sample": False, **options})
    return DPMSolverMultistepScheduler(**options)


@pytest.mark.parametrize("noise", get_args(Noise))
@pytest.mark.parametrize("train_steps", [1, 2, 1000])
def test_levels_are_those_of_diffusers(noise: Noise, train_steps: int) -> None:
    found = alphas_cumprod(noise, train_steps)
    expected = DDIMScheduler(beta_schedule=THEIRS[noise], num_train_timesteps=train_steps).alphas_cumprod
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", get_args(Spacing))
@pytest.mark.parametrize("noise", get_args(Noise))
@pytest.mark.parametrize("prediction", Discrete.predictions)
@pytest.mark.parametrize("kind", [DDIM, DPMSolver])
def test_discrete_runs_are_those_of_diffusers(
    kind: type[Discrete], prediction: Prediction, noise: Noise, spacing: Spacing, steps: int
) -> None:
    other = theirs(kind, prediction_type=THEIRS[prediction], beta_schedule=THEIRS[noise], timestep_spacing=spacing)
    hold(kind(prediction=prediction, noise=noise, spacing=spacing), other, steps)


@pytest.mark.parametrize("steps", [1, *STEPS])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("train_steps", [1000, 100])
def test_flow_runs_are_those_of_diffusers(train_steps: int, shift: float, steps: int) -> None:
    other = FlowMatchEulerDiscreteScheduler(train_steps, shift=shift)
    hold(Euler(train_steps=train_steps, shift=shift, timestep_scale=train_steps), other, steps)


@pytest.mark.parametrize("steps", [1, 6, 20])
@pytest.mark.parametrize("spacing", get_args(Spacing))
@pytest.mark.parametrize("kind", [DDIM, DPMSolver])
@pytest.mark.parametrize(
    ("ours", "other"),
    [
        ({"steps_offset": 1}, {"steps_offset": 1}),
        ({"train_steps": 300}, {"num_train_timesteps": 300}),
        ({"beta_start": 0.00085, "beta_end": 0.012}, {"beta_start": 0.00085, "beta_end": 0.012}),
        (
            {"noise": np.cumprod(1 - np.linspace(0.001, 0.03, 400)), "train_steps": 400},
            {"trained_betas": np.linspace(0.001, 0.03, 400), "num_train_timesteps": 400},
        ),
    ],
)
def test_options_mean_what_they_mean_in_diffusers(
    ours: dict[str, Any], other: dict[str, Any], kind: type[Discrete], spacing: Spacing, steps: int
) -> None:
    hold(kind(spacing=spacing, **ours), theirs(kind, timestep_spacing=spacing, **other), steps)


@pytest.mark.parametrize("prediction", Discrete.predictions)
@pytest.mark.parametrize(
    ("ours", "other"),
    [
        ({"clip": 0.5}, {"clip_sample": True, "clip_sample_range": 0.5}),
        ({"set_alpha_to_one": False}, {"set_alpha_to_one": False}),
    ],
)
def test_options_of_ddim_mean_what_they_mean_in_diffusers(
    ours: dict[str, Any], other: dict[str, Any], prediction: Prediction
) -> None:
    hold(DDIM(prediction=prediction, **ours), theirs(DDIM, prediction_type=THEIRS[prediction], **other), 20)


@pytest.mark.parametrize("spacing", get_args(Spacing))
@pytest.mark.parametrize("kind", [DDIM, DPMSolver])
def test_timesteps_are_those_of_diffusers(kind: type[Discrete], spacing: Spacing) -> None:
    other = theirs(kind, timestep_spacing=spacing)
    for steps in [*range(1, 200), *range(200, 1000, 37)]:
        other.set_timesteps(steps)
        # For some numbers of steps in trailing spacing, diffusers takes one more, from timestep -1.
        expected = other.timesteps.numpy()[:steps]
        np.testing.assert_array_equal(kind(spacing=spacing).start(steps).timesteps, expected, f"{steps} steps")


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_on_the_true_flow_lands_on_the_sample(shift: float, steps: int) -> None:
    run = Euler(shift=shift).start(steps)
    flow = START - CLEAN
    found = samples(run, model=lambda sample, timestep: flow)
    bound = (steps + 1) * ROUNDING * (np.abs(START) + np.abs(CLEAN)).max()
    assert np.abs(found[-1] - CLEAN).max() <= bound
    for sigma, sample in zip(run.timesteps, found[:-1], strict=True):
        assert np.abs(sample - (CLEAN + sigma * flow)).max() <= bound


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("noise", ["linear", "scaled_linear"])
@pytest.mark.parametrize("prediction", Discrete.predictions)
@pytest.mark.parametrize("kind", [DDIM, DPMSolver])
def test_the_perfect_prediction_lands_on_the_sample(
    kind: type[Discrete], prediction: Prediction, noise: Noise, spacing: Spacing, steps: int
) -> None:
    levels = alphas_cumprod(noise)

    def perfect(sample: Array, timestep: float) -> Array:
        alpha, sigma = math.sqrt(levels[int(timestep)]), math.sqrt(1 - levels[int(timestep)])
        found = {"epsilon": START, "velocity": alpha * START - sigma * CLEAN, "sample": CLEAN}
        return np.asarray(found[prediction])

    run = kind(prediction=prediction, noise=noise, spacing=spacing).start(steps)
    here = levels[run.timesteps.astype(int)]
    path = [math.sqrt(level) * CLEAN + math.sqrt(1 - level) * START for level in [*here, 1.0]]
    found = samples(run, path[0], perfect)
    # What is rounded off a sample weighs 1 / alpha by the time that there is no noise left.
    bound = ROUNDING * (np.abs(START) + np.abs(CLEAN)).max() * (1 + (1 / np.sqrt(here)).sum())
    for step, (one, two) in enumerate(zip(found, path, strict=True)):
        assert np.abs(one - two).max() <= bound, f"after step {step}"


def test_runs_of_one_schedule_know_nothing_of_each_other() -> None:
    solver = DPMSolver()
    alone = samples(solver.start(5))
    first, second = solver.start(5), solver.start(5)
    sample, other = START, -START
    for index, timestep in enumerate(first.timesteps):
        sample = first.step(index, model(sample, timestep), sample)
        other = second.step(index, model(other, timestep), other)
    np.testing.assert_array_equal(sample, alone[-1])


def test_predictions_of_half_precision_are_taken() -> None:
    for made in (DDIM(), DPMSolver(), Euler()):
        step = made.start(5).step(0, model(START, 999).astype(np.float16), START.astype(np.float16))
        assert step.dtype == np.float32
        assert step.shape == START.shape


def test_schedules_are_found_by_name_and_compare_by_their_options() -> None:
    assert schedule("ddim", clip=1.0) == DDIM(clip=1.0)
    assert schedule("euler", shift=3.0) == Euler(shift=3.0)
    assert schedule("dpm-solver++", prediction="velocity") == DPMSolver(prediction="velocity")
    levels = alphas_cumprod("cosine")
    assert hash(DDIM(noise=levels)) == hash(DDIM(noise=levels.tolist()))
    assert DDIM(noise=levels) == DDIM(noise=levels.tolist()) != DDIM(noise="cosine")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dimm", {}, r"\[unknown-schedule\] there is no schedule 'dimm'; did you mean ddim\?"),
        ("ancestral", {}, r"no schedule 'ancestral'; schedules are ddim, euler, dpm-solver\+\+"),
        ("ddim", {"spacings": "leading"}, r"\[unknown-option\] .* 'spacings' of ddim; did you mean spacing\?"),
        ("euler", {"clip": 1.0}, "no option 'clip' of euler; options are prediction, train_steps, shift"),
        ("ddim", {"prediction": "epsylon"}, r"\[unknown-prediction\] .* for DDIM; did you mean epsilon\?"),
        ("dpm-solver++", {"prediction": "flow"}, "'flow' for DPMSolver; predictions are epsilon, velocity, sample"),
        ("euler", {"prediction": "epsilon"}, "no prediction 'epsilon' for Euler; predictions are flow"),
        ("ddim", {"noise": "linar"}, r"no noise 'linar'; did you mean linear\?"),
        ("ddim", {"spacing": "karras"}, "no spacing 'karras'; spacings are leading, linspace, trailing"),
        ("ddim", {"train_steps": 0}, "train_steps is 0; give 1 or more"),
        ("euler", {"train_steps": 0}, "train_steps is 0; give 1 or more"),
        ("ddim", {"train_steps": "many"}, "schedule.* ddim: .*'str'.*; give numbers where numbers are asked for"),
        ("ddim", {"noise": ["much"]}, "schedule.* ddim: .*'much'.*; give numbers where numbers are asked for"),
        ("ddim", {"beta_start": 0.0}, r"betas go from 0.0 to 0.02; give 0 < start <= end < 1"),
        ("ddim", {"beta_start": 0.5}, "betas go from 0.5 to 0.02"),
        ("ddim", {"beta_end": math.nan}, "betas go from 0.0001 to nan"),
        ("ddim", {"steps_offset": -1}, "steps_offset is -1; give 0 or more"),
        ("ddim", {"clip": 0.0}, "clip is 0.0; give more than 0, or none"),
        ("ddim", {"noise": [0.9, 0.5]}, r"the noise has shape \[2\], train_steps is 1000; give one value"),
        ("ddim", {"noise": [0.5, 0.9], "train_steps": 2}, "do not fall from below 1 to above 0"),
        ("ddim", {"noise": [0.9, 0.0], "train_steps": 2}, "do not fall from below 1 to above 0"),
        ("ddim", {"noise": [1.0, 0.5], "train_steps": 2}, "do not fall from below 1 to above 0"),
        ("ddim", {"noise": [math.nan, 0.5], "train_steps": 2}, "do not fall from below 1 to above 0"),
        ("euler", {"shift": 0.0}, "shift is 0.0; give a finite number above 0"),
        ("euler", {"timestep_scale": math.inf}, "timestep_scale is inf; give a finite number above 0"),
    ],
)
def test_options_that_cannot_be_used_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptpassError, match=message):
        schedule(name, **options)


@pytest.mark.parametrize(
    ("made", "steps", "message"),
    [
        (DDIM(), 0, "steps is 0, train_steps is 1000; give 1 to 1000 steps"),
        (DPMSolver(), 1001, "steps is 1001, train_steps is 1000; give 1 to 1000 steps"),
        (Euler(), 0, "steps is 0; give 1 or more"),
        (
            DDIM(steps_offset=1),
            1000,
            "two fall together or one is too late; take fewer steps, or a smaller offset",
        ),
        (DPMSolver(), 1000, "two fall together or one is too late"),
        (DPMSolver(spacing="leading"), 1000, "two fall together or one is too late"),
    ],
)
def test_a_number_of_steps_that_there_is_not_is_refused(made: Schedule, steps: int, message: str) -> None:
    with pytest.raises(OptpassError, match=message):
        made.start(steps)


@pytest.mark.parametrize("made", [DDIM(), DPMSolver(), Euler()])
def test_steps_are_taken_in_order(made: Schedule) -> None:
    run = made.start(2)
    with pytest.raises(OptpassError, match=r"\[step-order\] step 1 came after 0 of 2 steps"):
        run.step(1, START, START)
    run.step(0, START, START)
    with pytest.raises(OptpassError, match="step 0 came after 1 of 2 steps"):
        run.step(0, START, START)
    run.step(1, START, START)
    with pytest.raises(OptpassError, match="step 2 came after 2 of 2 steps"):
        run.step(2, START, START)


def test_a_prediction_of_another_shape_is_refused_and_the_step_can_be_taken_again() -> None:
    run = DDIM().start(2)
    with pytest.raises(OptpassError, match=r"\[prediction-shape\] the prediction has shape \[2, 6, 8\], the sample"):
        run.step(0, np.concatenate([START, START], 1), START)
    run.step(0, START, START)


def test_no_torch_is_needed() -> None:
    text = (
        "import sys; sys.modules['torch'] = None\n"
        "from optpass.runtime.schedules import schedule; print(len(schedule('ddim').start(5).timesteps))"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("5\n", "")
