"""The zoo's face of stdlib-lm: the model with its weights, its tokenizer, held-out text and prompts cut from it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optpass.errors import OptpassError
from optpass.zoo.stdlib_lm import data
from optpass.zoo.stdlib_lm.prompts import prompts
from optpass.zoo.stdlib_lm.tokens import decode, encode, stream, tokenizer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["METRIC", "SUMMARY", "WEIGHTS", "decode", "encode", "factory", "prompts", "test_split", "tokenizer"]

SUMMARY = "causal language model of Python source, Llama architecture, 4.2 M parameters; perplexity per token"
METRIC = "perplexity"
WEIGHTS = Path(__file__).parent / "model.safetensors"
TOKENS = 256
"""Length of a window of the test split."""
EXAMPLE = (2, 64)
"""Batch and tokens of the example call."""
DYNAMIC = ("input_ids:0=batch:1..16", "input_ids:1=tokens:2..2048")


def factory() -> tuple[nn.Module, tuple[()], dict[str, Any]]:
    """The trained model and a batch of two pieces of held-out text."""
    import torch

    from optpass.zoo.stdlib_lm import model

    made = model.load(WEIGHTS)
    made.dynamic = DYNAMIC  # type: ignore[assignment]  # read by capture; nn.Module holds any attribute
    batch, length = EXAMPLE
    return made, (), {"input_ids": torch.from_numpy(windows()[:batch, :length].copy()), "use_cache": False}


def test_split(count: int | None) -> dict[str, NDArray[np.generic]]:
    """The first ``count`` windows of held-out text, or all: ``input_ids``, and ``labels``, which the metric shifts."""
    whole = windows()
    count = len(whole) if count is None else count
    if not 1 <= count <= len(whole):
        raise OptpassError("data", f"{count} windows of held-out text asked for", f"ask for 1 to {len(whole)}")
    return {"input_ids": whole[:count].copy(), "labels": whole[:count].copy()}


@functools.cache
def windows() -> NDArray[np.int64]:
    """The held-out text in windows ``[count, 256]`` that do not overlap, those of all modules mixed."""
    ids = stream(tokenizer(), data.held_out().values())
    cut = ids[: len(ids) // TOKENS * TOKENS].reshape(-1, TOKENS)
    return np.random.default_rng(0).permutation(cut)
