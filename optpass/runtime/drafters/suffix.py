"""Copy what came after the longest end of the text that was there before.

Paper: SAM Decoding: Speculative Decoding via Suffix Automaton, arXiv 2411.10666. Theirs falls back to another drafter
where no match is long enough; here that is a plain step.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field

from optpass.runtime.drafters.base import Drafter, Options
from optpass.runtime.trees import Ids, Tree


class SuffixOptions(Options):
    """Options of ``suffix``."""

    tokens: int = Field(40, ge=1, description="most tokens to copy")
    threshold: int = Field(5, ge=1, description="shortest match to copy from, in tokens")
    corpus: tuple[int, ...] = Field((), repr=False, description="token ids of a text to copy from besides the own one")
    bias: int = Field(5, ge=0, description="how much longer a match in the corpus must be than one in the own text")


class Automaton:
    """The suffix automaton of a growing text, with the first place where the strings of each state end.

    A state stands for strings that end at the same places; ``link`` leads to the state of their longest end that has
    more of them. State 0 is the empty string. About half a kilobyte per token, and constant time on average.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.text: list[int] = []
        self.length = [0]
        self.link = [-1]
        self.end = [0]
        self._next: list[dict[int, int]] = [{}]
        self._last = 0
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Lengthen the text by one token."""
        self.text.append(token)
        new = self._state(len(self.text), 0, len(self.text), {})
        state, self._last = self._last, new
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self.link[state]
        if state < 0:
            return
        known = self._next[state][token]
        if self.length[known] > self.length[state] + 1:
            known = self._split(known, state, token)
        self.link[new] = known

    def repeated(self) -> int:
        """The state of the longest end of the text that is in it at an earlier place too."""
        return max(self.link[self._last], 0)

    def follow(self, state: int, length: int, token: int) -> tuple[int, int]:
        """From a match of ``length`` tokens in ``state`` to the longest one that ends with one token more."""
        while state and token not in self._next[state]:
            state = self.link[state]
            length = self.length[state]
        found = self._next[state].get(token)
        return (0, 0) if found is None else (found, length + 1)

    def copy(self, state: int, count: int, threshold: int) -> list[int]:
        """Up to ``count`` tokens that came after the strings of a state, at their first place.

        Where that is too near to the end of the text for all of them, shorter strings of at least ``threshold`` tokens
        may have an earlier one.
        """
        while len(self.text) - self.end[state] < count and self.length[self.link[state]] >= threshold:
            state = self.link[state]
        return self.text[self.end[state] : self.end[state] + count]

    def _split(self, known: int, state: int, token: int) -> int:
        """Give the shorter strings of a state, which end at one more place from now on, a state of their own."""
        own = self._state(self.length[state] + 1, self.link[known], self.end[known], self._next[known].copy())
        self.link[known] = own
        while state >= 0 and self._next[state].get(token) == known:
            self._next[state][token] = own
            state = self.link[state]
        return own

    def _state(self, length: int, link: int, end: int, following: dict[int, int]) -> int:
        self.length.append(length)
        self.link.append(link)
        self.end.append(end)
        self._next.append(following)
        return len(self.length) - 1


class Suffix(Drafter):
    """A chain after the longest match, in the own text or in a corpus."""

    name, options_type = "suffix", SuffixOptions

    def __init__(self, vocabulary: int, options: Options) -> None:
        super().__init__(vocabulary, options)
        self._corpus = Automaton(self.options.corpus)

    def begin(self, tokens: Ids) -> None:
        self._own = Automaton()
        self._place = (0, 0)
        self.commit(tokens)

    def commit(self, tokens: Ids) -> None:
        for token in tokens.tolist():
            self._own.append(token)
            self._place = self._corpus.follow(*self._place, token)

    def draft(self, budget: int) -> Tree:
        options, anchor = self.options, self._own.text[-1]
        count = min(options.tokens, budget - 1)
        source, state = self._own, self._own.repeated()
        length = source.length[state]
        if self._place[1] - options.bias > length:
            source, (state, length) = self._corpus, self._place
        if length < options.threshold:
            return Tree.of(anchor)
        return Tree.chain(anchor, source.copy(state, count, options.threshold))
