"""The command line: a typer app built from the files beside this one, and the one place that ends a process.

A file ``NAME.py`` is the command NAME if it holds ``command``, a group of commands if it holds ``app``; a leading
underscore marks a helper. A command returns an ``Outcome``. What it raises becomes one line on stderr here, and,
with ``--json``, one object on stdout. Exit codes: 0 ok, 1 a check failed or a pass was refused, 2 bad input, 3 a gate
undecided.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from optpass.cli import _signals
from optpass.errors import OptpassError

if TYPE_CHECKING:
    import typer

    from optpass.cli._outcome import Outcome

JSON = "--json"
DEBUG = "OPTPASS_DEBUG"
"""Environment variable that shows the traceback of an error, and the warnings of the libraries beneath."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    args = sys.argv[1:] if args is None else args
    try:
        _reopen_streams()
        _signals.install()
        _silence()
        from optpass.cli import _outcome

        stdout = _outcome.claimed_stdout() if JSON in args else sys.stdout
        code = run(args, stdout)
    except (KeyboardInterrupt, _signals.Terminated) as error:
        code = _fail(error, None)
    sys.exit(code)


def run(args: Sequence[str], stdout: IO[str]) -> int:
    """Run one command line with its result on ``stdout``; returns the exit code, whatever happens."""
    from optpass.cli import _outcome

    as_json = JSON in args
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            outcome = _invoke(args or ["--help"])
            _signals.check()
        return _outcome.write(outcome, stdout, as_json=as_json)
    except BaseException as error:  # noqa: BLE001 - the last line of defence, which tells each kind apart
        return _fail(_signals.came() or error, stdout if as_json else None)


def build() -> typer.Typer:
    """The app, with a command for each file of this package."""
    import importlib
    import pkgutil

    import typer

    import optpass.cli
    from optpass.cli import _options

    app = typer.Typer(name="optpass", rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    app.callback()(_options.program)
    for info in pkgutil.iter_modules(optpass.cli.__path__):
        if info.name.startswith("_") or info.name == "main":
            continue
        module = importlib.import_module(f"optpass.cli.{info.name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=info.name)
        else:
            app.command(info.name)(module.command)
    return app


def _invoke(args: Sequence[str]) -> Outcome | None:
    """Parse and run; None for ``--help`` and ``--version``, which have printed by themselves."""
    import typer

    command = typer.main.get_command(build())
    try:
        with command.make_context("optpass", list(args)) as context:
            outcome: Outcome = command.invoke(context)
            return outcome
    except typer.Exit:
        return None
    except Exception as error:
        if not hasattr(error, "format_message"):  # the base of typer's usage errors has moved between its versions
            raise
        raise _usage(error) from error


def _usage(error: Any) -> OptpassError:
    path = error.ctx.command_path if getattr(error, "ctx", None) else "optpass"
    return OptpassError("usage", error.format_message().rstrip("."), f"see {path} --help")


def _fail(error: BaseException, stdout: IO[str] | None) -> int:
    """One line on stderr, one object on stdout where it is given; returns the exit code."""
    from optpass.cli import _outcome

    if os.environ.get(DEBUG) and not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    told, code = _told(error)
    return _outcome.write_error(told, code, stdout)


def _told(error: BaseException) -> tuple[OptpassError, int]:
    """Any error as one of ours, with its exit code."""
    if isinstance(error, OptpassError):
        return error, error.exit_code or 1
    if isinstance(error, KeyboardInterrupt):
        return OptpassError("interrupted", "stopped by Ctrl-C", "nothing half done is left behind"), 130
    if isinstance(error, _signals.Terminated):
        return OptpassError("terminated", "stopped by SIGTERM", "nothing half done is left behind"), _signals.TERMINATED
    if isinstance(error, SystemExit):
        return OptpassError("exit", "the code of the model called sys.exit", "let it raise an error instead"), 1
    if isinstance(error, MemoryError):
        return OptpassError("memory", "not enough memory", "use a smaller batch or fewer samples"), 1
    what = f"internal error, {type(error).__name__}: {error}"
    return OptpassError("internal", what, f"please report it, with the traceback that {DEBUG}=1 shows"), 1


def _silence() -> None:
    """Keep what libraries beneath have to say off the terminal; our own warnings stay."""
    if os.environ.get(DEBUG):
        return
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"optpass\b")
    logging.disable(logging.WARNING)


def _reopen_streams() -> None:
    """A stream that the caller has closed swallows what is written to it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open to the end of the process
