"""The user's line of source, found in tracebacks and in the messages of the tracer."""

from __future__ import annotations

import linecache
import os
import re
import sysconfig
import traceback
from collections.abc import Iterable, Sequence

import torch

FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
HERE = os.path.dirname(os.path.abspath(__file__))
STDLIB = sysconfig.get_path("stdlib") + os.sep
MACHINERY = (
    os.path.dirname(torch.__file__) + os.sep,
    HERE + os.sep,
    os.path.join(os.path.dirname(HERE), "program.py"),
    "<",
)
"""Files that trace a model rather than belong to one."""


def is_users(file: str) -> bool:
    """Whether a file belongs to the model: neither torch, nor Python's library, nor ours."""
    if file.startswith(MACHINERY):
        return False
    return "site-packages" in file or not file.startswith(STDLIB)


def own_frames(frames: Iterable[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """The frames of a stack that belong to the model, from its first call of a module on."""
    seen = False
    own = []
    for frame in frames:
        seen = seen or frame.filename.startswith(MACHINERY)
        if seen and is_users(frame.filename):
            own.append(frame)
    return own


def innermost(frames: Iterable[traceback.FrameSummary]) -> str:
    """``file.py:41`` of the innermost frame of the model; empty if there is none."""
    own = own_frames(frames)
    return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own else ""


def mentioned(text: str) -> str:
    """``file.py:41`` of the last frame of the model that a message quotes."""
    own = _quoted(text)
    return f"{os.path.basename(own[-1][0])}:{own[-1][1]}" if own else ""


def source_text(failures: Sequence[Exception]) -> str:
    """The source of the line of the model at which tracing stopped."""
    own = own_frames(traceback.extract_tb(failures[0].__traceback__))
    if own:
        return (own[-1].line or "").strip().rstrip(":")
    quoted = [found for failure in failures for found in _quoted(str(failure))[-1:]]
    return linecache.getline(*quoted[0]).strip().rstrip(":") if quoted else ""


def _quoted(text: str) -> list[tuple[str, int]]:
    return [(m["file"], int(m["line"])) for m in FRAME.finditer(text) if is_users(m["file"])]
