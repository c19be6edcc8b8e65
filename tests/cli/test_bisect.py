"""``optpass bisect`` as real processes, and what it prints."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from optpass.cli import _tables
from optpass.results import BisectResult, Blame, Interval, Step
from tests.cli.driver import Done, Driver
from tests.cli.test_bad_inputs import MODELS

PASSES = "prune(selector=random,keep=[0.9,0.1],at=[0,1])"


@pytest.fixture(scope="module")
def home(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and a dynamic artifact of it."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "mine.py").write_text(MODELS)
    args = f"optimize mine:small -p {PASSES} --dynamic x:0=rows:2..6 -o engine --seconds 0"
    done = driver.run(*args.split(), cwd=folder)
    assert done.code == 0, done.stderr
    return folder


def run(driver: Driver, home: Path, text: str) -> Done:
    return driver.run(*text.split(), cwd=home)


def test_artifact_brings_its_source_inputs_and_recipe(driver: Driver, home: Path) -> None:
    done = run(driver, home, "bisect engine --seconds 0 --cache cache --json --max-drop 1000")
    assert (done.code, done.errors) == (0, []), done.stderr
    said = json.loads(done.stdout)
    assert [(step["site"], step["tokens"]) for step in said["steps"]] == [("layers.0", 11), ("layers.1", 1)]
    assert (said["source"], said["engine"], said["built"]) == ("mine:small", "onnxruntime-f32", 3)
    again = f"bisect mine:small -p {PASSES} --dynamic x:0=rows:2..6 --seconds 0 --cache cache --json --max-drop 1000"
    told = json.loads(driver.run(*again.split(), cwd=home).stdout)
    assert (told["built"], told["steps"]) == (0, said["steps"])


def test_pass_that_optimize_skipped_is_no_step(driver: Driver, home: Path) -> None:
    args = "optimize mine:small -p prune(at=9),prune(selector=norm,keep=0.5,at=1) --on-fail skip -o skipped --seconds 0"
    assert run(driver, home, args).code == 0
    done = run(driver, home, "bisect skipped --seconds 0 --cache cache --json --max-drop 1000")
    assert [step["site"] for step in json.loads(done.stdout)["steps"]] == ["layers.1"]


def test_cache_is_in_the_home_of_the_user_by_default(driver: Driver, home: Path, tmp_path: Path) -> None:
    args = f"bisect mine:small -p {PASSES} --seconds 0 --max-drop 1000"
    driver.run(*args.split(), cwd=home, env={"XDG_CACHE_HOME": str(tmp_path)})
    assert len(list((tmp_path / "optpass" / "engines").iterdir())) == 3


def test_step_to_blame_exits_with_1_and_one_line(driver: Driver, home: Path) -> None:
    done = run(driver, home, "bisect engine --seconds 0 --cache cache --max-drop 0")
    assert (done.code, done.error) == (1, "blame")
    assert "to blame for quality: step " in done.stdout


def test_model_that_has_changed_since_is_refused(driver: Driver, home: Path) -> None:
    try:
        (home / "mine.py").write_text(MODELS.replace("manual_seed(0)", "manual_seed(1)"))
        done = run(driver, home, "bisect engine --seconds 0 --cache cache")
    finally:
        (home / "mine.py").write_text(MODELS)
    assert (done.code, done.error, done.stdout) == (2, "source-changed", "")


def test_source_that_is_gone_is_told(driver: Driver, home: Path, tmp_path: Path) -> None:
    done = driver.run("bisect", str(home / "engine"), "--seconds", "0", "--cache", "cache", cwd=tmp_path)
    assert (done.code, done.error, done.stdout) == (2, "no-source", "")
    assert "cannot be captured again: " in done.stderr


BAD = {
    "no passes": ("bisect mine:small", "usage"),
    "refused pass": ("bisect mine:small -p prune(at=9)", "no-site"),
    "recipe beside passes": ("bisect engine -p prune --recipe gone.toml", "usage"),
    "no such model": ("bisect ./gone -p prune", "missing-file"),
    "budget that is not there": ("bisect engine --budget gone.toml", "missing-file"),
    "unknown backend": ("bisect engine -b tensorflow", "unknown-backend"),
    "negative limit": ("bisect engine --max-drop -1", "usage"),
    "metric without data": ("bisect engine --metric top1", "data"),
    "cache that is a file": ("bisect engine --cache mine.py", "output"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_2(name: str, driver: Driver, home: Path) -> None:
    text, error = BAD[name]
    done = driver.run(*text.split(), cwd=home, env={"XDG_CACHE_HOME": str(home / "cache")})
    assert (done.code, done.error, done.stdout) == (2, error, ""), done.stderr


def around(value: float, width: float) -> Interval:
    return Interval(value=value, low=value - width, high=value + width)


def test_table(golden: Callable[[str, str], None]) -> None:
    steps = [
        Step(
            number=number, name=name, options=options, site=f"blocks.{number}", tokens=tokens,
            metric=around(top1, 0.01), loss=around(loss, 0.4), own_loss=around(own, 0.4),
            speedup=around(1 + number / 2, 0.02), own_speedup=around(1.4, 0.02),
        )
        for number, name, options, tokens, top1, loss, own in (
            (1, "merge", {"keep": 0.9}, 177, 0.9, 0.1, 0.1),
            (2, "prune", {"keep": 0.02, "selector": "random"}, 5, 0.84, 6.1, 6.0),
        )
    ]  # fmt: skip
    blame = Blame(figure="quality", step=2, certain=True, why="with it top1 has fallen by 6.10 [5.70, 6.50] points")
    result = BisectResult(
        ok=False, source="m", engine="onnxruntime-f32", metric="top1", unit="points", samples=9, label="a share",
        dense=around(0.901, 0.01), steps=steps, blame=[blame], largest=2, built=1, found=2,
    )  # fmt: skip
    text = io.StringIO()
    console = Console(file=text, width=160, highlight=False, soft_wrap=True)
    _tables.show_bisect(result, console)
    _tables.show_bisect(result.model_copy(update={"blame": [], "ok": True}), console)
    golden("table", "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()))
