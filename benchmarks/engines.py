"""Which engines does each pass build on, how large are they, and how near are they to eager execution?

Every zoo model, unmodified and with each pass, on every backend in every precision. What runs here is held against
eager execution of the same graph, at the smallest, the example and the largest sizes. No times are taken.

    python -m benchmarks.engines                     # 20 minutes on two cores
    python -m benchmarks.engines --backends onnxruntime,openvino --models fashion-vit
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import report
from optpass import grammar, manager
from optpass.capture import capture
from optpass.errors import OptpassError
from optpass.evaluation import Evaluation
from optpass.export import artifact, finish
from optpass.export.base import Backend, backends
from optpass.passes.base import Finishing
from optpass.passes.prune.selectors import selectors
from optpass.program import Stage
from optpass.results import Fidelity
from optpass.zoo import registry

TARGET = ("sm_89", "sm_120")
"""For which engines of GPUs are built, one for both; it takes none of them to be here."""

DYNAMIC = {"stdlib-lm": ("input_ids:0=batch:1..4", "input_ids:1=tokens:2..256")}
"""Narrower than the zoo declares, where the largest size takes a minute to run on each engine."""

SCHEDULE = registry.load("fashion-vit").SCHEDULE
ARMS = {
    "fashion-vit": [
        "", *(f"prune(selector={name})" for name in selectors()), "merge", "transform", SCHEDULE,
        "precision(dtype=bf16)", "precision(dtype=f16)", "quantize", "quantize(mode=static)",
        f"{SCHEDULE},precision(dtype=bf16)", f"{SCHEDULE},quantize",
    ],
    "stdlib-lm": [
        "", "prune", "cache", "cache,speculate", "prune,cache", "precision(dtype=bf16)", "quantize",
        "cache,precision(dtype=bf16)", "cache,speculate,quantize",
    ],
}  # fmt: skip


def arm(model: str, passes: str, found: Sequence[Backend], folder: Path) -> dict[str, Any]:
    """One schedule on every engine: size and distance from eager execution, all its stages together, or why not."""
    asked = grammar.parse(passes) if passes else []
    program = capture(model, dynamic=DYNAMIC.get(model))
    outcome = manager.apply(program, asked)
    finishing = [made for made in asked if isinstance(made, Finishing)]
    cells: dict[str, dict[str, Any]] = {f"{b.name}-{precision}": {} for b in found for precision in b.precisions}
    if outcome.ok:
        with artifact.writer(folder / "engine", source=model, target=TARGET) as new:
            # by its outputs the writer tells an engine in half precision that chose other tokens from one that is wrong
            new.add(program.main, "onnxruntime", "f32", role="dense")
            for backend in found:
                engines(new, backend, outcome.program.deployed, finishing, program.main, cells)
    else:
        cells = {name: {"why": outcome.records[-1].reason} for name in cells}
    for name, cell in cells.items():
        if "why" in cell:
            cell["why"] = re.sub(r"\S*/\.optpass-\w+/", "", cell["why"])  # the directory that it was built in
        report.say(f"{model} {passes or 'none'} {name}: {cell}")
    return {"model": model, "passes": passes or "none", "engines": cells}


def engines(
    new: artifact.Writer,
    backend: Backend,
    stages: Sequence[Stage],
    finishing: Sequence[Finishing],
    dense: Stage,
    cells: dict[str, dict[str, Any]],
) -> None:
    """Build, check and finish the engines of one backend, and fill their cells."""
    built: dict[str, dict[str, Stage]] = {}
    for precision in backend.precisions:
        name = f"{backend.name}-{precision}"
        try:
            for made in finishing:
                made.check(backend.name)
            built[name] = {new.add(stage, backend.name, precision): stage for stage in stages}
        except OptpassError as error:
            cells[name]["why"] = str(error.refusal)
    for name, added in built.items():
        here = [engine for engine in added if new.runs(engine)]
        if not here:
            cells[name]["why"] = next(row.why for row in new.unrun() if row.engine in added)
            continue
        try:
            _judge(cells[name], new.fidelity(here))
        except OptpassError as error:
            cells[name]["why"] = str(error.refusal)
    for made in finishing if built else ():
        # of all precisions at once, which may share their files
        every = {engine: stage for added in built.values() for engine, stage in added.items()}
        apart = Evaluation.of(new.source, None, None, None).apart(made.samples(backend.name))[1]
        record, rows = finish.finish(new, made, every, dense, apart)
        for name, added in built.items():
            if record.done:
                _judge(cells[name], [row for row in rows if row.engine in added])
            else:
                cells[name] = {"why": record.reason}
    for name, added in built.items():
        if "share" in cells[name] or not any(map(new.runs, added)):
            cells[name]["mib"] = sum(new.engines[engine].mib(new.folder) for engine in added)


def _judge(cell: dict[str, Any], rows: Sequence[Fidelity]) -> None:
    cell["share"] = max((row.difference / row.tolerance for row in rows if row.tolerance), default=0.0)
    cell["ok"] = all(row.ok for row in rows)
    others = [row.output for row in rows if not row.ok and not row.tolerance]
    if others:
        cell["share"] = None
        cell["why"] = f"whole numbers are others: {', '.join(others)}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each schedule and a column for each engine; the reasons below it, by number."""
    reasons: list[str] = []
    engines = list(rows[0]["engines"])
    lines = [
        [row["model"], f"`{row['passes']}`", *(_cell(row["engines"][e], reasons) for e in engines)] for row in rows
    ]
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return f"{report.table(['model', 'passes', *engines], lines)}\n\n{notes}"


def _cell(cell: dict[str, Any], reasons: list[str]) -> str:
    parts = [f"{cell['mib']:.1f} MiB"] if "mib" in cell else ["no"]
    if "share" in cell:
        text = "others" if cell["share"] is None else f"{cell['share']:.2f}"
        parts.append(text if cell["ok"] else f"**{text}**")
    if "why" in cell:
        if cell["why"] not in reasons:
            reasons.append(cell["why"])
        parts.append(f"[{reasons.index(cell['why']) + 1}]")
    return " ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(ARMS), help="which, by name")
    parser.add_argument("--backends", default="", help="which, by name; all by default")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory of the results")
    given = parser.parse_args()
    found = [backend for name, backend in backends().items() if name in (given.backends or name).split(",")]
    data: dict[str, Any] = {"machine": report.machine(), "target": TARGET}
    rows: list[dict[str, Any]] = []
    data["rows"] = rows
    note = (
        "Size of the engine, all its stages together, and its largest difference from eager execution of the same "
        "graph as a share of what rounding explains, 1 at most; bold is beyond. `no` was not built. Engines of "
        f"tensorrt are built for {' and '.join(TARGET)} in one. "
        f"stdlib-lm is captured for {', '.join(DYNAMIC['stdlib-lm'])}. A number in brackets is the reason, below."
    )
    with tempfile.TemporaryDirectory(prefix="optpass-benchmark-") as scratch:
        for model in given.models.split(","):
            for passes in ARMS[model]:
                rows.append(arm(model, passes, found, Path(scratch)))
                # after each, so that a run that is cut short leaves what it has
                text = report.write("engines", data, [("Engines", f"{note}\n\n{table(rows)}")], given.out)
    print(text)


if __name__ == "__main__":
    main()
