"""A diffusion transformer of 49 tokens for 28x28 images of one channel; nothing in it knows of caching.

Paper: Scalable Diffusion Models with Transformers, arXiv 2212.09748 (blocks with adaptive layer norm, zero at first).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 1000
"""Steps of the noise that training draws from: the timestep is 0 to 999."""
CLASSES = 10
"""Labels 0 to 9; label 10 is none, as guidance asks for it."""


class Sinusoids(nn.Module):
    """A number for each sample, ``[batch]``, to a vector ``[batch, width]``; ``scale`` brings it to 0 to 1000."""

    rates: Tensor

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("rates", scale * torch.exp(-math.log(10_000) * torch.arange(128) / 128), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, number: Tensor) -> Tensor:
        """``[batch]`` to ``[batch, width]``."""
        angles = number[:, None] * self.rates
        found: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], -1))
        return found


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens ``[batch, tokens, width]``, moved and scaled by vectors ``[batch, width]``."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Self-attention, then a GELU MLP, each behind a norm that the condition modulates, each gated by it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``[batch, tokens, width]`` and the condition ``[batch, width]`` to the former's shape."""
        batch, tokens, width = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, -1)
        qkv = self.qkv(modulated(self.norm1(x), shift1, scale1))
        query, key, value = qkv.view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + gate1[:, None] * self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        x = x + gate2[:, None] * self.mlp(modulated(self.norm2(x), shift2, scale2))
        return x


class Head(nn.Module):
    """A modulated norm and a linear layer, zero at first."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, outputs)
        for layer in (self.modulation, self.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``[batch, tokens, width]`` to ``[batch, tokens, outputs]``."""
        shift, scale = self.modulation(F.silu(condition)).chunk(2, -1)
        found: Tensor = self.linear(modulated(self.norm(x), shift, scale))
        return found


class FashionDiT(nn.Module):
    """Predicts the velocity of the noise, ``alpha * noise - sigma * image``, of patches of 4x4 pixels."""

    def __init__(self, width: int = 192, depth: int = 8, heads: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 32, 3, 1, 1), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU(), nn.Conv2d(64, width, 3, 2, 1)
        )
        self.positions = nn.Parameter(torch.randn(1, 49, width) * 0.02)
        self.time = Sinusoids(width)
        self.labels = nn.Embedding(CLASSES + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head = Head(width, 16)

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """The velocity ``[batch, 1, 28, 28]`` of noisy images of that shape.

        Args:
            sample: noisy images.
            timestep: ``[batch]`` float, 0 to 999.
            label: ``[batch]`` int64, 0 to 9, or 10 for none.
        """
        condition = self.time(timestep) + self.labels(label)
        x = self.stem(sample).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        patches = self.head(x, condition).view(-1, 7, 7, 4, 4)
        velocity: Tensor = patches.permute(0, 1, 3, 2, 4).reshape(-1, 1, 28, 28)
        return velocity
