"""The gate: verdicts on figures that are known, and on real engines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import optpass
from optpass import ci, gating, measure
from optpass.errors import OptpassError
from optpass.gating import GateResult
from optpass.runtime.peak import peak_mib
from tests.export import artifacts

ENGINE = "onnxruntime-f32"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifacts.write(tmp_path_factory.mktemp("gate") / "engine")


@pytest.fixture(scope="module")
def data(whole: Path) -> Path:
    """Labels are what the dense engine says, so that its top-1 is 100."""
    tokens = np.random.default_rng(0).standard_normal((120, 9, 32)).astype(np.float32)
    dense = optpass.load(whole, engine=f"dense/{ENGINE}", threads=1)
    (first,) = dense.outputs[:1]
    said = np.concatenate([dense.run(tokens=tokens[i : i + 6])[first.name] for i in range(0, 120, 6)])
    path = whole.parent / "data.npz"
    np.savez(path, tokens=tokens, labels=said.argmax(-1))
    return path


class Timed:
    """Rounds with times that are known: seconds of each engine, and the noise of a round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *seconds: float, noise: float = 0.004, most: int = 60) -> None:
        self.seconds, self.noise, self.most, self.count = seconds, noise, most, 0
        self.rng = np.random.default_rng(5)
        monkeypatch.setattr(measure, "rounds", self.rounds)

    def rounds(self, openers: Sequence[Any], budget: float) -> Iterator[measure.Round]:
        for _ in range(self.most):
            self.count += 1
            times = [
                seconds * np.exp(self.noise * (self.rng.standard_normal() + 0.2 * self.rng.standard_normal(9)))
                for seconds in self.seconds[-len(openers) :]
            ]
            yield measure.Round(tuple(times))


def verdicts(result: GateResult) -> dict[str, str]:
    return {one.name: one.verdict for one in result.checks}


@pytest.mark.parametrize(("seconds", "verdict"), [(0.010, "pass"), (0.01053, "fail"), (0.01111, "fail")])
def test_a_slowdown_of_five_per_cent_breaks_a_limit_of_three(
    whole: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, verdict: str
) -> None:
    timed = Timed(monkeypatch, 0.010, seconds)
    result = optpass.gate(whole, {"speedup": {"at_least": 0.97}}, engine=ENGINE)
    assert result.verdict == verdict
    assert timed.count < gating.NOISE_ROUNDS + 30


def test_noise_too_large_to_tell_is_neither(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(monkeypatch, 0.010, 0.01053, noise=0.3, most=20)
    result = optpass.gate(whole, {"speedup": {"at_least": 0.97}}, engine=ENGINE)
    assert result.verdict == "inconclusive"
    assert not result.ok
    assert timed.count == gating.NOISE_ROUNDS + 20
    assert result.noise is not None
    assert result.noise.percent > 10


def test_one_broken_limit_breaks_the_gate_and_each_says_by_how_much(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Timed(monkeypatch, 0.020, 0.010)
    budget = {
        "latency": {"p50_ms": 8.0, "p95_ms": 50.0},
        "speedup": {"at_least": 1.5},
        "throughput": {"at_least": 100},
    }
    result = optpass.gate(whole, budget, engine=ENGINE)
    assert result.verdict == "fail"
    assert verdicts(result) == {
        "latency.p50_ms": "fail",
        "latency.p95_ms": "pass",
        "throughput.at_least": "pass",
        "speedup.at_least": "pass",
    }
    broken = result.checks[0]
    assert broken.value == pytest.approx(10, rel=0.02)
    assert broken.low is not None
    assert broken.low > 8
    assert "breaks at most 8 by" in broken.said
    assert result.checks[1].value > broken.value
    assert result.checks[2].value == pytest.approx(300, rel=0.02)  # three samples a call


def test_an_undecided_limit_beside_a_broken_one_is_broken(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Timed(monkeypatch, 0.020, 0.010, most=20)
    budget = {"latency": {"p50_ms": 8.0}, "speedup": {"at_least": 2.0}}
    assert verdicts(optpass.gate(whole, budget, engine=ENGINE)) == {
        "latency.p50_ms": "fail",
        "speedup.at_least": "inconclusive",
    }


def test_real_engines_keep_what_they_can_and_break_what_they_cannot(whole: Path, data: Path) -> None:
    budget = {
        "threads": 1,
        "seconds": 20,
        "latency": [{"p50_ms": 500}, {"p50_ms": 0.0001, "batch": 1}],
        "size": [{"mib": 100}, {"mib": 0.001}],
        "memory": [{"peak_mib": 2000}, {"peak_mib": 5}],
        "quality": [{"max_drop": 100, "data": str(data)}, {"at_least": 99.9, "data": str(data)}],
    }
    result = optpass.gate(whole, budget, engine=ENGINE)
    found = [(one.name, one.at, one.verdict) for one in result.checks]
    assert found == [
        ("latency.p50_ms", "", "pass"),
        ("latency.p50_ms", "batch=1", "fail"),
        ("memory.peak_mib", "", "pass"),
        ("memory.peak_mib", "", "fail"),
        ("size.mib", "", "pass"),
        ("size.mib", "", "fail"),
        ("quality.max_drop", "top1, 120 samples", "pass"),
        ("quality.at_least", "top1, 120 samples", "fail"),
    ]


def test_quality_is_decided_by_the_interval_unless_by_value(whole: Path, data: Path) -> None:
    measured = optpass.gate(whole, {"quality": {"max_drop": 100, "data": str(data)}}, engine=ENGINE).checks[0]
    assert measured.high is not None
    assert measured.value < measured.high
    between = (measured.value + measured.high) / 2
    for decide, verdict in (("interval", "inconclusive"), ("value", "pass")):
        budget = {"quality": {"max_drop": between, "data": str(data), "decide": decide}}
        assert optpass.gate(whole, budget, engine=ENGINE).verdict == verdict


def test_an_engine_against_itself_loses_nothing(whole: Path, data: Path) -> None:
    budget = {"quality": {"max_drop": 0, "over": "baseline", "data": str(data)}, "baseline": {"artifact": str(whole)}}
    (one,) = optpass.gate(whole, budget, engine=ENGINE).checks
    assert (one.verdict, one.low, one.high) == ("pass", 0, 0)


def test_agreement_needs_no_data(whole: Path) -> None:
    (one,) = optpass.gate(whole, {"quality": {"metric": "cosine-agreement", "at_least": 0.1}}, engine=ENGINE).checks
    assert one.at.startswith("cosine-agreement")
    assert one.verdict == "pass"


def test_memory_is_that_of_a_process_that_does_nothing_else(whole: Path) -> None:
    ballast = np.ones(400 * 2**20 // 8)
    assert 10 < peak_mib(whole, ENGINE, threads=1) < 400
    assert ballast.sum() > 0


def test_a_stored_baseline_judges_the_next_artifact(
    whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tmp_path / "baseline.json"
    budget = {
        "speedup": {"over": "baseline", "at_least": 0.97},
        "quality": {"over": "baseline", "max_drop": 100, "data": str(data)},
        "baseline": {"file": str(stored)},
    }
    Timed(monkeypatch, 0.010, 0.010)
    assert optpass.gate(whole, budget, engine=ENGINE, save=stored).checks == []
    assert json.loads(stored.read_text())["latency"][0]["p50_ms"]["value"] == pytest.approx(10, rel=0.02)
    assert optpass.gate(whole, budget, engine=ENGINE).verdict == "pass"
    Timed(monkeypatch, 0.012, 0.012)
    result = optpass.gate(whole, budget, engine=ENGINE)
    assert verdicts(result) == {"speedup.at_least": "fail", "quality.max_drop": "pass"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s["hardware"].update(cpu="another"), "written on another machine: the CPU another"),
        (lambda s: s["hardware"].update(cores=99), "another machine: cores 99"),
        (lambda s: s.update(threads=99), "another machine: threads 99"),
        (lambda s: s.update(source="another"), "is of another, the artifact of tests"),
        (lambda s: s.update(engine="openvino-f32"), "has no engine onnxruntime-f32"),
        (lambda s: s["inputs"][0].update(shape=[1]), "takes other inputs"),
        (lambda s: s.update(latency=[]), "no latency at the sizes of the example"),
        (lambda s: s.update(kind="other"), "holds no stored baseline"),
    ],
)
def test_a_baseline_of_something_else_is_refused(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, sentence: str
) -> None:
    stored = tmp_path / "baseline.json"
    budget = {"speedup": {"over": "baseline", "at_least": 0.97}, "baseline": {"file": str(stored)}}
    Timed(monkeypatch, 0.010, 0.010)
    optpass.gate(whole, budget, engine=ENGINE, save=stored)
    content = json.loads(stored.read_text())
    change(content)
    stored.write_text(json.dumps(content))
    with pytest.raises(OptpassError, match=sentence):
        optpass.gate(whole, budget, engine=ENGINE)


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        ({"engine": "tensorrt-f16", "size": {"mib": 1}}, "no engine 'tensorrt-f16'"),
        ({"latency": {"p50_ms": 1, "batch": 99}}, "batch=99 is outside 1 to 6"),
        ({"latency": {"p50_ms": 1, "sizes": {"length": 3}}}, "no dynamic dimension 'length'"),
        ({"quality": {"max_drop": 1}}, "no data with a metric"),
        ({"quality": {"max_drop": 1, "metric": "top1"}}, "metric top1 is asked for without data"),
        ({"speedup": {"at_least": 1, "over": "baseline"}}, "names none"),
        ({"speedup": {"at_least": 1, "over": "baseline"}, "baseline": {"file": "none.json"}}, "cannot be read"),
        ({"threads": 4096, "size": {"mib": 1}}, "4096 threads"),
    ],
)
def test_a_budget_that_does_not_fit_the_artifact_is_refused(whole: Path, budget: Any, sentence: str) -> None:
    with pytest.raises(OptpassError, match=sentence):
        optpass.gate(whole, budget)


@pytest.fixture
def mixed(whole: Path, monkeypatch: pytest.MonkeyPatch) -> GateResult:
    Timed(monkeypatch, 0.020, 0.010, most=20)
    budget = {"latency": {"p50_ms": 8.0, "p95_ms": 50}, "speedup": {"at_least": 2.0}}
    return optpass.gate(whole, budget, engine=ENGINE).model_copy(update={"budget": "ci/budget,1.toml"})


def test_junit_has_a_case_for_each_limit(mixed: GateResult) -> None:
    suite = ElementTree.fromstring(ci.junit(mixed))
    assert {key: suite.get(key) for key in ("tests", "failures", "skipped")} == {
        "tests": "3",
        "failures": "1",
        "skipped": "1",
    }
    (broken,) = (case for case in suite.iter("testcase") if case.find("failure") is not None)
    assert broken.get("name") == "latency.p50_ms"
    failure = broken.find("failure")
    assert failure is not None
    assert "breaks at most 8" in str(failure.get("message"))


def test_markdown_has_a_row_for_each_limit(mixed: GateResult) -> None:
    text = ci.markdown(mixed)
    assert text.startswith("### optpass gate: ❌ fail")
    assert [line.count("|") for line in text.splitlines() if line.startswith("| ")] == [6] * 4


def test_annotations_are_escaped_and_only_of_what_is_not_held(mixed: GateResult) -> None:
    first, second = ci.workflow_commands(mixed)
    assert first.startswith("::error file=ci/budget%2C1.toml,title=latency.p50_ms::latency.p50_ms is ")
    assert "%25)" in first
    assert second.startswith("::warning ")
