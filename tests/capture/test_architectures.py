"""All architectures are captured, with the outputs of the module."""

from __future__ import annotations

import pytest
import torch

from optpass.capture import capture
from tests.architectures import FACTORIES, NAMES


@pytest.mark.parametrize("name", NAMES)
def test_capture_gives_the_outputs_of_the_module(name: str) -> None:
    module, args, kwargs = FACTORIES[name]()
    stage = capture((module, args, kwargs)).main
    with torch.no_grad():
        result = module(*args, **kwargs)
    first = result if isinstance(result, torch.Tensor) else result[0]
    expected = dict(result) if isinstance(result, dict) else {"output": first}
    got = dict(zip([spec.name for spec in stage.outputs], stage.run(stage.example), strict=True))
    tensors = {key: value for key, value in expected.items() if isinstance(value, torch.Tensor)}
    assert tensors
    for key, value in tensors.items():
        # a module may take a fused kernel where the tracer does not, and sum in another order
        torch.testing.assert_close(got[key], value, atol=1e-6, rtol=1e-6)


def test_no_architecture_is_lost() -> None:
    assert len(NAMES) >= 30


def test_nested_outputs_are_named_by_their_path() -> None:
    names = [spec.name for spec in capture(FACTORIES["clip_dual"]()).main.outputs]
    assert names[:2] == ["logits_per_image", "logits_per_text"]
    assert names[-1] == "vision_model_output_pooler_output"
