"""How long does ``optpass.optimize`` take, verification included, beside the plain export of the same model?

The plain way is ``torch.export``, ``torch.onnx.export`` of what it gives, and a session of ONNX Runtime: no rewrite, no
check, no dense twin. The second table asks whether time grows with the number of blocks and no faster.

    python -m benchmarks.optimize_time                 # about ten minutes on two cores
    python -m benchmarks.optimize_time --rounds 1      # a look
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnxruntime
import torch
from torch import nn

import optpass
from benchmarks import models, report
from optpass import measure
from optpass.runtime import manifest as manifests
from optpass.zoo import registry

DEPTHS = (12, 48, 192)
NARROW = {"width": 64, "heads": 2}
"""Blocks whose arithmetic costs little, so that what is timed is the work on the graph."""


def plain(module: nn.Module, pixels: torch.Tensor, folder: Path) -> None:
    """Capture, export and open, by the path that torch documents."""
    with torch.no_grad():
        program = torch.export.export(module, (pixels,))
        torch.onnx.export(program, (), folder / "plain.onnx", dynamo=True, external_data=False, verbose=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    onnxruntime.InferenceSession(folder / "plain.onnx", options, providers=["CPUExecutionProvider"])


def ours(module: nn.Module, pixels: torch.Tensor, schedule: str, folder: Path, seconds: float) -> dict[str, float]:
    """One call of the product on ONNX Runtime; how long each of its steps took."""
    began: list[tuple[str, float]] = []
    result = optpass.optimize(
        (module, (), {"pixel_values": pixels}), schedule, backend="onnxruntime", out=folder / "artifact",
        seconds=seconds, progress=lambda what, done, total: began.append((what, time.perf_counter())),
    )  # fmt: skip
    if not result.ok:
        raise SystemExit(f"{schedule}: {[(record.status, record.reason) for record in result.passes]}")
    ends = [at for _, at in began[1:]] + [time.perf_counter()]
    shutil.rmtree(folder / "artifact")
    return {what: end - at for (what, at), end in zip(began, ends, strict=True)}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the function gave."""
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def compare(schedule: str, rounds: int, folder: Path) -> dict[str, Any]:
    """The two ways and ours with latency measured, in turn, the order reversed in every other round."""
    module, pixels = models.deit_s(), models.noise(8)
    wrapped = models.Logits(module)
    runs: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(wrapped, pixels, folder),
        "optimize": lambda: ours(module, pixels, schedule, folder, 0.0),
        "optimize, latency measured": lambda: ours(module, pixels, schedule, folder, 2.0),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    steps: list[dict[str, float]] = []
    for number in range(-1, rounds):  # the first is a warm-up: imports, and tables that are built once
        for name, run in list(runs.items())[:: 1 if number % 2 == 0 else -1]:
            seconds, found = timed(run)
            report.say(f"round {number + 1}: {name} {seconds:.1f} s")
            if number >= 0:
                times[name].append(seconds)
                if name == "optimize":
                    steps.append(found)
    base = np.array(times["plain"])
    return {
        "seconds": {name: [round(value, 2) for value in found] for name, found in times.items()},
        "ratio": {
            name: measure.speedup([measure.Round((np.array(found), base))]).model_dump()
            for name, found in times.items()
            if name != "plain"
        },
        "steps": {name: round(float(np.median([s.get(name, 0.0) for s in steps])), 2) for name in steps[0]},
    }


def growth(schedule: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Seconds at each depth; the least of the rounds, since what disturbs only ever adds."""
    rows = []
    for depth in DEPTHS:
        found = _depth(depth, schedule, rounds, folder)
        rows.append({"blocks": depth, **{name: round(min(seconds), 2) for name, seconds in found.items()}})
    return rows


def _depth(depth: int, schedule: str, rounds: int, folder: Path) -> dict[str, list[float]]:
    module, pixels = models.deit_s(depth, **NARROW), models.noise(1)
    wrapped = models.Logits(module)
    runs: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(wrapped, pixels, folder),
        "optimize": lambda: ours(module, pixels, schedule, folder, 0.0),
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in list(runs.items())[:: 1 if number % 2 == 0 else -1]:
            seconds, _ = timed(run)
            report.say(f"{depth} blocks: {name} {seconds:.1f} s")
            found[name].append(seconds)
    return found


def ratio_table(found: Mapping[str, Any]) -> str:
    """Seconds of each way, and how many times the plain way it takes."""
    rows = []
    for name, seconds in found["seconds"].items():
        ratio = report.ratio(found["ratio"][name]) if name in found["ratio"] else ""
        rows.append([name, f"{np.median(seconds):.1f}", ", ".join(f"{value:.1f}" for value in seconds), ratio])
    return report.table(["", "median s", "rounds", "of the plain way"], rows)


def step_table(steps: Mapping[str, float]) -> str:
    """Where the time of ``optimize`` goes."""
    return report.table(["step of optimize", "s"], [[name, f"{seconds:.2f}"] for name, seconds in steps.items()])


def growth_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Seconds for each block, and for each block more than in the row above."""
    lines = []
    for before, row in zip([None, *rows[:-1]], rows, strict=True):
        cells = [str(row["blocks"])]
        for name in ("plain", "optimize"):
            more = "" if before is None else f"{(row[name] - before[name]) / (row['blocks'] - before['blocks']):.3f}"
            cells += [f"{row[name]:.1f}", f"{row[name] / row['blocks']:.3f}", more]
        lines.append(cells)
    head = ["blocks", "plain s", "a block", "each more", "optimize s", "a block", "each more"]
    return report.table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison")
    parser.add_argument("--growth-rounds", type=int, default=1, help="of each depth; 0 leaves the second table out")
    parser.add_argument("--schedule", help="in place of the one of the zoo")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory of the results")
    given = parser.parse_args()
    schedule = given.schedule or registry.load("fashion-vit").SCHEDULE
    torch.set_num_threads(manifests.cores())
    data: dict[str, Any] = {"machine": report.machine(), "schedule": schedule}
    with tempfile.TemporaryDirectory(prefix="optpass-benchmark-") as scratch:
        data["comparison"] = compare(schedule, given.rounds, Path(scratch))
        data["growth"] = growth(schedule, given.growth_rounds, Path(scratch)) if given.growth_rounds else []
    comparison = f"DeiT-S shape, batch 8, `{schedule}`, ONNX Runtime.\n\n{ratio_table(data['comparison'])}"
    sections = [("Beside the plain export", f"{comparison}\n\n{step_table(data['comparison']['steps'])}")]
    if data["growth"]:
        sections.append(
            ("Growth with depth", f"Blocks of width {NARROW['width']}, batch 1.\n\n{growth_table(data['growth'])}")
        )
    print(report.write("optimize_time", data, sections, given.out))


if __name__ == "__main__":
    main()
