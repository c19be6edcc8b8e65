"""Operations and tokens of each block, held against torch's own counter and against a formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import optpass
from optpass import cost, manager
from optpass.capture import capture
from optpass.grammar import parse
from optpass.program import Program, Stage
from optpass.structure import analyse
from optpass.zoo.fashion_vit import entry
from tests import small


def counted(stage: Stage) -> int:
    """What torch counts while the stage runs; its attention on CPUs is counted only where it is written out."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stage.run(stage.example)
    return counter.get_total_flops()


def applied(program: Program, passes: str) -> manager.Outcome:
    return manager.apply(program, parse(passes), verify=False)


@pytest.mark.parametrize("options", [{}, {"mask": "padding", "rotary": True}, {"head": "dense"}, {"causal": True}])
@pytest.mark.parametrize("passes", ["prune(selector=norm,keep=0.5,at=1)", "prune(keep=[0.5,0.8],at=[0,2],place=block)"])
def test_operations_are_those_that_torch_counts(options: dict[str, Any], passes: str) -> None:
    program = small.program(**options)
    after = applied(program, passes)
    assert after.ok, after.records
    assert cost.total(analyse(program.main)) == counted(program.main)
    assert cost.total(analyse(after.program.main)) == counted(after.program.main)


class Convolutions(nn.Module):
    """Every kind of product that ``small`` lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(6, 12, 3, stride=2, groups=3)
        self.turned = nn.ConvTranspose2d(12, 5, 2, groups=1)
        self.line = nn.Conv1d(5, 4, 3)
        self.weight = nn.Parameter(torch.randn(4, 7, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.line(self.turned(self.grouped(x)).flatten(2))
        x = torch.einsum("bcl,chk->blhk", x, self.weight)
        return torch.addmm(torch.ones(3), x.flatten(0, 2), torch.ones(3, 3)) @ torch.ones(3)


def test_convolutions_and_einsum_are_counted_as_torch_counts_them() -> None:
    program = capture((Convolutions(), (torch.randn(2, 6, 9, 9),)))
    assert cost.total(analyse(program.main)) == counted(program.main) + 2 * 3 * 2 * 23 * 7  # it leaves out the last


def test_blocks_of_a_vision_transformer_are_counted_one_by_one() -> None:
    program = capture("fashion-vit")
    module, args, kwargs = entry.factory()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*args, **kwargs)
    eager = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    after = applied(program, "prune(selector=random,keep=0.5,at=[0,2])")
    layers = cost.layers(analyse(program.main), analyse(after.program.main), after.records)
    assert [layer.path for layer in layers] == [f"blocks.{i}" for i in range(6)]
    assert [layer.dense_tokens for layer in layers] == [197] * 6
    assert [layer.tokens for layer in layers] == [197, 99, 99, 50, 50, 50]
    for layer in layers:
        assert layer.dense_flops == eager[f"FashionViT.{layer.path}"] == block_flops(197, 197)
    leaving = [99, 99, 50, 50, 50, 50]
    assert [layer.flops for layer in layers] == [
        block_flops(layer.tokens, left) for layer, left in zip(layers, leaving, strict=True)
    ]


def block_flops(entering: int, leaving: int) -> int:
    """Attention on the tokens that enter, the rest of the block on those that are left, in a batch of eight."""
    width, hidden = 128, 512
    attention = entering * width * 4 * width + 2 * entering * entering * width
    return 2 * 8 * (attention + leaving * 2 * width * hidden)


def test_dynamic_sizes_count_as_in_the_example() -> None:
    inputs = {"x": torch.randn(2, 18, 6), "lengths": torch.tensor([18, 13]), "bias": torch.randn(2, 18, 18)}
    sizes = {"x:0": "batch:2..6", "lengths:0": "batch:2..6", "bias:0": "batch:2..6"}
    program = capture((small.Small(), (), inputs), dynamic=[f"{key}={value}" for key, value in sizes.items()])
    after = applied(program, "prune(selector=norm,keep=0.5,at=1)")
    assert cost.total(analyse(after.program.main)) == counted(after.program.main)
    static = cost.total(analyse(applied(small.program(), "prune(selector=norm,keep=0.5,at=1)").program.main))
    assert cost.total(analyse(after.program.main)) == static * len(program.main.example[0]) / 2


def test_tower_that_was_reduced_is_the_one_reported() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.big, self.little = (
                nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(n))
                for n in (3, 2)
            )

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            for layer in self.big:
                x = layer(x)
            for layer in self.little:
                y = layer(y)
            return x.mean(1) + y.mean(1)

    program = capture((Two().eval(), (torch.randn(2, 20, 16), torch.randn(2, 10, 16))))
    after = applied(program, "prune(selector=norm,keep=0.5,at=little.0)")
    layers = cost.layers(analyse(program.main), analyse(after.program.main), after.records)
    assert [(layer.path, layer.dense_tokens, layer.tokens) for layer in layers] == [
        ("little.0", 10, 10),
        ("little.1", 10, 5),
    ]


# the preview, and what optimize records


def test_preview_tells_what_optimize_does(tmp_path: Any) -> None:
    source = (small.Small(), (), dict(zip(("x", "lengths", "bias"), small.program().main.example, strict=True)))
    passes = "prune(selector=norm,keep=0.5,at=[1,2])"
    told = optpass.preview(source, passes)
    done = optpass.optimize(source, passes, out=tmp_path / "engine", seconds=0)
    kept = [record.model_copy(update={"status": "placed", "probes": told.passes[0].probes}) for record in done.passes]
    assert told.ok
    assert told.passes == kept
    assert told.layers == optpass.load(tmp_path / "engine").manifest.layers
    assert sum(layer.flops for layer in told.layers) < told.flops < told.dense_flops


def test_preview_without_passes_changes_nothing() -> None:
    told = optpass.preview("fashion-vit", backend=["onnxruntime", "openvino:bf16"])
    assert told.flops == told.dense_flops
    assert (told.kind, told.engines) == ("vision", ["onnxruntime-f32", "openvino-bf16"])
    assert all(layer.tokens == layer.dense_tokens and layer.flops == layer.dense_flops for layer in told.layers)


def test_refused_pass_is_told_with_its_reason_and_the_rest_may_be_skipped_to() -> None:
    told = optpass.preview("fashion-vit", "prune(keep=0.5,at=9),merge(keep=0.5,at=0)")
    assert not told.ok
    assert [record.status for record in told.passes] == ["refused"]
    assert told.passes[0].reason.startswith("[no-site] at=9 names no block")
    skipped = optpass.preview("fashion-vit", "prune(keep=0.5,at=9),merge(keep=0.5,at=0)", on_fail="skip")
    assert skipped.ok
    assert [layer.tokens for layer in skipped.layers] == [197, 99, 99, 99, 99, 99]
