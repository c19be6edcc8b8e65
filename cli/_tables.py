"""Results as tables for a reader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from optpass.results import (
        BenchResult,
        Fidelity,
        Interval,
        Latency,
        Metric,
        OptimizeResult,
        PassRecord,
        VerifyResult,
    )

COLOURS = {
    "kept": "green",
    "refused": "red",
    "rolled_back": "red",
    "faster": "green",
    "slower": "red",
    "no gain": "yellow",
    "ok": "green",
    "FAILED": "red",
}
SITES = 3
"""Module paths named in a table cell before it says how many more there are."""


def show_optimize(result: OptimizeResult, console: Console) -> None:
    """All that was done and measured."""
    if result.passes:
        console.print(passes_table(result.passes))
        show_notes(result.passes, console)
    else:
        console.print("no passes: the engine is the model as it was\n")
    console.print(fidelity_table(result.fidelity))
    show_metric(result.metric, console)
    show_latency(result.latency, console)
    written = f"wrote {result.artifact}" if result.artifact else "no artifact was written"
    console.print(escape(written), soft_wrap=True)


def show_verify(result: VerifyResult, console: Console) -> None:
    """An artifact, checked again."""
    console.print(f"{result.files} files, every hash as written\n")
    console.print(fidelity_table(result.fidelity))
    show_metric(result.metric, console)
    console.print(f"{'verified' if result.ok else 'not verified:'} {escape(result.artifact)}", soft_wrap=True)


def show_bench(result: BenchResult, console: Console) -> None:
    """Latency alone."""
    show_latency(result.latency, console)
    console.print(escape(result.artifact), soft_wrap=True)


def passes_table(records: Iterable[PassRecord]) -> Table:
    """What each pass did and how it was verified."""
    table = _table("passes, and the largest difference that each probe found")
    for heading in ("pass", "options", "sites", "tokens"):
        table.add_column(heading)
    for heading in ("identity", "permutation", "equivalence"):
        table.add_column(heading, justify="right")
    table.add_column("status")
    for record in records:
        probes = (record.probes.identity, record.probes.permutation, record.probes.equivalence)
        table.add_row(
            escape(record.name),
            escape(", ".join(f"{name}={value}" for name, value in record.options.items() if value is not None)),
            escape(_sites(record.sites)),
            escape(_tokens(record.tokens)),
            *(_difference(probe) for probe in probes),
            _coloured(record.status),
        )
    return table


def show_notes(records: Iterable[PassRecord], console: Console) -> None:
    """Why a pass was not kept, and where tokens came back to the old space."""
    lines = [f"{record.name} {record.status}: {record.reason}" for record in records if record.reason]
    lines += [f"{record.name} restores tokens: {text}" for record in records for text in record.restored]
    for line in lines:
        console.print(escape(line), soft_wrap=True)
    if lines:
        console.print()


def fidelity_table(rows: Iterable[Fidelity]) -> Table:
    """Each output of each engine against eager execution."""
    table = _table("engine against eager execution of the same program")
    for heading in ("engine", "output"):
        table.add_column(heading)
    for heading in ("difference", "tolerance", "shapes"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in rows:
        verdict = _coloured("ok" if row.ok else "FAILED")
        difference, tolerance = _difference(row.difference), _difference(row.tolerance)
        shapes = str(max(1, len(row.shapes)))
        table.add_row(escape(row.engine), escape(row.output), difference, tolerance, shapes, verdict)
    return table


def show_metric(rows: Sequence[Metric], console: Console) -> None:
    """The metric before and after, with intervals, and what it may be read as."""
    if not rows:
        return
    table = _table("quality on the engine, with 95 % intervals")
    for heading in ("engine", "metric"):
        table.add_column(heading)
    for heading in ("samples", "before", "after", "drop"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            escape(row.engine),
            escape(row.name),
            f"{row.samples}",
            interval(row.dense, ".4f"),
            interval(row.optimized, ".4f"),
            interval(row.drop, "+.4f"),
        )
    console.print(table)
    for label in dict.fromkeys(row.label for row in rows):
        console.print(escape(label), soft_wrap=True)
    console.print()


def show_arms(arms: Mapping[str, OptimizeResult], console: Console) -> None:
    """The metric of several schedules on the same engines, one row each, beside that of the unmodified model."""
    table = _table("quality on the engine, with 95 % intervals")
    for heading in ("engine", "schedule", "metric"):
        table.add_column(heading)
    for heading in ("samples", "before", "after", "drop"):
        table.add_column(heading, justify="right")
    for arm, result in arms.items():
        for row in result.metric:
            numbers = (interval(row.dense, ".4f"), interval(row.optimized, ".4f"), interval(row.drop, "+.4f"))
            table.add_row(escape(row.engine), escape(arm), escape(row.name), f"{row.samples}", *numbers)
    console.print(table)


def show_latency(rows: Sequence[Latency], console: Console) -> None:
    """Latency before and after on the same engine; *no gain* is said as plainly as a gain."""
    if not rows:
        return
    table = _table("latency per call on the same engine, in milliseconds, and speed-up with 95 % interval")
    for heading in ("engine", "batch"):
        table.add_column(heading)
    for heading in ("before", "p95", "after", "p95", "speed-up"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(
            escape(row.engine),
            escape(row.batch),
            f"{row.dense.median_ms:.2f}",
            f"{row.dense.p95_ms:.2f}",
            f"{row.optimized.median_ms:.2f}",
            f"{row.optimized.p95_ms:.2f}",
            interval(row.speedup, ".2f", "x"),
            _coloured(row.verdict),
        )
    console.print(table)


def interval(value: Interval, form: str, unit: str = "") -> str:
    """``1.62x [1.58, 1.66]``, escaped for rich."""
    return escape(f"{value.value:{form}}{unit} [{value.low:{form}}, {value.high:{form}}]")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def _coloured(word: str) -> str:
    return f"[{COLOURS[word]}]{word.replace('_', ' ')}[/]"


def _sites(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - SITES} more" if len(paths) > SITES else ""
    return ", ".join(paths[:SITES]) + more


def _tokens(counts: Sequence[int | str]) -> str:
    shown = [*counts[:2], "...", *counts[-1:]] if len(counts) > SITES + 1 else counts
    return " > ".join(str(count) for count in shown)


def _difference(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value else "0.0"
