"""Progress on stderr: a bar on a terminal; elsewhere a line now and then, and none for work that is quickly done."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

from optpass.cli import _signals

Report = Callable[[str, int, int], None]
"""Called with what is being done, the steps done, and the steps in all."""

PREFIX = "optpass: "
SECONDS = 10.0
"""Between two lines where there is no terminal."""


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """A callback that shows how far the work is, while the block runs."""
    if sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb":
        with _bar() as report:
            yield report
    else:
        yield _lines()


@contextlib.contextmanager
def _bar() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task("")

        def report(what: str, done: int, total: int) -> None:
            _signals.check()
            bar.update(task, description=what, completed=done, total=total)

        yield report


def _lines() -> Report:
    last = time.monotonic()

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        _signals.check()
        if time.monotonic() - last < SECONDS:
            return
        last = time.monotonic()
        with contextlib.suppress(OSError):
            print(f"{PREFIX}{what} {done}/{total}", file=sys.stderr, flush=True)

    return report
