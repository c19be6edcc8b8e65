"""``quantize``: 8-bit products by the tools of the engines, measured, held to a limit, and taken back beyond it."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import optpass
from optpass import api
from optpass.capture import capture
from optpass.errors import OptpassError
from optpass.evaluation import Evaluation
from optpass.export import artifact, finish
from optpass.grammar import parse
from optpass.manager import apply, ordered
from optpass.program import Program
from optpass.results import OptimizeResult
from optpass.runtime import generate
from optpass.runtime import manifest as manifests

sys.path.insert(0, str(Path(__file__).parents[1]))
import architectures

SAMPLES = 64


def optimized(passes: str, out: Path, *backends: str, source: Any = "fashion-vit", **options: Any) -> OptimizeResult:
    samples = SAMPLES if source == "fashion-vit" else None
    return optpass.optimize(source, passes, backend=backends, out=out, samples=samples, seconds=0, **options)


def ops(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(str(path)).graph.node}


def test_main_engines_are_quantized_and_dense_ones_are_not(tmp_path: Path) -> None:
    result = optimized("quantize", tmp_path / "engine", "onnxruntime")
    (record,) = result.passes
    assert result.ok
    assert record.status == "kept", record
    assert record.ops == {"int8": 25, "f32": 0}
    assert 0 < (record.error or 0) <= (record.max_error or 0)
    assert record.data == ""
    main = next(row for row in result.fidelity if row.engine == "onnxruntime-f32")
    assert main.ok
    assert main.difference > 1e-3
    folder = tmp_path / "engine"
    assert "MatMulInteger" in ops(folder / "onnxruntime-f32/model.onnx")
    assert "MatMulInteger" not in ops(folder / "dense/onnxruntime-f32/model.onnx")
    engines = manifests.read(folder).engines
    assert engines["onnxruntime-f32"].mib(folder) < 0.4 * engines["dense/onnxruntime-f32"].mib(folder)
    assert result.metric[0].samples == SAMPLES
    assert optpass.verify(folder).ok


def test_ranges_come_of_samples_that_nothing_is_judged_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[Any] = []
    run = Evaluation.run

    def spy(self: Evaluation, *args: Any) -> Any:
        judged.append(self.data)
        return run(self, *args)

    used: list[Any] = []
    by = finish._applied

    def seen(entry: Path, kept: Path, made: Any, backend: str, samples: Any) -> Any:
        used.extend(sample["pixel_values"] for sample in samples)
        return by(entry, kept, made, backend, samples)

    monkeypatch.setattr(Evaluation, "run", spy)
    monkeypatch.setattr(finish, "_applied", seen)
    result = optimized("merge(at=0,keep=0.5),quantize(mode=static,samples=16)", tmp_path / "engine", "onnxruntime")
    record = result.passes[-1]
    assert record.status == "kept", record
    assert record.data == "calibrated on 16 samples, which no metric was taken on"
    assert "QuantizeLinear" in ops(tmp_path / "engine/onnxruntime-f32/model.onnx")
    assert result.metric[0].samples == SAMPLES - 16
    calibrated = {image.tobytes() for batch in used for image in batch}
    assert len(calibrated) == 16
    assert not calibrated & {image.tobytes() for image in judged[0]["pixel_values"]}


def test_openvino_is_quantized_by_nncf(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    result = optimized("quantize(samples=32)", tmp_path / "engine", "openvino")
    (record,) = result.passes
    assert result.ok
    assert record.status == "kept", record
    assert record.data.startswith("calibrated on 32 samples")
    assert "FakeQuantize" in (tmp_path / "engine/openvino-any/model.xml").read_text()
    assert "FakeQuantize" not in (tmp_path / "engine/dense/openvino-any/model.xml").read_text()


class Counts(nn.Module):
    """A product with a weight, and one with whole numbers, which counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("lower", torch.ones(8, 8).tril() * 300)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x) @ self.lower))


def counts() -> tuple[nn.Module, tuple[Tensor], dict[str, Any]]:
    return Counts(), (torch.randn(4, 8, generator=torch.Generator().manual_seed(0)),), {}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_products_that_count_stay_as_they_are(backend: str, tmp_path: Path) -> None:
    if backend == "openvino":
        pytest.importorskip("nncf")
    result = optimized("quantize(max_error=0.1)", tmp_path / "engine", backend, source=counts())
    (record,) = result.passes
    assert record.status == "kept", record
    assert record.ops == {"int8": 2, "f32": 1}
    assert record.data == ("calibrated on the example inputs alone" if backend == "openvino" else "")


def test_beyond_the_limit_files_are_as_before(tmp_path: Path) -> None:
    limit = "quantize(max_error=1e-6)"
    stopped = optimized(limit, tmp_path / "stopped", "onnxruntime", source=counts())
    assert not stopped.ok
    assert not (tmp_path / "stopped").exists()
    (record,) = stopped.passes
    assert record.status == "rolled_back"
    assert record.reason.startswith("output of onnxruntime-f32 moved by ")
    assert record.reason.endswith(" of the largest, more than 1.0e-06")
    skipped = optimized(limit, tmp_path / "skipped", "onnxruntime", source=counts(), on_fail="skip")
    plain = optimized("", tmp_path / "plain", "onnxruntime", source=counts())
    assert skipped.ok
    assert plain.ok
    read = [manifests.read(tmp_path / name) for name in ("skipped", "plain")]
    assert read[0].files == read[1].files
    assert read[0].engines == read[1].engines
    assert [row.tolerance for row in skipped.fidelity] == [row.tolerance for row in plain.fidelity]


def test_a_tool_that_fails_takes_nothing_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxruntime import quantization

    def fails(*args: Any, **options: Any) -> None:
        raise ValueError("no such thing\nmore")

    monkeypatch.setattr(quantization, "quantize_dynamic", fails)
    result = optimized("quantize", tmp_path / "engine", "onnxruntime", source=counts(), on_fail="skip")
    assert result.passes[0].reason == "the tool for onnxruntime failed: ValueError: no such thing"
    assert optpass.verify(tmp_path / "engine").ok


def test_a_backend_without_a_tool_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "capture", lambda *args, **options: pytest.fail("work was done"))
    with pytest.raises(OptpassError) as caught:
        optimized("quantize", tmp_path / "engine", "onnxruntime", "inductor")
    assert str(caught.value) == (
        "[quantize-backend] quantize has no tool for inductor; it has one for onnxruntime, openvino"
    )
    assert caught.value.exit_code == 2


def test_it_is_not_combined_with_half_precision() -> None:
    with pytest.raises(OptpassError, match="quantize cannot be combined with precision; drop one of them"):
        ordered(parse("precision,quantize"))


def test_at_most_half_of_the_samples_are_set_apart() -> None:
    data = {"x": np.arange(10), "labels": np.arange(10)}
    judged, apart = Evaluation(data, "top1").apart(128)
    assert judged.data is not None
    assert apart is not None
    assert [list(judged.data["x"]), list(apart["x"])] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert Evaluation(None, None).apart(8) == (Evaluation(None, None), None)


@functools.cache
def language_model(passes: str) -> Program:
    made = apply(
        capture(architectures.FACTORIES["llama"](), dynamic=["input_ids:0=batch:1..3", "input_ids:1=tokens:2..48"]),
        parse(passes),
    )
    assert made.ok
    return made.program


def texts(count: int, length: int) -> dict[str, Any]:
    return {"input_ids": np.random.default_rng(0).integers(50, size=(count, length))}


@pytest.mark.parametrize(
    ("backend", "passes", "given", "words"),
    [
        ("onnxruntime", "cache", None, ""),
        (
            "openvino",
            "cache,speculate",
            texts(6, 24),
            "calibrated on 6 samples, which no metric was taken on, and on the example inputs",
        ),
        ("openvino", "cache", None, "calibrated on the example inputs alone"),
    ],
)
def test_a_step_of_a_language_model_is_quantized(
    backend: str, passes: str, given: dict[str, Any] | None, words: str, tmp_path: Path
) -> None:
    if backend == "openvino":
        pytest.importorskip("nncf")
    program = language_model(passes)
    stage = program.deployed[-1]
    with artifact.writer(tmp_path / "engine") as new:
        name = new.add(stage, backend, "f32")
        record, rows = finish.finish(new, parse("quantize(max_error=0.2)")[0], {name: stage}, program.main, given)  # type: ignore[arg-type]
    assert record.status == "kept", record
    assert record.ops["int8"] > 10
    assert record.data == words
    assert all(row.ok for row in rows)


def test_a_step_is_calibrated_on_texts_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PIECE", 8)
    with artifact.writer(tmp_path / "engine") as new:
        name = new.add(language_model("cache").deployed[-1], "onnxruntime", "f32")
        calls, _ = finish._samples(new, name, parse("quantize(mode=static)")[0], texts(4, 20))  # type: ignore[arg-type]
        held = len(new.reference(new.engines[name].role, new.engines[name].form).recorded)
    found = [(len(call["input_ids"]), call["input_ids"].shape[1], call["position"].tolist()) for call in calls[:-held]]
    assert found == [
        (3, 8, [0, 0, 0]), (3, 8, [8, 8, 8]), (3, 4, [16, 16, 16]), (1, 8, [0]), (1, 8, [8]), (1, 4, [16])
    ]  # fmt: skip
