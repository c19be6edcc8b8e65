"""The branches of a ``torch.cond``: graphs inside of a graph, which read values of it through their operands.

``If`` of ONNX runs one of two graphs that see the values around them, so that operands vanish in the translation. What
a rewrite must know of an operand, such as whether it is a mask that masks nothing, it asks of the value itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node

from optpass.errors import OptpassError, Place
from optpass.program import place_of

COND = torch.ops.higher_order.cond

OUTSIDE = "outside"
"""Key of the meta of a placeholder under which the operand is found that it stands for."""


def copied(module: GraphModule) -> GraphModule:
    """A copy, with copies of the branches in it, whose nodes have the names that the signature of a program knows."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for old, new in zip(module.graph.nodes, graph.nodes, strict=True):
        new.name = old.name  # the copy evades the names of builtins, such as input
        new.meta = dict(old.meta)
    made = GraphModule(module, graph)
    for name, inner in list(made._modules.items()):
        if isinstance(inner, GraphModule):
            setattr(made, name, copied(inner))
    return made


def modules(module: GraphModule) -> list[GraphModule]:
    """A module and the branches in it, each before those that are in it."""
    return [inner for inner in module.modules() if isinstance(inner, GraphModule)]


def nodes(module: GraphModule) -> Iterator[Node]:
    """The nodes of a module and of the branches in it."""
    for inner in modules(module):
        yield from inner.graph.nodes


def place(module: GraphModule, node: Node) -> Place:
    """Where in the user's model a node comes from; for one in a branch, of which less is known, where its ``cond``."""
    lines = str(node.meta.get("stack_trace") or "").splitlines()
    node.meta["stack_trace"] = "\n".join(line for line in lines if not line.strip().startswith(GENERATED))
    found = place_of(node)
    conds = [cond for cond in nodes(module) if cond.target is COND]
    around = next((cond for cond in conds if any(node.graph is inner.graph for inner in branches(cond))), None)
    if around is None or (found.module and found.line):
        return found
    outer = place(module, around)
    return Place(found.module or outer.module, found.op, found.line or outer.line)


GENERATED = 'File "<'
"""How a line of a stack begins that stands in code that torch wrote itself."""


def branches(node: Node) -> list[GraphModule]:
    """What a ``cond`` chooses from, first what it does where the predicate is true."""
    owner = node.graph.owning_module
    assert owner is not None
    return [owner.get_submodule(str(branch.target)) for branch in node.args[1:3]]  # type: ignore[union-attr, misc]


def _placeholders(branch: GraphModule) -> list[Node]:
    return [node for node in branch.graph.nodes if node.op == "placeholder"]


def enter(node: Node) -> list[Graph]:
    """The graphs of a ``cond``, whose placeholders know from now on what they stand for."""
    operands: Any = node.args[3]
    for branch in branches(node):
        for placeholder, operand in zip(_placeholders(branch), operands, strict=True):
            if isinstance(operand, Node):
                placeholder.meta[OUTSIDE] = operand
    return [branch.graph for branch in branches(node)]


def origin(node: Node) -> Node:
    """The value that a placeholder of a branch stands for, in the graph where it is made; another node is itself."""
    while OUTSIDE in node.meta:
        node = node.meta[OUTSIDE]
    return node


def make_retraceable(module: GraphModule) -> None:
    """Clone what branches give back: torch refuses views of operands when it traces them again.

    Raises:
        OptpassError: a branch holds a constant of its own, which torch cannot trace again.
    """
    for _, node in _constants(module):
        what = "a branch of torch.cond holds a constant, and ops that have to be taken apart"
        raise OptpassError("not-lowered", what, HAND_IN, place(module, next(iter(node.users))))
    for inner in modules(module)[1:]:
        end = inner.graph.output_node()
        with inner.graph.inserting_before(end):
            end.args = torch.fx.node.map_arg(end.args, lambda value: _cloned(value))


def _cloned(value: Node) -> Node:
    made = value.graph.call_function(torch.ops.aten.clone.default, (value,))
    made.meta = dict(value.meta)
    return made


def keep_constants(module: GraphModule) -> None:
    """Let constants that branches hold themselves have their values, of which the tracer notes the shapes alone.

    Raises:
        OptpassError: torch.export has lost the values.
    """
    for inner, node in _constants(module):
        value = getattr(inner, str(node.target))
        if isinstance(value, FakeTensor):
            what = "a branch of torch.cond holds a weight, and torch.export has kept its shape alone"
            raise OptpassError("not-lowered", what, HAND_IN, place(module, next(iter(node.users))))
        node.meta["val"] = value


HAND_IN = "let the module around hold it, and hand it in as an operand"


def _constants(module: GraphModule) -> Iterator[tuple[GraphModule, Node]]:
    for inner in modules(module)[1:]:
        for node in inner.graph.find_nodes(op="get_attr"):
            if isinstance(getattr(inner, str(node.target)), torch.Tensor):
                yield inner, node


def drop_unread_operands(node: Node) -> None:
    """Take from a ``cond`` the operands that neither branch reads, so that nothing computes them."""
    operands: Any = node.args[3]
    kept = []
    for operand, *inside in zip(operands, *map(_placeholders, branches(node)), strict=True):
        if any(placeholder.users for placeholder in inside):
            kept.append(operand)
            continue
        for placeholder in inside:
            placeholder.graph.erase_node(placeholder)
    node.args = (*node.args[:3], tuple(kept))


def close(function: ir.Function) -> None:
    """Let each output of a branch be made by a node of its own, which the outputs of a subgraph have to be."""
    for index, value in enumerate(list(function.outputs)):
        if value.producer() is None or value in list(function.outputs)[:index]:
            made = ir.node("Identity", [value], name=f"node_{value.name}.{index}")
            made.outputs[0].name, made.outputs[0].type = f"{value.name}.{index}", value.type
            function.append(made)
            function.outputs[index] = made.outputs[0]
