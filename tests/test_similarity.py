"""Figures of how near samples are, and the samples that they are taken of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from optpass import similarity
from optpass.runtime.denoise import Denoiser, Taken
from optpass.runtime.manifest import TensorInfo
from optpass.similarity import psnr, ssim
from tests.denoisers import program, session, stages

Array = NDArray[Any]


def naive(x: Array, y: Array, sample: Array) -> float:
    """The paper's formula over every window of two planes of a sample, with biased variances."""
    span = sample.max() - sample.min()
    c, d = (0.01 * span) ** 2, (0.03 * span) ** 2
    height, width = (min(7, size) for size in y.shape)
    values = []
    for row in range(y.shape[0] - height + 1):
        for column in range(y.shape[1] - width + 1):
            a, b = (array[row : row + height, column : column + width] for array in (x, y))
            both = ((a - a.mean()) * (b - b.mean())).mean()
            light = (2 * a.mean() * b.mean() + c) / (a.mean() ** 2 + b.mean() ** 2 + c)
            values.append(light * (2 * both + d) / (a.var() + b.var() + d))
    return float(np.mean(values))


@pytest.mark.parametrize("shape", [(3, 12, 9), (3, 7, 7), (3, 5, 11), (3, 2, 2)])
def test_similarity_is_the_formula_over_every_window(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    expected = rng.normal(size=shape)
    found = expected + rng.normal(size=shape) * np.array([0.01, 0.3, 2.0])[:, None, None]
    images = ssim(found[:, None], expected[:, None])
    # both in float64: a variance as the difference of two means of squares loses some digits of them
    np.testing.assert_allclose(
        images, [naive(a, b, b) for a, b in zip(found, expected, strict=True)], rtol=0, atol=1e-9
    )
    assert images[0] > images[1] > images[2]


def test_channels_and_frames_are_averaged_over() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 2, 3, 2, 9, 8))
    for value, one, two in zip(ssim(x, y), x, y, strict=True):
        planes = zip(one.reshape(6, 9, 8), two.reshape(6, 9, 8), strict=True)
        assert value == pytest.approx(np.mean([naive(a, b, two) for a, b in planes]), abs=1e-9)


@pytest.mark.parametrize("shape", [(2, 40), (2, 3, 40)])
def test_samples_without_rows_and_columns_are_one_row(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, *shape))
    rows = x.reshape(2, -1, 1, 40), y.reshape(2, -1, 1, 40)
    np.testing.assert_allclose(ssim(x, y), ssim(*rows), rtol=0, atol=1e-12)


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-3, 3))
def test_equal_samples_are_fully_alike_and_units_do_not_matter(seed: int, factor: float, offset: float) -> None:
    x, y = np.random.default_rng(seed).normal(size=(2, 3, 1, 8, 8))
    np.testing.assert_allclose(ssim(y, y), 1.0, rtol=0, atol=1e-9)
    np.testing.assert_allclose(ssim(factor * x, factor * y), ssim(x, y), rtol=0, atol=1e-6)
    assert (ssim(x, y) < 0.9).all()
    # each sample by itself
    mixed = ssim(np.concatenate([x[:1], y[1:]]), y)
    assert mixed[0] == pytest.approx(ssim(x[:1], y[:1])[0])
    assert mixed[1:] == pytest.approx(1.0)
    np.testing.assert_allclose(psnr(factor * x + offset, factor * y + offset), psnr(x, y), rtol=1e-6)


def test_flat_samples_have_a_similarity() -> None:
    flat = np.zeros((1, 1, 8, 8), np.float32)
    assert ssim(flat, flat)[0] == pytest.approx(1.0)
    assert np.isfinite(ssim(flat + 1, flat)).all()


def test_ratio_to_the_peak_is_in_decibels() -> None:
    expected = np.zeros((3, 1, 4, 4), np.float32)
    expected[:, 0, 0, 0] = [1, 1, 10]
    found = expected + np.array([0.1, 0.01, 0.1], np.float32)[:, None, None, None]
    np.testing.assert_allclose(psnr(found, expected), [20, 40, 40], rtol=1e-5)
    assert psnr(expected, expected).tolist() == [np.inf] * 3


# samples

LABELS = np.array([0, 1, 2])


def interval(dynamic: bool) -> Denoiser:
    return session(stages("policy=interval,form=split", dynamic=dynamic))


@pytest.mark.parametrize(("dynamic", "batches"), [(True, [6, 2]), (False, [2, 2, 2, 2])])
def test_samples_come_in_batches_from_seeds_and_conditions_of_their_own(
    dynamic: bool, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = interval(dynamic)
    sizes: list[int] = []
    original = model.denoise

    def denoise(shape: Any, **options: Any) -> Any:
        sizes.append(shape[0])
        return original(shape, **options)

    monkeypatch.setattr(model, "denoise", denoise)
    found, taken = similarity.samples(model, {"label": LABELS}, count=8, seed=30, steps=6)
    assert sizes == batches
    assert found.shape == (8, 2, 8, 8)
    computed = [0, 1, 2, 5]
    assert taken == Taken(6 * len(batches), [6 * b + step for b in range(len(batches)) for step in computed], [])
    for sample in range(0, 8, 2):
        labels = np.arange(sample, sample + 2) % 3
        alone = original((2, 2, 8, 8), steps=6, seed=30 + sample, label=labels)
        np.testing.assert_allclose(found[sample : sample + 2], alone, rtol=0, atol=1e-5)


def test_counts_are_rounded_up_to_whole_batches_of_a_fixed_size() -> None:
    assert len(similarity.samples(interval(False), {"label": LABELS}, count=3, steps=3)[0]) == 4
    assert len(similarity.samples(interval(True), {"label": LABELS}, count=3, steps=3)[0]) == 3


def test_as_many_steps_are_taken_as_denoisers_are_judged_on() -> None:
    model = session([program().main])
    _, taken = similarity.samples(model, {"label": LABELS}, count=2)
    assert taken == Taken(50, list(range(50)), [])


def test_what_all_samples_share_is_given_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = interval(True)
    table = TensorInfo(name="table", dtype="float32", shape=[64, 16])
    model.engine = model.engine.model_copy(update={"inputs": [*model.engine.inputs, table]})
    assert model.batched("label")
    assert not model.batched("table")
    given: list[dict[str, Any]] = []

    def denoise(shape: Any, *, conditions: dict[str, Any], **options: Any) -> Any:
        given.append(conditions)
        return np.zeros(shape)

    monkeypatch.setattr(model, "denoise", denoise)
    similarity.samples(model, {"label": LABELS, "table": np.ones((64, 16))}, count=8)
    assert [(one["label"].shape, one["table"].shape) for one in given] == [((6,), (64, 16)), ((2,), (64, 16))]
