"""Fewer nodes, the same numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from optpass.capture import capture
from optpass.export import artifact
from optpass.export.fuse import FEW
from optpass.export.onnxruntime import save
from optpass.export.translate import translate
from optpass.program import Stage


class Siblings(nn.Module):
    """Three layers on one input, of which two have a bias, one that two inputs share, and a norm of Llama."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = nn.Linear(16, 24), nn.Linear(16, 8, bias=False), nn.Linear(16, 8)
        if shared:
            self.value.weight = self.key.weight
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x), self.key(x), self.value(x)
        normed = key * torch.rsqrt(key.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        return torch.cat([query, normed, value], -1)


def stage(shared: bool = False, tokens: int = 5) -> Stage:
    example = {"x": torch.randn(2, tokens, 16)}
    return capture((Siblings(shared).eval(), (), example), dynamic=["x:1=tokens:1..64"]).main


def ops(made: Stage) -> Counter[str]:
    return Counter(node.op_type for node in translate(made).graph)


def test_products_of_one_input_are_one() -> None:
    found = ops(stage())
    assert (found["MatMul"], found["Split"], found["Reciprocal"], found["Div"]) == (1, 1, 0, 1)


def test_products_of_many_rows_stay_apart() -> None:
    found = [ops(stage(tokens=tokens)) for tokens in (FEW // 2, FEW // 2 + 1)]
    assert [(each["MatMul"], each["Split"]) for each in found] == [(1, 1), (3, 0)]


def test_weight_that_something_else_reads_stays_as_it_is() -> None:
    found = ops(stage(shared=True))
    assert found["MatMul"] == 3
    assert not found["Split"]


@pytest.mark.parametrize("shared", [False, True])
def test_numbers_are_those_of_the_module(shared: bool, tmp_path: Path) -> None:
    made = stage(shared)
    with artifact.writer(tmp_path / "engine") as new:
        for backend in ("onnxruntime", "openvino"):
            new.add(made, backend, "f32")
        assert all(entry.ok for entry in new.fidelity())


def test_norm_is_one_node_in_onnx_runtime(tmp_path: Path) -> None:
    made = stage()
    save(translate(made), tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    import onnx

    assert "SimplifiedLayerNormalization" in {
        node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node
    }
    (found,) = session.run(None, {"x": made.example[0].numpy()})
    assert np.allclose(found, made.results[0].numpy(), atol=1e-6)


def test_norms_have_the_one_output_that_is_read() -> None:
    """Mean and deviation, which torch's translation names as well, are refused by other readers of ONNX."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    model = translate(capture((Normed(), (torch.randn(2, 16),), {})).main)
    assert [len(node.outputs) for node in model.graph if node.op_type == "LayerNormalization"] == [1]
