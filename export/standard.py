"""An ONNX graph in ops of the standard alone, for engines that do not know those of ONNX Runtime.

Attention becomes the ``Attention`` of opset 23, which engines run as one kernel, on the same
``[batch, tokens, heads * head_dim]``; or, where they have no such kernel, two products and the softmax between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from ml_dtypes import finfo
from onnx_ir.passes.common import ShapeInferencePass
from onnxscript import optimizer, version_converter

from optpass.errors import OptpassError, Place
from optpass.export.fuse import stand_in
from optpass.export.translate import MODULE
from optpass.export.translations import CONTRIB

OPSET = 23
"""The first with ``Attention``."""


def standard(model: ir.Model, *, attention: bool = True) -> ir.Model:
    """A copy of a model without ops of other domains, which computes the same; weights are shared with it.

    Args:
        model: the graph of a stage, as ``translate`` made it.
        attention: whether the engine has a kernel for the op ``Attention``.

    Raises:
        OptpassError: there is an op whose meaning is not known here; names it and its module.
    """
    made = model.clone()
    version_converter.convert_version(made, OPSET, fallback=False)
    for node in list(ir.traversal.RecursiveGraphIterator(made.graph)):
        if node.domain == CONTRIB:
            _replace(node, attention)
    made.opset_imports.pop(CONTRIB, None)
    optimizer.fold_constants(made, input_size_limit=FOLDED, output_size_limit=FOLDED)
    return made


FOLDED = 64
"""Elements of a value that is computed here: axes and shapes, which some parsers take as constants only."""


def _replace(node: ir.Node, attention: bool) -> None:
    writers: dict[str, Callable[[_Tape, ir.Node], ir.Value]] = {
        "MultiHeadAttention": _attention if attention else _products,
        "Gelu": lambda tape, gelu: tape("Gelu", gelu.inputs),
        "FastGelu": lambda tape, gelu: tape("Gelu", gelu.inputs, approximate="tanh"),
    }
    if node.op_type not in writers:
        raise OptpassError(
            "not-lowered",
            f"{CONTRIB}.{node.op_type} has no form in standard ONNX here",
            "use onnxruntime or openvino",
            Place(node.metadata_props.get(MODULE, ""), node.op_type),
        )
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    tape = _Tape(node)
    result = writers[node.op_type](tape, node)
    graph.insert_before(node, tape.nodes)
    stand_in(result, node.outputs[0])
    graph.remove(node, safe=True)


class _Tape:
    """Nodes in the place of one, which keep its module."""

    def __init__(self, node: ir.Node) -> None:
        self.node = node
        self.nodes: list[ir.Node] = []

    def __call__(self, op: str, inputs: Sequence[ir.Value | None], **attributes: float | str | list[int]) -> ir.Value:
        name = f"{self.node.name}/{op}_{len(self.nodes)}"
        made = ir.node(op, list(inputs), attributes, name=name)
        made.metadata_props.update(self.node.metadata_props)
        made.outputs[0].name = name
        self.nodes.append(made)
        return made.outputs[0]

    def constant(self, value: list[int] | list[float] | float) -> ir.Value:
        dtype = ir.DataType.INT64 if isinstance(value, int | list) else ir.DataType.FLOAT
        made = self("Constant", [])
        tensor = ir.tensor(value, dtype=dtype, name=made.name)
        self.nodes[-1].attributes["value"] = ir.AttrTensor("value", tensor)
        made.const_value = tensor
        return made


def _given(node: ir.Node) -> tuple[int, float, bool, list[ir.Value | None]]:
    """Heads, scale, whether causal, and query, key, value, bias of a ``MultiHeadAttention``."""
    causal = "unidirectional" in node.attributes and bool(node.attributes["unidirectional"].as_int())
    inputs = [*node.inputs, *[None] * 6]
    return node.attributes["num_heads"].as_int(), node.attributes["scale"].as_float(), causal, [*inputs[:3], inputs[5]]


def _attention(tape: _Tape, node: ir.Node) -> ir.Value:
    heads, scale, causal, inputs = _given(node)
    given = inputs if inputs[3] is not None else inputs[:3]
    return tape("Attention", given, q_num_heads=heads, kv_num_heads=heads, scale=scale, is_causal=int(causal))


def _products(tape: _Tape, node: ir.Node) -> ir.Value:
    heads, scale, causal, (query, key, value, bias) = _given(node)
    split = tape.constant([0, 0, heads, -1])
    q, k, v = (
        tape("Transpose", [tape("Reshape", [x, split])], perm=order)
        for x, order in zip((query, key, value), ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
    )
    like = tape("CastLike", [tape.constant(scale), query])
    scores = tape("Mul", [tape("MatMul", [q, k]), like])
    if causal:
        # of as many queries as keys: translate gives no other
        size = tape("Shape", [query], start=1, end=2)
        lower = tape("Trilu", [tape("Expand", [tape.constant(1.0), tape("Concat", [size, size], axis=0)])], upper=0)
        low = tape("Mul", [tape("Sub", [lower, tape.constant(1.0)]), tape.constant(LOW)])
        scores = tape("Add", [scores, tape("CastLike", [low, query])])
    if bias is not None:
        scores = tape("Add", [scores, bias])
    mixed = tape("MatMul", [tape("Softmax", [scores], axis=-1), v])
    return tape("Reshape", [tape("Transpose", [mixed], perm=[0, 2, 1, 3]), tape.constant([0, 0, -1])])


LOW = 3e4
"""What a score that is not seen loses: its weight is 0 in each precision, and float16 can hold it."""


HALF = ("MatMul", "Gemm", "Conv", "Attention")
"""Ops that are computed in half precision, the products only where they have a weight."""


NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def halved(model: ir.Model, dtype: ir.DataType) -> None:
    """Compute products with weights, and attention, in a half precision, in place; all else stays as it is.

    So does what is half already, in whichever precision: it was chosen by its error, and what is around it casts.
    Counting, choosing and merging tokens are products as well, of values that are computed or of constants that are
    whole numbers: places beyond 256 are not told apart in bfloat16.
    """
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    shared: dict[tuple[ir.Value, bool], ir.Value] = {}
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        weighed = any(value is not None and _is_weight(value) for value in node.inputs[1:2])
        if node.op_type not in HALF or not (weighed or node.op_type == "Attention"):
            continue
        if node.inputs[0] is not None and node.inputs[0].dtype in NARROW:
            continue
        for place, value in enumerate(node.inputs):
            if value is None:
                continue
            key = (value, value.is_initializer())
            if key not in shared:
                shared[key] = _weight(model.graph, value, dtype) if key[1] else _cast(model.graph, value, dtype, node)
            node.replace_input_with(place, shared[key])
        made = node.outputs[0]
        users = list(made.uses())
        wide = ir.node("Cast", [made], {"to": int(ir.DataType.FLOAT)}, name=f"{node.name}/wide")
        wide.metadata_props.update(node.metadata_props)
        wide.outputs[0].name, made.name = made.name, f"{made.name}/half"
        wide.outputs[0].type, wide.outputs[0].shape = made.type, made.shape
        made.type = ir.TensorType(dtype)
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        graph.insert_after(node, wide)
        for user, place in users:
            user.replace_input_with(place, wide.outputs[0])
        for place, output in enumerate(graph.outputs):
            if output is made:
                graph.outputs[place] = wide.outputs[0]
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def _is_weight(value: ir.Value) -> bool:
    if not value.is_initializer() or value.const_value is None:
        return False
    array = value.const_value.numpy()
    return not np.array_equal(array, np.round(array))


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, user: ir.Node) -> ir.Value:
    """A value in half precision, which first loses what would be infinite: a score that is not seen."""
    tape = _Tape(user)
    if user.op_type == "Attention" and user.inputs[3:] and value is user.inputs[3]:
        made = tape("Cast", [tape("Max", [value, tape.constant(-LOW)])], to=int(dtype))
    else:
        made = tape("Cast", [value], to=int(dtype))
    for number, node in enumerate(tape.nodes):
        node.name = node.outputs[0].name = f"{value.name}/half_{number}"
    maker = value.producer()
    if maker is None:
        graph.insert_before(graph[0], tape.nodes)
    else:
        # a value that a branch reads is cast where it is made, in whatever graph
        assert isinstance(maker.graph, ir.Graph)
        maker.graph.insert_after(maker, tape.nodes)
    return made


def _weight(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """A weight in half precision; what is too large for it becomes the largest that it holds."""
    assert value.const_value is not None
    half = dtype.numpy()
    most = float(finfo(half).max)
    array = np.clip(value.const_value.numpy(), -most, most).astype(half)
    made = ir.Value(name=f"{value.name}/half", const_value=ir.tensor(array, dtype=dtype))
    graph.register_initializer(made)
    return made
