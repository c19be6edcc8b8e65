"""No guesses: every step is a plain one."""

from __future__ import annotations

from optpass.runtime.drafters.base import Drafter
from optpass.runtime.trees import Ids, Tree


class Plain(Drafter):
    """The anchor alone."""

    name = "plain"

    def begin(self, tokens: Ids) -> None:
        self._anchor = int(tokens[-1])

    def commit(self, tokens: Ids) -> None:
        if len(tokens):
            self._anchor = int(tokens[-1])

    def draft(self, budget: int) -> Tree:
        return Tree.of(self._anchor)
