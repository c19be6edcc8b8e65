"""``precision``: what half precision cannot hold stays float32, found on models with each trap planted in them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optpass.capture import capture
from optpass.export import artifact
from optpass.grammar import parse
from optpass.manager import apply
from optpass.passes.base import Converted
from optpass.passes.precision import Precision
from optpass.program import Program, Stage, op_name
from optpass.results import PassRecord

sys.path.insert(0, str(Path(__file__).parents[1]))
import architectures
from small import program

WIDTH = 16


class Trapped(nn.Module):
    """A block with one trap.

    Args:
        trap: ``norm`` squares values of some hundreds; ``mask`` adds -1e9 to scores; ``ids`` computes with ids of some
            thousands in floats; ``choice`` keeps the rows with the largest scores.
    """

    def __init__(self, trap: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trap = trap
        self.embed = nn.Embedding(5000, WIDTH)
        self.attend, self.wide, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        if self.trap == "ids":
            ids = (ids.float() + 1).round().long() - 1
        x = self.embed(ids)
        if self.trap == "norm":
            large = self.wide(x) * 500
            x = large * (large.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        query = self.attend(x)
        scores = query @ query.transpose(1, 2)
        if self.trap == "mask":
            scores = scores + torch.where(ids > 2500, 0.0, -1e9)[:, None]
        x = x + scores.softmax(-1) @ x
        if self.trap == "choice":
            best = self.wide(x)[..., 0].topk(3, 1).indices
            x = x.gather(1, best[..., None].expand(-1, -1, WIDTH))
        return self.out(x)


def trapped(trap: str) -> Program:
    ids = torch.tensor([[4999, 2049, 2051, 4097, 3333, 17], [2500, 4095, 7, 4001, 257, 2047]])
    return capture((Trapped(trap), (ids,), {}))


def converted(source: Program, passes: str) -> tuple[Stage, PassRecord]:
    made = apply(source, parse(passes))
    return made.program.main, made.records[-1]


def dtypes(stage: Stage) -> dict[str, set[torch.dtype]]:
    """The dtypes of the results of each op."""
    found: dict[str, set[torch.dtype]] = {}
    for node in stage.exported.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            found.setdefault(op_name(node), set()).add(node.meta["val"].dtype)
    return found


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_products_and_what_lies_between_are_half_and_the_signature_stays(name: str, dtype: torch.dtype) -> None:
    source = program(mask="padding", head="mean")
    stage, record = converted(source, f"precision(dtype={name})")
    assert record.status == "kept", record
    assert record.error is not None
    assert record.max_error is not None
    assert 0 < record.error <= record.max_error
    assert record.ops == {name: 44, "f32": 0}
    assert (stage.inputs, stage.outputs) == (source.main.inputs, source.main.outputs)
    found = dtypes(stage)
    assert all(found[op] == {dtype} for op in ("linear", "scaled_dot_product_attention", "layer_norm", "gelu", "add"))
    weights = {t.dtype for t in stage.exported.state_dict.values()}
    assert weights == {dtype}


@pytest.mark.parametrize(
    ("trap", "dtype", "single"),
    [
        ("norm", "f16", {"pow", "mean"}),
        ("norm", "bf16", set()),
        ("mask", "f16", {"add", "where"}),
        ("mask", "bf16", {"where"}),
        ("ids", "bf16", {"add", "round", "to"}),
        ("ids", "f16", {"add", "round", "to"}),
    ],
)
def test_what_half_precision_cannot_hold_stays_single(trap: str, dtype: str, single: set[str]) -> None:
    source = trapped(trap)
    stage, record = converted(source, f"precision(dtype={dtype})")
    assert record.status == "kept", record
    assert {text.split()[-1] for text in record.stayed} >= single
    assert dtypes(stage)["linear"] == {getattr(torch, {"f16": "float16", "bf16": "bfloat16"}[dtype])}
    if not single:
        assert record.ops["f32"] == 0
    (found,), (expected,) = stage.results, source.main.results
    assert float((found - expected).abs().max() / expected.abs().max()) == pytest.approx(record.error, rel=1e-3)


class Scaled(nn.Module):
    """Values near the end of the range of float16, and whole numbers that come as floats."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return self.linear((x * 2e4).tanh()) + (places - 4096).cos()


@pytest.mark.parametrize("largest", [1.0, 0.5])
def test_range_is_left_for_larger_values_and_whole_numbers_stay_apart(largest: float) -> None:
    x, places = torch.linspace(-largest, largest, WIDTH)[None], torch.arange(4096.0, 4096.0 + WIDTH)[None]
    _, record = converted(capture((Scaled(), (x, places), {})), "precision(dtype=f16)")
    assert record.status == "kept", record
    # 2e4 and its fourfold: float16 ends at 65504
    assert record.stayed == (["mul", "sub", "tanh"] if largest == 1.0 else ["sub"])


@torch.library.custom_op("optpass_test::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_op_of_another_library_is_given_what_it_was_written_for() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(doubled(self.first(x)))

    stage, record = converted(capture((Foreign(), (torch.randn(2, 4),), {})), "precision")
    assert record.stayed == ["optpass_test.doubled"]
    assert dtypes(stage)["optpass_test.doubled"] == {torch.float32}
    assert dtypes(stage)["linear"] == {torch.bfloat16}


def test_a_choice_is_made_from_the_same_scores() -> None:
    source = trapped("choice")
    stage, record = converted(source, "precision")
    assert record.status == "kept", record
    assert record.ops == {"bf16": 1, "f32": 7}
    assert {node.args[0].meta["val"].dtype for node in stage.module.graph.nodes if op_name(node) == "topk"} == {
        torch.float32
    }
    assert dtypes(stage)["linear"] == {torch.float32, torch.bfloat16}
    assert "" not in record.stayed


def test_a_pass_that_chooses_keeps_what_comes_before_it_single() -> None:
    stage, record = converted(program(head="mean"), "precision,merge(at=1,keep=0.5)")
    assert record.name == "precision"
    assert record.status == "kept", record
    single = {text.rpartition(" ")[0] for text in record.stayed}
    assert {"embed", "layers.0.qkv", "layers.0.mlp.0", "layers.1.qkv"} <= single
    assert not any(path.startswith(("layers.2.", "layers.3.", "layers.1.mlp")) for path in single)
    chosen = [n for n in stage.exported.graph.nodes if op_name(n) in ("topk", "max", "sort")]
    assert chosen
    assert {node.args[0].meta["val"].dtype for node in chosen} <= {torch.float32, torch.int64}


def test_a_smaller_error_leaves_fewer_ops_half() -> None:
    source = program(head="mean")
    _, loose = converted(source, "precision")
    _, tight = converted(source, "precision(max_error=0.004)")
    assert tight.status == "kept", tight
    assert tight.error is not None
    assert tight.error <= 0.004 < (loose.error or 0)
    assert 0 < tight.ops["bf16"] < loose.ops["bf16"]
    assert len(tight.stayed) > 0


def test_an_error_that_nothing_can_hold_is_refused() -> None:
    _, record = converted(program(), "precision(max_error=1e-9)")
    assert record.status == "refused"
    assert record.reason == (
        "[precision] no product can be bf16 within max_error=1.0e-09; allow a larger max_error, or try the other dtype"
    )


def test_where_all_feeds_a_choice_it_is_refused() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).argmax(-1)

    _, record = converted(capture((Picks(), (torch.randn(2, 4),), {})), "precision")
    assert record.reason == (
        "[precision] all products feed a choice of tokens, which bf16 would make another; "
        "leave precision out, or the passes that choose"
    )


def test_an_error_beyond_the_contract_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Precision.convert

    def wrong(self: Precision, stage: Stage) -> Converted:
        made = right(self, stage)
        module = made.stage.module
        next(t for name, t in module.named_buffers() if name.endswith("bfloat16")).mul_(1.5)
        return replace(made, stage=stage.retraced(module))

    monkeypatch.setattr(Precision, "convert", wrong)
    source = program(head="mean")
    stage, record = converted(source, "precision")
    assert record.status == "rolled_back"
    assert record.reason.startswith("the outputs changed by ")
    assert stage is source.main


def engines(stage: Stage, folder: Path, *backends: str) -> list[Any]:
    with artifact.writer(folder / "engine") as new:
        return new.fidelity([new.add(stage, backend, "f32") for backend in backends])


@pytest.mark.parametrize(("trap", "dtype"), [("norm", "f16"), ("mask", "bf16"), ("choice", "bf16")])
def test_engines_compute_the_half_graph(trap: str, dtype: str, tmp_path: Path) -> None:
    stage, record = converted(trapped(trap), f"precision(dtype={dtype})")
    assert record.status == "kept", record
    rows = engines(stage, tmp_path, "onnxruntime", "openvino")
    assert all(row.ok for row in rows), rows
    assert any(row.difference > 0 for row in rows)


def test_inductor_computes_the_half_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = capture((nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), (torch.randn(2, 8),), {}))
    stage, _ = converted(source, "precision")
    rows = engines(stage, tmp_path, "inductor")
    assert all(row.ok for row in rows), rows


def test_files_hold_the_weights_in_half_precision(tmp_path: Path) -> None:
    source = capture((nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)), (torch.randn(2, 256),), {}))
    stage, _ = converted(source, "precision")
    with artifact.writer(tmp_path / "engine") as new:
        sizes = {
            backend: [new.engines[new.add(s, backend, "f32", role=role)].mib(new.folder) for s, role in pairs]
            for backend in ("onnxruntime", "openvino")
            for pairs in [((stage, "main"), (source.main, "dense"))]
        }
    assert all(half < 0.7 * single for half, single in sizes.values()), sizes


ROWS = ("vit", "t5_encoder", "llama", "mixtral_experts")


@pytest.mark.parametrize("name", ROWS)
def test_architectures_hold_the_contract_and_lower(name: str, tmp_path: Path) -> None:
    stage, record = converted(capture(architectures.FACTORIES[name]()), "precision")
    assert record.status == "kept", record
    assert record.ops["bf16"] > (10 if name == "mixtral_experts" else record.ops["f32"])
    rows = engines(stage, tmp_path, "onnxruntime", "openvino")
    assert all(row.ok for row in rows), rows


def test_a_step_is_half_in_each_of_its_forms_and_rows_are_kept_as_before(tmp_path: Path) -> None:
    axes = ["input_ids:0=batch:1..3", "input_ids:1=tokens:2..24"]
    source = capture(architectures.FACTORIES["llama"](), dynamic=axes)
    made = apply(source, parse("precision,cache"))
    record = made.records[-1]
    assert record.name == "precision"
    assert record.status == "kept", record
    step = made.program.deployed[-1]
    assert {spec.dtype for spec in (*step.inputs, *step.outputs)} == {"float32", "int64"}
    assert step.in_place is not None
    for form in (step, step.in_place):
        assert dtypes(form)["linear"] == {torch.bfloat16}
    rows = engines(step, tmp_path, "onnxruntime")
    assert all(row.ok for row in rows), rows
