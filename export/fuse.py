"""The ONNX graph in the form that engines fuse best: the same arithmetic in fewer nodes.

Products of one input with several weights are one product, whose result is split, where there are few rows: a single
token finds each weight too small to be shared among cores. Of many rows the split costs more, up to a twentieth.
``x * (1 / s)`` is ``x / s``, the form in which ONNX Runtime knows the norm of Llama.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir

FEW = 64
"""Rows up to which products are joined."""


def fuse(model: ir.Model, rows: int = 1) -> None:
    """Rewrite a model in place, branches as well; what is joined is of one graph, so that nothing runs for nothing.

    Args:
        model: changed.
        rows: that products are typically of, such as tokens.
    """
    for graph in (model.graph, *model.graph.subgraphs()):
        _divide(graph)
    if rows <= FEW:
        _join_products(model.graph)


def _divide(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type != "Mul":
            continue
        for place, value in enumerate(node.inputs):
            maker = value.producer() if value is not None else None
            other = node.inputs[1 - place]
            if maker is None or maker.op_type != "Reciprocal" or other is None or maker.graph is not graph:
                continue
            made = ir.node("Div", [other, maker.inputs[0]], name=node.name)
            made.metadata_props.update(node.metadata_props)
            graph.insert_before(node, made)
            stand_in(made.outputs[0], node.outputs[0])
            graph.remove(node, safe=True)
            if not maker.outputs[0].uses() and not maker.outputs[0].is_graph_output():
                graph.remove(maker, safe=True)
            break


Place = tuple[ir.Graph | None, ir.Value | None]
"""A graph, and the value that products in it are of."""


def _join_products(graph: ir.Graph) -> None:
    # two branches may read the same weights: these are joined if they are read together wherever they are read
    together: dict[frozenset[Place], dict[ir.Value, dict[Place, ir.Node]]] = defaultdict(dict)
    order: dict[ir.Node, int] = {}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        order[node] = len(order)
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        products = _products(weight) if weight is not None else {}
        if weight is not None and products:
            together[frozenset(products)][weight] = products
    for weights in together.values():
        if len(weights) > 1:
            _join(graph, weights, order)


def _products(weight: ir.Value) -> dict[Place, ir.Node]:
    """The products with a weight ``[inner, outer]`` by their places; none if anything else reads it."""
    if weight.const_value is None or not weight.is_initializer() or len(weight.const_value.shape) != 2:
        return {}
    uses = weight.uses()
    found = {(use.node.graph, use.node.inputs[0]): use.node for use in uses if use.node.op_type == "MatMul"}
    alone = len(found) == len(uses) and all(use.idx == 1 for use in uses) and not weight.is_graph_output()
    return found if alone else {}


def _join(graph: ir.Graph, weights: dict[ir.Value, dict[Place, ir.Node]], order: dict[ir.Node, int]) -> None:
    """One product for all at each place, where the first was."""
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
    for place in next(iter(weights.values())):
        nodes = [products[place] for products in weights.values()]
        _join_at(min(nodes, key=order.__getitem__), nodes, joined, sizes)
    for weight in weights:
        del graph.initializers[str(weight.name)]


def _join_at(first: ir.Node, nodes: list[ir.Node], joined: ir.Value, sizes: ir.Value) -> None:
    graph = first.graph
    assert graph is not None
    product = ir.node("MatMul", [first.inputs[0], joined], name=f"{first.name}+")
    product.outputs[0].name = f"{first.outputs[0].name}+"
    made = [product.outputs[0], sizes]
    split = ir.node("Split", made, {"axis": -1}, num_outputs=len(nodes), name=f"{first.name}.split")
    for node in (product, split):
        node.metadata_props.update(first.metadata_props)
    graph.insert_before(first, [product, split])
    for node, output in zip(nodes, split.outputs, strict=True):
        stand_in(output, node.outputs[0])
        graph.remove(node, safe=True)


def stand_in(new: ir.Value, old: ir.Value) -> None:
    """Give a value the name and the uses of another."""
    new.name, new.type, new.shape = old.name, old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
