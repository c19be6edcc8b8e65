"""``optpass demo``: the whole line on real input, and what it brought."""

from __future__ import annotations

import json as json_module
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optpass.cli import _options as options
from optpass.cli._outcome import Outcome, failure_of
from optpass.cli._progress import progress

if TYPE_CHECKING:
    from rich.console import Console

    from optpass.results import OptimizeResult

MODEL = "fashion-vit"
BACKENDS = ("onnxruntime", "openvino", "openvino:bf16")
BATCHES = (8, 1)
SAMPLES = 2000
"""The real images that come with the model."""


def command(
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Keep the artifacts there.", show_default="a temporary one"),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure latency, per engine.")] = 3.0,
    samples: Annotated[int, typer.Option(min=1, help="Real images that the metric is taken on.")] = SAMPLES,
    json: options.Json = False,
) -> Outcome:
    """Optimize a really trained model and show the gain.

    Latency before and after on each engine, at batch 8 and at batch 1; top-1 before and after on real images, on the
    exported engine; what each pass did and how it was verified; and the same with tokens chosen by chance.
    """
    from optpass.zoo import registry

    entry = registry.load(MODEL)
    with tempfile.TemporaryDirectory(prefix="optpass-demo-") as scratch:
        home = out or Path(scratch)
        runs = {
            f"{name} batch {batch}": _optimize(passes, batch, home / f"{name}-{batch}", seconds, samples)
            for name, passes, batch in _arms(entry.SCHEDULE, entry.CONTROL)
        }
    failed = next((run for run in runs.values() if not run.ok), None)
    said = {name: json_module.loads(run.model_dump_json()) for name, run in runs.items()}
    data = {"ok": failed is None, "schedule": entry.SCHEDULE, "control": entry.CONTROL, "runs": said}
    if failed:
        return Outcome(data, None, failure_of(failed.passes, failed.fidelity))
    return Outcome(data, lambda console: _show(entry.SCHEDULE, entry.CONTROL, runs, console))


def _arms(schedule: str, control: str) -> list[tuple[str, str, int]]:
    return [("schedule", schedule, batch) for batch in BATCHES] + [("control", control, BATCHES[0])]


def _optimize(passes: str, batch: int, out: Path, seconds: float, samples: int) -> OptimizeResult:
    from optpass import api
    from optpass.zoo import registry

    images = {name: array for name, array in registry.load(MODEL).test_split(batch).items() if name != "labels"}
    with progress() as report:
        return api.optimize(
            MODEL,
            passes,
            backend=BACKENDS,
            out=out,
            inputs=images,
            metric="top1",
            samples=samples,
            force=True,
            seconds=seconds,
            progress=report,
        )


def _show(schedule: str, control: str, runs: dict[str, OptimizeResult], console: Console) -> None:
    from optpass.cli import _tables

    *optimized, by_chance = runs.values()
    first = optimized[0]
    console.print(f"{MODEL} with {schedule}, beside the control arm {control}\n", markup=False)
    console.print(_tables.passes_table(first.passes))
    _tables.show_notes(first.passes, console)
    checked = zip(BATCHES, optimized, strict=True)
    rows = [(row, f"{row.engine}, batch {batch}") for batch, run in checked for row in run.fidelity]
    console.print(_tables.fidelity_table([row.model_copy(update={"engine": name}) for row, name in rows]))
    _tables.show_arms({schedule: first, control: by_chance}, console)
    _tables.show_latency([row for run in optimized for row in run.latency], console)
    console.print("the control arm, which spends nothing on its choice:")
    _tables.show_latency(by_chance.latency, console)
