"""Drafters: none changes the text, each finds what a plain search finds, and their trees are trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optpass.errors import OptpassError
from optpass.runtime.drafters.base import Drafter, create, names, successors
from optpass.runtime.drafters.goose import Goose
from optpass.runtime.drafters.recycling import Template
from optpass.runtime.drafters.suffix import Automaton
from optpass.runtime.pace import Pace
from optpass.runtime.sampling import Sampling
from optpass.runtime.trees import Tree, checked
from tests.runtime.toy import Model, drafted, plain

ALONE = [name for name in names() if name != "model"]
"""Drafters that need no other artifact."""

TEXT = st.lists(st.integers(0, 2), min_size=1, max_size=60)


def ids(tokens: Sequence[int]) -> np.ndarray:
    return np.array(tokens, np.int64)


def begun(name: str, text: Sequence[int], **options: Any) -> Drafter:
    made = create(name, 16, **options)
    made.begin(ids(text))
    return made


def taught(drafter: Drafter, table: dict[int, list[int]], previous: int = -1) -> None:
    """Successors with scores that fall by half from one to the next."""
    for token, following in table.items():
        scores = 0.5 ** np.arange(1, len(following) + 1, dtype=np.float32)
        drafter.observe(ids([token]), ids([previous]), ids(following)[None], scores[None])


def drawn(drafter: Drafter, budget: int) -> list[int]:
    """The tokens of a draft that is a chain."""
    tree = drafter.draft(budget)
    assert tree.parent.tolist() == list(range(-1, len(tree) - 1))
    return [int(token) for token in tree.tokens[1:]]


# all of them


def test_drafters_are_found_by_their_modules() -> None:
    assert names() == ["goose", "lookup", "model", "plain", "recycling", "suffix"]
    assert all(create(name, 8).name == name for name in ALONE)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        (
            "eagle",
            {},
            "[drafter] there is no drafter 'eagle'; drafters are goose, lookup, model, plain, recycling, suffix",
        ),
        ("lookup", {"n": 3}, "[drafter-option] lookup has no option 'n'; options are ngram, tokens, whole"),
        ("plain", {"n": 3}, "[drafter-option] plain has no option 'n'; it has none"),
        (
            "lookup",
            {"ngram": 0},
            (
                "[drafter-option] lookup: ngram=0: Input should be greater than or equal to 1; "
                "options are ngram, tokens, whole"
            ),
        ),
    ],
)
def test_an_unknown_drafter_or_option_is_answered_with_those_there_are(
    name: str, options: dict[str, Any], line: str
) -> None:
    with pytest.raises(OptpassError) as caught:
        create(name, 8, **options)
    assert str(caught.value) == line


SHORT: dict[str, dict[str, Any]] = {
    "suffix": {"threshold": 2, "corpus": [0, 1, 1, 0, 1]},
    "goose": {"ngrams": (2, 1)},
}
"""Options with which short texts have matches."""


@settings(max_examples=60)
@given(
    st.sampled_from(ALONE),
    st.integers(1, 30) | st.just(60),
    st.integers(0, 10**6),
    st.integers(2, 7),
    st.lists(st.integers(0, 1), min_size=1, max_size=30),
)
def test_no_drafter_changes_the_text(name: str, budget: int, seed: int, vocabulary: int, prompt: list[int]) -> None:
    model = Model(vocabulary, seed)
    made = create(name, vocabulary, **SHORT.get(name, {}))
    for _ in range(2):  # a second text, with what the first one left
        assert drafted(model, made, prompt, 40, budget, Sampling()).tokens == plain(model, prompt, 40, Sampling())


@pytest.mark.parametrize("name", [name for name in ALONE if name != "plain"])
def test_a_text_that_repeats_itself_takes_fewer_steps(name: str) -> None:
    model = Model(6, seed=1)
    assert drafted(model, create(name, 6), [1, 2, 3], 120, 16, Sampling()).steps < 80


def test_the_pace_changes_no_text_either() -> None:
    model = Model(6, seed=2)
    found = drafted(model, create("goose", 6), [1, 2, 3], 200, Pace(32), Sampling())
    assert found.tokens == plain(model, [1, 2, 3], 200, Sampling())
    assert max(found.sizes) > 4
    assert found.steps < 120


@pytest.mark.parametrize("name", ALONE)
def test_a_new_text_does_not_continue_the_one_before(name: str) -> None:
    made = begun(name, [1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5])
    made.begin(ids([5]))
    assert made.draft(8).tokens.tolist() == [5]
    made.commit(ids([6]))
    made.commit(ids([]))
    assert made.draft(8).tokens.tolist() == [6]


def test_successors_are_the_likeliest_with_the_lower_id_first() -> None:
    found, scores = successors(np.array([[1.0, 3.0, 3.0, 2.0], [4.0, 0.0, 0.0, -9.0]], np.float32), 3)
    assert found.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert scores.sum(1) == pytest.approx([1, 1])
    assert scores[0] == pytest.approx(np.exp([0, 0, -1]) / np.exp([0, 0, -1]).sum())
    assert successors(np.zeros((1, 2)), 5)[0].tolist() == [[0, 1]]


# lookup


def looked_up(text: list[int], ngram: int, tokens: int, whole: bool) -> list[int]:
    """The rule of Hugging Face, or of the original, by a scan of the text."""
    for size in range(min(ngram, len(text) - 1), 0, -1):
        for start in range(len(text) - size + 1):
            if text[start : start + size] != text[-size:]:
                continue
            end = start + size + tokens
            if whole and (end > len(text) or start + size >= len(text) - size):
                continue
            if start + size < len(text):
                return text[start + size : end]
    return []


@given(TEXT, st.integers(1, 4), st.integers(1, 8), st.booleans())
def test_lookup_finds_what_a_scan_finds(text: list[int], ngram: int, tokens: int, whole: bool) -> None:
    made = begun("lookup", text[:1], ngram=ngram, tokens=tokens, whole=whole)
    for end in range(1, len(text) + 1):
        assert drawn(made, 100) == looked_up(text[:end], ngram, tokens, whole)
        made.commit(ids(text[end : end + 1]))


def test_lookup_copies_no_more_than_the_budget() -> None:
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    assert drawn(begun("lookup", text), 3) == [3, 4]
    assert drawn(begun("lookup", text), 1) == []
    assert drawn(begun("lookup", text, tokens=3), 60) == [3, 4, 5]


# suffix


def longest_repeated(text: list[int]) -> tuple[int, int]:
    """Length of the longest end of the text that is in it at an earlier place, and the first place where that ends."""
    for length in range(len(text) - 1, 0, -1):
        for end in range(length, len(text)):
            if text[end - length : end] == text[-length:]:
                return length, end
    return 0, 0


@given(TEXT)
def test_the_automaton_finds_the_longest_end_that_was_there_before(text: list[int]) -> None:
    made = Automaton()
    for end, token in enumerate(text, 1):
        made.append(token)
        state = made.repeated()
        assert (made.length[state], made.end[state]) == longest_repeated(text[:end])


@given(TEXT, TEXT)
def test_a_match_in_a_corpus_is_the_longest_one(corpus: list[int], text: list[int]) -> None:
    made, place = Automaton(corpus), (0, 0)
    for end, token in enumerate(text, 1):
        place = made.follow(*place, token)
        lengths = [n for n in range(end + 1) if any(corpus[i : i + n] == text[end - n : end] for i in range(60))]
        assert place[1] == max(lengths)
        stop = made.end[place[0]]
        assert corpus[stop - place[1] : stop] == text[end - place[1] : end]


def test_a_short_match_is_not_copied_from() -> None:
    text = [1, 2, 3, 4, 5, 6, 9, 2, 3, 4, 5]
    assert drawn(begun("suffix", text), 9) == []
    assert drawn(begun("suffix", text, threshold=4), 9) == [6, 9, 2, 3, 4, 5]
    assert drawn(begun("suffix", text, threshold=4, tokens=2), 9) == [6, 9]
    assert drawn(begun("suffix", text, threshold=4), 2) == [6]


def test_a_match_too_near_to_the_end_gives_way_to_a_shorter_one_that_was_earlier() -> None:
    text = [7, 1, 2, 3, 4, 5, 6, 9, 1, 2, 9, 1, 2]
    assert drawn(begun("suffix", text, threshold=2, tokens=3), 9) == [9, 1, 2]
    assert drawn(begun("suffix", text, threshold=2, tokens=4), 9) == [3, 4, 5, 6]
    assert drawn(begun("suffix", text, threshold=3, tokens=4), 9) == [9, 1, 2]


def test_a_corpus_must_match_by_so_much_more_than_the_text_itself() -> None:
    corpus = [1, 2, 3, 4, 5, 6, 7]
    text = [5, 8, 2, 3, 4, 5]
    assert drawn(begun("suffix", text, threshold=1, corpus=corpus, bias=2), 3) == [6, 7]
    assert drawn(begun("suffix", text, threshold=1, corpus=corpus, bias=3), 3) == [8, 2]


# recycling


@given(st.integers(1, 150), st.integers(1, 10), st.sampled_from([0.2, 0.5, 0.8]))
def test_the_template_of_a_budget_is_the_best_nodes_of_any_larger_one(budget: int, k: int, ratio: float) -> None:
    small, large = Template(budget, k, ratio), Template(150, k, ratio)
    assert (small.parent == large.parent[:budget]).all()
    assert (small.rank == large.rank[:budget]).all()
    value = np.ones(150)
    for node in range(1, 150):
        value[node] = value[large.parent[node]] * (1 - ratio) * ratio ** large.rank[node]
    assert (np.diff(value) <= 1e-12).all()
    assert large.rank.max() < k
    assert len({*zip(large.parent.tolist(), large.rank.tolist(), strict=True)}) == 150


def test_the_default_template_is_six_deep_at_sixty_four_nodes() -> None:
    assert [len(level) for level in Template(64, 8, 0.5).levels] == [6, 15, 20, 15, 6, 1]


def test_recycling_fills_the_template_and_drops_what_was_never_seen() -> None:
    made = begun("recycling", [1], k=2)
    assert made.draft(16).tokens.tolist() == [1]
    taught(made, {1: [2, 3], 2: [4, 5]})
    tree = checked(made.draft(16), 16)
    assert (tree.tokens.tolist(), tree.parent.tolist()) == ([1, 2, 3, 4, 5], [-1, 0, 0, 1, 1])
    assert made.draft(3).tokens.tolist() == [1, 2, 3]


def test_the_last_row_about_a_token_counts_and_stays_for_the_next_text() -> None:
    made = begun("recycling", [1], k=2)
    rows = np.array([[2, 3], [4, 5]], np.int64)
    made.observe(ids([1, 1]), ids([-1, -1]), rows, np.full((2, 2), 0.5, np.float32))
    made.begin(ids([9, 1]))
    assert made.draft(3).tokens.tolist() == [1, 4, 5]
    taught(made, {1: [6]})
    assert made.draft(3).tokens.tolist() == [1, 6]


# goose


@settings(max_examples=60)
@given(
    TEXT,
    st.integers(1, 120),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.booleans(),
)
def test_a_goose_is_a_tree_within_its_budget(text: list[int], budget: int, seed: int, rho: float, bigram: bool) -> None:
    made = begun("goose", text, rho=rho, bigram=bigram)
    assert isinstance(made, Goose)
    generator = np.random.default_rng(seed)
    for _ in range(4):
        rows = generator.normal(0, 2, (3, 16))
        made.observe(generator.integers(0, 3, 3), generator.integers(-1, 3, 3), *successors(rows, 10))
        tree = checked(made.draft(budget), 16, anchor=text[-1])
        assert len(tree) <= min(budget, 100)
        spine = made._spine
        assert tree.parent[1 : spine + 1].tolist() == list(range(spine))
        made.accepted(tree, list(range(1, int(generator.integers(0, spine + 1)) + 1)))


def test_a_goose_without_successors_is_its_spine_and_without_a_spine_its_branches() -> None:
    text = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert drawn(begun("goose", text), 4) == [4, 5, 6]
    assert drawn(begun("goose", [1, 2, 3]), 60) == []
    made = begun("goose", [1])
    taught(made, {1: [2, 3, 4]})
    tree = made.draft(60)
    assert (tree.tokens.tolist(), tree.parent.tolist()) == ([1, 2, 3, 4], [-1, 0, 0, 0])


def test_the_successors_of_a_pair_go_before_those_of_its_last_token() -> None:
    for bigram, expected in ((True, [3, 7]), (False, [3, 5])):
        made = begun("goose", [2, 3], bigram=bigram)
        taught(made, {3: [7]}, previous=2)
        taught(made, {3: [5]}, previous=4)
        assert made.draft(60).tokens.tolist() == expected


def test_pairs_are_forgotten_when_they_are_too_many() -> None:
    made = begun("goose", [2, 3], max_bigrams=2)
    for previous, following in ((2, 7), (4, 5), (6, 8)):
        taught(made, {3: [following]}, previous=previous)
    assert made.draft(60).tokens.tolist() == [3, 8]
    taught(made, {3: [9]}, previous=2)
    assert made.draft(60).tokens.tolist() == [3, 9]


def test_the_spine_grows_with_the_confidence_and_the_acceptance() -> None:
    once = [*range(1, 16), 1, 2, 3, 4, 5]  # ten tokens to copy, not to be agreed on
    made = begun("goose", once)
    assert isinstance(made, Goose)
    taught(made, {5: [9]})
    assert made._chain(40)[1] == pytest.approx(0.7 + 0.2 * 7 / 12)
    lengths = []
    for acceptance in (0.1, 0.3, 0.5):
        made._acceptance = acceptance
        made.draft(8)
        lengths.append(made._spine)
    share = 0.7 + 0.2 * 7 / 12
    assert lengths == [int(8 * (tier + share * (1 - tier))) for tier in (0.15, 0.3, 0.5)]


def test_an_agreed_copy_goes_on_where_it_ends_and_takes_the_whole_budget() -> None:
    period = [1, 2, 3, 4, 5, 6]
    made = begun("goose", period * 4, max_chain=7)
    assert isinstance(made, Goose)
    chain, confidence = made._chain(99)
    assert confidence == 1
    assert chain == (period * 20)[:99]
    taught(made, {6: [1, 2]})
    assert drawn(made, 30) == (period * 5)[:29]


def test_acceptance_is_that_of_spines_alone() -> None:
    made = begun("goose", [1, 2, 3, 4, 5, 6, 1, 2, 3])
    assert isinstance(made, Goose)
    tree = made.draft(5)
    made.accepted(tree, [1, 2])
    assert made._acceptance == pytest.approx(0.5 + 0.3 * (2 / 4 - 0.5))
    made.accepted(tree.cut(3), [1, 2])
    assert made._acceptance == pytest.approx(0.5 + 0.3 * 0.5)
    made.begin(ids([1]))
    made.accepted(made.draft(5), [])
    assert made._acceptance == 0.5


def test_branches_thin_out_along_the_spine_and_are_not_extended_beyond_their_depth() -> None:
    text = [*range(10), *range(10, 16), *range(10)]
    made = begun("goose", text, max_branch_depth=2, k=4, min_score=0.0)
    assert isinstance(made, Goose)
    generator = np.random.default_rng(0)
    table = np.stack([generator.permutation(16)[:4] for _ in range(16)])
    made.observe(np.arange(16), np.full(16, -1), table, np.full((16, 4), 0.25, np.float32))
    tree = checked(made.draft(40), 16)
    spine = made._spine
    assert spine > 6
    counts = [len(tree.children[node]) - (node < spine) for node in range(spine + 1)]
    assert counts[1:] == sorted(counts[1:], reverse=True)
    for node in range(spine + 1, len(tree)):
        assert int(tree.parent[node]) <= spine or int(tree.depth[node]) <= 2


# drafters that lie


class Liar(Drafter):
    name = "liar"

    def draft(self, budget: int) -> Tree:
        return Tree(ids([1, 2, 2]), ids([-1, 0, 0]))


def test_a_lie_is_told_before_it_is_verified() -> None:
    with pytest.raises(OptpassError, match="children of one node carry the same token"):
        checked(Liar(8, Liar.options_type()).draft(8), 8, anchor=1)
