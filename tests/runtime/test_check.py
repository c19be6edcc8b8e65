"""Fidelity where outputs name places: of two that rounding makes equal either may be named, and no other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from optpass.runtime.check import Recorded, Reference, fidelity, valued
from optpass.runtime.engines.base import Array

LOGITS = np.array([[[0.1, 0.9, 0.9 + 1e-7, 0.2], [0.4, 0.1, 0.0, 0.3]]], np.float32)
OUTPUTS: dict[str, Array] = {
    "logits": LOGITS,
    "token": np.array([[2, 0]]),
    "candidates": np.array([[[2, 1], [0, 3]]]),
    "order": np.array([[0, 1]]),
}


class Engine:
    """Gives what it was made with."""

    def __init__(self, **outputs: Array) -> None:
        self.outputs = outputs

    def run(self, **arrays: Any) -> dict[str, Array]:
        return self.outputs


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({}, set()),
        ({"token": np.array([[1, 0]])}, set()),
        ({"candidates": np.array([[[1, 2], [0, 3]]])}, set()),
        ({"token": np.array([[3, 0]])}, {"token"}),
        ({"token": np.array([[2, 3]])}, {"token"}),
        ({"candidates": np.array([[[2, 1], [0, 1]]])}, {"candidates"}),
        ({"candidates": np.array([[[2, 1], [3, 0]]])}, {"candidates"}),
        ({"order": np.array([[1, 0]])}, {"order"}),
    ],
)
def test_choices_count_by_what_they_chose(changed: dict[str, Array], wrong: set[str]) -> None:
    reference = Reference({}, {}, [Recorded.of({}, valued(OUTPUTS))])
    found = fidelity("engine", Engine(**{**OUTPUTS, **changed}), reference, 1e-6)
    assert {entry.output for entry in found if not entry.ok} == wrong
