"""The driver that draws samples, on stages that are run eagerly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from optpass.capture import capture
from optpass.errors import OptpassError
from optpass.export import artifact
from optpass.runtime.denoise import Denoiser, Run, Taken, drawn
from optpass.runtime.schedules import DDIM, asked
from tests.denoisers import SAMPLER, Eager, Small, example, program, session, stages

Array = NDArray[Any]

SHAPE = (2, 2, 8, 8)
LABEL = np.array([1, 3])
ROUNDING = 1e-5
"""Of samples around 1 after some steps, each of a few layers of width 16 that round by 6e-8 of their values."""


def interval(dynamic: bool = False) -> Denoiser:
    """Computes steps 0 to 2, then each fourth, and the last one."""
    return session(stages("policy=interval,form=split", dynamic=dynamic))


def world() -> Denoiser:
    return session(stages("policy=worldcache"))


def dense(dynamic: bool = False, form: str = "plain") -> Denoiser:
    return session([program(form, dynamic).main])


def calls(model: Denoiser) -> tuple[int, int]:
    """Of the engine that computes, and of the other one."""
    assert isinstance(model.opened, Eager)
    assert isinstance(model.full, Eager)
    return model.full.calls, model.opened.calls


# samples


@pytest.mark.parametrize(
    "sampler", ["ddim", SAMPLER, "dpm-solver++(prediction=velocity,noise=cosine)", "euler(timestep_scale=1000)"]
)
def test_a_model_is_sampled_by_the_schedule_that_is_named(sampler: str) -> None:
    model = dense()
    found = model.denoise(SHAPE, sampler=sampler, steps=7, seed=3, label=LABEL)
    way = asked(sampler).start(7)
    sample = way.initial(drawn(SHAPE, 3))
    for index, time in enumerate(way.timesteps):
        times = np.full(2, time, np.float32)
        sample = way.step(index, model.run(sample=sample, timestep=times, label=LABEL)["output"], sample)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, sample)
    assert model.last == Taken(7, list(range(7)), [])
    schedule = model.denoise(SHAPE, sampler=asked(sampler), steps=7, seed=3, label=LABEL)
    np.testing.assert_array_equal(found, schedule)


def test_the_sampler_of_the_artifact_is_that_which_is_meant() -> None:
    named = dense().denoise(SHAPE, sampler=SAMPLER, steps=5, label=LABEL)
    np.testing.assert_array_equal(dense().denoise(SHAPE, steps=5, label=LABEL), named)
    assert not np.array_equal(dense().denoise(SHAPE, sampler=DDIM(), steps=5, label=LABEL), named)


class Guided(nn.Module):
    """A model whose input has the name of an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Small(depth=3)

    def forward(self, sample: Tensor, timestep: Tensor, guidance: Tensor) -> Tensor:
        found: Tensor = self.model(sample, timestep, guidance)
        return found


def test_inputs_that_are_named_as_arguments_are_given_apart() -> None:
    inputs = example()
    given = {"sample": inputs["sample"], "timestep": inputs["timestep"], "guidance": inputs["label"]}
    model = session([capture((Guided().eval(), (), given)).main])
    expected = dense().denoise(SHAPE, sampler=SAMPLER, steps=5, label=LABEL)
    found = model.denoise(SHAPE, sampler=SAMPLER, steps=5, conditions={"guidance": LABEL})
    np.testing.assert_array_equal(found, expected)
    frames = model.rollout(1, SHAPE, sampler=SAMPLER, steps=5, conditions=lambda frame, made: {"guidance": LABEL})
    np.testing.assert_array_equal(frames[:, 0], expected)


def test_samples_are_the_same_whatever_batch_they_are_drawn_in() -> None:
    model = interval(dynamic=True)
    labels = np.array([1, 3, 0, 2, 4])
    whole = model.denoise((5, *SHAPE[1:]), steps=12, seed=7, label=labels)
    assert model.last == Taken(12, [0, 1, 2, 6, 10, 11], [])
    for rows in (slice(0, 1), slice(1, 3), slice(3, 5)):
        shape = (len(labels[rows]), *SHAPE[1:])
        part = model.denoise(shape, steps=12, seed=7 + rows.start, label=labels[rows])
        np.testing.assert_allclose(part, whole[rows], rtol=0, atol=ROUNDING)
    assert np.abs(whole[0] - whole[1]).max() > 0.1


def test_noise_depends_on_the_seed_of_each_sample_alone() -> None:
    noise = drawn((4, 3, 5), 10)
    np.testing.assert_array_equal(noise[2:], drawn((2, 3, 5), 12))
    assert noise.dtype == np.float32
    assert len(np.unique(noise)) == noise.size
    model = dense()
    first = model.denoise(SHAPE, steps=3, seed=4, label=LABEL)
    np.testing.assert_array_equal(model.denoise(drawn(SHAPE, 4), steps=3, label=LABEL), first)
    np.testing.assert_array_equal(model.denoise(list(SHAPE), steps=3, seed=4, label=LABEL), first)
    assert np.abs(model.denoise(SHAPE, steps=3, seed=5, label=LABEL) - first).max() > 0.1


def test_a_step_is_computed_by_one_call_and_tried_by_one_where_it_may_be_predicted() -> None:
    model = interval()
    model.denoise(SHAPE, steps=12, label=LABEL)
    # at 6 and 10 three in a row were predicted, which is all that may be
    assert model.last.computed == [0, 1, 2, 6, 10, 11]
    assert calls(model) == (6, 6)


def test_progress_is_told_after_each_step() -> None:
    told: list[tuple[int, int]] = []
    dense().denoise(SHAPE, steps=4, label=LABEL, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_variance_that_the_model_learned_is_no_part_of_what_it_predicts() -> None:
    model = dense(form="variance")
    assert model.outputs[0].shape == [2, 4, 8, 8]
    noise = drawn(SHAPE, 0)
    step = model.begin(1).step(noise, 500.0, label=LABEL)
    whole = model.run(sample=noise, timestep=np.full(2, 500, np.float32), label=LABEL)["output"]
    np.testing.assert_array_equal(step, whole[:, :2])
    assert model.denoise(SHAPE, steps=3, label=LABEL).shape == SHAPE


# guidance

NONE = np.array([4, 4])


def guided(model: Denoiser, scale: float, batch: int = 2, **options: Any) -> Array:
    given = {"label": LABEL[:batch], "unconditional": {"label": NONE[:batch]}, **options}
    return model.denoise((batch, *SHAPE[1:]), steps=9, guidance=scale, **given)


def test_guidance_goes_from_one_prediction_to_the_other_and_beyond() -> None:
    model, way = dense(), asked(SAMPLER).start(9)
    sample = way.initial(drawn(SHAPE, 0))
    for index, time in enumerate(way.timesteps):
        times = np.full(2, time, np.float32)
        wanted, free = (model.run(sample=sample, timestep=times, label=x)["output"] for x in (LABEL, NONE))
        sample = way.step(index, free + 3.0 * (wanted - free), sample)
    np.testing.assert_array_equal(guided(model, 3.0), sample)
    np.testing.assert_array_equal(guided(model, 1.0), model.denoise(SHAPE, steps=9, label=LABEL))
    # with nothing of the conditions, what is left is the model under the others
    np.testing.assert_allclose(guided(model, 0.0), model.denoise(SHAPE, steps=9, label=NONE), rtol=0, atol=ROUNDING)


def test_guidance_in_one_call_is_that_in_two() -> None:
    together, apart = interval(dynamic=True), interval()
    one, two = guided(together, 2.5), guided(apart, 2.5)
    np.testing.assert_allclose(one, two, rtol=0, atol=2.5 * ROUNDING)
    assert together.last == apart.last == Taken(9, [0, 1, 2, 6, 8], [])
    assert calls(together) == (5, 4)
    assert calls(apart) == (10, 8)


def test_guidance_without_room_for_both_in_a_call_takes_two() -> None:
    together, apart = interval(dynamic=True), interval(dynamic=True)
    labels = np.arange(4)
    options: dict[str, Any] = {"steps": 5, "label": labels, "guidance": 2.0, "unconditional": {"label": np.full(4, 4)}}
    four = apart.denoise((4, *SHAPE[1:]), **options)  # of 6 at most
    assert calls(apart)[0] == 8
    options |= {"label": labels[:3], "unconditional": {"label": np.full(3, 4)}}
    three = together.denoise((3, *SHAPE[1:]), **options)
    assert calls(together)[0] == 4
    np.testing.assert_allclose(four[:3], three, rtol=0, atol=2 * ROUNDING)


class Masked(nn.Module):
    """The model, and a table that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Small(depth=1)

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor, table: Tensor) -> Tensor:
        found: Tensor = self.inner(sample, timestep, label) * table
        return found


def test_what_all_samples_share_is_not_doubled_for_guidance() -> None:
    table = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    axes = [f"{name}:0=batch:1..6" for name in example()]
    model = session([capture((Masked().eval(), (), {**example(), "table": table}), dynamic=axes).main])
    assert isinstance(model.opened, Eager)
    given: dict[str, Any] = {"steps": 4, "label": LABEL, "table": table.numpy(), "guidance": 2.0}
    found = model.denoise(SHAPE, unconditional={"label": NONE}, **given)
    assert model.opened.calls == 4
    same = model.denoise(SHAPE, unconditional={"label": NONE, "table": table.numpy()}, **given)
    assert model.opened.calls == 12
    np.testing.assert_allclose(found, same, rtol=0, atol=2 * ROUNDING)
    other = model.denoise(SHAPE, unconditional={"label": NONE, "table": table.numpy() / 2}, **given)
    assert np.abs(other - same).max() > 0.01


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"guidance": 2.0}, "guidance is 2, and nothing is said of what to go away from; give unconditional"),
        (
            {"guidance": 2.0, "unconditional": {"class": NONE}},
            "unconditional has class, which is no condition of the model; it has label",
        ),
    ],
)
def test_guidance_that_lacks_something_is_told(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptpassError) as raised:
        dense().denoise(SHAPE, label=LABEL, **options)
    assert sentence in str(raised.value)


# frames


def test_frames_follow_one_another() -> None:
    model = interval(dynamic=True)
    seen: list[tuple[int, list[Array]]] = []

    def conditions(frame: int, made: list[Array]) -> dict[str, Array]:
        seen.append((frame, [array.copy() for array in made]))
        return {"label": np.array([frame % 5, (frame + 1) % 5])}

    done: list[int] = []
    found = model.rollout(
        3, SHAPE, conditions=conditions, seed=20, steps=5, progress=lambda step, steps: done.append(step)
    )
    assert found.shape == (2, 3, *SHAPE[1:])
    assert done == [1, 2, 3, 4, 5] * 3
    assert model.last == Taken(15, [0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 14], [])
    for frame, before in seen:
        assert len(before) == frame
        for past, array in enumerate(before):
            np.testing.assert_array_equal(array, found[:, past])
        alone = model.denoise(SHAPE, steps=5, seed=20 + 2 * frame, label=np.array([frame % 5, (frame + 1) % 5]))
        np.testing.assert_array_equal(found[:, frame], alone)


# knobs


def test_knobs_take_the_place_of_what_the_engine_was_built_with() -> None:
    model = world()
    computed: dict[str, list[int]] = {}
    tried: dict[str, dict[str, Any]] = {
        "built": {},
        "all": {"threshold": 0.0},
        "none in a row": {"streak": 0},
        "late": {"warmup": 9, "threshold": 1e9},
        "few": {"warmup": 3, "streak": 20, "threshold": 1e9},
    }
    for name, knobs in tried.items():
        model.denoise(SHAPE, steps=14, label=LABEL, knobs=knobs)
        computed[name] = model.last.computed
    assert computed["all"] == computed["none in a row"] == list(range(14))
    assert computed["late"] == [*range(9), 13]
    assert computed["few"] == [0, 1, 2, 13]
    assert computed["built"][:5] == [0, 1, 2, 3, 4]
    assert 6 <= len(computed["built"]) < 14


@pytest.mark.parametrize(
    ("model", "steps", "knobs", "sentence"),
    [
        (interval, 5, {"threshold": 0.1}, "the engine has no threshold; it has warmup, streak"),
        (dense, 5, {"streak": 2}, "the engine has no streak; it has none"),
        (world, 5, {"threshold": -0.1}, "threshold is -0.1; give 0 or more"),
        (world, 0, {}, "steps is 0; give 1 or more"),
    ],
)
def test_a_knob_that_does_not_fit_is_told(model: Any, steps: int, knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptpassError) as raised:
        model().begin(steps, **knobs)
    assert sentence in str(raised.value)


# bad input

NOISE = drawn(SHAPE, 0)


@pytest.mark.parametrize(
    ("code", "sentence", "options"),
    [
        ("unknown-schedule", "there is no schedule 'ddmi'; did you mean ddim?", {"sampler": "ddmi"}),
        ("usage", "'ddim(' is no sampler", {"sampler": "ddim("}),
        ("unknown-option", "there is no option 'shift' of ddim", {"sampler": "ddim(shift=3)"}),
        ("input-missing", "input label is missing", {"label": None}),
        ("input-unknown", "the engine has no input 'text'", {"text": LABEL}),
        ("input-type", "input label is a list", {"label": [1, 3]}),
        ("input-dtype", "input label is float64, the engine takes int64", {"label": LABEL / 1.0}),
        ("input-shape", "input sample has 3 along dimension 0, the engine takes 2", {"noise": (3, 2, 8, 8)}),
        ("input-shape", "input sample has 9 along dimension 2, the engine takes 8", {"noise": (2, 2, 9, 8)}),
        ("input-rank", "input sample has 3 dimensions, the engine takes 4", {"noise": NOISE[0]}),
        ("usage", "noise of shape [0, 2, 8, 8] has no sample", {"noise": (0, 2, 8, 8)}),
        ("usage", "noise of shape [] has no sample", {"noise": ()}),
        ("schedule", "steps is 0", {"steps": 0}),
        ("schedule", "steps is 1001", {"steps": 1001}),
    ],
)
def test_bad_input_is_told(code: str, sentence: str, options: dict[str, Any]) -> None:
    model = interval()
    given = {"noise": SHAPE, "label": LABEL, "steps": 5, **options}
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(OptpassError) as raised:
        model.denoise(given.pop("noise"), **given)
    assert raised.value.refusal.code == code
    assert sentence in str(raised.value)
    assert model.last == Taken()


def test_an_artifact_without_a_sampler_asks_for_one() -> None:
    model = session([program().main], sampler="")
    with pytest.raises(OptpassError) as raised:
        model.denoise(SHAPE, label=LABEL)
    assert str(raised.value) == "[usage] no sampler is named; name one, such as sampler='ddim(prediction=epsilon)'"


def test_no_frames_are_told() -> None:
    with pytest.raises(OptpassError, match=r"\[usage\] frames is 0; give 1 or more"):
        dense().rollout(0, SHAPE, conditions=lambda frame, made: {"label": LABEL})


# one step at a time


def begun(model: Denoiser, steps: int = 6, taken: int = 2) -> Run:
    run = model.begin(steps)
    for number in range(taken):
        run.step(NOISE, 900.0 - number, label=LABEL)
    return run


def test_a_time_is_one_number_or_one_for_each_sample() -> None:
    model = dense()
    one = model.begin(1).step(NOISE, 300.0, label=LABEL)
    each = model.begin(1).step(NOISE, np.array([300, 300], np.float32), label=LABEL)
    np.testing.assert_array_equal(one, each)
    other = model.begin(1).step(NOISE, np.array([300, 700], np.float32), label=LABEL)
    np.testing.assert_array_equal(one[0], other[0])
    assert np.abs(one[1] - other[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("code", "sentence", "time"),
    [
        ("input-shape", "input timestep has 3 along dimension 0, the engine takes 2", np.zeros(3, np.float32)),
        ("input-rank", "input timestep has 2 dimensions, the engine takes 1", np.zeros((2, 1), np.float32)),
        ("input-dtype", "input timestep is float64, the engine takes float32", np.zeros(2)),
    ],
)
def test_a_time_of_another_form_is_told_and_costs_no_step(code: str, sentence: str, time: Array) -> None:
    run = begun(interval())
    with pytest.raises(OptpassError) as raised:
        run.step(NOISE, time, label=LABEL)
    assert raised.value.refusal.code == code
    assert sentence in str(raised.value)
    run.step(NOISE, 800.0, label=LABEL)
    assert run.taken == Taken(3, [0, 1, 2], [])


@pytest.mark.parametrize(
    ("sentence", "sample", "time", "label"),
    [
        ("label is not what it began with", NOISE, 800.0, LABEL[::-1].copy()),
        ("timestep 899 does not go on from 899", NOISE, 899.0, LABEL),
        ("timestep 950 does not go on from 899", NOISE, 950.0, LABEL),
        ("it began with sample of [2, 2, 8, 8], this one is [1, 2, 8, 8]", NOISE[:1], 800.0, LABEL[:1]),
    ],
)
def test_a_step_of_another_run_is_refused(sentence: str, sample: Array, time: float, label: Array) -> None:
    run = begun(interval(dynamic=True))
    with pytest.raises(OptpassError) as raised:
        run.step(sample, time, label=label)
    expected = f"[stale-state] this step does not belong to run {run.number}: {sentence}; begin a new run"
    assert str(raised.value) == expected
    # and does no harm
    run.step(NOISE, 800.0, label=LABEL)
    assert run.taken.steps == 3


def test_time_goes_on_in_one_direction_whichever_it_is() -> None:
    run = interval().begin(5)
    for time in (0.1, 0.2, 0.5):
        run.step(NOISE, time, label=LABEL)
    with pytest.raises(OptpassError, match=r"timestep 0.4 does not go on from 0.5"):
        run.step(NOISE, 0.4, label=LABEL)


def test_a_run_ends_with_its_steps() -> None:
    run = begun(interval(), steps=2)
    with pytest.raises(OptpassError, match=r"\[stale-state\].*: all of its 2 steps are taken; begin a new run"):
        run.step(NOISE, 1.0, label=LABEL)
    assert run.number != begun(interval()).number


def test_what_a_caller_does_to_its_arrays_changes_no_run() -> None:
    model = interval()
    sample, label = NOISE.copy(), LABEL.copy()
    run, other = model.begin(6), model.begin(6)
    for number in range(6):
        sample[:], label[:] = NOISE, LABEL
        found = run.step(sample, 900.0 - number, label=label)
        sample[:], label[:] = 7, 0
        np.testing.assert_array_equal(found, other.step(NOISE, 900.0 - number, label=LABEL))


# what was kept, damaged


@pytest.mark.parametrize("options", ["policy=worldcache", "policy=interval,form=split"])
def test_a_kept_feature_that_is_no_number_is_computed_instead_and_told(options: str) -> None:
    model = session(stages(options))
    key = next(info.name for info in model.state if info.name.endswith(("feature_0", "difference_0_0")))
    knobs = {"threshold": 1e9} if "world" in options else {}

    class Hurt(Run):
        def step(self, sample: Array, timestep: Array | float, **conditions: Array) -> Array:
            if self.taken.steps == 8:
                self._state[key] = self._state[key].copy()
                self._state[key].reshape(-1)[3] = np.nan
            return super().step(sample, timestep, **conditions)

    sound = model.denoise(SHAPE, steps=10, label=LABEL, knobs=knobs)
    computed = model.last.computed
    assert 8 not in computed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optpass.runtime.denoise.Run", Hurt)
        with pytest.warns(RuntimeWarning, match=r"what was kept is no number at step 8: computed instead"):
            found = model.denoise(SHAPE, steps=10, label=LABEL, knobs=knobs)
    assert model.last == Taken(10, sorted([*computed, 8]), [8])
    assert np.isfinite(found).all()
    # a step that is computed is nearer to the model than one that is not
    exact = dense().denoise(SHAPE, steps=10, label=LABEL)
    assert np.abs(found - exact).max() < np.abs(sound - exact).max()


# without torch

WITHOUT_TORCH = """
import sys
for name in ("torch", "onnx", "onnxscript", "networkx", "transformers"):
    sys.modules[name] = None
import numpy as np
import optpass

model = optpass.load(sys.argv[1], threads=1)
away = {"guidance": 2.0, "unconditional": {"label": np.array([4, 4])}}
found = model.denoise((2, 2, 8, 8), steps=9, label=np.array([1, 3]), **away)
print(type(model).__name__, model.manifest.sampler)
print(model.last.computed)
np.save(sys.argv[2], found)
"""


def test_samples_are_drawn_where_importing_torch_fails(tmp_path: Path) -> None:
    with artifact.writer(tmp_path / "engine", sampler=SAMPLER) as new:
        for stage in stages("policy=interval,form=split"):
            new.add(stage, "onnxruntime", "f32")
        new.finish()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "engine"), str(tmp_path / "found.npy")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [f"Denoiser {SAMPLER}", "[0, 1, 2, 6, 8]"], done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), guided(interval(), 2.0), rtol=0, atol=2 * ROUNDING)
