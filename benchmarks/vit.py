"""What does token reduction bring a vision transformer, engine by engine, and what does it cost?

Each arm is timed against the dense engine of the same backend and precision, in turn, in one process, and judged on
the exported engine. Beside it, in the same run: Token Merging as its authors' patch does it, in eager torch and
exported.

    python -m benchmarks.vit                      # everything, about half an hour on two cores
    python -m benchmarks.vit --images 2000        # the shipped images alone
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray

import optpass
from benchmarks import models, report
from benchmarks.tome import TokenMerging
from optpass import grammar, manager, measure, metrics
from optpass.capture import capture
from optpass.export import artifact
from optpass.results import Interval, PassRecord
from optpass.runtime import manifest as manifests
from optpass.runtime.engines.base import Opened, open_engine
from optpass.runtime.session import Session
from optpass.zoo import registry

Array = NDArray[Any]
Run = Callable[[Array], Array]
ENGINES = ("onnxruntime", "openvino", "openvino:bf16")
SHIPPED = 2000
"""Images that come with the package; the first of the test split."""
EVERYWHERE = "the same in every block"
ENGINE_IDS = ("onnxruntime-f32", "openvino-f32", "openvino-bf16")
JUDGES = ("onnxruntime-f32", "openvino-bf16")
"""Engines that arms beside the schedule are judged on: float32 engines differ by rounding alone."""


@dataclass(frozen=True)
class Setup:
    """One model at one batch size: what is optimized, its example, and the images it is judged on."""

    name: str
    source: Any
    module: torch.nn.Module
    example: Array
    images: Array | None
    labels: Array | None

    @property
    def batch(self) -> int:
        return len(self.example)


@dataclass(frozen=True)
class Site:
    """Where an arm takes tokens, and how many: a block by its number."""

    block: int
    tokens: int


# Arms


def sites_of(records: Sequence[PassRecord]) -> list[Site]:
    """The sites of all passes of a schedule along the stream, and the tokens that go at each."""
    blocks = sorted(int(re.findall(r"\d+", path)[-1]) for record in records for path in record.sites)
    counts = [int(count) for count in records[-1].tokens]
    steps = [before - after for before, after in pairwise(counts)]
    return [Site(block, tokens) for block, tokens in zip(blocks, steps, strict=True)]


def arms(records: Sequence[PassRecord], depth: int) -> dict[str, str]:
    """The other ways to take the same tokens at the same sites."""
    sites = sites_of(records)
    where = f"at=[{','.join(str(s.block) for s in sites)}],r=[{','.join(str(s.tokens) for s in sites)}]"
    where += f",place={records[0].options['place']}"
    return {
        "merge everywhere": f"merge(r={reductions(sites, depth)[EVERYWHERE][0]},at=all)",
        "transform": f"transform({where})",
        "norm": f"prune(selector=norm,{where})",
        "cls-attention": f"prune(selector=cls-attention,{where})",
        "divprune": f"prune(selector=divprune,{where})",
    }


# Quality


def guesses(run: Run, images: Array, batch: int) -> Array:
    """The class with the highest logit of each image; the last batch is filled up."""
    found = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        filled = part[np.arange(batch) % len(part)]
        found.append(run(filled).argmax(-1)[: len(part)])
    return np.concatenate(found)


def quality(dense: Array, optimized: Array, labels: Array) -> dict[str, Any]:
    """Top-1 of both sides with Wilson's interval, and the drop with that of a bootstrap paired by image."""
    right = np.stack([dense == labels, optimized == labels], 1).astype(np.float64)
    count = len(labels)
    drop = metrics.bootstrap(right, np.ones(count), lambda mean: mean[:, 0] - mean[:, 1])
    sides = [metrics.wilson(round(float(right[:, side].sum())), count) for side in (0, 1)]
    return {"images": count, "dense": _plain(sides[0]), "optimized": _plain(sides[1]), "drop": _plain(drop)}


def judged(setup: Setup, dense: Array, optimized: Array) -> list[dict[str, Any]]:
    """Quality on the shipped images, and on all of them where more were run."""
    assert setup.labels is not None
    counts = sorted({min(SHIPPED, len(dense)), len(dense)})
    return [quality(dense[:n], optimized[:n], setup.labels[:n]) for n in counts]


def _plain(interval: Interval) -> dict[str, float]:
    return {key: round(value, 5) for key, value in interval.model_dump().items()}


# Measuring


class Line:
    """The product: arms of one model as artifacts, timed and judged on each engine."""

    def __init__(self, setup: Setup, folder: Path, seconds: float) -> None:
        self.setup, self.folder, self.seconds = setup, folder, seconds
        self.dense_guesses: dict[str, Array] = {}
        self.sessions: dict[str, tuple[Session, Session]] = {}
        self.records: list[PassRecord] = []
        self.unfaithful: list[str] = []

    def build(self, passes: str, name: str) -> tuple[Path, list[PassRecord]]:
        """Optimize; verification is part of it, the quality on a few images too."""
        out = self.folder / f"{self.setup.name}-{self.setup.batch}-{name}"
        if self.setup.images is None:
            return out, self.build_for_speed(passes, out)
        result = optpass.optimize(
            self.setup.source, passes, backend=ENGINES, out=out, inputs={"pixel_values": self.setup.example},
            samples=None if self.setup.images is None else self.setup.batch, seconds=0, force=True,
        )  # fmt: skip
        if not result.ok:
            raise SystemExit(f"{passes}: {[(r.status, r.reason) for r in result.passes]} {result.fidelity}")
        return out, result.passes

    def build_for_speed(self, passes: str, out: Path) -> list[PassRecord]:
        """As ``build``, but engines that differ from eager are measured too, and said to differ.

        With random weights all tokens are alike, so that bfloat16 merges others than float32 does.
        """
        program = capture(self.setup.source)
        outcome = manager.apply(program, grammar.parse(passes))
        if not outcome.ok:
            raise SystemExit(f"{passes}: {[(r.status, r.reason) for r in outcome.records]}")
        with artifact.writer(out, source=self.setup.name, force=True) as new:
            for text in ENGINES:
                backend, _, precision = text.partition(":")
                new.add(outcome.program.main, backend, precision or "f32")
                new.add(program.main, backend, precision or "f32", role="dense")
            checked = new.fidelity()
            self.unfaithful = [f"{f.engine} {f.difference:.2g} of {f.tolerance:.2g}" for f in checked if not f.ok]
            new.finish(passes=outcome.records, fidelity=checked)
        return list(outcome.records)

    def measure(self, arm: str, passes: str, judges: Sequence[str]) -> list[dict[str, Any]]:
        """A row for each engine; those named in ``judges`` are judged on the shipped images."""
        out, records = self.build(passes, arm)
        rows = []
        for engine, twin in measure.pairs(manifests.read(out)).items():
            report.say(f"{self.setup.name} batch {self.setup.batch}: {passes} on {engine}")
            dense, optimized = optpass.load(out, engine=twin), optpass.load(out, engine=engine)
            inputs = {"pixel_values": self.setup.example}
            latency = measure.compare(dense, optimized, inputs, budget=self.seconds)
            row = {
                "model": self.setup.name, "batch": self.setup.batch, "arm": arm, "passes": passes,
                "tokens": records[-1].tokens, "engine": engine, "dense_ms": round(latency.dense.median_ms, 3),
                "optimized_ms": round(latency.optimized.median_ms, 3), "speedup": _plain(latency.speedup),
                "pairs": latency.dense.runs, "quality": [],
                "unfaithful": [text for text in self.unfaithful if text.startswith(engine)],
            }  # fmt: skip
            if engine in judges:
                row["quality"] = self.judge(engine, dense, optimized, SHIPPED)
            report.say(f"  {report.ratio(row['speedup'])} {[report.points(q['drop']) for q in row['quality']]}")
            if arm == "schedule":
                self.sessions[engine], self.records = (dense, optimized), records
            rows.append(row)
        return rows

    def times(self, first: Run, second: Run) -> measure.Round:
        """Seconds of each run of two functions on the example, in turn."""
        example = self.setup.example
        return measure.interleave([lambda: first(example), lambda: second(example)], self.seconds)

    def judge(self, engine: str, dense: Session, optimized: Session, count: int | None) -> list[dict[str, Any]]:
        """Quality of one engine beside its dense twin, whose guesses are the same for every arm."""
        assert self.setup.images is not None
        images, batch = self.setup.images[:count], self.setup.batch
        if len(self.dense_guesses.get(engine, ())) < len(images):
            self.dense_guesses[engine] = guesses(_of(dense), images, batch)
        found = guesses(_of(optimized), images, batch)
        return judged(self.setup, self.dense_guesses[engine][: len(images)], found)


def _of(session: Session) -> Run:
    def run(images: Array) -> Array:
        (logits,) = session.run(pixel_values=images).values()
        return logits

    return run


def peer(line: Line, reductions: Mapping[str, Sequence[int]], folder: Path, judge: bool) -> list[dict[str, Any]]:
    """Token Merging, eager and exported the standard way, beside its dense model in the same form, and beside ours."""
    setup, rows = line.setup, []
    pixels = torch.from_numpy(setup.example)
    dense = setup.module if setup.name == "fashion-vit" else models.Logits(setup.module)
    dense_file = exported(dense, pixels, folder / f"{setup.name}-{setup.batch}-plain.onnx")
    for label, r in reductions.items():
        report.say(f"{setup.name} batch {setup.batch}: Token Merging with r={list(r)}")
        merging = TokenMerging(setup.module, models.parts_of(setup.module), r).eval()
        file = exported(merging, pixels, folder / f"{setup.name}-{setup.batch}-tome.onnx")
        forms: dict[str, tuple[Run, Run, str]] = {"eager torch": (_eager(dense), _eager(merging), "")}
        for backend, precision in (("onnxruntime", "f32"), ("openvino", "f32"), ("openvino", "bf16")):
            pair = [_opened(path, backend, precision) for path in (dense_file, file)]
            forms[f"torch.onnx.export, {backend} {precision}"] = (*pair, f"{backend}-{precision}")  # type: ignore[assignment]
        for form, (plain, reduced, engine) in forms.items():
            timed = line.times(plain, reduced)
            times = timed.times
            row: dict[str, Any] = {
                "model": setup.name, "batch": setup.batch, "r": label, "form": form,
                "dense_ms": round(float(np.median(times[0])) * 1e3, 3),
                "optimized_ms": round(float(np.median(times[1])) * 1e3, 3),
                "speedup": _plain(measure.speedup([timed])), "pairs": len(times[0]), "quality": [],
            }  # fmt: skip
            if engine:
                ours = _of(line.sessions[engine][1])
                row["schedule_over_peer"] = _plain(measure.speedup([line.times(reduced, ours)]))
            if judge and form != "eager torch" and engine == "onnxruntime-f32":
                assert setup.images is not None
                ran = guesses(reduced, setup.images[:SHIPPED], setup.batch)
                row["quality"] = judged(setup, line.dense_guesses[engine][: len(ran)], ran)
            report.say(f"  {form}: {report.ratio(row['speedup'])}")
            rows.append(row)
    return rows


def exported(module: torch.nn.Module, pixels: torch.Tensor, path: Path) -> Path:
    """The path that torch documents: its exporter with its optimizer."""
    with torch.no_grad():
        torch.onnx.export(module, (pixels,), path, dynamo=True, optimize=True, external_data=False, verbose=False)
    return path


def _opened(path: Path, backend: str, precision: str) -> Run:
    opened: Opened = open_engine(path.name, backend, precision, path, manifests.cores())

    def run(images: Array) -> Array:
        return opened.run([images])[0]

    return run


def _eager(module: torch.nn.Module) -> Run:
    @torch.no_grad()
    def run(images: Array) -> Array:
        logits: Array = module(torch.from_numpy(images)).numpy()
        return logits

    return run


# The tables


def arm_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each arm on each engine."""
    head = ["model", "batch", "engine", "arm", "tokens", "dense ms", "ms", "speed-up"]
    head += ["top-1, 2,000", "drop, points", "top-1, all", "drop, points"]
    return report.table(head, [_line(row) for row in rows])


def _line(row: Mapping[str, Any]) -> list[str]:
    tokens = ", ".join(map(str, row["tokens"]))
    cells = [row["model"], str(row["batch"]), row["engine"], row["arm"], tokens, f"{row['dense_ms']:.1f}"]
    return [*cells, f"{row['optimized_ms']:.1f}", report.ratio(row["speedup"]), *_quality_cells(row["quality"])]


def _quality_cells(quality: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = []
    for wanted in (True, False):
        found = next((q for q in quality if (q["images"] <= SHIPPED) is wanted), None)
        if found is None:
            cells += ["", ""]
        else:
            sides = f"{100 * found['dense']['value']:.2f} to {100 * found['optimized']['value']:.2f}"
            cells += [sides, report.points(found["drop"])]
    return cells


def peer_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each form of the peer; the last columns set our schedule beside it."""
    head = ["model", "batch", "r", "form", "dense ms", "ms", "speed-up", "our schedule is faster by"]
    head += ["top-1, 2,000", "drop, points", "top-1, all", "drop, points"]
    lines = []
    for row in rows:
        ours = report.ratio(row["schedule_over_peer"]) if "schedule_over_peer" in row else ""
        cells = [row["model"], str(row["batch"]), row["r"], row["form"], f"{row['dense_ms']:.1f}"]
        lines.append(
            [*cells, f"{row['optimized_ms']:.1f}", report.ratio(row["speedup"]), ours, *_quality_cells(row["quality"])]
        )
    return report.table(head, lines)


# The run


def fashion(batch: int, images: int) -> Setup:
    entry = registry.load("fashion-vit")
    split = entry.test_split(max(images, batch))
    module, _, _ = entry.factory()
    pixels = split["pixel_values"]
    return Setup("fashion-vit", "fashion-vit", module, pixels[:batch], pixels[:images], split["labels"][:images])


def deit(batch: int) -> Setup:
    module, pixels = models.deit_s(), models.noise(batch)
    return Setup("DeiT-S shape", (module, (), {"pixel_values": pixels}), module, pixels.numpy(), None, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each pair of engines")
    parser.add_argument("--images", type=int, default=10_000, help="test images to judge on; 2,000 need no download")
    parser.add_argument("--schedule", help="in place of the one of the zoo")
    parser.add_argument("--control", help="in place of the one of the zoo")
    parser.add_argument("--models", default="fashion-8,fashion-1,deit-8", help="which, by name and batch")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory of the results")
    given = parser.parse_args()
    entry = registry.load("fashion-vit")
    schedule, control = given.schedule or entry.SCHEDULE, given.control or entry.CONTROL
    torch.set_num_threads(manifests.cores())
    rows: list[dict[str, Any]] = []
    peers: list[dict[str, Any]] = []
    data: dict[str, Any] = {"machine": report.machine(), "schedule": schedule, "control": control}

    def write() -> str:
        """After each step, so that a run that is cut short leaves what it has."""
        data.update(arms=rows, token_merging=peers)
        return report.write("vit", data, sections(schedule, control, rows, peers), given.out)

    with tempfile.TemporaryDirectory(prefix="optpass-benchmark-") as scratch:
        folder = Path(scratch)
        known = {
            "fashion-8": lambda: fashion(8, given.images),
            "fashion-1": lambda: fashion(1, SHIPPED),
            "deit-8": lambda: deit(8),
        }
        lines = [Line(known[name](), folder, given.seconds) for name in given.models.split(",")]
        for line in lines:
            setup = line.setup
            real = setup.images is not None
            rows += line.measure("schedule", schedule, ENGINE_IDS if real else ())
            rows += line.measure("control", control, JUDGES if real and setup.batch > 1 else ())
            merging = reductions(sites_of(line.records), len(models.parts_of(setup.module).blocks))
            peers += peer(line, merging, folder, real and setup.batch > 1)
            write()
        for line in lines:
            if line.setup.images is None or line.setup.batch == 1:
                continue
            whole(line, rows)
            write()
            for name, passes in arms(line.records, len(models.parts_of(line.setup.module).blocks)).items():
                rows += line.measure(name, passes, JUDGES)
                write()
    print(write())


def whole(line: Line, rows: Sequence[dict[str, Any]]) -> None:
    """Judge the schedule on all images as well, engine by engine."""
    for row in rows:
        if (row["model"], row["batch"], row["arm"]) == (line.setup.name, line.setup.batch, "schedule"):
            report.say(f"all images on {row['engine']}")
            row["quality"] = line.judge(row["engine"], *line.sessions[row["engine"]], None)


def sections(
    schedule: str, control: str, rows: Sequence[Mapping[str, Any]], peers: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    about = f"Schedule `{schedule}`, control `{control}`. Latency: medians; intervals are of 95 %."
    return [("Arms", f"{about}\n\n{arm_table(rows)}"), ("Token Merging, as its authors' patch", peer_table(peers))]


def reductions(sites: Sequence[Site], depth: int) -> dict[str, list[int]]:
    """What the peer merges: as our schedule does, and the same number in every block, to as many tokens in the end."""
    same = [0] * depth
    for site in sites:
        same[site.block] = site.tokens
    return {"as the schedule": same, EVERYWHERE: [round(sum(same) / depth)] * depth}


if __name__ == "__main__":
    main()
