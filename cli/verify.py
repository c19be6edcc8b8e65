"""``optpass verify``: check an artifact again, on this machine."""

from __future__ import annotations

from optpass.cli import _options as options
from optpass.cli._outcome import Outcome, failure_of, of_model
from optpass.cli._progress import progress


def command(
    artifact: options.Artifact,
    data: options.Data = None,
    metric: options.MetricName = None,
    samples: options.Samples = None,
    json: options.Json = False,
) -> Outcome:
    """Check ARTIFACT again, on this machine.

    Hashes of all files, every engine at every shape it was built for, and the metric on data.
    """
    from optpass import api
    from optpass.cli import _tables

    with progress() as report:
        result = api.verify(artifact, data=data, metric=metric, samples=samples, progress=report)
    failure = None if result.ok else failure_of([], result.fidelity)
    return of_model(result, lambda console: _tables.show_verify(result, console), failure)
