"""What does each preset bring, and what does the same cost where tokens are chosen by chance?

Every preset and its control arm, on the zoo model of its kind, timed against the dense engine at batch 8 and 1 and
judged on the exported engine. Writes the promises into the files of the presets.

    python -m benchmarks.presets
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import optpass
from benchmarks import report
from optpass import measure, presets
from optpass.metrics import loss
from optpass.zoo import registry

MODELS = {"vision": "fashion-vit"}
"""The zoo model that stands for each kind."""
BACKEND, ENGINE = "onnxruntime", "onnxruntime-f32"
BATCHES = (8, 1)
SAMPLES = 2000
COMMAND = "python -m benchmarks.presets"


def arm(label: str, model: str, passes: Any, folder: Path, seconds: float) -> dict[str, Any]:
    """Quality and speed of one schedule."""
    row: dict[str, Any] = {"speedup": {}, "ms": {}}
    for batch in BATCHES:
        split = registry.load(model).test_split(batch)
        inputs = {name: array for name, array in split.items() if name != "labels"}
        result = optpass.optimize(
            model, passes, backend=BACKEND, out=folder, inputs=inputs, force=True, seconds=0,
            samples=SAMPLES if batch == BATCHES[0] else batch,
        )  # fmt: skip
        if not result.ok:
            raise SystemExit(f"{label}: {[(r.status, r.reason) for r in result.passes]} {result.fidelity}")
        if batch == BATCHES[0]:
            metric = result.metric[0]
            row |= {"metric": metric.name, "samples": metric.samples, "tokens": result.passes[-1].tokens}
            row |= {"top1": round(metric.optimized.value, 5), "drop": _rounded(loss(metric).model_dump(), 2)}
        latency = measure.bench(folder, engine=ENGINE, budget=seconds).latency[0]
        row["speedup"][str(batch)] = _rounded(latency.speedup.model_dump(), 2)
        row["ms"][str(batch)] = [round(latency.dense.median_ms, 2), round(latency.optimized.median_ms, 2)]
        report.say(f"{label} batch {batch}: {row['speedup'][str(batch)]} {row['drop']}")
    return row


def _rounded(interval: Mapping[str, float], digits: int) -> list[float]:
    return [round(interval[name], digits) for name in ("value", "low", "high")]


def promise(
    kind: str, preset: str, row: Mapping[str, Any], control: Mapping[str, Any], about: Mapping[str, Any]
) -> str:
    """The table of a promise as TOML."""
    speed = ", ".join(f"{batch} = {row['speedup'][str(batch)]}" for batch in BATCHES)
    return f"""[{preset}.promise]
model = "{MODELS[kind]}"
engine = "{ENGINE}"
machine = "{about["cpu"]}, {about["cores"]} cores"
date = "{about["date"][:10]}"
metric = "{row["metric"]}"
samples = {row["samples"]}
drop = {row["drop"]}
control_drop = {control["drop"]}
speedup = {{ {speed} }}
command = "{COMMAND}"
"""


def promised(text: str, preset: str, table: str) -> str:
    """The text of a file of presets with the promise of one of them replaced, or put behind its passes."""
    before = re.compile(rf"^\[{preset}\.promise\]\n(?:[^\[\n].*\n)*", re.MULTILINE)
    if before.search(text):
        return before.sub(lambda _: table, text)
    passes = re.compile(rf"(?:^\[\[{preset}\.pass\]\]\n(?:[^\[\n].*\n)*\n?)+", re.MULTILINE)
    return passes.sub(lambda found: f"{found[0].rstrip()}\n\n{table}\n", text).rstrip() + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    head = ["kind", "preset", "arm", "tokens", "drop, points"]
    head += [text for batch in BATCHES for text in (f"batch {batch}: ms", "speed-up")]
    lines = []
    for row in rows:
        cells = [row["kind"], row["preset"], row["arm"], ", ".join(map(str, row["tokens"])), _three(row["drop"])]
        for batch in map(str, BATCHES):
            cells += ["{} to {}".format(*row["ms"][batch]), f"{_three(row['speedup'][batch], 'x')}"]
        lines.append(cells)
    return report.table(head, lines)


def _three(value: list[float], unit: str = "") -> str:
    return f"{value[0]:.2f}{unit} [{value[1]:.2f}, {value[2]:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each latency")
    options = parser.parse_args()
    about = report.machine()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in presets.kinds():
            for name in presets.NAMES:
                found = presets.preset(name, kind)
                both = {}
                for which, passes in (("preset", list(found.passes)), ("control", found.control)):
                    row = arm(f"{name}, {which}", MODELS[kind], passes, Path(folder) / "engine", options.seconds)
                    both[which] = row
                    rows.append({"kind": kind, "preset": name, "arm": which, **row})
                path = Path(presets.__file__).parent / f"{kind}.toml"
                text = promise(kind, name, both["preset"], both["control"], about)
                path.write_text(promised(path.read_text(), name, text))
    note = (
        f"Each preset, and the same sites and counts with tokens chosen by chance, on {', '.join(MODELS.values())} and "
        f"{ENGINE}. Intervals are of 95 %. The schedules were chosen among seventeen by these same {SAMPLES} samples, "
        "so that the drops are flattered a little by the choice."
    )
    print(report.write("presets", {"machine": about, "rows": rows}, [("Presets", f"{note}\n\n{table(rows)}")]))


if __name__ == "__main__":
    main()
