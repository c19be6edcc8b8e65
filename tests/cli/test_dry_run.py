"""``optimize --dry-run``: what is printed, and that nothing is written."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from optpass.cli.main import run

SCHEDULE = ("optimize", "fashion-vit", "-p", "merge(at=[0,2],keep=0.5)", "-b", "onnxruntime", "-b", "openvino:bf16")


def call(*args: str) -> tuple[int, str]:
    stdout = io.StringIO()
    return run(args, stdout), stdout.getvalue()


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_dry_run(golden: Callable[[str, str], None], nowhere: Path) -> None:
    code, text = call(*SCHEDULE, "--dry-run", "-o", "engine")
    assert code == 0
    golden("schedule", text)
    assert not list(nowhere.iterdir())


def test_refused_pass_exits_with_1(golden: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]) -> None:
    code, text = call("optimize", "fashion-vit", "-p", "merge(at=0,r=150)", "--dry-run")
    assert code == 1
    golden("refused", text)
    assert capsys.readouterr().err.startswith("error[no-room]: merge was refused: merge is asked to take r=150 of 196")


def test_json_holds_the_same_numbers() -> None:
    code, text = call(*SCHEDULE, "--dry-run", "--json")
    said = json.loads(text)
    assert (code, said["ok"], said["engines"]) == (0, True, ["onnxruntime-f32", "openvino-bf16"])
    assert [layer["tokens"] for layer in said["layers"]] == [197, 99, 99, 50, 50, 50]
    assert f"{said['flops'] / 1e6:,.1f}" in call(*SCHEDULE, "--dry-run")[1]
