"""``merge``: held to the paper's own way of computing it, and to what merging must preserve."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from optpass import dump
from optpass.grammar import parse
from optpass.manager import Placed, apply, rewrite
from optpass.structure import analyse

sys.path.insert(0, str(Path(__file__).parents[1]))
from small import TOKENS, program, rewritten


def paper(key: Tensor, r: int) -> list[tuple[int, int]]:
    """Bipartite soft matching of one sample without a class token, as the paper's listing does it: (source, target)."""
    x = key / key.norm(dim=1, keepdim=True)
    a, b = x[0::2], x[1::2]
    best, partner = (a @ b.T).max(1)
    order = best.argsort(descending=True)[:r]
    return sorted((int(i) * 2, int(partner[i]) * 2 + 1) for i in order)


def test_pairs_are_those_of_bipartite_soft_matching(monkeypatch: pytest.MonkeyPatch) -> None:
    from optpass.passes import merge

    seen: list[Tensor] = []
    model = program(head="mean").main
    structure = analyse(model)
    (made,) = parse("merge(r=5,at=1)")
    sites = made.sites(structure)
    assert isinstance(sites, list)
    original = merge.token_features

    def kept(site: object, b: object) -> object:
        features = original(site, b)  # type: ignore[arg-type]
        seen.append(features)
        return features

    monkeypatch.setattr(merge, "token_features", kept)
    result = rewrite(structure, [Placed(made, tuple(sites))], tap=True)
    graph = result.module.graph
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = ((*output.args[0], seen[0].node),)  # type: ignore[attr-defined]
    result.module.recompile()
    *_, index, group, features = result.module(*model.example)
    for sample in range(2):
        pairs = paper(features[sample], 5)
        gone = sorted(set(range(TOKENS)) - set(index[sample].tolist()))
        assert gone == [source for source, _ in pairs]
        for source, target in pairs:
            assert int(group[sample, source]) == index[sample].tolist().index(target)


def test_merging_leaves_the_class_token_alone() -> None:
    _, maps = rewritten("merge(r=6,at=1)")
    assert bool((maps["0.group"][:, 0] == 0).all())
    assert bool((maps["0.group"][:, 1:] > 0).all())


def test_padding_merges_with_padding_alone() -> None:
    _, maps = rewritten("merge(r=8,at=1)", mask="padding", head="mean")
    group = maps["0.group"][1]
    assert not set(group[:13].tolist()) & set(group[13:].tolist())


@pytest.mark.parametrize("r", [0, 1, 8])
def test_each_r_up_to_half_of_the_free_tokens_is_kept(r: int) -> None:
    record = apply(program(mask="padding", rotary=True, head="mean"), parse(f"merge(r={r},at=1)")).records[0]
    assert record.status == "kept", record
    assert record.tokens == [TOKENS, TOKENS - r]


def test_more_than_half_is_refused_with_the_bound() -> None:
    record = apply(program(), parse("merge(r=9,at=1)")).records[0]
    assert record.status == "refused"
    assert "use r=8 or less" in record.reason


def test_a_dense_output_is_given_back_for_every_token() -> None:
    made = apply(program(head="dense"), parse("merge(r=4,at=[0,1,2])"))
    assert made.ok, made.records
    stage = made.program.main
    assert stage.run(stage.example)[0].shape == (2, 5, 3, 6)
    assert made.records[0].restored


def test_without_proportional_attention_there_is_no_equivalence_to_hold() -> None:
    record = apply(program(), parse("merge(r=4,at=1,proportional=false)")).records[0]
    assert record.status == "kept"
    assert record.probes.equivalence is None


@pytest.mark.parametrize("case", ["class", "dense"])
def test_the_rewritten_graph(case: str, golden: Callable[[str, str], None]) -> None:
    structure = analyse(program(head=case).main)
    (made,) = parse("merge(r=4,at=[1,2])")
    sites = made.sites(structure)
    assert isinstance(sites, list)
    golden(case, dump.graph(rewrite(structure, [Placed(made, tuple(sites))]).module))
