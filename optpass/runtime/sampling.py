"""From logits to tokens: the law of the next one, draws from it, and the accept rules that keep it exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optpass.errors import OptpassError
from optpass.runtime.trees import Ids, Tree

Law = NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken from the logits.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: how many of the likeliest tokens may be drawn, all where None. Tokens as likely as the last of them stay.
        top_p: the likeliest tokens that together have this probability may be drawn, all where None. Of equally likely
            ones those with the lower id come first.
        seed: of the generator.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise OptpassError("sampling", f"temperature is {self.temperature}", "give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise OptpassError("sampling", f"top_k is {self.top_k}", "give 1 or more, or none")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise OptpassError("sampling", f"top_p is {self.top_p}", "give more than 0 and at most 1, or none")
        if self.seed < 0:
            raise OptpassError("sampling", f"seed is {self.seed}", "give 0 or more")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def generator(self) -> np.random.Generator:
        """A new generator of the seed."""
        return np.random.default_rng(self.seed)


def law(logits: NDArray[Any], sampling: Sampling) -> Law:
    """The probabilities that tokens are drawn with: temperature, then top-k, then top-p, as in Hugging Face.

    Args:
        logits: float ``[rows, vocabulary]``; minus infinity forbids a token.
        sampling: how to take a token.

    Returns:
        float64 ``[rows, vocabulary]``, each row of sum one; one at the likeliest token for a temperature of 0.

    Raises:
        OptpassError: a logit is NaN or infinite, or a row forbids every token.
    """
    best = _likeliest(logits)
    if sampling.greedy:
        certain = np.zeros(logits.shape)
        certain[np.arange(len(logits)), best] = 1
        return certain
    scores = logits.astype(np.float64)
    scores -= scores[np.arange(len(scores)), best][:, None]  # before a small temperature makes them infinite
    scores /= sampling.temperature
    size = scores.shape[1]
    if sampling.top_k is not None and sampling.top_k < size:
        last = np.partition(scores, size - sampling.top_k, axis=1)[:, size - sampling.top_k]
        scores[scores < last[:, None]] = -np.inf
    probabilities = np.exp(scores)
    probabilities /= probabilities.sum(1, keepdims=True)
    if sampling.top_p is not None and sampling.top_p < 1:
        for row in probabilities:
            _keep_nucleus(row, sampling.top_p)
    return probabilities


def draw(logits: NDArray[Any], sampling: Sampling, generator: np.random.Generator) -> Ids:
    """One token for each row, by the inverse of its distribution function.

    Args:
        logits: float ``[rows, vocabulary]``.
        sampling: how to take a token.
        generator: gives one uniform number per row; none at a temperature of 0, where the lowest of the likeliest ids
            is taken.

    Returns:
        int64 ``[rows]``.

    Raises:
        OptpassError: as ``law``.
    """
    if sampling.greedy:
        return _likeliest(logits)
    return _drawn(law(logits, sampling), generator)


def accept_tree(
    tree: Tree, logits: NDArray[Any], sampling: Sampling, generator: np.random.Generator
) -> tuple[list[int], int]:
    """The accepted nodes and the token after them, for drafts that are not random.

    Draws at the nodes it comes to and nowhere else: one number per committed token, as plain decoding does, so that
    both give the same text from the same seed.

    Args:
        tree: whose siblings carry distinct tokens.
        logits: float ``[nodes, vocabulary]``, row i after the path to node i.
        sampling: how to take a token.
        generator: of this sequence.

    Raises:
        OptpassError: as ``law``.
    """
    tokens, parent = tree.tokens.tolist(), tree.parent.tolist()
    node, found = 0, list[int]()
    token = int(draw(logits[:1], sampling, generator)[0])
    for child in range(1, len(tokens)):
        if parent[child] == node and tokens[child] == token:
            node = child
            found.append(child)
            token = int(draw(logits[child : child + 1], sampling, generator)[0])
    return found, token


def accept_chain(tokens: Ids, drafts: Law, targets: Law, generator: np.random.Generator) -> tuple[int, int]:
    """How many tokens of a chain that was drawn at random are accepted, and the token after them.

    Paper: Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192, algorithm 1.

    Args:
        tokens: int64 ``[length]``, token i drawn from ``drafts[i]``.
        drafts: ``[length, vocabulary]``, the laws that the drafter drew from.
        targets: ``[length + 1, vocabulary]``, those that the result must have.
        generator: of this sequence.

    Raises:
        OptpassError: a token has no probability in the law it is said to be drawn from.
    """
    for index, token in enumerate(tokens.tolist()):
        found, rest = _tried(token, drafts[index], targets[index], generator)
        if not found:
            return index, int(_drawn(rest[None], generator)[0])
    return len(tokens), int(_drawn(targets[len(tokens)][None], generator)[0])


def accept_siblings(
    tokens: Ids, drafts: Law, target: Law, generator: np.random.Generator, *, replaced: bool
) -> tuple[int | None, int]:
    """Which of several candidates for one place is accepted, if any, and the token at that place.

    Paper: SpecInfer, arXiv 2305.09781, section 4.3, in the order of the candidates.

    Args:
        tokens: int64 ``[candidates]``, in the order they were drawn.
        drafts: ``[candidates, vocabulary]``, the law of each, as it was before any was drawn.
        target: ``[vocabulary]``, the law that the result must have.
        generator: of this sequence.
        replaced: whether each was drawn regardless of the ones before; else a token was drawn at most once.

    Raises:
        OptpassError: a token has no probability in the law it is said to be drawn from.
    """
    earlier: list[int] = []
    for index, token in enumerate(tokens.tolist()):
        draft = drafts[index]
        if not replaced:
            draft = draft.copy()
            draft[earlier] = 0
            draft /= draft.sum() or 1
            earlier.append(token)
        found, target = _tried(token, draft, target, generator)
        if found:
            return index, token
    return None, int(_drawn(target[None], generator)[0])


def _tried(token: int, draft: Law, target: Law, generator: np.random.Generator) -> tuple[bool, Law]:
    """Whether a drawn token is accepted, and the law of what replaces it if not."""
    if not draft[token] > 0:
        raise OptpassError("draft-law", f"token {token} was drafted with probability 0", "give the law it was drawn by")
    if generator.random() * draft[token] < target[token]:
        return True, target
    rest = np.maximum(target - draft, 0)
    total = rest.sum()
    # Laws that are equal but for rounding leave nothing, and then the target is what is left.
    return False, rest / total if total > 0 else target


def _drawn(probabilities: Law, generator: np.random.Generator) -> Ids:
    reached = np.cumsum(probabilities, axis=1)
    total = reached[:, -1]
    # Below the total, so that rounding cannot lead past the last token that has a probability.
    wanted = np.minimum(generator.random(len(reached)) * total, np.nextafter(total, 0))
    found: Ids = (reached <= wanted[:, None]).sum(1, dtype=np.int64)
    return found


def _keep_nucleus(row: Law, top_p: float) -> None:
    candidates = np.flatnonzero(row)
    order = candidates[np.argsort(-row[candidates], kind="stable")]
    reached = np.cumsum(row[order])
    kept = 1 + int(np.searchsorted(reached, top_p))  # the token that reaches top_p is the last one that stays
    row[order[kept:]] = 0
    row /= row.sum()


def _likeliest(logits: NDArray[Any]) -> Ids:
    best: Ids = logits.argmax(1).astype(np.int64, copy=False)
    largest = logits[np.arange(len(logits)), best]  # NaN wherever a row holds one
    if not np.isfinite(largest).all():
        row = int(np.isfinite(largest).argmin())
        what = "forbid every token" if largest[row] == -np.inf else f"hold {largest[row]}"
        raise OptpassError("logits", f"the logits of row {row} {what}", "compare the engine with eager execution")
    return best
