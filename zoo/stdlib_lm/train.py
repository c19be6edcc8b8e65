"""The recipe of stdlib-lm: tokenizer and model, from nothing, in forty minutes on two CPU cores.

Training sees windows of the standard library's modules, mixed anew in each epoch, and a small share of renamings in
their functions (see ``edits``). Most windows have 512 tokens; every tenth step takes as many tokens in windows of 2048,
so that late positions are known too. Matrix products are in bfloat16 where the processor has instructions for it, which
with the attention of ``attention`` halves the time of a step. ``STEPS`` is the budget: the learning rate falls to
nothing over all of them. A run that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from optpass.zoo.stdlib_lm import attention, data, edits, entry, model, tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STEPS, BATCH, LENGTH, LEARNING_RATE, WARMUP = 3300, 8, 512, 4e-3, 0.05
LONG_EVERY = 10
"""Every so many steps, a batch of as many tokens in windows of ``model.POSITIONS``."""
EDITS, EDITED = 800, (80, 900)
"""Renamings tried in each epoch, a sixteenth of its tokens; fewest and most characters of such a function."""
CHECKPOINT_EVERY = 400
LONGEST = 2048
"""Length of the windows of held-out text of the second evaluation."""

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the steps in all, and a line of text."""


def train(output: Path, progress: Progress) -> float:
    """Train and write ``tokenizer.json``, ``model.safetensors`` (float16) and ``training.json`` into ``output``.

    Returns:
        Perplexity per token on the whole test split, of the weights as written.
    """
    output.mkdir(parents=True, exist_ok=True)
    texts = data.training()
    made = tokens.trained(texts.values())
    made.save(str(output / "tokenizer.json"))
    weights = output / "model.safetensors"
    seconds = _fit(_Text(texts, made), output / "checkpoint.pt", weights, progress)
    quality = evaluate(model.load(weights), made)
    facts = {"steps": STEPS, "tokens": STEPS * BATCH * LENGTH, "seconds": round(seconds)}
    log = [{**facts, **quality, "parameters": _parameters(), "text": _source(texts), "versions": _versions()}]
    (output / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    (output / "checkpoint.pt").unlink(missing_ok=True)
    return quality["test_perplexity"]


def _fit(text: _Text, checkpoint: Path, weights: Path, progress: Progress) -> float:
    """Run the steps that a checkpoint has not done yet, and write the weights; returns the seconds of all steps."""
    trained = model.build().train()
    trained.set_attn_implementation(attention.register())  # type: ignore[operator]  # a method of transformers
    half = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    optimizers = _optimizers(trained)
    schedules = [LambdaLR(each, lambda step: _rate(step, STEPS)) for each in optimizers]
    stateful: list[Any] = [trained, *optimizers, *schedules]
    done, before = 0, 0.0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        for each, saved in zip(stateful, state["states"], strict=True):
            each.load_state_dict(saved)
        done, before = state["done"], state["seconds"]
    start = time.monotonic() - before
    for step, ids in enumerate(itertools.islice(text.batches(), done, STEPS), done + 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = loss(trained, ids).mean()
        trained.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        progress(step, STEPS, f"loss {value.item():.3f}")
        if step % CHECKPOINT_EVERY == 0:
            states = [each.state_dict() for each in stateful]
            fresh = checkpoint.with_suffix(".new")
            torch.save({"states": states, "done": step, "seconds": time.monotonic() - start}, fresh)
            fresh.replace(checkpoint)
    model.save(trained, weights)
    return time.monotonic() - start


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: up during the warm-up, then down to nothing in a straight line."""
    return min((step + 1) / (WARMUP * steps), (steps - step) / ((1 - WARMUP) * steps))


def _optimizers(trained: nn.Module) -> list[Optimizer]:
    """Muon for the matrices of the blocks, at steps as large as those of AdamW, which has the rest."""
    named = dict(trained.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim > 1 and name != model.EMBEDDING]
    rest = [p for name, p in named.items() if p.ndim <= 1 or name == model.EMBEDDING]
    return [
        Muon(matrices, lr=LEARNING_RATE, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def loss(trained: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy ``[batch * (tokens - 1)]`` in nats of each token but the first of each row."""
    logits = trained(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


class _Text:
    """The training text as batches, the same ones in every run."""

    def __init__(self, texts: dict[str, str], made: Tokenizer) -> None:
        self.tokenizer = made
        self.modules = [tokens.stream(made, [text]) for text in texts.values()]
        found = [function for text in texts.values() for function in edits.functions(text)]
        self.functions = [function for function in found if EDITED[0] <= len(function.text) <= EDITED[1]]
        self.names = sorted({name for function in self.functions for name in function.names})

    def batches(self) -> Iterator[Tensor]:
        """Batches ``[batch, tokens]`` without end."""
        short, long = self._windows(LENGTH, 0), self._windows(model.POSITIONS, 1)
        few = BATCH * LENGTH // model.POSITIONS
        for step in itertools.count(1):
            rows = itertools.islice(long, few) if step % LONG_EVERY == 0 else itertools.islice(short, BATCH)
            yield torch.from_numpy(np.stack(list(rows)))

    def _windows(self, length: int, seed: int) -> Iterator[NDArray[np.int64]]:
        for epoch in itertools.count():
            rng = np.random.default_rng((seed, epoch))
            parts = [*self.modules, *self._edits(rng)]
            ids = np.concatenate([parts[i] for i in rng.permutation(len(parts))])[rng.integers(length) :]
            cut = ids[: len(ids) // length * length].reshape(-1, length)
            yield from rng.permutation(cut)

    def _edits(self, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
        for i in rng.choice(len(self.functions), min(EDITS, len(self.functions)), replace=False):
            others = [str(name) for name in rng.choice(self.names, 8)]
            if made := edits.task(self.functions[i], others, rng):
                yield tokens.stream(self.tokenizer, ["".join((*made, "\n"))])


@torch.no_grad()
def evaluate(trained: nn.Module, made: Tokenizer) -> dict[str, float]:
    """Loss in nats and perplexity per token, and bits per byte, on the held-out text.

    On windows as in the test split, where a token is predicted from 127 others on average, and in windows of 2048.
    """
    ids = tokens.stream(made, data.held_out().values())
    sizes = torch.from_numpy(tokens.sizes(made))
    found: dict[str, float] = {}
    for prefix, length in (("test", entry.TOKENS), (f"test_{LONGEST}", LONGEST)):
        rows = torch.from_numpy(ids[: len(ids) // length * length].reshape(-1, length))
        losses = torch.cat([loss(trained, part) for part in torch.split(rows, 4096 // length)])
        nats, count = float(losses.double().sum()), float(sizes[rows[:, 1:]].sum())
        mean = nats / len(losses)
        found |= {
            f"{prefix}_loss": round(mean, 4),
            f"{prefix}_perplexity": round(math.exp(mean), 3),
            f"{prefix}_bits_per_byte": round(nats / math.log(2) / count, 4),
        }
    return found


def _parameters() -> int:
    return sum(p.numel() for p in model.build().parameters())


def _source(texts: dict[str, str]) -> dict[str, Any]:
    digest = hashlib.sha256("".join(texts.values()).encode()).hexdigest()
    return {"package": data.PACKAGES[0], "version": data.version(), "modules": len(texts), "sha256": digest}


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "tokenizers")}
