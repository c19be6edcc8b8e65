"""The law of what comes out is that of plain decoding, and a rule that is nearly right is found out."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from optpass.errors import OptpassError
from optpass.runtime.drafters.base import create
from optpass.runtime.sampling import Sampling, accept_chain, accept_siblings, accept_tree, draw, law
from optpass.runtime.trees import Tree, walk
from tests.runtime.toy import Model, drafted, plain

VOCABULARY = 5
DRAWS = 20_000
MODEL = Model(VOCABULARY, seed=3, period=2)
START = (1, 2)
PROCESSED = Sampling(temperature=1.7, top_k=4, top_p=0.93, seed=11)
WARM = Sampling(temperature=1.7, seed=11)

Texts = Counter[tuple[int, ...]]
Accept = Callable[[Tree, NDArray[np.float64], int], list[tuple[int, ...]]]


def by_hugging_face(row: Sequence[float], sampling: Sampling) -> list[float]:
    """Their processors, in their order, in plain Python."""
    scores = [score / sampling.temperature for score in row]
    if sampling.top_k is not None:
        last = sorted(scores)[-min(sampling.top_k, len(scores))]
        scores = [score if score >= last else -math.inf for score in scores]
    weights = [math.exp(score - max(scores)) for score in scores]
    weights = [weight / math.fsum(weights) for weight in weights]
    if sampling.top_p is not None and sampling.top_p < 1:
        # Theirs goes up from the least likely; the higher id is the less likely one of equals.
        order = sorted(range(len(row)), key=lambda i: (weights[i], -i))
        for end in range(1, len(order)):
            if math.fsum(weights[i] for i in order[:end]) <= 1 - sampling.top_p:
                scores[order[end - 1]] = -math.inf
        weights = [weight if score > -math.inf else 0.0 for weight, score in zip(weights, scores, strict=True)]
    return [weight / math.fsum(weights) for weight in weights]


@given(
    st.lists(st.integers(-60, 60), min_size=2, max_size=9),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.none() | st.integers(1, 10),
    st.none() | st.sampled_from([0.013, 0.3, 0.71, 0.9, 1.0]),
)
def test_the_law_is_that_of_hugging_face(row: list[int], temperature: float, k: int | None, p: float | None) -> None:
    sampling = Sampling(temperature, k, p)
    logits = np.array([row, row[::-1]], np.float32) / 16
    found = law(logits, sampling)
    for one, given_row in zip(found, logits.astype(float).tolist(), strict=True):
        assert one == pytest.approx(by_hugging_face(given_row, sampling), abs=1e-12)


def test_ties_go_to_the_lower_id_unless_top_k_keeps_them_all() -> None:
    logits = np.array([[1.0, 2.0, 2.0, 2.0]])
    assert draw(logits, Sampling(), np.random.default_rng()).tolist() == [1]
    assert law(logits, Sampling()).tolist() == [[0, 1, 0, 0]]
    assert np.count_nonzero(law(logits, Sampling(1, top_k=1))) == 3
    assert np.flatnonzero(law(logits, Sampling(1, top_k=1, top_p=0.5))).tolist() == [1, 2]


def test_extreme_temperatures_and_forbidden_tokens_stay_finite() -> None:
    logits = np.array([[3e4, 2e4, -np.inf]], np.float32)
    assert law(logits, Sampling(1e-300)).tolist() == [[1, 0, 0]]
    assert law(logits, Sampling(1e12)) == pytest.approx(np.array([[0.5, 0.5, 0]]))
    assert draw(np.tile(logits, (500, 1)), Sampling(1e12), np.random.default_rng(0)).max() == 1


@given(st.integers(0, 10**6), st.integers(1, 40))
def test_a_token_without_probability_is_never_drawn(seed: int, kept: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 6, (20, 40))
    sampling = Sampling(0.8, top_k=kept)
    chosen = draw(logits, sampling, generator)
    assert (law(logits, sampling)[np.arange(20), chosen] > 0).all()


def test_a_number_is_used_for_each_row_and_none_without_a_temperature() -> None:
    logits = np.zeros((3, 4))
    one, other = np.random.default_rng(5), np.random.default_rng(5)
    draw(logits, Sampling(), one)
    draw(logits, Sampling(1.0), one)
    other.random(3)
    assert one.random() == other.random()


@pytest.mark.parametrize(
    ("logits", "what"),
    [
        ([[0, 1], [np.nan, 1]], "the logits of row 1 hold nan"),
        ([[np.inf, 1]], "the logits of row 0 hold inf"),
        ([[-np.inf, -np.inf]], "the logits of row 0 forbid every token"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_say_nothing_are_refused(logits: list[list[float]], what: str, temperature: float) -> None:
    with pytest.raises(OptpassError, match=what):
        draw(np.array(logits), Sampling(temperature), np.random.default_rng())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; give 0 (greedy) or more"),
        ({"temperature": math.nan}, "temperature is nan; give 0 (greedy) or more"),
        ({"top_k": 0}, "top_k is 0; give 1 or more, or none"),
        ({"top_p": 0.0}, "top_p is 0.0; give more than 0 and at most 1, or none"),
        ({"top_p": 1.5}, "top_p is 1.5; give more than 0 and at most 1, or none"),
        ({"seed": -1}, "seed is -1; give 0 or more"),
    ],
)
def test_impossible_parameters_are_refused(options: Mapping[str, Any], what: str) -> None:
    with pytest.raises(OptpassError) as caught:
        Sampling(**options)
    assert str(caught.value) == f"[sampling] {what}"


# the law of the first three tokens


def drafts(text: Sequence[int]) -> Tree:
    """A tree that depends on the text: three children, one of them deep."""
    a, b, c = (int(token) for token in np.random.default_rng(sum(text) + len(text)).permutation(VOCABULARY)[:3])
    tokens = [text[-1], a, b, c, b, a, c, c, a]
    return Tree(np.array(tokens, np.int64), np.array([-1, 0, 0, 0, 1, 1, 2, 4, 6], np.int64))


def exact(sampling: Sampling) -> dict[tuple[int, ...], float]:
    expected = {}
    for text in itertools.product(range(VOCABULARY), repeat=3):
        rows = np.stack([MODEL.logits([*START, *text[:end]]) for end in range(3)])
        expected[text] = float(np.prod(law(rows, sampling)[np.arange(3), list(text)]))
    return expected


def counted(accept: Accept) -> Texts:
    """The first three tokens of many texts; those that have the same text so far are continued together."""
    found: Texts = Counter()
    waiting: Texts = Counter({(): DRAWS})
    while waiting:
        text, times = waiting.popitem()
        tree = drafts([*START, *text])
        for new, number in Counter(accept(tree, MODEL.rows([*START, *text], tree), times)).items():
            longer = (*text, *new)[:3]
            (found if len(longer) == 3 else waiting)[longer] += number
    return found


def far_off(found: Mapping[Any, int], expected: Mapping[Any, float]) -> float:
    """Chi-squared as a normal deviate (Wilson and Hilferty); cells of under five are taken together."""
    total = sum(found.values())
    assert all(expected[cell] > 0 for cell in found)
    cells = {cell: (found.get(cell, 0), part * total) for cell, part in expected.items()}
    large = [both for both in cells.values() if both[1] >= 5]
    small = [both for both in cells.values() if 0 < both[1] < 5]
    if small:
        large.append((sum(both[0] for both in small), sum(both[1] for both in small)))
    statistic, freedom = sum((seen - mean) ** 2 / mean for seen, mean in large), len(large) - 1
    return float((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


CLOSE = 3.5
"""Deviates: a right rule is beyond with a probability of 2e-4, and with a fixed seed never or always."""


def plainly(rows: NDArray[np.float64], sampling: Sampling) -> NDArray[np.float64]:
    """Logits that have the law by themselves, so that many rows are processed once."""
    with np.errstate(divide="ignore"):
        return np.log(law(rows, sampling))


def many(rows: NDArray[np.float64], times: int, name: str) -> NDArray[np.int64]:
    return draw(np.tile(rows, (times, 1)), Sampling(1.0), GENERATORS[name]).reshape(times, len(rows))


def walked(tree: Tree, chosen: NDArray[np.int64]) -> list[tuple[int, ...]]:
    paths = [walk(tree, one) for one in chosen]
    return [
        (*tree.tokens[path].tolist(), int(one[path[-1] if path else 0]))
        for path, one in zip(paths, chosen, strict=True)
    ]


def once_per_node(tree: Tree, rows: NDArray[np.float64], times: int, *, sampling: Sampling) -> list[tuple[int, ...]]:
    return walked(tree, many(plainly(rows, sampling), times, "node"))


def on_the_way(tree: Tree, rows: NDArray[np.float64], times: int, *, sampling: Sampling) -> list[tuple[int, ...]]:
    results = [accept_tree(tree, rows, sampling, GENERATORS["way"]) for _ in range(times)]
    return [(*tree.tokens[path].tolist(), last) for path, last in results]


def once_per_path(tree: Tree, rows: NDArray[np.float64], times: int, *, sampling: Sampling) -> list[tuple[int, ...]]:
    """Wrong: a node that several paths lead through gets a chance in each."""
    rows = plainly(rows, sampling)
    found: list[tuple[int, ...]] = [()] * times
    for leaf in _leaves(tree):
        path = [0, *tree.path(leaf)]
        for index, one in enumerate(many(rows[path], times, "path").tolist()):
            right = 0
            while right < len(path) - 1 and one[right] == tree.tokens[path[right + 1]]:
                right += 1
            if right + 1 > len(found[index]):
                found[index] = tuple(one[: right + 1])
    return found


def raw_bonus(tree: Tree, rows: NDArray[np.float64], times: int, *, sampling: Sampling) -> list[tuple[int, ...]]:
    """Wrong: a token after a path that was accepted to its end knows no top-k and no top-p."""
    leaves, mixed = _leaves(tree), plainly(rows, sampling)
    mixed[leaves] = plainly(rows[leaves], replace(sampling, top_k=None, top_p=None))
    return walked(tree, many(mixed, times, "bonus"))


def _leaves(tree: Tree) -> list[int]:
    return [node for node in range(len(tree)) if not tree.children[node]]


GENERATORS = {name: np.random.default_rng(seed) for seed, name in enumerate(["node", "way", "path", "bonus"])}


@pytest.mark.parametrize(
    ("accept", "sampling"), [(once_per_node, WARM), (once_per_node, PROCESSED), (on_the_way, PROCESSED)]
)
def test_a_draw_per_node_keeps_the_law(accept: Any, sampling: Sampling) -> None:
    assert far_off(counted(partial(accept, sampling=sampling)), exact(sampling)) < CLOSE


def test_a_draw_per_path_is_found_out() -> None:
    assert far_off(counted(partial(once_per_path, sampling=WARM)), exact(WARM)) > 3 * CLOSE


def test_a_last_token_from_raw_logits_is_found_out() -> None:
    found = counted(partial(raw_bonus, sampling=PROCESSED))
    expected = exact(PROCESSED)
    assert sum(number for text, number in found.items() if not expected[text]) > 50


def test_a_chain_that_was_drawn_keeps_the_law() -> None:
    generator = np.random.default_rng(8)
    other = Model(VOCABULARY, seed=4)

    @cache
    def drafter(*text: int) -> NDArray[np.float64]:
        row: NDArray[np.float64] = law(other.logits([*START, *text])[None], WARM)[0]
        return row

    @cache
    def target(*text: int) -> NDArray[np.float64]:
        row: NDArray[np.float64] = law(MODEL.logits([*START, *text])[None], PROCESSED)[0]
        return row

    found: Texts = Counter()
    for _ in range(DRAWS):
        text: tuple[int, ...] = ()
        while len(text) < 3:
            chain: list[int] = []
            for _ in range(2):
                reached = np.cumsum(drafter(*text, *chain))
                chain.append(int(np.searchsorted(reached, generator.random() * reached[-1], side="right")))
            laws = np.stack([drafter(*text, *chain[:end]) for end in range(2)])
            rows = np.stack([target(*text, *chain[:end]) for end in range(3)])
            count, last = accept_chain(np.array(chain), laws, rows, generator)
            text = (*text, *chain[:count], last)
        found[text[:3]] += 1
    assert far_off(found, exact(PROCESSED)) < CLOSE


def siblings(replaced: bool, accept: Callable[..., tuple[int | None, int]]) -> float:
    generator = np.random.default_rng(9)
    target = np.array([0.05, 0.35, 0.2, 0.1, 0.3])
    laws = np.array([[0.3, 0.1, 0.1, 0.3, 0.2]] * 3)
    found: Counter[int] = Counter()
    for _ in range(DRAWS):
        tokens = generator.choice(VOCABULARY, 3, replace=replaced, p=laws[0])
        index, token = accept(tokens, laws, target, generator, replaced=replaced)
        assert index is None or tokens[index] == token
        found[token] += 1
    return far_off(found, dict(enumerate(target)))


def without_a_rest(
    tokens: NDArray[Any], drafts: Any, target: Any, generator: Any, *, replaced: bool
) -> tuple[int | None, int]:
    """Wrong: each candidate is held against the whole target."""
    for index, token in enumerate(tokens.tolist()):
        if generator.random() * drafts[index][token] < target[token]:
            return index, token
    return None, int(generator.choice(VOCABULARY, p=target))


@pytest.mark.parametrize("replaced", [True, False])
def test_siblings_that_were_drawn_keep_the_law(replaced: bool) -> None:
    assert siblings(replaced, accept_siblings) < CLOSE
    assert siblings(replaced, without_a_rest) > 3 * CLOSE


def test_siblings_said_to_be_drawn_as_they_were_not_are_found_out() -> None:
    def wrong(*args: Any, replaced: bool) -> tuple[int | None, int]:
        return accept_siblings(*args, replaced=not replaced)

    assert siblings(False, wrong) > CLOSE


def test_a_token_that_its_law_excludes_is_refused() -> None:
    certain = np.array([[1.0, 0.0]])
    with pytest.raises(OptpassError, match="token 1 was drafted with probability 0"):
        accept_chain(np.array([1]), certain, np.full((2, 2), 0.5), np.random.default_rng(0))


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(["lookup", "suffix", "recycling", "goose"]), st.integers(1, 20))
def test_the_same_seed_draws_the_same_text_with_and_without_a_draft(seed: int, name: str, budget: int) -> None:
    model, sampling = Model(6, seed), Sampling(0.4, top_k=5, top_p=0.95, seed=seed)
    found = drafted(model, create(name, 6), [1, 2, 3], 40, budget, sampling)
    assert found.tokens == plain(model, [1, 2, 3], 40, sampling)
