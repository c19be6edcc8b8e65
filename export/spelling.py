"""Nodes of the aten graph, in ops and arguments that have a translation to ONNX and a kernel in engines.

Each function looks at one node or one graph; in which order they come is the business of ``translate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from optpass.export import branches
from optpass.program import op_name

aten = torch.ops.aten

CASTS = ("to", "type_as", "_to_copy")
LOGIC = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
}


def spell_out(graph: Graph) -> None:
    """Ops that are another under a second name, so that they alone do not call for decomposition."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        node.target = LOGIC.get(node.target, node.target)
        if node.target is aten.diff.default and isinstance(node.args[0], Node):
            _spell_out_diff(graph, node)
        elif node.target is aten.sort.stable:
            # the lower index comes first where values are equal, in ONNX as well
            given = {"dim": -1, "descending": False, **node.kwargs}
            node.target, node.args, node.kwargs = (
                aten.sort.default,
                (node.args[0], given["dim"], given["descending"]),
                {},
            )
        elif node.target is aten.square.default:
            node.target, node.args = aten.mul.Tensor, (node.args[0], node.args[0])
        elif node.target in PARTING:
            _spell_out_parts(node)
        elif node.target is aten.masked_fill.Scalar and node.meta["val"].dtype == torch.bool:
            _spell_out_fill(graph, node)
        elif node.target is aten.movedim.int:
            node.target, node.args = aten.permute.default, (node.args[0], _moved(*node.args))
        elif node.target is aten.scaled_dot_product_attention.default and node.meta["val"].dim() == 3:
            _with_leading_axis(graph, node)
        elif op_name(node) in CASTS and node.target is not aten._to_copy.default:
            node.args, node.kwargs = node.args[:1], {"dtype": node.meta["val"].dtype}
            node.target = aten._to_copy.default


PARTING = (aten.chunk.default, aten.split.Tensor)
"""Ops that give several parts, of which torch's translation makes a sequence, inside of a branch at least."""


def _spell_out_parts(node: Node) -> None:
    axis: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    lengths = [part.shape[axis] for part in node.meta["val"]]
    if all(isinstance(length, int) for length in lengths):
        node.target, node.args, node.kwargs = aten.split_with_sizes.default, (node.args[0], lengths, axis), {}


def _spell_out_fill(graph: Graph, node: Node) -> None:
    """Truth values where a mask says so, by logic: engines choose among numbers alone."""
    source, mask, value = node.args
    with graph.inserting_before(node):
        if value:
            made = call(graph, aten.logical_or.default, source, mask)
        else:
            made = call(graph, aten.logical_and.default, source, call(graph, aten.logical_not.default, mask))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _with_leading_axis(graph: Graph, node: Node) -> None:
    """Attention on ``[batch * heads, tokens, head_dim]`` as one on a batch of one with as many heads."""
    query, key, value, *rest = node.args
    mask = rest[0] if rest else node.kwargs.get("attn_mask")
    with graph.inserting_before(node):
        lifted = [call(graph, aten.unsqueeze.default, n, 0) for n in (query, key, value)]
        if isinstance(mask, Node) and mask.meta["val"].dim() == 3:
            mask = call(graph, aten.unsqueeze.default, mask, 0)
        kwargs = {name: given for name, given in node.kwargs.items() if name != "attn_mask"}
        made = graph.call_function(node.target, (*lifted, mask, *rest[1:]), kwargs)  # type: ignore[arg-type]
        made.meta = {**node.meta, "val": node.meta["val"].unsqueeze(0)}
        back = call(graph, aten.squeeze.dim, made, 0)
        back.meta = dict(node.meta)
    node.replace_all_uses_with(back)
    graph.erase_node(node)


def _moved(value: Node, source: int, target: int) -> list[int]:
    """The order of dimensions when one of them has moved."""
    rank = value.meta["val"].dim()
    order = [dim for dim in range(rank) if dim != source % rank]
    order.insert(target % rank, source % rank)
    return order


def _spell_out_diff(graph: Graph, node: Node) -> None:
    """Differences of neighbours, as two slices."""
    names = ("self", "n", "dim", "prepend", "append")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    source, order, axis = given["self"], given.get("n", 1), given.get("dim", -1)
    before, after = given.get("prepend"), given.get("append")
    if order != 1 or node.meta["val"].dtype == torch.bool:
        return
    with graph.inserting_before(node):
        parts = [part for part in (before, source, after) if part is not None]
        whole = call(graph, aten.cat.default, parts, axis) if len(parts) > 1 else parts[0]
        left = call(graph, aten.slice.Tensor, whole, axis, 0, -1)
        right = call(graph, aten.slice.Tensor, whole, axis, 1, END)
        made = call(graph, aten.sub.Tensor, right, left)
        made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


END = 2**63 - 1


# What changes nothing

NO_OPS = ("dropout", "alias", "contiguous", "clone", "detach", "lift_fresh_copy", "detach_")


def skip_no_ops(graph: Graph) -> None:
    """Drop nodes whose result is what they are given."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
            continue
        drops = op_name(node) == "dropout" and node.args[2]
        if (op_name(node) in NO_OPS and not drops) or _changes_nothing(node, node.args[0]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _changes_nothing(node: Node, source: Node) -> bool:
    if node.target not in RESHAPES and op_name(node) not in ("squeeze", "expand", "to", "_to_copy", "type_as"):
        return False
    old, new = source.meta["val"], node.meta["val"]
    return old.dtype == new.dtype and str(list(old.shape)) == str(list(new.shape))


# Numbers and types

SUMS = ("cumsum", "sum", "prod", "cumprod", "mean")
"""Reductions that widen booleans and integers, which ONNX does not."""

KEEPS_DTYPES = ("where", "to", "_to_copy", "masked_fill", "clamp", "clone", "copy")


def mixes_dtypes(node: Node) -> bool:
    """Whether a pointwise op relies on type promotion, which ONNX does not have."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.pointwise not in node.target.tags and op_name(node) not in SUMS:
        return False
    made = node.meta.get("val")
    tensors = [arg.meta.get("val") for arg in node.args if isinstance(arg, Node)]
    dtypes = {value.dtype for value in tensors if isinstance(value, torch.Tensor)}
    if op_name(node) == "where":
        dtypes -= {torch.bool}
    if len(dtypes) > 1:
        return True
    if op_name(node) in KEEPS_DTYPES or not isinstance(made, torch.Tensor):
        return False
    if made.dtype is torch.bool:
        numbers = [arg.meta.get("val") if isinstance(arg, Node) else arg for arg in node.args]
        floats = any(isinstance(number, float | torch.SymFloat) for number in numbers)
        return floats and not any(dtype.is_floating_point for dtype in dtypes)
    return bool(dtypes) and made.dtype not in dtypes


UNTAGGED = ("where", "floor_divide")
"""Pointwise ops that torch does not tag so."""

WITH_TENSORS = {"Scalar": "Tensor", "Tensor_Scalar": "Tensor_Tensor"}
"""The overload that takes a tensor in the place of a number."""


def type_numbers(graph: Graph) -> None:
    """Give numbers the type of the tensors that they meet: ONNX promotes none, and a size there is an int64."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        pointwise = torch.Tag.pointwise in node.target.tags and op_name(node) not in KEEPS_DTYPES
        if not isinstance(node.meta.get("val"), torch.Tensor) or not (pointwise or op_name(node) in UNTAGGED):
            continue
        operands = [str(argument.type) in ("Tensor", "number") for argument in node.target._schema.arguments]
        given = zip(node.args, operands, strict=False)
        node.args = tuple(_typed(node, arg) if operand else arg for arg, operand in given)


def _typed(node: Node, number: Any) -> Any:
    """An operand in the type that the node computes in, where it is a number."""
    wanted: torch.dtype = node.meta["val"].dtype
    if wanted is torch.bool:
        values = [source.meta["val"] for source in node.all_input_nodes]
        # numbers are compared in the type of the tensor
        wanted = next(value.dtype for value in values if isinstance(value, torch.Tensor))
    if isinstance(number, Node) and isinstance(number.meta["val"], torch.SymInt | torch.SymFloat):
        with node.graph.inserting_before(node):
            made = node.graph.call_function(aten.scalar_tensor.default, (number,), {"dtype": wanted})
        made.meta = {**node.meta, "val": torch.empty((), dtype=wanted)}
        assert isinstance(node.target, torch._ops.OpOverload)
        overload = WITH_TENSORS.get(node.target._overloadname, "")
        if overload in node.target.overloadpacket.overloads():
            node.target = getattr(node.target.overloadpacket, overload)
        return made
    # torch's translations know the type of a number only where it stands behind a tensor; squares are known by their 2
    return float(number) if type(number) is int and wanted.is_floating_point and op_name(node) != "pow" else number


# Reshape


def reshape(value: Any, sizes: Sequence[int]) -> Any:
    """Target of a reshape by constants: 0 keeps the size at that place, -1 is what is left."""
    raise NotImplementedError


RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)


def reshape_by_constants(node: Node) -> None:
    """Write sizes as constants, so that engines see the layout and no arithmetic on shapes is left."""
    source = node.args[0]
    assert isinstance(source, Node)
    sizes = _sizes(source.meta["val"].shape, node.meta["val"].shape)
    if sizes is None:
        return
    node.target, node.args, node.kwargs = reshape, (source, sizes), {}


def _sizes(old: Sequence[Any], new: Sequence[Any]) -> list[int] | None:
    sizes = [
        size if isinstance(size, int) else 0 if axis < len(old) and str(old[axis]) == str(size) else -1
        for axis, size in enumerate(new)
    ]
    static_zero = any(isinstance(size, int) and size == 0 for size in new)
    return None if static_zero or sizes.count(-1) > 1 else sizes


# Rows of each sample


def rows_of(value: Any, rows: Any) -> Any:
    """Target of ``value[arange(batch)[:, None], rows]``: ``[batch, tokens, ...]`` and ``[batch, kept]``."""
    raise NotImplementedError


def gather_rows(node: Node) -> None:
    """Gather the tokens of each sample by whole rows, without the pairs of indices that a general index needs."""
    value, indices = node.args[0], node.args[1]
    if not isinstance(value, Node) or not isinstance(indices, list | tuple) or len(indices) != 2:
        return
    batch, rows = indices
    if not isinstance(batch, Node) or not isinstance(rows, Node) or rows.meta["val"].dtype != torch.int64:
        return
    size, of = value.meta["val"].shape[0], rows.meta["val"].shape
    if len(of) != 2 or str(of[0]) != str(size) or not _counts_up_a_column(batch, size):
        return
    node.target, node.args = rows_of, (value, rows)


def _counts_up_a_column(node: Node, size: Any) -> bool:
    """Whether a node is ``arange(size)[:, None]``."""
    shape = node.meta["val"].shape
    if len(shape) != 2 or shape[1] != 1 or str(shape[0]) != str(size):
        return False
    node = branches.origin(node)
    while node.target in (aten.unsqueeze.default, reshape, *RESHAPES):
        node = branches.origin(node.args[0])  # type: ignore[arg-type]
    if node.op != "call_function" or op_name(node) != "arange" or node.meta["val"].dtype != torch.int64:
        return False
    start, step = {1: (0, 1), 2: (node.args[0], 1), 3: (node.args[0], node.args[-1])}[len(node.args)]
    return isinstance(start, int) and isinstance(step, int) and (start, step) == (0, 1)


# Counts


def count_of(mask: Any, axes: Sequence[int], keep: bool) -> Any:
    """Target of an integer sum over a boolean mask."""
    raise NotImplementedError


WIDENS = ("_to_copy", "prims.convert_element_type")


def count(node: Node) -> None:
    """Count in float32, which is exact up to 16 million: OpenVINO 2026.4 gets a sum of integers wrong.

    It does where a subtraction follows and more than a hundred rows of 16 or fewer are summed.
    """
    mask = node.args[0]
    if isinstance(mask, Node) and mask.op == "call_function" and op_name(mask) in WIDENS:
        mask = mask.args[0]
    if not isinstance(mask, Node) or mask.meta["val"].dtype != torch.bool or node.meta["val"].dtype != torch.int64:
        return
    axes = node.args[1] if len(node.args) > 1 else None
    if not isinstance(axes, list | tuple) or not axes:
        return
    keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    node.target, node.args, node.kwargs = count_of, (mask, list(axes), keep), {}


def call(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A node with its fake value."""
    node = graph.call_function(target, args, kwargs)
    values = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta = {"val": target(*values[0], **values[1])}
    return node
