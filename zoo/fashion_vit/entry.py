"""The zoo's face of fashion-vit: the model with its weights, and its test images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optpass.errors import OptpassError
from optpass.zoo.fashion_vit import data

if TYPE_CHECKING:
    from optpass.zoo.fashion_vit.model import FashionViT

SUMMARY = "vision transformer, 197 tokens, 1.3 M parameters; Fashion-MNIST top-1"
METRIC = "top1"
WEIGHTS = Path(__file__).parent / "model.safetensors"
BATCH = 8
SCHEDULE = "merge(at=0,keep=0.5),prune(at=2,selector=random,keep=0.5)"
"""The token reduction that the demo and the benchmarks apply."""
CONTROL = "prune(selector=random,at=[0,2],keep=[0.5,0.5])"
"""The same number of tokens at the same blocks, chosen by chance: what any schedule has to beat."""


def factory() -> tuple[FashionViT, tuple[()], dict[str, Any]]:
    """The trained model and a batch of eight test images."""
    import torch
    from safetensors.torch import load_file

    from optpass.zoo.fashion_vit.model import FashionViT

    model = FashionViT()
    model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    images, _ = data.shipped()
    return model.eval(), (), {"pixel_values": torch.from_numpy(images[:BATCH])}


def test_split(count: int | None) -> dict[str, NDArray[np.generic]]:
    """The first ``count`` test images as inputs, and their ``labels``; those that are shipped without a count."""
    images, labels = data.shipped()
    count = len(labels) if count is None else count
    if count > len(labels):
        images, labels = data.whole("t10k")
    if not 1 <= count <= len(labels):
        raise OptpassError("data", f"{count} test images asked for", f"ask for 1 to {len(labels)}")
    return {"pixel_values": images[:count], "labels": labels[:count]}
