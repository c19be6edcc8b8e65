"""Trees: what a node sees, where it stands, which path is accepted, and what is no tree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpass.errors import OptpassError
from optpass.runtime.trees import Grower, Tree, checked, walk

VOCABULARY = 4


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    grower = Grower(draw(st.integers(0, VOCABULARY - 1)), draw(st.integers(1, 40)))
    for _ in range(draw(st.integers(0, 60))):
        grower.add(draw(st.integers(0, len(grower.tokens) - 1)), draw(st.integers(0, VOCABULARY - 1)))
    return grower.tree()


def array(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@given(trees())
def test_a_node_sees_itself_and_its_ancestors_and_nothing_else(tree: Tree) -> None:
    seen = np.zeros((len(tree), len(tree)), bool)
    for node in range(len(tree)):
        at = node
        while at >= 0:
            seen[node, at] = True
            at = int(tree.parent[at])
    assert (tree.mask == seen).all()
    assert (tree.depth == seen.sum(1) - 1).all()
    assert tree.depth.dtype == np.int64


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 100])
def test_a_chain_sees_all_before_it(count: int) -> None:
    tree = Tree.chain(0, range(1, count))
    assert (tree.mask == np.tri(count, dtype=bool)).all()
    assert tree.depth.tolist() == list(range(count))


@given(trees(), st.integers(1, 50))
def test_a_cut_is_the_tree_of_its_first_nodes(tree: Tree, count: int) -> None:
    part = checked(tree.cut(count), VOCABULARY)
    assert len(part) == min(count, len(tree))
    assert (part.mask == tree.mask[:count, :count]).all()


@given(trees())
def test_children_and_paths_agree_with_parents(tree: Tree) -> None:
    for node in range(len(tree)):
        assert tree.children[node] == np.flatnonzero(tree.parent == node).tolist()
        path = tree.path(node)
        assert len(path) == tree.depth[node]
        assert [0, *path] == np.flatnonzero(tree.mask[node]).tolist()


@given(trees(), st.lists(st.integers(0, VOCABULARY - 1), min_size=40, max_size=40))
def test_the_walk_follows_what_was_chosen_as_far_as_it_was_drafted(tree: Tree, chosen: list[int]) -> None:
    found = walk(tree, chosen)
    node, expected = 0, list[int]()
    while right := [child for child in tree.children[node] if tree.tokens[child] == chosen[node]]:
        (node,) = right
        expected.append(node)
    assert found == expected
    assert found == tree.path(found[-1] if found else 0)


def test_a_token_that_a_parent_has_is_added_once_even_where_the_budget_is_spent() -> None:
    grower = Grower(7, 3)
    assert (grower.add(0, 5), grower.add(0, 5), grower.add(1, 5)) == (1, 1, 2)
    assert (grower.add(0, 5), grower.add(0, 6), grower.left) == (1, None, 0)
    tree = grower.tree()
    assert (tree.tokens.tolist(), tree.parent.tolist()) == ([7, 5, 5], [-1, 0, 1])


@given(trees())
def test_what_was_grown_is_a_tree(tree: Tree) -> None:
    assert checked(tree, VOCABULARY, anchor=int(tree.tokens[0])) is tree


LIES = {
    "it is a list": [1, 2],
    "tokens is list, not int64[nodes]": Tree([1], array(-1)),  # type: ignore[arg-type]
    "tokens is int32[1], not int64[nodes]": Tree(np.array([1], np.int32), array(-1)),
    "parent is int64[1, 1], not int64[nodes]": Tree(array(1), array(-1)[None]),
    "2 tokens and 1 parents": Tree(array(1, 2), array(-1)),
    "0 tokens and 0 parents": Tree(array(), array()),
    "node 1 carries token 4 of a vocabulary of 4": Tree(array(1, 4), array(-1, 0)),
    "node 0 carries token -1 of a vocabulary of 4": Tree(array(-1), array(-1)),
    "its anchor is token 2, the last committed one is 1": Tree.of(2),
    "the parent of the anchor is 0, not -1": Tree(array(1), array(0)),
    "the parent of node 1 is 1, not an earlier node": Tree(array(1, 2), array(-1, 1)),
    "the parent of node 2 is -1, not an earlier node": Tree(array(1, 2, 3), array(-1, 0, -1)),
    "children of one node carry the same token": Tree(array(1, 2, 2), array(-1, 0, 0)),
}


@pytest.mark.parametrize("line", LIES)
def test_a_drafter_that_lies_is_told_where(line: str) -> None:
    with pytest.raises(OptpassError) as caught:
        checked(LIES[line], VOCABULARY, anchor=1)
    assert str(caught.value) == f"[draft] the draft is not a tree: {line}; mend the drafter, or decode without it"
