"""``optpass diff``: what sets two artifacts apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optpass.cli import _options as options
from optpass.cli._outcome import Outcome, of_model
from optpass.errors import OptpassError


def command(
    first: Annotated[Path, typer.Argument(metavar="A", help="Directory that optimize wrote.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    exit_code: Annotated[
        bool,
        typer.Option("--exit-code", help="Exit with 1 where passes, tokens or the files of an engine differ."),
    ] = False,
    json: options.Json = False,
) -> Outcome:
    """Compare two artifacts: passes, tokens, graphs and figures."""
    from optpass import api
    from optpass.cli import _tables

    result = api.diff(first, second)
    failure = None
    if exit_code and not result.same:
        failure = OptpassError("differs", f"{first} and {second} differ", "see the tables", exit_code=1)
    return of_model(result, lambda console: _tables.show_diff(result, console), failure)
