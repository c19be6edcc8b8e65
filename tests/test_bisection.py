"""``bisect``: the planted site is named, a harmless schedule is not, and nothing is made twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import optpass
from optpass import bisection, manager, metrics
from optpass.bisection import Limits, blamed
from optpass.errors import OptpassError
from optpass.export import artifact
from optpass.grammar import parse
from optpass.program import Program
from optpass.results import BisectResult, Interval, Step
from optpass.structure import analyse
from tests import small

MILD, BAD = "merge(at=[0,2],keep=0.9)", "prune(selector=random,at=1,keep=0.02)"
ROWS = 60


def source() -> tuple[Any, ...]:
    return small.Small(), (), dict(zip(("x", "lengths", "bias"), small.program().main.example, strict=True))


def data() -> dict[str, np.ndarray[Any, Any]]:
    """Rows with what the model itself says as labels, so that it is right about all of them."""
    torch.manual_seed(2)
    x, lengths, bias = torch.randn(ROWS, small.TOKENS, 6), torch.full((ROWS,), small.TOKENS), torch.zeros(ROWS, 18, 18)
    with torch.no_grad():
        labels = small.Small()(x, lengths, bias).argmax(-1)
    return {"x": x.numpy(), "lengths": lengths.numpy(), "bias": bias.numpy(), "labels": labels.numpy()}


def of_small(passes: str, cache: Path, **options: Any) -> BisectResult:
    options = {"data": data(), "seconds": 0, **options}
    return optpass.bisect(source(), passes, cache=cache, **options)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each engine that is built and each metric that is taken."""
    noted: list[str] = []
    add, scores = artifact.Writer.add, metrics.scores

    def building(self: artifact.Writer, *args: Any, **kwargs: Any) -> str:
        noted.append("engine")
        return add(self, *args, **kwargs)

    def scoring(*args: Any, **kwargs: Any) -> metrics.Scores:
        noted.append("scores")
        return scores(*args, **kwargs)

    monkeypatch.setattr(artifact.Writer, "add", building)
    monkeypatch.setattr(metrics, "scores", scoring)
    return noted


# who is to blame


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_planted_site_is_named_by_pass_and_module_path(cache: Path) -> None:
    found = optpass.bisect("fashion-vit", f"{MILD},{BAD}", samples=200, max_drop=1, seconds=0, cache=cache)
    assert [(step.name, step.site, step.tokens) for step in found.steps] == [
        ("merge", "blocks.0", 177),
        ("prune", "blocks.1", 5),
        ("merge", "blocks.2", 5),
    ]
    assert found.steps[1].options == {"keep": 0.02, "selector": "random"}
    (blame,) = found.blame
    assert (blame.figure, blame.step, blame.certain, found.largest) == ("quality", 2, True, 2)
    assert not found.ok
    assert found.steps[1].own_loss.low > 1
    assert (found.metric, found.unit, found.samples) == ("top1", "points", 200)


def test_harmless_schedule_blames_nobody_and_reuses_what_it_shares(cache: Path) -> None:
    found = optpass.bisect("fashion-vit", MILD, samples=200, seconds=0, cache=cache)
    assert found.ok
    assert not found.blame
    assert (found.built, found.found) == (1, 2)  # the dense engine and the first merge are those of the test before


def test_identity_contributes_nothing(tmp_path: Path) -> None:
    passes = "prune(selector=norm,at=0,keep=0.3),prune(selector=norm,at=1,keep=1.0),merge(at=2,r=2)"
    found = of_small(passes, tmp_path)
    assert [step.own_loss == Interval(value=0, low=0, high=0) for step in found.steps][1]
    assert found.steps[0].own_loss.value > 0
    assert found.steps[1].loss == found.steps[0].loss
    assert found.dense.value == 1


def test_losses_of_the_steps_add_up(tmp_path: Path) -> None:
    found = of_small("prune(selector=norm,keep=[0.8,0.5,0.3],at=[0,1,3])", tmp_path)
    assert sum(step.own_loss.value for step in found.steps) == pytest.approx(found.steps[-1].loss.value)
    assert found.steps[-1].loss.value == pytest.approx(100 * (found.dense.value - found.steps[-1].metric.value))


def test_agreement_is_taken_where_there_are_no_labels(tmp_path: Path) -> None:
    found = of_small("prune(selector=norm,keep=0.5,at=[0,2])", tmp_path, data=None)
    assert found.metric == "top1-agreement"
    assert "says nothing about quality" in found.label
    again = of_small("prune(selector=norm,keep=0.5,at=[0,2])", tmp_path, data=None)
    assert (again.steps, again.built) == (found.steps, 0)


def step(
    number: int, loss: tuple[float, float, float], own: float = 0.0, speed: float = 1.0, factor: float = 1.0
) -> Step:
    def around(value: float, width: float) -> Interval:
        return Interval(value=value, low=value - width, high=value + width)

    low, value, high = loss
    return Step(
        number=number,
        name="prune",
        options={},
        site=f"blocks.{number}",
        tokens=9,
        metric=around(0.9, 0.01),
        loss=Interval(value=value, low=low, high=high),
        own_loss=around(own, 0.3),
        speedup=around(speed, 0.05),
        own_speedup=around(factor, 0.05),
    )


@pytest.mark.parametrize(
    ("steps", "limits", "expected"),
    [
        # the first step whose whole interval is beyond the limit, even if one before it may be
        ([step(1, (-1, 0.6, 2)), step(2, (1, 2, 3)), step(3, (2, 3, 4))], Limits(max_drop=0.5), [("quality", 2, True)]),
        ([step(1, (-1, 0, 1)), step(2, (-1, 0.6, 2))], Limits(max_drop=0.5), [("quality", 2, False)]),
        ([step(1, (-1, 0, 1)), step(2, (-1, 0.4, 2), own=0.4)], Limits(max_drop=0.5), []),
        # without a limit the costliest that is no chance
        ([step(1, (0, 0, 0), own=0.5), step(2, (0, 0, 0), own=2)], Limits(), [("quality", 2, True)]),
        ([step(1, (0, 0, 0), own=0.2)], Limits(), []),
        # speed: a step that slows, unless the schedule is fast enough all the same
        ([step(1, (0, 0, 0), factor=1.5), step(2, (0, 0, 0), factor=0.9)], Limits(), [("speed", 2, True)]),
        ([step(1, (0, 0, 0), factor=0.97)], Limits(), []),
        ([step(1, (0, 0, 0), factor=0.9, speed=1.3)], Limits(at_least=1.2), []),
        ([step(1, (0, 0, 0), factor=1.1, speed=1.1)], Limits(at_least=1.2), [("speed", 1, False)]),
        ([step(1, (0, 0, 0), factor=0.9, speed=0.9)], Limits(at_least=1.2), [("speed", 1, True)]),
        ([], Limits(max_drop=0, at_least=2), []),
    ],
)  # fmt: skip
def test_blame(steps: list[Step], limits: Limits, expected: list[tuple[str, int, bool]]) -> None:
    assert [(b.figure, b.step, b.certain) for b in blamed(steps, limits, "top1", "points")] == expected


# the steps


@pytest.mark.parametrize(
    "passes",
    [
        "prune(selector=random,keep=[0.9,0.5,0.6],at=[0,1,3])",
        "merge(r=[2,3],at=[0,2]),prune(selector=random,keep=0.6,at=[2,3],place=block)",
        "prune(selector=norm,at=2,keep=0.5),merge(at=2,r=2)",
    ],
)
def test_all_steps_together_are_the_schedule(passes: str) -> None:
    program: Program = small.program()
    whole = manager.apply(program, parse(passes), verify=False)
    structure = analyse(program.main)
    steps = bisection.expanded(structure, parse(passes))
    assert len(steps) == sum(len(record.sites) for record in whole.records)
    again = program.main.retraced(manager.rewrite(structure, steps).untap())
    assert bisection.hash_of(again) == bisection.hash_of(whole.program.main)


def test_hash_tells_weights_apart() -> None:
    first, second = small.program().main, small.program().main
    assert bisection.hash_of(first) == bisection.hash_of(second)
    with torch.no_grad():
        next(iter(second.exported.state_dict.values())).view(-1)[0] += 1e-3
    assert bisection.hash_of(first) != bisection.hash_of(second)


def test_refused_pass_is_an_error_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(OptpassError, match="no-site") as refused:
        of_small("prune(at=9)", tmp_path)
    assert refused.value.exit_code == 2
    with pytest.raises(OptpassError, match="no-room"):
        of_small("prune(at=1,r=30)", tmp_path)


# the cache


def test_second_run_builds_and_takes_nothing(tmp_path: Path, builds: list[str]) -> None:
    passes = "prune(selector=norm,keep=[0.5,0.5],at=[0,2])"
    first = of_small(passes, tmp_path)
    assert builds == ["engine"] * 3 + ["scores"] * 3
    builds.clear()
    second = of_small(passes, tmp_path)
    assert builds == []
    assert (second.steps, second.built, second.found) == (first.steps, 0, 3)
    changed = of_small("prune(selector=norm,keep=[0.5,0.3],at=[0,2])", tmp_path)
    assert builds == ["engine", "scores"]
    assert changed.steps[0] == first.steps[0]


def test_other_data_are_scored_anew_on_the_same_engines(tmp_path: Path, builds: list[str]) -> None:
    of_small("prune(selector=norm,keep=0.5,at=0)", tmp_path)
    builds.clear()
    of_small("prune(selector=norm,keep=0.5,at=0)", tmp_path, samples=30)
    assert builds == ["scores", "scores"]


def test_damaged_entries_are_made_again(tmp_path: Path, builds: list[str]) -> None:
    passes = "prune(selector=norm,keep=0.5,at=[0,2])"
    first = of_small(passes, tmp_path)
    (flipped, lost, untouched) = sorted((tmp_path / "engines").iterdir())
    model = next(flipped.rglob("*.onnx"))
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    (lost / "manifest.json").unlink()
    (cut, altered, empty) = sorted((tmp_path / "figures").iterdir())
    cut.write_text(cut.read_text()[:-9])
    altered.write_text(altered.read_text().replace("1.0", "0.0", 1))
    empty.write_bytes(b"")
    builds.clear()
    second = of_small(passes, tmp_path)
    assert builds == ["engine"] * 2 + ["scores"] * 3
    assert second.steps == first.steps
    assert untouched.is_dir()


def test_latency_is_measured_again_unless_asked_not_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bisection, "ROUNDS", 1)
    passes = "prune(selector=norm,keep=0.5,at=1)"
    first = of_small(passes, tmp_path, seconds=0.05)
    assert first.steps[0].speedup == first.steps[0].own_speedup is not None
    cached = of_small(passes, tmp_path, seconds=0.05, cached_latency=True)
    again = of_small(passes, tmp_path, seconds=0.05)
    assert cached.steps[0].speedup == first.steps[0].speedup
    assert again.steps[0].speedup != first.steps[0].speedup


def test_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptpassError):
        of_small("prune(selector=norm,keep=0.5,at=1)", tmp_path / "file")


# what a budget says


def test_budget_gives_the_limits_and_the_call_overrules_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **data())  # type: ignore[arg-type]
    (tmp_path / "budget.toml").write_text(
        '[quality]\nmetric = "top1"\ndata = "data.npz"\nsamples = 40\nmax_drop = 1.0\n'
    )
    passes = "prune(selector=norm,keep=0.2,at=0)"
    found = of_small(passes, tmp_path, budget=tmp_path / "budget.toml", data=None)
    assert (found.samples, found.ok) == (40, False)
    assert "more than 1;" in found.blame[0].why
    assert of_small(passes, tmp_path, budget=tmp_path / "budget.toml", data=None, max_drop=100).ok
