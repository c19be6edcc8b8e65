"""How near the samples of a denoiser that reuses features are to those of one that computes all of the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from optpass.runtime.denoise import Denoiser, Taken

Array = NDArray[Any]

STEPS = 50
"""Of a run on which a denoiser is judged and timed."""

SAMPLES = 16
"""Drawn by default."""

WINDOW = 7
"""Pixels along a side of the window of SSIM."""


def ssim(found: Array, expected: Array) -> NDArray[np.float64]:
    """Structural similarity of each sample, ``[n]``; 1 is equal.

    Args:
        found: ``[n, ...]`` images or videos, the last two dimensions of which are rows and columns; without such, one
            row. All other dimensions are averaged over.
        expected: of the same shape.

    Paper: Image Quality Assessment: From Error Visibility to Structural Similarity, 2004, with a uniform window and the
    range of the expected samples.
    """
    count = len(found)
    x, y = (array.astype(np.float64).reshape(count, -1, *_plane(array.shape)) for array in (found, expected))
    span = np.maximum(y.reshape(count, -1).max(1) - y.reshape(count, -1).min(1), 1e-12)[:, None, None, None]
    sides = tuple(min(WINDOW, size) for size in x.shape[2:])

    def mean(array: Array) -> Array:
        averaged: Array = sliding_window_view(array, sides, (2, 3)).mean((-2, -1))
        return averaged

    a, b = mean(x), mean(y)
    varies, other, both = mean(x * x) - a * a, mean(y * y) - b * b, mean(x * y) - a * b
    c, d = (0.01 * span) ** 2, (0.03 * span) ** 2
    alike = (2 * a * b + c) * (2 * both + d) / ((a * a + b * b + c) * (varies + other + d))
    similar: NDArray[np.float64] = alike.reshape(count, -1).mean(1)
    return similar


def _plane(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[-2], shape[-1]) if len(shape) >= 4 else (1, shape[-1])


def psnr(found: Array, expected: Array) -> NDArray[np.float64]:
    """Ratio of the peak of each expected sample to the error, in dB, ``[n]``; infinite where they are equal."""
    x, y = (array.astype(np.float64).reshape(len(array), -1) for array in (found, expected))
    with np.errstate(divide="ignore"):
        ratio: NDArray[np.float64] = 10 * np.log10((y.max(1) - y.min(1)) ** 2 / ((x - y) ** 2).mean(1))
    return ratio


def samples(
    model: Denoiser, conditions: Mapping[str, Array], *, count: int = SAMPLES, seed: int = 0, **options: Any
) -> tuple[Array, Taken]:
    """Samples ``[count, ...]`` from given conditions and seeds, batch by batch, and what became of all steps.

    Args:
        model: an engine that denoises.
        conditions: one row a sample, used again from the start where there are fewer; what all samples share is given
            as it is.
        count: how many, rounded up to whole batches of a fixed size.
        seed: of the first; the next ones have the next seeds.
        **options: those of ``Denoiser.denoise``.
    """
    found, taken = [], Taken()
    for start, size in _batches(model, count):
        rows: dict[str, Any] = {
            name: array[np.arange(start, start + size) % len(array)] if model.batched(name) else array
            for name, array in conditions.items()
        }
        options.setdefault("steps", STEPS)
        found.append(model.denoise(shape(model, size), seed=seed + start, conditions=rows, **options))
        taken.computed += [taken.steps + step for step in model.last.computed]
        taken.damaged += [taken.steps + step for step in model.last.damaged]
        taken.steps += model.last.steps
    return np.concatenate(found), taken


def _batches(model: Denoiser, count: int) -> Iterator[tuple[int, int]]:
    first = _info(model).shape[0]
    most = first if isinstance(first, int) else min(model.engine.dynamic[first].maximum, count)
    for start in range(0, count, most):
        yield start, most if isinstance(first, int) else min(most, count - start)


def shape(model: Denoiser, batch: int) -> tuple[int, ...]:
    """Shape of the noise for so many samples; dynamic sizes other than the batch are the smallest."""
    sizes = [size if isinstance(size, int) else model.engine.dynamic[size].minimum for size in _info(model).shape[1:]]
    return (batch, *sizes)


def _info(model: Denoiser) -> Any:
    return next(info for info in model.engine.inputs if info.name == model.roles.sample)
