"""A deep spine copied from the text, and wide branches of the model's own successors.

Paper: Goose: Anisotropic Speculation Trees for Training-Free Speculative Decoding (COLM 2026). What is copied is right
far more often than what the table of successors gives, so the one goes deep and the other wide.

Ours: the step's budget caps that of the method, tables stay from one sequence to the next, and the pairs of tokens are
forgotten when they become too many.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optpass.runtime.drafters.base import Drafter, Options
from optpass.runtime.ngrams import Ngrams
from optpass.runtime.trees import Grower, Ids, Tree

Successors = Sequence[tuple[int, float]]


class GooseOptions(Options):
    """Options of ``goose``."""

    node_budget: int = Field(60, ge=1, description="nodes where nothing is copied")
    max_budget: int = Field(100, ge=1, description="nodes where the copy is sure")
    k: int = Field(10, ge=1, description="successors kept of each token")
    min_score: float = Field(0.01, ge=0, le=1, description="least probability of a successor to be drafted")
    max_branch_depth: int = Field(6, ge=1, description="depth below which branches are not extended")
    rho: float = Field(0.5, ge=0, le=1, description="share of the branches that hang on the spine, not on its root")
    ngrams: tuple[int, ...] = Field((5, 4, 3), min_length=1, description="sizes of the n-grams to look up, in tokens")
    max_chain: int = Field(20, ge=1, description="most tokens to copy from one place")
    max_extended_chain: int = Field(100, ge=1, description="most tokens to copy from several places")
    long_match: int = Field(8, ge=1, description="length from which a copy is trusted, in tokens")
    extend_above: float = Field(0.6, ge=0, le=1, description="confidence above which the copy goes on at other places")
    tiers: tuple[float, float, float] = Field(
        (0.15, 0.3, 0.5), description="share of the spine by its acceptance so far"
    )
    tier_bounds: tuple[float, float] = Field((0.2, 0.4), description="acceptance at which the next share holds")
    ema_alpha: float = Field(0.3, gt=0, le=1, description="weight of the last tree in the acceptance so far")
    bigram: bool = Field(True, description="whether successors of pairs of tokens go before those of one")
    max_bigrams: int = Field(1 << 18, ge=1, description="pairs of tokens to remember")


class Table:
    """The likeliest successors of each token, and of each pair of tokens, as the model last gave them."""

    def __init__(self, vocabulary: int, k: int, pairs: int) -> None:
        self._vocabulary, self._k, self._most = vocabulary, k, pairs
        # Rows of single tokens, then of pairs in the order they came: 80 bytes a row at k = 10.
        self._ids = np.full((vocabulary, k), -1, np.int32)
        self._scores = np.zeros((vocabulary, k), np.float32)
        self._pairs: dict[int, int] = {}

    def learn(self, tokens: Ids, previous: Ids, candidates: Ids, scores: NDArray[np.floating[Any]]) -> None:
        """Keep what the engine gave; the last row about a token or a pair counts."""
        count = min(self._k, candidates.shape[1])
        self._set(tokens, candidates[:, :count], scores[:, :count])
        known = previous >= 0
        if self._most and known.any():
            rows = self._rows((previous[known] * self._vocabulary + tokens[known]).tolist())
            self._set(np.array(rows), candidates[known, :count], scores[known, :count])

    def successors(self, previous: int, token: int, least: float) -> Successors:
        """Tokens with a score of ``least`` or more, best first; those of the pair where it is known."""
        row = self._pairs.get(previous * self._vocabulary + token, token)
        return [
            (successor, score)
            for successor, score in zip(self._ids[row].tolist(), self._scores[row].tolist(), strict=True)
            if score >= least and successor >= 0
        ]

    def _set(self, rows: Ids, candidates: Ids, scores: NDArray[np.floating[Any]]) -> None:
        count = candidates.shape[1]
        self._ids[rows, :count], self._scores[rows, :count] = candidates, scores
        self._ids[rows, count:] = -1

    def _rows(self, keys: list[int]) -> list[int]:
        pairs, first = self._pairs, self._vocabulary
        if len(pairs) + len(keys) > self._most:
            pairs.clear()
        rows = [pairs.setdefault(key, first + len(pairs)) for key in keys]
        missing = first + len(pairs) - len(self._ids)
        if missing > 0:
            more = max(missing, len(self._ids) - first, 1024)
            self._ids = np.concatenate([self._ids, np.full((more, self._k), -1, np.int32)])
            self._scores = np.concatenate([self._scores, np.zeros((more, self._k), np.float32)])
        return rows


class Goose(Drafter):
    """The spine, the branches, and what they are made of."""

    name, options_type = "goose", GooseOptions

    def __init__(self, vocabulary: int, options: Options) -> None:
        super().__init__(vocabulary, options)
        self._table = Table(vocabulary, self.options.k, self.options.max_bigrams if self.options.bigram else 0)

    def begin(self, tokens: Ids) -> None:
        self._ngrams = Ngrams(self.options.ngrams)
        self._acceptance = 0.5
        self._spine = 0
        self.commit(tokens)

    def commit(self, tokens: Ids) -> None:
        self._ngrams.extend(tokens.tolist())

    def observe(self, tokens: Ids, previous: Ids, candidates: Ids, scores: NDArray[np.floating[Any]]) -> None:
        self._table.learn(tokens, previous, candidates, scores)

    def accepted(self, tree: Tree, path: Sequence[int]) -> None:
        spine = min(self._spine, len(tree) - 1)
        if spine:
            right = sum(node <= spine for node in path)
            self._acceptance += self.options.ema_alpha * (right / spine - self._acceptance)

    def draft(self, budget: int) -> Tree:
        options, text = self.options, self._ngrams.text
        chain, confidence = self._chain(budget - 1)
        most = min(budget, options.max_budget)
        base = min(options.node_budget, most)
        nodes = base + int(confidence * (most - base))
        grower = Grower(text[-1], nodes)
        roots = self._table.successors(text[-2] if len(text) > 1 else -1, text[-1], options.min_score)
        if not roots:
            self._spine = len(chain)
            return Tree.chain(text[-1], chain)
        share = options.tiers[sum(self._acceptance >= bound for bound in options.tier_bounds)]
        self._spine = min(len(chain), int(nodes * (share + confidence * (1 - share))), nodes - 1)
        for node, token in enumerate(chain[: self._spine]):
            grower.add(node, token)
        self._branch(grower, chain, roots)
        return grower.tree()

    def _chain(self, most: int) -> tuple[list[int], float]:
        """Up to ``most`` tokens that may come next, and how sure they are, from 0 to 1."""
        options, text = self.options, self._ngrams.text
        match = self._ngrams.find(text[-self._ngrams.longest :])
        if match is None or not most:
            return [], 0.0
        chain = text[match.start : match.start + options.max_chain]
        confidence = self._confidence(len(chain), match.agreed)
        if confidence > options.extend_above:
            limit = min(int(options.max_extended_chain * confidence), most)
            while len(chain) < limit:
                tail = (text[-self._ngrams.longest :] + chain)[-self._ngrams.longest :]
                further = self._ngrams.find(tail)
                if further is None or (confidence == 1 and not further.agreed):
                    break
                chain += text[further.start : further.start + min(options.max_chain, limit - len(chain))]
        return chain[:most], confidence

    def _confidence(self, length: int, agreed: bool) -> float:
        long: int = self.options.long_match
        if agreed:
            return 1.0
        if length >= long:
            return min(0.9, 0.7 + 0.2 * (length - long) / 12)
        return 0.6 * length / long

    def _branch(self, grower: Grower, chain: list[int], roots: Successors) -> None:
        """Hang successors on the root and on the spine, then on those: what is left of the budget."""
        options, spine = self.options, self._spine
        before = grower.tokens[0]
        on_spine = max(1, int(grower.left * options.rho)) if spine and grower.left else 0
        line: deque[tuple[int, float, int]] = deque()  # node, its score, its depth
        self._hang(grower, line, 0, 0, roots, grower.left - on_spine, chain[0] if spine else -1)
        weights = sum(1 / place for place in range(1, spine + 1))
        left = on_spine
        for place in range(1, spine + 1):
            if not left:
                break
            token, skipped = chain[place - 1], chain[place] if place < spine else -1
            share = min(left, max(1, int(on_spine / place / weights)))
            found = self._table.successors(before, token, options.min_score)
            left -= self._hang(grower, line, place, place, found, share, skipped)
            before = token
        while line and grower.left:
            node, score, depth = line.popleft()
            if depth >= options.max_branch_depth:
                continue
            token, above = grower.tokens[node], grower.tokens[grower.parent[node]]
            found = self._table.successors(above, token, options.min_score)
            width = max(1, min(len(found), math.ceil(grower.left * score)))
            self._hang(grower, line, node, depth, found, min(width, max(1, options.k // depth)), -1)

    def _hang(
        self,
        grower: Grower,
        line: deque[tuple[int, float, int]],
        parent: int,
        depth: int,
        found: Successors,
        most: int,
        skipped: int,
    ) -> int:
        """Add up to ``most`` children that are not ``skipped``, and put them in line; how many there were."""
        added = 0
        for token, score in found:
            if added >= most or not grower.left:
                break
            if token != skipped:
                node = grower.add(parent, token)
                if node is not None:
                    line.append((node, score, depth + 1))
                    added += 1
        return added
