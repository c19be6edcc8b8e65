"""What analysis finds: exact expectations for a handful of models, and for each form that a model may take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optpass.capture import capture
from optpass.structure import Structure, analyse

WIDTH, TOKENS = 32, 18


def found(module: nn.Module, *inputs: Tensor) -> Structure:
    """The analysis of a module with fixed weights."""
    return analyse(capture((module.eval(), inputs, {}), dynamic=()).main)


class Layer(nn.Module):
    """A pre-norm block around a given attention of ``[batch, tokens, WIDTH]``, 4 heads of 8."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], first: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))
        self.attend, self.first = attend, first

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        h = h.transpose(0, 1) if self.first else h
        q, k, v = (t.unflatten(2, (4, 8)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        mixed = self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        x = x + (mixed.transpose(0, 1) if self.first else mixed)
        return x + self.mlp(self.norm2(x))


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def matmuls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * 8**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) / 8**0.5).softmax(-1), v)


def exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    above = (scores - scores.amax(-1, keepdim=True)).exp()
    return above / above.sum(-1, keepdim=True) @ v


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), -3e38)
    return scores.softmax(-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    open_ = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    return torch.where(open_, q @ k.mT, torch.tensor(-3e38)).softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 30 * ((q @ k.mT) / 30).tanh()
    return (scores + torch.full((TOKENS, TOKENS), -3e38).triu(1)).softmax(-1) @ v


def sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT, torch.zeros(2, 4, TOKENS, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


class Model(nn.Module):
    """Three layers; ``head`` is what the output reads."""

    def __init__(self, attend: Callable[..., Tensor] = fused, head: str = "mean", first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inward, self.layers = nn.Linear(8, WIDTH), nn.ModuleList(Layer(attend, first) for _ in range(3))
        self.first, self.head = first, head

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        for layer in self.layers:
            x = layer(x)
        reads = {"mean": lambda: x.mean(0 if self.first else 1), "class": lambda: x[:, 0], "last": lambda: x[:, -1]}
        return reads[self.head]()


@pytest.mark.parametrize("attend", [fused, matmuls, einsums, exponentials, masked, chosen, capped, sink])
def test_attention_is_found_however_it_is_written(attend: Callable[..., Tensor]) -> None:
    structure = found(Model(attend), torch.randn(2, TOKENS, 8))
    assert structure.main is not None
    assert [block.path for block in structure.main.blocks] == ["layers.0", "layers.1", "layers.2"]
    for block in structure.main.blocks:
        assert block.attention is not None
        assert tuple(block.attention.key.meta["val"].shape) == (2, 4, TOKENS, 8)
    assert structure.main.space.causal == (attend in (masked, chosen, capped))


@pytest.mark.parametrize(("head", "protected"), [("mean", (0, 0)), ("class", (1, 0)), ("last", (0, 1))])
def test_what_the_output_reads_by_its_place_is_protected(head: str, protected: tuple[int, int]) -> None:
    structure = found(Model(head=head), torch.randn(2, TOKENS, 8))
    assert structure.main is not None
    assert (structure.main.space.prefix, structure.main.space.suffix) == protected


def test_tokens_in_front_of_the_batch_are_told_by_the_queries() -> None:
    """The input is ``[tokens, batch, features]`` as well, so that only attention tells which is which."""
    structure = found(Model(first=True), torch.randn(TOKENS, 2, 8))
    assert structure.main is not None
    space = structure.main.space
    assert (space.size, space.token_dim, space.batch_dim) == (TOKENS, 0, 1)


def test_a_layer_that_is_called_again_is_a_block_of_its_own() -> None:
    class Shared(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.inward(x)
            for _ in range(3):
                x = self.layers[0](x)
            return x.mean(1)

    structure = found(Shared(), torch.randn(2, TOKENS, 8))
    assert structure.main is not None
    assert [block.path for block in structure.main.blocks] == ["layers.0", "layers.0@1", "layers.0@2"]


def test_a_stage_with_pooled_tokens_is_a_tower_of_its_own() -> None:
    class Staged(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](self.inward(x))
            x = F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2)
            return self.layers[2](self.layers[1](x)).mean(1)

    structure = found(Staged(), torch.randn(2, TOKENS, 8))
    assert [(len(t.blocks), t.space.size) for t in structure.towers] == [(1, TOKENS), (2, TOKENS // 2)]


def test_tokens_that_join_leave_the_tower_whole() -> None:
    class Joined(Model):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x = torch.cat([self.inward(y), self.layers[0](self.inward(x))], 1)
            return self.layers[2](self.layers[1](x)).mean(1)

    structure = found(Joined(), torch.randn(2, TOKENS, 8), torch.randn(2, 5, 8))
    (tower,) = structure.towers
    assert [tower.space_at(block).size for block in tower.blocks] == [TOKENS, TOKENS + 5, TOKENS + 5]


def test_a_stream_of_rows_and_columns_is_no_token_axis() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer[0](x).flatten(1, 2).unsqueeze(1)
            return (x + F.scaled_dot_product_attention(h, h, h).squeeze(1).unflatten(1, (6, 3))).mean((1, 2))

    structure = found(Windows(), torch.randn(2, 6, 3, WIDTH))
    assert structure.main is None
    ((_, reason),) = structure.unplaced
    assert reason == "its residual stream [2, 6, 3, 32] is no [batch, tokens, features]"


def test_features_in_front_of_tokens_are_not_taken_for_tokens() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv1d(WIDTH, 3 * WIDTH, 1)])

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(1, (4, 8)).mT for t in self.layers[0](x).chunk(3, 1))
            return (x + F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2)).mean(2)

    structure = found(Turned(), torch.randn(2, WIDTH, TOKENS))
    assert structure.main is None
    ((_, reason),) = structure.unplaced
    assert reason == "its residual stream [2, 32, 18] is no [batch, tokens, features]"


def test_a_decoder_is_a_tower_beside_its_encoder() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder = nn.ModuleList([nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True) for _ in range(2)])
            self.decoder = nn.ModuleList([nn.TransformerDecoderLayer(WIDTH, 4, 48, batch_first=True) for _ in range(2)])

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            for layer in self.encoder:
                x = layer(x)
            for layer in self.decoder:
                y = layer(y, x, tgt_is_causal=True, tgt_mask=nn.Transformer.generate_square_subsequent_mask(7))
            return y

    structure = found(Both(), torch.randn(2, TOKENS, WIDTH), torch.randn(2, 7, WIDTH))
    assert [(t.path, len(t.blocks), t.space.size, t.space.causal) for t in structure.towers] == [
        ("", 2, TOKENS, False),
        ("", 2, 7, True),
    ]
    assert structure.main is structure.towers[0]
    assert [[a.cross for a in block.attentions] for block in structure.towers[1].blocks] == [[False, True]] * 2
