"""The bookkeeping of dimensions."""

from __future__ import annotations

from optpass.layout import Atom, Part, plain, regroup, rejoined, same_group

BATCH, TOKENS = Atom("batch", 2), Atom("tokens", 9, (Part(9),))


def test_a_flattened_dimension_is_taken_apart_again() -> None:
    flat = regroup(((BATCH,), (TOKENS,), plain(8)), [18, 8])
    assert flat == ((BATCH, TOKENS), plain(8))
    assert regroup(flat, [2, 9, 2, 4]) == ((BATCH,), (TOKENS,), plain(2), plain(4))


def test_a_view_that_splits_the_tokens_has_no_layout() -> None:
    assert regroup(((BATCH,), (TOKENS,), plain(8)), [2, 3, 3, 8]) is None


def test_protected_tokens_back_in_place_make_the_axis_whole() -> None:
    assert rejoined([Part(1, fixed=True), Part(8, left=1)], prefix=1, suffix=0) == [Part(9)]
    assert rejoined([Part(8, right=1), Part(1, fixed=True)], prefix=0, suffix=1) == [Part(9)]


def test_tokens_of_another_origin_stay_apart() -> None:
    apart = [Part(5, fixed=True), Part(9)]
    assert rejoined(apart, prefix=1, suffix=0) == apart
    assert rejoined([Part(5, fixed=True), Part(8, left=1)], prefix=1, suffix=0) == [Part(4, fixed=True), Part(9)]


def test_products_in_another_order_are_other_dimensions() -> None:
    assert not same_group((BATCH, TOKENS), (TOKENS, BATCH))
    assert same_group((BATCH, *plain(4)), (BATCH, *plain(2), *plain(2)))
