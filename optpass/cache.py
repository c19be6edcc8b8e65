"""What earlier runs made, by a hash of all that it depends on; what is damaged counts as not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optpass import files
from optpass.errors import OptpassError
from optpass.export import artifact
from optpass.runtime import manifest as manifests
from optpass.runtime.manifest import Manifest


def home() -> Path:
    """Where the cache is by default: ``optpass`` under ``XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optpass"


def key(**parts: Any) -> str:
    """The SHA-256 of what an entry depends on, as 64 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Cache:
    """A directory of entries that may be deleted at any time.

    Attributes:
        made: how many entries of each kind were made, not found.
        found: how many were found.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = {"engines": 0, "figures": 0}
        self.found = {"engines": 0, "figures": 0}

    def figures(self, name: str, make: Callable[[], Any], *, anew: bool = False) -> Any:
        """A value that JSON can hold; ``anew`` makes and stores it whatever is there."""
        path = self.folder / "figures" / f"{name}.json"
        known = None if anew else _read(path)
        if known is not None:
            self.found["figures"] += 1
            return known
        self.made["figures"] += 1
        value = make()
        text = json.dumps(value)
        files.write(path, f"{_hash(text)}\n{text}")
        return value

    def engine(self, name: str, make: Callable[[artifact.Writer], None]) -> tuple[Path, Manifest]:
        """An artifact and its manifest; ``make`` adds its engines and finishes it."""
        folder = self.folder / "engines" / name
        try:
            manifest = manifests.read(folder)
        except OptpassError:
            shutil.rmtree(folder, ignore_errors=True)
            self.made["engines"] += 1
            with artifact.writer(folder, force=True) as new:
                make(new)
            return folder, manifests.read(folder)
        self.found["engines"] += 1
        return folder, manifest


def _read(path: Path) -> Any:
    try:
        expected, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return json.loads(text) if text and expected == _hash(text) else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
