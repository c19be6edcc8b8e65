"""``many_to_many``: the Triton face held to the reference, and the reference to what a map must preserve."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from optpass.errors import OptpassError
from optpass.kernels.base import FLOATS
from optpass.kernels.many_to_many import Spread, many_to_many, many_to_many_back, many_to_many_sizes
from optpass.kernels.many_to_many.reference import back, mix, resize, weights

sys.path.insert(0, str(Path(__file__).parent))
from faces import interpreted

pytest.importorskip("triton", reason="install the extra dev, which brings Triton")

GRID = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))

Factors = tuple[Tensor, Tensor, Tensor | None, int, int, int, float]


@st.composite
def maps(draw: st.DrawFn) -> Factors:
    """Features of small whole numbers, exact in every dtype and full of ties; lengths around the tiles."""
    tokens = draw(st.sampled_from([1, 2, 7, 31, 33, 65, 100]))
    targets = draw(st.sampled_from(sorted({1, (tokens + 1) // 2, tokens, min(33, tokens)})))
    batch, width = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 16, 65]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    largest = draw(st.integers(0, 2))
    features = torch.randint(-largest, largest + 1, (batch, tokens, width), generator=generator)
    index = torch.rand((batch, tokens), generator=generator).argsort(1)[:, :targets].sort(1)[0]
    masked = draw(st.sampled_from(["no", "some", "all", "shared"]))
    visible = None
    if masked != "no":
        share = {"some": 0.5, "all": 1.0, "shared": 0.5}[masked]
        visible = torch.rand((1 if masked == "shared" else batch, tokens), generator=generator) > share
    prefix = draw(st.integers(0, min(2, targets)))
    suffix = draw(st.integers(0, min(2, targets - prefix)))
    spread = draw(st.sampled_from([1, 2, 4, 40, max(1, targets - prefix - suffix)]))
    temperature = draw(st.sampled_from([0.1, 1.0, 30.0, 1e4]))
    return features.to(draw(st.sampled_from(FLOATS))), index, visible, prefix, suffix, spread, temperature


@st.composite
def mixes(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, Factors]:
    factors = draw(maps())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    shape = (*factors[0].shape[:2], *draw(st.sampled_from([(1,), (5,), (2, 3), (130,)])))
    x = torch.randn(shape, generator=generator).to(draw(st.sampled_from(FLOATS)))
    sizes = torch.randint(1, 9, shape[:2], generator=generator).float() if draw(st.booleans()) else None
    return x, sizes, factors


def exact(factors: Factors) -> tuple[Tensor, float]:
    """The weights by another way, one token after the other, in float64; and the largest logit that others go by."""
    features, index, visible, prefix, suffix, spread, temperature = factors
    batch, tokens, _ = features.shape
    targets = index.shape[1]
    found, largest = torch.zeros(batch, targets, tokens, dtype=torch.float64), 0.0
    for sample, x in enumerate(features.double()):
        seen = None if visible is None else visible[sample if len(visible) > 1 else 0]
        for token in range(tokens):
            stays = index[sample] == token
            if stays.any():
                found[sample, :, token] = stays.double()
                continue
            similar = x[index[sample]] @ x[token]
            similar[:prefix] -= 10000
            similar[targets - suffix :] -= 10000
            if seen is not None:
                similar -= 5000 * (seen[index[sample]] != seen[token]).double()
            if spread < targets - prefix - suffix:
                similar[similar < similar.sort(descending=True)[0][spread - 1]] -= 10000
            largest = max(largest, abs(float(similar.max())) / temperature)
            found[sample, :, token] = (similar / temperature).softmax(0)
    return found, largest


SINGLE = torch.finfo(torch.float32).eps

CLOSE = 8 * SINGLE
"""An exponential of a difference and a share, all of whole numbers, which are exact."""


def near(found: Tensor, expected: Tensor, weight_error: float, content: Tensor | None, roundings: int) -> None:
    """Means of so many tokens, the contents or the weights rounded to the dtype so often."""
    largest, eps = (1.0, 0.0) if content is None else (float(content.abs().max()), torch.finfo(content.dtype).eps)
    assert found.shape == expected.shape
    assert found.dtype == (torch.float32 if content is None else content.dtype)
    assert float((found.double() - expected).abs().max()) <= largest * (weight_error + roundings * eps)


ALL_FED = (torch.eye(9, 4)[None], torch.tensor([[0, 1, 4, 5, 8]]), None, 1, 1, 3, 1e4)
"""As many as there are between those in front and behind, and so warm that what counts as none still weighs."""


@GRID
@given(maps())
@example(ALL_FED)
def test_weights_are_those_of_one_token_after_the_other(factors: Factors) -> None:
    found = weights(*factors)
    expected, largest = exact(factors)
    # the softmax takes differences of logits that were rounded
    near(found, expected, CLOSE + 4 * largest * SINGLE, None, 0)


@GRID
@given(mixes())
def test_both_faces_mix_alike(case: tuple[Tensor, Tensor | None, Factors]) -> None:
    x, sizes, factors = case
    weight, largest = exact(factors)
    weight *= 1 if sizes is None else sizes.double().unsqueeze(1)
    means = torch.einsum("bts,bs...->bt...", weight / weight.sum(2, keepdim=True), x.double())
    # each weight is off by that much times a size, in the sum and in what it is divided by
    error = 2 * x.shape[1] * (1 if sizes is None else 8)
    near(interpreted("many_to_many", "mix", x, sizes, *factors), means, error * CLOSE, x, 1)
    near(mix(x, sizes, *factors), means, error * (CLOSE + 4 * largest * SINGLE), x, 4)


@settings(GRID, max_examples=12)
@given(mixes())
def test_both_faces_count_alike(case: tuple[Tensor, Tensor | None, Factors]) -> None:
    x, sizes, factors = case
    weight, largest = exact(factors)
    weight *= 1 if sizes is None else sizes.double().unsqueeze(1)
    error = x.shape[1] * (1 if sizes is None else 8)
    near(interpreted("many_to_many", "resize", sizes, *factors), weight.sum(2), error * CLOSE, None, 0)
    near(resize(sizes, *factors), weight.sum(2), error * (CLOSE + 4 * largest * SINGLE), None, 0)


@GRID
@given(mixes())
@example((torch.ones(1, 9, 1), None, ALL_FED))
def test_both_faces_give_back_alike(case: tuple[Tensor, Tensor | None, Factors]) -> None:
    x, _, factors = case
    y = x[:, : factors[1].shape[1]]
    weight, largest = exact(factors)
    rows = torch.einsum("bts,bt...->bs...", weight, y.double())
    near(interpreted("many_to_many", "back", y, *factors), rows, y.shape[1] * CLOSE, y, 1)
    near(back(y, *factors), rows, y.shape[1] * (CLOSE + 4 * largest * SINGLE), y, 4)


def test_the_map_of_a_pass_is_that_of_the_kernels() -> None:
    features, index = torch.randn(2, 9, 4), torch.tensor([[0, 2, 3, 8], [0, 1, 4, 7]])
    factors = (features, index, None, 1, 0, 2, 0.1)
    made = Spread.of(9, 4, factors, weighs=True)
    x, sizes = torch.randn(2, 9, 3), torch.rand(2, 9) + 1
    assert torch.equal(made.carry(x, sizes), many_to_many(x, sizes, *factors))
    assert torch.equal(made.resize(sizes), many_to_many_sizes(sizes, *factors))
    assert torch.equal(made.restore(x[:, :4]), many_to_many_back(x[:, :4], *factors))


def test_wrong_arguments_are_said_in_words() -> None:
    x = features = torch.randn(2, 6, 4)
    index, seen = torch.tensor([[0, 2, 5], [0, 1, 3]]), torch.ones(2, 6, dtype=torch.bool)
    good: dict[str, Any] = {"features": features, "index": index, "visible": seen, "prefix": 1, "suffix": 0}
    good |= {"spread": 2, "temperature": 0.1}
    assert many_to_many(x, None, *good.values()).shape == (2, 3, 4)
    for change, words in (
        ({"features": features[0]}, r"features of shape \[6, 4\]; pass one of shape \[any"),
        ({"features": features.double()}, r"float64; pass one of float32 or float16 or bfloat16"),
        ({"index": index[:1]}, r"index of shape \[1, 3\]; pass one of shape \[2, any\]"),
        ({"index": index.int()}, r"index of dtype int32; pass one of int64"),
        ({"index": index.repeat(1, 3)}, r"6 tokens, of which 9 stay; pass an index of different tokens"),
        ({"visible": seen[:, :5]}, r"visible of shape \[2, 5\]"),
        ({"visible": seen.float()}, r"visible of dtype float32; pass one of bool"),
        ({"prefix": 4}, r"got prefix=4; pass 0 <= prefix <= 3"),
        ({"suffix": 3}, r"got suffix=3; pass 0 <= suffix <= 2"),
        ({"spread": 0}, r"got spread=0; pass a number of tokens that each of the others feeds, 1 or more"),
        ({"temperature": 0.0}, r"got temperature=0.0; pass a positive number"),
    ):
        for call in (
            lambda *factors: many_to_many(x, None, *factors),
            lambda *factors: many_to_many_sizes(None, *factors),
            lambda *factors: many_to_many_back(x[:, :3], *factors),
        ):
            with pytest.raises(OptpassError, match=words):
                call(*{**good, **change}.values())
    factors = tuple(good.values())
    for wrong, words in (
        (lambda: many_to_many(x[:, :5], None, *factors), r"x of shape \[2, 5, 4\]; pass one of shape \[2, 6, any"),
        (lambda: many_to_many(x, torch.ones(2, 6).half(), *factors), r"sizes of dtype float16"),
        (lambda: many_to_many_sizes(torch.ones(2, 5), *factors), r"sizes of shape \[2, 5\]"),
        (lambda: many_to_many_back(x, *factors), r"y of shape \[2, 6, 4\]; pass one of shape \[2, 3, any"),
        (lambda: many_to_many([], None, *factors), r"takes a tensor as x, not list"),
    ):
        with pytest.raises(OptpassError, match=words):
            wrong()
