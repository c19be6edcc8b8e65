"""``prune``: what it keeps, at small and awkward counts, with every selector."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optpass import dump
from optpass.grammar import parse
from optpass.manager import Placed, apply, rewrite
from optpass.passes.prune.norm import Norm
from optpass.passes.prune.random import hashed
from optpass.passes.prune.selectors import selectors
from optpass.structure import analyse

sys.path.insert(0, str(Path(__file__).parents[1]))
from small import TOKENS, program, rewritten


def test_selectors_are_found_by_their_files() -> None:
    assert set(selectors()) == {"random", "norm", "cls-attention", "divprune", "mmr"}


@pytest.mark.parametrize("selector", ["random", "norm", "cls-attention", "divprune", "mmr"])
def test_the_protected_token_and_the_order_are_kept(selector: str) -> None:
    _, maps = rewritten(f"prune(selector={selector},keep=0.4,at=1)")
    index = maps["0.index"]
    assert index.shape == (2, 8)
    assert bool((index[:, 0] == 0).all())
    assert bool((index.diff(dim=1) > 0).all())


def test_selectors_choose_by_content_and_chance_does_not() -> None:
    for name in ("norm", "cls-attention", "divprune", "mmr"):
        index = rewritten(f"prune(selector={name},keep=0.4,at=1)")[1]["0.index"]
        assert not torch.equal(index[0], index[1]), name
    index = rewritten("prune(selector=random,keep=0.4,at=1)")[1]["0.index"]
    assert torch.equal(index[0], index[1])


def test_padding_is_dropped_before_any_token_that_is_seen() -> None:
    _, maps = rewritten("prune(selector=norm,keep=0.5,at=1)", mask="padding")
    assert int(maps["0.index"][1].max()) < 13


def test_two_sites_draw_different_subsets_by_chance() -> None:
    place = torch.arange(64)
    assert not torch.equal(hashed(place, 0).argsort(), hashed(place, 1).argsort())
    assert len(hashed(place, 0).unique()) == 64


def test_divprune_matches_a_slow_greedy_search() -> None:
    _, maps = rewritten("prune(selector=divprune,keep=0.35,at=2)")
    _, key = _attended()
    for sample in range(2):
        expected = _greedy(key.mean(1)[sample, 1:], 6)
        assert (maps["0.index"][sample][1:] - 1).tolist() == sorted(expected)


def test_mmr_matches_a_slow_search_that_weighs_relevance_against_likeness() -> None:
    _, maps = rewritten("prune(selector=mmr,keep=0.35,at=2)")
    query, key = _attended()
    attention = (query[:, :, :1] @ key.transpose(2, 3) * query.shape[3] ** -0.5).softmax(-1).mean(1)[:, 0, 1:]
    for sample in range(2):
        relevance = attention[sample] / attention[sample].max()
        x = torch.nn.functional.normalize(key.mean(1)[sample, 1:], dim=1)
        chosen = [int(relevance.argmax())]
        while len(chosen) < 6:
            rest = [i for i in range(len(x)) if i not in chosen]
            likeness = (x @ x[chosen].T).max(1)[0]
            chosen.append(max(rest, key=lambda i: float(0.5 * relevance[i] - 0.5 * likeness[i])))
        assert (maps["0.index"][sample][1:] - 1).tolist() == sorted(chosen)


@pytest.mark.parametrize("selector", ["divprune", "mmr"])
def test_padding_is_chosen_after_all_that_is_seen(selector: str) -> None:
    _, maps = rewritten(f"prune(selector={selector},r=5,at=1)", mask="padding")
    assert maps["0.index"][1].tolist() == list(range(13))


def test_the_relevance_of_padding_is_no_measure_of_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = rewritten("prune(selector=mmr,keep=0.3,at=1)", mask="padding", head="mean")[1]["0.index"]
    score = Norm.score
    monkeypatch.setattr(Norm, "score", lambda self, site, b: score(self, site, b) + (b.arange(b.count) >= 13) * 99.0)
    loud = rewritten("prune(selector=mmr,keep=0.3,at=1)", mask="padding", head="mean")[1]["0.index"]
    assert torch.equal(loud[1], quiet[1])


def _attended() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of block 2, ``[batch, heads, tokens, head_dim]``."""
    model = program().main
    structure = analyse(model)
    assert structure.main is not None
    attention = structure.main.blocks[2].attention
    assert attention is not None
    found = []
    for node in (attention.query, attention.key):
        interpreter = torch.fx.Interpreter(structure.module)
        interpreter.run_node = _keeping(interpreter, node)  # type: ignore[method-assign]
        interpreter.run(*model.example)
        found.append(interpreter.kept)  # type: ignore[attr-defined]
    query, key = found
    return query, key


def _keeping(interpreter: Any, wanted: torch.fx.Node) -> Callable[[torch.fx.Node], Any]:
    original = type(interpreter).run_node

    def run_node(node: torch.fx.Node) -> Any:
        result = original(interpreter, node)
        if node is wanted:
            interpreter.kept = result
        return result

    return run_node


def _greedy(x: torch.Tensor, count: int) -> list[int]:
    x = x / x.norm(dim=1, keepdim=True)
    distance = (1 - x @ x.T).fill_diagonal_(float("inf"))
    chosen = [int(distance.min(1)[0].argmax())]
    while len(chosen) < count:
        rest = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(distance[i, chosen].min())))
    return chosen


@settings(max_examples=8)
@given(st.integers(1, 16), st.sampled_from(["norm", "random"]))
def test_any_number_can_go_but_the_last(r: int, selector: str) -> None:
    record = apply(program(), parse(f"prune(selector={selector},r={r},at=1)")).records[0]
    assert record.status == "kept"
    assert record.tokens == [TOKENS, TOKENS - r]


def test_more_than_there_are_is_refused() -> None:
    record = apply(program(), parse("prune(r=17,at=1)")).records[0]
    assert record.status == "refused"
    assert "[no-room]" in record.reason
    assert "r=16 or less" in record.reason


def test_class_attention_is_refused_where_no_class_token_is() -> None:
    record = apply(program(head="mean"), parse("prune(selector=cls-attention,keep=0.5,at=1)")).records[0]
    assert "[no-class-token]" in record.reason


@pytest.mark.parametrize("case", ["class", "dense", "causal"])
def test_the_rewritten_graph(case: str, golden: Callable[[str, str], None]) -> None:
    options = {"class": {}, "dense": {"head": "dense", "mask": "padding"}, "causal": {"causal": True, "rotary": True}}[
        case
    ]
    model = program(**options).main
    structure = analyse(model)
    (made,) = parse("prune(selector=norm,keep=0.5,at=2)")
    sites = made.sites(structure)
    assert isinstance(sites, list)
    golden(case, dump.graph(rewrite(structure, [Placed(made, tuple(sites))]).module))
