"""Loading and running an artifact: what fits runs, everything else is one clear sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optpass
from optpass.errors import OptpassError
from optpass.runtime import check
from optpass.runtime.engines import openvino as openvino_engine
from tests.export.artifacts import edited

TOKENS = np.zeros((2, 9, 32), np.float32)


@pytest.mark.parametrize("engine", [None, "openvino-f32", "dense/onnxruntime-f32", "dense/openvino-f32"])
def test_every_engine_runs_by_name(whole: Path, engine: str | None) -> None:
    session = optpass.load(whole, engine=engine, threads=1)
    assert session.name == (engine or "onnxruntime-f32")
    outputs = session.run(tokens=TOKENS)
    assert list(outputs) == ["logits"]
    assert outputs["logits"].shape == (2, 5)
    assert [info.name for info in session.inputs] == ["tokens"]
    assert [info.shape for info in session.outputs] == [["batch", 5]]


def test_what_a_session_returned_stays_when_it_runs_again(whole: Path) -> None:
    for engine in ("onnxruntime-f32", "openvino-f32"):
        session = optpass.load(whole, engine=engine, threads=1)
        first = session.run(tokens=TOKENS)["logits"]
        kept = first.copy()
        session.run(tokens=TOKENS + 1)
        np.testing.assert_array_equal(first, kept)


def test_arrays_need_not_be_contiguous_nor_writable(whole: Path) -> None:
    rng = np.random.default_rng(0)
    straight = rng.standard_normal((2, 9, 32)).astype(np.float32)
    turned = np.asfortranarray(straight)
    turned.flags.writeable = False
    for engine in ("onnxruntime-f32", "openvino-f32"):
        session = optpass.load(whole, engine=engine, threads=1)
        expected = session.run(tokens=straight)["logits"]
        np.testing.assert_array_equal(session.run(tokens=turned)["logits"], expected)


WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "networkx"}:
            raise ImportError(f"{name} is not for the runtime")

sys.meta_path.insert(0, Refuse())
import numpy as np
import optpass
from optpass import measure, metrics
from optpass.runtime import check

for engine in ("onnxruntime-f32", "openvino-f32"):
    session = optpass.load(sys.argv[1], engine=engine, threads=1)
    print(session.run(tokens=np.zeros((1, 9, 32), np.float32))["logits"].shape)
print(check.verify(sys.argv[1], threads=1).ok)
print(len(measure.bench(sys.argv[1], threads=1, budget=0).latency))
print("torch" in sys.modules)
"""


def test_an_artifact_runs_is_verified_and_timed_where_importing_torch_fails(whole: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(whole)], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["(1, 5)", "(1, 5)", "True", "2", "False"], done.stderr


# Inputs


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({}, r"input tokens is missing; give tokens: float32\[batch, 9, 32\]"),
        ({"tokens": TOKENS, "mask": TOKENS}, r"no input 'mask'; give tokens: float32"),
        ({"Tokens": TOKENS}, r"input tokens is missing"),
        ({"tokens": TOKENS.tolist()}, r"input tokens is a list; give a numpy array"),
        ({"tokens": TOKENS.astype(np.float64)}, r"is float64, the engine takes float32; convert it: tokens.astype\("),
        ({"tokens": TOKENS.astype(np.int64)}, r"is int64, the engine takes float32"),
        ({"tokens": TOKENS.astype(">f4")}, r"the engine takes float32"),
        ({"tokens": TOKENS[0]}, r"has 2 dimensions, the engine takes 3; give float32\[batch, 9, 32\]"),
        ({"tokens": TOKENS[:, :8]}, r"has 8 along dimension 1, the engine takes 9"),
        ({"tokens": np.zeros((7, 9, 32), np.float32)}, r"has 7 along dimension 0, the engine takes 1 to 6"),
        ({"tokens": TOKENS[:0]}, r"has 0 along dimension 0, the engine takes 1 to 6"),
    ],
)
def test_an_input_that_does_not_fit_is_named_with_what_fits(whole: Path, arrays: Any, sentence: str) -> None:
    for engine in ("onnxruntime-f32", "openvino-f32"):
        with pytest.raises(OptpassError, match=sentence) as caught:
            optpass.load(whole, engine=engine, threads=1).run(**arrays)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)


# The artifact


def test_every_flipped_byte_is_noticed(copied: Path) -> None:
    files = [path for path in copied.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert len(files) == 8
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(
            OptpassError, match=rf"\[artifact-hash\] {path.relative_to(copied).as_posix()} in .*rebuild"
        ):
            optpass.load(copied)
        path.write_bytes(whole)
    optpass.load(copied)


def test_a_missing_file_is_named(copied: Path) -> None:
    (copied / "openvino-any" / "model.bin").unlink()
    with pytest.raises(OptpassError, match=r"openvino-any/model.bin is missing"):
        optpass.load(copied)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "onnxruntime-f32/../../secret", "C:/secret", "..\\secret", "", "a\0b"]
)
def test_a_path_that_leaves_the_directory_is_refused(copied: Path, name: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = "0" * 64
        manifest["engines"]["onnxruntime-f32"]["entry"] = name

    (copied.parent / "secret").write_text("secret")
    with pytest.raises(OptpassError, match="artifact-path"):
        optpass.load(edited(copied, change))


def test_a_link_is_refused_even_to_the_same_bytes(copied: Path) -> None:
    path = copied / "onnxruntime-f32" / "model.onnx"
    path.rename(copied.parent / "moved.onnx")
    os.symlink(copied.parent / "moved.onnx", path)
    with pytest.raises(OptpassError, match="artifact-path"):
        optpass.load(copied)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.update(schema_version=99), r"schema version 99, this optpass .* reads 3; update optpass"),
        (lambda m: m.update(schema_version=0), r"schema version 0.*rebuild"),
        (lambda m: m.pop("schema_version"), r"schema version None"),
        (lambda m: m.update(surprise=1), r"surprise: Extra inputs"),
        (lambda m: m["engines"].clear(), r"default engine 'onnxruntime-f32' is not there"),
        (lambda m: m.pop("engines"), r"engines: Field required"),
        (lambda m: m.update(default="nowhere"), r"default engine 'nowhere'"),
        (lambda m: m["files"].pop("onnxruntime-f32/model.onnx"), r"has no hash"),
    ],
)
def test_a_manifest_that_is_not_right_is_refused(copied: Path, change: Any, sentence: str) -> None:
    with pytest.raises(OptpassError, match=sentence):
        optpass.load(edited(copied, change))


def test_an_engine_of_an_unknown_kind_is_left_out_and_refused_by_name(copied: Path) -> None:
    edited(copied, lambda m: m["engines"]["onnxruntime-f32"].update(backend="os"))
    session = optpass.load(copied)
    assert session.name == "openvino-f32"
    assert "onnxruntime-f32 is of a kind that this optpass does not know, os" in session.why
    with pytest.raises(OptpassError, match=r"os is unknown to this optpass; it knows"):
        optpass.load(copied, engine="onnxruntime-f32")


def test_a_manifest_that_is_no_json_is_refused(copied: Path) -> None:
    (copied / "manifest.json").write_text("{")
    with pytest.raises(OptpassError, match="is no JSON"):
        optpass.load(copied)
    (copied / "manifest.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(OptpassError, match="is no JSON"):
        optpass.load(copied)


def test_what_is_no_artifact_is_said_to_be_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(OptpassError, match="is no artifact"):
            optpass.load(path)


def test_an_engine_or_thread_count_that_is_not_there_is_named(whole: Path) -> None:
    with pytest.raises(OptpassError, match="no engine 'tensorrt'; it has onnxruntime-f32, dense/onnxruntime-f32"):
        optpass.load(whole, engine="tensorrt")
    with pytest.raises(OptpassError, match="threads is 0; give 1 or more"):
        optpass.load(whole, threads=0)


# The machine


def test_a_library_that_is_not_installed_is_named_with_its_extra(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(OptpassError, match=r"engine openvino-f32 needs openvino.*pip install 'optpass\[openvino\]'"):
        optpass.load(whole, engine="openvino-f32")
    optpass.load(whole)


def test_a_cpu_without_bfloat16_is_told_what_to_load(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["engines"]["openvino-f32"]["precision"] = "bf16"

    monkeypatch.setattr(openvino_engine, "supports_bf16", lambda: False)
    with pytest.raises(
        OptpassError, match=r"computes in bfloat16, for which this CPU has no instr.*load the engine onnxrun"
    ):
        optpass.load(edited(copied, change), engine="openvino-f32")


def test_an_engine_of_another_version_is_one_line(copied: Path) -> None:
    from optpass.runtime.manifest import sha256

    path = copied / "onnxruntime-f32" / "model.onnx"
    path.write_bytes(b"not a model")
    edited(copied, lambda m: m["files"].update({"onnxruntime-f32/model.onnx": sha256(path)}))
    with pytest.raises(
        OptpassError, match=r"onnxruntime [\d.]+ cannot open engine onnxruntime-f32.*manifest names"
    ) as caught:
        optpass.load(copied)
    assert "\n" not in str(caught.value)


# Verified again


def test_an_artifact_is_verified_again_from_what_it_recorded(whole: Path) -> None:
    result = check.verify(whole, threads=1)
    assert result.ok
    assert result.files == 8
    assert [entry.engine for entry in result.fidelity] == list(optpass.load(whole).manifest.engines)


def test_an_engine_that_computes_something_else_fails_its_verification(copied: Path) -> None:
    from optpass.runtime.manifest import sha256

    other = copied / "dense" / "onnxruntime-f32" / "model.onnx"
    path = copied / "onnxruntime-f32" / "model.onnx"
    path.write_bytes(other.read_bytes())
    edited(copied, lambda m: m["files"].update({"onnxruntime-f32/model.onnx": sha256(path)}))
    result = check.verify(copied, threads=1)
    assert not result.ok
    assert [entry.engine for entry in result.fidelity if not entry.ok] == ["onnxruntime-f32"]
