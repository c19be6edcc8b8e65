"""One form for what models write in many: no-ops go, repeated work is shared, attention is one op."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from optpass.emit import Emitter, Traced
from optpass.program import Stage, op_name

aten = torch.ops.aten


def canonical(stage: Stage) -> GraphModule:
    """The stage's graph with no-ops removed, attention raised to one op, and common subexpressions shared."""
    graph = Graph()
    seen: dict[Any, Node] = {}
    new: dict[Node, Node] = {}
    for node in stage.module.graph.nodes:
        if node.op == "output":
            graph.output(map_arg(node.args[0], new.__getitem__))
            break
        kept = _same_as(node)
        if kept is not None:
            new[node] = new[kept]
            continue
        if op_name(node) == "_assert_tensor_metadata":
            continue
        copy = graph.node_copy(node, new.__getitem__)
        if node.op == "call_function":
            copy.target = FUNCTIONAL.get(copy.target, copy.target)  # type: ignore[arg-type]
        key = _key(copy)
        if key is not None and key in seen:
            graph.erase_node(copy)
            copy = seen[key]
        elif key is not None:
            seen[key] = copy
        new[node] = copy
    for pattern in PATTERNS:
        for node in list(graph.nodes):
            pattern(graph, node)
    graph.eliminate_dead_code()
    return GraphModule(stage.module, graph)


FUNCTIONAL: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.div_.Tensor: aten.div.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
}
"""Ops that become another of the same meaning: views need strides that a rewrite may change."""


def _same_as(node: Node) -> Node | None:
    """The input that a no-op returns unchanged, if the node is one."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    a, b = source.meta.get("val"), node.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return None
    name = op_name(node)
    if name in ("alias", "contiguous", "clone", "detach", "lift_fresh_copy"):
        return source
    if name == "dropout" and not (node.args[1] and node.args[2]):
        return source
    if name in ("to", "_to_copy", "type_as") and a.dtype == b.dtype and a.device == b.device:
        return source
    shapes = [getattr(s, "node", s) for s in a.shape], [getattr(s, "node", s) for s in b.shape]
    if name == "expand" and all(isinstance(s, int) for s in (*a.shape, *b.shape)) and shapes[0] == shapes[1]:
        return source
    return None


def _key(node: Node) -> Any:
    """Equal for nodes that compute the same; None where that must not be assumed."""
    if node.op == "get_attr":
        return ("get_attr", node.target)
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:
            return None
    elif node.target is not operator.getitem:
        return None
    return (node.target, repr(node.args), repr(sorted(node.kwargs.items(), key=lambda item: item[0])))


def _inverse_order(graph: Graph, node: Node) -> None:
    """``empty.index_put([order], arange)`` inverts an order: sorting the order does the same without a scatter."""
    if op_name(node) not in ("index_put", "index_put_") or op_name(node.args[0]) != "empty_like":  # type: ignore[arg-type]
        return
    places, values = node.args[1], node.args[2]
    if len(places) != 1 or op_name(values) != "arange" or node.args[0].args[0] is not places[0]:  # type: ignore[arg-type, union-attr]
        return
    _replace(graph, node, lambda order: aten.argsort.default(order), places[0])  # type: ignore[index]


PRODUCTS = ("matmul", "bmm", "baddbmm")


def _raise_attention(graph: Graph, node: Node) -> None:
    """``softmax(scale * q @ k.T + mask) @ v`` to ``scaled_dot_product_attention``."""
    if op_name(node) not in ("softmax", "_softmax") or node.args[1] not in (-1, node.meta["val"].dim() - 1):
        return
    after = _only_user(node)
    while after is not None and op_name(after) in ("to", "_to_copy", "reshape") and _keeps_last(after):
        after = _only_user(after)
    if after is None or op_name(after) not in ("matmul", "bmm") or not _derives(after.args[0], node):
        return
    value = after.args[1]
    scale, masks, at = 1.0, [], node.args[0]
    while isinstance(at, Node) and op_name(at) not in PRODUCTS:
        name = op_name(at)
        if name in ("to", "_to_copy", "reshape") and _keeps_last(at):
            at = at.args[0]
        elif name in ("mul", "div") and isinstance(at.args[1], (int, float)) and not masks:
            scale *= at.args[1] if name == "mul" else 1 / at.args[1]
            at = at.args[0]
        elif name == "add" and not at.kwargs and isinstance(at.args[1], Node):
            side = next((i for i in (0, 1) if _is_scores(at.args[i])), None)
            if side is None:
                return
            masks.append(at.args[1 - side])
            at = at.args[side]
        else:
            return
    if not isinstance(at, Node):
        return
    query, key = at.args[-2:] if op_name(at) == "baddbmm" else at.args[:2]
    if op_name(at) == "baddbmm":
        if at.kwargs.get("beta", 1) not in (1, 1.0) and masks:
            return
        scale *= at.kwargs.get("alpha", 1)  # type: ignore[operator]
        bias = (at.args[0], at.kwargs.get("beta", 1))
    else:
        bias = None
    rank = after.meta["val"].dim()
    if any(n.meta["val"].dim() != rank for n in (query, key, value)):  # type: ignore[union-attr]
        return
    if any(len(m.meta["val"].shape) > rank and len(m.meta["val"].shape) != node.meta["val"].dim() for m in masks):
        return

    def attend(q: Any, k: Any, v: Any, *extra: Any) -> Any:
        rest = list(extra)
        mask = None
        if bias is not None:
            mask = rest.pop()
            mask = aten.mul.Tensor(mask, bias[1]) if bias[1] != 1 else mask
        ends = [q.shape[-2], k.shape[-1]]
        for m in rest:
            m = m if m.dtype == q.dtype else aten.to.dtype(m, q.dtype)
            if m.dim() != rank:
                full = node.meta["val"].shape
                lead = [s if isinstance(s, int) else m.shape[i] for i, s in enumerate(full[:-2])]
                m = aten.reshape.default(aten.expand.default(m, [*lead, *ends]), [*q.shape[:-2], *ends])
            mask = m if mask is None else aten.add.Tensor(mask, m)
        if mask is not None and mask.dim() < rank:
            mask = aten.expand.default(mask, [*q.shape[:-2], *ends])
        swapped = aten.transpose.int(k, -2, -1)
        return aten.scaled_dot_product_attention.default(q, swapped, v, mask, 0.0, False, scale=scale)

    inputs = [query, key, value, *masks] + ([bias[0]] if bias is not None else [])
    if any(len(s.meta["val"].shape) == 0 for s in masks):
        return
    _replace(graph, after, attend, *inputs)


def _is_scores(node: Any) -> bool:
    """Whether attention scores flow into an addend, rather than a mask."""
    while isinstance(node, Node) and node.args:
        if op_name(node) in PRODUCTS:
            return True
        if op_name(node) not in ("to", "_to_copy", "reshape", "mul", "div", "add"):
            return False
        node = node.args[0]
    return False


def _keeps_last(node: Node) -> bool:
    source = node.args[0]
    if op_name(node) != "reshape":
        return True
    a, b = source.meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    return len(a) >= 2 and len(b) >= 2 and all(str(x) == str(y) for x, y in zip(a[-2:], b[-2:], strict=True))


def _derives(node: Any, source: Node) -> bool:
    while isinstance(node, Node) and node is not source:
        if op_name(node) not in ("to", "_to_copy", "reshape"):
            return False
        node = node.args[0]
    return node is source


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _replace(graph: Graph, node: Node, fn: Callable[..., Any], *inputs: Node) -> None:
    emit = Emitter(graph, node.meta["val"])
    with graph.inserting_before(node), emit.on_behalf(node):
        made = fn(*(Traced(n, emit) for n in inputs))
    node.replace_all_uses_with(made.node)
    graph.erase_node(node)


PATTERNS: tuple[Callable[[Graph, Node], None], ...] = (_inverse_order, _raise_attention)
