"""``optpass bisect``: which pass, at which site, made quality or speed fall."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optpass.cli import _options as options
from optpass.cli._outcome import Outcome, of_model
from optpass.cli._progress import progress
from optpass.errors import OptpassError

if TYPE_CHECKING:
    from optpass.results import BisectResult


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT|MODEL",
            help="An artifact, whose source and recipe are taken, or a model as for optimize.",
            show_default=False,
        ),
    ],
    passes: options.Passes = "",
    recipe: options.Recipe = None,
    preset: options.Preset = None,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            "-b",
            metavar="NAME[:PRECISION]",
            help="What the engines are built for.",
            show_default="that of the artifact, or onnxruntime",
        ),
    ] = None,
    dynamic: options.Dynamic = None,
    static: options.Static = False,
    inputs: options.Inputs = None,
    data: options.Data = None,
    metric: options.MetricName = None,
    samples: options.Samples = None,
    budget: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="Take the limits and the data of a budget.", show_default=False),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Most that may be lost: points of 100 for a share such as top1, else the metric's unit.",
            show_default="none: any loss that is no chance",
        ),
    ] = None,
    at_least: Annotated[
        float | None, typer.Option(min=0.0, help="Least speed-up over the unmodified model.", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to time each step; 0 times none.")] = 1.0,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep engines and scores there.", show_default="~/.cache/optpass"),
    ] = None,
    cached_latency: Annotated[
        bool, typer.Option("--cached-latency", help="Take latencies from the cache too.")
    ] = False,
    json: options.Json = False,
) -> Outcome:
    """Apply a schedule one site after the other and name the one to blame.

    Exit code 1 where a step is to blame, 0 where none is.
    """
    dimensions = options.dynamic_dimensions(dynamic, static)
    arrays = options.read_inputs(inputs)

    from optpass import api
    from optpass.cli import _tables

    with progress() as report:
        result = api.bisect(
            source,
            passes,
            recipe=recipe,
            preset=preset,
            backend=backend,
            dynamic=dimensions,
            inputs=arrays,
            data=data,
            metric=metric,
            samples=samples,
            budget=budget,
            max_drop=max_drop,
            at_least=at_least,
            seconds=seconds,
            cache=cache,
            cached_latency=cached_latency,
            progress=report,
        )
    return of_model(result, lambda console: _tables.show_bisect(result, console), _failure(result))


def _failure(result: BisectResult) -> OptpassError | None:
    """The first step to blame, as one line."""
    if not result.blame:
        return None
    blame = result.blame[0]
    step = result.steps[blame.step - 1]
    likely = "" if blame.certain else "likely "
    what = f"{step.name} at {step.site} is {likely}to blame for {blame.figure}: {blame.why}"
    remedy = "keep more tokens there, or leave the site out" if blame.figure == "quality" else "leave the site out"
    return OptpassError("blame", what, remedy, exit_code=1)
