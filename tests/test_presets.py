"""Presets: each file holds together, places itself in models of any depth, and promises what was measured."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import optpass
from optpass import grammar, manager, presets
from optpass.capture import capture
from optpass.cli import _tables
from optpass.errors import OptpassError
from optpass.passes.base import Pass
from optpass.program import Program
from optpass.results import Promise
from optpass.structure import analyse
from tests import small

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "presets.json"
ALL = [(name, kind) for kind in presets.kinds() for name in presets.NAMES]


class Vision(small.Small):
    """A small model whose one input is of floats."""

    def __init__(self, depth: int = 4, *, causal: bool = False) -> None:
        super().__init__(causal=causal)
        self.layers = torch.nn.ModuleList(small.Layer(rotary=False, positions_inside=False) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, x, x)


def of_depth(depth: int) -> Program:
    return capture(source(depth))


def source(depth: int = 4, *, causal: bool = False) -> tuple[Any, ...]:
    return Vision(depth, causal=causal), (torch.randn(2, small.TOKENS, 6, generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize(("name", "kind"), ALL)
@pytest.mark.parametrize("depth", [1, 2, 3, 7, 12])
def test_preset_and_control_go_to_the_same_sites_of_a_model_of_any_depth(name: str, kind: str, depth: int) -> None:
    program, found = of_depth(depth), presets.preset(name, kind)
    assert analyse(program.main).kind == kind
    made = manager.apply(program, found.passes, verify=depth == 3)
    control = manager.apply(program, grammar.parse(found.control), verify=False)
    assert made.ok, made.records
    counts = [int(count) for count in made.records[-1].tokens]
    assert all(after < before for before, after in pairwise(counts))
    if depth > 3:  # where two sites fall on one block, chance takes them as one
        # of an odd number of tokens one has no partner to merge with
        assert all(abs(a - int(b)) <= 1 for a, b in zip(counts, control.records[-1].tokens, strict=True))
        sites = [site for record in made.records for site in record.sites]
        assert sites == [site for record in control.records for site in record.sites]


@pytest.mark.parametrize(
    ("percent", "depth", "block"),
    [(0, 6, 0), (17, 6, 1), (34, 6, 2), (50, 6, 3), (99, 6, 5), (100, 6, 5), (50, 1, 0), (34, 12, 4)],
)
def test_percent_is_a_place_along_the_depth(percent: int, depth: int, block: int) -> None:
    (made,) = grammar.parse(f"prune(at={percent}%)")
    sites = made.sites(analyse(of_depth(depth).main))
    assert isinstance(sites, list)
    assert [site.block.path for site in sites] == [f"layers.{block}"]


def test_more_than_the_whole_depth_names_no_block() -> None:
    (made,) = grammar.parse("prune(at=101%)")
    assert "matches no block" in str(made.sites(analyse(of_depth(2).main)))


# what is promised


def measured() -> dict[tuple[str, str, str], dict[str, Any]]:
    rows = json.loads(RESULTS.read_text())["rows"]
    return {(row["kind"], row["preset"], row["arm"]): row for row in rows}


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_promise_is_what_was_measured(name: str, kind: str) -> None:
    promise = presets.preset(name, kind).promise
    assert isinstance(promise, Promise)
    row, control = measured()[kind, name, "preset"], measured()[kind, name, "control"]
    assert list(promise.drop) == row["drop"]
    assert list(promise.control_drop) == control["drop"]
    assert {batch: list(value) for batch, value in promise.speedup.items()} == row["speedup"]
    assert (promise.metric, promise.samples) == (row["metric"], row["samples"])
    assert json.loads(RESULTS.read_text())["machine"]["date"].startswith(promise.date)


@pytest.mark.parametrize("kind", presets.kinds())
def test_names_say_how_they_compare(kind: str) -> None:
    found = [presets.preset(name, kind).promise for name in presets.NAMES]
    speeds = [promise.speedup["8"] for promise in found if promise]
    assert all(slow[2] < fast[1] for slow, fast in pairwise(speeds))
    safe = found[0]
    assert safe is not None
    assert safe.drop[0] <= 0.2
    assert safe.drop[1] <= 0


# how they are asked for


def passes_of(made: list[Pass] | tuple[Pass, ...]) -> str:
    return grammar.as_recipe(made)


def test_optimize_with_a_preset_applies_its_passes_and_keeps_them_as_a_recipe(tmp_path: Path) -> None:
    result = optpass.optimize(source(), preset="fast", out=tmp_path / "engine", seconds=0)
    found = presets.preset("fast", "vision")
    assert result.ok
    assert (result.preset, result.promise) == ("fast", found.promise)
    assert optpass.load(tmp_path / "engine").manifest.recipe == passes_of(found.passes)


def test_kind_without_figures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptpassError, match="no preset was measured yet for a model of the kind causal-lm") as refused:
        presets.preset("safe", "causal-lm")
    assert refused.value.exit_code == 2
    with pytest.raises(OptpassError, match="no-preset"):
        optpass.optimize(source(causal=True), preset="safe", out=tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("other", [{"passes": "prune"}, {"recipe": "r.toml"}])
def test_preset_excludes_what_else_names_passes(other: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(OptpassError, match="exclude each other"):
        optpass.optimize("fashion-vit", preset="safe", out=tmp_path / "engine", **other)  # type: ignore[arg-type]


def test_unknown_preset_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OptpassError, match="unknown-preset"):
        optpass.optimize("./gone.pt2", preset="best", out=tmp_path / "engine")


def test_promise_is_printed_with_its_source(golden: Callable[[str, str], None]) -> None:
    promise = Promise(
        model="fashion-vit",
        engine="onnxruntime-f32",
        machine="a processor, 2 cores",
        date="2026-01-31",
        metric="top1",
        samples=2000,
        drop=(0.1, -0.2, 0.4),
        control_drop=(1.5, 1.0, 2.0),
        speedup={"8": (1.9, 1.85, 1.95), "1": (1.5, 1.4, 1.6)},
        command="python -m benchmarks.presets",
    )
    text = io.StringIO()
    _tables.show_promise("balanced", promise, Console(file=text, width=160, highlight=False, soft_wrap=True))
    golden("promise", text.getvalue())
