"""The zoo's models, found by scanning this package: a folder ``fashion_vit`` is the model ``fashion-vit``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

import optpass.zoo


class Entry(Protocol):
    """What the ``entry`` module of a zoo model holds."""

    METRIC: str
    SUMMARY: str
    factory: Callable[[], tuple[Any, tuple[Any, ...], Mapping[str, Any]]]
    test_split: Callable[[int], dict[str, NDArray[np.generic]]]


def names() -> list[str]:
    """Names of the zoo's models, as the user writes them."""
    return sorted(info.name.replace("_", "-") for info in pkgutil.iter_modules(optpass.zoo.__path__) if info.ispkg)


def load(name: str) -> Entry:
    """The entry of a zoo model; nothing of it is imported before this."""
    module = importlib.import_module(f"optpass.zoo.{name.replace('-', '_')}.entry")
    return cast("Entry", module)
