"""Names of inputs and outputs, whatever containers a model uses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optpass.capture import capture
from optpass.errors import OptpassError
from tests.capture import models


@pytest.mark.parametrize(
    ("habit", "names"),
    [
        (models.Plain, ["output"]),
        (models.ReturnsMuch, ["logits", "hidden_0", "hidden_2_0", "pair_left", "pair_right"]),
        (models.ReturnsRecord, ["first", "rest_0"]),
        (models.ReturnsOddNames, ["a_b", "a_b_2", "scores_last_layer", "output_0"]),
        (models.ReturnsOneTwice, ["output_0", "output_1", "output_2"]),
    ],
)
def test_outputs_are_named_by_their_path(habit: type[nn.Module], names: list[str]) -> None:
    stage = capture((habit(), (models.example(),))).main
    assert [spec.name for spec in stage.outputs] == names
    assert len(stage.run(stage.example)) == len(names)


def test_inputs_are_named_by_their_path() -> None:
    x = models.example()
    rest = {"scale": torch.ones(1), "bias": x}
    stage = capture((models.TakesMuch(), ({"x": x, "pair": [x, x + 1]}, x * 2), rest)).main
    assert [spec.name for spec in stage.inputs] == [
        "batch_x",
        "batch_pair_0",
        "batch_pair_1",
        "more_0",
        "scale",
        "bias",
    ]


def test_output_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(OptpassError, match="output output_1 is of type int, not a tensor"):
        capture((models.ReturnsNumber(), (models.example(),)))


def test_too_many_arguments_are_refused() -> None:
    with pytest.raises(OptpassError, match="forward takes 1 positional arguments and 2 are given"):
        capture((models.Plain(), (models.example(), models.example())))
