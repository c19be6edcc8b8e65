"""Small modules in the forms that captured models and rewritten graphs take."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from optpass.capture import capture
from optpass.program import Stage

WIDTH, HEADS = 32, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], HEADS, WIDTH // HEADS).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        y = self.before(x)
        q, k, v = (self.heads(linear(y)) for linear in (self.query, self.key, self.value))
        y = scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.narrow(gelu(self.wide(self.after(x))))


class Vision(nn.Module):
    """Tokens in, logits out; ``keep`` prunes each sample to its largest tokens between the blocks."""

    def __init__(self, blocks: int = 2, keep: int = 0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 5)
        self.keep = keep

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = tokens
        for block in self.blocks:
            x = block(x)
            if self.keep:
                order = x.norm(dim=-1).topk(self.keep, dim=1).indices.sort(dim=1).values
                x = x[torch.arange(x.shape[0])[:, None], order]
        return {"logits": self.head(x.mean(1))}


class Text(nn.Module):
    """Ids and a padding mask in, logits out; ``form`` is how the mask is written."""

    def __init__(self, form: str, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.form = form

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        length = input_ids.shape[1]
        rows = torch.arange(length)
        lower = rows[:, None] >= rows[None, :]
        padding = attention_mask.bool()[:, None, None, :]
        mask: Tensor | None = None
        if self.form == "lower":
            mask = lower[None, None]
        elif self.form == "lower float":
            mask = torch.where(lower, 0.0, torch.finfo(torch.float32).min)[None, None]
        elif self.form == "window":
            mask = (lower & (rows[:, None] - rows[None, :] < 3))[None, None]
        elif self.form == "padding":
            mask = padding
        elif self.form == "padding float":
            mask = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        elif self.form == "padding and lower":
            mask = padding & lower
        elif self.form == "all":
            mask = (rows >= 0)[None, None, None, :].expand(input_ids.shape[0], 1, length, length)
        for block in self.blocks:
            x = block(x, mask, self.form == "flag")
        return {"logits": x @ self.embed.weight.T}


def stage(module: nn.Module, example: dict[str, Tensor], *dynamic: str) -> Stage:
    return capture((module, (), example), dynamic=dynamic).main


@functools.cache
def vision(blocks: int = 2, keep: int = 0) -> Stage:
    torch.manual_seed(0)
    return stage(Vision(blocks, keep), {"tokens": torch.randn(3, 9, WIDTH)}, "tokens:0=batch:1..6")


@functools.cache
def text(form: str) -> Stage:
    torch.manual_seed(0)
    ids = torch.randint(50, (2, 7))
    padding = (torch.arange(7)[None] < torch.tensor([[7], [4]])).long()
    axes = ("input_ids:1=length:2..12", "attention_mask:1=length:2..12")
    return stage(Text(form), {"input_ids": ids, "attention_mask": padding}, *axes)
