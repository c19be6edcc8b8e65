"""The token algebra: laws that hold for every map, on random ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optpass.tokens import (
    Assign,
    Averaged,
    Concat,
    Gather,
    Identity,
    Masked,
    Matrix,
    Merge,
    Slice,
    TokenMap,
    compose,
    pool,
)

BATCH, WIDTH = 2, 5
KINDS = ("gather", "permutation", "merge", "assign", "matrix", "pool")


def random_map(kind: str, source: int, target: int, seed: int) -> TokenMap:
    g = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(source, generator=g) for _ in range(BATCH)])
    kept = order[:, :target]
    match kind:
        case "gather":
            return Gather(source, target, kept.sort(1)[0])
        case "permutation":
            return Gather(source, source, order, in_order=False, bijective=True)
        case "merge":
            slot = torch.randint(0, target, (BATCH, source - target), generator=g)
            return Merge(source, target, kept, order[:, target:], slot)
        case "assign":
            group = torch.randint(0, target, (BATCH, source), generator=g)
            group.scatter_(1, kept, torch.arange(target).expand(BATCH, -1))
            return Assign(source, target, group, kept)
        case "matrix":
            weight = torch.rand(BATCH, target, source, generator=g).softmax(1)
            return Matrix(source, target, weight, kept)
        case "pool":
            return pool(source, target, BATCH)
    raise AssertionError(kind)


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randn(BATCH, count, WIDTH, generator=torch.Generator().manual_seed(seed))


shapes = st.tuples(st.integers(1, 9), st.integers(0, 6)).map(lambda s: (s[0] + s[1], s[0]))
maps = st.builds(
    lambda kind, shape, seed: random_map(kind, *shape, seed), st.sampled_from(KINDS), shapes, st.integers(0, 99)
)


@settings(max_examples=60)
@given(maps, st.integers(1, 9), st.sampled_from(KINDS), st.integers(0, 99))
def test_a_composed_map_carries_as_the_two_in_a_row(first: TokenMap, wanted: int, kind: str, seed: int) -> None:
    second = random_map(kind, first.target, min(wanted, first.target), seed)
    x = tokens(first.source)
    sizes = first.resize(None)
    in_a_row = second.carry(first.carry(x), sizes)
    torch.testing.assert_close(compose(first, second).carry(x), in_a_row, atol=1e-5, rtol=1e-5)


@settings(max_examples=60)
@given(maps)
def test_merging_keeps_the_sum_of_all_tokens(token_map: TokenMap) -> None:
    if not token_map.exact:
        return
    x, sizes = tokens(token_map.source), torch.randint(1, 5, (BATCH, token_map.source)).float()
    after, weights = token_map.carry(x, sizes), token_map.resize(sizes)
    weights = sizes.gather(1, token_map.index) if weights is None else weights  # type: ignore[attr-defined]
    torch.testing.assert_close(
        (after * weights.unsqueeze(-1)).sum(1), (x * sizes.unsqueeze(-1)).sum(1), atol=1e-4, rtol=1e-4
    )


@settings(max_examples=60)
@given(maps)
def test_kept_tokens_come_back_where_they_were(token_map: TokenMap) -> None:
    y = tokens(token_map.target)
    stale = tokens(token_map.source, 1)
    back = token_map.restore(y, stale)
    assert back.shape == (BATCH, token_map.source, WIDTH)
    if isinstance(token_map, Gather | Merge | Assign):
        kept = back.gather(1, token_map.index.unsqueeze(-1).expand(-1, -1, WIDTH))
        torch.testing.assert_close(kept, y)


@settings(max_examples=40)
@given(maps)
def test_a_merge_of_equal_tokens_is_undone_exactly(token_map: TokenMap) -> None:
    if not isinstance(token_map, Merge | Assign):
        return
    y = tokens(token_map.target)
    x = token_map.restore(y)
    torch.testing.assert_close(token_map.carry(x), y)


def test_a_merge_agrees_with_the_assignment_it_stands_for() -> None:
    merge = random_map("merge", 11, 7, 3)
    assert isinstance(merge, Merge)
    assign = Assign(11, 7, merge.group, merge.index)
    x, sizes = tokens(11), torch.randint(1, 4, (BATCH, 11)).float()
    torch.testing.assert_close(merge.carry(x, sizes), assign.carry(x, sizes))
    torch.testing.assert_close(merge.resize(sizes), assign.resize(sizes))


@pytest.mark.parametrize("kind", ["gather", "merge", "matrix"])
def test_a_map_beside_an_identity_leaves_the_other_tokens_alone(kind: str) -> None:
    inner = random_map(kind, 6, 4, 1)
    both = Concat.of((Identity(3, 3), inner))
    x = tokens(9)
    after = both.carry(x)
    torch.testing.assert_close(after[:, :3], x[:, :3])
    torch.testing.assert_close(after[:, 3:], inner.carry(x[:, 3:]))
    assert both.restore(after, x).shape == x.shape


def test_a_cut_map_acts_as_the_whole_on_the_tokens_between() -> None:
    index = torch.tensor([[0, 2, 3, 5, 6], [0, 1, 4, 5, 6]])  # protects 0, and 5 and 6
    whole = Gather(7, 5, index)
    x = tokens(7)
    torch.testing.assert_close(whole.cut(1, 2).carry(x[:, 1:5]), whole.carry(x)[:, 1:3])


def test_masked_tokens_count_as_nothing_and_move_nowhere() -> None:
    kept = torch.tensor([[True, False, True], [True, True, False]])
    masked = Masked(3, 3, kept)
    x, stale = tokens(3), tokens(3, 1)
    assert masked.carry(x) is x
    sizes = masked.resize(None)
    assert torch.equal(sizes > 1e-6, kept)
    assert bool(sizes.log().isfinite().all())
    assert torch.equal(masked.restore(x, stale)[0, 1], stale[0, 1])


def test_averaged_tokens_are_what_a_merge_gives_back() -> None:
    merge = random_map("merge", 9, 5, 5)
    assert isinstance(merge, Merge)
    leader = merge.index.gather(1, merge.group)
    x = tokens(9)
    torch.testing.assert_close(Averaged(9, 9, merge.group, leader).carry(x), merge.restore(merge.carry(x)))


def test_a_slice_needs_the_rows_it_dropped_to_restore() -> None:
    cut = Slice(6, 3, start=2)
    x = tokens(6)
    torch.testing.assert_close(cut.restore(cut.carry(x), x), x)
    with pytest.raises(ValueError, match="stale rows"):
        cut.restore(cut.carry(x))
