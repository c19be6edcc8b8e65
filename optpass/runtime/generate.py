"""Texts continued by an engine that keeps keys and values: generation, streaming, scoring; greedy or sampled.

    model = optpass.load("engine/")
    model.generate(ids, max_new_tokens=64)                        # int64 [batch, prompt + new]
    for new in model.stream(ids, max_new_tokens=64): ...          # the tokens of each step, for each text
    model.score(ids)                                              # log-probabilities [batch, tokens - 1]

With an engine that verifies (``speculate``) a drafter proposes a tree of tokens for each step; the tokens that come out
are those that plain decoding gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from optpass.errors import OptpassError
from optpass.results import Accepted
from optpass.runtime.drafters.base import Drafter, create
from optpass.runtime.engines.base import Array, Opened
from optpass.runtime.generation import Generation, Progress
from optpass.runtime.kept import (
    CANDIDATES,
    DEPTH,
    PARENT,
    PICK,
    PIECE,
    PLACE,
    POSITION,
    ROWS,
    TOKEN,
    TREE,
    Kept,
    everyone,
)
from optpass.runtime.manifest import Engine, Manifest, TensorInfo
from optpass.runtime.pace import Pace
from optpass.runtime.sampling import Sampling
from optpass.runtime.session import Session, check_inputs
from optpass.runtime.trees import Batch

Stop = int | Sequence[int]


class Generator(Session):
    """A session that continues texts. A prompt may be padded on either side; each text counts its own tokens."""

    def __init__(
        self,
        manifest: Manifest,
        name: str,
        opened: Opened,
        threads: int,
        prefill: Opened | None = None,
        prompt: Engine | None = None,
    ) -> None:
        super().__init__(manifest, name, opened, threads)
        self._prepare(prefill, prompt)

    def _prepare(self, prefill: Opened | None, prompt: Engine | None) -> None:
        self._prefill, self._prompt = prefill, prompt
        self.last = Progress()
        self._paces: dict[Any, Pace] = {}
        self._given = [info.name for info in self.engine.inputs]
        self._names = [info.name for info in self.engine.outputs]
        self._outputs: dict[tuple[str, ...] | None, tuple[list[int], list[str]]] = {}

    @property
    def raw(self) -> Session:
        """The engine itself, one step at a time."""
        return Session(self.manifest, self.name, self.opened, self.threads)

    # what there is

    @property
    def ids(self) -> TensorInfo:
        """The input of token ids."""
        return self.engine.inputs[0]

    @property
    def inputs(self) -> list[TensorInfo]:
        """The ids alone: the rest is kept here."""
        return [self.ids]

    @property
    def outputs(self) -> list[TensorInfo]:
        """What the model returns for each token."""
        return self.engine.outputs[:1]

    @property
    def context(self) -> int:
        """The most tokens of a text."""
        spare = self.engine.dynamic["tokens"].maximum if self.engine.writes else 0
        return self.engine.dynamic["past_0"].maximum - spare

    @property
    def vocabulary(self) -> int:
        """Tokens there are, by the width of the logits."""
        return int(self.outputs[0].shape[-1])

    @property
    def verifies(self) -> bool:
        """Whether a step takes a tree of tokens."""
        return TREE in self._given

    # steps

    def start(self, batch: int = 1, ahead: int = 0) -> Kept:
        """The state of ``batch`` texts of which nothing is known yet; ``ahead`` as in ``Kept``."""
        return Kept(self.engine.inputs, batch, self.context, ahead)

    def step(
        self, kept: Kept, tokens: Array, pick: Array, tree: Batch | None = None, wanted: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run new tokens on what is kept, without keeping them: ``kept.append`` does that.

        Args:
            kept: the state; an engine that writes in place writes behind what is kept, and nothing else is changed.
            tokens: int64 ``[batch, tokens]``.
            pick: int64 ``[batch, picked]``, which of them the outputs are wanted of.
            tree: which tokens each one continues; one after the other by default.
            wanted: outputs to return beside the new rows; all by default.
        """
        kept.reserve(tokens.shape[1])
        arrays = {self.ids.name: tokens, POSITION: kept.position, PICK: pick, **kept.arrays()}
        if self.verifies:
            tree = tree or Batch.chains(*tokens.shape)
            arrays |= {TREE: tree.mask, DEPTH: tree.depth, PARENT: tree.parent}
        numbers, names = self._asked(None if wanted is None else tuple(wanted))
        results = self.call(self.opened, [arrays[name] for name in self._given], numbers)
        found = dict(zip(names, results, strict=True))
        if PICK not in self._given:
            each = [self.outputs[0].name, TOKEN, *CANDIDATES]
            rows = np.arange(len(tokens))[:, None]
            found = {name: array[rows, pick] if name in each else array for name, array in found.items()}
        return found

    def _asked(self, wanted: tuple[str, ...] | None) -> tuple[list[int], list[str]]:
        """The outputs of a step, by number and by name, of which ``wanted`` and the new rows are asked for."""
        if wanted not in self._outputs:
            names = [n for n in self._names if wanted is None or n in wanted or n.startswith(ROWS)]
            self._outputs[wanted] = [self._names.index(name) for name in names], names
        return self._outputs[wanted]

    def begin(self, kept: Kept, prompt: Array, text: int) -> Array | None:
        """Take the prompt of a text at once, where passes drop tokens of it; the outputs for its last token.

        Args:
            kept: the state, which gets the rows that stay.
            prompt: int64 ``[tokens]``.
            text: which.

        Returns:
            None where no token is dropped of a prompt, or of one so short: ``feed`` takes it.
        """
        if self._prefill is None or self._prompt is None:
            return None
        length = self._prompt.inputs[0].shape[1]
        if isinstance(length, str) and len(prompt) < self._prompt.dynamic[length].minimum:
            return None
        fixed = self.ids.shape[0]
        ids = np.repeat(prompt[None], fixed if isinstance(fixed, int) else 1, 0)
        found = dict(zip((info.name for info in self._prompt.outputs), self.call(self._prefill, [ids]), strict=True))
        places = [found[f"{PLACE}{group}"][0] for group in kept.groups]
        kept.fill(text, found, 0, places, len(prompt))
        return found[self.outputs[0].name][0, -1]  # type: ignore[no-any-return]

    def feed(
        self, kept: Kept, texts: Sequence[Array], *, last: bool = False, wanted: Sequence[str] | None = None
    ) -> Iterator[tuple[int, dict[str, Array], Array]]:
        """Keep the tokens of texts, a piece at a time; yields the first token, the outputs, and the counts of each.

        Args:
            kept: the state, which grows.
            texts: int64 ``[tokens]`` each.
            last: outputs are those of the last token of each text in the piece, not of all.
            wanted: as in ``step``.
        """
        counts = np.array([len(text) for text in texts], np.int64)
        kept.check_room(int(counts.max(initial=0)))
        for start in range(0, int(counts.max(initial=0)), PIECE):
            width = min(PIECE, int(counts.max()) - start)
            here = np.clip(counts - start, 0, width)
            tokens = np.zeros((len(texts), width), np.int64)
            for text, count in enumerate(here.tolist()):
                tokens[text, :count] = texts[text][start : start + count]
            pick = np.maximum(here - 1, 0)[:, None] if last else everyone(tokens)
            results = self.step(kept, tokens, pick, wanted=wanted)
            kept.append(results, here)
            yield start, results, here

    # whole texts

    def run(self, **arrays: Any) -> dict[str, Array]:
        """The outputs for each token of whole texts, as the model without a cache gives them.

        Raises:
            OptpassError: an input is missing, unknown, or not of the dtype, rank or size the engine takes.
        """
        only = self.engine.model_copy(update={"inputs": self.inputs})
        (ids,) = check_inputs(only, arrays)
        self._check_ids(ids)
        name = self.outputs[0].name
        if self._prefill is not None:
            return {name: self.call(self._prefill, [ids], [0])[0]}
        pieces = [results[name] for _, results, _ in self.feed(self.start(len(ids)), list(ids), wanted=[name])]
        return {name: np.concatenate(pieces, 1)}

    def score(self, input_ids: Array) -> Array:
        """Log-probability of each token after those before it, float64 ``[batch, tokens - 1]``, natural logarithms."""
        logits = self.run(**{self.ids.name: input_ids})[self.outputs[0].name][:, :-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.take_along_axis(logits, input_ids[:, 1:, None], -1)[..., 0]

    def generate(self, input_ids: Array, *, max_new_tokens: int, pad: int = 0, **options: Any) -> Array:
        """Continue texts.

        Args:
            input_ids: int64 ``[batch, tokens]``.
            max_new_tokens: for each text.
            pad: what stands behind a text that ended before others.
            **options: those of ``stream``.

        Returns:
            int64 ``[batch, tokens + new]``: the prompt as it was given, and what came of it.

        Raises:
            OptpassError: as ``stream``.
        """
        found: list[list[int]] = [[] for _ in range(len(np.atleast_2d(input_ids)))]
        for new in self.stream(input_ids, max_new_tokens=max_new_tokens, **options):
            for text, tokens in zip(found, new, strict=True):
                text += tokens
        width = max(map(len, found), default=0)
        rest = np.array([text + [pad] * (width - len(text)) for text in found], np.int64).reshape(len(found), width)
        return np.concatenate([input_ids, rest], 1)

    def stream(
        self,
        input_ids: Array,
        *,
        max_new_tokens: int,
        attention_mask: Array | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: Sequence[Stop] = (),
        drafter: str | Drafter | Sequence[Drafter] | None = None,
        nodes: int | None = None,
    ) -> Iterator[list[list[int]]]:
        """Continue texts and yield what each step brought, a list of tokens for each text.

        Args:
            input_ids: int64 ``[batch, tokens]``.
            max_new_tokens: for each text.
            attention_mask: ``[batch, tokens]``, 0 where a token is padding; all are text by default.
            temperature: 0 takes the most likely token, above it tokens are drawn.
            top_k: draw among the most likely tokens, so many.
            top_p: draw among the most likely tokens that have this probability together.
            seed: of the draws.
            stop: ids, or sequences of them, after which a text ends.
            drafter: name of one, or one for each text; with an engine that verifies. By default none.
            nodes: tokens to verify in a step, 256 at most; by default as many as pay here.

        Raises:
            OptpassError: an empty prompt, ids out of the vocabulary, a context that is too short, senseless options.
        """
        prompts = self._prompts(input_ids, attention_mask)
        if max_new_tokens < 0:
            raise OptpassError("usage", f"max_new_tokens is {max_new_tokens}", "give 0 or more")
        longest = max(map(len, prompts)) + max_new_tokens
        if longest > self.context:
            what = f"a prompt and {max_new_tokens} new tokens are {longest}, the context is {self.context}"
            raise OptpassError("context", what, "shorten the prompt, or ask for fewer tokens")
        drafters = self._drafters(drafter, len(prompts))
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        stops = [tuple(s) if isinstance(s, Sequence) else (s,) for s in stop]
        return Generation(self, prompts, max_new_tokens, sampling, stops, drafters, nodes).tokens()

    def _prompts(self, input_ids: Array, mask: Array | None) -> list[Array]:
        only = self.engine.model_copy(update={"inputs": self.inputs, "dynamic": self._any_length()})
        (ids,) = check_inputs(only, {self.ids.name: input_ids})
        self._check_ids(ids)
        if mask is not None and np.shape(mask) != ids.shape:
            raise OptpassError(
                "usage", f"attention_mask is {np.shape(mask)}, the ids are {ids.shape}", "make them alike"
            )
        prompts = [row if mask is None else row[np.asarray(mask[i], bool)] for i, row in enumerate(ids)]
        if any(not len(prompt) for prompt in prompts):
            raise OptpassError(
                "empty-prompt", "a prompt is empty", "give at least one token, such as that which begins a text"
            )
        return prompts

    def _any_length(self) -> dict[str, Any]:
        """Bounds for a prompt: an empty one, or one too long, is told apart later, in its own words."""
        bounds = dict(self.engine.dynamic)
        name = self.ids.shape[1]
        if isinstance(name, str):
            bounds[name] = bounds[name].model_copy(update={"minimum": 0, "maximum": 2**31})
        return bounds

    def _check_ids(self, ids: Array) -> None:
        if ids.size and not (0 <= int(ids.min()) and int(ids.max()) < self.vocabulary):
            wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise OptpassError(
                "token-id", f"{wrong} is no token: there are {self.vocabulary}", "use the tokenizer of the model"
            )

    def pace(self, texts: int, drafters: Sequence[Drafter]) -> Pace:
        """What verification costs and brings here, remembered from one generation to the next."""
        return self._paces.setdefault((texts, *(drafter.name for drafter in drafters)), Pace())

    def _drafters(self, asked: str | Drafter | Sequence[Drafter] | None, texts: int) -> list[Drafter]:
        if asked is None:
            return []
        if not self.verifies:
            raise OptpassError(
                "not-verifying", "this engine verifies no drafts", "optimize with --passes cache,speculate"
            )
        if isinstance(asked, str):
            return [create(asked, self.vocabulary) for _ in range(texts)]
        found = [asked] if isinstance(asked, Drafter) else list(asked)
        if len(found) != texts:
            raise OptpassError("usage", f"{len(found)} drafters for {texts} texts", "give one for each")
        return found


def accepted(model: Generator, ids: Array, *, tokens: int, nodes: int) -> list[Accepted]:
    """What each drafter that needs nothing else brings on some texts: counts of steps, no times.

    Args:
        model: that verifies.
        ids: int64 ``[batch, tokens]``.
        tokens: to continue each text by.
        nodes: of the trees.
    """
    found = []
    for name in ALONE:
        drafters = [create(name, model.vocabulary) for _ in ids]
        model.generate(ids, max_new_tokens=tokens, drafter=drafters, nodes=nodes)
        counts = np.bincount(model.last.lengths, minlength=2)[1:].tolist()
        found.append(Accepted(engine=model.name, drafter=name, nodes=nodes, steps=counts))
    return found


ALONE = ("lookup", "suffix", "recycling", "goose")
"""Drafters that need no other artifact."""
