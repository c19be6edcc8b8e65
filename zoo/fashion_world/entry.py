"""The zoo's face of fashion-world: the model with its weights, and scenes of items that it never saw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from optpass.errors import OptpassError
from optpass.zoo.fashion_vit import data
from optpass.zoo.fashion_world import scenes

if TYPE_CHECKING:
    from optpass.zoo.fashion_world.model import FashionWorld

SUMMARY = "world model in small, 128 tokens of image and depth, 2.1 M parameters; dB over rollouts of 16 frames"
METRIC = "psnr"
WEIGHTS = Path(__file__).parent / "model.safetensors"
BATCH, MOST = 2, 2000
SAMPLER = "euler"
"""What the model was trained for."""


def factory() -> tuple[FashionWorld, tuple[()], dict[str, Any]]:
    """The trained model and two noisy frames with what came before."""
    import torch
    from safetensors.torch import load_file

    from optpass.zoo.fashion_world.model import FashionWorld

    model = FashionWorld()
    model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    inputs = {name: torch.from_numpy(array) for name, array in test_split(BATCH).items() if name != "frame"}
    return model.eval(), (), inputs


def test_split(count: int | None) -> dict[str, NDArray[np.generic]]:
    """Noisy next frames of scenes with test items, what comes before, and the ``frame`` itself."""
    count = MOST if count is None else count
    if not 1 <= count <= MOST:
        raise OptpassError("data", f"{count} scenes asked for", f"ask for 1 to {MOST}")
    drawn = rollouts(count, 1)
    rng = np.random.default_rng(0)
    timestep = rng.random(count, np.float32)
    frame = drawn.frames[:, 2]
    share = timestep[:, None, None, None]
    sample = (1 - share) * frame + share * rng.standard_normal(frame.shape, np.float32)
    past = drawn.frames[:, :2].reshape(count, 4, scenes.SIZE, scenes.SIZE)
    return {"sample": sample, "timestep": timestep, "past": past, "action": drawn.actions[:, 2], "frame": frame}


def rollouts(count: int, frames: int, seed: int = 1_000_000) -> scenes.Scenes:
    """Scenes of two frames that are given, and ``frames`` that follow."""
    return scenes.draw(scenes.items(data.bytes_of(data.shipped()[0])), count, frames + 2, seed)
