"""Attention on ``[batch, tokens, heads * head_dim]``, the layout in which the linear layers around it work.

As ``com.microsoft.MultiHeadAttention`` no transpose is left of it. Both ONNX Runtime and OpenVINO have it as one fused
kernel; OpenVINO takes the standard ``Attention`` of opset 23 apart.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from optpass import appending  # noqa: F401 - registers the op
from optpass.export.masks import Masks
from optpass.export.spelling import RESHAPES, reshape
from optpass.program import op_name

aten = torch.ops.aten


def attention(query: Any, key: Any, value: Any, bias: Any, heads: int, scale: float, causal: bool) -> Any:
    """Target of an attention on ``[batch, tokens, heads * head_dim]``; the bias is rank 4 or None."""
    raise NotImplementedError


LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.float16, torch.bfloat16)}
"""What attention computes in, and the lowest finite number there."""


def attend(node: Node, masks: Masks) -> None:
    """Replace an attention on ``[batch, heads, tokens, head_dim]`` by one in the layout of the linear layers."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    query, key, value = given["query"], given["key"], given["value"]
    shapes = [n.meta["val"].shape for n in (query, key, value)]
    if any(len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int) for shape in shapes):
        return
    if node.meta["val"].dtype not in LOWEST:
        return
    heads, groups = shapes[0][1], shapes[1][1]
    if len({str(shape[0]) for shape in shapes}) > 1 or heads % groups or groups != shapes[2][1]:
        return
    mask, causal = given.get("attn_mask"), bool(given.get("is_causal", False))
    square = str(shapes[0][2]) == str(shapes[1][2])
    kind = masks.kind(mask) if mask is not None else "nothing"
    if kind == "causal" and square:
        mask, causal = None, True
    elif kind == "nothing":
        mask = None
    if causal and not square:
        return
    graph = node.graph
    scale = float(shapes[0][3]) ** -0.5 if given.get("scale") is None else float(given["scale"])
    with graph.inserting_before(node):
        bias, rows = masks.bias(graph, mask, query, key) if mask is not None else (None, None)
        flat = [_flat(graph, n, heads // shape[1]) for n, shape in zip((query, key, value), shapes, strict=True)]
        made = graph.call_function(attention, (*flat, bias, heads, scale, causal))
        made.meta = {**node.meta, "val": node.meta["val"].transpose(1, 2).flatten(2)}
        if rows is not None:
            meta = made.meta
            made = graph.call_function(aten.mul.Tensor, (made, rows))
            made.meta = dict(meta)
    _stand_in(node, made, heads, shapes[2][3])


APPEND = torch.ops.optpass_step.append_attention.default


def appended(query: Any, key: Any, value: Any, *rest: Any) -> Any:
    """Target of ``append_attention`` on ``[batch, tokens, heads * head_dim]``; its last arguments count heads."""
    raise NotImplementedError


def append(node: Node) -> None:
    """Replace an attention that writes its rows in place by one in the layout of the linear layers."""
    graph = node.graph
    rows: list[Any] = list(node.args[:3])
    heads, groups = (int(n.meta["val"].shape[1]) for n in rows[:2])
    mixed, *present = node.meta["val"]
    with graph.inserting_before(node):
        flat = [_flat(graph, n, 1) for n in rows]
        made = graph.call_function(appended, (*flat, *node.args[3:], heads, groups))
        made.meta = {**node.meta, "val": (mixed.transpose(1, 2).flatten(2), *present)}
        parts = [graph.call_function(operator.getitem, (made, place)) for place in range(3)]
        for part, value in zip(parts, made.meta["val"], strict=True):
            part.meta = {**node.meta, "val": value}
    for user in list(node.users):
        place: Any = user.args[1]
        if place == 0:
            _stand_in(user, parts[0], heads, int(mixed.shape[3]))
        else:
            user.replace_all_uses_with(parts[place])


def _stand_in(node: Node, made: Node, heads: int, width: int) -> None:
    """Let ``made [batch, tokens, heads * width]`` take the place of an attention, and of the reshapes behind it."""
    graph = node.graph
    merges = [_merge_of(user) for user in node.users]
    for end in (end for ends in merges for end in ends):
        end.replace_all_uses_with(made)
    if all(merges):
        return
    with graph.inserting_before(node):
        split = graph.call_function(reshape, (made, [0, 0, heads, width]))
        split.meta = {**node.meta, "val": node.meta["val"].transpose(1, 2)}
        back = graph.call_function(aten.transpose.int, (split, 1, 2))
        back.meta = dict(node.meta)
    node.replace_all_uses_with(back)


def _merge_of(user: Node) -> list[Node]:
    """The reshapes to ``[batch, tokens, heads * head_dim]`` behind a transpose of heads and tokens; all or none."""
    if not _swaps_heads(user):
        return []
    lead = user.meta["val"].shape
    after = [n for n in user.users if op_name(n) not in ("contiguous", "clone")]
    if len(after) < len(user.users):
        return []
    ends = []
    for n in after:
        if n.target not in RESHAPES:
            return []
        shape = n.meta["val"].shape
        if len(shape) != 3 or str(shape[1]) != str(lead[1]) or shape[2] != lead[2] * lead[3]:
            return []
        ends.append(n)
    return ends


def _swaps_heads(node: Node) -> bool:
    if node.target is aten.transpose.int:
        return {axis % 4 for axis in node.args[1:]} == {1, 2}  # type: ignore[operator]
    return node.target is aten.permute.default and list(node.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]


def _flat(graph: Graph, node: Node, repeat: int) -> Node:
    """``[batch, heads, tokens, head_dim]`` in the layout of the linear layers, grouped heads repeated."""
    value = node.meta["val"]
    if repeat == 1 and _swaps_heads(node):
        split = node.args[0]
        assert isinstance(split, Node)
        if split.target in (*RESHAPES, reshape):
            whole = split.args[0]
            assert isinstance(whole, Node)
            shape = whole.meta["val"].shape
            if len(shape) == 3 and shape[2] == value.shape[1] * value.shape[3] and str(shape[1]) == str(value.shape[2]):
                return whole
    swapped = graph.call_function(aten.transpose.int, (node, 1, 2))
    swapped.meta = {**node.meta, "val": value.transpose(1, 2)}
    if repeat > 1:
        swapped = _repeated(graph, swapped, repeat)
    whole = swapped.meta["val"].flatten(2)
    merged = graph.call_function(reshape, (swapped, [0, 0, whole.shape[2]]))
    merged.meta = {**node.meta, "val": whole}
    return merged


def _repeated(graph: Graph, node: Node, repeat: int) -> Node:
    """``[batch, tokens, heads, head_dim]`` with each head ``repeat`` times in a row."""
    value = node.meta["val"]
    wide = graph.call_function(aten.unsqueeze.default, (node, 3))
    wide.meta = {**node.meta, "val": value.unsqueeze(3)}
    copies = graph.call_function(aten.cat.default, ([wide] * repeat, 3))
    copies.meta = {**node.meta, "val": value.unsqueeze(3).expand(-1, -1, -1, repeat, -1)}
    merged = graph.call_function(reshape, (copies, [0, 0, value.shape[2] * repeat, value.shape[3]]))
    merged.meta = {**node.meta, "val": value.repeat_interleave(repeat, 2)}
    return merged
