"""How much memory does ``optpass.optimize`` take, as a multiple of the weights, and which of its steps takes most?

Vision transformers with random float32 weights, saved in a directory as Hugging Face does. Each backend optimizes each
in a process of its own, whose peak is what the system counted as resident (VmHWM), pages of mapped files among it; the
mark is set back at each step. No latency is measured.

    python -m benchmarks.memory                 # five minutes on two cores, 6 GB of memory and of disk
    python -m benchmarks.memory --layers 6      # the smaller one alone
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import report
from optpass.zoo import registry

LAYERS = (6, 25)
"""Blocks of width 1280, of 79 MB each: 0.5 and 2 GB."""
BACKENDS = ("onnxruntime", "openvino")
STATUS = Path("/proc/self/status")


def save(layers: int, folder: Path) -> None:
    """A model in the form of Hugging Face."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    shape = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": layers}
    ViTForImageClassification(ViTConfig(**shape, num_labels=1000)).save_pretrained(folder)
    ViTImageProcessorPil().save_pretrained(folder)


def optimize(model: str, passes: str, backend: str, out: str) -> dict[str, Any]:
    """One call of the product; the peak of each step in kB, that of its imports and all before as the first."""
    import optpass

    steps: list[list[Any]] = [["import", 0]]

    def begin(what: str, done: int, total: int) -> None:
        steps[-1][1] = _peak()
        steps.append([what, 0])
        Path("/proc/self/clear_refs").write_text("5")

    result = optpass.optimize(model, passes, backend=backend, out=out, seconds=0, progress=begin)
    steps[-1][1] = _peak()
    if not result.ok:
        raise SystemExit(f"{passes}: {[(record.status, record.reason) for record in result.passes]} {result.fidelity}")
    return {"steps": steps}


def _peak() -> int:
    return int(next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")).split()[1])


def measured(layers: int, backends: Sequence[str], passes: str, folder: Path) -> list[dict[str, Any]]:
    """One model on each backend, one after the other."""
    model = folder / f"vit-{layers}"
    _child("save", str(layers), str(model))
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    rows = []
    for backend in backends:
        found = json.loads(_child("optimize", str(model), passes, backend, str(folder / "engine")).splitlines()[-1])
        steps: dict[str, float] = {}
        for name, kib in found["steps"]:
            steps[name] = max(steps.get(name, 0.0), round(kib * 1024 / weights, 3))
        peak = max(kib for _, kib in found["steps"]) * 1024
        rows.append({"layers": layers, "weights": weights, "backend": backend, "peak": peak, "steps": steps})
        report.say(f"{layers} layers on {backend}: {peak / weights:.2f} of the weights")
        for name, share in steps.items():
            report.say(f"  {share:.2f} {name}")
        subprocess.run(["rm", "-r", str(folder / "engine")], check=True)
    return rows


def _child(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.memory", "--child", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["step", *(f"{row['backend']}, {row['weights'] / 1e9:.1f} GB" for row in rows)]
    lines = [["**all**", *(f"**{row['peak'] / row['weights']:.2f}x**" for row in rows)]]
    for name in dict.fromkeys(step.replace(row["backend"], "BACKEND") for row in rows for step in row["steps"]):
        found = [row["steps"].get(name.replace("BACKEND", row["backend"])) for row in rows]
        lines.append([name, *("" if share is None else f"{share:.2f}x" for share in found)])
    return report.table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default=",".join(map(str, LAYERS)), help="of each model")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="which, by name")
    parser.add_argument("--passes", default=registry.load("fashion-vit").SCHEDULE, help="in place of those of the zoo")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory of the results")
    parser.add_argument("--no-write", action="store_true", help="print the table alone")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        kind, *arguments = given.child
        if kind == "save":
            save(int(arguments[0]), Path(arguments[1]))
        else:
            print(json.dumps(optimize(*arguments)))
        return
    data: dict[str, Any] = {"machine": report.machine(), "passes": given.passes, "rows": []}
    with tempfile.TemporaryDirectory(prefix="optpass-benchmark-") as scratch:
        for layers in map(int, given.layers.split(",")):
            data["rows"] += measured(layers, given.backends.split(","), given.passes, Path(scratch))
    note = (
        f"`{given.passes}`, batch 1. The peak of each step as a multiple of the float32 weights; the libraries "
        "themselves are in it."
    )
    text = f"{note}\n\n{table(data['rows'])}"
    print(text if given.no_write else report.write("memory", data, [("Memory", text)], given.out))


if __name__ == "__main__":
    main()
