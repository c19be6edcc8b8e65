"""The ONNX graph in the form that engines fuse best: the same arithmetic in fewer nodes.

Products of one input with several weights are one product, whose result is split: a single token finds each weight too
small to be shared among cores. ``x * (1 / s)`` is ``x / s``, the form in which ONNX Runtime knows the norm of Llama.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir


def fuse(model: ir.Model) -> None:
    """Rewrite a model in place."""
    _divide(model.graph)
    _join_products(model.graph)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in OPTIONAL_OUTPUTS:
            _drop_unused_outputs(node)


OPTIONAL_OUTPUTS = ("LayerNormalization", "Dropout", "MaxPool")
"""Ops that may have fewer outputs than torch's translation gives them."""


def _divide(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type != "Mul":
            continue
        for place, value in enumerate(node.inputs):
            maker = value.producer() if value is not None else None
            other = node.inputs[1 - place]
            if maker is None or maker.op_type != "Reciprocal" or other is None:
                continue
            made = ir.node("Div", [other, maker.inputs[0]], name=node.name)
            made.metadata_props.update(node.metadata_props)
            graph.insert_before(node, made)
            stand_in(made.outputs[0], node.outputs[0])
            graph.remove(node, safe=True)
            if not maker.outputs[0].uses() and not maker.outputs[0].is_graph_output():
                graph.remove(maker, safe=True)
            break


def _join_products(graph: ir.Graph) -> None:
    groups: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.op_type == "MatMul" and node.inputs[0] is not None and _weight(node) is not None:
            groups[node.inputs[0]].append(node)
    for source, nodes in groups.items():
        if len(nodes) > 1:
            _join(graph, source, nodes)


def _weight(node: ir.Node) -> ir.Value | None:
    """The constant of a product ``[inner, outer]``, if nothing else reads it."""
    value = node.inputs[1]
    if value is None or value.const_value is None or not value.is_initializer() or len(value.uses()) > 1:
        return None
    return value if len(value.const_value.shape) == 2 else None


def _join(graph: ir.Graph, source: ir.Value, nodes: list[ir.Node]) -> None:
    """One product for all, in the place of the first."""
    weights = [weight for node in nodes if (weight := _weight(node)) is not None]
    tensors = [weight.const_value for weight in weights if weight.const_value is not None]
    name = "+".join(str(weight.name) for weight in weights)
    widths = [int(tensor.shape[1]) for tensor in tensors]
    whole = ir.Shape([tensors[0].shape[0], sum(widths)])

    def together() -> ir.TensorProtocol:
        # when it is written, so that no second copy of the weights is held
        return ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors], 1))

    joined = ir.Value(name=name, const_value=ir.LazyTensor(together, dtype=tensors[0].dtype, shape=whole, name=name))
    sizes = ir.Value(name=f"{name}.sizes", const_value=ir.tensor(np.array(widths, np.int64)))
    graph.register_initializer(joined)
    graph.register_initializer(sizes)
    first = nodes[0]
    product = ir.node("MatMul", [source, joined], name=f"{first.name}+")
    product.outputs[0].name = f"{first.outputs[0].name}+"
    made = [product.outputs[0], sizes]
    split = ir.node("Split", made, {"axis": -1}, num_outputs=len(nodes), name=f"{first.name}.split")
    for node in (product, split):
        node.metadata_props.update(first.metadata_props)
    graph.insert_before(first, [product, split])
    for node, weight, output in zip(nodes, weights, split.outputs, strict=True):
        stand_in(output, node.outputs[0])
        graph.remove(node, safe=True)
        del graph.initializers[str(weight.name)]


def _drop_unused_outputs(node: ir.Node) -> None:
    """Leave out the last outputs of a node that nothing reads: mean and deviation of a norm, which engines refuse."""
    used = [number for number, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()]
    node.resize_outputs(max([0, *used]) + 1)


def stand_in(new: ir.Value, old: ir.Value) -> None:
    """Give a value the name and the uses of another."""
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
