"""What a command leaves on stdout and stderr: a table or one JSON object, and at most one line of error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any

from optpass.errors import OptpassError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

WIDTH = 160
"""Columns of a table that does not go to a terminal; nothing is cut off in a log."""


@dataclass(frozen=True)
class Outcome:
    """The result of a command.

    Attributes:
        ok: whether the process ends with 0; otherwise with 1.
        data: the object that ``--json`` prints.
        show: prints the same for a reader.
    """

    ok: bool
    data: Mapping[str, Any]
    show: Callable[[Console], None]


def of_model(result: BaseModel, show: Callable[[Console], None]) -> Outcome:
    """The outcome of an API result; one that has no ``ok`` of its own is ok because it was not an error."""
    data = {"ok": True, **json.loads(result.model_dump_json())}
    return Outcome(bool(data["ok"]), data, show)


def claimed_stdout() -> IO[str]:
    """The stream for the one object of ``--json``; whatever else the process prints goes to stderr from here on.

    The file descriptor itself is turned round, since libraries in C++ print past ``sys.stdout``.
    """
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return stream


def write(outcome: Outcome | None, stdout: IO[str], *, as_json: bool) -> int:
    """Print the outcome; returns the exit code."""
    if outcome is None:
        return _flush(stdout, "", 0)
    text = json.dumps(outcome.data, allow_nan=False) + "\n" if as_json else _shown(outcome, stdout)
    return _flush(stdout, text, 0 if outcome.ok else 1)


def write_error(error: OptpassError, code: int, stdout: IO[str] | None) -> int:
    """Print the error as one line on stderr, and as an object on ``stdout`` where it is given; returns ``code``."""
    refusal = error.refusal
    where = f", in {refusal.where}" if refusal.where else ""
    line = _one_line(f"error[{refusal.code}]: {refusal.what}{where}; {refusal.remedy}")
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    if stdout is not None:
        said = {**asdict(refusal), "where": str(refusal.where) if refusal.where else None, "exit_code": code}
        with contextlib.suppress(OSError):
            print(json.dumps({"ok": False, "error": said}), file=stdout, flush=True)
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shown(outcome: Outcome, stdout: IO[str]) -> str:
    from rich.console import Console

    on_terminal = stdout.isatty()
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        force_terminal=on_terminal,
        width=None if on_terminal else WIDTH,
        highlight=False,
        soft_wrap=not on_terminal,
    )
    outcome.show(console)
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())


def _flush(stdout: IO[str], text: str, code: int) -> int:
    try:
        stdout.write(text)
        stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough; the work itself was done
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
    except UnicodeEncodeError:
        return _flush(stdout, text.encode("ascii", "replace").decode("ascii"), code)
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        raise OptpassError(
            "stdout", f"the result cannot be written to stdout: {error.strerror}", "free space, or name another target"
        ) from error
    return code
