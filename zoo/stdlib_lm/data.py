"""Source text of Python's standard library: modules for training, and twelve held-out ones that ship with the package.

The text is that of Python 3.11 as Debian ships it (libpython3.11-stdlib and libpython3.11-minimal), under the Python
Software Foundation License, version 2; so are the twelve modules in ``test.safetensors``, unchanged. Where the files
are not, the packages are installed, or unpacked into a cache directory; ``OPTPASS_DATA`` names another directory.
"""

from __future__ import annotations

import gzip
import lzma
import subprocess
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from optpass.zoo import packages

PACKAGES = ("libpython3.11-stdlib", "libpython3.11-minimal")
INSTALLED = Path("/usr/lib/python3.11")
SHIPPED = Path(__file__).parent / "test.safetensors"

HELD_OUT = (
    "asyncio/locks.py",
    "csv.py",
    "email/headerregistry.py",
    "fractions.py",
    "graphlib.py",
    "json/decoder.py",
    "logging/handlers.py",
    "plistlib.py",
    "shlex.py",
    "tempfile.py",
    "textwrap.py",
    "unittest/loader.py",
)
"""Never seen in training, neither by the model nor by its tokenizer."""

FOLDERS = (
    "__phello__",
    "config-3.11-x86_64-linux-gnu",
    "dist-packages",
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tkinter",
    "turtledemo",
)
"""Not read: tables, test suites, and what other packages may have put beside the two."""

TABLES = ("_compat_pickle.py", "_sysconfigdata*.py", "html/entities.py", "locale.py", "stringprep.py", "this.py")
"""Not read: modules that are mostly data."""


def training() -> dict[str, str]:
    """Text of each module that is trained on, by its path, in the order of paths."""
    folder = directory()
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.py") if not path.is_symlink())
    chosen = [path for path in paths if is_trained_on(path)]
    return {path.as_posix(): (folder / path).read_text("utf-8") for path in chosen}


def is_trained_on(path: Path) -> bool:
    """Whether the module at a path, relative to the library, is neither held out nor data."""
    excluded = path.as_posix() in HELD_OUT or any(folder in path.parts for folder in FOLDERS)
    return not excluded and not any(path.match(pattern) for pattern in TABLES)


def held_out() -> dict[str, str]:
    """Text of each held-out module, by its path."""
    arrays = load_file(SHIPPED)
    raw = lzma.decompress(arrays["text"].tobytes())
    ends = arrays["ends"].tolist()
    pieces = [raw[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return {path: piece.decode() for path, piece in zip(HELD_OUT, pieces, strict=True)}


def pack(target: Path) -> None:
    """Write the held-out modules into one file: their UTF-8 text, compressed, and where each of them ends."""
    pieces = [(directory() / path).read_bytes() for path in HELD_OUT]
    ends = np.cumsum([len(piece) for piece in pieces]).astype(np.int64)
    packed = lzma.compress(b"".join(pieces), preset=9)
    save_file({"text": np.frombuffer(packed, np.uint8), "ends": ends}, target)


def directory() -> Path:
    """Where the standard library is; fetched if it is nowhere."""
    return packages.directory("the files of Python's standard library", PACKAGES, INSTALLED, _complete)


def _complete(folder: Path) -> bool:
    return all((folder / path).is_file() for path in ("argparse.py", "os.py", *HELD_OUT))


def version() -> str:
    """Debian's version of the text, or ``unknown``."""
    folder = directory()
    if folder == INSTALLED:
        command = ["dpkg-query", "--show", "--showformat", "${Version}", PACKAGES[0]]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return "unknown"
        return done.stdout.strip() or "unknown"
    log = folder.parent.parent / "share" / "doc" / PACKAGES[1] / "changelog.Debian.gz"
    if not log.is_file():
        return "unknown"
    with gzip.open(log, "rt", encoding="utf-8") as file:  # its first line is: source package (version) suite; urgency
        return file.readline().partition("(")[2].partition(")")[0] or "unknown"
