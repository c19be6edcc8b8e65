"""Presets: schedules by kind of model, each with what it was measured to bring, and on what.

A file ``<kind>.toml`` holds those of a kind; a kind without a file has none, since nothing was measured for it.
``python -m benchmarks.presets`` measures all of them and writes the promises.
"""

from __future__ import annotations

import importlib.resources
import tomllib
from dataclasses import dataclass
from typing import Any

from optpass.errors import OptpassError
from optpass.grammar import make
from optpass.passes.base import Pass
from optpass.results import Promise

NAMES = ("safe", "balanced", "fast")


@dataclass(frozen=True)
class Preset:
    """A schedule with its promise.

    Attributes:
        summary: what it does, in words.
        control: the same sites and counts with tokens chosen by chance, in the grammar of ``--passes``.
        promise: None while it is not yet measured.
    """

    name: str
    kind: str
    summary: str
    passes: tuple[Pass, ...]
    control: str
    promise: Promise | None


def check(name: str) -> None:
    """Refuse a name that no kind has.

    Raises:
        OptpassError: there is no such preset.
    """
    if name not in NAMES:
        raise OptpassError("unknown-preset", f"there is no preset {name!r}", f"presets are {', '.join(NAMES)}")


def kinds() -> list[str]:
    """The kinds of model that presets were measured for."""
    files = importlib.resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def preset(name: str, kind: str) -> Preset:
    """The preset of a name for a kind of model.

    Raises:
        OptpassError: there is no such preset, or nothing was measured for the kind.
    """
    check(name)
    if kind not in kinds():
        what = f"no preset was measured yet for a model of the kind {kind}"
        raise OptpassError("no-preset", what, f"give --passes; presets are there for {', '.join(kinds())}")
    tables = tomllib.loads(importlib.resources.files(__name__).joinpath(f"{kind}.toml").read_text(encoding="utf-8"))
    return _preset(name, kind, tables[name])


def _preset(name: str, kind: str, table: dict[str, Any]) -> Preset:
    passes = tuple(make(entry.pop("name"), entry) for entry in table["pass"])
    promise = Promise.model_validate(table["promise"]) if "promise" in table else None
    return Preset(name, kind, table["summary"], passes, table["control"], promise)
