"""AOTInductor: what it compiles computes the same, is bound to what made it, and is loaded on request only."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
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
from optpass.export.base import Source
from optpass.export.inductor import Inductor, contiguous, moved
from optpass.kernels import base as kernels
from optpass.kernels.bipartite_merge import bipartite_match, bipartite_merge
from optpass.program import Stage, op_name
from optpass.results import Interval, Latency, Timing
from optpass.runtime import check, cuda
from optpass.runtime.engines import inductor as engine
from tests.export import models
from tests.export.artifacts import edited

TOKENS = np.random.default_rng(0).standard_normal((2, 9, 32)).astype(np.float32)


def latency(name: str, milliseconds: float) -> Latency:
    timing = Timing(median_ms=milliseconds, p95_ms=milliseconds, runs=1)
    one = Interval(value=1, low=1, high=1)
    return Latency(engine=name, batch="1", dense=timing, optimized=timing, speedup=one, verdict="no gain")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two engines of one small model; compiled once, since that takes half a minute."""
    out = tmp_path_factory.mktemp("inductor") / "engine"
    stage = models.vision(1, 4)
    with artifact.writer(out, source="tests") as new:
        names = [new.add(stage, backend, "f32") for backend in ("inductor", "onnxruntime")]
        figures = [latency(names[0], 1.0), latency(names[1], 2.0)]
        new.finish(fidelity=new.fidelity(), latency=figures)
    return out


@pytest.fixture
def copied(compiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "engine"))


def test_it_computes_what_eager_execution_does_at_each_size(compiled: Path) -> None:
    manifest = json.loads((compiled / "manifest.json").read_text())
    found = {row["engine"]: row for row in manifest["fidelity"]}["inductor-f32"]
    assert found["ok"]
    assert [shape["batch"] for shape in found["shapes"]] == [1, 3, 6]
    assert manifest["engines"]["inductor-f32"]["target"] == engine.features()
    assert manifest["engines"]["inductor-f32"]["version"] == torch.__version__.partition("+")[0]


def test_it_is_never_the_default_however_fast(compiled: Path) -> None:
    session = optpass.load(compiled)
    assert session.name == session.manifest.default == "onnxruntime-f32"
    assert session.why.startswith("onnxruntime-f32 is the fastest that was timed")


@pytest.mark.parametrize("asked", [{"backend": "inductor"}, {"backend": "inductor:f32"}, {"engine": "inductor-f32"}])
def test_it_is_loaded_on_request(asked: dict[str, str], compiled: Path) -> None:
    expected = optpass.load(compiled).run(tokens=TOKENS)["logits"]
    session = optpass.load(compiled, threads=1, **asked)  # type: ignore[arg-type]
    assert session.name == "inductor-f32"
    np.testing.assert_allclose(session.run(tokens=TOKENS)["logits"], expected, atol=1e-5)
    turned = np.asfortranarray(TOKENS)
    turned.flags.writeable = False
    kept = session.run(tokens=turned)["logits"]
    np.testing.assert_allclose(kept, expected, atol=1e-5)
    before = kept.copy()
    session.run(tokens=TOKENS + 1)
    np.testing.assert_array_equal(kept, before)


class Looked(nn.Module):
    """Rows of a table by ids, of which one is made here."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) + self.table(ids % 5)


OUTSIDE = """
import sys
import numpy as np
import optpass
session = optpass.load(sys.argv[1], backend="inductor")
for wrong in (5, -1):
    try:
        session.run(ids=np.array([[0, wrong]]))
    except optpass.OptpassError as error:
        print(error.refusal.code)
print(session.run(ids=np.array([[0, 4]]))["output"].shape)
"""


def test_an_id_that_has_no_row_is_refused_and_the_process_goes_on(tmp_path: Path) -> None:
    with artifact.writer(tmp_path / "engine") as new:
        new.add(models.stage(Looked(), {"ids": torch.tensor([[1, 2]])}), "inductor", "f32")
        new.finish(fidelity=new.fidelity())
    call = [sys.executable, "-c", OUTSIDE, str(tmp_path / "engine")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split("\n")) == (0, ["engine-run", "engine-run", "(1, 2, 4)", ""]), done.stderr


NOT_ASKED = """
import sys
import optpass
from optpass.runtime import check, cuda
assert optpass.load(sys.argv[1]).name == "onnxruntime-f32"
result = check.verify(sys.argv[1], threads=1)
print(result.ok, [row.engine for row in result.unrun], [row.why for row in result.unrun], "torch" in sys.modules)
"""


def test_nothing_that_is_not_asked_for_it_opens_it_or_imports_torch(compiled: Path) -> None:
    command = [sys.executable, "-c", NOT_ASKED, str(compiled)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split(" ", 1) == [
        "True",
        "['inductor-f32'] ['is machine code, which is run on request only'] False\n",
    ], done.stderr


def test_it_is_verified_on_request(compiled: Path) -> None:
    result = check.verify(compiled, backend="inductor", threads=1)
    assert result.ok
    assert {row.engine for row in result.fidelity} == {"inductor-f32", "onnxruntime-f32"}


def test_where_there_is_nothing_else_the_error_says_how_to_ask(copied: Path) -> None:
    def alone(manifest: dict[str, Any]) -> None:
        del manifest["engines"]["onnxruntime-f32"]
        manifest["default"] = "inductor-f32"

    with pytest.raises(OptpassError, match=r"is machine code.*on request only; .*backend=inductor, or --backend indu"):
        optpass.load(edited(copied, alone))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"target": ["x86_64", "avx1024"]}, r"machine code for a CPU with avx1024, which this one does not have"),
        ({"version": "2.3.0"}, r"machine code for torch 2\.3\.0, and here is 2\.[\d.]+"),
    ],
)
def test_code_for_another_machine_or_torch_is_one_line(change: dict[str, Any], sentence: str, copied: Path) -> None:
    edited(copied, lambda manifest: manifest["engines"]["inductor-f32"].update(change))
    with pytest.raises(OptpassError, match=rf"{sentence}; load the engine onnxruntime-f32"):
        optpass.load(copied, engine="inductor-f32")
    with pytest.raises(OptpassError, match=rf"{sentence}; .*optpass optimize tests -b inductor"):
        optpass.load(copied, backend="inductor")


def test_a_machine_without_a_compiler_is_told_so_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(OptpassError, match=r"needs a C\+\+ compiler, and here is none of g\+\+.*install g\+\+"):
        Inductor().check("f32")


def test_strides_of_the_example_do_not_become_part_of_the_code() -> None:
    """An example that is a part of a longer text would be read with the length of that text."""
    stage = models.text("flag")
    whole = torch.zeros(2, 64, dtype=torch.int64)
    sliced = replace(stage, example=(whole[:, :7], stage.example[1]))
    sliced = sliced.retraced(sliced.module)
    assert strides(sliced)[0] == (64, 1)
    assert strides(contiguous(sliced))[0][0] != 64
    assert contiguous(stage) is stage


def strides(stage: Stage) -> list[tuple[Any, ...]]:
    placed = [node for node in stage.exported.graph.nodes if node.op == "placeholder"]
    users = stage.exported.graph_signature.user_inputs
    return [tuple(node.meta["val"].stride()) for node in placed if node.name in users]


def test_a_compiler_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("g++: fatal error: no memory\nmany lines\nmore")

    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fails)
    with pytest.raises(OptpassError, match=r"cannot compile the model: g\+\+: fatal error: no memory; use") as caught:
        Inductor().lower(Source(models.vision(1, 4)), tmp_path, "f32")
    assert "\n" not in str(caught.value)


# On a GPU


class Halves(nn.Module):
    """Tokens with the best of each pair merged, by two kernels."""

    def forward(self, tokens: Tensor) -> Tensor:
        index, moved, slot = bipartite_match(tokens, None, 3)
        return bipartite_merge(tokens, None, index, moved, slot)  # type: ignore[no-any-return]


def halves(whole: bool) -> Stage:
    torch.manual_seed(0)
    with kernels.kept() if whole else contextlib.nullcontext():
        return models.stage(Halves(), {"tokens": torch.randn(2, 9, 4)})


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU and CUDA, on which programs stay on the CPU all the same."""
    monkeypatch.setattr(cuda, "device", lambda: "sm_90")
    monkeypatch.setattr(engine, "has_cuda", lambda: True)
    monkeypatch.setattr(engine, "GPU", "cpu")


ALONE = """
import sys
import torch
import torch._inductor
example, expected = torch.load(sys.argv[1] + "/example.pt")
found = torch._inductor.aoti_load_package(sys.argv[1] + "/model.pt2")(example)
print(hasattr(torch.ops.optpass, "bipartite_match"), "optpass" in sys.modules, torch.equal(found[0], expected))
"""


def test_what_is_in_a_kernel_is_compiled_so_that_a_package_needs_none_of_ours(tmp_path: Path) -> None:
    """On a CPU, where it is the reference; the same node holds the Triton functions where tensors are on a GPU."""
    stage = halves(whole=True)
    assert kernels.holds_any(stage)
    Inductor().lower(Source(stage), tmp_path, "f32")
    torch.save((stage.example[0], halves(whole=False).results[0]), tmp_path / "example.pt")
    done = subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == "False False True\n", done.stderr


@pytest.mark.parametrize("target", [[], ["sm_90"]])
def test_kernels_are_whole_in_programs_for_the_gpu_alone(
    target: list[str], with_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[Any] = []
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", lambda program, **rest: handed.append(program))
    stage = replace(halves(whole=False), whole=halves(whole=True))
    inductor = Inductor()
    bound = inductor.target(target)
    assert inductor.keeps_kernels(bound) is bool(target)
    assert inductor.lower(Source(stage), tmp_path, "f32", bound) == "model.pt2"
    ours = {op_name(node) for node in handed[0].graph.nodes if op_name(node).startswith("optpass.")}
    assert ours == ({"optpass.bipartite_match", "optpass.bipartite_merge"} if target else set())


def test_a_program_for_a_gpu_has_all_of_it_there_and_leaves_the_stage_where_it_is() -> None:
    stage = models.stage(nn.Linear(4, 2), {"input": torch.randn(3, 4)})
    program = moved(stage, "meta")
    assert {tensor.device.type for tensor in program.state_dict.values()} == {"meta"}
    assert {tensor.device.type for tensor in stage.exported.state_dict.values()} == {"cpu"}
    made = moved(models.text("lower"), "meta")
    assert {str(n.kwargs["device"]) for n in made.graph.nodes if n.kwargs.get("device") is not None} == {"meta"}


def test_it_is_for_the_gpu_that_is_named_if_it_is_here(with_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Inductor().target([]) == Inductor().target(["sm_89"]) == engine.features()
    assert Inductor().target(["sm_89", "sm_90"]) == [*engine.features(), "sm_90"]
    monkeypatch.setattr(engine, "has_cuda", lambda: False)
    with pytest.raises(
        OptpassError, match=r"\[target\] sm_90 is asked for, and torch 2.* without CUDA; install torch w"
    ):
        Inductor().target(["sm_90"])


def test_a_gpu_that_is_not_here_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "device", lambda: "")
    with pytest.raises(
        OptpassError, match=r"inductor is built for no device by name, and sm_90 is asked for; add -b ten"
    ):
        api.optimize("nothing", backend="inductor", target="sm_90", out=tmp_path / "engine")


def test_an_engine_for_a_gpu_says_what_it_lacks(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = optpass.load(compiled).manifest.engines["inductor-f32"]
    made = made.model_copy(update={"target": [*made.target, "sm_90"]})
    monkeypatch.setattr(cuda, "device", lambda: "")
    assert engine.unfit(made) == "is built for sm_90, and here is no NVIDIA GPU"
    monkeypatch.setattr(cuda, "device", lambda: "sm_90")
    monkeypatch.setattr(engine, "has_cuda", lambda: True)
    assert engine.unfit(made) == ""
    monkeypatch.setattr(engine, "has_cuda", lambda: False)
    assert engine.unfit(made).startswith("is built for sm_90, and torch 2.")


class Package:
    """A loaded package for a device of its own."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.devices: list[str] = []

    def get_metadata(self) -> dict[str, str]:
        return {"AOTI_DEVICE_KEY": self.device}

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        self.devices = [tensor.device.type for tensor in tensors]
        return [torch.ones(2)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_arrays_go_to_the_device_that_the_package_is_for(device: str) -> None:
    package = Package(device)
    (found,) = engine.Opened(package, 1).run([TOKENS])
    assert package.devices == [device]
    np.testing.assert_array_equal(found, np.ones(2, np.float32))
