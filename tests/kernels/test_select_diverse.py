"""``select_diverse``: the Triton face held to the reference, and the reference to a greedy search that is slow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from optpass.errors import OptpassError
from optpass.kernels.base import FLOATS
from optpass.kernels.select_diverse import select_diverse
from optpass.kernels.select_diverse.reference import select

sys.path.insert(0, str(Path(__file__).parent))
from faces import interpreted

pytest.importorskip("triton", reason="install the extra dev, which brings Triton")

GRID = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))

Case = tuple[Tensor, Tensor, int, float, bool]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small whole numbers and weights of a half, exact in every dtype and full of ties; lengths around the tiles."""
    tokens = draw(st.sampled_from([1, 2, 3, 7, 31, 33, 127, 129, 257]))
    batch, width = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 16, 65]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    largest = draw(st.integers(0, 2))
    features = torch.randint(-largest, largest + 1, (batch, tokens, width), generator=generator)
    bias = torch.randint(-2, 3, (batch, tokens), generator=generator) / 2 * draw(st.sampled_from([0, 1, 16]))
    hidden = draw(st.sampled_from([0.0, 0.4, 1.0]))
    bias = torch.where(torch.rand(bias.shape, generator=generator) < hidden, -1e9, bias)
    count = draw(st.sampled_from(sorted({1, (tokens + 1) // 2, tokens} if tokens < 60 else {1, 9, 20})))
    dtype, weight = draw(st.sampled_from(FLOATS)), draw(st.sampled_from([0.0, 0.5, 1.0]))
    return features.to(dtype), bias, count, weight, draw(st.booleans())


@GRID
@given(cases())
def test_both_faces_choose_the_same_tokens(case: Case) -> None:
    assert torch.equal(interpreted("select_diverse", "select", *case), select(*case))


@GRID
@given(cases())
def test_each_next_token_is_the_best_and_the_first_of_equals(case: Case) -> None:
    features, bias, count, weight, apart = case
    found = select(*case)
    assert (found.shape, found.dtype) == ((len(features), count), torch.int64)
    for x, own, chosen in zip(features.double(), bias, found.tolist(), strict=True):
        tokens, distance = len(x), (1 - x @ x.T).float()
        for step, token in enumerate(chosen):
            others = [[j for j in (chosen[:step] or range(tokens)) if j != i] for i in range(tokens)]
            counts = step > 0 or (apart and tokens > 1)
            near = [float(distance[i, others[i]].min()) if counts and others[i] else 0.0 for i in range(tokens)]
            score = torch.tensor(near) * weight + own
            score[chosen[:step]] = -float("inf")
            assert token == int(score.argmax())


@pytest.mark.parametrize("copies", [7, 60])
@pytest.mark.parametrize("apart", [True, False])
def test_copies_of_few_tokens_are_chosen_once_each_before_any_twice(copies: int, apart: bool) -> None:
    tokens = torch.eye(5).repeat_interleave(copies, 0)
    case = (tokens.unsqueeze(0), torch.zeros(1, len(tokens)), 35, 1.0, apart)
    for found in (select(*case)[0], interpreted("select_diverse", "select", *case)[0]):
        assert found[:5].tolist() == [copies * kind for kind in range(5)]
        assert len(found.unique()) == 35


def test_more_tokens_are_the_same_and_some_behind() -> None:
    features = torch.nn.functional.normalize(torch.randn(2, 40, 8), dim=-1)
    few, many = (select_diverse(features, torch.zeros(2, 40), count, 1.0, True) for count in (5, 20))
    assert torch.equal(few, many[:, :5])


def test_wrong_arguments_are_said_in_words() -> None:
    features, bias = torch.randn(2, 6, 4), torch.zeros(2, 6)
    for call, words in (
        (lambda: select_diverse(features[0], bias, 2, 1.0, True), r"features of shape \[6, 4\]; pass one of shape"),
        (lambda: select_diverse(features.double(), bias, 2, 1.0, True), r"float64; pass one of float32 or float16 or"),
        (lambda: select_diverse(features, bias[:1], 2, 1.0, True), r"bias of shape \[1, 6\]; pass one of shape \[2, 6"),
        (lambda: select_diverse(features, bias.half(), 2, 1.0, True), r"bias of dtype float16; pass one of float32"),
        (lambda: select_diverse(features, bias, 7, 1.0, True), r"got count=7; pass 1 <= count <= 6"),
        (lambda: select_diverse(features, bias, 0, 1.0, True), r"got count=0; pass 1 <= count <= 6"),
        (lambda: select_diverse(features, bias, 2, -0.5, True), r"got weight=-0.5; pass a number that is not negative"),
        (lambda: select_diverse([], bias, 2, 1.0, True), r"takes a tensor as features, not list"),
    ):
        with pytest.raises(OptpassError, match=words):
            call()
