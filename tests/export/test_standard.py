"""The graph in standard ops computes what the graph with ONNX Runtime's own ops does."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from optpass.errors import OptpassError
from optpass.export import fidelity
from optpass.export.standard import halved, standard
from optpass.export.translate import translate
from optpass.export.translations import CONTRIB
from optpass.program import Stage
from tests.export import models

FORMS = ["lower", "window", "padding", "padding and lower", "padding float", "flag", "all"]


@functools.cache
def translated(form: str) -> tuple[Stage, ir.Model]:
    stage = models.vision(keep=4) if form == "vision" else models.text(form)
    return stage, translate(stage)


def run(model: ir.Model, stage: Stage) -> Sequence[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    raw = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    named = {spec.name: tensor.numpy() for spec, tensor in zip(stage.inputs, stage.example, strict=True)}
    return list(session.run(None, named))


def difference(found: Sequence[np.ndarray], stage: Stage) -> float:
    """The largest of any output, relative to its largest value."""
    pairs = zip(found, (result.numpy() for result in stage.results), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("form", ["vision", *FORMS])
def test_it_has_no_op_of_another_domain_and_computes_the_same(form: str, attention: bool) -> None:
    stage, model = translated(form)
    made = standard(model, attention=attention)
    kinds = {node.op_type for node in made.graph}
    assert {node.domain for node in made.graph} == {""}
    assert ("Attention" in kinds) == attention
    assert difference(run(made, stage), stage) <= fidelity.tolerance(stage, "f32")
    assert any(node.domain == CONTRIB for node in model.graph), "the shared graph was changed"


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("form", ["vision", "padding", "padding float", "flag"])
def test_half_of_it_is_within_what_half_precision_rounds(form: str, attention: bool) -> None:
    stage, model = translated(form)
    made = standard(model, attention=attention)
    halved(made, ir.DataType.FLOAT16)
    found = run(made, stage)
    assert all(np.isfinite(array).all() for array in found)
    assert 0 < difference(found, stage) <= fidelity.tolerance(stage, "f16")
    weights = {value.const_value.dtype for value in made.graph.initializers.values() if value.const_value is not None}
    assert ir.DataType.FLOAT16 in weights


class Counted(nn.Module):
    """Places by a product with a triangle, and a product with a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(x.shape[1])
        upper = (rows[:, None] <= rows[None, :]).float()
        return (x[..., 0] > 0).float() @ upper, self.linear(x)


def test_what_is_counted_by_products_stays_in_float32() -> None:
    """Bfloat16 has no integer above 256 but even ones."""
    stage = models.stage(Counted(), {"x": torch.ones(1, 300, 4)})
    made = standard(translate(stage))
    halved(made, ir.DataType.BFLOAT16)
    products = [node for node in made.graph if node.op_type == "MatMul"]
    assert len(products) == 2
    assert [str(node.inputs[1].name).endswith("/half") for node in products] == [False, True]


class PartlyHalf(nn.Module):
    """A product and an attention that are float16 as captured, and a product in float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8).half(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.first(x.half()).unflatten(2, (2, 4)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        made: Tensor = self.last(mixed.transpose(1, 2).flatten(2).float())
        return made


@pytest.mark.parametrize("attention", [True, False])
def test_what_is_half_already_stays_as_it_was_chosen(attention: bool) -> None:
    stage = models.stage(PartlyHalf(), {"x": torch.randn(2, 5, 8)})
    made = standard(translate(stage), attention=attention)
    before = {node for node in made.graph if node.op_type == "Cast"}
    halved(made, ir.DataType.FLOAT16)
    added = [node.attributes["to"].as_int() for node in made.graph if node.op_type == "Cast" and node not in before]
    assert added == [int(ir.DataType.FLOAT16), int(ir.DataType.FLOAT)], "of the product in float32 alone"
    assert 0 < difference(run(made, stage), stage) <= fidelity.tolerance(stage, "f16")


def test_an_op_without_a_standard_form_is_named_with_its_module() -> None:
    _, model = translated("vision")
    other = model.clone()
    node = next(node for node in other.graph if node.op_type == "Gelu")
    node.op_type = "BiasSplitGelu"
    with pytest.raises(OptpassError, match=r"com.microsoft.BiasSplitGelu has no form in standard ONNX here in bloc"):
        standard(other)
