"""Scenes of two items of clothing that move: the near one as told, the far one on its own, as images and depth.

Drawn from a seed with numpy alone, without end; items of the training split and of the test split never meet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE, ITEM = 32, 14
"""Pixels along a side of a frame and of an item."""
ACTIONS = tuple((down, right) for down in (-2, 0, 2) for right in (-2, 0, 2))
"""What the near item can be told: pixels down and right."""

Array = NDArray[np.float32]


def items(images: NDArray[np.uint8]) -> Array:
    """Bytes ``[n, 28, 28]`` to items ``[n, 14, 14]`` in [0, 1]: means of 2x2 pixels."""
    small: Array = images.reshape(-1, ITEM, 2, ITEM, 2).mean((2, 4), dtype=np.float32) / 255
    return small


@dataclass(frozen=True)
class Scenes:
    """Frames ``[n, frames, 2, 32, 32]`` in [-1, 1] (image, nearness), and actions ``[n, frames]`` that led to each."""

    frames: Array
    actions: NDArray[np.int64]


def draw(items: Array, count: int, frames: int, seed: int) -> Scenes:
    """Scenes of ``frames`` frames each.

    The near item (nearness 0.6 to 0.9) moves by its action and stops at the border; the far one (0.2 to 0.4) keeps
    its velocity and bounces. What is near hides what is far.
    """
    rng = np.random.default_rng(seed)
    looks = items[rng.integers(len(items), size=(count, 2))]
    nearness = np.stack([rng.uniform(0.2, 0.4, count), rng.uniform(0.6, 0.9, count)], 1).astype(np.float32)
    room = SIZE - ITEM
    places = rng.integers(0, room + 1, (count, 2, 2))
    velocity = rng.integers(-2, 3, (count, 2))
    actions = rng.integers(len(ACTIONS), size=(count, frames))
    # an action lasts a while, or the near item trembles on the spot
    for frame in range(1, frames):
        held = rng.random(count) < 0.7
        actions[held, frame] = actions[held, frame - 1]
    made = np.empty((count, frames, 2, SIZE, SIZE), np.float32)
    moves = np.array(ACTIONS)
    for frame in range(frames):
        if frame:
            places[:, 1] = np.clip(places[:, 1] + moves[actions[:, frame]], 0, room)
            far = places[:, 0] + velocity
            velocity = np.where((far < 0) | (far > room), -velocity, velocity)
            places[:, 0] = np.clip(far, 0, room)
        made[:, frame] = _drawn(looks, nearness, places)
    return Scenes(2 * made - 1, actions)


def _drawn(looks: Array, nearness: Array, places: NDArray[np.int64]) -> Array:
    """Frames ``[n, 2, 32, 32]`` in [0, 1]; the far item first, then the near one over it."""
    count = len(looks)
    frames = np.zeros((count, 2, SIZE, SIZE), np.float32)
    scene = np.arange(count)[:, None, None]
    span = np.arange(ITEM)
    for which in range(2):
        rows = places[:, which, 0, None, None] + span[None, :, None]
        columns = places[:, which, 1, None, None] + span[None, None, :]
        look = looks[:, which]
        seen = look > 0.1
        depth = np.broadcast_to(nearness[:, which, None, None], look.shape)
        for channel, value in enumerate((look, depth)):
            frames[scene, channel, rows, columns] = np.where(seen, value, frames[scene, channel, rows, columns])
    return frames
