"""The probes find what they exist for: each coercion of the rewriter is switched off in turn, and one notices."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optpass import probes, rules
from optpass.grammar import parse
from optpass.layout import Layout
from optpass.manager import apply
from optpass.program import Program
from optpass.results import PassRecord
from optpass.rewrite import Tracked, Walker
from optpass.tokens import Gather, Merge

sys.path.insert(0, str(Path(__file__).parent))
from small import program


def outcome(model: Program, passes: str) -> PassRecord:
    return apply(model, parse(passes)).records[0]


Mutation = Callable[[pytest.MonkeyPatch], None]


def unmapped(chosen: Callable[[Walker, Tracked, Layout, int], bool]) -> Mutation:
    """Every map becomes one that keeps its count, and values that ``chosen`` names are not coerced by it."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        original = Walker._map_dim

        def skip(self: Walker, x: Any, batch: int, tokens: int, atom: Any, step: int, content: bool) -> Any:
            return x if chosen(self, x, batch, tokens) else original(self, x, batch, tokens, atom, step, content)  # type: ignore[arg-type]

        patch.setattr(Walker, "_map_dim", skip)

    return mutate


def is_float(x: Any) -> bool:
    return bool(x.dtype.is_floating_point)


# a mask of one head is [batch, 1, rows, columns]; rotary angles [1, 1, tokens, 8]; positions [1, tokens, width]
MUTATIONS: dict[str, tuple[dict[str, Any], Mutation]] = {
    "mask rows": ({"mask": "bias"}, unmapped(lambda w, x, b, t: x.dim() == 4 and t == 2 and x.shape[3] != 8)),
    "mask columns": ({"mask": "padding"}, unmapped(lambda w, x, b, t: x.dim() == 4 and t == 3)),
    "rotary": ({"rotary": True}, unmapped(lambda w, x, b, t: x.dim() in (2, 4) and x.shape[-1] == 8)),
    "positions": ({"positions": True}, unmapped(lambda w, x, b, t: is_float(x) and x.value.shape == (1, 18, 32))),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_value_that_is_not_coerced_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, mutate = MUTATIONS[name]
    model = program(**options)
    good = outcome(model, "prune(at=1,r=0)")
    assert good.status == "kept", good
    skipped: list[str] = []
    mutate(monkeypatch)
    original = Walker._map_dim
    monkeypatch.setattr(Walker, "_map_dim", lambda *a: skipped.append(name) or original(*a))
    bad = outcome(model, "prune(at=1,r=0)")
    assert skipped
    assert bad.status == "rolled_back", bad
    assert "permutation probe" in bad.reason


def test_a_stale_literal_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = program()

    def stale(walker: Walker, node: Any) -> Tracked:
        value, layout = rules.layout_of(walker, node.args[0])
        new = rules.regroup(layout, rules.old_shape(node))
        assert new is not None
        return Tracked(value.proxy.reshape(list(node.meta["val"].shape)), new, value.level, value.local)

    monkeypatch.setitem(rules.RULES, "reshape", stale)
    monkeypatch.setitem(rules.RULES, "view", stale)
    assert outcome(model, "prune(at=1,keep=0.5,selector=norm)").status == "rolled_back"


def test_a_restore_in_the_wrong_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = program(head="dense")
    assert outcome(model, "prune(at=1,keep=0.5,selector=norm)").status == "kept"
    assert outcome(model, "merge(at=1,r=4)").status == "kept"
    monkeypatch.setattr(Gather, "restore", lambda self, y, stale=None: y if self.bijective else stale)
    pruned = outcome(model, "prune(at=1,keep=0.5,selector=norm)")
    assert "probe" in pruned.reason
    assert pruned.status == "rolled_back"


@pytest.mark.parametrize("head", ["class", "mean"])
def test_a_size_that_does_not_weigh_is_noticed(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = program(head=head)
    assert outcome(model, "merge(at=1,r=6)").status == "kept"
    monkeypatch.setattr(Walker, "bias", lambda self, atom, level: None)
    merged = outcome(model, "merge(at=1,r=6)")
    assert merged.status == "rolled_back"
    assert "equivalence probe" in merged.reason


def test_a_mean_over_tokens_that_forgets_sizes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = program(head="mean")
    monkeypatch.setattr(Walker, "axis_sizes", lambda self, atom, level: None)
    assert "equivalence probe" in outcome(model, "merge(at=3,place=block,r=6)").reason


def test_a_protected_token_that_moves_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = program()
    from optpass.passes import prune

    original = prune.surrounded
    monkeypatch.setattr(prune, "surrounded", lambda b, inner: original(b, inner).flip(1))
    pruned = outcome(model, "prune(at=1,keep=0.5,selector=norm)")
    assert pruned.status == "rolled_back"
    assert "identity probe" in pruned.reason


def test_merged_content_that_is_not_averaged_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = program()
    monkeypatch.setattr(Merge, "carry", lambda self, x, sizes=None: self.pick(x))
    assert "equivalence probe" in outcome(model, "merge(at=1,r=6)").reason


def test_a_causal_flag_that_outlives_the_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = program(causal=True, head="mean")
    assert outcome(model, "prune(at=1,keep=0.5,selector=norm)").status == "kept"
    monkeypatch.setattr(Walker, "in_order", lambda self, level: True)
    assert "permutation probe" in outcome(model, "prune(at=1,keep=0.5,selector=norm)").reason


def test_differences_count_nan_infinity_and_shapes() -> None:
    one, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert probes.difference([one], [one]) == 0
    assert probes.difference([nan], [nan]) == 0
    assert probes.difference([one], [nan]) == float("inf")
    assert probes.difference([one], [torch.ones(3)]) == float("inf")
    assert probes.difference([torch.tensor([float("inf")])], [torch.tensor([float("-inf")])]) == float("inf")
