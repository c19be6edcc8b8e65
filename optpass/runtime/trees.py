"""A draft as a tree of tokens: what one verify step computes, and the walk that accepts a path of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optpass.errors import OptpassError

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Tree:
    """Guesses of the coming tokens; a node continues its parent, and all of them are verified in one step.

    Attributes:
        tokens: int64 ``[nodes]``; node 0 is the anchor, the last committed token, which no cache holds yet.
        parent: int64 ``[nodes]``, -1 for the anchor and an earlier node for each other one. Children of one node carry
            distinct tokens, so that at most one of them is right.
    """

    tokens: Ids
    parent: Ids

    @classmethod
    def of(cls, anchor: int) -> Tree:
        """The anchor alone: a plain step."""
        return cls(np.array([anchor], np.int64), np.array([-1], np.int64))

    @classmethod
    def chain(cls, anchor: int, tokens: Iterable[int]) -> Tree:
        """One guess for each of the coming tokens."""
        nodes = np.array([anchor, *tokens], np.int64)
        return cls(nodes, np.arange(-1, len(nodes) - 1, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Bool ``[nodes, nodes]``: row i is true at node i and at its ancestors, which are all that it may look at."""
        count = len(self)
        # Each round doubles how far up the rows reach; the last row and index stand for what is above the anchor.
        reach = np.eye(count + 1, dtype=bool)
        reach[count, count] = False
        up = np.append(np.where(self.parent < 0, count, self.parent), count)
        while (up < count).any():
            reach |= reach[up]
            up = up[up]
        return reach[:count, :count]

    @cached_property
    def depth(self) -> Ids:
        """int64 ``[nodes]``: steps from the anchor, so that a node's position is that of the anchor plus its depth."""
        count: Ids = self.mask.sum(1, dtype=np.int64)
        return count - 1

    @cached_property
    def children(self) -> list[list[int]]:
        """The nodes that continue each node, in their order in the tree."""
        found: list[list[int]] = [[] for _ in range(len(self))]
        for node, parent in enumerate(self.parent.tolist()[1:], 1):
            found[parent].append(node)
        return found

    def cut(self, count: int) -> Tree:
        """The first ``count`` nodes, which are a tree, since parents come first."""
        return self if count >= len(self) else Tree(self.tokens[:count], self.parent[:count])

    def path(self, node: int) -> list[int]:
        """The nodes from the anchor's child down to ``node``; none for the anchor itself."""
        found = []
        while node > 0:
            found.append(node)
            node = int(self.parent[node])
        return found[::-1]


@dataclass(frozen=True, eq=False)
class Batch:
    """The trees of several texts, as a step takes them.

    Attributes:
        mask: bool ``[batch, nodes, nodes]``, of each tree its ``mask``; what pads a smaller one sees itself alone.
        depth: int64 ``[batch, nodes]``; what pads is deeper than anything it sees, so that it is never accepted.
        parent: int64 ``[batch, nodes]``; that of the anchor is the anchor.
    """

    mask: NDArray[np.bool_]
    depth: Ids
    parent: Ids

    @classmethod
    def of(cls, trees: Sequence[Tree], width: int) -> Batch:
        """Trees of at most ``width`` nodes."""
        mask = np.broadcast_to(np.eye(width, dtype=bool), (len(trees), width, width)).copy()
        depth, parent = np.full((len(trees), width), 2), np.zeros((len(trees), width), np.int64)
        for text, tree in enumerate(trees):
            count = len(tree)
            mask[text, :count, :count] = tree.mask
            depth[text, :count] = tree.depth
            parent[text, 1:count] = tree.parent[1:]
        return cls(mask, depth, parent)

    @classmethod
    def chains(cls, texts: int, width: int) -> Batch:
        """Tokens one after the other, for each text."""
        mask = np.broadcast_to(np.tri(width, dtype=bool), (texts, width, width)).copy()
        depth = np.broadcast_to(np.arange(width), (texts, width)).copy()
        return cls(mask, depth, np.maximum(depth - 1, 0))


class Grower:
    """Makes a tree node by node: a token that a parent has already is the node that it has, and a budget is kept."""

    def __init__(self, anchor: int, budget: int) -> None:
        self.tokens = [anchor]
        self.parent = [-1]
        self._budget = budget
        self._known: dict[tuple[int, int], int] = {}

    @property
    def left(self) -> int:
        """How many nodes may be added."""
        return self._budget - len(self.tokens)

    def add(self, parent: int, token: int) -> int | None:
        """The child of ``parent`` that carries ``token``; None where it is new and the budget is spent."""
        node = self._known.get((parent, token))
        if node is not None or len(self.tokens) >= self._budget:
            return node
        node = self._known[parent, token] = len(self.tokens)
        self.tokens.append(token)
        self.parent.append(parent)
        return node

    def tree(self) -> Tree:
        """What was added so far."""
        return Tree(np.array(self.tokens, np.int64), np.array(self.parent, np.int64))


def walk(tree: Tree, chosen: Sequence[int] | Ids) -> list[int]:
    """The accepted nodes, from the anchor's child on.

    The token after the last of them, or after the anchor where there is none, is ``chosen`` at that node.

    Args:
        tree: whose siblings carry distinct tokens.
        chosen: ``[nodes]``, the token that the model puts after each node: its argmax, or one draw per node. A draw
            per path instead would give a node several chances and change the law.
    """
    tokens, parent, wanted = tree.tokens.tolist(), tree.parent.tolist(), np.asarray(chosen).tolist()
    node, found = 0, []
    for child in range(1, len(tokens)):  # in one go: the children of a node come after it
        if parent[child] == node and tokens[child] == wanted[node]:
            node = child
            found.append(child)
    return found


def checked(tree: object, vocabulary: int, *, anchor: int | None = None) -> Tree:
    """The tree, if it is one that may be verified.

    Args:
        tree: what a drafter returned.
        vocabulary: how many token ids there are.
        anchor: the last committed token, which node 0 must carry.

    Raises:
        OptpassError: it is no tree; says where.
    """
    wrong = _wrong(tree, vocabulary, anchor) if isinstance(tree, Tree) else f"it is a {type(tree).__name__}"
    if wrong or not isinstance(tree, Tree):
        raise OptpassError("draft", f"the draft is not a tree: {wrong}", "mend the drafter, or decode without it")
    return tree


def _wrong(tree: Tree, vocabulary: int, anchor: int | None) -> str:
    array: Any
    for name, array in (("tokens", tree.tokens), ("parent", tree.parent)):
        if not isinstance(array, np.ndarray) or array.dtype != np.int64 or array.ndim != 1:
            kind = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            return f"{name} is {kind}, not int64[nodes]"
    tokens, parent = tree.tokens, tree.parent
    if len(tokens) != len(parent) or not len(tokens):
        return f"{len(tokens)} tokens and {len(parent)} parents"
    outside = (tokens < 0) | (tokens >= vocabulary)
    if outside.any():
        return f"node {outside.argmax()} carries token {tokens[outside.argmax()]} of a vocabulary of {vocabulary}"
    if anchor is not None and tokens[0] != anchor:
        return f"its anchor is token {tokens[0]}, the last committed one is {anchor}"
    if parent[0] != -1:
        return f"the parent of the anchor is {parent[0]}, not -1"
    late = (parent[1:] < 0) | (parent[1:] >= np.arange(1, len(parent)))
    if late.any():
        return f"the parent of node {late.argmax() + 1} is {parent[late.argmax() + 1]}, not an earlier node"
    keys = parent[1:] * vocabulary + tokens[1:]
    if len(np.unique(keys)) < len(keys):
        return "children of one node carry the same token"
    return ""
