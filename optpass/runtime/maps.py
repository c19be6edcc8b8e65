"""Where each token of the examples went at each site: recorded by optimize, read without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optpass.errors import OptpassError
from optpass.runtime.engines.base import Array

PATH = "recorded/maps.npz"
"""Inside an artifact."""

SAMPLES = 8
"""Samples of the example that are kept."""


@dataclass(frozen=True)
class SiteMap:
    """The tokens of the space before all maps, after one site.

    Attributes:
        path: module path of the block; ``name`` is the pass that acts there.
        tokens: how many there are after it.
        place: int32 ``[samples, tokens before all maps]``, the token that each is part of now; -1 where dropped.
        share: float32 of the same shape, the part of a token that is in ``place``: less than one where a pass spreads
            tokens over several others, of which ``place`` names the one that took most.
    """

    path: str
    name: str
    tokens: int
    place: Array
    share: Array


@dataclass(frozen=True)
class TokenMaps:
    """All sites, in the order in which the tokens pass them.

    Attributes:
        prefix, suffix: tokens at either end that no pass may move, such as the class token.
        grid: rows and columns of the tokens between, where they are patches of an image.
    """

    prefix: int
    suffix: int
    grid: tuple[int, int] | None
    sites: Sequence[SiteMap]

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file without pickled objects."""
        arrays: dict[str, Any] = {}
        for number, site in enumerate(self.sites):
            arrays[f"place/{number}"], arrays[f"share/{number}"] = site.place, site.share
        index = {
            "prefix": self.prefix,
            "suffix": self.suffix,
            "grid": self.grid,
            "sites": [{"path": site.path, "name": site.name, "tokens": site.tokens} for site in self.sites],
        }
        arrays["index"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
        np.savez_compressed(path, **arrays)

    @classmethod
    def read(cls, path: Path) -> TokenMaps:
        """Read what ``save`` wrote.

        Raises:
            OptpassError: the file is not there or of another form.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            index = json.loads(arrays["index"].tobytes())
            grid = index["grid"]
            sites = [
                SiteMap(**facts, place=arrays[f"place/{number}"], share=arrays[f"share/{number}"])
                for number, facts in enumerate(index["sites"])
            ]
            return cls(index["prefix"], index["suffix"], None if grid is None else (grid[0], grid[1]), sites)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OptpassError("reference", f"{path} holds no token maps", "rebuild the artifact") from error
