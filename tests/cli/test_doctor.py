"""What a machine can build and run, and what a backend makes of a model, said before any work."""

from __future__ import annotations

import io
import json

import pytest

from optpass import api, diagnosis
from optpass.cli.main import run
from optpass.errors import OptpassError
from optpass.export.openvino import OpenVino
from optpass.runtime import cuda
from optpass.runtime.engines import tensorrt as engine
from tests.export import models


def said(*args: str) -> tuple[int, str]:
    out = io.StringIO()
    code = run(["doctor", *args], out)
    return code, out.getvalue()


def test_building_and_running_are_told_apart() -> None:
    if cuda.device() or not engine.module_name(engine.RTX):
        pytest.skip("an NVIDIA GPU is here, or no TensorRT-RTX")
    rows = {f"{row.backend}:{row.precision}": row for row in api.doctor(target="sm_89").backends}
    assert rows["tensorrt:f16"].builds == ""
    assert rows["tensorrt:f16"].runs == "is built for sm_89, and here is no NVIDIA GPU"
    assert rows["onnxruntime:f32"].builds == rows["onnxruntime:f32"].runs == ""
    assert rows["inductor:f32"].runs == ""


def test_what_cannot_be_built_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    row = next(row for row in api.doctor(backend="inductor").backends)
    assert "needs a C++ compiler" in row.builds
    assert row.runs == ""
    assert row.remedy.startswith("install g++")


def test_ops_and_limits_are_those_of_the_form_that_each_backend_reads() -> None:
    rows = {row.backend: row for row in diagnosis.model(models.vision(), _all(), ())}
    assert rows["onnxruntime"].ops["MultiHeadAttention"] == 2
    assert rows["inductor"].ops["scaled_dot_product_attention"] == 2
    assert any("0.2 GB" in limit for limit in rows["onnxruntime"].limits)
    if "tensorrt" in rows:
        assert rows["tensorrt"].ops["Softmax"] == 2
        assert any("3840" in limit for limit in rows["tensorrt"].limits)
    assert not any(row.refusal for row in rows.values())


def _all() -> list:  # type: ignore[type-arg]
    from optpass.export.base import backends

    return [found for found in backends().values() if found.builds("f32", ["sm_89"]) is None]


def test_a_refusal_is_one_line_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: OpenVino, *args: object) -> None:
        raise OptpassError("not-lowered", "OpenVINO cannot convert the model", "use onnxruntime")

    monkeypatch.setattr(OpenVino, "rehearse", refuse)
    rows = {row.backend: row for row in diagnosis.model(models.vision(), _all(), ())}
    assert rows["openvino"].refusal == "[not-lowered] OpenVINO cannot convert the model; use onnxruntime"
    assert rows["onnxruntime"].refusal == ""


def test_the_command_prints_the_machine_and_a_table_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said("fashion-vit", "-b", "onnxruntime", "-b", "inductor")
    assert code == 0, capsys.readouterr().err
    assert "C++ compiler: " in text
    assert "MultiHeadAttention" in text
    assert "inductor (the exported program, in ATen): takes it" in text
    code, text = said("--json")
    assert code == 0
    assert json.loads(text)["facts"]["python"].startswith("3.")


def test_an_unknown_backend_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = said("-b", "tensorflow")
    assert (code, text) == (2, "")
    assert "error[unknown-backend]" in capsys.readouterr().err
