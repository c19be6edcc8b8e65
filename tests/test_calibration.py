"""The knob of a policy, searched on some seeds and held to others."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import optpass
from optpass import calibration, grammar
from optpass.cli._options import share
from optpass.errors import OptpassError
from optpass.runtime.denoise import Denoiser
from optpass.runtime.features import STREAK, THRESHOLD
from tests.denoisers import SAMPLER, Small, example


@given(st.floats(0.001, 20), st.floats(0.1, 4))
def test_search_ends_just_below_what_holds(limit: float, start: float) -> None:
    found = calibration._largest(lambda value: value <= limit, start, whole=False)
    # enclosed by doublings, then halved five times
    assert found <= limit
    assert found > min(limit, start * 2 ** (calibration.DOUBLINGS - 2)) * (1 - 2**-4) or limit < start / 2**5


@given(st.integers(1, 40), st.integers(1, 8))
def test_search_of_whole_numbers_finds_the_largest(limit: int, start: int) -> None:
    found = calibration._largest(lambda value: value <= limit, start, whole=True)
    assert found == int(found)
    assert found <= limit
    assert found == limit or limit > 2 * start


def test_nothing_holds() -> None:
    assert calibration._largest(lambda value: False, 1.0, whole=False) == 0
    assert calibration._largest(lambda value: False, 3.0, whole=True) == 0


@pytest.mark.parametrize("passes", ["cache(policy=first-block)", "cache(policy=taylorseer,form=split)"])
def test_bound_is_held_on_other_samples(tmp_path: Path, passes: str) -> None:
    computed = {}
    for drop in (0.001, 0.05):
        folder = tmp_path / f"{drop}"
        result = optpass.optimize(
            (Small().eval(), (), example()), passes, out=folder, sampler=SAMPLER, max_drop=drop, seconds=0
        )
        assert result.ok
        (record,) = result.passes
        assert "others" in record.data
        model = optpass.load(folder)
        assert isinstance(model, Denoiser)
        (remade,) = grammar.read_recipe(model.manifest.recipe, "recipe")
        knob = THRESHOLD if "first-block" in passes else STREAK
        assert getattr(remade.options, knob) == record.options[knob] == model.engine.initial[knob]
        dense = optpass.load(folder, engine="dense/onnxruntime-f32")
        assert isinstance(dense, Denoiser)
        conditions = {"label": example()["label"].numpy()[-1:]}  # those that nothing was searched on
        args = {"count": 16, "seed": calibration.APART}
        expected, _ = calibration.similarity.samples(dense, conditions, **args)  # type: ignore[arg-type]
        found, taken = calibration.similarity.samples(model, conditions, **args)  # type: ignore[arg-type]
        (figure,) = calibration.metrics.similar("", found, expected, taken)
        assert figure.drop.high <= drop
        computed[drop] = len(taken.computed)
    assert computed[0.05] < computed[0.001]


def test_zero_where_no_sample_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "engine"
    optpass.optimize(
        (Small().eval(), (), example()), "cache(policy=interval,form=split)", out=folder, sampler=SAMPLER, seconds=0
    )
    model, dense = optpass.load(folder), optpass.load(folder, engine="dense/onnxruntime-f32")
    assert isinstance(model, Denoiser)
    assert isinstance(dense, Denoiser)
    monkeypatch.setattr(calibration, "SEARCHED", 2)
    monkeypatch.setattr(calibration, "HELD", 2)
    found = calibration.calibrate(model, dense, {"label": example()["label"].numpy()}, 1e-9)
    assert (found.knob, found.value) == ("streak", 0)
    assert found.held.drop.high <= 1e-9


def test_share_is_a_percentage_or_a_number() -> None:
    assert share("2%", "--max-drop") == share(" 0.02", "--max-drop") == 0.02
    for text in ("", "2", "-1%", "two", "2%%", "nan"):
        with pytest.raises(OptpassError, match=r"give a share such as 2% or 0\.02"):
            share(text, "--max-drop")


def test_bound_without_a_cached_denoiser_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptpassError, match=r"with cache among the passes of a denoiser"):
        optpass.optimize((Small().eval(), (), example()), "", out=tmp_path / "engine", max_drop=0.02, seconds=0)
    assert not (tmp_path / "engine").exists()
