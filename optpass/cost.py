"""What a graph costs: floating point operations counted from the shapes of its nodes, block by block."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import Node

from optpass.program import op_name
from optpass.results import Layer, PassRecord
from optpass.structure import CALL, Block, Structure, call_path, hint

Shape = list[int]


def _product(node: Node) -> int:
    """A matrix product: the last axis of its left factor is summed over."""
    left = node.args[-2] if op_name(node) in ("addmm", "baddbmm") else node.args[0]
    return 2 * math.prod(_shape(node)) * _shape(left)[-1]


def _convolution(node: Node) -> int:
    """Each number of the output, or of the input where it is transposed, meets one filter."""
    transposed = "transpose" in op_name(node) or (op_name(node) == "convolution" and bool(node.args[6]))
    return 2 * math.prod(_shape(node.args[0] if transposed else node)) * math.prod(_shape(node.args[1])[1:])


def _attention(node: Node) -> int:
    """Scores and weighted values, each query with each key, whatever the mask hides."""
    query, key, value = (_shape(arg) for arg in node.args[:3])
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(node: Node) -> int:
    """Every index once for each factor beside the first."""
    factors = [_shape(arg) for arg in node.args[1]]  # type: ignore[union-attr]
    equation = str(node.args[0]).replace(" ", "")
    sizes: dict[str, int] = {}
    for names, shape in zip(equation.partition("->")[0].split(","), factors, strict=True):
        dots = len(shape) - len(names.replace("...", ""))
        spread = names.replace("...", "".join(chr(0x100 + i) for i in range(dots)))
        sizes |= dict(zip(spread, shape, strict=True))
    return 2 * math.prod(sizes.values()) * (len(factors) - 1)


FLOPS: Mapping[str, Callable[[Node], int]] = {
    **dict.fromkeys(("linear", "matmul", "mm", "bmm", "addmm", "baddbmm"), _product),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"), _convolution),
    "convolution": _convolution,
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
}
"""Ops that multiply matrices, a multiplication and an addition counted as two; what is elementwise counts nothing."""


def flops(node: Node) -> int:
    """Floating point operations of a node at the sizes of the example."""
    count = FLOPS.get(op_name(node)) if node.op == "call_function" else None
    return count(node) if count else 0


def total(structure: Structure) -> int:
    """Floating point operations of one call."""
    return sum(flops(node) for node in structure.module.graph.nodes)


def layers(before: Structure, after: Structure, records: Sequence[PassRecord]) -> list[Layer]:
    """Tokens and operations of each block of the tower that was reduced, or of the main one, without and with passes.

    Args:
        before: of the captured stage.
        after: of the same stage with the passes.
        records: of the passes.
    """
    reduced = next((record.sites[0] for record in records if record.done and record.sites), "")
    tower = next((t for t in before.towers if any(b.path == reduced for b in t.blocks)), before.main)
    if tower is None:
        return []
    counted = _by_block(before), _by_block(after)
    there = {block.path: block for t in after.towers for block in t.blocks}
    axis = tower.space.token_dim
    return [
        Layer(
            path=block.path,
            dense_tokens=_shape(block.entry)[axis],
            tokens=_shape(there[block.path].entry)[axis],
            dense_flops=counted[0][block.path],
            flops=counted[1][block.path],
        )
        for block in tower.blocks
        if block.path in there
    ]


def _by_block(structure: Structure) -> dict[str, int]:
    order = {node: i for i, node in enumerate(structure.module.graph.nodes)}
    stems: dict[str, list[Block]] = defaultdict(list)
    for tower in structure.towers:
        for block in tower.blocks:
            stems[CALL.sub("", block.path)].append(block)
    counted: dict[str, int] = defaultdict(int)
    for node in order:
        count = flops(node)
        at = _block_of(node, stems, order) if count else None
        if at is not None:
            counted[at.path] += count
    return counted


def _block_of(node: Node, stems: Mapping[str, list[Block]], order: Mapping[Node, int]) -> Block | None:
    """The block that a node belongs to by its module path; of several calls of one module the one under way."""
    path = CALL.sub("", call_path(node))
    while path not in stems:
        if not path:
            return None
        path = path.rpartition(".")[0]
    calls = stems[path]
    if len(calls) == 1:
        return calls[0]
    return next((block for block in calls if order[block.entry] < order[node] <= order[block.exit]), None)


def _shape(node: Any) -> Shape:
    return [hint(size) for size in node.meta["val"].shape]
