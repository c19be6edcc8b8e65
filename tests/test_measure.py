"""Latency: what the statistics say of times that are known."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optpass
from optpass import measure
from optpass.errors import OptpassError
from optpass.results import Interval
from tests.export import artifacts


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifacts.write(tmp_path_factory.mktemp("measure") / "engine")


class Clock:
    """A clock that functions move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def function(self, name: str, seconds: float) -> Any:
        def run() -> None:
            self.calls.append(name)
            self.now += seconds * (3 if len(self.calls) > 40 else 1)

        return run


def test_pairs_alternate_after_a_warm_up_until_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    dense, optimized = measure.interleave(clock.function("a", 0.2), clock.function("b", 0.1), budget=9.0)
    after = "".join(clock.calls)[2 * measure.WARM_UP :]
    assert after.startswith("abbaabba")
    assert len(dense) == len(optimized) > measure.FEWEST
    assert 9.0 <= clock.now < 9.0 + 0.9
    assert gc.isenabled()


def test_a_budget_of_nothing_still_gives_the_fewest_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    dense, _ = measure.interleave(clock.function("a", 0.2), clock.function("b", 0.1), budget=0)
    assert len(dense) == measure.FEWEST


def test_the_ratio_is_of_pairs_so_that_a_slow_spell_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    dense, optimized = measure.interleave(clock.function("a", 0.2), clock.function("b", 0.1), budget=9.0)
    assert dense.max() > 2 * dense.min()
    ratio = measure.speedup(dense, optimized)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((2, 2, 2))


def test_the_interval_of_equal_engines_holds_one_and_of_different_ones_does_not() -> None:
    rng = np.random.default_rng(1)
    slow = 1 + 0.1 * rng.random(50)
    ratio = measure.speedup(slow, rng.permutation(slow))
    assert ratio.low < 1 < ratio.high
    assert measure.verdict(ratio) == "no gain"
    assert measure.verdict(measure.speedup(slow, slow / 1.5)) == "faster"
    assert measure.verdict(measure.speedup(slow, slow * 1.5)) == "slower"


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (1.01, 1.2, "faster"),
        (0.8, 0.99, "slower"),
        (0.99, 1.01, "no gain"),
        (1.0, 1.3, "no gain"),
        (0.7, 1.0, "no gain"),
    ],
)
def test_no_gain_is_said_wherever_the_interval_touches_one(low: float, high: float, word: str) -> None:
    assert measure.verdict(Interval(value=(low + high) / 2, low=low, high=high)) == word


def test_each_engine_of_an_artifact_is_timed_against_its_twin(whole: Path) -> None:
    seen: list[str] = []
    result = measure.bench(
        whole, threads=1, budget=0, sizes={"batch": 2}, progress=lambda name, share: seen.append(name)
    )
    assert [entry.engine for entry in result.latency] == ["onnxruntime-f32", "openvino-f32"]
    assert {entry.batch for entry in result.latency} == {"2"}
    assert all(entry.dense.runs == measure.FEWEST for entry in result.latency)
    assert all(entry.dense.p95_ms >= entry.dense.median_ms > 0 for entry in result.latency)
    assert set(seen) == {"onnxruntime-f32", "openvino-f32"}


def test_the_batch_is_named_after_the_inputs(whole: Path) -> None:
    (latency,) = measure.bench(whole, engine="openvino-f32", threads=1, budget=0).latency
    assert latency.batch == "3"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"engine": "tensorrt-f16"}, "no engine 'tensorrt-f16' with a dense twin; it has onnxruntime-f32"),
        ({"sizes": {"length": 3}}, "no dynamic dimension 'length'; it has batch"),
        ({"sizes": {"batch": 7}}, "batch=7 is outside 1 to 6"),
    ],
)
def test_what_cannot_be_timed_is_said(whole: Path, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptpassError, match=sentence):
        measure.bench(whole, threads=1, budget=0, **arguments)


def test_engines_on_different_numbers_of_threads_are_not_compared(whole: Path) -> None:
    dense = optpass.load(whole, engine="dense/onnxruntime-f32", threads=1)
    with pytest.raises(ValueError, match="1 and 2 threads"):
        measure.compare(dense, optpass.load(whole, threads=2), {"tokens": np.zeros((1, 9, 32), np.float32)})
