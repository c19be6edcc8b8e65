"""TensorRT-RTX: real engines for named GPUs on a machine that has none, and what is said of them there."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import optpass
from optpass import api
from optpass.errors import OptpassError
from optpass.export import artifact
from optpass.export import report as reports
from optpass.export.base import Source
from optpass.export.tensorrt import TensorRT
from optpass.runtime import check, cuda
from optpass.runtime.engines import base as engines
from optpass.runtime.engines import tensorrt as engine
from tests.export import models
from tests.export.artifacts import edited

pytestmark = [
    pytest.mark.skipif(not engine.module_name(engine.RTX), reason="TensorRT-RTX has no wheel for this platform"),
    pytest.mark.skipif(bool(cuda.device()), reason="what is said where there is no GPU"),
]

TARGET = ("sm_89", "sm_120")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tensorrt") / "engine"
    stage = models.vision(keep=4)
    with artifact.writer(out, source="tests", target=TARGET) as new:
        for backend, precision in (
            ("tensorrt", "f32"),
            ("tensorrt", "f16"),
            ("tensorrt", "bf16"),
            ("onnxruntime", "f32"),
        ):
            new.add(stage, backend, precision)
        new.finish(fidelity=new.fidelity())
    return out


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "engine"))


def alone(manifest: dict[str, Any]) -> None:
    """Leave the engines for GPUs."""
    del manifest["engines"]["onnxruntime-f32"]
    manifest["default"] = "tensorrt-f32"


# Built


def test_engines_are_built_without_a_gpu_and_bound_to_what_is_named(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    for precision in ("f32", "f16", "bf16"):
        entry = manifest["engines"][f"tensorrt-{precision}"]
        assert entry["target"] == list(TARGET)
        assert entry["version"].startswith("tensorrt_rtx 1.")
        assert (built / entry["entry"]).stat().st_size > 100_000
    assert [row["engine"] for row in manifest["fidelity"]] == ["onnxruntime-f32"]
    assert [row["engine"] for row in manifest["unrun"]] == ["tensorrt-f32", "tensorrt-f16", "tensorrt-bf16"]
    assert manifest["unrun"][0]["why"] == "is built for sm_89, sm_120, and here is no NVIDIA GPU"
    assert manifest["default"] == "onnxruntime-f32"


@pytest.mark.parametrize("form", ["window", "padding and lower", "padding float", "flag"])
def test_each_form_of_mask_builds_in_half_precision(form: str, tmp_path: Path) -> None:
    assert TensorRT().lower(Source(models.text(form)), tmp_path, "f16", TARGET) == "model.engine"


def test_layers_and_precisions_are_told(built: Path) -> None:
    found = {row.engine: row for row in api.inspect_artifact(built).engines}
    counts = {name: Counter({(t, p): n for t, p, n in row.layers}) for name, row in found.items()}
    # one product for query, key and value; that of the output and two of the feed-forward network; the head at the end
    assert counts["tensorrt-f32"]["matrix_multiply", "float"] == 2 * (4 + 2) + 1
    half = counts["tensorrt-f16"]
    assert half["matrix_multiply", "half"] + 2 * half["attention_input", "half"] == 2 * (4 + 2) + 1 or (
        half["matrix_multiply", "half"] == 2 * 4 + 1
    )
    assert half["topk", "float"] == 2, "tokens are chosen in float32"
    assert "as given to the builder" in found["tensorrt-f16"].layers_of


# Opened elsewhere


def test_where_there_is_no_gpu_the_engine_that_runs_is_opened_and_says_why(built: Path) -> None:
    session = optpass.load(built)
    assert session.name == "onnxruntime-f32"
    assert "tensorrt-f32 is built for sm_89, sm_120, and here is no NVIDIA GPU" in session.why
    assert session.run(tokens=np.zeros((2, 9, 32), np.float32))["logits"].shape == (2, 5)


def test_an_engine_that_is_named_says_in_one_line_what_to_run(built: Path) -> None:
    sentence = (
        r"engine tensorrt-f16 is built for sm_89, sm_120, and here is no NVIDIA GPU; load the engine onnxruntime-f32"
    )
    with pytest.raises(OptpassError, match=sentence) as caught:
        optpass.load(built, engine="tensorrt-f16")
    assert "\n" not in str(caught.value)


def test_where_no_engine_fits_the_error_says_what_to_run(copied: Path) -> None:
    edited(copied, alone)
    for call in (
        lambda: optpass.load(copied),
        lambda: check.verify(copied),
        lambda: optpass.load(copied, backend="tensorrt"),
    ):
        remedy = "optpass optimize tests -b onnxruntime -o DIR"  # what this machine builds and runs
        with pytest.raises(OptpassError, match=f"here is no NVIDIA GPU.*{remedy}") as caught:
            call()
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


def test_verification_says_what_it_did_not_run(built: Path) -> None:
    result = check.verify(built, threads=1)
    assert result.ok
    assert [row.engine for row in result.unrun] == ["tensorrt-f32", "tensorrt-f16", "tensorrt-bf16"]


def test_the_report_says_what_was_not_run(built: Path, tmp_path: Path) -> None:
    page = reports.report(built, tmp_path / "page.html", profile=False).read_text()
    assert "Engines that were not run" in page
    assert "tensorrt-f16 is built for sm_89, sm_120, and here is no NVIDIA GPU" in page
    assert "Built and not run: tensorrt-f32, tensorrt-f16, tensorrt-bf16." in page


@pytest.mark.parametrize(
    ("here", "opens", "why"),
    [
        ("sm_89", "tensorrt-f32", "tensorrt-f32 is built for what is here, sm_89, sm_120"),
        ("sm_90", "onnxruntime-f32", "tensorrt-f32 is built for sm_89, sm_120, and here is sm_90"),
    ],
)
def test_the_gpu_that_is_here_decides(
    here: str, opens: str, why: str, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "device", lambda: here)
    result = api.inspect_artifact(built)
    assert result.opens == opens
    assert why in result.why


def test_another_version_of_the_library_is_told(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited(copied, lambda m: m["engines"]["tensorrt-f32"].update(version="tensorrt_rtx 1.2.0.54"))
    monkeypatch.setattr(cuda, "device", lambda: "sm_120")
    with pytest.raises(
        OptpassError, match=r"is built by tensorrt_rtx 1\.2\.0\.54, and here is 1\.[\d.]+; load the engine"
    ):
        optpass.load(copied, engine="tensorrt-f32")
    edited(copied, lambda m: m["engines"]["tensorrt-f32"].update(version="tensorrt 10.9.0"))
    with pytest.raises(OptpassError, match=r"is built by tensorrt 10\.9\.0, which is not installed"):
        optpass.load(copied, engine="tensorrt-f32")


def test_an_engine_without_its_library_says_so(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = optpass.load(built).manifest
    monkeypatch.setattr(engine, "LIBRARY", "tensorrt_of_another_day")
    assert engines.unfit(manifest.engines["tensorrt-f32"]) == (
        "is built for sm_89, sm_120 and needs tensorrt_of_another_day, which is not installed"
    )


# Refused before any work


@pytest.mark.parametrize(
    ("backend", "target", "sentence"),
    [
        ("tensorrt", "", r"no NVIDIA GPU to build for, and none is named; name some of sm_75, .*--target sm_89,sm_120"),
        ("tensorrt", "sm_89,sm_90", r"TensorRT-RTX does not build for sm_90; it builds for sm_75"),
        (
            "onnxruntime",
            "sm_89",
            r"onnxruntime is built for no device by name, and sm_89 is asked for; add -b tensorrt",
        ),
    ],
)
def test_devices_that_cannot_be_built_for_are_refused(backend: str, target: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(OptpassError, match=sentence):
        api.optimize("nothing", backend=backend, target=target, out=tmp_path / "engine")


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "module_name", lambda library: "")
    with pytest.raises(
        OptpassError, match=r"neither tensorrt_rtx nor tensorrt is installed; pip install 'optpass\[tens"
    ):
        TensorRT().check("f32")


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.topk(4000, dim=1).values


def test_more_than_topk_finds_is_refused_at_its_place(tmp_path: Path) -> None:
    stage = models.stage(Largest(), {"x": torch.randn(1, 5000)})
    with pytest.raises(OptpassError, match=r"no more than the 3840 largest of some, and here it is to find 4000"):
        TensorRT().lower(Source(stage), tmp_path, "f32", TARGET)
