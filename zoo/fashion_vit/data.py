"""Fashion-MNIST: 2,000 test images that ship with the package, and the whole set for training.

The whole set is the Debian package dataset-fashion-mnist. Where its files are not, it is installed, or
unpacked into a cache directory; ``OPTPASS_DATA`` names another directory that holds the four files.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from optpass.errors import OptpassError

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
    own = os.environ.get("OPTPASS_DATA")
    if own:
        if not _complete(Path(own)):
            raise OptpassError(
                "data", f"OPTPASS_DATA={own} lacks the Fashion-MNIST files", f"copy those of {PACKAGE} there"
            )
        return Path(own)
    cached = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "optpass"
    unpacked = cached / INSTALLED.relative_to("/")
    for folder in (INSTALLED, unpacked):
        if _complete(folder):
            return folder
    if os.geteuid() == 0:
        _call("apt-get", "install", "-y", PACKAGE) or (
            _call("apt-get", "update") and _call("apt-get", "install", "-y", PACKAGE)
        )
    if _complete(INSTALLED):
        return INSTALLED
    _unpack(cached)
    if _complete(unpacked):
        return unpacked
    raise OptpassError(
        "data", "the Fashion-MNIST files are not here and cannot be fetched", f"install {PACKAGE}, or set OPTPASS_DATA"
    )


def _complete(folder: Path) -> bool:
    kinds = ("images-idx3", "labels-idx1")
    return all((folder / f"{split}-{kind}-ubyte.gz").is_file() for split in ("train", "t10k") for kind in kinds)


def _unpack(target: Path) -> None:
    """Download the Debian package without installing it, which needs no root."""
    with tempfile.TemporaryDirectory() as work:
        if not _call("apt-get", "download", PACKAGE, cwd=work):
            return
        for package in Path(work).glob("*.deb"):
            target.mkdir(parents=True, exist_ok=True)
            _call("dpkg", "-x", str(package), str(target))


def _call(*command: str, cwd: str | None = None) -> bool:
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, check=False, timeout=300).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
