"""A table of the successors that the model itself gave to each token, and a tree of fixed form filled from it.

Paper: Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling, arXiv
2408.08696. Its tree is a list found by search; here it follows a rule, for any number of nodes.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optpass.runtime.drafters.base import Drafter, Options
from optpass.runtime.trees import Ids, Tree


class RecyclingOptions(Options):
    """Options of ``recycling``."""

    k: int = Field(8, ge=1, description="successors kept of each token")
    ratio: float = Field(0.5, gt=0, lt=1, description="how much likelier each successor is than the next in rank")


class Template:
    """The form of the tree: node i of it is the i-th likeliest to be right, so that every part from the start is best.

    The successor of rank r is right with probability ``(1 - ratio) * ratio ** r``, a node with the product of those on
    its path.

    Attributes:
        parent: int64 ``[nodes]``; rank: int64 ``[nodes]``, 0 at the anchor, which has none.
        levels: the nodes of each depth from 1 on.
    """

    def __init__(self, nodes: int, k: int, ratio: float) -> None:
        parents, ranks, depths = [-1], [0], [0]
        # Next in line are the first child and the next sibling of what was taken, so the line stays short.
        line = [(-(1 - ratio), 0, 0)]
        while len(parents) < nodes:
            value, parent, rank = heapq.heappop(line)
            node = len(parents)
            parents.append(parent)
            ranks.append(rank)
            depths.append(depths[parent] + 1)
            heapq.heappush(line, (value * (1 - ratio), node, 0))
            if rank + 1 < k:
                heapq.heappush(line, (value * ratio, parent, rank + 1))
        self.parent, self.rank = np.array(parents, np.int64), np.array(ranks, np.int64)
        depth = np.array(depths)
        self.levels = [np.flatnonzero(depth == level) for level in range(1, depth.max() + 1)]


class Recycling(Drafter):
    """The table, kept from one sequence to the next, and the tree."""

    name, options_type = "recycling", RecyclingOptions

    def __init__(self, vocabulary: int, options: Options) -> None:
        super().__init__(vocabulary, options)
        self._table = np.full((vocabulary, self.options.k), -1, np.int32)
        self._templates: dict[int, Template] = {}

    def begin(self, tokens: Ids) -> None:
        self._anchor = int(tokens[-1])

    def commit(self, tokens: Ids) -> None:
        if len(tokens):
            self._anchor = int(tokens[-1])

    def observe(self, tokens: Ids, previous: Ids, candidates: Ids, scores: NDArray[np.floating[Any]]) -> None:
        count = min(self.options.k, candidates.shape[1])
        self._table[tokens, :count] = candidates[:, :count]
        self._table[tokens, count:] = -1

    def draft(self, budget: int) -> Tree:
        template = self._templates.get(budget)
        if template is None:
            template = self._templates[budget] = Template(budget, self.options.k, self.options.ratio)
        tokens = np.full(budget, -1, np.int64)
        tokens[0] = self._anchor
        for nodes in template.levels:
            above = tokens[template.parent[nodes]]
            # The row of no token is that of the last one in the table: what it gives is dropped.
            tokens[nodes] = np.where(above < 0, -1, self._table[above, template.rank[nodes]])
        kept = tokens >= 0
        if kept.all():
            return Tree(tokens, template.parent)
        place = np.cumsum(kept) - 1
        parent = place[template.parent[kept]]
        parent[0] = -1
        return Tree(tokens[kept], parent)
