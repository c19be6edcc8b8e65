"""Dynamic dimensions: declared, kept inside their ranges, and never silently constant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from optpass.capture import capture
from optpass.errors import OptpassError
from optpass.program import Range, Stage
from tests.architectures import FACTORIES
from tests.capture import models


def of(habit: type[nn.Module], dynamic: Sequence[str]) -> Stage:
    return capture((habit(), (models.example(),)), dynamic=dynamic).main


def refusal(habit: type[nn.Module], *dynamic: str) -> str:
    with pytest.raises(OptpassError) as caught:
        of(habit, dynamic)
    return str(caught.value)


def line_of(habit: type[nn.Module], code: str) -> str:
    """``models.py:41`` of the line of ``forward`` that holds ``code``."""
    first = habit.forward.__code__.co_firstlineno
    text = Path(models.__file__).read_text().splitlines()
    return f"models.py:{next(i for i in range(first, len(text)) if code in text[i - 1])}"


def test_length_of_a_language_model() -> None:
    module, _, kwargs = FACTORIES["llama"]()
    stage = capture((module, (), kwargs), dynamic=["input_ids:1=2..64"]).main
    assert stage.inputs[0].shape == (2, "input_ids_1")
    assert stage.outputs[0].shape == (2, "input_ids_1", 128)
    assert stage.ranges == {"input_ids_1": Range(2, 64)}
    for length in (2, 3, 37, 64):
        ids = torch.randint(4, 128, (2, length))
        with torch.no_grad():
            assert torch.equal(stage.run([ids])[0], module(ids, use_cache=False).logits)


def test_name_shared_between_inputs() -> None:
    module, _, kwargs = FACTORIES["bert"]()
    dynamic = [f"{name}:{axis}" for name in kwargs for axis in ("0=batch:1..4", "1=tokens:2..64")]
    stage = capture((module, (), kwargs), dynamic=dynamic).main
    assert [spec.shape for spec in stage.inputs] == [("batch", "tokens")] * 2
    assert stage.outputs[0].shape == ("batch", 2)
    assert stage.run(stage.resized({"batch": 1, "tokens": 9}))[0].shape == (1, 2)


def test_example_is_drawn_inside_the_range() -> None:
    stage = of(models.Plain, ["x:1=20..30"])
    assert stage.example[0].shape == (2, 21, 8)
    assert torch.equal(stage.example[0][:, 5], stage.example[0][:, 0])


def test_example_on_the_lower_end_is_moved_inside() -> None:
    assert of(models.Plain, ["x:1=5..30"]).example[0].shape == (2, 6, 8)


def test_dimension_that_became_constant_is_an_error_with_the_line() -> None:
    text = refusal(models.FixesItsLength, "x:1=2..64")
    assert text.startswith("[dynamic-constant] x:1 is declared dynamic, but the model fixes it to 5 by ")
    assert line_of(models.FixesItsLength, "view") in text


def test_input_that_was_forgotten_is_named() -> None:
    module, _, kwargs = FACTORIES["bert"]()
    with pytest.raises(OptpassError, match="declare input_ids:1 and attention_mask:1 under one name"):
        capture((module, (), kwargs), dynamic=["input_ids:1=2..64"])


def test_sizes_that_are_always_equal_want_one_name() -> None:
    module, _, kwargs = FACTORIES["bert"]()
    with pytest.raises(OptpassError, match=r"\[dynamic-equal\] attention_mask:1 and input_ids:1 are always equal"):
        capture((module, (), kwargs), dynamic=["input_ids:1=2..64", "attention_mask:1=2..64"])


def test_range_that_the_model_narrows_is_an_error_with_the_line() -> None:
    text = refusal(models.TakesAnotherPathWhenLong, "x:1=2..64")
    line = line_of(models.TakesAnotherPathWhenLong, "if x.shape")
    assert text == (f"[dynamic-range] x:1 is declared 2..64, but the model holds for 2..6 by {line}; declare x:1=2..6")


def test_range_past_the_position_table_is_an_error_with_the_line() -> None:
    text = refusal(models.HasPositions, "x:1=2..17")
    assert "the model itself fails at x:1=17: IndexError" in text
    assert line_of(models.HasPositions, "self.positions(") in text
    assert of(models.HasPositions, ["x:1=2..16"]).ranges["x_1"].maximum == 16


def test_size_of_one_that_takes_another_path_is_an_error() -> None:
    text = refusal(models.TakesAnotherPathAtOne, "x:0=1..4")
    assert text.startswith("[dynamic-range] at x:0=1 the captured graph does not give the output of the model")
    assert of(models.TakesAnotherPathAtOne, ["x:0=2..4"]).ranges["x_0"] == Range(2, 4)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("x:1", "[dynamic-grammar] 'x:1' is no dynamic dimension; write input:axis=min..max"),
        ("x:-1=2..5", "is no dynamic dimension"),
        ("x:1=9..5", "[dynamic-range] the range of x:1=9..5 is empty"),
        ("y:1=2..5", "[dynamic-input] y:1=2..5: no input is named y; inputs are x"),
        ("x:7=2..5", "[dynamic-axis] x:7=2..5: x has 3 dimensions; use an axis below 3"),
    ],
)
def test_declaration_that_is_wrong(text: str, part: str) -> None:
    assert part in refusal(models.Plain, text)


def test_declaration_that_contradicts_itself() -> None:
    assert "x:1 is declared twice" in refusal(models.Plain, "x:1=2..5", "x:1=2..5")
    assert "size is given two ranges" in refusal(models.Plain, "x:0=size:2..5", "x:1=size:2..6")
