"""``transform``: the laws of a many-to-many map, and the special cases that it must reproduce."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optpass import dump
from optpass import rewrite as rewriter
from optpass.grammar import parse
from optpass.manager import Placed, apply, rewrite
from optpass.structure import analyse

sys.path.insert(0, str(Path(__file__).parents[1]))
from small import TOKENS, program, rewritten


def weights(passes: str, monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[Tensor, Tensor]:
    """The assignment matrix of the first site and the index of its targets."""
    monkeypatch.setattr(rewriter, "TAPPED", ("weight", "index"))
    _, taps = rewritten(passes, **options)
    return taps["0.weight"], taps["0.index"]


@pytest.mark.parametrize("how", ["", ",spread=1", ",spread=9,temperature=1"])
def test_columns_sum_to_one_and_selected_tokens_go_to_themselves(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, index = weights(f"transform(keep=0.5,at=1{how})", monkeypatch)
    assert weight.shape == (2, 9, TOKENS)
    torch.testing.assert_close(weight.sum(1), torch.ones(2, TOKENS))
    assert bool((weight >= 0).all())
    own = weight.gather(2, index.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(own, torch.ones_like(own))


def test_nothing_flows_into_the_class_token(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = weights("transform(keep=0.5,at=1,spread=3)", monkeypatch)
    assert float(weight[:, 0, 1:].max()) < 1e-6


def test_a_token_feeds_as_many_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    for spread in (1, 3):
        weight, index = weights(f"transform(keep=0.5,at=1,spread={spread},temperature=1)", monkeypatch)
        others = torch.ones(2, TOKENS).scatter(1, index, 0).bool()
        fed = (weight > 1e-6).sum(1)[others]
        assert bool((fed == spread).all()), fed


def test_spread_one_merges_each_token_into_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, index = weights("transform(keep=0.5,at=1,spread=8,temperature=0.001)", monkeypatch)
    hard, again = weights("transform(keep=0.5,at=1,spread=1)", monkeypatch)
    assert torch.equal(index, again)
    assert torch.equal(soft.argmax(1), hard.argmax(1))


def test_padding_feeds_padding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, index = weights("transform(keep=0.9,at=1,selector=norm)", monkeypatch, mask="padding", head="mean")
    seen = torch.arange(TOKENS) < 13
    into_seen = weight[1][seen[index[1]]]
    assert float(into_seen[:, ~seen].max()) < 1e-6


@pytest.mark.parametrize("head", ["class", "mean", "dense"])
def test_it_holds_its_probes(head: str) -> None:
    made = apply(program(head=head, mask="padding", positions=True), parse("transform(keep=0.6,at=[1,2])"))
    assert made.ok, made.records
    assert made.records[0].probes.equivalence is None


def test_it_changes_the_outputs_otherwise_than_dropping_the_same_tokens() -> None:
    kept = apply(program(), parse("transform(keep=0.5,at=1,selector=norm)")).program.main
    dropped = apply(program(), parse("prune(keep=0.5,at=1,selector=norm)")).program.main
    a, b = kept.run(kept.example)[0], dropped.run(dropped.example)[0]
    assert float((a - b).abs().max()) > 1e-3


def test_the_rewritten_graph(golden: Callable[[str, str], None]) -> None:
    structure = analyse(program().main)
    (made,) = parse("transform(keep=0.5,at=1)")
    sites = made.sites(structure)
    assert isinstance(sites, list)
    golden("class", dump.graph(rewrite(structure, [Placed(made, tuple(sites))]).module))
