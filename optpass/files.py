"""Files written whole or not at all, and refused before the work where they cannot be written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from optpass.errors import OptpassError


def check_target(path: Path | None) -> None:
    """Refuse a file that cannot be written, before the work that it is for.

    Raises:
        OptpassError: its directory is not there or not to be written to, or it is a directory itself.
    """
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OptpassError("output", f"{path} cannot be written", "name a file in a directory that you may write to")


def write(path: Path, content: str | bytes) -> None:
    """Write beside the target and rename.

    Raises:
        OptpassError: the file system refuses; nothing is left of the attempt.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(prefix=".optpass-", dir=path.parent)
        try:
            with os.fdopen(number, "wb") as file:
                file.write(data)
            os.chmod(name, 0o666 & ~umask())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        what = f"{path} cannot be written: {error.strerror}"
        raise OptpassError("output", what, "free some space, or give another path") from error


def umask() -> int:
    """What this process takes from the permissions of what it makes; ``mkstemp`` and ``mkdtemp`` take more."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
