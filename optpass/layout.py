"""Which dimensions of a tensor are batch, which are tokens: the bookkeeping of the rewriter.

A dimension is a product of atoms in row-major order, so GPT-2's flattened ``batch * tokens`` and BLOOM's
``batch * heads`` are dimensions like any other. Sizes are those of the graph before the rewrite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true


def same(a: Any, b: Any) -> bool:
    """Whether two sizes, numbers or symbols, are known to be equal."""
    return a == b if isinstance(a, int) and isinstance(b, int) else bool(statically_known_true(a == b))


@dataclass(frozen=True)
class Part:
    """A stretch of a token axis: ``fixed`` tokens of another origin, or the space without its outer tokens."""

    size: Any
    fixed: bool = False
    left: int = 0
    right: int = 0


@dataclass(frozen=True)
class Atom:
    """A factor of a dimension.

    Attributes:
        kind: ``batch``, ``tokens``, ``plain``, or ``rows``: the product ``members`` in an order that data decided.
        parts: of a token axis, in order.
        weighted: a softmax over these tokens has already counted how many each stands for.
    """

    kind: str
    size: Any
    parts: tuple[Part, ...] = ()
    weighted: bool = False
    members: tuple[Atom, ...] = ()


Group = tuple[Atom, ...]
Layout = tuple[Group, ...]


def plain(size: Any) -> Group:
    """A dimension without batch or tokens; one of size 1 is the empty product."""
    return () if isinstance(size, int) and size == 1 else (Atom("plain", size),)


def is_tokens(atom: Atom) -> bool:
    """Whether a factor is a token axis, or rows of one."""
    return atom.kind == "tokens" or any(is_tokens(member) for member in atom.members)


def has_tokens(group: Group) -> bool:
    """Whether the dimension holds tokens, alone or in a product."""
    return any(is_tokens(atom) for atom in group)


def is_plain(group: Group) -> bool:
    """Whether the dimension holds neither batch nor tokens."""
    return all(atom.kind == "plain" for atom in group)


def is_token_axis(group: Group) -> bool:
    """Whether the dimension is a token axis and nothing else."""
    return len(group) == 1 and group[0].kind == "tokens"


def token_dims(layout: Layout) -> list[int]:
    """The dimensions that hold tokens."""
    return [dim for dim, group in enumerate(layout) if has_tokens(group)]


def same_axis(a: Atom, b: Atom) -> bool:
    """Whether two token atoms are the same stretches of one space."""
    if len(a.parts) != len(b.parts):
        return False
    return all(
        (p.fixed, p.left, p.right) == (q.fixed, q.left, q.right) and same(p.size, q.size)
        for p, q in zip(a.parts, b.parts, strict=True)
    )


def rejoined(parts: list[Part], prefix: int, suffix: int) -> list[Part]:
    """Parts with protected tokens that were cut off and are back in place made one with their space again."""
    joined = list(parts)
    for i, part in enumerate(joined):
        if part.fixed:
            continue
        for step, count, room in ((-1, part.left, prefix), (1, part.right, suffix)):
            beside = joined[i + step] if 0 <= i + step < len(joined) else None
            if beside is None or not beside.fixed or not 0 < count <= room or not isinstance(beside.size, int):
                continue
            if beside.size < count:
                continue
            joined[i + step] = replace(beside, size=beside.size - count)
            left, right = (0, part.right) if step < 0 else (part.left, 0)
            part = replace(part, size=part.size + count, left=left, right=right)
        joined[i] = part
    return [part for part in joined if not part.fixed or not same(part.size, 0)]


def same_group(a: Group, b: Group) -> bool:
    """Whether two groups are the same product, how plain factors are split aside."""
    a, b = [x for x in a if x.kind != "plain"], [x for x in b if x.kind != "plain"]  # type: ignore[assignment]
    if len(a) != len(b):
        return False
    return all(
        x.kind == y.kind and (x.kind != "tokens" or same_axis(x, y)) and same_group(x.members, y.members)
        for x, y in zip(a, b, strict=True)
    )


def weighted(group: Group, value: bool = True) -> Group:
    """The dimension with its tokens marked as counted by a softmax."""
    return tuple(replace(atom, weighted=value) if atom.kind == "tokens" else atom for atom in group)


def regroup(layout: Layout, sizes: list[Any]) -> Layout | None:
    """The layout after a view to ``sizes``; None if it would split a batch, a token axis, or rows."""
    queue = [atom for group in layout for atom in group]
    result: list[Group] = []
    for size in sizes:
        group: list[Atom] = []
        product: Any = 1
        if same(size, 1):
            if queue and queue[0].kind == "batch" and same(queue[0].size, 1):
                group.append(queue.pop(0))
            result.append(tuple(group))
            continue
        while not same(product, size):
            if not queue:
                return None
            atom = queue.pop(0)
            if isinstance(size, int) and isinstance(product, int) and isinstance(atom.size, int):
                need, rest = divmod(size, product)
                if rest or (atom.size > need and (atom.kind != "plain" or atom.size % need)):
                    return None
                if atom.size > need:
                    queue.insert(0, Atom("plain", atom.size // need))
                    atom = Atom("plain", need)
            group.append(atom)
            product = product * atom.size
        result.append(tuple(group))
    if any(not same(atom.size, 1) for atom in queue):
        return None
    if queue and result:
        result[-1] = result[-1] + tuple(queue)
    return tuple(result)
