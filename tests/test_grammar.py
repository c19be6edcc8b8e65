"""How passes are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from optpass import grammar
from optpass.errors import OptpassError


def options(text: str) -> list[tuple[str, dict[str, object]]]:
    return [(made.name, made.options.model_dump(exclude_unset=True)) for made in grammar.parse(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("merge", [("merge", {})]),
        ("prune()", [("prune", {})]),
        ("prune(selector=norm,at=3),merge(r=8)", [("prune", {"selector": "norm", "at": 3}), ("merge", {"r": 8})]),
        (" prune ( keep = 0.5 , at = [1, 2:4] ) ", [("prune", {"keep": 0.5, "at": [1, "2:4"]})]),
        ("prune(at=blocks.*,keep=0.5)", [("prune", {"at": "blocks.*", "keep": 0.5})]),
        ("merge(at=-1,r=2,proportional=false)", [("merge", {"at": -1, "r": 2, "proportional": False})]),
        ("merge(at=[0,2],keep=[0.5,0.6])", [("merge", {"at": [0, 2], "keep": [0.5, 0.6]})]),
    ],
)  # fmt: skip
def test_passes_are_read_with_their_options(text: str, expected: object) -> None:
    assert options(text) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no pass is named"),
        ("prune(", "not the end"),
        ("prune(keep=0.5", "not the end"),
        ("prune)x", "not ')'"),
        ("merge,", "not the end"),
        ("merge merge", "not 'm'"),
        ("prune(0.5)", "not '0'"),
        ("prune(r=1,r=2)", "given twice"),
        ("prun", "did you mean prune?"),
        ("prune(kep=0.5)", "did you mean keep?"),
        ("prune(keep=0)", "keep=0 lies outside 0 < keep <= 1"),
        ("prune(keep=1.5)", "keep=1.5 lies outside 0 < keep <= 1"),
        ("prune(keep=nan)", "keep"),
        ("prune(keep=half)", "keep='half'"),
        ("prune(r=-1)", "r=-1 is negative"),
        ("prune(r=1,keep=0.5)", "give keep or r, not both"),
        ("prune(selector=best)", "none of auto, cls-attention, divprune, mmr, norm, random"),
        ("transform(temperature=0)", "temperature=0"),
        ("merge(place=middle)", "place='middle'"),
    ],
)
def test_a_wrong_request_is_one_clear_error(text: str, sentence: str) -> None:
    with pytest.raises(OptpassError) as caught:
        grammar.parse(text)
    assert caught.value.exit_code == 2
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_is_the_same_as_the_text(tmp_path: Path) -> None:
    made = grammar.parse("prune(selector=norm,keep=[0.5,0.25],at=[1,2]),merge(r=8)")
    path = tmp_path / "recipe.toml"
    path.write_text(grammar.as_recipe(made))
    again = grammar.load_recipe(path)
    assert [(p.name, p.options) for p in again] == [(p.name, p.options) for p in made]


@pytest.mark.parametrize("text", ["x = 1", "[[pass]]\nkeep = 0.5", "not toml [", ""])
def test_a_recipe_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(OptpassError, match="recipe"):
        grammar.load_recipe(path)


def test_a_recipe_says_its_version_and_another_one_is_refused(tmp_path: Path) -> None:
    made = grammar.parse("merge(r=8)")
    text = grammar.as_recipe(made)
    assert text.startswith("version = 1\n")
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace("version = 1\n", ""))
    assert [p.options for p in grammar.load_recipe(path)] == [p.options for p in made]
    for version in ("2", '"1"', "true"):
        path.write_text(text.replace("version = 1", f"version = {version}"))
        with pytest.raises(OptpassError, match="recipe-version") as caught:
            grammar.load_recipe(path)
        assert caught.value.exit_code == 2
