"""What is proposed where no engine of an artifact fits: only what this machine can build and run."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

import optpass
from optpass.errors import OptpassError
from optpass.runtime import choice, cuda, manifest
from optpass.runtime.engines.base import is_made_here
from optpass.runtime.engines.tensorrt import LIBRARY
from tests.export.artifacts import edited


def foreign(folder: Path, **change: Any) -> Path:
    """An artifact with one engine, of another machine."""

    def alone(made: dict[str, Any]) -> None:
        made["engines"] = {"onnxruntime-f32": {**made["engines"]["onnxruntime-f32"], **change}}
        made["default"] = "onnxruntime-f32"

    return edited(folder, alone)


def without(monkeypatch: pytest.MonkeyPatch, *libraries: str) -> None:
    whole = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in libraries else whole(name))


def test_without_a_gpu_no_engine_for_gpus_is_proposed(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "device", lambda: "")
    foreign(copied, backend="tensorrt", target=["sm_89"], version="tensorrt_rtx 1.0")
    with pytest.raises(OptpassError, match=r"\[engine-machine\] no engine.*sm_89.* -b onnxruntime -o DIR") as caught:
        optpass.load(copied)
    assert "-b tensorrt" not in str(caught.value)
    without(monkeypatch, "onnxruntime")
    with pytest.raises(OptpassError, match=r"\[engine-machine\].* -b openvino -o DIR"):
        optpass.load(copied)


def test_with_another_gpu_one_for_it_is_proposed(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(LIBRARY, reason="install the extra tensorrt")
    monkeypatch.setattr(cuda, "device", lambda: "sm_120")
    foreign(copied, backend="tensorrt", target=["sm_89"], version="tensorrt_rtx 1.0")
    with pytest.raises(OptpassError, match=r"built for sm_89, and here is sm_120; .* -b tensorrt -o DIR"):
        optpass.load(copied)


def test_machine_code_is_proposed_for_machine_code_alone_and_with_a_compiler(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(copied, backend="inductor", target=["another"], version="2.0.0")
    made = manifest.read(copied)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert " -b inductor " in choice.rebuild(made, made.engines["onnxruntime-f32"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert " -b onnxruntime " in choice.rebuild(made, made.engines["onnxruntime-f32"])


def test_without_torch_nothing_can_be_built_here(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch")
    foreign(copied, backend="of another day")
    with pytest.raises(
        OptpassError, match=r"kind that this optpass does not know.*install torch and an engine"
    ) as caught:
        optpass.load(copied)
    assert " -b " not in str(caught.value)
    assert not is_made_here("of another day")
