"""What does the way of a model to an engine bring by itself: unmodified models, beside the path that each engine names.

No pass is applied. The engines of optpass run beside those of the path that the engine's own documentation gives,
opened with the same settings on the same threads: ONNX Runtime beside ``torch.onnx.export`` and Optimum, without and
with the optimizer of ONNX Runtime; OpenVINO beside ``openvino.convert_model`` of the module; inductor beside
``torch.compile``. All outputs are held against eager execution first: what computes something else is no peer. Each
pair runs in turn, with engines opened anew in each of many rounds.

    python -m venv peers && peers/bin/pip install torch==2.13.0 'optimum[onnxruntime]==2.1.0'
    python -m benchmarks.backends --optimum peers/bin/optimum-cli                    # 5 minutes on two cores
    python -m benchmarks.backends --seconds 0.5 --models fashion-vit --no-write      # a look
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks import models, report
from optpass import measure
from optpass.capture import capture
from optpass.errors import OptpassError
from optpass.export import fidelity
from optpass.export.base import Source, backend
from optpass.runtime.engines.base import open_engine
from optpass.zoo import registry

Array = NDArray[Any]
Run = Callable[[], Array]
Opener = Callable[[], Run]
THREADS = 2
BATCHES = (1, 8)
TOKENS = 128
ENGINES = ("onnxruntime-f32", "openvino-f32", "openvino-bf16", "inductor-f32")
MODES = ("default", "max-autotune")
"""Of ``torch.compile``."""

OPTIMUM: dict[str, list[str]] = {"Optimum": [], "Optimum, -O2": ["--optimize", "O2"]}
"""Its export, plain and with the fusions of ONNX Runtime; beyond O2 they take an approximation of GELU."""


@dataclass(frozen=True)
class Model:
    """A module of one tensor in and one out, and the tensor; ``saved`` is what Hugging Face can save of it."""

    name: str
    module: nn.Module
    example: Tensor
    saved: Any = None


class Text(nn.Module):
    """A language model as one that takes ids alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids to logits."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def fashion(batch: int) -> Model:
    entry = registry.load("fashion-vit")
    return Model("fashion-vit", entry.factory()[0], torch.from_numpy(entry.test_split(batch)["pixel_values"]))


def deit(batch: int) -> Model:
    module = models.deit_s()
    return Model("DeiT-S shape", models.Logits(module), models.noise(batch), module)


def text(batch: int) -> Model:
    entry = registry.load("stdlib-lm")
    ids = entry.test_split(batch)["input_ids"][:, :TOKENS].copy()
    return Model(f"stdlib-lm, {TOKENS} tokens", Text(entry.factory()[0]), torch.from_numpy(ids))


MODELS = {"fashion-vit": fashion, "deit": deit, "stdlib-lm": text}


# Ours, and the peers of each engine


def ours(model: Model, folder: Path) -> tuple[dict[str, Opener], dict[str, float]]:
    """Each engine by its name, and the difference from eager that rounding explains."""
    stage = capture((model.module, (model.example,), {}), dynamic=()).main
    source, found, allowed = Source(stage), dict[str, Opener](), dict[str, float]()
    for name in ENGINES:
        kind, _, precision = name.partition("-")
        try:
            lowering = backend(kind, precision)
        except OptpassError as error:
            report.say(f"{name}: {error.refusal}")
            continue
        place = folder / name
        place.mkdir()
        found[name] = _opener(kind, precision, place / lowering.lower(source, place, precision), model.example)
        allowed[name] = fidelity.tolerance(stage, precision)
    return found, allowed


def peers(model: Model, names: Sequence[str], folder: Path, optimum: str) -> dict[tuple[str, str], Opener]:
    """What runs beside each engine, by the name of the engine and of the path."""
    found: dict[tuple[str, str], Opener] = {}
    with torch.no_grad():
        if "onnxruntime-f32" in names:
            for path, file in onnx_files(model, folder, optimum).items():
                found["onnxruntime-f32", path] = _opener("onnxruntime", "f32", file, model.example)
        if any(name.startswith("openvino") for name in names):
            path, file = converted(model, folder)
            for precision in ("f32", "bf16"):
                if f"openvino-{precision}" in names:
                    opener = _opener("openvino", precision, file, model.example)
                    found[f"openvino-{precision}", path] = opener
    if "inductor-f32" in names:
        for mode in MODES:
            found["inductor-f32", f"torch.compile, {mode}"] = compiled(model, mode)
    return found


def onnx_files(model: Model, folder: Path, optimum: str) -> dict[str, Path]:
    """The exporter of torch with its optimizer, and Optimum, plain and with the fusions of ONNX Runtime."""
    files = {"torch.onnx.export": folder / "exported.onnx"}
    torch.onnx.export(
        model.module, (model.example,), files["torch.onnx.export"], dynamo=True, optimize=True, external_data=False,
        verbose=False,
    )  # fmt: skip
    if optimum and model.saved is not None:
        # for any batch, and so made once
        files |= {path: folder.parent / path / "model.onnx" for path in OPTIMUM}
        for path, more in OPTIMUM.items():
            if not files[path].exists():
                saved = _saved(model.saved, folder)
                command = [optimum, "export", "onnx", "--model", saved, "--task", "image-classification", *more]
                subprocess.run([*command, str(files[path].parent)], check=True, capture_output=True)
    return files


def _saved(module: Any, folder: Path) -> str:
    from transformers import ViTImageProcessorPil

    module.save_pretrained(folder / "saved")
    ViTImageProcessorPil().save_pretrained(folder / "saved")
    return str(folder / "saved")


def converted(model: Model, folder: Path) -> tuple[str, Path]:
    """The module as OpenVINO converts it, traced or, where that fails, exported; sizes are fixed, as ours are."""
    import openvino

    path, shape = "openvino.convert_model", [tuple(model.example.shape)]
    try:
        made = openvino.convert_model(model.module, example_input=model.example, input=shape)
    except Exception as error:  # noqa: BLE001  of OpenVINO's own types
        report.say(f"{model.name}: {path} of the module: {str(error).strip().splitlines()[-1]}")
        path, made = (
            f"{path} of torch.export",
            openvino.convert_model(torch.export.export(model.module, (model.example,))),
        )
    openvino.save_model(made, str(folder / "converted.xml"), compress_to_fp16=False)
    return path, folder / "converted.xml"


def compiled(model: Model, mode: str) -> Opener:
    """Compiled at the first call, and once: opening anew takes what is there."""
    torch.set_num_threads(THREADS)
    function = torch.compile(model.module, mode=mode, dynamic=False)

    @torch.inference_mode()
    def run() -> Array:
        result: Array = function(model.example).numpy()
        return result

    return lambda: run


def _opener(kind: str, precision: str, path: Path, example: Tensor) -> Opener:
    def opener() -> Run:
        opened, array = open_engine(path.name, kind, precision, path, THREADS), example.numpy()
        return lambda: opened.run([array])[0]

    return opener


# Compared and timed


def difference(opener: Opener, expected: Array) -> float:
    """From eager execution, relative to its largest value."""
    found = opener()()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def prepared(model: Model, folder: Path, optimum: str) -> list[dict[str, Any]]:
    """Every pair, built and held against eager execution; those where both are right have what opens them."""
    with torch.no_grad():
        expected = model.module(model.example).numpy()
    own, allowed = ours(model, folder)
    moved = {name: difference(opener, expected) for name, opener in own.items()}
    rows = []
    for (name, path), opener in peers(model, list(own), folder, optimum).items():
        row: dict[str, Any] = {"model": model.name, "batch": len(model.example), "engine": name, "path": path}
        row |= {"allowed": allowed[name], "ours": moved[name]}
        try:
            row["theirs"] = difference(opener, expected)
        except Exception as error:  # noqa: BLE001  whatever a compiler of theirs raises is what is told
            row["why"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        else:
            if max(row["ours"], row["theirs"]) <= row["allowed"]:
                row["openers"] = (opener, own[name])
        report.say(f"{model.name} batch {row['batch']} {name} {path}: {row.get('theirs', row.get('why'))}")
        rows.append(row)
    return rows


def timed(row: dict[str, Any], seconds: float) -> None:
    """Both in turn; the ratio is theirs over ours."""
    done = list(measure.rounds(row.pop("openers"), seconds))
    times = [measure.timing(np.concatenate([one.times[which] for one in done])) for which in (0, 1)]
    row["ms"] = [one.median_ms for one in times]
    row["ratio"], row["rounds"] = measure.speedup(done).model_dump(), len(done)
    report.say(f"{row['model']} batch {row['batch']} {row['engine']} {row['path']}: {report.ratio(row['ratio'])}")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = [
        "model",
        "batch",
        "engine",
        "beside",
        "from eager: theirs",
        "ours",
        "ms: theirs",
        "ours",
        "theirs over ours",
    ]
    lines = []
    for row in rows:
        cells = [row["model"], str(row["batch"]), row["engine"], row["path"]]
        cells += [f"{row['theirs']:.1e}" if "theirs" in row else row["why"], f"{row['ours']:.1e}"]
        if "ratio" in row:
            cells += [*(f"{ms:.2f}" for ms in row["ms"]), report.ratio(row["ratio"])]
        else:
            cells += ["", "", "" if "why" in row else f"not timed: more than {row['allowed']:.1e} from eager"]
        lines.append(cells)
    return report.table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each pair of engines")
    parser.add_argument("--models", default=",".join(MODELS), help="which, by name")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="sizes of a call")
    parser.add_argument("--optimum", default="", help="the optimum-cli of an environment with optimum[onnxruntime]")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory of the results")
    parser.add_argument("--no-write", action="store_true", help="print the table alone")
    given = parser.parse_args()
    about = report.machine()
    # of tracing, and of packages that torch could use as well
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="optpass-benchmark-") as scratch:
        for name in given.models.split(","):
            for batch in map(int, given.batches.split(",")):
                folder = Path(scratch) / name / str(batch)
                folder.mkdir(parents=True)
                rows += prepared(MODELS[name](batch), folder, given.optimum)
        # all building is over when the clock starts
        about["load_before_timing"] = report.machine()["load_before"]
        with measure.pinned(THREADS):
            for row in rows:
                if "openers" in row:
                    timed(row, given.seconds)
    note = (
        f"Unmodified models on {THREADS} threads; the ratio is theirs over ours, above 1 where ours is faster, with "
        "an interval of 95 %. Differences from eager execution are relative to the largest output. Sizes are fixed on "
        "both sides, but for Optimum, which leaves the batch open. "
        f"Load before the first timing: {about['load_before_timing']}."
    )
    section = f"{note}\n\n{table(rows)}"
    data = {"machine": about, "optimum": bool(given.optimum), "rows": rows}
    print(section if given.no_write else report.write("backends", data, [("Backends", section)], given.out))


if __name__ == "__main__":
    main()
