"""Torch-TensorRT: what it is asked to build, by a stand-in that keeps it; what is said where it is not, or no GPU."""

from __future__ import annotations

import importlib.util
import io
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optpass
from optpass import api
from optpass.cli.main import run
from optpass.errors import OptpassError
from optpass.export import artifact
from optpass.export.base import Source
from optpass.export.fidelity import tolerance
from optpass.export.torch_tensorrt import TorchTensorRT, halved
from optpass.probes import relative
from optpass.program import Stage, op_name
from optpass.runtime import cuda
from optpass.runtime.engines import base as engines
from optpass.runtime.engines import inductor, torch_tensorrt
from tests.export import models

HERE = "sm_90"
OPTIONS = {"use_explicit_typing": True, "disable_tf32": True}


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_tensorrt, "LIBRARY", "torch_tensorrt_of_another_day")


class Recorded:
    """What the stand-in was called with: ``compile`` gives a program back, ``save`` writes it down."""

    def __init__(self) -> None:
        self.compiled: dict[str, Any] = {}
        self.saved: dict[str, Any] = {}

    def compile(self, program: Any, **options: Any) -> Any:
        self.compiled = options
        return program

    def save(self, program: Any, file: str, **options: Any) -> None:
        self.saved = options
        torch.export.save(program, file)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """A machine with a GPU, CUDA and a package that keeps what it is given; weights stay on the CPU."""
    found, module = Recorded(), ModuleType("torch_tensorrt")
    module.__spec__ = ModuleSpec("torch_tensorrt", None)
    vars(module).update(
        dynamo=SimpleNamespace(compile=found.compile),
        save=found.save,
        Input=lambda **given: given,
        __version__="2.13.0",
    )
    monkeypatch.setitem(sys.modules, "torch_tensorrt", module)
    monkeypatch.setattr(inductor, "GPU", "cpu")
    monkeypatch.setattr(cuda, "device", lambda: HERE)
    monkeypatch.setattr(inductor, "has_cuda", lambda: True)
    return found


def lowered(stage: Stage, folder: Path, precision: str = "f32") -> Any:
    """The program that was handed over, read back from the file that was written."""
    name = TorchTensorRT().lower(Source(stage), folder, precision, [HERE])
    return torch.export.load(str(folder / name))


def ops(program: Any) -> list[str]:
    return [op_name(node) for node in program.graph.nodes if node.op == "call_function"]


# What it is asked for


def test_sizes_that_are_dynamic_become_the_smallest_the_example_and_the_largest(
    stand_in: Recorded, tmp_path: Path
) -> None:
    stage = models.vision()
    program = lowered(stage, tmp_path)
    shapes = {"min_shape": (1, 9, 32), "opt_shape": (3, 9, 32), "max_shape": (6, 9, 32)}
    inputs = [{"dtype": torch.float32, "name": "tokens", **shapes}]
    assert stand_in.compiled == {"arg_inputs": inputs, **OPTIONS}
    (dim,) = stand_in.saved["dynamic_shapes"][0].values()
    assert (dim.__name__, dim.min, dim.max) == ("batch", 1, 6)
    assert stand_in.saved["output_format"] == "aot_inductor"
    assert all(map(torch.equal, stand_in.saved["arg_inputs"], stage.example))
    (bounds,) = program.range_constraints.values()
    assert (bounds.lower, bounds.upper) == (1, 6)
    assert torch.equal(program.module()(*stage.example)[0], stage.results[0])


def test_inputs_that_share_a_size_share_it_in_the_package(stand_in: Recorded, tmp_path: Path) -> None:
    lowered(models.text("padding"), tmp_path)
    ids, mask = stand_in.saved["dynamic_shapes"]
    assert ids[1] is mask[1]
    assert [given["dtype"] for given in stand_in.compiled["arg_inputs"]] == [torch.int64, torch.int64]


def test_sizes_that_are_fixed_have_one_shape(stand_in: Recorded, tmp_path: Path) -> None:
    lowered(models.stage(nn.Embedding(5, 4), {"input": torch.tensor([[1, 2]])}), tmp_path)
    inputs = [{"shape": (1, 2), "dtype": torch.int64, "name": "input"}]
    assert stand_in.compiled["arg_inputs"] == inputs
    assert stand_in.saved["dynamic_shapes"] is None


def test_the_stage_keeps_its_weights_where_they_are(
    stand_in: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, devices = models.vision(1), []
    monkeypatch.setattr(inductor, "GPU", "meta")
    sys.modules["torch_tensorrt"].save = lambda *args, **options: devices.append(args[0])  # type: ignore[attr-defined]
    TorchTensorRT().lower(Source(stage), tmp_path, "f32", [HERE])
    assert {tensor.device.type for tensor in devices[0].state_dict.values()} == {"meta"}
    assert {tensor.device.type for tensor in stage.exported.state_dict.values()} == {"cpu"}


# Half precisions


@pytest.mark.parametrize(("precision", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_products_with_weights_and_attention_are_half_and_all_else_is_not(
    precision: str, dtype: torch.dtype, stand_in: Recorded, tmp_path: Path
) -> None:
    stage = models.vision(2, keep=4)
    program = lowered(stage, tmp_path, precision)
    types: dict[str, set[torch.dtype]] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
            types.setdefault(op_name(node), set()).add(value.dtype)
    assert types["linear"] == types["scaled_dot_product_attention"] == {dtype}
    assert types.pop("to") == {dtype, torch.float32}
    rest = {name: found for name, found in types.items() if name not in ("linear", "scaled_dot_product_attention")}
    assert {"layer_norm", "gelu", "add", "linalg_vector_norm"} <= set(rest)
    assert all(found == {torch.float32} for found in rest.values()), rest
    assert stand_in.compiled["use_explicit_typing"] is True


@pytest.mark.parametrize("form", ["window", "padding float", "flag", "all"])
@pytest.mark.parametrize("precision", ["f16", "bf16"])
def test_half_graphs_compute_what_single_ones_do_within_rounding(form: str, precision: str) -> None:
    stage = models.text(form)
    half = halved(stage, {"f16": torch.float16, "bf16": torch.bfloat16}[precision])
    assert half.ranges == stage.ranges
    assert "scaled_dot_product_attention" in ops(half.exported)
    for sizes in ({}, {"length": 2}, {"length": 12}):
        inputs = stage.resized(sizes)
        gap = relative(half.run(inputs), stage.run(inputs))
        assert 0 < gap <= tolerance(stage, precision)


def test_a_text_that_sees_nothing_is_no_number_in_no_precision() -> None:
    """The lowest number of float32 is infinite in float16, and a row of nothing else has no softmax."""
    stage = models.text("padding float")
    inputs = (stage.example[0], torch.zeros_like(stage.example[1]))
    (found,) = halved(stage, torch.float16).run(inputs)
    assert found.isfinite().all()


class Counts(nn.Module):
    """Places as a product with a table of whole numbers, which half precision cannot tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(1000.0, 1004.0)[:, None])

    def forward(self, chosen: Tensor) -> Tensor:
        return chosen @ self.places  # type: ignore[no-any-return, operator]


def test_places_are_counted_in_single_precision() -> None:
    stage = models.stage(Counts(), {"chosen": torch.eye(4)})
    assert torch.equal(halved(stage, torch.bfloat16).run(stage.example)[0], stage.results[0])


# From passes to the manifest


def test_kernels_are_whole_in_what_is_built_and_in_nothing_else(
    stand_in: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[Any] = []
    monkeypatch.setattr(torch_tensorrt, "unfit", lambda engine: "is not to be run in a test")
    monkeypatch.setattr(torch_tensorrt, "version", lambda: "torch 2.13.0, torch_tensorrt 2.13.0, tensorrt 11.0.0.114")
    sys.modules["torch_tensorrt"].dynamo.compile = lambda program, **rest: handed.append(ops(program)) or program  # type: ignore[attr-defined]
    model = models.Vision(2)
    given = ((model, (), {"tokens": torch.randn(3, 9, 32)}),)
    result = api.optimize(
        *given, "merge(r=2,at=0)", backend=["torch-tensorrt:f16", "onnxruntime"], out=tmp_path / "engine", seconds=0
    )
    assert result.ok
    main, dense = handed
    assert [name for name in main if name.startswith("optpass.")] == [
        "optpass.bipartite_match",
        "optpass.bipartite_merge",
    ]
    assert not [name for name in dense if name.startswith("optpass.")]
    assert [row.engine for row in result.unrun] == ["torch-tensorrt-f16", "dense/torch-tensorrt-f16"]
    made = optpass.load(tmp_path / "engine").manifest.engines["torch-tensorrt-f16"]
    assert made.target == [HERE]
    assert made.version == "torch 2.13.0, torch_tensorrt 2.13.0, tensorrt 11.0.0.114"
    assert made.entry.endswith("/model.pt2")


# Said before any work


def test_a_package_that_is_missing_is_told_with_what_to_install(nowhere: None, tmp_path: Path) -> None:
    sentence = r"\[backend-library\] torch-tensorrt is not installed; pip install torch-tensorrt, on a machine with"
    with pytest.raises(OptpassError, match=sentence):
        api.optimize("fashion-vit", backend="torch-tensorrt", out=tmp_path / "engine")


def test_the_command_says_the_same_in_one_line(
    nowhere: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.StringIO()
    code = run(["optimize", "fashion-vit", "-b", "torch-tensorrt:bf16", "-o", str(tmp_path / "engine")], out)
    assert code == 2
    said = out.getvalue() + capsys.readouterr().err
    assert "torch-tensorrt is not installed; pip install torch-tensorrt" in " ".join(said.split())
    assert not (tmp_path / "engine").exists()


def test_doctor_lists_it_in_each_precision(nowhere: None) -> None:
    rows = api.doctor(backend="torch-tensorrt").backends
    assert [row.precision for row in rows] == ["f32", "f16", "bf16"]
    assert {row.builds for row in rows} == {"torch-tensorrt is not installed"}
    assert {row.runs for row in rows} == {"needs torch_tensorrt_of_another_day, which is not installed"}


@pytest.mark.parametrize(
    ("change", "asked", "sentence"),
    [
        (
            (cuda, "device", ""),
            [],
            r"\[target\] .* GPU that is here, and there is none; build where there is one",
        ),
        (
            (inductor, "has_cuda", False),
            [],
            r"\[target\] .* GPU that is here, and torch 2\.[\d.]+ is installed without CUDA",
        ),
        (
            None,
            ["sm_89", "sm_120"],
            r"for the GPU that is here, sm_90, and not for sm_89, sm_120; name sm_90 too",
        ),
    ],
)
def test_it_builds_for_the_gpu_that_is_here_alone(
    change: tuple[Any, str, Any] | None,
    asked: list[str],
    sentence: str,
    stand_in: Recorded,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert TorchTensorRT().target(["sm_89", HERE]) == TorchTensorRT().target([]) == [HERE]
    if change:
        module, name, value = change
        monkeypatch.setattr(module, name, lambda: value)
    with pytest.raises(OptpassError, match=sentence):
        TorchTensorRT().target(asked)


def test_a_library_that_fails_is_one_line(stand_in: Recorded, tmp_path: Path) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise AssertionError("no kernel image is there\nmany lines")

    sys.modules["torch_tensorrt"].dynamo.compile = fails  # type: ignore[attr-defined]
    with pytest.raises(
        OptpassError, match=r"cannot compile the model: no kernel image is there; use tensorrt or"
    ) as it:
        TorchTensorRT().lower(Source(models.vision(1)), tmp_path, "f32", [HERE])
    assert "\n" not in str(it.value)


# Opened elsewhere


@pytest.fixture
def built(stand_in: Recorded, tmp_path: Path) -> Path:
    with artifact.writer(tmp_path / "engine", source="tests") as new:
        for backend in ("torch-tensorrt", "onnxruntime"):
            new.add(models.vision(1), backend, "f32")
        new.finish()
    return tmp_path / "engine"


def test_an_engine_is_native_and_bound_to_a_gpu_and_to_what_made_it(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = optpass.load(built)
    assert session.name == "onnxruntime-f32"
    assert engines.is_native("torch-tensorrt")
    made = session.manifest.engines["torch-tensorrt-f32"]
    assert engines.unfit(made) == ""
    older = made.model_copy(update={"version": "torch 2.3.0"})
    assert engines.unfit(older).startswith("is built by torch 2.3.0, and here is torch 2.")
    monkeypatch.setattr(inductor, "has_cuda", lambda: False)
    assert engines.unfit(made).startswith("needs CUDA, and torch 2.")
    for here, told in (("sm_89", "sm_89"), ("", "no NVIDIA GPU")):
        monkeypatch.setattr(cuda, "device", lambda here=here: here)
        assert engines.unfit(made) == f"is built for sm_90, and here is {told}"


def test_a_library_that_does_not_import_says_why(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> ModuleType:
        raise RuntimeError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(engines.importlib, "import_module", fails)  # type: ignore[attr-defined]
    monkeypatch.setattr(engines, "kind_of", lambda backend: torch_tensorrt)
    with pytest.raises(OptpassError, match=r"needs torch_tensorrt, which cannot be imported \(Torch not compiled"):
        engines.require("torch-tensorrt-f32", "torch-tensorrt")


# For real

REAL = importlib.util.find_spec("torch_tensorrt") is not None and bool(cuda.device()) and inductor.has_cuda()


@pytest.mark.skipif(not REAL, reason="needs torch_tensorrt, torch with CUDA and an NVIDIA GPU")
@pytest.mark.parametrize("precision", TorchTensorRT.precisions)
def test_it_computes_what_eager_execution_does(precision: str, tmp_path: Path) -> None:
    with artifact.writer(tmp_path / "engine", source="tests") as new:
        new.add(models.vision(1, 4), "torch-tensorrt", precision)
        assert all(row.ok for row in new.fidelity())
        new.finish()
