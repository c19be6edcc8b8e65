"""What a command leaves on stdout and stderr: a table or one JSON object, and at most one line of error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any

from optpass.errors import OptpassError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

    from optpass.results import Fidelity, PassRecord

WIDTH = 160
"""Columns of a table that does not go to a terminal; nothing is cut off in a log."""


@dataclass(frozen=True)
class Outcome:
    """The result of a command.

    Attributes:
        data: the object that ``--json`` prints.
        show: prints the same for a reader; None where the failure says it all.
        failure: what was asked for and could not be had, told as one line; the process ends with its exit code.
    """

    data: Mapping[str, Any]
    show: Callable[[Console], None] | None
    failure: OptpassError | None = None


def of_model(result: BaseModel, show: Callable[[Console], None] | None, failure: OptpassError | None = None) -> Outcome:
    """The outcome of an API result; one that has no ``ok`` of its own is ok because it was not an error."""
    return Outcome({"ok": True, **json.loads(result.model_dump_json())}, show, failure)


def failure_of(passes: Iterable[PassRecord], fidelity: Iterable[Fidelity]) -> OptpassError:
    """Why a result is not ok: the first pass that was not kept, or the first output that is not faithful."""
    for record in passes:
        if not record.done:
            code, _, reason = (
                record.reason.partition("] ") if record.reason.startswith("[") else ("", "", record.reason)
            )
            what, _, remedy = reason.partition("; ")
            said = f"{record.name} was {'refused' if record.status == 'refused' else 'rolled back'}: {what}"
            return OptpassError(code.strip("[") or "probe", said, remedy or "see optpass inspect", exit_code=1)
    for row in fidelity:
        if not row.ok:
            what = f"{row.output} of {row.engine} differs from eager execution by {row.difference:.1e}"
            remedy = f"{row.tolerance:.1e} is what rounding explains; use another backend or precision"
            return OptpassError("fidelity", what, remedy, exit_code=1)
    return OptpassError("not-ok", "a check failed", "see the result", exit_code=1)


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
    failure = outcome.failure
    told = {"ok": False, "error": _said(failure, failure.exit_code)} if failure else {}
    text = json.dumps({**outcome.data, **told}, allow_nan=False) + "\n" if as_json else _shown(outcome.show, stdout)
    code = _flush(stdout, text, failure.exit_code if failure else 0)
    return write_error(failure, code, None) if failure else code


def write_error(error: OptpassError, code: int, stdout: IO[str] | None) -> int:
    """Print the error as one line on stderr, and as an object on ``stdout`` where it is given; returns ``code``."""
    refusal = error.refusal
    where = f", in {refusal.where}" if refusal.where else ""
    line = _one_line(f"error[{refusal.code}]: {refusal.what}{where}; {refusal.remedy}")
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    if stdout is not None:
        with contextlib.suppress(OSError):
            print(json.dumps({"ok": False, "error": _said(error, code)}), file=stdout, flush=True)
    return code


def _said(error: OptpassError, code: int) -> dict[str, Any]:
    where = str(error.refusal.where) if error.refusal.where else None
    return {**asdict(error.refusal), "where": where, "exit_code": code}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shown(show: Callable[[Console], None] | None, stdout: IO[str]) -> str:
    if show is None:
        return ""
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
    show(console)
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
