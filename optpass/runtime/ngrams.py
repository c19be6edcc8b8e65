"""Where a text had each n-gram before: kept up token by token, so that a step asks without a look at the text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Match:
    """The first place of an n-gram that has a next token.

    Attributes:
        start: index of that next token.
        size: n.
        agreed: whether the n-gram came twice or more, and the same token next each time.
    """

    start: int
    size: int
    agreed: bool


class Ngrams:
    """A text, and the n-grams of some sizes in it."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self.text: list[int] = []
        self._sizes = sorted(set(sizes), reverse=True)
        self._first: dict[tuple[int, ...], int] = {}
        self._agreed: dict[tuple[int, ...], bool] = {}

    @property
    def longest(self) -> int:
        """The largest size."""
        return self._sizes[0]

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens; only then do the n-grams before each of them have a next token."""
        text, first, agreed = self.text, self._first, self._agreed
        for token in tokens:
            end = len(text)
            for size in self._sizes:
                if size > end:
                    continue
                key = tuple(text[end - size :])
                start = first.setdefault(key, end)
                if start != end:
                    agreed[key] = agreed.get(key, True) and text[start] == token
            text.append(token)

    def find(self, tail: Sequence[int]) -> Match | None:
        """The match of the longest n-gram that ends ``tail`` and is known."""
        for size in self._sizes:
            if size <= len(tail):
                key = tuple(tail[-size:])
                start = self._first.get(key)
                if start is not None:
                    return Match(start, size, self._agreed.get(key, False))
        return None
