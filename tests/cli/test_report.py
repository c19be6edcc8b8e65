"""``optpass report`` as a process: what it writes where, and bad input told in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.driver import Done, Driver
from tests.cli.test_bad_inputs import MODELS


@pytest.fixture(scope="module")
def made(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "mine.py").write_text(MODELS)
    passes = "prune(selector=norm,keep=0.5,at=1)"
    done = driver.run(*f"optimize mine:small -p {passes} -o engine --seconds 0.1".split(), cwd=folder)
    assert done.code == 0, done.stderr
    return folder / "engine"


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    shutil.copytree(made, folder / "engine")
    return folder


def names(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir())


def test_the_page_goes_beside_the_artifact_and_may_be_made_again(driver: Driver, home: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (home / "engine").rglob("*")}
    for _ in range(2):
        done = driver.run("report", "engine/", cwd=home)
        assert (done.code, done.errors) == (0, [])
        assert done.stdout == f"wrote {home / 'engine.html'}\n"
    assert names(home) == ["engine", "engine.html"]
    assert {path: path.stat().st_mtime_ns for path in (home / "engine").rglob("*")} == before
    page = (home / "engine.html").read_text()
    assert "Time per op" in page
    assert "token of the sequence" in page
    (home / "any").touch()
    assert (home / "engine.html").stat().st_mode == (home / "any").stat().st_mode


def test_json_names_the_file(driver: Driver, home: Path) -> None:
    done = driver.run("report", "engine", "--out", "new/page.html", "--no-profile", "--json", cwd=home)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout) == {"ok": True, "artifact": "engine", "report": str(home / "new" / "page.html")}
    assert "Time per op" not in (home / "new" / "page.html").read_text()


def test_graphs_for_viewers_have_endings_of_their_own(driver: Driver, home: Path) -> None:
    for viewer in ("netron", "model-explorer"):
        done = driver.run("report", "engine", "--graph", viewer, cwd=home)
        assert done.code == 0, done.stderr
    assert names(home) == ["engine", "engine.graph.json", "engine.graph.onnx"]
    (graph,) = json.loads((home / "engine.graph.json").read_text())["graphs"]
    assert graph["id"] == "onnxruntime-f32"


def check(done: Done, error: str) -> None:
    assert "Traceback" not in done.stderr
    assert (done.code, done.error, done.stdout) == (2, error, ""), done.stderr


BAD = {
    "no artifact": ("gone", "no-artifact"),
    "a file": ("engine/manifest.json", "no-artifact"),
    "output inside the artifact": ("engine -o engine/page.html", "output"),
    "output that is a directory": ("engine -o folder", "output"),
    "output that is another file": ("engine -o letter.html", "output"),
    "output below a file": ("engine -o letter.html/page.html", "output"),
    "output in a place that takes none": ("engine -o /proc/page.html", "output"),
    "graph over another file": ("engine --graph netron -o letter.html", "output"),
    "unknown viewer": ("engine --graph browser", "usage"),
    "engine without a graph": ("engine --engine onnxruntime-f32", "usage"),
    "unknown engine": ("engine --graph netron --engine openvino-f32", "engine-name"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name: str, driver: Driver, home: Path) -> None:
    (home / "folder").mkdir()
    (home / "letter.html").write_text("dear reader")
    text, error = BAD[name]
    check(driver.run("report", *text.split(), cwd=home), error)
    assert names(home) == ["engine", "folder", "letter.html"]
    assert (home / "letter.html").read_text() == "dear reader"


def test_force_replaces_another_file(driver: Driver, home: Path) -> None:
    (home / "letter.html").write_text("dear reader")
    done = driver.run("report", "engine", "-o", "letter.html", "--no-profile", "--force", cwd=home)
    assert done.code == 0, done.stderr
    assert (home / "letter.html").read_text().startswith("<!doctype html>")


def test_a_full_disk_leaves_the_old_page(driver: Driver, home: Path) -> None:
    assert driver.run("report", "engine", "--no-profile", cwd=home).code == 0
    before = (home / "engine.html").read_bytes()
    check(driver.run("report", "engine", "--no-profile", cwd=home, file_size=2048), "output")
    assert (home / "engine.html").read_bytes() == before
    assert names(home) == ["engine", "engine.html"]


def test_a_damaged_artifact_is_not_told_of(driver: Driver, home: Path) -> None:
    model = home / "engine" / "onnxruntime-f32" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    check(driver.run("report", "engine", cwd=home), "artifact-hash")
    assert names(home) == ["engine"]
