"""``optpass gate`` as a process: its exit code is the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.cli.driver import Driver
from tests.export import artifacts


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifacts.write(tmp_path_factory.mktemp("gate-cli") / "engine", (("onnxruntime", "f32"),))


@pytest.mark.parametrize(
    ("budget", "options", "code", "error"),
    [
        ("[size]\nmib = 50\n", [], 0, ""),
        ("[size]\nmib = 0.001\n", [], 1, "budget-broken"),
        ("seconds = 0.01\n[speedup]\nat_least = 1.0\n", [], 3, "budget-undecided"),
        ("seconds = 0.01\n[speedup]\nat_least = 1.0\n", ["--inconclusive", "pass"], 0, ""),
        ("seconds = 0.01\n[speedup]\nat_least = 1.0\n", ["--inconclusive", "fail"], 1, "budget-undecided"),
        ("[size]\nmb = 50\n", [], 2, "budget"),
        ("[size\n", [], 2, "budget"),
        ("[size]\nmib = 50\n", ["--junit", "no/such/dir/j.xml"], 2, "output"),
    ],
)
def test_the_exit_code_is_the_verdict(
    driver: Driver, engine: Path, tmp_path: Path, budget: str, options: list[str], code: int, error: str
) -> None:
    (tmp_path / "budget.toml").write_text(budget)
    done = driver.run("gate", str(engine), "--budget", "budget.toml", *options, cwd=tmp_path)
    assert done.code == code, done.stderr
    assert (done.error if done.errors else "") == error


def test_every_form_of_the_result_says_the_same(driver: Driver, engine: Path, tmp_path: Path) -> None:
    (tmp_path / "budget.toml").write_text("[size]\nmib = 0.001\n")
    call = ["gate", str(engine), "--budget", "budget.toml"]
    done = driver.run(*call, "--junit", "j.xml", "--markdown", "s.md", "--annotations", "--json", cwd=tmp_path)
    (one,) = json.loads(done.stdout)["checks"]
    assert one["verdict"] == "fail"
    suite = ElementTree.fromstring((tmp_path / "j.xml").read_text())
    assert suite.get("failures") == "1"
    assert "❌ fail" in (tmp_path / "s.md").read_text()
    shown = driver.run(*call, "--annotations", cwd=tmp_path)
    assert one["said"].replace("%", "%25") in shown.stdout
    assert "::error file=budget.toml,title=size.mib::" in shown.stdout
    assert one["said"] in shown.stderr


def test_the_schema_is_printed_without_an_artifact(driver: Driver, tmp_path: Path) -> None:
    done = driver.run("gate", "--schema", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["title"] == "optpass budget"
