"""``optpass verify``: check an artifact again, on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from optpass.cli import _options as options
from optpass.cli._outcome import Outcome, failure_of, of_model
from optpass.cli._progress import progress
from optpass.errors import OptpassError


def command(
    artifact: options.Artifact,
    data: options.Data = None,
    metric: options.MetricName = None,
    samples: options.Samples = None,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            "-b",
            metavar="NAME",
            help="Whose machine code to run too, such as inductor.",
            show_default=False,
        ),
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Run the engines of ONNX Runtime on cuda, tensorrt, tensorrt-rtx, openvino, coreml or directml.",
            show_default="cpu",
        ),
    ] = None,
    provider_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the provider. Repeatable.", show_default=False),
    ] = None,
    at_least: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the nodes that the provider has to take.")
    ] = 1.0,
    json: options.Json = False,
) -> Outcome:
    """Check ARTIFACT again, on this machine.

    Hashes of all files, every engine at every shape it was built for, and the metric on data.
    """
    from optpass import api
    from optpass.cli import _tables
    from optpass.runtime.providers import Provider

    pairs = [text.partition("=") for text in provider_option or []]
    wrong = next(("".join(pair) for pair in pairs if not pair[0] or not pair[1]), None)
    if wrong is not None or (pairs and provider is None):
        what = f"{wrong} is no option" if wrong is not None else "there are options and no provider"
        raise OptpassError("usage", what, "write --provider NAME --provider-option KEY=VALUE")
    asked = Provider(provider, {key: value for key, _, value in pairs}, at_least) if provider else None
    with progress() as report:
        result = api.verify(
            artifact, data=data, metric=metric, samples=samples, backend=backend, provider=asked, progress=report
        )
    failure = None if result.ok else failure_of([], result.fidelity)
    return of_model(result, lambda console: _tables.show_verify(result, console), failure)
