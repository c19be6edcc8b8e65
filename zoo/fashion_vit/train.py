"""The recipe of fashion-vit: two cycles of two epochs, an hour on two CPU cores, no token reduction anywhere in it.

Each cycle warms up and anneals the learning rate anew, from the weights as the cycle before wrote them, so that a run
that was interrupted goes on with the next cycle.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from optpass.zoo.fashion_vit import data
from optpass.zoo.fashion_vit.model import FashionViT

CYCLES, EPOCHS, BATCH, LEARNING_RATE = 2, 2, 128, 1e-3

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the steps in all, and a line of text."""


def train(output: Path, progress: Progress) -> float:
    """Train and write ``model.safetensors`` (float16) and ``training.json`` into ``output`` after each cycle.

    Returns:
        Top-1 on the whole test split, of the weights as written.
    """
    output.mkdir(parents=True, exist_ok=True)
    written = output / "training.json"
    log = json.loads(written.read_text()) if written.is_file() else []
    for cycle in range(len(log), CYCLES):
        log.append(_cycle(cycle, output / "model.safetensors", progress))
        written.write_text(json.dumps(log, indent=1) + "\n")
    return float(log[-1]["test_top1"])


def _cycle(cycle: int, weights: Path, progress: Progress) -> dict[str, float]:
    torch.manual_seed(cycle)
    images, labels = (torch.from_numpy(array) for array in data.whole("train"))
    model = FashionViT()
    if cycle:
        model.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    model.train()
    optimizer = torch.optim.AdamW(_groups(model), lr=LEARNING_RATE, betas=(0.9, 0.98))
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * steps, pct_start=0.1)
    start = time.monotonic()
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images))
        for step in range(steps):
            pick = order[step * BATCH : (step + 1) * BATCH]
            loss = F.cross_entropy(model(_augment(images[pick])), labels[pick], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress(epoch * steps + step + 1, EPOCHS * steps, f"cycle {cycle + 1}, loss {loss.item():.3f}")
    halves = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(halves, weights)
    return {"cycle": cycle + 1, "test_top1": _top1(halves), "seconds": round(time.monotonic() - start)}


def _groups(model: nn.Module) -> list[dict[str, object]]:
    """Weight decay for matrices, none for biases and norms."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]


def _augment(images: Tensor) -> Tensor:
    """Flip half of the batch, and shift all of it by up to two pixels."""
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    padded = F.pad(images, (2, 2, 2, 2), value=-data.MEAN / data.STD)
    down, right = torch.randint(0, 5, (2,)).tolist()
    return padded[:, :, down : down + 28, right : right + 28]


@torch.no_grad()
def _top1(weights: dict[str, Tensor]) -> float:
    model = FashionViT().eval()
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    images, labels = (torch.from_numpy(array) for array in data.whole("t10k"))
    guesses = torch.cat([model(images[start : start + 500]).argmax(-1) for start in range(0, len(images), 500)])
    return float((guesses == labels).double().mean())
