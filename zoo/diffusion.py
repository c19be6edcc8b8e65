"""What the recipes of the denoisers share: one loop of training, and the noise that images are trained under."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the steps in all, and a line of text."""

LEARNING_RATE, WARMUP = 2e-3, 0.03
AVERAGED, CHECKPOINT_EVERY = 0.998, 250
"""Decay of the mean of the weights, which is what is written; steps between checkpoints."""


def cosine(steps: int) -> Tensor:
    """Share of the signal ``[steps]`` left at each timestep, squared: cosine noise, each step's loss below 0.999.

    Paper: Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672, equation 17.
    """
    level = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.cumprod(1 - (1 - level[1:] / level[:-1]).clamp(max=0.999), 0).float()


def fit(
    model: nn.Module,
    batches: Callable[[int], Iterator[Any]],
    loss: Callable[[nn.Module, Any], Tensor],
    steps: int,
    scheduled: int,
    weights: Path,
    progress: Progress,
) -> float:
    """Train, and write the mean of the late weights in float16; a run that was cut off goes on from its checkpoint.

    Matrices of the blocks are trained by Muon, the rest by AdamW. The mean of the weights does what a learning rate
    that falls to nothing does, so that a run may end before it has.

    Args:
        model: in training mode.
        batches: from a step on, the batches of the steps that follow.
        loss: of a batch, computed in bfloat16 where the processor has instructions for it.
        steps: in all.
        scheduled: steps over which the learning rate would fall to nothing.
        weights: the file to write, with a checkpoint beside it.
        progress: called after each step.

    Returns:
        Seconds of all steps.
    """
    averaged = torch.optim.swa_utils.AveragedModel(
        model,
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGED),  # type: ignore[no-untyped-call]
        use_buffers=False,
    )
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    optimizers: list[Any] = [
        Muon(matrices, lr=LEARNING_RATE, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        AdamW(rest, lr=LEARNING_RATE / 2, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    schedules = [LambdaLR(each, lambda step: _rate(step, scheduled)) for each in optimizers]
    stateful: list[Any] = [model, averaged, *optimizers, *schedules]
    checkpoint = weights.with_name("checkpoint.pt")
    done, before = 0, 0.0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        for each, saved in zip(stateful, state["states"], strict=True):
            each.load_state_dict(saved)
        done, before = state["done"], state["seconds"]
    half = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    start = time.monotonic() - before
    smooth = 0.0
    for step, batch in enumerate(batches(done), done + 1):
        torch.manual_seed(step)
        # of the fused attention the way back takes a third of a step on a CPU
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                value = loss(model, batch)
            model.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        averaged.update_parameters(model)
        smooth = value.item() if not smooth else 0.98 * smooth + 0.02 * value.item()
        progress(step, steps, f"loss {smooth:.4f}")
        if step % CHECKPOINT_EVERY == 0:
            fresh = checkpoint.with_suffix(".new")
            states = [each.state_dict() for each in stateful]
            torch.save({"states": states, "done": step, "seconds": time.monotonic() - start}, fresh)
            fresh.replace(checkpoint)
        if step == steps:
            break
    save_file({name: value.half() for name, value in averaged.module.state_dict().items()}, weights)
    return time.monotonic() - start


def _rate(step: int, scheduled: int) -> float:
    """Share of the learning rate: up during the warm-up, then down to nothing in a straight line."""
    return min((step + 1) / (WARMUP * scheduled), max(scheduled - step, 0) / ((1 - WARMUP) * scheduled))


def write_log(output: Path, facts: dict[str, Any], model: nn.Module) -> None:
    """Write ``training.json``, and drop the checkpoint."""
    known = {"parameters": sum(p.numel() for p in model.parameters()), "versions": {"torch": version("torch")}}
    (output / "training.json").write_text(json.dumps([{**facts, **known}], indent=1) + "\n")
    (output / "checkpoint.pt").unlink(missing_ok=True)
