"""Fashion-MNIST: 2,000 test images that ship with the package, and the whole set for training.

The whole set is the Debian package dataset-fashion-mnist. Where its files are not, it is installed, or
unpacked into a cache directory; ``OPTPASS_DATA`` names another directory that holds the four files.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from optpass.zoo import packages

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
SHIPPED = Path(__file__).parent / "test.safetensors"
MEAN, STD = 0.2860, 0.3530
"""Of the training split, per pixel in [0, 1]."""

Split = tuple[NDArray[np.float32], NDArray[np.int64]]


def normalised(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bytes ``[n, 28, 28]`` to the model's ``[n, 1, 28, 28]``."""
    scaled = images.astype(np.float32).reshape(-1, 1, 28, 28) / 255
    return ((scaled - MEAN) / STD).astype(np.float32)


def shipped() -> Split:
    """The first 2,000 images of the test split, and their labels."""
    arrays = load_file(SHIPPED)
    return normalised(arrays["images"]), arrays["labels"].astype(np.int64)


def whole(split: str) -> Split:
    """All images of a split, ``train`` or ``t10k``, and their labels."""
    folder = directory()
    images = _bytes(folder / f"{split}-images-idx3-ubyte.gz", 16)
    labels = _bytes(folder / f"{split}-labels-idx1-ubyte.gz", 8)
    return normalised(images), labels.astype(np.int64)


def _bytes(path: Path, header: int) -> NDArray[np.uint8]:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def directory() -> Path:
    """Where the four files are; fetched if they are nowhere."""
    return packages.directory("the Fashion-MNIST files", (PACKAGE,), INSTALLED, _complete)


def _complete(folder: Path) -> bool:
    kinds = ("images-idx3", "labels-idx1")
    return all((folder / f"{split}-{kind}-ubyte.gz").is_file() for split in ("train", "t10k") for kind in kinds)


def pixels(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normalised images ``[n, 1, 28, 28]`` to pixels in [-1, 1]."""
    scaled: NDArray[np.float32] = np.clip((images * STD + MEAN) * 2 - 1, -1, 1)
    return scaled


def bytes_of(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Normalised images ``[n, 1, 28, 28]`` back to bytes ``[n, 28, 28]``."""
    found: NDArray[np.uint8] = np.rint((images[:, 0] * STD + MEAN) * 255).astype(np.uint8)
    return found
