"""``optpass inspect``: what analysis finds in a model."""

from __future__ import annotations

from optpass.cli import _options as options
from optpass.cli._outcome import Outcome


def command(
    source: options.Source,
    dynamic: options.Dynamic = None,
    static: options.Static = False,
    inputs: options.Inputs = None,
    json: options.Json = False,
) -> Outcome:
    """Show blocks, attention and token axes of MODEL."""
    dimensions = options.dynamic_dimensions(dynamic, static)
    arrays = options.read_inputs(inputs)

    from optpass import api

    result = api.inspect(source, dynamic=dimensions, inputs=arrays)
    return Outcome(
        {"ok": True, **result.data},
        lambda console: console.print(result.text, markup=False, highlight=False, soft_wrap=True),
    )
