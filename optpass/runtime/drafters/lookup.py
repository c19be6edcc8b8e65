"""Copy what came after the same n-gram before.

Paper: Prompt Lookup Decoding (apoorvumang/prompt-lookup-decoding), as ``PromptLookupCandidateGenerator`` of Hugging
Face transformers has it: the longest n-gram first, its first place in the text.
"""

from __future__ import annotations

from pydantic import Field

from optpass.runtime.drafters.base import Drafter, Options
from optpass.runtime.ngrams import Ngrams
from optpass.runtime.trees import Ids, Tree


class LookupOptions(Options):
    """Options of ``lookup``."""

    ngram: int = Field(2, ge=1, description="longest n-gram of the end of the text to look for, in tokens")
    tokens: int = Field(10, ge=1, description="most tokens to copy")
    whole: bool = Field(False, description="take only places that have all these tokens after them, as the original")


class Lookup(Drafter):
    """A chain that was in the text before."""

    name, options_type = "lookup", LookupOptions

    def begin(self, tokens: Ids) -> None:
        self._ngrams = Ngrams(range(1, self.options.ngram + 1))
        self.commit(tokens)

    def commit(self, tokens: Ids) -> None:
        self._ngrams.extend(tokens.tolist())

    def draft(self, budget: int) -> Tree:
        start, text = self._start(), self._ngrams.text
        return Tree.chain(text[-1], text[start : start + min(self.options.tokens, budget - 1)])

    def _start(self) -> int:
        """Index of the first token to copy; the end of the text where there is none."""
        text, wanted = self._ngrams.text, self.options.tokens
        tail = text[-self.options.ngram :]
        while tail:
            match = self._ngrams.find(tail)
            if match is None:
                break
            # The original wants all tokens, and a match that does not run into the end of the text it is looked up by.
            if not self.options.whole or match.start <= len(text) - max(wanted, match.size + 1):
                return match.start
            tail = tail[len(tail) - match.size + 1 :]
        return len(text)
