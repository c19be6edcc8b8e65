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
        self.opened: list[str] = []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def function(self, name: str, seconds: float, spell: int = 40) -> Any:
        def run() -> None:
            self.calls.append(name)
            self.now += seconds * (3 if len(self.calls) > spell else 1)

        return run

    def opener(self, name: str, seconds: float) -> Any:
        def opened() -> Any:
            self.opened.append(name)
            self.now += 0.1
            return self.function(name, seconds)

        return opened


def test_turns_are_mirrored_after_a_warm_up_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    once = measure.interleave([clock.function("a", 0.2), clock.function("b", 0.1)], 9.0)
    dense, optimized = once.times
    after = "".join(clock.calls)[-4 * (len(dense) // 2) :]
    quads = [after[i : i + 4] for i in range(0, len(after), 4)]
    assert set(quads) == {"abba", "baab"}
    assert len(dense) == len(optimized) > measure.FEWEST
    assert 9.0 <= clock.now < 9.0 + 1.8
    assert gc.isenabled()


def test_who_is_warmed_up_first_is_drawn_by_lot(monkeypatch: pytest.MonkeyPatch) -> None:
    firsts = set()
    for _ in range(30):
        clock = Clock(monkeypatch)
        once = measure.interleave([clock.function("a", 0.2), clock.function("b", 0.1)], 0, fewest=2)
        firsts.add(clock.calls[0])
        assert once.times[0] == pytest.approx(2 * once.times[1])
    assert firsts == {"a", "b"}


def test_a_time_of_nothing_still_gives_the_fewest_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    once = measure.interleave([clock.function("a", 0.2), clock.function("b", 0.1)], 0)
    assert len(once.times[0]) == measure.FEWEST


def test_the_warm_up_lasts_until_runs_get_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    costs = iter([0.5] * 3 + [0.3] * 3 + [0.1] * 100)

    def warming() -> None:
        clock.now += next(costs)

    (times,) = measure.interleave([warming], 6.0, fewest=2).times
    assert times.max() == pytest.approx(0.1)


def test_the_ratio_is_of_turns_so_that_a_slow_spell_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    once = measure.interleave([clock.function("a", 0.2, 41), clock.function("b", 0.1, 41)], 9.0)
    assert once.times[0].max() > 2 * once.times[0].min()
    ratio = measure.speedup([once])
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((2, 2, 2))


def test_each_round_opens_the_engines_anew_in_an_order_drawn_by_lot(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    done = list(measure.rounds([clock.opener("a", 0.02), clock.opener("b", 0.01)], 40.0))
    firsts = clock.opened[::2]
    assert len(done) == len(firsts) > 8
    assert set(firsts) == {"a", "b"}
    assert {frozenset(clock.opened[i : i + 2]) for i in range(0, len(clock.opened), 2)} == {frozenset("ab")}
    assert all(one.log_ratio() == pytest.approx(np.log(2)) for one in done)


def pair(rng: np.random.Generator, ratio: float, runs: int = 50) -> measure.Round:
    slow = 1 + 0.1 * rng.random(runs)
    return measure.Round((slow, rng.permutation(slow) / ratio))


def test_quiet_turns_tell_the_ratio_that_a_busy_machine_hides() -> None:
    rng = np.random.default_rng(2)
    done = []
    for _ in range(30):
        busy = rng.random(40) < rng.choice([0.2, 0.9])  # in some rounds hardly a turn is left alone
        first, second = (1 + 0.01 * rng.random(40) + busy * rng.uniform(0.5, 3, 40) for _ in range(2))
        done.append(measure.Round((1.05 * first, second)))
    all_of_them = np.array([one.log_ratio() for one in done])
    calm = np.array([one.log_ratio() for one in measure.quiet(done)])
    assert calm.std() < all_of_them.std() / 5
    assert np.median(calm) == pytest.approx(np.log(1.05), abs=0.01)


def test_which_turns_are_quiet_depends_neither_on_the_engine_nor_on_what_comes_later() -> None:
    rng = np.random.default_rng(3)
    done = [measure.Round((rng.random(9) + 0.1, rng.random(9) + 0.1)) for _ in range(6)]
    swapped = [measure.Round(one.times[::-1]) for one in done]
    forward = [one.log_ratio() for one in measure.quiet(done)]
    assert forward == pytest.approx([-one.log_ratio() for one in measure.quiet(swapped)])
    assert [one.log_ratio() for one in measure.quiet(done[:3])] == forward[: len(measure.quiet(done[:3]))]


def test_the_interval_of_equal_engines_holds_one_and_of_different_ones_does_not() -> None:
    rng = np.random.default_rng(1)
    ratio = measure.speedup([pair(rng, 1.0)])
    assert ratio.low < 1 < ratio.high
    assert measure.verdict(ratio) == "no gain"
    assert measure.verdict(measure.speedup([pair(rng, 1.5)])) == "faster"
    assert measure.verdict(measure.speedup([pair(rng, 1 / 1.5)])) == "slower"


def test_what_differs_from_round_to_round_widens_the_interval() -> None:
    rng = np.random.default_rng(1)
    same = measure.speedup([pair(rng, 1.2) for _ in range(8)])
    apart = measure.speedup([pair(rng, ratio) for ratio in (1.0, 1.4) * 4])
    assert apart.high - apart.low > 3 * (same.high - same.low)
    assert same.low < 1.2 < same.high


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
    assert all(entry.dense.runs >= 2 for entry in result.latency)
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
