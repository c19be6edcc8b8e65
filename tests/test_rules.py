"""Rules on forms that no single architecture holds, each held by the three probes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optpass.capture import capture
from optpass.grammar import parse
from optpass.manager import Placed, apply, rewrite
from optpass.structure import analyse

WIDTH, TOKENS = 32, 18


class Model(nn.Module):
    """Blocks of attention and a head; weights of unit gain, so that every token matters."""

    def __init__(self, head: Callable[[Tensor], Tensor], *, first: bool = False, depth: int = 4, masked: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(depth))
        self.mlp = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.head, self.first, self.masked = head, first, masked
        for parameter in self.parameters():
            parameter.data.normal_(0, 1 / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        mask = (x[:, None, :, 0] > -1).unsqueeze(1).expand(-1, 1, x.shape[1], -1) if self.masked else None
        for qkv, mlp in zip(self.qkv, self.mlp, strict=True):
            h = qkv(x).transpose(0, 1) if self.first else qkv(x)
            q, k, v = (t.unflatten(2, (4, 8)).transpose(1, 2) for t in h.chunk(3, -1))
            mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
            x = x + (mixed.transpose(0, 1) if self.first else mixed)
            x = x + mlp(x).relu()
        return self.head(x)


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(1),
    "sum": lambda x: x.sum(1),
    "pooled": lambda x: F.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1),
    "maximum": lambda x: x.amax(1),
    "attention": lambda x: ((x @ torch.ones(WIDTH, 1)).softmax(1) * x).sum(1),
    "columns": lambda x: x[:, :, torch.tensor([3, 1, 1])].mean(1),
    "gathered": lambda x: x.gather(2, x[..., :4].argsort(2)).mean(1),
    "written": lambda x: torch.slice_scatter(torch.empty_like(x), x * 2, 2, 0, WIDTH).mean(1),
}


@pytest.mark.parametrize(
    "passes", ["prune(at=1,keep=0.5,selector='norm')", "merge(at=1,r=4)", "transform(at=1,keep=0.5)"]
)
@pytest.mark.parametrize("head", HEADS)
def test_heads_follow_the_tokens(head: str, passes: str) -> None:
    program = capture((Model(HEADS[head]), (torch.randn(2, TOKENS, WIDTH),), {}), dynamic=())
    (record,) = apply(program, parse(passes)).records
    assert record.status == "kept", record.reason


@pytest.mark.parametrize("passes", ["prune(at=1,keep=0.5,selector='norm')", "merge(at=1,r=4)"])
def test_tokens_in_front_of_the_batch_are_weighed_by_their_own_sizes(passes: str) -> None:
    model = Model(lambda x: x.mean(0), first=True)
    (record,) = apply(capture((model, (torch.randn(TOKENS, 2, WIDTH),), {}), dynamic=()), parse(passes)).records
    assert record.status == "kept", record.reason
    assert record.tokens[0] == TOKENS


def test_logits_of_any_size_leave_a_dropped_key_hidden() -> None:
    model = Model(lambda x: x.mean(1))
    for layer in model.qkv:
        layer.weight.data *= 20
    program = capture((model, (torch.randn(2, TOKENS, WIDTH),), {}), dynamic=())
    (record,) = apply(program, parse("prune(at=1,keep=0.5,selector='norm')")).records
    assert record.status == "kept", record.reason


def test_the_graph_grows_by_the_same_for_each_block() -> None:
    """A mask that all blocks read goes through one more map at each, whatever the number of maps before."""

    def size(depth: int) -> int:
        model = Model(lambda x: x.mean(1), depth=depth, masked=True)
        structure = analyse(capture((model, (torch.randn(2, TOKENS, WIDTH),), {}), dynamic=()).main)
        (made,) = parse("prune(at=all,r=1,selector='norm')")
        sites = made.sites(structure)
        assert isinstance(sites, list)
        return len(rewrite(structure, [Placed(made, tuple(sites))]).module.graph.nodes)

    assert size(12) - size(8) == size(8) - size(4)
