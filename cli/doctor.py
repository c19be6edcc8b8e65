"""``optpass doctor``: what can be built and run here, and what each backend makes of a model, before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from optpass.cli import _options as options
from optpass.cli._outcome import Outcome, of_model
from optpass.errors import OptpassError

if TYPE_CHECKING:
    from rich.console import Console

    from optpass.results import DoctorResult

OPS = 24
"""Kinds of ops in the table before it says how many more there are."""


def command(
    source: Annotated[str | None, typer.Argument(metavar="MODEL", help="A model to look at.")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", "-b", metavar="NAME", help="A backend to look at.", show_default="all of them"),
    ] = None,
    target: options.Target = None,
    dynamic: options.Dynamic = None,
    static: options.Static = False,
    inputs: options.Inputs = None,
    json: options.Json = False,
) -> Outcome:
    """Show what is installed, what can be built and what runs here.

    With MODEL also its ops in the form that each backend reads, and the limits that it meets there; nothing is built.
    Exit code 1 where a backend that was named does not take the model.
    """
    dimensions = options.dynamic_dimensions(dynamic, static)
    arrays = options.read_inputs(inputs)

    from optpass import api

    result = api.doctor(source, backend=backend or (), target=target or (), dynamic=dimensions, inputs=arrays)
    refused = [row for row in result.model if row.refusal]
    failure = None
    if not result.ok:
        what = f"{refused[0].backend} does not take the model: {refused[0].refusal}"
        failure = OptpassError("not-lowered", what, "see the table", exit_code=1)
    return of_model(result, lambda console: _show(result, console), failure)


def _show(result: DoctorResult, console: Console) -> None:
    from rich.markup import escape

    from optpass.cli._tables import _table

    for name, value in result.facts.items():
        console.print(escape(f"{name}: {value}"), soft_wrap=True)
    console.print()
    table = _table("backends on this machine")
    for heading in ("backend", "library", "builds here", "runs here"):
        table.add_column(heading)
    for row in result.backends:
        builds, runs = f"no: {row.builds}" if row.builds else "yes", f"no: it {row.runs}" if row.runs else "yes"
        table.add_row(*map(escape, (f"{row.backend}:{row.precision}", row.library, builds, runs)))
    console.print(table)
    for line in dict.fromkeys(f"{row.backend}: {row.builds}; {row.remedy}" for row in result.backends if row.remedy):
        console.print(escape(line), soft_wrap=True)
    if not result.model:
        return
    title = f"{result.source}, {result.weights_mib or 0:,.1f} MiB of weights: ops in the form that each backend reads"
    table = _table(title)
    table.add_column("op")
    for one in result.model:
        table.add_column(one.backend, justify="right")
    total = {op: sum(one.ops.get(op, 0) for one in result.model) for one in result.model for op in one.ops}
    ordered = sorted(total, key=lambda op: -total[op])
    for op in ordered[:OPS]:
        table.add_row(escape(op), *(str(one.ops.get(op, "-")) for one in result.model))
    if len(ordered) > OPS:
        rest = ordered[OPS:]
        table.add_row(f"{len(rest)} more kinds", *(str(sum(one.ops.get(op, 0) for op in rest)) for one in result.model))
    console.print(table)
    for one in result.model:
        verdict = one.refusal or "takes it"
        console.print(escape(f"{one.backend} ({one.form}): {verdict}"), soft_wrap=True)
        for limit in one.limits:
            console.print(escape(f"  limit: {limit}"), soft_wrap=True)
