"""Data of the zoo's models that are files of Debian packages: where they are, fetched if they are nowhere."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from optpass.errors import OptpassError

VARIABLE = "OPTPASS_DATA"
"""Environment variable that names another directory."""


def directory(name: str, packages: tuple[str, ...], installed: Path, complete: Callable[[Path], bool]) -> Path:
    """Where the files are: in ``OPTPASS_DATA``, else where the packages put them, else unpacked in a cache directory.

    Args:
        name: what the files are, as errors say it.
        packages: Debian packages that bring them; installed, or only unpacked where that needs a right.
        installed: the directory into which these packages put them.
        complete: whether a directory holds them all.

    Raises:
        OptpassError: ``OPTPASS_DATA`` lacks them, or they are nowhere and cannot be fetched.
    """
    named = " and ".join(packages)
    own = os.environ.get(VARIABLE)
    if own:
        if not complete(Path(own)):
            raise OptpassError("data", f"{VARIABLE}={own} lacks {name}", f"copy those of {named} there")
        return Path(own)
    cached = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "optpass"
    unpacked = cached / installed.relative_to("/")
    for folder in (installed, unpacked):
        if complete(folder):
            return folder
    if os.geteuid() == 0:
        _call("apt-get", "install", "-y", *packages) or (
            _call("apt-get", "update") and _call("apt-get", "install", "-y", *packages)
        )
    if complete(installed):
        return installed
    _unpack(packages, cached)
    if complete(unpacked):
        return unpacked
    raise OptpassError("data", f"{name} are not here and cannot be fetched", f"install {named}, or set {VARIABLE}")


def _unpack(packages: tuple[str, ...], target: Path) -> None:
    """Download the Debian packages without installing them, which needs no root."""
    with tempfile.TemporaryDirectory() as work:
        if not _call("apt-get", "download", *packages, cwd=work):
            return
        for package in Path(work).glob("*.deb"):
            target.mkdir(parents=True, exist_ok=True)
            _call("dpkg", "-x", str(package), str(target))


def _call(*command: str, cwd: str | None = None) -> bool:
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, check=False, timeout=300).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
