"""``optpass diff``: two small artifacts as real processes, and what is printed."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from rich.console import Console

import optpass
from optpass import difference
from optpass.cli import _tables
from optpass.results import FigureDiff, Interval, TextDiff
from optpass.runtime import manifest as manifests
from tests.cli.driver import Done, Driver
from tests.cli.test_bad_inputs import MODELS


@pytest.fixture(scope="module")
def home(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two artifacts of one model: ``a`` has no pass and one engine, ``b`` a pass and two; ``c`` is ``b`` again."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "mine.py").write_text(MODELS)
    passes = "-p prune(selector=random,keep=0.5,at=1) -b onnxruntime -b openvino"
    for args in ("-o a", f"{passes} -o b", f"{passes} -o c"):
        done = run(driver, folder, f"optimize mine:small {args} --seconds 0.05")
        assert done.code == 0, done.stderr
    return folder


def run(driver: Driver, home: Path, text: str) -> Done:
    return driver.run(*text.split(), cwd=home)


def said(driver: Driver, home: Path, text: str) -> dict[str, Any]:
    done = run(driver, home, f"{text} --json")
    assert done.code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_pass_tokens_graph_and_figures_that_differ_are_told(driver: Driver, home: Path) -> None:
    found = said(driver, home, "diff a b")
    (added,) = found["passes"]
    assert (added["name"], added["change"], added["options"]["keep"]) == ("prune", "added", [None, 0.5])
    assert [(layer["path"], layer["tokens"]) for layer in found["layers"]] == [("layers.1", [12, 12])]
    assert found["layers"][0]["flops"][1] < found["layers"][0]["flops"][0]
    graphs = {graph["engine"]: graph for graph in found["graphs"]}
    assert graphs["openvino-f32"]["nodes"][0] is None
    counts = [counted(home / name / "onnxruntime-f32") for name in "ab"]
    assert graphs["onnxruntime-f32"]["nodes"] == [count.total() for count in counts]
    assert graphs["onnxruntime-f32"]["ops"] == {
        op: [counts[0][op], counts[1][op]] for op in counts[0] | counts[1] if counts[0][op] != counts[1][op]
    }
    figures = {(row["engine"], row["figure"]): row["values"] for row in found["figures"]}
    sizes = [size(home / name / "onnxruntime-f32") / 2**20 for name in "ab"]
    assert figures["onnxruntime-f32", "MiB of files"] == sizes
    assert figures["onnxruntime-f32", "speed-up, batch 2"][0]["low"] > 0
    assert not found["same"]
    assert found["same_machine"]


def counted(folder: Path) -> Counter[str]:
    (model,) = folder.glob("*.onnx")
    loaded = onnx.load(model)
    return Counter(node.op_type for nodes in (loaded.graph, *loaded.functions) for node in nodes.node)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_artifact_made_again_is_the_same_but_for_its_latency(driver: Driver, home: Path) -> None:
    found = said(driver, home, "diff b c")
    assert found["same"]
    assert not found["passes"] + found["layers"]
    # which engine is the default follows from what each took
    assert [row["name"] for row in found["made"]] in ([], ["default engine"])
    assert not any(graph["ops"] for graph in found["graphs"])
    assert all(" ms" in row["figure"] or "speed-up" in row["figure"] for row in found["figures"])


def test_openvino_graph_is_read(home: Path) -> None:
    manifest = manifests.read(home / "b")
    ops = difference.ops(home / "b", manifest.engines["openvino-f32"])
    assert (ops["Parameter"], ops["Result"]) == (1, 1)
    assert ops["MatMul"] >= 4


def test_options_that_changed_are_told_by_name(driver: Driver, home: Path) -> None:
    args = "-p prune(selector=random,keep=0.25,at=1),merge(at=0,r=1) -o d --seconds 0 --force"
    assert run(driver, home, f"optimize mine:small {args}").code == 0
    found = said(driver, home, "diff b d")
    assert {(row["name"], row["change"]) for row in found["passes"]} == {("prune", "changed"), ("merge", "added")}
    assert {name: row["options"] for row in found["passes"] if (name := row["name"]) == "prune"} == {
        "prune": {"keep": [0.5, 0.25]}
    }


def test_latencies_of_different_machines_are_flagged(driver: Driver, home: Path) -> None:
    shutil.copytree(home / "b", home / "moved", dirs_exist_ok=True)
    path = home / "moved" / "manifest.json"
    path.write_text(path.read_text().replace('"cores": ', '"cores": 7'))
    found = said(driver, home, "diff a moved")
    assert not found["same_machine"]
    assert all(row["comparable"] is (" ms" not in row["figure"]) for row in found["figures"])
    assert ("machine", "cores") in {(row["kind"], row["name"]) for row in found["made"]}
    assert "other machine: not comparable" in run(driver, home, "diff a moved").stdout


def test_exit_code_tells_a_difference_as_git_does(driver: Driver, home: Path) -> None:
    assert run(driver, home, "diff a b").code == 0
    assert run(driver, home, "diff b c --exit-code").code == 0
    done = run(driver, home, "diff a b --exit-code")
    assert (done.code, done.error) == (1, "differs")
    assert "they differ" in done.stdout


@pytest.mark.parametrize(
    ("text", "error"), [("diff a", "usage"), ("diff a gone", "no-artifact"), ("diff mine.py a", "no-artifact")]
)
def test_bad_input_is_one_line_and_2(text: str, error: str, driver: Driver, home: Path) -> None:
    done = run(driver, home, text)
    assert (done.code, done.error, done.stdout) == (2, error, ""), done.stderr


def test_table(home: Path, golden: Callable[[str, str], None]) -> None:
    speeds = tuple(Interval(value=value, low=value - 0.1, high=value + 0.1) for value in (1.0, 1.9))
    figures = [
        FigureDiff(engine="onnxruntime-f32", figure="median ms, batch 8", values=(31.25, 14.0), comparable=False),
        FigureDiff(engine="onnxruntime-f32", figure="speed-up, batch 8", values=speeds, comparable=True),  # type: ignore[arg-type]
    ]
    # which engine is the default is a matter of their speed, so the test says it
    made = [TextDiff(kind="artifact", name="default engine", values=("onnxruntime-f32", "openvino-f32"))]
    update = {"first": "a", "second": "b", "figures": figures, "made": made}
    text = io.StringIO()
    console = Console(file=text, width=160, highlight=False, soft_wrap=True)
    _tables.show_diff(optpass.diff(home / "a", home / "b").model_copy(update=update), console)
    golden("table", "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()))


def test_it_is_there_in_python(home: Path) -> None:
    assert optpass.diff(home / "b", home / "c").same
