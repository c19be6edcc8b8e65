"""``tree_attention``: the Triton face held to the reference, and the reference to attention on the path of a node."""

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
from optpass.kernels.tree_attention import tree_attention
from optpass.kernels.tree_attention.reference import attend

sys.path.insert(0, str(Path(__file__).parent))
from faces import interpreted

pytest.importorskip("triton", reason="install the extra dev, which brings Triton")

GRID = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))

HIDDEN = -1e30

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, groups, share = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    tokens, past = draw(st.sampled_from([1, 2, 5, 17])), draw(st.sampled_from([0, 1, 7, 32, 33, 70, 515, 1030]))
    width, depth = draw(st.sampled_from([1, 8, 17, 64])), draw(st.sampled_from([1, 8, 20]))
    dtype = draw(st.sampled_from(FLOATS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    heads, folded = groups * share, draw(st.booleans())
    query, key = random(batch, heads, tokens, width), random(batch, groups, tokens, width)
    value = random(batch, groups, tokens, depth)
    if folded:
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    # kept rows are a part of a larger buffer
    kept = [random(batch, groups, past + 3, size)[:, :, 1 : past + 1] for size in (width, depth)]
    shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), tokens, past + tokens)
    share_seen = draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
    bias = torch.where(torch.rand(shape, generator=generator) < share_seen, random(*shape).float(), HIDDEN)
    if draw(st.booleans()):
        # each token sees itself alone of what is not hidden for good
        bias = bias.masked_fill(bias == HIDDEN, float("-inf"))
        bias[..., past:].diagonal(dim1=-2, dim2=-1).zero_()
    return query, key, value, *kept, bias, draw(st.sampled_from([1.0, 0.125, 0.37]))


def rounding(case: Case) -> float:
    """Weights and results are rounded to the dtype, and logits to float32, whose error the weights amplify."""
    query, key, value, past_key, past_value, *_, scale = case
    largest = max(float(x.abs().max()) for x in (value, past_value) if x.numel())
    keys = max(float(x.float().norm(dim=-1).max()) for x in (key, past_key) if x.numel())
    logit = scale * float(query.float().norm(dim=-1).max()) * keys + 5
    single = torch.finfo(torch.float32).eps
    return largest * (2 * torch.finfo(query.dtype).eps + (4 * logit + 32) * single)


@GRID
@given(cases())
def test_both_faces_attend_alike(case: Case) -> None:
    ours = interpreted("tree_attention", "attend", *case)
    exact = attend(*(x.double() if isinstance(x, Tensor) else x for x in case))  # type: ignore[arg-type]
    assert (ours.dtype, ours.shape) == (case[0].dtype, exact.shape)
    assert bool(ours.isfinite().all())
    assert float((ours.double() - exact).abs().max()) <= rounding(case)


@given(st.integers(0, 99), st.integers(1, 9), st.integers(0, 6))
def test_a_node_attends_as_the_last_token_of_its_path(seed: int, count: int, past: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parent = [-1] + [int(torch.randint(0, node, (1,), generator=generator)) for node in range(1, count)]
    query, key, value = torch.randn(3, 1, 2, count, 4, generator=generator, dtype=torch.float64)
    past_key, past_value = torch.randn(2, 1, 2, past, 4, generator=generator, dtype=torch.float64)
    paths = []
    for node in range(count):
        path = [node]
        while parent[path[0]] >= 0:
            path.insert(0, parent[path[0]])
        paths.append(path)
    bias = torch.full((1, 1, count, past + count), HIDDEN, dtype=torch.float64)
    bias[..., :past] = 0
    for node, path in enumerate(paths):
        bias[..., node, [past + other for other in path]] = 0
    found = attend(query, key, value, past_key, past_value, bias, 0.5)
    for node, path in enumerate(paths):
        keys, values = (torch.cat([a, b[:, :, path]], 2) for a, b in ((past_key, key), (past_value, value)))
        alone = torch.nn.functional.scaled_dot_product_attention(query[:, :, node : node + 1], keys, values)
        torch.testing.assert_close(found[:, :, node : node + 1], alone)


def test_a_row_that_sees_nothing_is_the_mean_and_no_nan() -> None:
    query, key, value = torch.randn(3, 1, 1, 3, 16)
    past = torch.randn(1, 1, 5, 16)
    case = (query, key, value, past, past, torch.full((1, 1, 3, 8), HIDDEN), 1.0)
    mean = torch.cat([past, value], 2).mean(2, keepdim=True).expand(-1, -1, 3, -1)
    torch.testing.assert_close(attend(*case), mean)
    torch.testing.assert_close(interpreted("tree_attention", "attend", *case), mean)
    silent = (*case[:5], torch.full((1, 1, 3, 8), float("-inf")), 1.0)
    assert not interpreted("tree_attention", "attend", *silent).any()


def test_wrong_arguments_are_said_in_words() -> None:
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
    past, bias = torch.randn(2, 2, 5, 8), torch.zeros(2, 1, 3, 8)
    good = {"query": query, "key": key, "value": key, "past_key": past, "past_value": past, "bias": bias, "scale": 1.0}
    assert tree_attention(*good.values()).shape == (2, 4, 3, 8)
    for change, words in (
        ({"query": query[..., :7]}, r"query of shape \[2, 4, 3, 7\]; pass one of shape \[2, any, any, 8\]"),
        ({"query": query[:, :3]}, r"3 heads of queries and 2 of keys; pass a number of heads that is a multiple"),
        ({"key": key.half()}, r"query of float32, key of float16, .*; pass tensors of one dtype"),
        ({"value": key[:, :1]}, r"value of shape \[2, 1, 3, 8\]"),
        ({"past_value": past[:, :, :4]}, r"past_value of shape \[2, 2, 4, 8\]"),
        ({"bias": bias[..., :7]}, r"bias of shape \[2, 1, 3, 7\]; pass one of shape \[any, any, 3, 8\]"),
        ({"bias": bias.expand(-1, 3, -1, -1)}, r"pass one with heads of 1 or 4"),
        ({"bias": bias.bool()}, r"bias of dtype bool"),
    ):
        with pytest.raises(OptpassError, match=words):
            tree_attention(*{**good, **change}.values())
