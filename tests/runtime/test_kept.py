"""Kept rows: a buffer that grows, forgets and forks holds what a list of rows would."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optpass.errors import OptpassError
from optpass.runtime.kept import LEAST_ROOM, PAST_POSITION, Kept
from optpass.runtime.manifest import TensorInfo

INPUTS = [
    TensorInfo(name="input_ids", dtype="int64", shape=["batch", "tokens"]),
    TensorInfo(name=f"{PAST_POSITION}0", dtype="int64", shape=["batch", "past_0"]),
    TensorInfo(name="past_key_0", dtype="float32", shape=["batch", 2, "past_0", 3]),
    TensorInfo(name="past_value_0", dtype="float32", shape=["batch", 2, "past_0", 5]),
]

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.tuples(st.integers(0, 30), st.integers(0, 30))),
        st.tuples(st.just("rollback"), st.tuples(st.integers(0, 40), st.integers(0, 40))),
        st.tuples(st.just("fork"), st.tuples(st.integers(0, 1), st.integers(0, 1))),
    ),
    max_size=12,
)


@settings(max_examples=60)
@given(ACTIONS)
def test_buffers_hold_what_lists_would(actions: list[tuple[str, tuple[int, int]]]) -> None:
    kept = Kept(INPUTS, 2, 1000)
    lists: list[list[float]] = [[], []]
    mark = 0.0
    for what, pair in actions:
        if what == "append":
            width = max(max(pair), 1)
            rows = np.zeros((2, 1, width, 1), np.float32)
            for text, count in enumerate(pair):
                values = [mark + i for i in range(count)]
                rows[text, 0, :count, 0] = values
                lists[text] = lists[text] + values
                mark += count
            new = {"key_0": np.broadcast_to(rows, (2, 2, width, 3)), "value_0": np.broadcast_to(rows, (2, 2, width, 5))}
            kept.append(new, np.array(pair))
        elif what == "rollback":
            left = [min(count, len(rows)) for count, rows in zip(pair, lists, strict=True)]
            kept.rollback(np.array(left))
            lists = [rows[:count] for rows, count in zip(lists, left, strict=True)]
        else:
            before = kept
            kept = kept.fork(pair)
            lists = [lists[text] for text in pair]
            before.rollback(np.zeros(2, np.int64))  # what was forked is a copy
    assert kept.length[0].tolist() == kept.position.tolist() == [len(rows) for rows in lists]
    for text, expected in enumerate(lists):
        count = len(expected)
        places = kept.places[0][text].tolist()
        assert places == [*range(count), *[-1] * (len(places) - count)]
        for rows in kept.rows.values():
            assert (rows[text, :, :count] == np.array(expected, np.float32)[None, :, None]).all()


def test_appending_does_not_copy_what_is_kept() -> None:
    kept = Kept(INPUTS, 1, 10_000)
    new = {"key_0": np.ones((1, 2, 1, 3), np.float32), "value_0": np.ones((1, 2, 1, 5), np.float32)}
    copies, buffer = 0, kept.rows["past_key_0"]
    for _ in range(2000):
        kept.append(new, np.array([1]))
        copies += kept.rows["past_key_0"] is not buffer
        buffer = kept.rows["past_key_0"]
    assert copies < 40
    assert kept.arrays()["past_key_0"] is buffer


def test_room_never_exceeds_the_context() -> None:
    kept = Kept(INPUTS, 1, 20)
    assert kept.places[0].shape == (1, 20)
    assert LEAST_ROOM > 20
    with pytest.raises(OptpassError) as raised:
        kept.check_room(21)
    assert raised.value.refusal.code == "context"


def test_groups_hold_rows_of_their_own() -> None:
    infos = [
        TensorInfo(name=f"{PAST_POSITION}0", dtype="int64", shape=["batch", "past_0"]),
        TensorInfo(name=f"{PAST_POSITION}1", dtype="int64", shape=["batch", "past_1"]),
        TensorInfo(name="past_key_0", dtype="float32", shape=["batch", 1, "past_0", 1]),
        TensorInfo(name="past_key_1", dtype="float32", shape=["batch", 1, "past_1", 1]),
    ]
    kept = Kept(infos, 2, 100)
    rows = np.arange(10, dtype=np.float32).reshape(1, 1, 10, 1)
    kept.fill(1, {"key_0": rows, "key_1": rows[:, :, [0, 3, 9]]}, 0, [np.arange(10), np.array([0, 3, 9])], 10)
    new = np.full((2, 1, 1, 1), 7, np.float32)
    kept.append({"key_0": new, "key_1": new}, np.array([0, 1]))
    assert kept.length.tolist() == [[0, 11], [0, 4]]
    assert kept.places[1][1, :5].tolist() == [0, 3, 9, 10, -1]
    assert kept.rows["past_key_1"][1, 0, :4, 0].tolist() == [0, 3, 9, 7]
    kept.rollback(np.array([5, 5]))
    assert kept.length.tolist() == [[0, 5], [0, 2]]
    assert kept.position.tolist() == [0, 5]
