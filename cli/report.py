"""``optpass report``: an artifact as one HTML page, or its graph for a viewer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from optpass.cli import _options as options
from optpass.cli._outcome import Outcome, of_model
from optpass.cli._progress import progress


def command(
    artifact: options.Artifact,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The file to write.", show_default="beside the artifact"),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile/--no-profile", help="Run the engines here to tell where their time goes.")
    ] = True,
    graph: Annotated[
        Literal["netron", "model-explorer"] | None,
        typer.Option(help="Write the graph for this viewer in place of the page.", show_default=False),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="Whose graph to write.", show_default="the default one, if it is ONNX")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no report.")] = False,
    json: options.Json = False,
) -> Outcome:
    """Tell of ARTIFACT in one HTML page.

    What was verified and measured, tokens and work per layer, time per op, and which tokens were kept. The page loads
    nothing from anywhere.
    """
    from optpass import api

    with progress() as report:
        result = api.report(
            artifact, out=out, profile=profile, graph=graph, engine=engine, force=force, progress=report
        )
    return of_model(result, lambda console: console.print(f"wrote {result.report}", soft_wrap=True, markup=False))
