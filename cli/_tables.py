"""Results as tables for a reader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from optpass.results import Probes

if TYPE_CHECKING:
    from optpass.results import (
        ArtifactResult,
        BenchResult,
        BisectResult,
        DiffResult,
        Fidelity,
        Interval,
        Latency,
        Metric,
        OptimizeResult,
        PassRecord,
        PreviewResult,
        Promise,
        Unrun,
        VerifyResult,
    )

COLOURS = {
    "kept": "green",
    "placed": "green",
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
    if result.promise is not None:
        show_promise(result.preset, result.promise, console)
    if result.passes:
        console.print(passes_table(result.passes))
        show_notes(result.passes, console)
    else:
        console.print("no passes: the engine is the model as it was\n")
    if result.fidelity:
        console.print(fidelity_table(result.fidelity))
    show_metric(result.metric, console)
    show_latency(result.latency, console)
    show_unrun(result.unrun, console)
    written = f"wrote {result.artifact}" if result.artifact else "no artifact was written"
    console.print(escape(written), soft_wrap=True)


def show_preview(result: PreviewResult, console: Console) -> None:
    """What passes would do, block by block."""
    table = _table("passes, placed but not verified")
    for heading in ("pass", "options", "sites", "tokens", "status"):
        table.add_column(heading)
    for record in result.passes:
        words = (record.name, _options(record), _sites(record.sites), _tokens(record.tokens))
        table.add_row(*map(escape, words), _coloured(record.status))
    if result.passes:
        console.print(table)
        show_notes(result.passes, console)
    if not result.ok:
        return
    table = _table("tokens that enter each block, and millions of operations of one call, at the sizes of the example")
    table.add_column("block")
    for heading in ("tokens", "with passes", "MFLOP", "with passes", ""):
        table.add_column(heading, justify="right")
    for row in result.layers:
        tokens = (f"{row.dense_tokens}", f"{row.tokens}")
        table.add_row(escape(row.path), *tokens, *_operations(row.dense_flops, row.flops))
    inside = [sum(row.dense_flops for row in result.layers), sum(row.flops for row in result.layers)]
    table.add_row("the rest", "", "", *_operations(result.dense_flops - inside[0], result.flops - inside[1]))
    table.add_row("in all", "", "", *_operations(result.dense_flops, result.flops))
    console.print(table)
    console.print(escape(f"a dry run: {', '.join(result.engines)} would be built, verified and measured"))


def _operations(dense: float, reduced: float) -> tuple[str, str, str]:
    return f"{dense / 1e6:,.1f}", f"{reduced / 1e6:,.1f}", f"{reduced / dense - 1:+.1%}" if dense else "-"


def show_bisect(result: BisectResult, console: Console) -> None:
    """What each step of a schedule costs and brings."""
    unit = f"losses in {result.unit}" if result.unit else f"losses in the unit of {result.metric}"
    table = _table(f"each step on {result.engine}, with 95 % intervals; its own are against the step before; {unit}")
    for heading in ("", "pass", "options", "site"):
        table.add_column(heading)
    for heading in ("tokens", result.metric, "lost so far", "its own loss", "speed-up", "its own factor"):
        table.add_column(heading, justify="right")
    table.add_row("0", "", "", "the model", "", f"{result.dense.value:.4f}")
    for step in result.steps:
        options = ", ".join(f"{name}={value}" for name, value in step.options.items())
        speeds = ("" if s is None else interval(s, ".2f", "x") for s in (step.speedup, step.own_speedup))
        figures = (f"{step.metric.value:.4f}", interval(step.loss, ".2f"), interval(step.own_loss, ".2f"))
        words = (f"{step.number}", step.name, options, step.site, f"{step.tokens}")
        table.add_row(*map(escape, words), *figures, *speeds)
    console.print(table)
    console.print(escape(result.label), soft_wrap=True)
    console.print(f"engines built: {result.built}, found in the cache: {result.found}\n")
    for blame in result.blame:
        step = result.steps[blame.step - 1]
        level = "to blame" if blame.certain else "likely to blame"
        line = f"{level} for {blame.figure}: step {blame.step}, {step.name} at {step.site}: {blame.why}"
        console.print(escape(line), soft_wrap=True)
    if not result.blame:
        console.print(escape(f"nothing is to blame; step {result.largest} costs most"), soft_wrap=True)


def show_diff(result: DiffResult, console: Console) -> None:
    """What sets two artifacts apart; what is equal is left out."""
    signs = {"added": "+", "removed": "-", "changed": "~"}
    _show_pairs(
        "passes, their options and sites",
        [
            (f"{signs[row.change]} {row.name}", name, *map(_said, values))
            for row in result.passes
            for name, values in row.options.items()
        ],
        console,
    )
    rows = [(row.path, "tokens", *map(_said, row.tokens)) for row in result.layers if row.tokens[0] != row.tokens[1]]
    rows += [(row.path, "MFLOP", *("-" if v is None else f"{v / 1e6:.4g}" for v in row.flops)) for row in result.layers]
    _show_pairs("tokens that enter each block, and operations", rows, console)
    graph = [
        (row.engine, name, *map(_said, values))
        for row in result.graphs
        for name, values in [("nodes in all", row.nodes), *row.ops.items()]
        if values[0] != values[1]
    ]
    _show_pairs("ops in the files of each engine", graph, console)
    figures = [
        (
            row.engine,
            row.figure + ("" if row.comparable else " (other machine: not comparable)"),
            *map(_said, row.values),
        )
        for row in result.figures
    ]
    _show_pairs("figures as each artifact recorded them", figures, console)
    _show_pairs("made with and on", [(row.kind, row.name, *map(_said, row.values)) for row in result.made], console)
    verdict = "passes, tokens and the files of all engines are equal" if result.same else "they differ"
    console.print(escape(f"A {result.first}, B {result.second}: {verdict}"), soft_wrap=True)


def _show_pairs(title: str, rows: Sequence[tuple[str, ...]], console: Console) -> None:
    if not rows:
        return
    table = _table(title)
    table.add_column("")
    table.add_column("")
    for side in ("A", "B"):
        table.add_column(side, justify="right")
    before = ""
    for first, *rest in rows:
        table.add_row(escape("" if first == before else first), *map(escape, rest))
        before = first
    console.print(table)


def _said(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value.value:.4g} [{value.low:.4g}, {value.high:.4g}]" if hasattr(value, "low") else str(value)


def show_promise(preset: str, promise: Promise, console: Console) -> None:
    """What a preset was measured to bring, and where; the tables that follow tell of the model at hand."""
    speed = ", ".join(f"{_three(value, 'x')} at batch {batch}" for batch, value in promise.speedup.items())
    lines = [
        f"preset {preset}, as measured on {promise.model} with {promise.engine}, {promise.machine}, {promise.date}:",
        f"  {speed}; {promise.metric} falls by {_three(promise.drop)} points of 100 on {promise.samples:,} samples",
        f"  with as many tokens chosen by chance it falls by {_three(promise.control_drop)}; source: {promise.command}",
        "what it brings here is in the tables below\n",
    ]
    console.print(escape("\n".join(lines)), soft_wrap=True)


def _three(value: tuple[float, float, float], unit: str = "") -> str:
    return f"{value[0]:.2f}{unit} [{value[1]:.2f}, {value[2]:.2f}]"


def show_verify(result: VerifyResult, console: Console) -> None:
    """An artifact, checked again."""
    console.print(f"{result.files} files, every hash as written\n")
    console.print(fidelity_table(result.fidelity))
    show_metric(result.metric, console)
    show_unrun(result.unrun, console)
    for name, taken in result.providers.items():
        console.print(escape(f"{name}: {taken}"), soft_wrap=True)
    console.print(f"{'verified' if result.ok else 'not verified:'} {escape(result.artifact)}", soft_wrap=True)


LAYERS = 8
"""Kinds of layers named in a table before it says how many more there are."""


def show_artifact(result: ArtifactResult, console: Console) -> None:
    """The engines of an artifact, which of them run here, and what they are made of."""
    table = _table(f"{result.artifact}: {result.source}, written by optpass {result.optpass} at {result.created}")
    for heading in ("engine", "built for", "bound to"):
        table.add_column(heading)
    table.add_column("MiB", justify="right")
    table.add_column("here")
    for row in result.engines:
        here = "opens by default" if row.engine == result.opens else row.unfit or "runs"
        # the CPU features that machine code uses are many
        built = ", ".join(row.target) if len(row.target) <= SITES else f"{row.target[0]} and {len(row.target) - 1} more"
        words = (row.engine, built or "any machine", row.version or "-")
        table.add_row(*map(escape, words), f"{row.mib:.1f}", escape(here))
    console.print(table)
    for row in result.engines:
        if row.layers:
            kinds = [f"{count} {' '.join(filter(None, (kind, precision)))}" for kind, precision, count in row.layers]
            more = f" and {len(kinds) - LAYERS} kinds more" if len(kinds) > LAYERS else ""
            line = f"{row.engine}, layers {row.layers_of}: {', '.join(kinds[:LAYERS])}{more}"
            console.print(escape(line), soft_wrap=True)
    console.print()
    if result.passes:
        console.print(passes_table(result.passes))
    console.print(escape(f"here: {result.why}"), soft_wrap=True)


def show_bench(result: BenchResult, console: Console) -> None:
    """Latency alone."""
    show_latency(result.latency, console)
    show_unrun(result.unrun, console)
    console.print(escape(result.artifact), soft_wrap=True)


def passes_table(records: Iterable[PassRecord]) -> Table:
    """What each pass did and how it was verified."""
    table = _table("passes, and the largest difference that each probe found")
    for heading in ("pass", "options", "sites", "tokens"):
        table.add_column(heading)
    records = list(records)
    probes = [name for name in Probes.model_fields if any(getattr(r.probes, name) is not None for r in records)]
    for heading in probes:
        table.add_column(heading, justify="right")
    table.add_column("status")
    for record in records:
        table.add_row(
            escape(record.name),
            escape(_options(record)),
            escape(_sites(record.sites)),
            escape(_tokens(record.tokens)),
            *(_difference(getattr(record.probes, name)) for name in probes),
            _coloured(record.status),
        )
    return table


def _contract(record: PassRecord) -> str:
    """What a pass changed in the outputs, and in which precision the ops are."""
    ops = ", ".join(f"{count} {precision}" for precision, count in record.ops.items())
    text = f"{record.name}: outputs moved by {record.error:.1e} of the largest, {record.max_error:.1e} is allowed; "
    text += f"ops: {ops}" + (f" ({_sites(record.stayed)})" if record.stayed else "")
    return f"{text}; {record.data}" if record.data else text


def show_notes(records: Iterable[PassRecord], console: Console) -> None:
    """Why a pass was not kept, and where tokens came back to the old space."""
    lines = [f"{record.name} {record.status}: {record.reason}" for record in records if record.reason]
    lines += [f"{record.name} restores tokens: {text}" for record in records for text in record.restored]
    lines += [_contract(record) for record in records if record.error is not None]
    lines += [f"{record.name}: {record.data}" for record in records if record.data and record.error is None]
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


def show_unrun(rows: Sequence[Unrun], console: Console) -> None:
    """Engines without figures, and why they have none."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((row.why, row.remedy), []).append(row.engine)
    for (why, remedy), names in groups.items():
        told = f"{names[0]} {why}" if len(names) == 1 else f"{', '.join(names)}: each {why}"
        console.print(escape(f"built, not run: {told}; {remedy}"), soft_wrap=True)
    if rows:
        console.print()


def interval(value: Interval, form: str, unit: str = "") -> str:
    """``1.62x [1.58, 1.66]``, escaped for rich."""
    return escape(f"{value.value:{form}}{unit} [{value.low:{form}}, {value.high:{form}}]")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def _coloured(word: str) -> str:
    return f"[{COLOURS[word]}]{word.replace('_', ' ')}[/]"


def _options(record: PassRecord) -> str:
    return ", ".join(f"{name}={value}" for name, value in record.options.items() if value is not None)


def _sites(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - SITES} more" if len(paths) > SITES else ""
    return ", ".join(paths[:SITES]) + more


def _tokens(counts: Sequence[int | str]) -> str:
    shown = [*counts[:2], "...", *counts[-1:]] if len(counts) > SITES + 1 else counts
    return " > ".join(str(count) for count in shown)


def _difference(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value else "0.0"
