"""``optpass inspect``: what analysis finds in a model, or what is in an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optpass.cli import _options as options
from optpass.cli._outcome import Outcome, of_model
from optpass.errors import OptpassError


def command(
    source: Annotated[str, typer.Argument(metavar="MODEL|ARTIFACT", help="A model, or a directory optimize wrote.")],
    dynamic: options.Dynamic = None,
    static: options.Static = False,
    inputs: options.Inputs = None,
    json: options.Json = False,
) -> Outcome:
    """Show blocks, attention and token axes of a model, or the engines of an artifact.

    Of engines: what they are built for, whether they run here, their layers and precisions.
    """
    dimensions = options.dynamic_dimensions(dynamic, static)
    arrays = options.read_inputs(inputs)

    from optpass import api
    from optpass.cli import _tables

    if Path(source, "manifest.json").is_file():
        if dimensions is not None or arrays is not None:
            raise OptpassError("usage", f"{source} is an artifact, whose sizes are fixed", "name it alone")
        artifact = api.inspect_artifact(source)
        return of_model(artifact, lambda console: _tables.show_artifact(artifact, console))
    result = api.inspect(source, dynamic=dimensions, inputs=arrays)
    return Outcome(
        {"ok": True, **result.data},
        lambda console: console.print(result.text, markup=False, highlight=False, soft_wrap=True),
    )
