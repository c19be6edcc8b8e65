"""The verdicts of a gate as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from optpass.cli import _tables

if TYPE_CHECKING:
    from optpass.gating import GateResult

COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def show(result: GateResult, annotations: Sequence[str], console: Console) -> None:
    """Every limit with its figure; then the machine's noise and the verdict."""
    from optpass import gating

    shown = _tables._table(f"{result.engine} of {result.artifact} against {result.budget or 'the budget'}")
    for heading in ("limit", "at"):
        shown.add_column(heading)
    for heading in ("budget", "measured", "interval"):
        shown.add_column(heading, justify="right")
    shown.add_column("verdict")
    for one in result.checks:
        shown.add_row(
            escape(one.name),
            escape(one.at),
            f"{'>=' if one.least else '<='} {gating.number(one.limit)} {one.unit}",
            f"{gating.number(one.value)} {one.unit}",
            escape(gating.interval(one).strip()),
            f"[{COLOURS[one.verdict]}]{one.verdict}[/]",
        )
    console.print(shown)
    if result.noise:
        line = f"noise: one round of an engine against itself is within {result.noise.percent:g} % of 1"
        console.print(f"{line} ({result.noise.rounds} rounds)", soft_wrap=True)
    for said in annotations:
        console.print(said, markup=False, soft_wrap=True)
    console.print(f"{result.verdict} in {result.seconds:.1f} s")
