"""The recipe of fashion-dit: twenty minutes on one CPU core, nothing in it knows of caching. A cut-off run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from optpass.zoo import diffusion
from optpass.zoo.fashion_dit import quality
from optpass.zoo.fashion_dit.model import CLASSES, STEPS, FashionDiT
from optpass.zoo.fashion_vit import data

BATCHES, SCHEDULED, BATCH = 1250, 2000, 64
UNLABELLED = 0.1
"""Share of the images that are shown without their label, as guidance needs it."""
JUDGED = 300
"""Samples that the written weights are judged by."""


def train(output: Path, progress: diffusion.Progress) -> float:
    """Train and write ``model.safetensors`` (float16) and ``training.json`` into ``output``.

    Returns:
        Share of samples, 50 steps of DDIM and a guidance of 2, that fashion-vit sees as what was asked for.
    """
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = FashionDiT().train()
    weights = output / "model.safetensors"
    seconds = diffusion.fit(model, _batches, _loss, BATCHES, SCHEDULED, weights, progress)
    model.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    labels = np.arange(JUDGED) % CLASSES
    found = quality.judged(_samples(model.eval(), torch.from_numpy(labels)).numpy(), labels)
    facts = {"steps": BATCHES, "images": BATCHES * BATCH, "seconds": round(seconds)}
    diffusion.write_log(output, {**facts, "test_agreement": found.agreement, "test_distance": found.distance}, model)
    return found.agreement


def _batches(done: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = data.whole("train")
    pixels = torch.from_numpy(data.pixels(images))
    known = torch.from_numpy(labels)
    size = min(BATCH, len(pixels))
    for step in range(done, BATCHES):
        rng = np.random.default_rng(step)
        pick = torch.from_numpy(rng.choice(len(pixels), size, replace=False))
        hidden = torch.from_numpy(rng.random(size) < UNLABELLED)
        yield pixels[pick], known[pick].masked_fill(hidden, CLASSES)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    timestep = torch.randint(STEPS, (len(images),))
    level = diffusion.cosine(STEPS)[timestep].view(-1, 1, 1, 1)
    noise = torch.randn_like(images)
    noisy = level.sqrt() * images + (1 - level).sqrt() * noise
    velocity = level.sqrt() * noise - (1 - level).sqrt() * images
    error: Tensor = model(noisy, timestep.float(), labels).float() - velocity
    return error.pow(2).mean()


@torch.no_grad()
def _samples(model: nn.Module, labels: Tensor, steps: int = 50, guidance: float = 2.0) -> Tensor:
    """Images ``[n, 1, 28, 28]`` in [-1, 1] by DDIM, arXiv 2010.02502, with its noise left out."""
    noise = torch.Generator().manual_seed(0)
    done = []
    levels = diffusion.cosine(STEPS)
    for part in torch.split(labels, 100):
        x = torch.randn(len(part), 1, 28, 28, generator=noise)
        both = torch.cat([part, torch.full_like(part, CLASSES)])
        for step in range(STEPS - STEPS // steps, -1, -(STEPS // steps)):
            wanted, free = model(torch.cat([x, x]), torch.full((len(both),), float(step)), both).chunk(2)
            velocity = free + guidance * (wanted - free)
            signal, sigma = levels[step].sqrt(), (1 - levels[step]).sqrt()
            clean, kind = signal * x - sigma * velocity, sigma * x + signal * velocity
            level = levels[step - STEPS // steps] if step else torch.ones(())
            x = level.sqrt() * clean + (1 - level).sqrt() * kind
        done.append(x)
    return torch.cat(done)
