"""The graph of an engine for existing viewers: an ONNX file without weights for Netron, JSON for Model Explorer.

Both are annotated with the path of the module in the user's model and, where the engines run here, with the time of
each node. An engine joins nodes: the time of several stands at the one that it names.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, shape_inference

from optpass import files
from optpass.errors import OptpassError
from optpass.export.report import check_target, destination
from optpass.export.translate import MODULE
from optpass.export.translations import CONTRIB
from optpass.runtime import manifest as manifests
from optpass.runtime import profile as profiles
from optpass.runtime.engines.base import Timed
from optpass.runtime.manifest import Manifest

SMALL = 64
"""Values of a weight that stay in the file: axes and shapes, which say what a node does."""

MILLISECONDS = "milliseconds"

Times = Mapping[str, float]
"""Milliseconds per call by the name of the node."""


def export(
    folder: Path,
    out: Path | None,
    viewer: str,
    engine: str | None = None,
    *,
    profile: bool = True,
    force: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write the graph of an engine and return the path of the file.

    Args:
        folder: the artifact.
        out: the file; by default the name of the artifact beside it.
        viewer: ``netron`` or ``model-explorer``.
        engine: id of an engine of ONNX Runtime; the default engine of the artifact if it is one, else the first.
        profile: run the engine here to tell the time of each node.
        force: replace a file that is there.
        progress: called with each step.

    Raises:
        OptpassError: the artifact holds no ONNX graph, or the file may not or cannot be written.
    """
    makers: Mapping[str, tuple[str, Callable[[ModelProto, Times, str], bytes]]] = {
        "netron": (".graph.onnx", netron),
        "model-explorer": (".graph.json", model_explorer),
    }
    suffix, make = makers[viewer]
    target = destination(folder, out, suffix)
    check_target(target, folder, force)
    manifest = manifests.read(folder)
    name = _engine(manifest, engine)
    model = onnx.load(folder / manifest.engines[name].entry, load_external_data=False)
    times: Times = {}
    if profile:
        progress(f"profile {name}")
        times = by_node(model.graph, profiles.profile(folder, manifest, name))
    progress("write the graph")
    without_weights(model)
    files.write(target, make(model, times, name))
    return target


def _engine(manifest: Manifest, asked: str | None) -> str:
    graphs = [name for name, engine in manifest.engines.items() if engine.entry.endswith(".onnx")]
    if asked is not None:
        manifest.engine(asked)
    if not graphs or (asked is not None and asked not in graphs):
        what = f"{asked or 'the artifact'} has no ONNX graph"
        remedy = "optimize with -b onnxruntime as well; Netron opens the .xml files of OpenVINO as they are"
        raise OptpassError("graph-engine", what, remedy)
    preferred = asked or manifest.default
    return preferred if preferred in graphs else graphs[0]


def by_node(graph: GraphProto, timed: Sequence[Timed]) -> dict[str, float]:
    """Milliseconds by the nodes of a graph, as far as the names that the engine gave its own lead back to them."""
    makers = {name: node.name for node in graph.node for name in (node.name, *node.output)}
    total: dict[str, float] = defaultdict(float)
    for found in timed:
        # a joined node is called after one of its parts: ``node_MatMul_21/MatMulAddFusion``, ``conv2d_nchwc``
        stem = found.node.partition("/")[0].removesuffix("_nchwc")
        if stem in makers:
            total[makers[stem]] += found.milliseconds
    return dict(total)


def without_weights(model: ModelProto) -> None:
    """Leave out the values of all weights but small ones; their shapes stay."""
    for tensor in model.graph.initializer:
        size = 1
        for length in tensor.dims:
            size *= length
        if size <= SMALL:
            continue
        for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(field)
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        tensor.external_data.add(key="location", value="weights-left-out")


def shapes(model: ModelProto) -> dict[str, str]:
    """Type and shape of each value, such as ``float32[8, 197, 128]``, as far as they can be inferred."""
    scratch = ModelProto()
    scratch.CopyFrom(model)
    for node in scratch.graph.node:
        if node.domain == CONTRIB:
            # the ops that we use of this domain give what their first input is, and onnx does not know them
            node.domain, node.op_type = "", "Identity"
            del node.input[1:], node.output[1:], node.attribute[:]
    inferred = shape_inference.infer_shapes(scratch, data_prop=True).graph
    found = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape"):
            sizes = [d.dim_param or (str(d.dim_value) if d.HasField("dim_value") else "?") for d in tensor.shape.dim]
            found[value.name] = f"{_dtype(tensor.elem_type)}[{', '.join(sizes)}]"
    for tensor in inferred.initializer:
        found[tensor.name] = f"{_dtype(tensor.data_type)}[{', '.join(map(str, tensor.dims))}]"
    return found


def _dtype(kind: int) -> str:
    return str(onnx.helper.tensor_dtype_to_np_dtype(kind)) if kind else "?"


def module_of(node: NodeProto) -> str:
    """The module path that the translation left on a node."""
    return next((entry.value for entry in node.metadata_props if entry.key == MODULE), "")


def netron(model: ModelProto, times: Times, name: str) -> bytes:
    """An ONNX file whose nodes carry module path and time as metadata, and whose values have shapes."""
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    for node in model.graph.node:
        if node.name in times:
            node.metadata_props.add(key=MILLISECONDS, value=f"{times[node.name]:.4f}")
    inferred = shapes(model)
    scratch = {output for node in model.graph.node for output in node.output}
    for value, text in inferred.items():
        if value in scratch and value not in known:
            dtype, _, rest = text.partition("[")
            sizes = [int(size) if size.isdigit() else size for size in rest.rstrip("]").split(", ") if size]
            kind = onnx.helper.np_dtype_to_tensor_dtype(onnx.numpy_helper.np.dtype(dtype))
            model.graph.value_info.append(onnx.helper.make_tensor_value_info(value, kind, sizes))
    model.graph.name = name
    model.doc_string = "The graph without its weights, to look at; the engine is in the artifact."
    return bytes(model.SerializeToString())


def model_explorer(model: ModelProto, times: Times, name: str) -> bytes:
    """The JSON graph of Model Explorer: a namespace for each module, an edge for each value."""
    known = shapes(model)
    graph = model.graph
    makers: dict[str, tuple[str, int]] = {}
    nodes: list[dict[str, Any]] = []
    for value in graph.input:
        makers[value.name] = (f"input/{value.name}", 0)
        nodes.append(_node(f"input/{value.name}", value.name, "inputs", {}, [], [known.get(value.name, "")]))
    # what is constant stands with the node that reads it: as nodes they would be half of the graph
    constants = {tensor.name: known[tensor.name] for tensor in graph.initializer}
    for number, node in enumerate(graph.node):
        if node.op_type == "Constant":
            constants[node.output[0]] = _shown(node.attribute[0])
            continue
        key = node.name or f"node/{number}"
        attributes = {"op": f"{node.domain}.{node.op_type}".lstrip(".")}
        attributes |= {entry.name: _shown(entry) for entry in node.attribute}
        attributes |= {f"input {n}": f"{i} {constants[i]}" for n, i in enumerate(node.input) if i in constants}
        if node.name in times:
            attributes[MILLISECONDS] = f"{times[node.name]:.4f}"
        edges = [(*makers[i], place) for place, i in enumerate(node.input) if i in makers]
        outputs = [known.get(output, "") for output in node.output]
        nodes.append(_node(key, node.op_type, module_of(node).replace(".", "/"), attributes, edges, outputs))
        makers |= {output: (key, place) for place, output in enumerate(node.output) if output}
    for value in graph.output:
        edges = [(*makers[value.name], 0)]
        nodes.append(_node(f"output/{value.name}", value.name, "outputs", {}, edges, [known.get(value.name, "")]))
    # without the label the viewer takes the file for one of another kind
    whole = {"label": name, "graphs": [{"id": name, "nodes": nodes}]}
    return json.dumps(whole, indent=1).encode()


def _node(
    key: str,
    label: str,
    namespace: str,
    attributes: Mapping[str, str],
    edges: Sequence[tuple[str, int, int]],
    outputs: Sequence[str],
) -> dict[str, Any]:
    return {
        "id": key,
        "label": label,
        "namespace": namespace,
        "attrs": [{"key": name, "value": value} for name, value in attributes.items()],
        "incomingEdges": [
            {"sourceNodeId": origin, "sourceNodeOutputId": str(output), "targetNodeInputId": str(place)}
            for origin, output, place in edges
        ],
        "outputsMetadata": [
            {"id": str(place), "attrs": [{"key": "tensor_shape", "value": shape}]}
            for place, shape in enumerate(outputs)
            if shape
        ],
    }


def _shown(attribute: onnx.AttributeProto) -> str:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, TensorProto):
        value = onnx.numpy_helper.to_array(value).tolist()
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
