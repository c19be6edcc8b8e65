"""``optpass bench``: an artifact against the unmodified model on the same engine."""

from __future__ import annotations

from typing import Annotated

import typer

from optpass.cli import _options as options
from optpass.cli._outcome import Outcome, of_model
from optpass.cli._progress import progress


def command(
    artifact: options.Artifact,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure, per engine.")] = 5.0,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Batch size, where the batch is dynamic.", show_default="the example's")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="One engine only.", show_default="all of them")] = None,
    json: options.Json = False,
) -> Outcome:
    """Time ARTIFACT against the unmodified model.

    Both on the same engine, in turn: median, p95, and their ratio with its interval.
    """
    from optpass import api
    from optpass.cli import _tables

    with progress() as report:
        result = api.bench(artifact, seconds=seconds, batch=batch, engine=engine, progress=report)
    return of_model(result, lambda console: _tables.show_bench(result, console))
