"""Intervals that may be looked at after every value."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpass import sequential

ALPHA = 0.005
VALUES = st.lists(st.floats(-1, 1), min_size=1, max_size=40).map(np.array)


@given(VALUES, st.floats(-1, 1), st.floats(0, 1))
def test_evidence_falls_as_the_centre_rises(values: np.ndarray, centre: float, step: float) -> None:
    assert sequential.log_evidence(values, centre + step) <= sequential.log_evidence(values, centre) + 1e-9


@given(VALUES)
def test_the_two_ends_are_mirrored_and_in_order(values: np.ndarray) -> None:
    low, high = sequential.interval(values, ALPHA)
    assert low <= high
    assert sequential.interval(-values, ALPHA) == (-high, -low)


def test_too_few_values_exclude_nothing() -> None:
    assert sequential.interval(np.full(7, 0.3), ALPHA) == (-math.inf, math.inf)
    assert sequential.interval(np.full(8, 0.3), ALPHA)[0] > 0


@pytest.mark.parametrize("noise", ["normal", "heavy", "drifting", "two-sided"])
def test_the_centre_is_excluded_by_chance_no_more_often_than_promised(noise: str) -> None:
    """Looked at after every one of 60 values; alpha is 0.1 here, so that 400 sequences can tell."""
    rng = np.random.default_rng(3)
    scale = np.linspace(0.1, 3, 60) if noise == "drifting" else np.ones(60)
    wrong = 0
    for _ in range(400):
        values = 0.01 * scale * (rng.standard_t(1.5, 60) if noise == "heavy" else rng.standard_normal(60))
        if noise == "two-sided":
            values = 0.01 * rng.choice([-1.0, 1.0], 60)
        wrong += any(sequential.log_evidence(values[:count], 0.0) >= math.log(10) for count in range(1, 61))
    assert wrong / 400 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 400)


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(4)
    found = 0
    for _ in range(50):
        low, _ = sequential.interval(0.02 + 0.01 * rng.standard_normal(40), ALPHA)
        found += low > 0
    assert found >= 48
