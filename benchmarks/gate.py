"""How often is the gate wrong? Engines whose true ratio is planted, on a machine that something else keeps busy.

Models of 18 and 19 equal blocks are slower than one of 17 by 5 and 10 % of a call, part of which is no block, because
they do more: nothing is slowed down by hand. Each is gated against the first with a limit of 3 % (``at_least = 0.97``)
while another process keeps a core busy half of the time, in spells of random length. An engine against itself must not
fail; at a limit of exactly 1 it can only be undecided or, rarely, wrong. Beside it, on the same machine in the same
minutes, what is done without a gate: one engine timed after the other, their medians held to
the same limit.

    python -m benchmarks.gate                 # about an hour on two cores; --minutes sets an end to it
    python -m benchmarks.gate --resume        # the gates that results/gate.json still lacks
    python -m benchmarks.gate --gates 10      # a look
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import optpass
from benchmarks import report
from optpass import measure
from optpass.results import Interval
from optpass.runtime import manifest as manifests

Arm = tuple[str, float, int]
"""Engine, limit, threads."""

DEPTHS = {"the same": 17, "5 % slower": 18, "10 % slower": 19}
TOKENS, WIDTH = 64, 80
"""Some milliseconds a call, so that many gates take not many hours."""

LIMIT = 0.97
SECONDS = 110.0
"""With the noise of the machine before and all else, a gate stays within two minutes."""

EDGE_SECONDS = 4.0
NAIVE_RUNS = 50

BUSY = """
import random, time
while True:
    spell = random.uniform(0.005, 1.0)
    end = time.perf_counter() + spell
    while time.perf_counter() < end:
        pass
    time.sleep(spell)
"""


class Block(nn.Module):
    """Attention and a perceptron, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.project(self.before(x)).chunk(3, -1)
        )
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.between(x))))


class Tower(nn.Module):
    """Blocks and nothing else, so that the number of them is the cost."""

    def __init__(self, depth: int, width: int = WIDTH, heads: int = 4) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def engines(folder: Path) -> dict[str, Path]:
    """One artifact for each depth; no pass is applied."""
    torch.manual_seed(0)
    found = {}
    for name, depth in DEPTHS.items():
        found[name] = folder / f"depth-{depth}"
        example = {"x": torch.randn(1, TOKENS, WIDTH)}
        result = optpass.optimize((Tower(depth).eval(), (), example), out=found[name], seconds=0)
        assert result.ok
    return found


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Another process that keeps a core busy half of the time."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def plan(gates: int, threads: int) -> list[Arm]:
    """Every gate to be run, in an order drawn by lot."""
    third = max(gates // 3, 1)
    arms: list[Arm] = [("the same", LIMIT, threads)] * gates
    arms += [("5 % slower", LIMIT, threads)] * third + [("10 % slower", LIMIT, threads)] * max(third // 2, 1)
    arms += [("the same", 1.0, threads)] * max(gates // 15, 1)
    return [arms[which] for which in np.random.default_rng(0).permutation(len(arms))]


def gated(base: Path, path: Path, limit: float, threads: int) -> dict[str, Any]:
    """One gate."""
    budget = {
        "threads": threads,
        "seconds": EDGE_SECONDS if limit == 1 else SECONDS,
        "speedup": {"over": "baseline", "at_least": limit},
        "baseline": {"artifact": str(base)},
    }
    begin = time.perf_counter()
    result = optpass.gate(path, budget)
    (one,) = result.checks
    assert result.noise is not None
    return {
        "verdict": one.verdict, "value": round(one.value, 4), "low": one.low, "high": one.high,
        "noise": result.noise.percent, "seconds": round(time.perf_counter() - begin, 2),
    }  # fmt: skip


def naive(base: Path, path: Path, threads: int) -> dict[str, Any]:
    """The median of runs of one engine after that of the other."""
    medians = []
    for folder in (base, path):
        session = optpass.load(folder, threads=threads)
        arrays = measure.recorded_inputs(folder, manifests.read(folder), session.name, {})
        for _ in range(3):
            session.run(**arrays)
        times = []
        for _ in range(NAIVE_RUNS):
            begin = time.perf_counter()
            session.run(**arrays)
            times.append(time.perf_counter() - begin)
        medians.append(float(np.median(times)))
    ratio = medians[0] / medians[1]
    return {"verdict": "pass" if ratio >= LIMIT else "fail", "value": round(ratio, 4)}


def truth(base: Path, path: Path, threads: int, seconds: float) -> Interval:
    """The ratio of the engines on a quiet machine."""
    openers = []
    for folder in (base, path):
        manifest = manifests.read(folder)
        arrays = measure.recorded_inputs(folder, manifest, manifest.default, {})
        openers.append(measure.opener(folder, manifest, manifest.default, arrays, threads))
    return measure.speedup(list(measure.rounds(openers, seconds)))


def share(count: int, total: int) -> str:
    """``2 of 300 (0.7 %, at most 2.1 %)``: with the upper end of a one-sided interval of 95 % (Clopper, Pearson)."""
    low, high = count / total, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        tail = sum(math.comb(total, k) * middle**k * (1 - middle) ** (total - k) for k in range(count + 1))
        low, high = (middle, high) if tail > 0.05 else (low, middle)
    return f"{count} of {total} ({100 * count / total:.1f} %, at most {100 * high:.1f} %)"


def before(about: dict[str, Any]) -> list[dict[str, Any]]:
    """The gates of an earlier run on a machine like this."""
    found = json.loads((report.RESULTS / "gate.json").read_text())
    if any(found["machine"][name] != about[name] for name in ("cpu", "cores", "libraries")):
        raise SystemExit("results/gate.json is of another machine or of other versions; run without --resume")
    rows: list[dict[str, Any]] = found["gates"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gates", type=int, default=300, help="of an engine against itself; fewer of others")
    parser.add_argument("--threads", type=int, default=1, help="with all cores the other process is always in the way")
    parser.add_argument("--minutes", type=float, default=90, help="report what was done by then")
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, default=True, help="to results/")
    parser.add_argument("--resume", action="store_true", help="add the gates that results/gate.json lacks")
    options = parser.parse_args()
    about = report.machine()
    with tempfile.TemporaryDirectory() as scratch:
        found = engines(Path(scratch))
        base = found["the same"]
        spend = 10.0 if options.gates >= 300 else 3.0
        quiet = {name: truth(base, path, options.threads, spend) for name, path in found.items()}
        for name, ratio in quiet.items():
            report.say(f"{name}: {report.ratio(ratio)} on a quiet machine")
        rows = before(about) if options.resume else []
        asked = plan(options.gates, options.threads)
        for row in rows:
            asked.remove((row["engine"], row["limit"], row["threads"]))
        end = time.monotonic() + 60 * options.minutes
        with busy():
            for name, limit, threads in asked:
                if time.monotonic() > end:
                    break
                row = gated(base, found[name], limit, threads)
                if limit != 1 and len(rows) % 3 == 0:
                    row["naive"] = naive(base, found[name], threads)
                rows.append({"engine": name, "limit": limit, "threads": threads, **row})
                if len(rows) % 20 == 0:
                    counts = Counter((r["engine"], r["limit"], r["threads"], r["verdict"]) for r in rows)
                    report.say(f"{len(rows)} gates: {dict(counts)}")
                    record(rows, quiet, about, options)
    print(record(rows, quiet, about, options))


def record(
    rows: list[dict[str, Any]], quiet: dict[str, Interval], about: dict[str, Any], options: argparse.Namespace
) -> str:
    """What was found so far as tables, written to results/ if that is asked: a run of an hour may be stopped."""
    about["load_after"] = round(os.getloadavg()[0], 2)
    sections = [
        ("The true ratio, machine otherwise quiet", _quiet(quiet)),
        ("Verdicts, a core busy half of the time", _verdicts(rows)),
        ("Without a gate: medians of 50 runs, one engine after the other", _naive(rows)),
    ]
    said = {name: ratio.model_dump() for name, ratio in quiet.items()}
    data = {"machine": about, "threads": options.threads, "quiet": said, "gates": rows}
    return report.write("gate", data, sections) if options.write else "\n".join(body for _, body in sections)


def _quiet(quiet: dict[str, Interval]) -> str:
    head = ("engine", "blocks", "speed-up over 17 blocks")
    return report.table(head, [(name, str(DEPTHS[name]), report.ratio(ratio)) for name, ratio in quiet.items()])


def _arms(rows: list[dict[str, Any]]) -> dict[Arm, list[dict[str, Any]]]:
    arms: dict[Arm, list[dict[str, Any]]] = {}
    for row in rows:
        arms.setdefault((row["engine"], row["limit"], row["threads"]), []).append(row)
    return dict(sorted(arms.items(), key=lambda pair: (pair[0][1], list(DEPTHS).index(pair[0][0]))))


def _verdicts(rows: list[dict[str, Any]]) -> str:
    head = ("engine", "limit", "threads", "fail", "pass", "inconclusive", "seconds: median, p95, most", "noise")
    body = []
    for (name, limit, threads), arm in _arms(rows).items():
        counts = Counter(row["verdict"] for row in arm)
        seconds = [row["seconds"] for row in arm]
        spent = f"{np.median(seconds):.1f}, {np.percentile(seconds, 95):.1f}, {max(seconds):.1f}"
        noise = f"{np.median([row['noise'] for row in arm]):.1f} %"
        cells = [share(counts[verdict], len(arm)) for verdict in ("fail", "pass")]
        body.append((name, f"{limit:g}", str(threads), *cells, str(counts["inconclusive"]), spent, noise))
    return report.table(head, body)


def _naive(rows: list[dict[str, Any]]) -> str:
    body = []
    for (name, limit, threads), arm in _arms([row for row in rows if "naive" in row]).items():
        counts = Counter(row["naive"]["verdict"] for row in arm)
        cells = [share(counts[verdict], len(arm)) for verdict in ("fail", "pass")]
        body.append((name, f"{limit:g}", str(threads), *cells))
    return report.table(("engine", "limit", "threads", "fail", "pass"), body)


if __name__ == "__main__":
    main()
