"""A language model that is a table, and the loop of a driver around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from optpass.runtime.drafters.base import Drafter, successors
from optpass.runtime.pace import Pace
from optpass.runtime.sampling import Sampling, accept_tree, draw
from optpass.runtime.trees import Tree, checked


class Model:
    """The logits of a token depend on the two before it, and now and then on where it stands."""

    def __init__(self, vocabulary: int, seed: int, period: int = 23) -> None:
        self.vocabulary, self.period = vocabulary, period
        self._table = np.random.default_rng(seed).normal(0, 2, (vocabulary, vocabulary, vocabulary))

    def logits(self, text: Sequence[int]) -> NDArray[np.float64]:
        before, last = (text[-2] if len(text) > 1 else 0), text[-1]
        return np.roll(self._table[before, last], int(len(text) % self.period == 0))

    def rows(self, text: Sequence[int], tree: Tree) -> NDArray[np.float64]:
        """The logits after the text, whose last token is the anchor, and the path to each node."""
        return np.stack([self.logits([*text, *tree.tokens[tree.path(node)].tolist()]) for node in range(len(tree))])


@dataclass
class Decoded:
    tokens: list[int]
    steps: int = 0
    sizes: list[int] = field(default_factory=list)


def plain(model: Model, prompt: Sequence[int], count: int, sampling: Sampling) -> list[int]:
    generator, text = sampling.generator(), list(prompt)
    for _ in range(count):
        text.append(int(draw(model.logits(text)[None], sampling, generator)[0]))
    return text[len(prompt) :]


def drafted(
    model: Model, drafter: Drafter, prompt: Sequence[int], count: int, budget: int | Pace, sampling: Sampling
) -> Decoded:
    generator, text, found = sampling.generator(), list(prompt), Decoded([])
    drafter.begin(np.array(prompt, np.int64))
    rows = np.stack([model.logits(text[: end + 1]) for end in range(len(text))])
    drafter.observe(np.array(text), np.array([-1, *text[:-1]]), *successors(rows, 4))
    while len(text) < len(prompt) + count:
        offered = budget.offer() if isinstance(budget, Pace) else budget
        tree = checked(drafter.draft(offered), model.vocabulary, anchor=text[-1])
        assert len(tree) <= offered
        rows = model.rows(text, tree)
        path, last = accept_tree(tree, rows, sampling, generator)
        before = np.where(tree.parent < 0, text[-2] if len(text) > 1 else -1, tree.tokens[tree.parent])
        drafter.observe(tree.tokens, before, *successors(rows, 4))
        drafter.accepted(tree, path)
        new = np.array([*tree.tokens[path], last], np.int64)
        drafter.commit(new)
        text += new.tolist()
        found.steps += 1
        found.sizes.append(len(tree))
        if isinstance(budget, Pace):
            budget.took(len(tree), 1 + 0.05 * (len(tree) - 1))
            budget.gained(len(tree), path)
    found.tokens = text[len(prompt) :][:count]
    return found
