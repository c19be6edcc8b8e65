"""What cannot be captured, said with the user's line and a way out; and what only looks as if it could."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optpass.capture import capture
from optpass.errors import OptpassError
from tests.capture import models
from tests.capture.test_dynamic import line_of


def refusal(habit: type[nn.Module], *more: torch.Tensor) -> str:
    with pytest.raises(OptpassError) as caught:
        capture((habit(), (models.example(), *more)))
    return str(caught.value)


def test_branch_on_a_value_names_the_line_and_a_way_out() -> None:
    text = refusal(models.Branches)
    assert text.startswith("[data-dependent] `if x.sum() > 0` depends on the value of a tensor")
    assert line_of(models.Branches, "if x.sum") in text
    assert "torch.where or torch.cond" in text


def test_loop_over_a_value_names_the_line() -> None:
    text = refusal(models.LoopsByValue, torch.tensor(3))
    assert "[data-dependent] `for _ in range(int(times))`" in text
    assert line_of(models.LoopsByValue, "for _ in") in text


def test_error_of_the_model_itself_names_the_line() -> None:
    text = refusal(models.FailsItself)
    assert text.startswith("[model-fails] the model fails on its example inputs: RuntimeError")
    assert line_of(models.FailsItself, "@ x") in text


@pytest.mark.parametrize(("habit", "what"), [(models.CountsInBuffer, "count"), (models.WritesItsInput, "x")])
def test_state_is_refused(habit: type[nn.Module], what: str) -> None:
    assert refusal(habit).startswith(f"[mutates-state] the model writes to {what} in each call")


def test_example_is_not_written_to() -> None:
    x = models.example()
    with pytest.raises(OptpassError):
        capture((models.WritesItsInput(), (x,)))
    assert torch.equal(x, models.example())


def test_writing_in_place_inside_the_model_is_followed() -> None:
    module = models.WritesInPlace()
    stage = capture((module, (models.example(),))).main
    assert torch.equal(stage.run(stage.example)[0], module(models.example()))


def test_state_in_python_is_refused() -> None:
    assert refusal(models.CountsInPython).startswith("[not-repeatable]")


@pytest.mark.parametrize(("habit", "code"), [(models.DrawsNoise, "rand_like"), (models.DropsAlways, "dropout")])
def test_random_model_is_refused_with_the_line(habit: type[nn.Module], code: str) -> None:
    text = refusal(habit)
    assert text.startswith("[random-model] the model draws random numbers")
    assert line_of(habit, code) in text


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(OptpassError, match=r"\[weights-not-finite\] weight linear.weight holds NaN or infinity"):
        capture("tests.capture.models:broken_weights")
