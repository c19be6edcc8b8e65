"""The zoo's face of fashion-dit: the model with its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optpass.errors import OptpassError
from optpass.zoo.fashion_vit import data

if TYPE_CHECKING:
    from optpass.zoo.fashion_dit.model import FashionDiT

SUMMARY = (
    "class-conditional diffusion transformer, 49 tokens, 5.6 M parameters; Fashion-MNIST, agreement with the label"
)
METRIC = "agreement"
WEIGHTS = Path(__file__).parent / "model.safetensors"
BATCH = 2
SAMPLER = "ddim(prediction=velocity,noise=cosine)"
"""What the model was trained for."""


def factory() -> tuple[FashionDiT, tuple[()], dict[str, Any]]:
    """The trained model and two noisy images."""
    import torch
    from safetensors.torch import load_file

    from optpass.zoo.fashion_dit.model import FashionDiT

    model = FashionDiT()
    model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    split = test_split(BATCH)
    inputs = {name: torch.from_numpy(split[name]) for name in ("sample", "timestep", "label")}
    return model.eval(), (), inputs


def test_split(count: int | None) -> dict[str, NDArray[np.generic]]:
    """Noisy test images at timesteps of all sizes, with their ``label``; all that are shipped without a count."""
    images, labels = data.shipped()
    count = len(labels) if count is None else count
    if not 1 <= count <= len(labels):
        raise OptpassError("data", f"{count} test images asked for", f"ask for 1 to {len(labels)}")
    rng = np.random.default_rng(0)
    timestep = rng.integers(0, 1000, count).astype(np.float32)
    level = np.cos((timestep / 1000 + 0.008) / 1.008 * np.pi / 2)[:, None, None, None] ** 2
    noise = rng.standard_normal(images[:count].shape)
    sample = np.sqrt(level) * data.pixels(images[:count]) + np.sqrt(1 - level) * noise
    return {"sample": sample.astype(np.float32), "timestep": timestep, "label": labels[:count]}
