"""The ONNX graph: equal to eager, and in the form that engines have fused kernels for."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from optpass.capture import capture
from optpass.errors import OptpassError
from optpass.export import onnxruntime
from optpass.export.translate import translate
from optpass.program import Stage
from optpass.runtime.engines.onnxruntime import open_engine
from tests.export import models

ROUNDING = 1e-5
"""Of values around 1 through a few layers of width 32: some hundred roundings of 6e-8 in the worst order."""


def ops(model: ir.Model) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph)


def difference(stage: Stage, model: ir.Model, folder: Path) -> float:
    onnxruntime.save(model, folder / "model.onnx")
    engine = open_engine(folder / "model.onnx", "f32", 1)
    worst = 0.0
    for sizes in stage.trials():
        inputs = stage.resized(sizes)
        for found, expected in zip(engine.run([t.numpy() for t in inputs]), stage.run(inputs), strict=True):
            assert found.shape == tuple(expected.shape)
            worst = max(worst, float(np.abs(found.astype(float) - expected.double().numpy()).max()))
    return worst


def test_attention_is_one_op_without_a_transpose_around_it(tmp_path: Path) -> None:
    stage = models.vision()
    model = translate(stage)
    assert ops(model)["MultiHeadAttention"] == 2
    assert not {"Softmax", "Transpose", "Erf"} & set(ops(model))
    assert difference(stage, model, tmp_path) < ROUNDING


def test_attention_stays_fused_where_tokens_were_gathered_before_it(tmp_path: Path) -> None:
    stage = models.vision(keep=4)
    model = translate(stage)
    assert ops(model)["MultiHeadAttention"] == 2
    assert not {"Softmax", "Transpose", "Range"} & set(ops(model))
    assert difference(stage, model, tmp_path) < ROUNDING


@pytest.mark.parametrize(
    ("form", "causal", "biased"),
    [
        ("flag", True, False),
        ("lower", True, False),
        ("lower float", True, False),
        ("all", False, False),
        ("window", False, True),
        ("padding", False, True),
        ("padding float", False, True),
        ("padding and lower", False, True),
    ],
)
def test_masks_become_a_flag_where_they_are_one_and_a_bias_elsewhere(
    form: str, causal: bool, biased: bool, tmp_path: Path
) -> None:
    stage = models.text(form)
    model = translate(stage)
    attentions = [node for node in model.graph if node.op_type == "MultiHeadAttention"]
    assert len(attentions) == 2
    assert {"unidirectional" in node.attributes for node in attentions} == {causal}
    assert {len(node.inputs) > 3 for node in attentions} == {biased}
    assert difference(stage, model, tmp_path) < ROUNDING


def test_rows_that_attend_to_nothing_give_zero_as_in_torch(tmp_path: Path) -> None:
    stage = models.text("padding")
    ids, padding = stage.example
    empty = padding.clone()
    empty[1] = 0
    onnxruntime.save(translate(stage), tmp_path / "model.onnx")
    (found,) = open_engine(tmp_path / "model.onnx", "f32", 1).run([ids.numpy(), empty.numpy()])
    (expected,) = stage.run((ids, empty))
    assert torch.isfinite(expected).all()
    assert np.abs(found - expected.numpy()).max() < ROUNDING


class Grouped(nn.Module):
    """Four query heads share two key heads."""

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, key * 2, scale=0.3, enable_gqa=True)


def test_grouped_heads_are_repeated_in_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = {"query": torch.randn(2, 4, 5, 8), "key": torch.randn(2, 2, 6, 8)}
    stage = models.stage(Grouped(), example, "query:2=3..9", "key:2=2..9")
    model = translate(stage)
    assert ops(model)["MultiHeadAttention"] == 1
    assert difference(stage, model, tmp_path) < ROUNDING


class Mixed(nn.Module):
    """Relies on type promotion, and on ops known under a second name."""

    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        count = keep.cumsum(-1)
        steps = torch.diff(count, dim=-1)
        step = torch.arange(1 / 14, 1.0, 1 / 14)
        return {"sum": x * count, "steps": steps, "both": keep & (count > 1), "range": step + x[0, 0], "same": x}


def test_types_are_promoted_and_second_names_understood(tmp_path: Path) -> None:
    stage = models.stage(
        Mixed(), {"x": torch.randn(3, 6), "keep": torch.rand(3, 6) > 0.5}, "x:0=n:1..8", "keep:0=n:1..8"
    )
    model = translate(stage)
    onnxruntime.save(model, tmp_path / "model.onnx")
    engine = open_engine(tmp_path / "model.onnx", "f32", 1)
    found = engine.run([t.numpy() for t in stage.example])
    for array, tensor in zip(found, stage.run(stage.example), strict=True):
        assert array.dtype == tensor.numpy().dtype
        np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-6, atol=1e-6)


class Sized(nn.Module):
    """Sizes and whole numbers where the other operand is of another type."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size, half = x.shape[0], x.half()
        return {
            "product": x * size,
            "before": size - x,
            "half": (half * size + half * (size * 0.5)).float(),
            "integers": x.int() * size,
            "truths": (x > 0) * size,
            "fraction": x.long() * (size * 0.5),
            "power": x**size,
            "floor": x // size,
            "larger": x > size - 2,
            "whole": x.long() > size * 0.5,
            "either": torch.where(x > 0, size, x),
            "neither": torch.where(x > 0, 1, 0.5),
            "less": torch.sub(x, 2, alpha=3),
            "first": torch.rsub(x, 1, alpha=2),
            "entropy": torch.special.entr(x),
        }


def test_sizes_and_whole_numbers_take_the_type_of_the_tensors_that_they_meet(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stage = models.stage(Sized(), {"x": torch.randn(3, 4)}, "x:0=n:1..8")
    onnxruntime.save(translate(stage), tmp_path / "model.onnx")
    engine = open_engine(tmp_path / "model.onnx", "f32", 1)
    for sizes in stage.trials():
        inputs = stage.resized(sizes)
        found = engine.run([t.numpy() for t in inputs])
        for spec, array, tensor in zip(stage.outputs, found, stage.run(inputs), strict=True):
            assert array.dtype == tensor.numpy().dtype
            # two products in float16 and their sum, which cancels nothing
            tolerance = 3 * torch.finfo(torch.float16).eps if spec.name == "half" else 1e-6
            np.testing.assert_allclose(array, tensor.numpy(), rtol=tolerance, atol=1e-6)


class Clamped(nn.Module):
    """Limits that are numbers, of several types, and one that is a size."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        whole = (x * 9).long()
        return {
            "both": x.clamp(-0.5, 1),
            "low": x.clamp(min=0),
            "high": x.half().clamp(max=0.25).float(),
            "integers": whole.clamp(min=-2, max=3),
            "short": whole.int().clamp(min=1),
            "size": x.clamp(max=x.shape[0] - 3),
        }


def test_limits_are_constants_of_the_type_of_what_they_limit(tmp_path: Path) -> None:
    stage = models.stage(Clamped(), {"x": torch.randn(3, 40)}, "x:0=n:1..8")
    model = translate(stage)
    # but for the size; other casts are those of the model
    assert (ops(model)["Clip"], ops(model)["CastLike"], ops(model)["Cast"]) == (6, 1, 4)
    assert difference(stage, model, tmp_path) < 1e-6


class Turned(nn.Module):
    """A table of rotations, truth values that are overwritten, and an axis that is dropped if it is one."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = nn.Buffer(torch.polar(torch.ones(12, 4), torch.randn(12, 4)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first, second = self.turns[:6].split([1, 3], dim=1)
        table = torch.cat([second, first], 1)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], 4, 2))
        high, low = x > 0, x > 1
        return {
            "rotated": torch.view_as_real(pairs * table).flatten(-2).squeeze(1),
            "shut": high.masked_fill(low, False),
            "open": (x > 2).masked_fill(low, True),
        }


@pytest.mark.parametrize("dynamic", [[], ["x:0=batch:1..5"]])
def test_complex_tables_truth_values_and_axes_that_stay(dynamic: list[str], tmp_path: Path) -> None:
    stage = models.stage(Turned(), {"x": torch.randn(2, 6, 8)}, *dynamic)
    assert difference(stage, translate(stage), tmp_path) < ROUNDING


class Normed(nn.Module):
    """A convolution and a norm by statistics, in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).half()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layers(x.half())
        return made.float()


def test_what_nobody_reads_of_a_norm_is_not_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stage = models.stage(Normed().eval(), {"x": torch.randn(2, 1, 6, 6)})
    model = translate(stage)
    assert ops(model) == {"Cast": 2, "Conv": 1, "BatchNormalization": 1}
    # values around 1, of nine products and a norm in float16
    assert difference(stage, model, tmp_path) < 9 * torch.finfo(torch.float16).eps


class Ranks(nn.Module):
    """How many entries of each row are positive, taken from another number, as merging does."""

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        return place - (x > 0).to(torch.int64).sum(-1)


def test_counts_are_exact_in_openvino_too(tmp_path: Path) -> None:
    import openvino

    torch.manual_seed(0)
    example = {"x": torch.randn(16, 8, 8), "place": torch.randint(9, (16, 8))}
    stage = models.stage(Ranks(), example, "x:0=n:1..32", "place:0=n:1..32")
    assert difference(stage, translate(stage), tmp_path) == 0
    compiled = openvino.Core().compile_model(str(tmp_path / "model.onnx"), "CPU")
    for sizes in stage.trials():
        inputs = stage.resized(sizes)
        (found,) = compiled([tensor.numpy() for tensor in inputs]).values()
        np.testing.assert_array_equal(found, stage.run(inputs)[0].numpy())


class Square(nn.Module):
    """A square parameter that is added, not multiplied: storing it transposed would go unnoticed by shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return self.table[rows] + x @ self.table.T


class Parted(nn.Module):
    """Tokens in two parts, of sizes that are known or not."""

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        first, second = x.split([2, count - 2], 1)
        left, right = first.split([5, 3], 2)
        return second * (left.sum() - right.sum())


@pytest.mark.parametrize("dynamic", [[], ["x:1=tokens:5..12"]])
def test_parts_are_outputs_of_one_node_and_no_sequence(dynamic: list[str], tmp_path: Path) -> None:
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))
    stage = capture((Parted(), (), {"x": x}), dynamic=dynamic).main
    model = translate(stage)
    assert ops(model)["Split"] == 2
    assert not any("Sequence" in op for op in ops(model))
    assert difference(stage, model, tmp_path) < ROUNDING


def test_a_weight_with_two_uses_is_stored_once_and_as_it_is(tmp_path: Path) -> None:
    stage = models.stage(Square(), {"x": torch.randn(3, 4), "rows": torch.tensor([0, 3, 2])})
    model = translate(stage)
    assert difference(stage, model, tmp_path) < ROUNDING
    assert (
        sum(
            value.const_value is not None and value.const_value.size == 16
            for value in model.graph.initializers.values()
        )
        == 1
    )


def test_the_graph_has_the_names_of_the_specs_and_no_trace_of_this_machine(tmp_path: Path) -> None:
    stage = models.vision()
    model = translate(stage)
    assert [(value.name, str(value.shape)) for value in model.graph.inputs] == [("tokens", "[batch,9,32]")]
    assert [(value.name, str(value.shape)) for value in model.graph.outputs] == [("logits", "[batch,5]")]
    onnxruntime.save(model, tmp_path / "model.onnx")
    written = (tmp_path / "model.onnx").read_bytes()
    assert str(Path(models.__file__).parent).encode() not in written
    assert b"scaled_dot_product_attention(" not in written


def test_the_same_stage_gives_the_same_bytes(tmp_path: Path) -> None:
    stage = models.vision(keep=4)
    for name in ("a", "b"):
        onnxruntime.save(translate(stage), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nodes_grow_in_step_with_depth() -> None:
    counts = [sum(ops(translate(models.vision(blocks))).values()) for blocks in (2, 4, 8)]
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])


def test_weights_too_large_for_one_file_go_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "LARGEST_FILE", 1000)
    stage = models.vision()
    assert difference(stage, translate(stage), tmp_path) < ROUNDING
    assert (tmp_path / "model.onnx.data").is_file()


@torch.library.custom_op("optpass_tests::strange", mutates_args=())
def strange(x: Tensor) -> Tensor:
    return x * 2


@strange.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return strange(self.inner(x) + 1)


def test_an_op_without_a_translation_is_refused_with_its_place() -> None:
    stage = models.stage(Strange(), {"x": torch.randn(3, 4)})
    with pytest.raises(OptpassError, match=r"\[not-lowered\].*strange.*test_translate.py:\d+") as caught:
        translate(stage)
    assert caught.value.exit_code == 2
