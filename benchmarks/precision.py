"""What do 8-bit products and half precision bring beside fewer tokens, and together with them?

Each arm on the zoo model, on ONNX Runtime and OpenVINO: top-1 on test images that nothing was calibrated on, the
difference from eager execution, size, and latency in turn with the dense float32 engine of the same backend.

    python -m benchmarks.precision
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import optpass
from benchmarks import report
from optpass import measure
from optpass.metrics import loss
from optpass.runtime import manifest as manifests
from optpass.zoo import registry

MODEL = "fashion-vit"
BACKENDS = ("onnxruntime", "openvino")
ARMS = (
    "",
    "precision(dtype=bf16)",
    "quantize",
    "quantize(mode=static)",
    "SCHEDULE",
    "SCHEDULE,precision(dtype=bf16)",
    "SCHEDULE,quantize",
)
SAMPLES = 2000


def arm(passes: str, backend: str, folder: Path) -> dict[str, Any]:
    """Quality and size of one schedule; the artifact stays in ``folder`` to be timed."""
    schedule = passes.replace("SCHEDULE", registry.load(MODEL).SCHEDULE)
    result = optpass.optimize(MODEL, schedule, backend=backend, out=folder, samples=SAMPLES, seconds=0)
    row: dict[str, Any] = {"passes": schedule, "backend": backend, "ok": result.ok}
    record = result.passes[-1] if result.passes else None
    if not result.ok:
        return row | {"reason": record.reason if record else "not faithful"}
    metric = result.metric[0]
    manifest = manifests.read(folder)
    main = manifest.engine(manifest.default)
    moved = [entry.difference for entry in result.fidelity if entry.engine == manifest.default]
    row |= {"top1": metric.optimized.model_dump(), "drop": loss(metric).model_dump(), "samples": metric.samples}
    row |= {"difference": max(moved), "mib": main.mib(folder)}
    row |= {"error": record.error, "ops": record.ops, "data": record.data} if record else {}
    report.say(f"{backend} {schedule or 'dense'}: {metric.optimized.value:.4f}")
    return row


def timed(row: dict[str, Any], folder: Path, seconds: float) -> None:
    """Add the latency of an artifact, in turn with its dense engine."""
    latency = measure.bench(folder, engine=f"{row['backend']}-f32", budget=seconds).latency[0]
    row["speedup"] = latency.speedup.model_dump()
    row["ms"] = [latency.dense.median_ms, latency.optimized.median_ms]
    report.say(f"{row['backend']} {row['passes'] or 'dense'}: {report.ratio(latency.speedup)}")


def table(rows: list[dict[str, Any]]) -> str:
    head = ["backend", "passes", "top-1", "drop, points", "samples", "from eager", "MiB", "ms, dense to it", "speed-up"]
    lines = []
    for row in rows:
        cells = [row["backend"], row["passes"] or "none"]
        if row["ok"]:
            drop = row["drop"]
            cells += [f"{100 * row['top1']['value']:.2f}", "{value:.2f} [{low:.2f}, {high:.2f}]".format(**drop)]
            cells += [f"{row['samples']}", f"{row['difference']:.1e}", f"{row['mib']:.2f}"]
            cells += ["{:.1f} to {:.1f}".format(*row["ms"]), report.ratio(row["speedup"])]
        else:
            cells += [row["reason"], *[""] * 6]
        lines.append(cells)
    return report.table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each latency")
    options = parser.parse_args()
    about = report.machine()
    with tempfile.TemporaryDirectory() as work:
        pairs = [(passes, backend) for backend in BACKENDS for passes in ARMS]
        pairs = [pair for pair in pairs if pair != ("quantize(mode=static)", "openvino")]
        folders = [Path(work) / str(number) for number in range(len(pairs))]
        rows = [arm(*pair, folder) for pair, folder in zip(pairs, folders, strict=True)]
        # all building is over when the clock starts
        about["load_before_timing"] = report.machine()["load_before"]
        for row, folder in zip(rows, folders, strict=True):
            if row["ok"]:
                timed(row, folder, options.seconds)
    note = (
        f"{MODEL} at batch 8, each against the dense float32 engine of its backend in turn; intervals are of 95 %. "
        f"CPU features: {', '.join(about['flags'])}. Load before the first timing: {about['load_before_timing']} on "
        f"{about['cores']} cores. Where ranges are calibrated, the 128 samples for it are not judged by; the drop is "
        "paired by sample. ONNX Runtime has no bfloat16 kernels on a CPU, so that there weights are half on disk alone."
    )
    print(report.write("precision", {"machine": about, "rows": rows}, [("Precision", f"{note}\n\n{table(rows)}")]))


if __name__ == "__main__":
    main()
