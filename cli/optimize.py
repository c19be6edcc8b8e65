"""``optpass optimize``: capture, passes, engines, verification, one artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from optpass.cli import _options as options
from optpass.cli._outcome import Outcome, failure_of, of_model
from optpass.cli._progress import progress


def command(
    source: options.Source,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the artifact goes.")],
    passes: Annotated[
        str, typer.Option("--passes", "-p", metavar="PASSES", help="Such as 'prune(keep=0.5,at=3),merge(r=8)'.")
    ] = "",
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="The same as a file.", show_default=False)
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            "-b",
            metavar="NAME[:PRECISION]",
            help="onnxruntime, openvino, openvino:bf16. Repeatable.",
            show_default="onnxruntime",
        ),
    ] = None,
    dynamic: options.Dynamic = None,
    static: options.Static = False,
    inputs: options.Inputs = None,
    data: options.Data = None,
    metric: options.MetricName = None,
    samples: options.Samples = None,
    on_fail: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="When a pass is refused or fails a probe: stop, or leave it out and go on."),
    ] = "stop",
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is already there.")] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to measure latency, per engine.")] = 2.0,
    json: options.Json = False,
) -> Outcome:
    """Rewrite MODEL with verified passes into engines.

    The result is a directory that runs without torch.
    """
    dimensions = options.dynamic_dimensions(dynamic, static)
    arrays = options.read_inputs(inputs)

    from optpass import api
    from optpass.cli import _tables

    with progress() as report:
        result = api.optimize(
            source,
            passes,
            recipe=recipe,
            backend=backend or "onnxruntime",
            out=out,
            dynamic=dimensions,
            inputs=arrays,
            data=data,
            metric=metric,
            samples=samples,
            on_fail=on_fail,
            force=force,
            seconds=seconds,
            progress=report,
        )
    failure = failure_of(result.passes, result.fidelity)
    show = None if not result.fidelity else lambda console: _tables.show_optimize(result, console)
    return of_model(result, show, None if result.ok else failure)
