"""Budgets: what is taken, and what makes no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import optpass
from optpass import budget as budgets
from optpass.errors import OptpassError


def test_a_table_may_stand_once_or_be_repeated(tmp_path: Path) -> None:
    file = tmp_path / "budget.toml"
    file.write_text("[latency]\np50_ms = 8.0\n[[speedup]]\nat_least = 1.3\n[[speedup]]\nat_least = 1.1\nbatch = 1\n")
    found = budgets.load_budget(file)
    assert [table.p50_ms for table in found.latency] == [8.0]
    assert [(table.at_least, table.batch, table.over) for table in found.speedup] == [
        (1.3, None, "dense"),
        (1.1, 1, "dense"),
    ]


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "budget.toml"
    file.write_text(
        '[baseline]\nartifact = "last"\n[[quality]]\nmax_drop = 1\ndata = "a.npz"\n'
        '[[quality]]\nmax_drop = 1\ndata = "package.module:function"\n'
    )
    found = budgets.load_budget(file)
    assert found.baseline is not None
    assert found.baseline.artifact == str(tmp_path / "last")
    assert [table.data for table in found.quality] == [str(tmp_path / "a.npz"), "package.module:function"]


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({}, "it sets no limit"),
        ({"version": 2, "size": {"mib": 1}}, "version = 2"),
        ({"latncy": {"p50_ms": 1}}, "no key latncy; did you mean latency"),
        ({"latency": {"p50": 1}}, "no key latency.p50; did you mean p50_ms"),
        ({"latency": [{"p50_ms": 1}, {"p95": 2}]}, r"no key latency\[1\].p95; did you mean p95_ms"),
        ({"latency": {"p50_ms": -1}}, "latency.p50_ms = -1: input should be greater than 0"),
        ({"latency": {"p50_ms": 0}}, "latency.p50_ms = 0"),
        ({"latency": {}}, "latency: needs p50_ms or p95_ms"),
        ({"latency": {"p50_ms": 1, "batch": 0}}, "latency.batch = 0"),
        ({"latency": 3}, "latency = 3"),
        ({"size": {"mib": float("inf")}}, "size.mib = inf: input should be a finite number"),
        ({"speedup": {}}, "speedup.at_least: field required"),
        ({"speedup": {"at_least": "fast"}}, "speedup.at_least = 'fast'"),
        ({"speedup": {"at_least": 1, "over": "yesterday"}}, "speedup.over = 'yesterday'"),
        ({"quality": {"metric": "top1"}}, "quality: needs max_drop or at_least"),
        ({"quality": {"max_drop": -0.5}}, "quality.max_drop = -0.5"),
        ({"size": {"mib": 1}, "baseline": {}}, "baseline: needs one of artifact and file"),
        ({"size": {"mib": 1}, "baseline": {"artifact": "a", "file": "b"}}, "baseline: needs one of"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(tables: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptpassError, match=sentence) as caught:
        budgets.parse(tables)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_the_shipped_schema_is_that_of_the_code() -> None:
    shipped = Path(optpass.__file__).parent / "budget.schema.json"
    assert json.loads(shipped.read_text()) == budgets.schema()


def test_the_schema_takes_one_table_or_several() -> None:
    forms = budgets.schema()["properties"]["latency"]["anyOf"]
    assert {form.get("type", "table") for form in forms} == {"table", "array"}
