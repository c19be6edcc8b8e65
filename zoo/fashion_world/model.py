"""A denoiser of the next frame, 64 tokens of the image and 64 of its depth; nothing in it knows of caching."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optpass.zoo.fashion_dit.model import Block, Head, Sinusoids
from optpass.zoo.fashion_world.scenes import ACTIONS, SIZE


def _stem(width: int) -> nn.Sequential:
    """The noisy frame and the two past ones of one modality, ``[batch, 3, 32, 32]``, to ``[batch, width, 8, 8]``."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1), nn.SiLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU(), nn.Conv2d(64, width, 3, 2, 1)
    )


class FashionWorld(nn.Module):
    """Predicts ``noise - frame``, the velocity of a straight path from the next frame to noise.

    Paper: Flow Matching for Generative Modeling, arXiv 2210.02747.
    """

    def __init__(self, width: int = 128, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.side = SIZE // 4
        self.image = _stem(width)
        self.depth = _stem(width)
        self.positions = nn.Parameter(torch.randn(1, 2 * self.side**2, width) * 0.02)
        self.time = Sinusoids(width, scale=1000.0)
        self.actions = nn.Embedding(len(ACTIONS), width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.head = Head(width, 16)

    def forward(self, sample: Tensor, timestep: Tensor, past: Tensor, action: Tensor) -> Tensor:
        """The velocity ``[batch, 2, 32, 32]`` of noisy frames of that shape, image and depth.

        Args:
            sample: noisy frames.
            timestep: ``[batch]`` float, share of the noise: 1 is nothing else.
            past: ``[batch, 4, 32, 32]``, the frame before the last and the last one, image and depth of each.
            action: ``[batch]`` int64, an index of ``scenes.ACTIONS``.
        """
        condition = self.time(timestep) + self.actions(action)
        image = self.image(torch.cat([sample[:, :1], past[:, 0:1], past[:, 2:3]], 1))
        depth = self.depth(torch.cat([sample[:, 1:], past[:, 1:2], past[:, 3:4]], 1))
        x = torch.cat([image.flatten(2), depth.flatten(2)], 2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        patches = self.head(x, condition).view(-1, 2, self.side, self.side, 4, 4)
        velocity: Tensor = patches.permute(0, 1, 2, 4, 3, 5).reshape(-1, 2, SIZE, SIZE)
        return velocity
