"""How each op acts on batch and token dimensions: the table that the rewriter follows.

A rule returns the new value with its layout, or raises ``Fallback`` and the rewriter restores the inputs. Support for
an op is a row here; nothing else knows ops by name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from optpass.emit import Traced, inputs_of
from optpass.layout import (
    Atom,
    Group,
    Layout,
    Part,
    has_tokens,
    is_plain,
    is_token_axis,
    plain,
    regroup,
    rejoined,
    same,
    same_group,
    weighted,
)
from optpass.program import op_name
from optpass.rewrite import Fallback, Rule, Several, Tracked, Walker

RULES: dict[str, Rule] = {}

MULTIPLIES = {
    "mul",
    "div",
    "where",
    "masked_fill",
    "__and__",
    "__or__",
    "bitwise_and",
    "logical_and",
    "eq",
    "ne",
    "le",
    "lt",
}
"""Pointwise ops whose other operand marks positions and is never averaged."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ops by their ATen names."""

    def register(fn: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = fn
        return fn

    return register


def rule_for(node: Node) -> Rule | None:
    """The rule of a node's op; pointwise ops share one."""
    name = op_name(node)
    if name in RULES:
        return RULES[name]
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return pointwise
    return None


# helpers


def operand(node: Node, index: int, name: str | None = None, default: Any = None) -> Any:
    """An argument by position or name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default) if name else default


def old_shape(node: Node) -> list[Any]:
    """The shape before the rewrite."""
    return list(node.meta["val"].shape)


def remake(walker: Walker, node: Node, new: dict[Node, Traced]) -> Traced:
    """The same call with its inputs replaced."""
    args = map_arg(node.args, lambda n: new[n] if n in new else walker._plain(n))
    kwargs = map_arg(node.kwargs, lambda n: new[n] if n in new else walker._plain(n))
    return walker.emit.call(node.target, *args, **kwargs)


def layout_of(walker: Walker, node: Node) -> tuple[Tracked, Layout]:
    """A tracked input; one without tokens counts as plain."""
    value = walker.value(node)
    return value, value.layout or tuple(plain(s) for s in old_shape(node))


def only(condition: Any, why: str) -> None:
    """Follow the tokens no further, unless the condition holds."""
    if not condition:
        raise Fallback(why)


def wrap(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim + rank if dim < 0 else dim


def broadcast(walker: Walker, node: Node, nodes: list[Node]) -> tuple[Layout, int]:
    """Layout and level of an elementwise result: each dimension as in the operand that has tokens or batch there."""
    shape = old_shape(node)
    tracked = [walker.value(n) for n in nodes if walker._is_tracked(n)]
    level = max(t.level for t in tracked)
    groups: list[Group] = []
    for dim in range(len(shape)):
        back = len(shape) - dim
        found = [t.layout[-back] for t in tracked if t.layout is not None and len(t.layout) >= back]
        marked = [g for g in found if not is_plain(g)]
        group = marked[0] if marked else plain(shape[dim])
        only(all(same_group(g, group) for g in marked), "its operands order batch and tokens differently")
        if any(atom.weighted for g in marked for atom in g):
            group = weighted(group)
        groups.append(group)
    return tuple(groups), level


# elementwise


@rule(
    "dropout",
    "type_as",
    "to",
    "_to_copy",
    "contiguous",
    "clone",
    "alias",
    "relu",
    "masked_fill",
    "where",
    "lift_fresh_copy",
)
def pointwise(walker: Walker, node: Node) -> Tracked:
    """Elementwise with broadcasting: older operands are coerced."""
    nodes = [n for n in dict.fromkeys(inputs_of(node)) if isinstance(n.meta.get("val"), torch.Tensor)]
    layout, level = broadcast(walker, node, nodes)
    single = sum(map(has_tokens, layout)) == 1 and op_name(node) not in MULTIPLIES
    new = {}
    for n in nodes:
        content = single and n.meta["val"].is_floating_point() and len(old_shape(n)) >= 2
        new[n] = walker.coerce(walker.value(n), layout, level, content)
    inputs = [walker.value(n) for n in nodes]
    rows = all(t.rows for t in inputs if t.layout is not None)
    return Tracked(remake(walker, node, new), layout, level, all(t.local for t in inputs), rows)


@rule("_assert_tensor_metadata")
def metadata(walker: Walker, node: Node) -> Tracked:
    """An assertion of the old shape: dropped."""
    return walker.value(node.args[0])


# over features


@rule("linear")
def linear(walker: Walker, node: Node) -> Tracked:
    """Acts on the last dimension alone."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    only(is_plain(layout[-1]), "it mixes tokens with a weight of fixed size")
    only(sum(walker._is_tracked(n) for n in inputs_of(node)) == 1, "its weight depends on the tokens")
    out = remake(walker, node, {node.args[0]: value.proxy})  # type: ignore[dict-item]
    return Tracked(out, (*layout[:-1], plain(old_shape(node)[-1])), value.level, value.local)


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def norm(walker: Walker, node: Node) -> Tracked:
    """Normalises trailing dimensions; ``normalized_shape`` must not reach the tokens."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    count = len(node.args[1])  # type: ignore[arg-type]
    only(all(is_plain(g) for g in layout[len(layout) - count :]), "it normalises over tokens")
    return replace(value, proxy=remake(walker, node, {node.args[0]: value.proxy}))  # type: ignore[dict-item]


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def softmax(walker: Walker, node: Node) -> Tracked:
    """Over features: local. Over tokens: each counts for those it stands for, so the log of its size is added."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    dim = wrap(node.args[1], len(layout))  # type: ignore[arg-type]
    x = value.proxy
    if has_tokens(layout[dim]):
        only(is_token_axis(layout[dim]), "it normalises over tokens mixed with other axes")
        bias = walker.bias(layout[dim][0], value.level)
        if bias is not None:
            x = x + walker.spread(bias.to(x.dtype), layout, dim)
        layout = (*layout[:dim], weighted(layout[dim]), *layout[dim + 1 :])
    local = value.local and not any(atom.weighted for atom in layout[dim])
    return Tracked(remake(walker, node, {node.args[0]: x}), layout, value.level, local)  # type: ignore[dict-item]


# attention and products


@rule("scaled_dot_product_attention")
def attention(walker: Walker, node: Node) -> Tracked:
    """Queries and keys follow their own axes; the mask is coerced on both, and merged keys weigh their size."""
    query, key, value = (layout_of(walker, n) for n in node.args[:3])  # type: ignore[arg-type]
    level = max(t.level for t, _ in (query, key, value))
    rank = len(query[1])
    rows, columns = query[1][-2], key[1][-2]
    only(all(is_plain(side[1][-1]) for side in (query, key, value)), "tokens lie along head_dim")
    only(all(is_plain(g) or is_token_axis(g) for g in (rows, columns)), "its tokens are mixed with other axes")
    if has_tokens(value[1][-2]) and not has_tokens(columns):
        raise Fallback("its values have tokens that its keys lack")
    lead = tuple(
        next((g for g in groups if not is_plain(g)), groups[0])
        for groups in zip(query[1][:-2], key[1][:-2], strict=True)
    ) if len(key[1]) == rank else query[1][:-2]  # fmt: skip
    q = walker.coerce(query[0], (*lead, rows, query[1][-1]), level)
    k = walker.coerce(key[0], (*lead, columns, key[1][-1]), level)
    v = walker.coerce(value[0], (*lead, columns, value[1][-1]), level)
    scores: Layout = (*lead, rows, columns)
    mask = operand(node, 3, "attn_mask")
    causal = operand(node, 5, "is_causal", False)
    bias = walker.bias(columns[0], level) if has_tokens(columns) else None
    moved = not (has_tokens(rows) and has_tokens(columns) and walker.in_order(level))
    m: Traced | None = None
    if mask is not None:
        m = walker.coerce(walker.value(mask), scores, level)
    elif causal and (moved or bias is not None):
        m = walker.coerce(Tracked(_tril(walker, node)), scores, level)
        causal = False
    if bias is not None:
        spread = walker.spread(bias.to(q.dtype), scores, rank - 1)
        if m is None:
            m = spread
        elif m.dtype == torch.bool:
            m = walker.emit.call(torch.where, m, spread, float("-inf"))
        else:
            m = m + spread
    kwargs = {name: node.kwargs[name] for name in ("scale", "enable_gqa") if name in node.kwargs}
    out = walker.emit.call(node.target, q, k, v, m, operand(node, 4, "dropout_p", 0.0), causal, **kwargs)
    local = not has_tokens(columns) and all(t.local for t, _ in (query, key, value))
    return Tracked(out, (*lead, rows, plain(old_shape(node)[-1])), level, local)


def _tril(walker: Walker, node: Node) -> Traced:
    rows, columns = (old_shape(n)[-2] for n in node.args[:2])  # type: ignore[arg-type]
    sizes = []
    for size, source in ((rows, node.args[0]), (columns, node.args[1])):
        sizes.append(size if isinstance(size, int) else walker.root_count if walker._is_tracked(source) else walker._plain(source).size(-2))  # type: ignore[arg-type]  # fmt: skip  # noqa: E501
    return walker.emit.call(torch.ones, (sizes[0], sizes[1]), dtype=torch.bool).tril()  # type: ignore[no-any-return]


@rule("matmul", "bmm", "mm", "baddbmm", "addmm")
def matmul(walker: Walker, node: Node) -> Tracked:
    """Matrix products; contracted over tokens, each counts for those it stands for."""
    added = op_name(node) in ("baddbmm", "addmm")
    left, right = node.args[1:3] if added else node.args[:2]
    (a, la), (b, lb) = layout_of(walker, left), layout_of(walker, right)  # type: ignore[arg-type]
    only(len(la) >= 2 and len(lb) >= 2, "it multiplies by a vector")
    level = max(a.level, b.level)
    rank = max(len(la), len(lb))
    la, lb = ((),) * (rank - len(la)) + la, ((),) * (rank - len(lb)) + lb
    lead = tuple(
        next((g for g in pair if not is_plain(g)), max(pair, key=len)) for pair in zip(la[:-2], lb[:-2], strict=True)
    )
    inner = next((g for g in (la[-1], lb[-2]) if has_tokens(g)), la[-1])
    x = walker.coerce(a, (*lead, la[-2], inner)[-len(old_shape(left)) :], level)  # type: ignore[arg-type]
    y = walker.coerce(b, (*lead, inner, lb[-1])[-len(old_shape(right)) :], level)  # type: ignore[arg-type]
    if has_tokens(inner):
        only(is_token_axis(inner), "it sums over tokens mixed with other axes")
        counted = any(atom.weighted for g in (la[-1], lb[-2]) for atom in g)
        sizes = None if counted else walker.axis_sizes(inner[0], level)
        if sizes is not None:
            full = (*lead, inner, lb[-1])
            y = y * walker.spread(sizes.to(y.dtype), full, rank - 2)
    layout: Layout = (*lead, la[-2], lb[-1])
    new = {left: x, right: y}
    if added:
        new[node.args[0]] = walker.coerce(walker.value(node.args[0]), layout, level)
    # the same tensor on both sides may stand in two roles
    args = [new.get(arg, arg) if isinstance(arg, Node) else arg for arg in node.args]
    if left is right:
        args[int(added) : int(added) + 2] = [x, y]
    out = walker.emit.call(node.target, *[walker._plain(v) if isinstance(v, Node) else v for v in args], **node.kwargs)
    return Tracked(out, layout, level, not has_tokens(inner) and a.local and b.local)


@rule("einsum")
def einsum(walker: Walker, node: Node) -> Tracked:
    """Each letter is a dimension; summed letters with tokens weigh sizes."""
    equation, operands = node.args[:2]
    left, result = str(equation).replace(" ", "").split("->")
    terms = left.split(",")
    only("." not in left and all(len(set(t)) == len(t) for t in terms), "its equation repeats letters")
    letters: dict[str, Group] = {}
    values = [layout_of(walker, n) for n in operands]  # type: ignore[union-attr, arg-type]
    level = max(t.level for t, _ in values)
    for term, (_, layout) in zip(terms, values, strict=True):
        for letter, group in zip(term, layout, strict=True):
            if letter not in letters or is_plain(letters[letter]):
                letters[letter] = group
    proxies = []
    for term, (value, _) in zip(terms, values, strict=True):
        proxies.append(walker.coerce(value, tuple(letters[c] for c in term), level))
    summed = [c for c in letters if c not in result and has_tokens(letters[c])]
    for letter in summed:
        only(is_token_axis(letters[letter]), "it sums over tokens mixed with other axes")
        at = [i for i, term in enumerate(terms) if letter in term]
        counted = any(a.weighted for i in at for a in values[i][1][terms[i].index(letter)])
        sizes = None if counted else walker.axis_sizes(letters[letter][0], level)
        if sizes is not None:
            i = at[-1]
            full = tuple(letters[c] for c in terms[i])
            proxies[i] = proxies[i] * walker.spread(sizes.to(proxies[i].dtype), full, terms[i].index(letter))
    out = walker.emit.call(torch.functional.einsum, equation, *proxies)
    return Tracked(out, tuple(letters[c] for c in result), level, not summed and all(t.local for t, _ in values))


# shapes


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "squeeze", "unsqueeze", "t")
def reshape(walker: Walker, node: Node) -> Tracked:
    """Regroup the atoms; sizes that hold tokens are computed, never searched for among the literals."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    shape = old_shape(node)
    name = op_name(node)
    if name == "t":
        return replace(value, proxy=value.proxy.t(), layout=layout[::-1])
    if name == "unsqueeze":
        dim = wrap(node.args[1], len(shape))  # type: ignore[arg-type]
        return replace(value, proxy=value.proxy.unsqueeze(dim), layout=(*layout[:dim], (), *layout[dim:]))
    if name == "squeeze":
        old = old_shape(node.args[0])  # type: ignore[arg-type]
        dims = operand(node, 1, default=[d for d, s in enumerate(old) if same(s, 1)])
        dims = [wrap(d, len(old)) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
        gone = {d for d in dims if same(old[d], 1)}
        only(all(is_plain(layout[d]) for d in gone), "it squeezes a batch or token axis")
        kept = tuple(g for d, g in enumerate(layout) if d not in gone)
        return replace(value, proxy=remake(walker, node, {node.args[0]: value.proxy}), layout=kept)  # type: ignore[dict-item]
    new = regroup(layout, shape)
    only(new is not None, "it splits the token axis")
    assert new is not None
    literals = node.args[1] if name in ("view", "reshape", "_unsafe_view") else [None] * len(shape)
    sizes: list[Any] = []
    for group, old_size, literal in zip(new, shape, literals, strict=True):  # type: ignore[arg-type]
        if isinstance(old_size, int) and not has_tokens(group):
            sizes.append(old_size)
        elif isinstance(literal, Node) and not has_tokens(group):
            sizes.append(walker._plain(literal))
        elif is_plain(group) and -1 not in sizes:
            sizes.append(-1)
        else:
            sizes.append(walker.extent(group, value.level))
    return replace(value, proxy=value.proxy.reshape(sizes), layout=new)


@rule("transpose", "permute", "swapaxes", "mT")
def permute(walker: Walker, node: Node) -> Tracked:
    """Dimensions change places, and their groups with them."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    order = list(range(len(layout)))
    if op_name(node) == "permute":
        order = [wrap(d, len(layout)) for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    else:
        swapped: Any = node.args[1:3] or (-2, -1)
        a, b = (wrap(d, len(layout)) for d in swapped)
        order[a], order[b] = order[b], order[a]
    out = remake(walker, node, {node.args[0]: value.proxy})  # type: ignore[dict-item]
    return replace(value, proxy=out, layout=tuple(layout[d] for d in order))


@rule("expand", "expand_as")
def expand(walker: Walker, node: Node) -> Tracked:
    """Sizes of tokens are left as they are; new sizes are plain until they meet tokens."""
    if len(inputs_of(node)) > 1 and op_name(node) == "expand_as":
        raise Fallback("it expands to another tensor")
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    shape = old_shape(node)
    new = ((),) * (len(shape) - len(layout)) + layout
    sizes: list[Any] = []
    groups: list[Group] = []
    for group, size, literal in zip(new, shape, node.args[1], strict=True):  # type: ignore[arg-type]
        grows = group == () and not same(size, 1)
        groups.append(plain(size) if grows else group)
        sizes.append((walker._plain(literal) if isinstance(literal, Node) else literal) if grows else -1)
    lead = len(shape) - len(layout)
    sizes[:lead] = [1 if s == -1 else s for s in sizes[:lead]]
    return replace(value, proxy=value.proxy.expand(sizes), layout=tuple(groups))


@rule("repeat", "tile")
def repeat(walker: Walker, node: Node) -> Tracked:
    """Repeats plain dimensions; tokens and batch must be repeated once."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    times = node.args[1]
    only(len(times) == len(layout), "it adds dimensions")  # type: ignore[arg-type]
    shape = old_shape(node)
    only(all(t == 1 or is_plain(g) for t, g in zip(times, layout, strict=True)), "it repeats tokens")  # type: ignore[arg-type]
    groups = tuple(g if not is_plain(g) else plain(s) for g, s in zip(layout, shape, strict=True))
    return replace(value, proxy=remake(walker, node, {node.args[0]: value.proxy}), layout=groups)  # type: ignore[dict-item]


@rule("pad", "constant_pad_nd")
def pad(walker: Walker, node: Node) -> Tracked:
    """Pads plain dimensions."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    amounts = list(node.args[1])  # type: ignore[arg-type]
    shape = old_shape(node)
    for i in range(len(amounts) // 2):
        only(is_plain(layout[-1 - i]) or amounts[2 * i : 2 * i + 2] == [0, 0], "it pads the token axis")
    groups = tuple(g if not is_plain(g) else plain(s) for g, s in zip(layout, shape, strict=True))
    return replace(value, proxy=remake(walker, node, {node.args[0]: value.proxy}), layout=groups)  # type: ignore[dict-item]


# pieces


def _cut(walker: Walker, value: Tracked, layout: Layout, dim: int, start: Any, stop: Any) -> Tracked:
    """``[start, stop)`` of a token axis, where both ends fall between tokens that maps do not move."""
    only(is_token_axis(layout[dim]), "it slices tokens mixed with other axes")
    atom = layout[dim][0]
    only(isinstance(atom.size, int) and isinstance(start, int) and isinstance(stop, int), "its bounds are symbolic")
    parts: list[Part] = []
    offset, new_offset = 0, 0
    bounds: dict[int, Any] = {0: 0}
    for part in atom.parts:
        low, high = max(start, offset), min(stop, offset + part.size)
        count = walker.count(Atom("tokens", 0, (part,)), value.level)
        prefix = part.size if part.fixed else max(walker.space.prefix - part.left, 0)
        suffix = 0 if part.fixed else max(walker.space.suffix - part.right, 0)
        for bound in (start, stop):
            at = bound - offset
            if 0 <= at <= prefix:
                bounds[bound] = new_offset + at
            elif part.size - suffix <= at <= part.size:
                bounds[bound] = new_offset + count - (part.size - at)
        if low < high:
            left, right = low - offset, offset + part.size - high
            whole_prefix = not part.fixed and high - offset <= prefix
            whole_suffix = not part.fixed and low - offset >= part.size - suffix
            if part.fixed or whole_prefix or whole_suffix:
                parts.append(Part(high - low, fixed=True))
            else:
                parts.append(Part(high - low, left=part.left + left, right=part.right + right))
        offset, new_offset = offset + part.size, new_offset + count
    only(start in bounds and stop in bounds, "it slices between tokens that a map may move")
    out = walker.emit.call(torch.ops.aten.slice.Tensor, value.proxy, dim, bounds[start], bounds[stop])
    if all(part.fixed for part in parts):
        group = plain(stop - start)
    else:
        group = (replace(atom, size=stop - start, parts=tuple(parts)),)
    return replace(value, proxy=out, layout=(*layout[:dim], group, *layout[dim + 1 :]))


def _bound(value: Any, size: Any, default: Any) -> Any:
    if value is None:
        return default
    if not isinstance(value, int):
        return value
    if not isinstance(size, int):
        return value if 0 <= value < 2**62 else size if value > 0 else size + value
    return min(max(value + size if value < 0 else value, 0), size)


@rule("slice", "narrow")
def slice_(walker: Walker, node: Node) -> Tracked:
    """Of a plain dimension: as it is. Of tokens: see ``_cut``."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    dim = wrap(operand(node, 1, "dim", 0), len(layout))
    size = old_shape(node.args[0])[dim]  # type: ignore[arg-type]
    start = _bound(operand(node, 2, "start"), size, 0)
    stop = _bound(operand(node, 3, "end"), size, size)
    if op_name(node) == "narrow":
        stop = start + node.args[3]
    if has_tokens(layout[dim]):
        if isinstance(start, int) and start == 0 and same(stop, size):
            return value
        only(operand(node, 4, "step", 1) == 1, "it takes every n-th token")
        return _cut(walker, value, layout, dim, start, stop)
    only(is_plain(layout[dim]), "it slices the batch")
    out = remake(walker, node, {node.args[0]: value.proxy})  # type: ignore[dict-item]
    return replace(value, proxy=out, layout=(*layout[:dim], plain(old_shape(node)[dim]), *layout[dim + 1 :]))


@rule("select")
def select(walker: Walker, node: Node) -> Tracked:
    """One index of a dimension; of tokens only a protected one."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    dim = wrap(node.args[1], len(layout))  # type: ignore[arg-type]
    rest = (*layout[:dim], *layout[dim + 1 :])
    if not has_tokens(layout[dim]):
        only(is_plain(layout[dim]), "it selects a sample")
        out = remake(walker, node, {node.args[0]: value.proxy})  # type: ignore[dict-item]
        return replace(value, proxy=out, layout=rest)
    index = node.args[2]
    size = old_shape(node.args[0])[dim]  # type: ignore[arg-type]
    only(isinstance(index, int), "it selects a token by a symbolic index")
    if isinstance(size, int):
        at = wrap(index, size)  # type: ignore[arg-type]
        piece = _cut(walker, value, layout, dim, at, at + 1)
        return replace(piece, proxy=piece.proxy.squeeze(dim), layout=rest)
    inside = 0 <= index < walker.space.prefix or -walker.space.suffix <= index < 0  # type: ignore[operator]
    only(
        inside and is_token_axis(layout[dim]) and len(layout[dim][0].parts) == 1,
        "it selects a token that a map may move",
    )
    return replace(value, proxy=value.proxy.select(dim, index), layout=rest)


@rule("split", "split_with_sizes", "chunk", "unbind")
def split(walker: Walker, node: Node) -> Several:
    """Several slices, or several selects."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    default = 1 if op_name(node) == "unbind" else 2
    dim = wrap(operand(node, default, "dim", 0), len(layout))
    pieces: Several = []
    shapes = [list(v.shape) for v in node.meta["val"]]
    if not has_tokens(layout[dim]):
        only(is_plain(layout[dim]), "it splits the batch")
        made = remake(walker, node, {node.args[0]: value.proxy})  # type: ignore[dict-item]
        for i, shape in enumerate(shapes):
            middle = () if op_name(node) == "unbind" else (plain(shape[dim]),)
            piece = walker.emit.call(operator.getitem, made, i)
            pieces.append(replace(value, proxy=piece, layout=(*layout[:dim], *middle, *layout[dim + 1 :])))
        return pieces
    only(op_name(node) != "unbind", "it takes the token axis apart")
    start: Any = 0
    for shape in shapes:
        pieces.append(_cut(walker, value, layout, dim, start, start + shape[dim]))
        start = start + shape[dim]
    return pieces


@rule("getitem")
def getitem(walker: Walker, node: Node) -> Tracked:
    """One of several results."""
    several = walker.env[node.args[0]]  # type: ignore[index]
    only(isinstance(several, list), "it indexes one tensor")
    return several[node.args[1]]  # type: ignore[index]


@rule("cat")
def cat(walker: Walker, node: Node) -> Tracked:
    """Along features: coerced side by side. Along tokens: the axis becomes a concatenation."""
    shape = old_shape(node)
    dim = wrap(operand(node, 1, "dim", 0), len(shape))
    # torch lets a tensor of shape [0] stand for nothing at all
    nodes: list[Any] = [n for n in node.args[0] if len(old_shape(n)) == len(shape)]  # type: ignore[union-attr, arg-type]
    values = [layout_of(walker, n) for n in nodes]
    level = max(t.level for t, _ in values)
    groups: list[Group] = []
    for d in range(len(shape)):
        groups.append(next((la[d] for _, la in values if not is_plain(la[d])), values[0][1][d]))
    along = any(has_tokens(la[dim]) for _, la in values)
    parts: list[Part] = []
    proxies = []
    for value, layout in values:
        if along:
            only(is_plain(layout[dim]) or is_token_axis(layout[dim]), "it joins tokens mixed with other axes")
            own = layout[dim]
            size = reduce(operator.mul, (a.size for a in own), 1)
            parts += own[0].parts if is_token_axis(own) else [Part(size, fixed=True)]
        else:
            own = layout[dim]
            only(is_plain(own), "it joins batches")
        target = (*groups[:dim], own, *groups[dim + 1 :])
        content = sum(map(has_tokens, target)) == 1
        proxies.append(walker.coerce(value, target, level, content))
    parts = rejoined(parts, walker.space.prefix, walker.space.suffix)
    group = (Atom("tokens", shape[dim], tuple(parts)),) if along else plain(shape[dim])
    out = walker.emit.call(torch.ops.aten.cat.default, proxies, dim)
    return Tracked(out, (*groups[:dim], group, *groups[dim + 1 :]), level, all(t.local for t, _ in values))


@rule("stack")
def stack(walker: Walker, node: Node) -> Tracked:
    """Side by side along a new dimension."""
    nodes = list(node.args[0])  # type: ignore[arg-type]
    values = [layout_of(walker, n) for n in nodes]
    level = max(t.level for t, _ in values)
    layout = tuple(
        next((g for g in gs if not is_plain(g)), gs[0]) for gs in zip(*(la for _, la in values), strict=True)
    )
    dim = wrap(operand(node, 1, "dim", 0), len(layout) + 1)
    out = walker.emit.call(node.target, [walker.coerce(t, layout, level) for t, _ in values], dim)
    return Tracked(out, (*layout[:dim], plain(len(nodes)), *layout[dim:]), level, all(t.local for t, _ in values))


# reductions


@rule("mean", "sum", "amax", "amin", "var", "std", "argmax", "argmin", "all", "any", "linalg_vector_norm", "norm")
def reduction(walker: Walker, node: Node) -> Tracked:
    """Over features: local. A sum or mean over tokens counts each for those it stands for."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    at = 2 if op_name(node) in ("linalg_vector_norm", "norm") else 1
    dims = operand(node, at, "dim")
    only(dims is not None, "it reduces everything")
    dims = [wrap(d, len(layout)) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    keep = len(old_shape(node)) == len(layout)
    over = [d for d in dims if has_tokens(layout[d])]
    only(all(is_plain(layout[d]) or d in over for d in dims), "it reduces over the batch")
    rest = tuple(() if d in dims else g for d, g in enumerate(layout) if keep or d not in dims)
    x = value.proxy
    if over:
        only(over == dims and len(dims) == 1 and is_token_axis(layout[dims[0]]), "it reduces tokens with other axes")
        only(op_name(node) in ("mean", "sum"), "it reduces over tokens")
        return _token_sum(walker, node, value, layout, dims[0], keep, rest)
    out = remake(walker, node, {node.args[0]: x})  # type: ignore[dict-item]
    return replace(value, proxy=out, layout=rest, rows=False)


def _token_sum(
    walker: Walker, node: Node, value: Tracked, layout: Layout, dim: int, keep: bool, rest: Layout
) -> Tracked:
    x = value.proxy
    sizes = walker.axis_sizes(layout[dim][0], value.level)
    if sizes is None or layout[dim][0].weighted:
        out = x.sum(dim, keepdim=keep) if op_name(node) == "sum" else x.mean(dim, keepdim=keep)
    else:
        counts = walker.spread(sizes.to(x.dtype), layout, dim)
        out = (x * counts).sum(dim, keepdim=keep)
        if op_name(node) != "sum":
            out = out / counts.sum(dim, keepdim=keep)
    return Tracked(out, rest, value.level, local=False)


@rule("adaptive_avg_pool1d")
def pool_all(walker: Walker, node: Node) -> Tracked:
    """Pooling to one value is a mean."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    only(list(node.args[1]) == [1] and is_token_axis(layout[-1]), "it pools tokens by their number")  # type: ignore[arg-type]
    return _token_sum(walker, node, value, layout, len(layout) - 1, True, (*layout[:-1], ()))


# lookups


@rule("embedding")
def embedding(walker: Walker, node: Node) -> Tracked:
    """A row of the table for each index."""
    value, layout = layout_of(walker, node.args[1])  # type: ignore[arg-type]
    only(not walker._is_tracked(node.args[0]), "its table depends on the tokens")  # type: ignore[arg-type]
    out = remake(walker, node, {node.args[1]: value.proxy})  # type: ignore[dict-item]
    return Tracked(out, (*layout, plain(old_shape(node)[-1])), value.level, value.local)


@rule("sym_size", "size")
def size(walker: Walker, node: Node) -> Tracked:
    """The size before all maps: rules that need the new one compute it from the layout."""
    _, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    dim = wrap(node.args[1], len(layout))  # type: ignore[arg-type]
    return Tracked(walker.emit.call(operator.add, walker.extent(layout[dim], 0), 0))


# routing to experts: rows of tokens in an order that data decides


@rule("topk")
def topk(walker: Walker, node: Node) -> Several:
    """Over features, such as the scores of experts."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    dim = wrap(operand(node, 2, "dim", -1), len(layout))
    only(is_plain(layout[dim]), "it ranks tokens")
    made = remake(walker, node, {node.args[0]: value.proxy})  # type: ignore[dict-item]
    rest = (*layout[:dim], plain(node.meta["val"][0].shape[dim]), *layout[dim + 1 :])
    return [replace(value, proxy=walker.emit.call(operator.getitem, made, i), layout=rest) for i in range(2)]


def _one_axis(layout: Layout) -> Group:
    only(len(layout) == 1 and has_tokens(layout[0]), "it orders tokens")
    return layout[0]


@rule("sort", "argsort")
def sort(walker: Walker, node: Node) -> Tracked | Several:
    """All rows by a key; sorting an order gives its inverse, and the rows their first order again."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    group = _one_axis(layout)
    size: Any = reduce(operator.mul, (a.size for a in group), 1)
    back = value.rows and group[0].kind == "rows"
    after: Group = group[0].members if back else (Atom("rows", size, members=group),)
    made = remake(walker, node, {node.args[0]: value.proxy})  # type: ignore[dict-item]
    if op_name(node) == "argsort":
        return Tracked(made, (after,), value.level, False, rows=True)
    values = walker.emit.call(operator.getitem, made, 0)
    order = walker.emit.call(operator.getitem, made, 1)
    return [Tracked(values, (after,), value.level, False), Tracked(order, (after,), value.level, False, rows=True)]


@rule("floor_divide")
def floor_divide(walker: Walker, node: Node) -> Tracked | Several:
    """Of row numbers, by how often each token was repeated: the rows of the tokens themselves."""
    if len(inputs_of(node)) > 1:
        return pointwise(walker, node)
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    if not value.rows:
        return pointwise(walker, node)
    repeats = layout[0][0].members[-1] if layout[0][0].kind == "rows" else layout[0][-1]
    only(repeats.kind == "plain" and same(repeats.size, node.args[1]), "it computes with row numbers")
    return replace(value, proxy=remake(walker, node, {node.args[0]: value.proxy}))  # type: ignore[dict-item]


@rule("zeros_like", "ones_like", "full_like", "empty_like")
def like(walker: Walker, node: Node) -> Tracked:
    """A constant for each token."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    return replace(value, proxy=remake(walker, node, {node.args[0]: value.proxy}), layout=layout, rows=False)  # type: ignore[dict-item]


@rule("new_empty", "new_zeros", "new_ones", "new_full")
def new_tensor(walker: Walker, node: Node) -> Tracked:
    """Takes nothing but the dtype of its input."""
    only(not any(walker._is_tracked(n) for n in inputs_of(node)[1:]), "its size depends on the tokens")
    return Tracked(remake(walker, node, {node.args[0]: walker.value(node.args[0]).proxy}))  # type: ignore[dict-item]


@rule("copy")
def copy(walker: Walker, node: Node) -> Tracked:
    """The second tensor in the shape and dtype of the first."""
    nodes = [n for n in node.args[:2] if isinstance(n, Node)]
    only(len(nodes) == 2, "it writes a number")
    layout, level = broadcast(walker, node, nodes)
    new = {n: walker.coerce(walker.value(n), layout, level) for n in nodes}
    return Tracked(remake(walker, node, new), layout, level, walker.value(nodes[1]).local)


@rule("slice_scatter")
def slice_scatter(walker: Walker, node: Node) -> Tracked:
    """Writes into a stretch of a plain dimension."""
    into, what = node.args[:2]
    dim = wrap(operand(node, 2, "dim", 0), len(old_shape(node)))
    only(isinstance(what, Node), "it writes a number")
    (value, layout), (written, other) = layout_of(walker, into), layout_of(walker, what)  # type: ignore[arg-type]
    only(is_plain(layout[dim]) and is_plain(other[dim]), "it writes into a stretch of the tokens")
    level = max(value.level, written.level)
    merged = [a if not is_plain(a) else b for a, b in zip(layout, other, strict=True)]
    ends = [(*merged[:dim], side[dim], *merged[dim + 1 :]) for side in (layout, other)]
    new = {into: walker.coerce(value, ends[0], level), what: walker.coerce(written, ends[1], level)}
    return Tracked(remake(walker, node, new), ends[0], level, value.local and written.local)  # type: ignore[arg-type]


@rule("gather", "scatter")
def gather(walker: Walker, node: Node) -> Tracked:
    """Along a plain dimension, each token by its own index."""
    source, places = node.args[0], node.args[2]
    written = node.args[3] if len(node.args) > 3 and isinstance(node.args[3], Node) else None
    nodes = [n for n in (source, places, written) if isinstance(n, Node)]
    dim = wrap(node.args[1], len(old_shape(node)))  # type: ignore[arg-type]
    values = {n: layout_of(walker, n) for n in nodes}
    only(all(is_plain(layout[dim]) for _, layout in values.values()), "it looks tokens up by their old number")
    level = max(value.level for value, _ in values.values())
    shapes = [old_shape(n) for n in nodes]
    others = [d for d in range(len(shapes[0])) if d != dim]
    only(all(same(shape[d], shapes[0][d]) for shape in shapes for d in others), "its operands differ in size")
    groups = [
        next((la[d] for _, la in values.values() if not is_plain(la[d])), plain(shapes[0][d]))
        for d in range(len(shapes[0]))
    ]
    new = {}
    for n, (value, layout) in values.items():
        new[n] = walker.coerce(value, (*groups[:dim], layout[dim], *groups[dim + 1 :]), level)
    groups[dim] = plain(old_shape(node)[dim])
    local = all(value.local for value, _ in values.values())
    return Tracked(remake(walker, node, new), tuple(groups), level, local)


@rule("index")
def index(walker: Walker, node: Node) -> Tracked:
    """Rows by row numbers of the new space, or rows of a table; any other index means the old one."""
    source: Any = node.args[0]
    places: Any = node.args[1]
    given = [d for d, place in enumerate(places) if place is not None]
    if len(given) == 1 and not walker._is_tracked(places[given[0]]):
        value, layout = layout_of(walker, source)
        (dim,) = given
        only(is_plain(layout[dim]), "it looks tokens up by their old number")
        only(places[dim].meta["val"].dtype != torch.bool, "it looks up as many rows as data decides")
        picked = tuple(plain(size) for size in old_shape(places[dim]))
        out = remake(walker, node, {source: value.proxy})
        return replace(value, proxy=out, layout=(*layout[:dim], *picked, *layout[dim + 1 :]))
    only(given == [0] and len(places) == 1, "it looks tokens up by their old number")
    (value, layout), (order, of) = layout_of(walker, source), layout_of(walker, places[0])
    if not walker._is_tracked(source) and not order.rows and order.proxy.dtype != torch.bool:
        out = walker.emit.call(node.target, value.proxy, [order.proxy])
        return Tracked(out, (*of, *layout[1:]), order.level, order.local)
    only(order.rows and len(of) == 1 and has_tokens(layout[0]), "it looks tokens up by their old number")
    only(not any(has_tokens(g) for g in layout[1:]), "it looks up one of two token axes")
    out = walker.emit.call(node.target, value.proxy, [order.proxy])
    return Tracked(out, (of[0], *layout[1:]), value.level, False, value.rows)


@rule("histc")
def histc(walker: Walker, node: Node) -> Tracked:
    """How many rows each expert takes."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    only(_one_axis(layout)[0].kind == "rows", "it counts tokens")
    return Tracked(remake(walker, node, {node.args[0]: value.proxy}), None, value.level, False)  # type: ignore[dict-item]


@rule("_grouped_mm", "transformers.grouped_mm_fallback")
def grouped(walker: Walker, node: Node) -> Tracked:
    """Each row times the matrix of its group."""
    value, layout = layout_of(walker, node.args[0])  # type: ignore[arg-type]
    only(len(layout) == 2 and not is_plain(layout[0]), "its rows are no tokens")
    out = remake(walker, node, {node.args[0]: value.proxy})  # type: ignore[dict-item]
    return Tracked(out, (layout[0], plain(old_shape(node)[-1])), value.level, False)


def supported() -> list[str]:
    """Names of the ops with a rule of their own."""
    return sorted(RULES)
