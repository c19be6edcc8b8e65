"""A small transformer that the core's tests rewrite: every feature a coercion exists for, weights that matter."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optpass.capture import capture
from optpass.grammar import parse
from optpass.manager import Placed, rewrite
from optpass.program import Program
from optpass.rewrite import Rewritten
from optpass.structure import analyse

WIDTH, HEADS, TOKENS = 32, 4, 18


class Layer(nn.Module):
    """Pre-norm block whose attention has what the flags of ``Small`` say."""

    def __init__(self, rotary: bool, positions_inside: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.rotary = rotary
        self.positions = nn.Parameter(torch.randn(1, TOKENS, WIDTH)) if positions_inside else None

    def forward(self, x: Tensor, mask: Tensor | None, angles: Tensor, causal: bool) -> Tensor:
        batch, tokens, width = x.shape
        h = self.norm1(x)
        if self.positions is not None:
            h = h + self.positions
        q, k, v = self.qkv(h).view(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = (t * angles.cos() + torch.cat([-t[..., 4:], t[..., :4]], -1) * angles.sin() for t in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class Small(nn.Module):
    """Four blocks and a head.

    Args:
        mask: ``padding`` hides the last tokens of each sample, ``bias`` adds a full matrix of the sample's own.
        head: ``class`` reads the first token, ``mean`` all of them, ``dense`` returns each as a 3x6 grid.
    """

    def __init__(
        self,
        *,
        mask: str = "",
        rotary: bool = False,
        positions: bool = False,
        causal: bool = False,
        head: str = "class",
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, WIDTH)
        self.layers = nn.ModuleList(Layer(rotary, positions) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)
        self.mask, self.causal, self.kind = mask, causal, head
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.35)
        self.register_buffer("angles", torch.arange(TOKENS)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03] * 2))

    def forward(self, x: Tensor, lengths: Tensor, bias: Tensor) -> Tensor:
        tokens = x.shape[1]
        mask = None
        if self.mask == "padding":
            mask = (torch.arange(tokens)[None] < lengths[:, None])[:, None, None]
        elif self.mask == "bias":
            mask = bias[:, None]
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, mask, self.angles, self.causal)
        x = self.head(self.norm(x))
        if self.kind == "class":
            return x[:, 0]
        return x.mean(1) if self.kind == "mean" else x.view(len(x), 3, 6, 5).permute(0, 3, 1, 2)


def program(**options: object) -> Program:
    """``Small`` captured with a batch of two."""
    torch.manual_seed(1)
    inputs = {
        "x": torch.randn(2, TOKENS, 6),
        "lengths": torch.tensor([TOKENS, 13]),
        "bias": torch.randn(2, TOKENS, TOKENS),
    }
    return capture((Small(**options), (), inputs))  # type: ignore[arg-type]


def rewritten(passes: str, **options: Any) -> tuple[Rewritten, dict[str, torch.Tensor]]:
    """The rewritten graph of a small model, and the tensors that define its maps."""
    model = program(**options).main
    structure = analyse(model)
    (made,) = parse(passes)
    sites = made.sites(structure)
    assert isinstance(sites, list)
    result = rewrite(structure, [Placed(made, tuple(sites))], tap=True)
    taps = result.module(*model.example)[len(model.outputs) :]
    return result, dict(zip(result.tapped, taps, strict=True))
