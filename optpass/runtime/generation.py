"""One generation: from the prompts to the last token, a step at a time, with or without drafts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from optpass.runtime.drafters.base import Drafter
from optpass.runtime.engines.base import Array
from optpass.runtime.kept import ACCEPTED, CANDIDATES, ORDER, PIECE, TOKEN, everyone
from optpass.runtime.sampling import Sampling, accept_tree, draw
from optpass.runtime.trees import Batch, Tree, checked

if TYPE_CHECKING:
    from optpass.runtime.generate import Generator

AHEAD = 128
"""Most tokens that room is made for in advance: engines prepare themselves for each size, empty rows cost little."""


@dataclass
class Progress:
    """What a generation did, as ``Generator.last`` tells of the last one.

    Attributes:
        steps: of the engine, the prompt aside.
        tokens: that came of them, in all texts.
        lengths: of each step and each text that went on, the tokens that came of it.
        fallback: why drafting was given up, if it was.
    """

    steps: int = 0
    tokens: int = 0
    lengths: list[int] = field(default_factory=list)
    fallback: str = ""


class Generation:
    """One generation, from the prompts to the last token."""

    def __init__(
        self,
        model: Generator,
        prompts: list[Array],
        tokens: int,
        sampling: Sampling,
        stops: list[tuple[int, ...]],
        drafters: list[Drafter],
        nodes: int | None,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.count = tokens
        self.left = [tokens] * len(prompts)
        self.sampling = sampling
        # one for each text, so that a text does not depend on those beside it, nor on what was drafted
        self.random = [np.random.default_rng((sampling.seed, text)) for text in range(len(prompts))]
        self.stops = stops
        self.longest = max(map(len, stops), default=0)
        self.tails = [prompt.tolist()[-1:] for prompt in prompts]
        self.drafters = drafters
        self.nodes = nodes
        self.pace = model.pace(len(prompts), drafters)
        self.kept = model.start(len(prompts), min(tokens, AHEAD))
        self.logits = model.outputs[0].name
        self.in_graph = model.verifies and sampling.greedy
        self.wanted = [TOKEN, ORDER, ACCEPTED] if self.in_graph else [self.logits, ORDER]
        self.learns = any(type(drafter).observe is not Drafter.observe for drafter in drafters)
        self.first = np.zeros((len(prompts), 1), np.int64)
        self.alone = Batch.chains(len(prompts), 1)
        self.waiting: list[list[int]] = [[] for _ in prompts]
        self.progress = model.last = Progress()

    def tokens(self) -> Iterator[list[list[int]]]:
        """The tokens of each step."""
        if not any(self.left):
            return
        anchors = self._prefill()
        yield [self._committed(text, [anchor]) for text, anchor in enumerate(anchors)]
        while any(self.left):
            begin = time.perf_counter()
            budget = self._budget()
            trees = [self._tree(text, anchor, budget) for text, anchor in enumerate(anchors)] if budget > 1 else []
            width = max(map(len, trees), default=1)
            paths, ends = self._verify(trees, width) if trees else self._plain(anchors)
            new: list[list[int]] = [[] for _ in anchors]
            for text, path in enumerate(paths):
                if self.left[text]:
                    anchors[text] = ends[text]
                    drafted = trees[text].tokens[path].tolist() if path else []
                    new[text] = self._committed(text, [*drafted, ends[text]])
                    self.progress.lengths.append(len(new[text]))
                    if self.drafters and trees:
                        self.drafters[text].accepted(trees[text], path)
                    if self.drafters:
                        self.pace.gained(len(trees[text]) if trees else 1, path)
            self.progress.steps += 1
            if self.drafters:
                self.pace.took(width, time.perf_counter() - begin)
            yield new

    def _budget(self) -> int:
        """Nodes of the next step."""
        if not self.drafters or max(self.left) <= 1:
            return 1
        return min(self.nodes if self.nodes is not None else self.pace.offer(), PIECE)

    def _plain(self, anchors: list[int]) -> tuple[list[list[int]], list[int]]:
        """A step of one token for each text: as with trees of nothing but an anchor, and with less to do."""
        tokens = np.array(anchors, np.int64)[:, None]
        results = self.model.step(self.kept, tokens, self.first, self.alone, self.wanted)
        self.kept.append(results, np.array([bool(left) for left in self.left], np.int64))
        if self.in_graph:
            return [[] for _ in anchors], results[TOKEN][:, 0].tolist()
        rows = results[self.logits]
        return [[] for _ in anchors], [
            int(draw(rows[text], self.sampling, self.random[text])[0]) if self.left[text] else 0
            for text in range(len(anchors))
        ]

    def _prefill(self) -> list[int]:
        """Keep the prompts; the first new token of each."""
        observing = self.learns and CANDIDATES[0] in self.model._names
        for drafter, prompt in zip(self.drafters, self.prompts, strict=False):
            drafter.begin(prompt)
        wanted = [self.logits, *(CANDIDATES if observing else ())]
        ends = [self.model.begin(self.kept, prompt, text) for text, prompt in enumerate(self.prompts)]
        rest = [prompt if end is None else prompt[:0] for prompt, end in zip(self.prompts, ends, strict=True)]
        for start, results, counts in self.model.feed(self.kept, rest, last=not observing, wanted=wanted):
            for text, count in enumerate(counts.tolist()):
                if count and start + count == len(self.prompts[text]):
                    ends[text] = results[self.logits][text, count - 1 if observing else 0]
                if count and observing:
                    piece = self.prompts[text][start : start + count]
                    before = self.prompts[text][start - 1 : start] if start else np.array([-1])
                    self._observe(text, piece, np.concatenate([before, piece[:-1]]), results)
        last = np.stack([end for end in ends if end is not None])
        return [int(draw(last[text : text + 1], self.sampling, self.random[text])[0]) for text in range(len(last))]

    def _observe(self, text: int, tokens: Array, before: Array, results: dict[str, Array]) -> None:
        if CANDIDATES[0] in results:
            best, logits = (results[name][text, : len(tokens)] for name in CANDIDATES)
            scores = np.exp(logits - logits[:, :1])
            self.drafters[text].observe(tokens, before, best, scores / scores.sum(-1, keepdims=True))

    def _tree(self, text: int, anchor: int, budget: int) -> Tree:
        """What to verify of a text: never deeper than what may still come of it."""
        alone = Tree.of(anchor)
        if not self.drafters or self.left[text] <= 1:
            return alone
        drafter = self.drafters[text]
        try:
            drafter.commit(np.array(self.waiting[text], np.int64))
            self.waiting[text] = []
            tree = checked(drafter.draft(budget), self.model.vocabulary, anchor=anchor)
        except Exception as error:  # noqa: BLE001 - a drafter may be anyone's, and the text does not depend on it
            self.progress.fallback = next(iter(str(error).splitlines()), type(error).__name__)
            self.drafters = []
            return alone
        return _shallow(tree.cut(budget), self.left[text] - 1)

    def _verify(self, trees: list[Tree], width: int) -> tuple[list[list[int]], list[int]]:
        """Run the trees of all texts in one step and keep the accepted rows; the paths, and the token after each."""
        tokens = np.zeros((len(trees), width), np.int64)
        for text, tree in enumerate(trees):
            tokens[text, : len(tree)] = tree.tokens
        wanted = [*self.wanted, *CANDIDATES] if self.learns else self.wanted
        results = self.model.step(self.kept, tokens, everyone(tokens), Batch.of(trees, width), wanted)
        paths: list[list[int]] = []
        ends: list[int] = []
        for text, tree in enumerate(trees):
            if self.in_graph:
                path = results[ORDER][text, : results[ACCEPTED][text]].tolist()
                paths.append(path[1:])
                ends.append(int(results[TOKEN][text, path[-1]]))
            else:
                rows = results[self.logits][text, : len(tree)]
                path, end = accept_tree(tree, rows, self.sampling, self.random[text])
                paths.append(path)
                ends.append(end)
            if self.learns and self.drafters and self.left[text]:
                before = np.where(tree.parent >= 0, tree.tokens[tree.parent], self.tails[text][-2])
                self._observe(text, tree.tokens, before, results)
        counts = np.array([1 + len(path) if self.left[text] else 0 for text, path in enumerate(paths)], np.int64)
        self.kept.append(results, counts, self._rows(results, paths))
        return paths, ends

    def _rows(self, results: dict[str, Array], paths: list[list[int]]) -> list[list[int]] | None:
        """Where the rows of the anchors and paths lie; None where the graph has put them in front."""
        nodes = [[0, *path] for path in paths]
        if self.kept.in_place:
            return nodes
        if self.in_graph:
            return None
        # drawn paths are not those that the graph has found for its own
        places = np.argsort(results[ORDER], 1)
        return [places[text, path].tolist() for text, path in enumerate(nodes)]

    def _committed(self, text: int, tokens: list[int]) -> list[int]:
        """The tokens up to the end of the text, which a stop sequence or the number of tokens decides."""
        taken: list[int] = []
        made = self.count - self.left[text]
        for token in tokens[: self.left[text]]:
            taken.append(token)
            self.left[text] -= 1
            self.tails[text] = [*self.tails[text], token][-max(self.longest, 2) :]
            made += 1
            if any(len(stop) <= made and tuple(self.tails[text][-len(stop) :]) == stop for stop in self.stops):
                self.left[text] = 0
                break
        self.progress.tokens += len(taken)
        # a drafter is told when it is asked again: where drafting does not pay, it costs nothing
        self.waiting[text] += taken if self.drafters else []
        return taken


def _shallow(tree: Tree, depth: int) -> Tree:
    """The nodes down to a depth."""
    if int(tree.depth.max()) <= depth:
        return tree
    keep = np.flatnonzero(tree.depth <= depth)
    place = np.full(len(tree) + 1, -1)
    place[keep] = np.arange(len(keep))
    return Tree(tree.tokens[keep], place[tree.parent[keep]])
