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
            copy.target = FUNCTIONAL.get(copy.target, copy.target)
        key = _key(copy)
        if key is not None and key in seen:
            graph.erase_node(copy)
            copy = seen[key]
        elif key is not None:
            seen[key] = copy
        new[node] = copy
    module = GraphModule(stage.module, graph)
    for pattern in PATTERNS:
        for node in list(graph.nodes):
            if node.op == "call_function" and not node._erased:
                pattern(graph, node)
    graph.eliminate_dead_code()
    module.recompile()
    return module


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
    if op_name(node) not in ("index_put", "index_put_"):
        return
    into: Any = node.args[0]
    places: Any = node.args[1]
    values: Any = node.args[2]
    if op_name(into) == "empty_like" and op_name(values) == "arange" and list(places) == [into.args[0]]:
        _replace(graph, node, lambda order: aten.argsort.default(order), places[0])


PRODUCTS = ("matmul", "bmm", "baddbmm")
SOFTMAX = ("softmax", "_softmax", "_safe_softmax")
RESHAPED = ("to", "_to_copy", "type_as", "reshape")
UNSEEN = -1e9
"""A score at or below this vanishes in a softmax, whatever is added to it."""


def _shift_free(graph: Graph, node: Node) -> None:
    """``softmax(x - m)`` is ``softmax(x)`` where ``m`` is one value a row, such as the maximum."""
    shifted = node.args[0] if op_name(node) in SOFTMAX else None
    if not isinstance(shifted, Node) or op_name(shifted) != "sub" or shifted.kwargs:
        return
    x, shift = shifted.args[:2]
    dim = node.args[1]
    if not isinstance(x, Node) or not isinstance(shift, Node) or not isinstance(dim, int):
        return
    ranks = {n.meta["val"].dim() for n in (x, shift, shifted)}
    if len(ranks) == 1 and str(shift.meta["val"].shape[dim]) == "1":
        node.update_arg(0, x)


def _written_softmax(graph: Graph, node: Node) -> None:
    """``exp(x) / exp(x).sum(dim)`` to ``softmax(x, dim)``."""
    if op_name(node) != "div" or len(node.args) != 2 or node.kwargs:
        return
    above, total = node.args
    if not isinstance(above, Node) or not isinstance(total, Node) or op_name(above) != "exp" or op_name(total) != "sum":
        return
    dims = total.args[1] if len(total.args) > 1 else None
    kept = len(total.args) > 2 and total.args[2]
    if total.args[0] is above and kept and isinstance(dims, (list, tuple)) and len(dims) == 1:
        made = _replace(graph, node, lambda x: aten.softmax.int(x, dims[0]), above.args[0])  # type: ignore[arg-type]
        _shift_free(graph, made)


def _einsum_product(graph: Graph, node: Node) -> None:
    """An einsum of two tensors that is a batched matrix product, as ``matmul``."""
    if op_name(node) != "einsum" or len(node.args[1]) != 2:  # type: ignore[arg-type]
        return
    terms = str(node.args[0]).replace(" ", "").replace("->", ",").split(",")
    if len(terms) != 3 or any(not term.isalpha() or len(set(term)) < len(term) for term in terms):
        return
    left, right, out = terms
    batch = [c for c in out if c in left and c in right]
    rows, columns = ([c for c in term if c in out and c not in batch] for term in (left, right))
    inner = [c for c in left if c in right and c not in out]
    if [len(rows), len(columns), len(inner)] != [1, 1, 1] or not len(left) == len(right) == len(batch) + 2:
        return
    made = [*batch, *rows, *columns]

    def product(x: Any, y: Any) -> Any:
        x = _permuted(x, [left.index(c) for c in (*batch, *rows, *inner)])
        y = _permuted(y, [right.index(c) for c in (*batch, *inner, *columns)])
        return _permuted(aten.matmul.default(x, y), [made.index(c) for c in out])

    _replace(graph, node, product, *node.args[1])  # type: ignore[misc]


def _permuted(x: Any, order: list[int]) -> Any:
    ascending = list(range(len(order)))
    if order == ascending:
        return x
    return aten.permute.default(x, order)


def _additive_mask(graph: Graph, node: Node) -> None:
    """Scores that a mask replaces by a very negative number: the number is added to them instead."""
    if op_name(node) == "masked_fill":
        scores, mask, value = node.args[:3]
    elif op_name(node) == "where" and len(node.args) == 3:
        mask, scores, value = node.args
    else:
        return
    number = _number(graph, value)
    if number is None or number > UNSEEN or not isinstance(mask, Node) or not isinstance(scores, Node):
        return
    dtype = node.meta["val"].dtype
    if product_above(scores) is None or not _same_shape(scores, node) or scores.meta["val"].dtype != dtype:
        return

    def add(x: Any, m: Any) -> Any:
        hidden = m if op_name(node) == "masked_fill" else aten.logical_not.default(m)
        zero = aten.mul.Tensor(aten.to.dtype(hidden, dtype), 0.0)
        return aten.add.Tensor(x, aten.masked_fill.Scalar(zero, hidden, number))

    _replace(graph, node, add, scores, mask)


def _number(graph: Graph, value: Any) -> float | None:
    """A Python number, or the value of a constant of one element."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Node) and value.op == "get_attr" and value.meta["val"].dim() == 0 and graph.owning_module:
        return float(operator.attrgetter(str(value.target))(graph.owning_module))
    return None


def _raise_attention(graph: Graph, node: Node) -> None:
    """``softmax(scale * q @ k.T + mask) @ v`` to ``scaled_dot_product_attention``."""
    if op_name(node) not in SOFTMAX or node.args[1] not in (-1, node.meta["val"].dim() - 1):
        return
    after = _only_user(node)
    while after is not None and op_name(after) in RESHAPED and _keeps_last(after):
        after = _only_user(after)
    if after is None or op_name(after) not in ("matmul", "bmm") or not _derives(after.args[0], node):
        return
    value: Any = after.args[1]
    # upwards from the softmax: what multiplies the product, and the masks with what multiplies them
    scale: Any = 1.0
    factor: Any = None
    at: Any = node.args[0]
    masks: list[tuple[Node, float, Node]] = []
    while isinstance(at, Node) and op_name(at) not in PRODUCTS:
        name = op_name(at)
        if name in RESHAPED and _keeps_last(at):
            at = at.args[0]
        elif name in ("mul", "div") and isinstance(at.args[1], (int, float)):
            scale *= at.args[1] if name == "mul" else 1 / at.args[1]
            at = at.args[0]
        elif name == "mul" and factor is None and all(isinstance(x, Node) for x in at.args):
            first = product_above(at.args[0]) is not None
            at, factor = at.args if first else reversed(at.args)
            if any(str(s) != "1" for s in factor.meta["val"].shape[-2:]):
                return
        elif name == "add" and not at.kwargs and all(isinstance(x, Node) for x in at.args) and factor is None:
            side = next(
                (i for i in (0, 1) if product_above(at.args[i]) is not None and _same_shape(at.args[i], at)), None
            )
            if side is None or at.args[1 - side].meta["val"].dim() < 2:  # type: ignore[union-attr]
                return
            masks.append((at.args[1 - side], scale, at))  # type: ignore[arg-type]
            at = at.args[side]
        else:
            return
    if not isinstance(at, Node):
        return
    query, key = at.args[-2:] if op_name(at) == "baddbmm" else at.args[:2]
    bias = None
    if op_name(at) == "baddbmm":
        if isinstance(at.args[0], Node) and at.kwargs.get("beta", 1):
            bias = (at.args[0], scale * at.kwargs.get("beta", 1))
        scale *= at.kwargs.get("alpha", 1)
    rank = after.meta["val"].dim()
    if any(n.meta["val"].dim() != rank for n in (query, key, value)):  # type: ignore[union-attr]
        return
    if factor is not None and factor.meta["val"].dim() > rank:
        return
    if bias is not None:
        masks.append((*bias, at))

    def attend(q: Any, k: Any, v: Any, *extra: Any) -> Any:
        ends = [q.shape[-2], k.shape[-1]]
        mask = None
        for m, (_, times, place) in zip(extra, masks, strict=False):
            m = m if m.dtype == q.dtype else aten.to.dtype(m, q.dtype)
            m = m if times == 1 else aten.mul.Tensor(m, times)
            full = place.meta["val"].shape
            if len(full) != rank:
                for _ in range(len(full) - m.dim()):
                    m = aten.unsqueeze.default(m, 0)
                lead = [s if isinstance(s, int) else m.shape[i] for i, s in enumerate(full[:-2])]
                m = aten.reshape.default(aten.expand.default(m, [*lead, *ends]), [*q.shape[:-2], *ends])
            mask = m if mask is None else aten.add.Tensor(mask, m)
        if mask is not None and mask.dim() < rank:
            mask = aten.expand.default(mask, [*q.shape[:-2], *ends])
        if factor is not None:
            q = aten.mul.Tensor(q, extra[-1])
        swapped = aten.transpose.int(k, -2, -1)
        return aten.scaled_dot_product_attention.default(q, swapped, v, mask, 0.0, False, scale=scale)

    inputs = [query, key, value, *(mask for mask, _, _ in masks)] + ([factor] if factor is not None else [])
    _replace(graph, after, attend, *inputs)


def product_above(node: Any) -> Node | None:
    """The matrix product that scores ``[..., rows, columns]`` come from, elementwise and without moving them."""
    queue: list[Any] = [node]
    seen: set[Node] = set()
    while queue and len(seen) < 40:
        at = queue.pop(0)
        if not isinstance(at, Node) or at in seen or not isinstance(at.meta.get("val"), torch.Tensor):
            continue
        seen.add(at)
        name = op_name(at) if at.op == "call_function" else ""
        if name in PRODUCTS:
            return at
        elementwise = isinstance(at.target, torch._ops.OpOverload) and torch.Tag.pointwise in at.target.tags
        if elementwise or name in (*RESHAPED, "masked_fill", "where"):
            queue += [source for source in at.all_input_nodes if _same_end(source, at)]
        elif name == "cat" and at.args[-1] in (-1, at.meta["val"].dim() - 1):
            queue += at.all_input_nodes
    return None


def _same_end(a: Node, b: Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor) or x.dim() < 2 or y.dim() < 2:
        return False
    return all(str(s) == str(t) for s, t in zip(x.shape[-2:], y.shape[-2:], strict=True))


def _same_shape(a: Any, b: Node) -> bool:
    return [str(s) for s in a.meta["val"].shape] == [str(s) for s in b.meta["val"].shape]


def _keeps_last(node: Node) -> bool:
    return op_name(node) != "reshape" or _same_end(node.args[0], node)  # type: ignore[arg-type]


def _derives(node: Any, source: Node) -> bool:
    while isinstance(node, Node) and node is not source:
        if op_name(node) not in RESHAPED:
            return False
        node = node.args[0]
    return node is source


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _replace(graph: Graph, node: Node, fn: Callable[..., Any], *inputs: Node) -> Node:
    emit = Emitter(graph, node.meta["val"])
    with graph.inserting_before(node), emit.on_behalf(node):
        made = fn(*(Traced(n, emit) for n in inputs))
    node.replace_all_uses_with(made.node)
    graph.erase_node(node)
    return made.node  # type: ignore[no-any-return]


PATTERNS: tuple[Callable[[Graph, Node], None], ...] = (
    _inverse_order,
    _written_softmax,
    _shift_free,
    _einsum_product,
    _additive_mask,
    _raise_attention,
)
