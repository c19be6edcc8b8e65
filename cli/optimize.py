"""``optpass optimize``: capture, passes, engines, verification, one artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from optpass.cli import _options as options
from optpass.cli._outcome import Outcome, failure_of, of_model
from optpass.cli._progress import progress
from optpass.errors import OptpassError


def command(
    source: options.Source,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Where the artifact goes.", show_default=False),
    ] = None,
    passes: options.Passes = "",
    recipe: options.Recipe = None,
    preset: options.Preset = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            "-b",
            metavar="NAME[:PRECISION]",
            help="onnxruntime, openvino:bf16, inductor, tensorrt:f16, torch-tensorrt:f16. Repeatable.",
            show_default="onnxruntime",
        ),
    ] = None,
    target: options.Target = None,
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
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show sites, tokens and operations before and after, and do no more."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is already there.")] = False,
    sampler: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="How a denoiser draws samples, such as ddim(prediction=velocity,noise=cosine)."
        ),
    ] = "",
    max_drop: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Most similarity that samples of a denoiser may lose, such as 2%: sets how often cache predicts.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to measure latency, per engine.")] = 2.0,
    json: options.Json = False,
) -> Outcome:
    """Rewrite MODEL with verified passes into engines.

    The result is a directory that runs without torch.
    """
    if out is None and not dry_run:
        raise OptpassError("usage", "Missing option '--out' / '-o'", "give it, or --dry-run to write nothing")
    dimensions = options.dynamic_dimensions(dynamic, static)
    arrays = options.read_inputs(inputs)

    from optpass import api
    from optpass.cli import _tables

    with progress() as report:
        if out is None or dry_run:
            planned = api.preview(
                source,
                passes,
                recipe=recipe,
                preset=preset,
                backend=backend or "onnxruntime",
                dynamic=dimensions,
                inputs=arrays,
                on_fail=on_fail,
                progress=report,
            )
            refused = None if planned.ok else failure_of(planned.passes, [])
            return of_model(planned, lambda console: _tables.show_preview(planned, console), refused)
        result = api.optimize(
            source,
            passes,
            recipe=recipe,
            preset=preset,
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
            target=target or (),
            sampler=sampler,
            max_drop=None if max_drop is None else options.share(max_drop, "--max-drop"),
            progress=report,
        )
    failure = failure_of(result.passes, result.fidelity)
    show = None if not result.fidelity and not result.unrun else lambda console: _tables.show_optimize(result, console)
    return of_model(result, show, None if result.ok else failure)
