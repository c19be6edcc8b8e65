"""``bipartite_merge``: the Triton face held to the reference, and the reference to what merging must preserve."""

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
from optpass.kernels.bipartite_merge import bipartite_match, bipartite_merge, bipartite_unmerge
from optpass.kernels.bipartite_merge.reference import match, merge, unmerge

sys.path.insert(0, str(Path(__file__).parent))
from faces import interpreted

pytest.importorskip("triton", reason="install the extra dev, which brings Triton")

GRID = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def matches(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, int]:
    """Features of small whole numbers, exact in every dtype and full of ties; lengths around the tiles."""
    tokens = draw(st.sampled_from([1, 2, 3, 4, 7, 16, 31, 33, 65, 129]))
    batch, width = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 16, 65]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    largest = draw(st.integers(0, 2))
    features = torch.randint(-largest, largest + 1, (batch, tokens, width), generator=generator)
    masked = draw(st.sampled_from(["no", "some", "all", "shared"]))
    visible = None
    if masked != "no":
        share = {"some": 0.5, "all": 1.0, "shared": 0.5}[masked]
        visible = torch.rand((1 if masked == "shared" else batch, tokens), generator=generator) > share
    return features.to(draw(st.sampled_from(FLOATS))), visible, draw(st.integers(0, tokens // 2))


@GRID
@given(matches())
def test_both_faces_match_the_same_pairs(case: tuple[Tensor, Tensor | None, int]) -> None:
    for ours, theirs in zip(interpreted("bipartite_merge", "match", *case), match(*case), strict=True):
        assert torch.equal(ours, theirs)


@GRID
@given(matches())
def test_every_token_stays_or_goes_and_the_first_of_equals_wins(case: tuple[Tensor, Tensor | None, int]) -> None:
    features, visible, r = case
    index, moved, slot = match(*case)
    tokens = features.shape[1]
    assert torch.equal(torch.cat([index, moved], 1).sort(1)[0], torch.arange(tokens).expand(len(index), -1))
    for sample, x in enumerate(features.double()):
        similar = x[0::2] @ x[1::2].T
        if visible is not None:
            seen = visible[sample if len(visible) > 1 else 0]
            similar -= 4.0 * (seen[0::2, None] != seen[None, 1::2])
        best, partner = similar.max(1) if tokens > 1 else (torch.zeros(1), torch.zeros(1, dtype=torch.int64))
        order = sorted(range(len(best)), key=lambda i: (-float(best[i]), i))[:r]
        order = sorted(order) if r == len(best) else order
        assert moved[sample].tolist() == [2 * i for i in order]
        assert index[sample][slot[sample]].tolist() == [2 * int(partner[i]) + 1 for i in order]


@st.composite
def merges(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    features, visible, r = draw(matches())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    shape = (*features.shape[:2], *draw(st.sampled_from([(1,), (5,), (2, 3), (66,)])))
    x = torch.randn(shape, generator=generator).to(draw(st.sampled_from(FLOATS)))
    sizes = torch.randint(1, 9, shape[:2], generator=generator).float() if draw(st.booleans()) else None
    return (x, sizes, *match(features, visible, r))


def rounding(dtype: torch.dtype, largest: float, terms: int) -> float:
    """A mean of so many numbers is rounded once for each in float32, and at the end to the dtype."""
    return largest * (torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps)


@GRID
@given(merges())
def test_both_faces_merge_to_the_same_means(case: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]) -> None:
    x, sizes, index, moved, slot = case
    ours = interpreted("bipartite_merge", "merge", *case)
    exact = merge(x.double(), None if sizes is None else sizes.double(), index, moved, slot)
    assert ours.dtype == x.dtype
    assert ours.shape == exact.shape
    bound = rounding(x.dtype, float(x.double().abs().max()), moved.shape[1] + 4)
    assert float((ours.double() - exact).abs().max()) <= bound


@GRID
@given(merges())
def test_both_faces_give_back_the_same_bits(case: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]) -> None:
    y = merge(*case)
    assert torch.equal(interpreted("bipartite_merge", "unmerge", y, *case[2:]), unmerge(y, *case[2:]))


@GRID
@given(merges())
def test_the_weighted_sum_of_all_tokens_is_that_of_before(case: tuple[Tensor, ...]) -> None:
    x, sizes, index, moved, slot = case
    sizes = (torch.ones(x.shape[:2]) if sizes is None else sizes).double()
    merged = merge(x.double(), sizes, index, moved, slot)
    after = sizes.gather(1, index).scatter_add(1, slot, sizes.gather(1, moved))
    total = torch.einsum("bn,bn...->b...", sizes, x.double())
    torch.testing.assert_close(torch.einsum("bn,bn...->b...", after, merged), total, rtol=0, atol=1e-4)


def test_wrong_arguments_are_said_in_words() -> None:
    features = torch.randn(2, 6, 4)
    index, moved, slot = bipartite_match(features, None, 2)
    for call, words in (
        (lambda: bipartite_match(features[0], None, 2), r"features of shape \[6, 4\]; pass one of shape \[any"),
        (lambda: bipartite_match(features.double(), None, 2), r"float64; pass one of float32 or float16 or bfloat16"),
        (lambda: bipartite_match(features, None, 4), r"got r=4; pass 0 <= r <= 3"),
        (lambda: bipartite_match(features, torch.ones(2, 5, dtype=torch.bool), 2), r"visible of shape \[2, 5\]"),
        (lambda: bipartite_match(features, torch.ones(2, 6), 2), r"visible of dtype float32; pass one of bool"),
        (lambda: bipartite_merge(features[:, :5], None, index, moved, slot), r"5 tokens, of which 4 stay and 2 go"),
        (lambda: bipartite_merge(features, torch.ones(2, 6).half(), index, moved, slot), r"sizes of dtype float16"),
        (lambda: bipartite_unmerge(features[:, :4], index, moved, slot[:, :1]), r"slot of shape \[2, 1\]"),
        (lambda: bipartite_unmerge(features, index, moved, slot), r"index of shape \[2, 4\]"),
        (lambda: bipartite_match([], None, 2), r"takes a tensor as features, not list"),
    ):
        with pytest.raises(OptpassError, match=words):
            call()
