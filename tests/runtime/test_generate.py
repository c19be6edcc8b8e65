"""The driver that continues texts, on an engine that gives away what it was shown."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optpass.errors import OptpassError
from optpass.runtime import drafters
from optpass.runtime.drafters.base import Drafter, Options, create, names
from optpass.runtime.sampling import Sampling, draw, law
from optpass.runtime.trees import Tree
from tests.runtime.counting import VOCABULARY, Counting, decoded, generator, logits

TEXTS = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40), min_size=1, max_size=3)


def padded(texts: Sequence[Sequence[int]], left: bool) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, texts))
    ids, mask = np.zeros((len(texts), width), np.int64), np.zeros((len(texts), width), np.int64)
    for row, text in enumerate(texts):
        place = slice(width - len(text), width) if left else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    return ids, mask


@settings(max_examples=25)
@given(TEXTS, st.booleans(), st.booleans(), st.integers(0, 60))
def test_texts_are_continued_as_each_alone_would_be(
    texts: list[list[int]], left: bool, picks: bool, count: int
) -> None:
    ids, mask = padded(texts, left)
    found = generator(picks=picks).generate(ids, max_new_tokens=count, attention_mask=mask)
    assert found.dtype == np.int64
    assert (found[:, : ids.shape[1]] == ids).all()
    for row, text in enumerate(texts):
        assert found[row, ids.shape[1] :].tolist() == decoded(text, count)


def test_prompt_of_several_pieces() -> None:
    text = np.random.default_rng(0).integers(0, VOCABULARY, 300)
    model = generator(context=400)
    assert model.generate(text[None], max_new_tokens=5)[0, 300:].tolist() == decoded(text.tolist(), 5)
    assert isinstance(model.opened, Counting)
    assert [count for _, count in model.opened.steps] == [256, 44, 1, 1, 1, 1]


class Lying(Drafter):
    """Drafts what it was told to, whatever the text."""

    name = "lying"

    def __init__(self, tree: Any) -> None:
        super().__init__(VOCABULARY, Options())
        self.tree = tree

    def begin(self, tokens: Any) -> None: ...

    def commit(self, tokens: Any) -> None:
        self.anchor = int(tokens[-1])

    def draft(self, budget: int) -> Tree:
        if isinstance(self.tree, Exception):
            raise self.tree
        return self.tree(self.anchor)  # type: ignore[no-any-return]


class Knowing(Lying):
    """Drafts the right tokens in a tree of wrong ones."""

    def begin(self, tokens: Any) -> None:
        self.text = tokens.tolist()

    def commit(self, tokens: Any) -> None:
        self.text += tokens.tolist()

    def draft(self, budget: int) -> Tree:
        right = decoded(self.text, max((budget - 1) // 2, 1))
        tokens, parent, last = [self.text[-1]], [-1], 0
        for token in right:
            tokens += [(token + 1) % VOCABULARY, token]
            parent += [last, last]
            last = len(tokens) - 1
        return Tree(np.array(tokens, np.int64), np.array(parent, np.int64)).cut(budget)


@pytest.mark.parametrize("drafter", [name for name in names() if name != "model"])
@settings(max_examples=8)
@given(texts=TEXTS, nodes=st.sampled_from([None, 1, 2, 5, 16, 60]))
def test_drafts_never_change_the_text(drafter: str, texts: list[list[int]], nodes: int | None) -> None:
    ids, mask = padded(texts, left=True)
    model = generator(verifies=True)
    found = model.generate(ids, max_new_tokens=40, attention_mask=mask, drafter=drafter, nodes=nodes)
    for row, text in enumerate(texts):
        assert found[row, ids.shape[1] :].tolist() == decoded(text, 40)
    assert not model.last.fallback


def test_right_drafts_are_accepted_in_one_step() -> None:
    model = generator(verifies=True)
    ids = np.array([[3, 1, 4]])
    found = model.generate(ids, max_new_tokens=41, drafter=Knowing(None), nodes=21)
    assert found[0, 3:].tolist() == decoded([3, 1, 4], 41)
    # the first token is the prompt's; then each step brings 10 drafted ones and one more
    assert model.last.lengths == [11, 11, 11, 7]


def test_engine_that_verifies_decodes_without_a_drafter() -> None:
    assert generator(verifies=True).generate(np.array([[5, 2]]), max_new_tokens=9)[0, 2:].tolist() == decoded([5, 2], 9)


@pytest.mark.parametrize(
    "tree",
    [
        lambda anchor: Tree(np.array([anchor, 5, 6]), np.array([-1, 2, 0])),
        lambda anchor: Tree(np.array([anchor, 99]), np.array([-1, 0])),
        lambda anchor: Tree(np.array([anchor, -1]), np.array([-1, 0])),
        lambda anchor: Tree(np.array([anchor, 5, 5]), np.array([-1, 0, 0])),
        lambda anchor: Tree(np.array([(anchor + 1) % VOCABULARY]), np.array([-1])),
        lambda anchor: Tree(np.array([float(anchor)]), np.array([-1])),  # type: ignore[arg-type]
        lambda anchor: "no tree",
        RuntimeError("broken\nin two lines"),
    ],
)
def test_drafter_that_lies_is_let_go(tree: Any) -> None:
    model = generator(verifies=True)
    found = model.generate(np.array([[5, 2]]), max_new_tokens=9, drafter=Lying(tree), nodes=8)
    assert found[0, 2:].tolist() == decoded([5, 2], 9)
    assert model.last.fallback
    assert "\n" not in model.last.fallback


def test_wrong_guesses_are_no_lie() -> None:
    model = generator(verifies=True)
    guess = Lying(lambda anchor: Tree.chain(anchor, [0, 0, 0]))
    assert model.generate(np.array([[5, 2]]), max_new_tokens=20, drafter=guess, nodes=4)[0, 2:].tolist() == decoded(
        [5, 2], 20
    )
    assert not model.last.fallback


@settings(max_examples=8)
@given(texts=TEXTS, nodes=st.sampled_from([None, 2, 5, 9]), temperature=st.sampled_from([0.0, 2.0]))
def test_small_model_drafts_and_never_changes_the_text(
    texts: list[list[int]], nodes: int | None, temperature: float
) -> None:
    options = {"max_new_tokens": 30, "temperature": temperature, "seed": 3}
    with pytest.MonkeyPatch.context() as patch:
        # it is the large one, with less room: at a temperature it guesses often, and is often wrong
        patch.setattr("optpass.runtime.drafters.model.load", lambda *_, **__: generator(context=60))
        model = generator(verifies=True)
        small = [create("model", VOCABULARY, artifact="small", tokens=6) for _ in texts]
        ids, mask = padded(texts, left=True)
        found = model.generate(ids, attention_mask=mask, drafter=small, nodes=nodes, **options)
    assert not model.last.fallback
    if nodes == 9 and not temperature:
        assert max(model.last.lengths) == 7
    assert (found == generator().generate(ids, attention_mask=mask, **options)).all()


def test_small_model_of_another_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optpass.runtime.drafters.model.load", lambda *_, **__: generator())
    with pytest.raises(OptpassError) as raised:
        create("model", VOCABULARY + 1, artifact="small")
    assert "share a tokenizer" in str(raised.value)


# ends


def test_stop_ends_each_text_by_itself_also_inside_a_draft() -> None:
    ids = np.array([[1, 2], [7, 7]])
    plain = [decoded(text, 30) for text in ids.tolist()]
    stops = [plain[0][4], [plain[1][9], plain[1][10]]]
    ends = []
    for text in plain:
        found = [i for i, token in enumerate(text) if token == stops[0] or (i and [text[i - 1], token] == stops[1])]
        ends.append(found[0] + 1)
    for model, options in (
        (generator(), {}),
        (generator(verifies=True), {"drafter": [Knowing(None), Knowing(None)], "nodes": 9}),
    ):
        found = model.generate(ids, max_new_tokens=30, stop=stops, pad=VOCABULARY - 1, **options)
        for row, (text, end) in enumerate(zip(plain, ends, strict=True)):
            assert found[row, 2 : 2 + end].tolist() == text[:end]
            assert (found[row, 2 + end :] == VOCABULARY - 1).all()
        assert found.shape[1] == 2 + max(ends)


def test_context_is_filled_to_the_last_token_by_drafts_too() -> None:
    for drafter in (None, Knowing(None)):
        model = generator(verifies=True, context=30)
        found = model.generate(np.array([[5, 2]]), max_new_tokens=28, drafter=drafter, nodes=12)
        assert found[0, 2:].tolist() == decoded([5, 2], 28)


def test_stream_yields_what_generate_returns_and_may_be_left() -> None:
    model = generator(verifies=True)
    ids = np.array([[5, 2], [1, 1]])
    for steps, _ in enumerate(model.stream(ids, max_new_tokens=20, drafter="lookup"), 1):
        if steps == 3:
            break
    pieces = list(model.stream(ids, max_new_tokens=20))
    assert [[token for piece in pieces for token in piece[row]] for row in (0, 1)] == [
        decoded(text, 20) for text in ids.tolist()
    ]


# whole texts


def test_run_and_score_are_those_of_the_whole_text() -> None:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 20))
    model = generator(verifies=True)
    whole = np.stack([[logits(row[: end + 1]) for end in range(20)] for row in ids.tolist()])
    assert (model.run(input_ids=ids)["logits"] == whole).all()
    expected = np.log(np.stack([law(rows, Sampling(temperature=1.0)) for rows in whole]))
    assert np.allclose(model.score(ids), np.take_along_axis(expected[:, :-1], ids[:, 1:, None], 2)[..., 0])


# sampling


def counted(options: dict[str, Any], draws: int, vocabulary: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """How often each text of three tokens was drawn, and how often it should have been."""
    sampling = Sampling(temperature=1.3, top_k=3, top_p=0.9)
    model = generator(verifies=True, vocabulary=vocabulary)
    texts = list(itertools.product(range(vocabulary), repeat=3))
    chances = np.array(
        [
            np.prod([law(logits([1, *text[:n]], vocabulary)[None], sampling)[0, text[n]] for n in range(3)])
            for text in texts
        ]
    )
    found = np.zeros(len(texts))
    batch = 50
    for seed in range(draws // batch):
        made = model.generate(
            np.ones((batch, 1), np.int64), max_new_tokens=3, temperature=1.3, top_k=3, top_p=0.9, seed=seed, **options
        )
        np.add.at(found, made[:, 1:] @ vocabulary ** np.array([2, 1, 0]), 1)
    return found, chances * draws


def statistic(found: np.ndarray, expected: np.ndarray) -> float:
    assert not found[expected == 0].any()
    seen = expected > 0
    return float(((found - expected)[seen] ** 2 / expected[seen]).sum()), int(seen.sum()) - 1  # type: ignore[return-value]


class Fixed(Lying):
    """A tree of two levels, whatever the text."""

    def __init__(self) -> None:
        super().__init__(lambda anchor: Tree(np.array([anchor, 0, 2, 1, 3, 0]), np.array([-1, 0, 0, 1, 1, 2])))


def rejected(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether a chi-squared test at one in ten thousand rejects, by Wilson and Hilferty's approximation."""
    value, freedom = statistic(found, expected)  # type: ignore[misc]
    normal = ((value / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    return bool(normal > 3.72)


@pytest.mark.parametrize("drafted", [False, True])
def test_draws_have_the_law_of_the_model(drafted: bool) -> None:
    options = {"drafter": [Fixed() for _ in range(50)], "nodes": 6} if drafted else {}
    assert not rejected(*counted(options, 20_000))


def test_planted_error_in_the_accept_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from optpass.runtime import generation

    def lottery(tree: Tree, rows: Any, sampling: Sampling, random: Any) -> tuple[list[int], int]:
        # a draw for each child, so that what was drafted has several tickets
        path: list[int] = []
        token = int(draw(rows[:1], sampling, random)[0])
        node = 0
        while True:
            for child in tree.children[node]:
                token = int(draw(rows[node : node + 1], sampling, random)[0])
                if token == tree.tokens[child]:
                    break
            else:
                return path, token
            path.append(child)
            node = child
            token = int(draw(rows[node : node + 1], sampling, random)[0])

    monkeypatch.setattr(generation, "accept_tree", lottery)
    assert rejected(*counted({"drafter": [Fixed() for _ in range(50)], "nodes": 6}, 20_000))


@settings(max_examples=20)
@given(TEXTS, st.integers(0, 5), st.sampled_from(["lookup", "recycling", "goose"]))
def test_drafts_do_not_change_what_is_drawn(texts: list[list[int]], seed: int, drafter: str) -> None:
    ids, mask = padded(texts, left=True)
    options = {"max_new_tokens": 30, "attention_mask": mask, "temperature": 0.7, "top_p": 0.95, "seed": seed}
    plain = generator(verifies=True).generate(ids, **options)
    assert (generator(verifies=True).generate(ids, drafter=drafter, nodes=16, **options) == plain).all()
    assert (generator().generate(ids[:1], **{**options, "attention_mask": mask[:1]}) == plain[:1]).all()


# bad input

IDS = np.array([[5, 2]])


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("empty-prompt", {"input_ids": np.zeros((1, 0), np.int64)}),
        ("empty-prompt", {"attention_mask": np.zeros((1, 2))}),
        ("token-id", {"input_ids": np.array([[5, VOCABULARY]])}),
        ("token-id", {"input_ids": np.array([[-1, 5]])}),
        ("input-dtype", {"input_ids": np.array([[1.0, 5.0]])}),
        ("input-rank", {"input_ids": np.array([1, 5])}),
        ("input-type", {"input_ids": [[1, 5]]}),
        ("context", {"max_new_tokens": 199}),
        ("context", {"input_ids": np.zeros((1, 201), np.int64)}),
        ("usage", {"max_new_tokens": -1}),
        ("usage", {"attention_mask": np.ones((1, 3))}),
        ("usage", {"drafter": [Lying(None), Lying(None)]}),
        ("drafter", {"drafter": "oracle"}),
        ("sampling", {"temperature": -1.0}),
        ("sampling", {"top_p": 0.0}),
    ],
)
def test_bad_input_is_told(code: str, options: dict[str, Any]) -> None:
    given = {"input_ids": IDS, "max_new_tokens": 4, **options}
    model = generator(verifies=True)
    with pytest.raises(OptpassError) as raised:
        model.generate(given.pop("input_ids"), **given)
    assert raised.value.refusal.code == code
    assert model.generate(IDS, max_new_tokens=4)[0, 2:].tolist() == decoded([5, 2], 4)


def test_drafter_with_an_engine_that_does_not_verify() -> None:
    with pytest.raises(OptpassError) as raised:
        generator().generate(IDS, max_new_tokens=4, drafter="lookup")
    assert raised.value.refusal.code == "not-verifying"


def test_every_drafter_is_in_the_package() -> None:
    assert {"lookup", "suffix", "recycling", "goose"} <= set(names())
    assert drafters.__path__
