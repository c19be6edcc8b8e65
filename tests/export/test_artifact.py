"""Writing an artifact: whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import optpass
from optpass import api
from optpass.capture import capture
from optpass.errors import OptpassError
from optpass.export import artifact, fidelity
from optpass.export.base import Backend, backends
from optpass.export.openvino import OpenVino
from optpass.results import Interval, Latency, Timing
from optpass.runtime import check
from optpass.runtime.engines import openvino as openvino_engine
from optpass.runtime.session import Session, open_session
from tests.export import models
from tests.export.artifacts import write

ONE = (("onnxruntime", "f32"),)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_backends_are_found_by_their_files() -> None:
    assert {"onnxruntime", "openvino"} <= set(backends())
    assert all(isinstance(found, Backend) for found in backends().values())


def test_an_artifact_holds_engines_recorded_outputs_and_a_hash_of_each_file(tmp_path: Path) -> None:
    out = write(tmp_path / "new" / "engine")
    manifest = json.loads((out / "manifest.json").read_text())
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert sorted([*manifest["files"], "manifest.json"]) == files
    assert sorted(manifest["engines"]) == [
        "dense/onnxruntime-f32",
        "dense/openvino-f32",
        "onnxruntime-f32",
        "openvino-f32",
    ]
    assert manifest["default"] == "onnxruntime-f32"
    assert all(entry["ok"] for entry in manifest["fidelity"])
    assert [entry["shapes"] for entry in manifest["fidelity"]] == [[{"batch": 1}, {"batch": 3}, {"batch": 6}]] * 4
    assert left_in(tmp_path / "new") == ["engine"]


def test_the_default_engine_is_the_fastest_recorded(tmp_path: Path) -> None:
    stage = models.vision()

    def latency(engine: str, milliseconds: float) -> Latency:
        timing = Timing(median_ms=milliseconds, p95_ms=milliseconds, runs=1)
        one = Interval(value=1, low=1, high=1)
        return Latency(engine=engine, batch="1", dense=timing, optimized=timing, speedup=one, verdict="no gain")

    with artifact.writer(tmp_path / "engine") as new:
        ids = [new.add(stage, "onnxruntime", "f32"), new.add(stage, "openvino", "f32")]
        manifest = new.finish(latency=[latency(ids[0], 2.0), latency(ids[1], 1.0)])
    assert manifest.default == "openvino-f32"


def test_both_precisions_of_openvino_share_their_files(tmp_path: Path) -> None:
    if not openvino_engine.supports_bf16():
        pytest.skip("this CPU has no bfloat16")
    stage = models.vision()
    with artifact.writer(tmp_path / "engine") as new:
        single, half = (new.add(stage, "openvino", precision) for precision in ("f32", "bf16"))
        assert new.engines[single].files == new.engines[half].files
        found = {entry.engine: entry for entry in new.fidelity()}
        new.finish(fidelity=list(found.values()))
    assert found[single].ok
    assert found[half].ok
    assert found[half].tolerance > 50 * found[single].tolerance
    assert found[half].difference > 50 * found[single].difference, "bf16 was not computed in bf16"


def test_bf16_is_refused_where_the_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_engine, "supports_bf16", lambda: False)
    with pytest.raises(OptpassError, match=r"no bfloat16 instructions.*use openvino in f32"):
        OpenVino().check("bf16")


@pytest.mark.parametrize(
    ("name", "precision", "sentence"),
    [("tensorflow", "f32", "no backend 'tensorflow'.*onnxruntime"), ("onnxruntime", "f4", "no precision 'f4'.*f32")],
)
def test_an_unknown_backend_or_precision_names_what_there_is(
    name: str, precision: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(OptpassError, match=sentence), artifact.writer(tmp_path / "engine") as new:
        new.add(models.vision(), name, precision)
    assert left_in(tmp_path) == []


class WrongEngine:
    """Runs the real one and spoils what it returns."""

    def __init__(self, session: Any, spoil: Any) -> None:
        self.session, self.spoil = session, spoil

    def run(self, **arrays: Any) -> dict[str, Any]:
        return {name: self.spoil(array) for name, array in self.session.run(**arrays).items()}


def spoiled(array: Any, index: int, value: float) -> Any:
    array = array.copy()
    array.reshape(-1)[index] = value
    return array


@pytest.mark.parametrize(
    ("spoil", "ok"),
    [
        (lambda a: a, True),
        (lambda a: a + 1e-7, True),
        (lambda a: spoiled(a, -1, a.reshape(-1)[-1] + 1e-2), False),
        (lambda a: spoiled(a, 0, np.nan), False),
        (lambda a: spoiled(a, 0, np.inf), False),
        (lambda a: a[..., :-1], False),
        (lambda a: a.reshape(-1), False),
        (lambda a: a.astype(np.int64), False),
    ],
)
def test_fidelity_fails_on_a_difference_beyond_rounding_another_shape_or_what_is_not_finite(
    spoil: Any, ok: bool
) -> None:
    stage = models.vision()
    recorded = fidelity.reference(stage)

    class Eager:
        def run(self, **arrays: Any) -> dict[str, Any]:
            import torch

            return {"logits": stage.run([torch.from_numpy(arrays["tokens"])])[0].numpy()}

    (result,) = check.fidelity("main", WrongEngine(Eager(), spoil), recorded, fidelity.tolerance(stage, "f32"))
    assert result.ok == ok
    assert (result.difference <= result.tolerance) == ok


def test_a_large_output_is_sampled_over_its_whole_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SAMPLE", 10)
    array = np.arange(1000, dtype=np.float32).reshape(10, 100)
    sampled = check.Sampled.of(array)
    assert 5 <= len(sampled.values) <= 11
    assert sampled.largest == 999
    assert len({int(value) % 100 for value in sampled.values}) > 5, "one column alone"


def test_recorded_outputs_survive_the_file(tmp_path: Path) -> None:
    recorded = fidelity.reference(models.text("padding"))
    recorded.save(tmp_path / "main.npz")
    read = check.Reference.read(tmp_path / "main.npz")
    assert [record.sizes for record in read.recorded] == [{"length": 2}, {"length": 7}, {"length": 12}]
    for a, b in zip(recorded.recorded, read.recorded, strict=True):
        assert a.outputs["logits"].shape == b.outputs["logits"].shape
        np.testing.assert_array_equal(a.outputs["logits"].values, b.outputs["logits"].values)
    stage = models.text("padding")
    for mine, theirs in zip(read.inputs({"length": 12}).values(), stage.resized({"length": 12}), strict=True):
        np.testing.assert_array_equal(mine, theirs.numpy())


# Whole or not at all


def test_what_is_there_stays_until_it_is_replaced_on_request(tmp_path: Path) -> None:
    out = write(tmp_path / "engine", ONE)
    before = (out / "manifest.json").read_text()
    with pytest.raises(OptpassError, match=r"is there; give another output, or --force"):
        write(out, ONE)
    assert (out / "manifest.json").read_text() == before
    write(out, ONE, keep=3, force=True)
    assert (out / "manifest.json").read_text() != before
    assert left_in(tmp_path) == ["engine"]


def test_a_directory_that_is_no_artifact_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(OptpassError, match="is no artifact"):
        write(tmp_path / "thesis", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OptpassError, match="is no directory"):
        write(tmp_path / "file", force=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_an_exception_leaves_no_trace_and_what_was_there_stays(error: BaseException, tmp_path: Path) -> None:
    out = write(tmp_path / "engine", ONE)
    before = (out / "manifest.json").read_text()

    def stopped() -> None:
        with artifact.writer(out, force=True) as new:
            new.add(models.vision(), "onnxruntime", "f32")
            raise error

    with pytest.raises(type(error)):
        stopped()
    assert left_in(tmp_path) == ["engine"]
    assert (out / "manifest.json").read_text() == before


def test_leaving_without_finish_writes_nothing(tmp_path: Path) -> None:
    with artifact.writer(tmp_path / "engine") as new:
        new.add(models.vision(), "onnxruntime", "f32")
    assert left_in(tmp_path) == []


def test_a_full_disk_is_one_line_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("onnx_ir.save", full)
    with pytest.raises(OptpassError, match=r"No space left on device; free some space") as caught:
        write(tmp_path / "engine", ONE)
    assert caught.value.exit_code == 2
    assert left_in(tmp_path) == []


def test_a_target_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OptpassError, match=r"cannot be written: (Not a directory|File exists)"):
        write(tmp_path / "file" / "engine")


def test_a_failed_rename_brings_back_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write(tmp_path / "engine", ONE)
    before = (out / "manifest.json").read_text()
    rename, tried = os.rename, []

    def fails_once(source: Any, target: Any) -> None:
        if Path(target) == out and "optpass" in Path(source).name:
            tried.append(target)
            number = errno.ENOTEMPTY if len(tried) == 1 else errno.EIO
            raise OSError(number, os.strerror(number))
        rename(source, target)

    monkeypatch.setattr(artifact, "_swap", lambda first, second: False)
    monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises(OptpassError, match="Input/output error"):
        write(out, ONE, force=True)
    assert (out / "manifest.json").read_text() == before
    assert left_in(tmp_path) == ["engine"]


@pytest.mark.parametrize("swaps", [True, False])
def test_both_ways_of_replacing_leave_the_new_artifact_alone(
    swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "engine", ONE)
    before = (out / "manifest.json").read_text()
    if not swaps:
        monkeypatch.setattr(artifact, "_swap", lambda first, second: False)
    write(out, ONE, keep=3, force=True)
    assert (out / "manifest.json").read_text() != before
    assert left_in(tmp_path) == ["engine"]


def test_what_killed_processes_left_is_removed_and_what_others_make_is_not(tmp_path: Path) -> None:
    names = [f"{artifact.PREFIX}{name}" for name in ("left", "held", "fresh")]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    for name in names[:2]:
        os.utime(tmp_path / name, (0, 0))
    with artifact._held(tmp_path / names[1]):
        write(tmp_path / "engine", ONE)
    assert left_in(tmp_path) == sorted([*names[1:], "engine"])


def test_the_first_of_two_writers_wins_where_the_second_may_not_replace(tmp_path: Path) -> None:
    def twice() -> None:
        with artifact.writer(tmp_path / "engine", source="second") as second:
            second.add(models.vision(), "onnxruntime", "f32")
            with artifact.writer(tmp_path / "engine", source="first") as first:
                first.add(models.vision(), "onnxruntime", "f32")
                first.finish()
            second.finish()

    with pytest.raises(OptpassError, match=r"is there; give another output, or --force"):
        twice()
    assert json.loads((tmp_path / "engine" / "manifest.json").read_text())["source"] == "first"
    assert left_in(tmp_path) == ["engine"]


STOPPED = """
import sys, time
from optpass.export import artifact
with artifact.writer(sys.argv[1]) as new:
    (new.folder / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_leaves_no_trace(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPED, str(tmp_path / "engine")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        begin = time.monotonic()
        assert process.wait(30) != 0
        assert time.monotonic() - begin < 30
    assert left_in(tmp_path) == []


def test_only_a_graph_that_decides_may_decide_otherwise() -> None:
    plain = capture((nn.Linear(4, 4), (torch.randn(2, 4),), {})).main
    assert not fidelity.chooses(plain)
    assert fidelity.effect(plain, plain) == 0.0

    class First(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.gather(1, x.topk(2, 1)[1])

    assert fidelity.chooses(capture((First(), (torch.randn(2, 4),), {})).main)


@pytest.mark.parametrize("data", [None, {"input": np.eye(4, dtype=np.float32), "labels": np.arange(4)}])
def test_of_large_engines_one_is_open_at_a_time(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref[Session]] = []

    def tracked(*arguments: Any) -> Session:
        assert not any(reference() for reference in opened)
        opened.append(weakref.ref(session := open_session(*arguments)))
        return session

    monkeypatch.setattr(artifact, "open_session", tracked)
    monkeypatch.setattr(artifact, "LARGE", 0)
    model = (nn.Linear(4, 4), (torch.eye(4),), {})
    assert optpass.optimize(model, backend="onnxruntime", out=tmp_path / "e", data=data, seconds=0).metric
    # checked, and then judged, the one that was checked last first
    assert len(opened) == 3


def test_no_weights_are_held_when_engines_are_checked_but_those_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def watched(*arguments: Any, **named: Any) -> Any:
        program = capture(*arguments, **named)
        held.extend(weakref.ref(tensor) for tensor in program.main.exported.state_dict.values())
        return program

    def checked(writer: artifact.Writer) -> Any:
        alive.append(any(reference() is not None for reference in held))
        return fidelity_of(writer)

    fidelity_of = artifact.Writer.fidelity
    monkeypatch.setattr(api, "capture", watched)
    monkeypatch.setattr(artifact.Writer, "fidelity", checked)
    monkeypatch.syspath_prepend(tmp_path)
    source = "import torch\ndef made():\n    return torch.nn.Linear(4, 4), (torch.eye(4),), {}\n"
    (tmp_path / "releasing.py").write_text(source)
    assert optpass.optimize("releasing:made", out=tmp_path / "gone", seconds=0).ok
    example = torch.eye(4)
    mine = nn.Linear(4, 4)
    before = mine(example)
    assert optpass.optimize((mine, (example,), {}), out=tmp_path / "mine", seconds=0).ok
    assert alive == [False, True]
    assert held
    assert torch.equal(mine(example), before)
