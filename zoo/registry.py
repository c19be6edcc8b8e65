"""The zoo's models, found by scanning this package: a folder ``fashion_vit`` is the model ``fashion-vit``."""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
import json
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

import optpass.zoo
from optpass.errors import OptpassError

Progress = Callable[[int, int, str], None]


class Entry(Protocol):
    """What the ``entry`` module of a zoo model holds; importing it imports no torch.

    ``SCHEDULE`` and ``CONTROL`` are there where passes on the model have a demonstration.
    """

    METRIC: str
    SUMMARY: str
    SCHEDULE: str
    CONTROL: str
    factory: Callable[[], tuple[Any, tuple[Any, ...], Mapping[str, Any]]]
    test_split: Callable[[int | None], dict[str, NDArray[np.generic]]]


def names() -> list[str]:
    """Names of the zoo's models, as the user writes them."""
    return sorted(info.name.replace("_", "-") for info in pkgutil.iter_modules(optpass.zoo.__path__) if info.ispkg)


def load(name: str) -> Entry:
    """The entry of a zoo model; nothing of it is imported before this."""
    return cast("Entry", importlib.import_module(f"{_package(name)}.entry"))


def describe(name: str) -> dict[str, Any]:
    """What a zoo model is, and its metric on the whole test split as its training wrote it."""
    entry = load(name)
    log = json.loads((importlib.resources.files(_package(name)) / "training.json").read_text())
    return {"name": name, "summary": entry.SUMMARY, "metric": entry.METRIC, "quality": log[-1][f"test_{entry.METRIC}"]}


def trainer(name: str) -> Callable[[Path, Progress], float]:
    """The training recipe of a zoo model: writes into a directory, returns the metric on the whole test split."""
    module = importlib.import_module(f"{_package(name)}.train")
    return cast("Callable[[Path, Progress], float]", module.train)


def _package(name: str) -> str:
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        remedy = f"did you mean {near[0]}?" if near else f"zoo models are {', '.join(names())}"
        raise OptpassError("unknown-model", f"there is no zoo model {name!r}", remedy)
    return f"optpass.zoo.{name.replace('-', '_')}"
