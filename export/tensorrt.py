"""TensorRT-RTX or TensorRT: the ONNX graph, in standard ops, built to an engine for NVIDIA GPUs.

TensorRT-RTX builds for compute capabilities by name, on a machine without a GPU as well; TensorRT for the GPU that is
here. Networks are strongly typed: in ``f16`` and ``bf16`` the products with weights and the attention are half, all
else stays float32, as under autocast; tokens are chosen, counted and merged in float32.

Kernels come as the standard ops of their reference, in either library. Not made: plug-ins ahead of time of their Triton
functions. TensorRT-RTX has none. Those of TensorRT are one launch each, of PTX that takes inputs, then whole numbers,
then outputs, and no space to work in: most kernels here are several launches, some take a scale, and Triton's PTX ends
in two addresses of its own. That takes functions written for it, and the library at hand to see them run.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from optpass.errors import OptpassError, Place
from optpass.export import onnxruntime
from optpass.export.base import Backend, Source
from optpass.export.standard import OPSET, halved, standard
from optpass.export.translate import MODULE
from optpass.program import Stage
from optpass.runtime import cuda
from optpass.runtime.engines import tensorrt as engine

FILE = "model.engine"

LARGEST_TOPK = 3840
"""The ``k`` at which TensorRT's TopK ends."""

WHEELS = "pip install 'optpass[tensorrt]'"


class TensorRT(Backend):
    """TensorRT-RTX or TensorRT."""

    name = "tensorrt"
    precisions = ("f32", "f16", "bf16")
    form = f"ONNX, opset {OPSET}"
    limits = (f"TopK finds at most {LARGEST_TOPK}", "an engine opens in the version that built it, on the GPUs named")
    devices = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")

    def check(self, precision: str) -> None:
        if not engine.module_name(engine.RTX) and not engine.module_name(engine.FULL):
            raise OptpassError("backend-library", "neither tensorrt_rtx nor tensorrt is installed", WHEELS)

    def target(self, asked: Sequence[str]) -> list[str]:
        self.check("f32")
        here = cuda.device()
        if not asked and not here:
            what = "here is no NVIDIA GPU to build for, and none is named"
            raise OptpassError("target", what, f"name some of {', '.join(self.devices)}, as in --target sm_89,sm_120")
        if not set(asked) <= {here} and not engine.module_name(engine.RTX):
            what = f"TensorRT builds for the GPU that is here, {here or 'none'}, and not for {', '.join(asked)}"
            raise OptpassError("target", what, f"install TensorRT-RTX: {WHEELS}")
        unknown = [name for name in asked or [here] if name not in self.devices]
        if unknown and _library(list(asked) or [here]) == engine.RTX:
            what = f"TensorRT-RTX does not build for {', '.join(unknown)}"
            raise OptpassError("target", what, f"it builds for {', '.join(self.devices)}")
        return list(asked) or [here]

    def version(self, target: Sequence[str]) -> str:
        return engine.version(_library(target))

    def lower(self, source: Source, folder: Path, precision: str, target: Sequence[str] = ()) -> str:
        name, log = _library(target), list[str]()
        # no kernel of attention computes in float32; in half precisions one may be missing for the size of a head
        for attention in [False] if precision == "f32" else [True, False]:
            model = standard(source.onnx, attention=attention)
            if precision != "f32":
                halved(model, ir.DataType.FLOAT16 if precision == "f16" else ir.DataType.BFLOAT16)
            _check_topk(model)
            log.clear()
            plan, layers = _built(engine.load_library(name), model, source.stage, folder, target, log)
            if plan is not None:
                (folder / FILE).write_bytes(plan)
                told = {"library": name, "layers": layers}
                (folder / engine.LAYERS).write_text(json.dumps(told) + "\n", encoding="utf-8")
                return FILE
        text = log[-1].splitlines()[0][:300] if log else "it does not say why"
        raise OptpassError("not-lowered", f"TensorRT cannot build it: {text}", "use another backend or precision")

    def ops(self, source: Source) -> Counter[str]:
        graph = standard(source.onnx, attention=False).graph
        return Counter(node.op_type for node in ir.traversal.RecursiveGraphIterator(graph))

    def rehearse(self, source: Source, folder: Path, precision: str, target: Sequence[str] = ()) -> None:
        """Parse the graph, and build nothing."""
        library, model = engine.load_library(_library(target)), standard(source.onnx, attention=False)
        _check_topk(model)
        logger = _logger(library, [])
        builder = library.Builder(logger)
        _parse(library, _network(library, builder), model, folder, logger)


def _library(target: Sequence[str]) -> str:
    """TensorRT where it is installed and the GPU that is here is all that is built for, otherwise TensorRT-RTX."""
    return engine.FULL if engine.module_name(engine.FULL) and set(target) <= {cuda.device()} else engine.RTX


def _built(
    library: Any, model: ir.Model, stage: Stage, folder: Path, target: Sequence[str], log: list[str]
) -> tuple[Any, list[dict[str, str]]]:
    """The plan, None where there is none, and the layers that it was built from."""
    logger = _logger(library, log)
    builder = library.Builder(logger)
    network = _network(library, builder)
    _parse(library, network, model, folder, logger)
    config = builder.create_builder_config()
    config.clear_flag(library.BuilderFlag.TF32)
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    if hasattr(config, "num_compute_capabilities"):
        config.num_compute_capabilities = len(target)
        for number, name in enumerate(target):
            config.set_compute_capability(getattr(library.ComputeCapability, name.replace("_", "").upper()), number)
    if stage.ranges:
        config.add_optimization_profile(_profile(builder, stage))
    return builder.build_serialized_network(network, config), _layers(network)


def _network(library: Any, builder: Any) -> Any:
    """An empty network, strongly typed where that is not the only way."""
    flags = library.NetworkDefinitionCreationFlag
    return builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)


def _logger(library: Any, log: list[str]) -> Any:
    """Keeps errors, and prints nothing."""

    class Logger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR):
                log.append(message)

    return Logger()


def _parse(library: Any, network: Any, model: ir.Model, folder: Path, logger: Any) -> None:
    parser = library.OnnxParser(network, logger)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        file = Path(work) / onnxruntime.FILE
        onnxruntime.save(model, file)
        if parser.parse_from_file(str(file)):
            return
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    text = errors[0].desc().splitlines()[0][:300] if errors else "it does not say why"
    named = {node.name: node for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    node = named.get(errors[0].node_name()) if errors else None
    what = f"TensorRT does not take the model: {text}"
    raise OptpassError("not-lowered", what, "use another backend", _place(node) if node else None)


def _place(node: ir.Node) -> Place:
    return Place(node.metadata_props.get(MODULE, ""), node.op_type)


def _check_topk(model: ir.Model) -> None:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        k = ir.convenience.get_const_tensor(node.inputs[1]) if node.op_type == "TopK" and node.inputs[1] else None
        count = int(k.numpy().reshape(-1)[0]) if k is not None else 0
        if count > LARGEST_TOPK:
            what = f"TensorRT finds no more than the {LARGEST_TOPK} largest of some, and here it is to find {count}"
            raise OptpassError("not-lowered", what, "keep fewer tokens, or use another backend", _place(node))


def _profile(builder: Any, stage: Stage) -> Any:
    """Smallest, example and largest shape of each input."""
    profile = builder.create_optimization_profile()
    for spec, example in zip(stage.inputs, stage.example, strict=True):
        least, most = stage.limits(spec)
        profile.set_shape(spec.name, least, tuple(example.shape), most)
    return profile


def _layers(network: Any) -> list[dict[str, str]]:
    """Name, type and precision of the layers before the builder fuses them; constants left out."""
    found = []
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        kind = str(layer.type).rpartition(".")[2].lower()
        if kind != "constant":
            precision = str(layer.get_output(0).dtype).rpartition(".")[2].lower() if layer.num_outputs else ""
            found.append({"name": layer.name, "type": kind, "precision": precision})
    return found
