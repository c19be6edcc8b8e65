"""A small language model as the drafter: another artifact with the same tokens, decoded greedily ahead of the text.

Paper: Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192. Here the draft is the likeliest
text, not a draw, so that one accept rule serves all drafters.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from optpass.errors import OptpassError
from optpass.runtime.drafters.base import Drafter, Options
from optpass.runtime.session import load
from optpass.runtime.trees import Ids, Tree


class ModelOptions(Options):
    """Options of ``model``."""

    artifact: str = Field(description="directory of an artifact that optimize wrote with cache")
    engine: str | None = Field(None, description="id of an engine in it; the fastest by default")
    threads: int | None = Field(None, description="cores for one call; all by default")
    tokens: int = Field(4, ge=1, description="the most tokens of a draft: each takes a step of the small model")


class Model(Drafter):
    """Drafts what a smaller model would say."""

    name = "model"
    options_type = ModelOptions

    def __init__(self, vocabulary: int, options: Options) -> None:
        super().__init__(vocabulary, options)
        from optpass.runtime.generate import Generator  # which knows of drafters

        session = load(self.options.artifact, engine=self.options.engine, threads=self.options.threads)
        if not isinstance(session, Generator):
            what = f"{self.options.artifact} does not continue texts"
            raise OptpassError("drafter", what, "optimize the small model with --passes cache")
        if session.vocabulary != vocabulary:
            what = f"the small model has {session.vocabulary} tokens, the large one {vocabulary}"
            raise OptpassError("drafter", what, "use models that share a tokenizer")
        self.session = session

    def begin(self, tokens: Ids) -> None:
        self.kept = self.session.start()
        self.waiting = tokens

    def commit(self, tokens: Ids) -> None:
        self.waiting = np.concatenate([self.waiting, tokens])

    def draft(self, budget: int) -> Tree:
        anchor = int(self.waiting[-1])
        room = self.session.context - int(self.kept.position[0]) - len(self.waiting)
        count = min(budget - 1, self.options.tokens, room)
        if count < 1:
            return Tree.of(anchor)
        drafted = [self._likeliest(self.waiting)]
        committed = self.kept.position.copy()
        while len(drafted) < count:
            drafted.append(self._likeliest(np.array(drafted[-1:])))
        # the anchor comes again with what is committed next, so that there is always a token to go on from
        self.kept.rollback(committed - 1)
        self.waiting = self.waiting[-1:]
        return Tree.chain(anchor, drafted)

    def _likeliest(self, tokens: Ids) -> int:
        """Keep tokens; what the small model would say behind them."""
        name = self.session.outputs[0].name
        last = None
        for _, results, _ in self.session.feed(self.kept, [tokens], last=True, wanted=[name]):
            last = results[name][0, -1]
        assert last is not None
        return int(last.argmax())
