"""The recipe of fashion-world: an hour on one CPU core, nothing in it knows of caching. A cut-off run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from optpass.zoo import diffusion
from optpass.zoo.fashion_vit import data
from optpass.zoo.fashion_world import entry, scenes
from optpass.zoo.fashion_world.model import FashionWorld

BATCHES, SCHEDULED, BATCH = 3500, 3500, 64
BLUR = 0.2
"""Largest noise on the past frames: in a rollout they are the model's own."""
ROLLOUTS, FRAMES, STEPS = 50, 16, 25
"""Scenes, frames in each, and steps of denoising that the written weights are judged by."""


def train(output: Path, progress: diffusion.Progress) -> float:
    """Train and write ``model.safetensors`` (float16) and ``training.json`` into ``output``.

    Returns:
        Mean ratio in dB of peak to error, over 16 frames that follow one another from the two that were given.
    """
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = FashionWorld().train()
    weights = output / "model.safetensors"
    seconds = diffusion.fit(model, _batches, _loss, BATCHES, SCHEDULED, weights, progress)
    model.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    facts = {"steps": BATCHES, "frames": BATCHES * BATCH, "seconds": round(seconds)}
    ratio = _judged(model.eval())
    diffusion.write_log(output, {**facts, "test_psnr": ratio}, model)
    return ratio


def _batches(done: int) -> Iterator[scenes.Scenes]:
    items = scenes.items(data.bytes_of(data.whole("train")[0]))
    for step in range(done, BATCHES):
        yield scenes.draw(items, BATCH, 3, seed=step)


def _loss(model: nn.Module, batch: scenes.Scenes) -> Tensor:
    frames = torch.from_numpy(batch.frames)
    past, wanted = frames[:, :2].flatten(1, 2), frames[:, 2]
    past = past + BLUR * torch.rand(len(past), 1, 1, 1) * torch.randn_like(past)
    share = torch.sigmoid(torch.randn(len(past)))
    noise = torch.randn_like(wanted)
    noisy = torch.lerp(wanted, noise, share.view(-1, 1, 1, 1))
    action = torch.from_numpy(batch.actions[:, 2])
    error: Tensor = model(noisy, share, past, action).float() - (noise - wanted)
    return error.pow(2).mean()


@torch.no_grad()
def _judged(model: nn.Module) -> float:
    drawn = entry.rollouts(ROLLOUTS, FRAMES)
    truth, actions = torch.from_numpy(drawn.frames), torch.from_numpy(drawn.actions)
    past = truth[:, :2]
    noise = torch.Generator().manual_seed(0)
    ratios = []
    for frame in range(2, FRAMES + 2):
        x = torch.randn(past[:, 0].shape, generator=noise)
        for step in range(STEPS, 0, -1):
            share = torch.full((len(x),), step / STEPS)
            x = x - model(x, share, past.flatten(1, 2), actions[:, frame]) / STEPS
        past = torch.stack([past[:, 1], x.clamp(-1, 1)], 1)
        ratios.append(10 * torch.log10(4 / (past[:, 1] - truth[:, frame]).pow(2).mean()))
    return round(float(np.mean(ratios)), 3)
