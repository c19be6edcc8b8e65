"""How good samples of clothes are, as fashion-vit sees them; and how near they are to others, pixel by pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optpass.zoo.fashion_vit import data

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Judged:
    """Verdicts on samples.

    Attributes:
        agreement: share that the classifier sees as the class that was asked for, 0 to 1.
        distance: Frechet distance of its features to those of the shipped test images; less is nearer.
    """

    agreement: float
    distance: float


def judged(images: Array, labels: NDArray[np.integer[Any]]) -> Judged:
    """Judge images ``[n, 1, 28, 28]`` in [-1, 1] that were made for labels ``[n]``; needs torch."""
    features, guesses = _seen((images + 1) / 2)
    real, _ = _seen(data.pixels(data.shipped()[0]) / 2 + 0.5)
    return Judged(round(float((guesses == labels).mean()), 4), round(frechet(features, real), 3))


def _seen(pixels: Array) -> tuple[Array, NDArray[np.int64]]:
    """Features ``[n, 128]`` and classes ``[n]`` that fashion-vit sees in images in [0, 1]."""
    import torch

    from optpass.zoo.fashion_vit import entry

    model, _, _ = entry.factory()
    features: list[Any] = []
    handle = model.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    scaled = torch.from_numpy(((pixels - data.MEAN) / data.STD).astype(np.float32))
    with torch.no_grad():
        guesses = torch.cat([model(part).argmax(-1) for part in torch.split(scaled, 250)])
    handle.remove()
    return torch.cat(features).double().numpy(), guesses.numpy()


def frechet(one: Array, other: Array) -> float:
    """Squared Frechet distance of two sets of features ``[n, width]``, each taken as normally distributed.

    Paper: GANs Trained by a Two Time-Scale Update Rule, arXiv 1706.08500.
    """
    first, second = np.cov(one.T), np.cov(other.T)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    between = ((one.mean(0) - other.mean(0)) ** 2).sum()
    return float(between + np.trace(first) + np.trace(second) - 2 * cross)
