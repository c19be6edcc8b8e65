"""Bad input of every kind: one line, the right exit code, no traceback, no half artifact.

Each case is a real process. What goes wrong only at run time is tried on ``optpass.load`` in a process without torch.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.driver import Done, Driver

MODELS = """
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        torch.manual_seed(0)
        layer = lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.layers = nn.ModuleList(layer() for _ in range(depth))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)

class Branches(Attention):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x.mean(1)

def small(): return Attention(), (torch.randn(2, 12, 16),)
def branches(): return Branches(), (torch.randn(2, 12, 16),)
def raises(): raise ValueError("there is no checkpoint")
def leaves(): raise SystemExit(0)
def number(): return 3
def fixed():
    module = Attention()
    module.forward = lambda x: Attention.forward(module, x.view(2, 12, 16))
    return module, (torch.randn(2, 12, 16),)
def broken():
    module = Attention()
    with torch.no_grad():
        module.layers[0].linear1.weight[0, 0] = float("nan")
    return module, (torch.randn(2, 12, 16),)
def causal():
    import transformers
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=64)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    return model, (), {"input_ids": torch.randint(4, 64, (2, 12)), "use_cache": False}
def slow():
    import time, sys
    print("started", file=sys.stderr, flush=True)
    return Attention(24), (torch.randn(2, 12, 16),)
def deaf():
    import contextlib, os, signal
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), signal.SIGTERM)
    return small()
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with models, files of the wrong kind, and nothing that may be added to."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "mine.py").write_text(MODELS)
    (folder / "notes.txt").write_text("not a model\n")
    (folder / "cut.pt2").write_bytes(b"PK\x03\x04 and no more")
    (folder / "empty").mkdir()
    hub = folder / "hub"
    hub.mkdir()
    (hub / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    (hub / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    unknown = folder / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"architectures": ["OurModel"], "model_type": "ours"}')
    torn = folder / "torn"
    torn.mkdir()
    (torn / "config.json").write_text("{")
    np.savez(folder / "shape.npz", x=np.zeros((2, 12, 15), np.float32))
    np.savez(folder / "name.npz", y=np.zeros((2, 12, 16), np.float32))
    np.savez(folder / "type.npz", x=np.zeros((2, 12, 16), np.int64))
    (folder / "bad.npz").write_bytes(b"nothing zipped")
    (folder / "bad.toml").write_text("[[pass]\n")
    (folder / "other.toml").write_text('[[pass]]\nname = "shrink"\n')
    (folder / "newer.toml").write_text('version = 2\n[[pass]]\nname = "prune"\n')
    (folder / "used").mkdir()
    (folder / "used" / "letter.txt").write_text("dear reader")
    return folder


SMALL = "optimize mine:small"
INPUTS: dict[str, tuple[str, int, str]] = {
    # what the model is
    "missing file": ("optimize ./gone.pt2", 2, "missing-file"),
    "misspelt zoo model": ("optimize fashion-vitt", 2, "unknown-model"),
    "not a model": ("optimize notes.txt", 2, "not-a-model"),
    "directory without a model": ("optimize empty", 2, "not-a-model"),
    "id without a connection": ("optimize nobody/nothing", 2, "model-id"),
    "corrupt safetensors": ("optimize hub", 2, "corrupt-file"),
    "corrupt config": ("optimize torn", 2, "corrupt-file"),
    "corrupt exported file": ("optimize cut.pt2", 2, "corrupt-file"),
    "unknown architecture": ("optimize unknown", 2, "unknown-architecture"),
    "missing module": ("optimize gone:factory", 2, "unknown-module"),
    "missing factory": ("optimize mine:smal", 2, "unknown-factory"),
    "factory that raises": ("optimize mine:raises", 2, "factory-fails"),
    "factory that ends the process": ("optimize mine:leaves", 1, "exit"),
    "factory of a number": ("optimize mine:number", 2, "not-a-model"),
    "weights that are not finite": ("optimize mine:broken", 2, "weights-not-finite"),
    "branch on a value": ("optimize mine:branches", 2, "data-dependent"),
    # its inputs
    "dynamic grammar": (f"{SMALL} --dynamic x:1", 2, "dynamic-grammar"),
    "dynamic input that is not there": (f"{SMALL} --dynamic y:1=2..9", 2, "dynamic-input"),
    "dynamic dimension that is fixed": ("optimize mine:fixed --dynamic x:1=2..20", 2, "dynamic-constant"),
    "inputs that are not there": (f"{SMALL} --inputs gone.npz", 2, "missing-file"),
    "inputs that are no npz": (f"{SMALL} --inputs bad.npz", 2, "corrupt-file"),
    "inputs of the wrong shape": (f"{SMALL} --inputs shape.npz", 2, "model-fails"),
    "inputs of the wrong name": (f"{SMALL} --inputs name.npz", 2, "input-names"),
    "inputs of the wrong dtype": (f"{SMALL} --inputs type.npz", 2, "model-fails"),
    # passes
    "unknown pass": (f"{SMALL} -p shrink", 2, "unknown-pass"),
    "unknown option": (f"{SMALL} -p prune(speed=9)", 2, "unknown-option"),
    "option of the wrong type": (f"{SMALL} -p prune(keep=much)", 2, "option-value"),
    "keep of zero": (f"{SMALL} -p prune(keep=0)", 2, "option-value"),
    "keep above one": (f"{SMALL} -p prune(keep=1.5)", 2, "option-value"),
    "negative r": (f"{SMALL} -p merge(r=-1)", 2, "option-value"),
    "unknown selector": (f"{SMALL} -p prune(selector=best)", 2, "option-value"),
    "passes that do not end": (f"{SMALL} -p prune(keep=0.5", 2, "passes-grammar"),
    "site that does not exist": (f"{SMALL} -p prune(keep=0.5,at=99)", 1, "no-site"),
    "more tokens than there are": (f"{SMALL} -p merge(r=99)", 1, "no-room"),
    "pass that is refused": ("optimize mine:causal -p merge(r=2)", 1, "token-order"),
    "recipe that is not there": (f"{SMALL} --recipe gone.toml", 2, "missing-file"),
    "recipe that is no TOML": (f"{SMALL} --recipe bad.toml", 2, "recipe"),
    "recipe with an unknown pass": (f"{SMALL} --recipe other.toml", 2, "unknown-pass"),
    "recipe of another version": (f"{SMALL} --recipe newer.toml", 2, "recipe-version"),
    "recipe beside passes": (f"{SMALL} -p prune --recipe other.toml", 2, "usage"),
    "preset beside passes": (f"{SMALL} -p prune --preset safe", 2, "usage"),
    "unknown preset": (f"{SMALL} --preset best", 2, "usage"),
    "preset of a kind without figures": ("optimize mine:causal --preset safe", 2, "no-preset"),
    "dry run of an unknown pass": (f"{SMALL} --dry-run -p shrink", 2, "unknown-pass"),
    "dry run of a missing file": ("optimize ./gone.pt2 --dry-run", 2, "missing-file"),
    # engines, data
    "unknown backend": (f"{SMALL} -b tensorflow", 2, "unknown-backend"),
    "unknown precision": (f"{SMALL} -b openvino:int3", 2, "unknown-precision"),
    "devices for a backend that has none": (f"{SMALL} --target sm_89", 2, "usage"),
    "device that nothing is built for": (f"{SMALL} -b tensorrt --target sm_42", 2, "target"),
    "unknown metric": (f"{SMALL} --data name.npz --metric beauty", 2, "unknown-metric"),
    "data that are not there": (f"{SMALL} --data gone.npz", 2, "data"),
    "data of the wrong name": (f"{SMALL} --data name.npz", 2, "data"),
}


def whole(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def check(done: Done, code: int, error: str) -> None:
    assert "Traceback" not in done.stderr
    assert (done.code, done.error) == (code, error), done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("name", INPUTS)
def test_bad_input_is_one_line(name: str, driver: Driver, home: Path) -> None:
    text, code, error = INPUTS[name]
    before = whole(home)
    check(driver.run(*text.split(), "-o", "engine", cwd=home), code, error)
    assert whole(home) == before


# where the result goes


def test_directory_in_use_is_not_replaced(driver: Driver, home: Path) -> None:
    check(driver.run("optimize", "mine:small", "-o", "used", cwd=home), 2, "output")
    check(driver.run("optimize", "mine:small", "-o", "used", "--force", cwd=home), 2, "output")
    assert (home / "used" / "letter.txt").read_text() == "dear reader"


@pytest.mark.parametrize("out", ["notes.txt/engine", "/proc/engine"])
def test_unwritable_output(out: str, driver: Driver, home: Path) -> None:
    before = whole(home)
    check(driver.run("optimize", "mine:small", "-o", out, cwd=home), 2, "output")
    assert whole(home) == before


def test_full_disk(driver: Driver, home: Path) -> None:
    before = whole(home)
    done = driver.run("optimize", "mine:small", "-o", "engine", cwd=home, file_size=4096)
    check(done, 2, "output")
    assert whole(home) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_full_file_system(driver: Driver, home: Path) -> None:
    small = home / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        check(driver.run("optimize", "mine:small", "-o", "small/engine", cwd=home), 2, "output")
        assert not any(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("number", "code", "error"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("after", [0.05, 1.0, 2.5])
def test_signal_in_the_middle(number: int, code: int, error: str, after: float, driver: Driver, home: Path) -> None:
    before = whole(home)
    running = driver.start(["optimize", "mine:slow", "-p", "prune", "-o", "engine", "--seconds", "30"], home)
    said = Path(f"{running.output}.err")
    while "started" not in (said.read_text() if said.exists() else ""):
        time.sleep(0.02)
    time.sleep(after)
    os.kill(running.pid, number)
    done = running.wait()
    stderr = done.stderr.replace("started\n", "")
    check(Done(done.code, done.stdout, stderr), code, error)
    assert whole(home) == before


def test_signal_that_a_library_drops_is_obeyed(driver: Driver, home: Path) -> None:
    before = whole(home)
    check(driver.run("optimize", "mine:deaf", "-o", "engine", cwd=home), 143, "terminated")
    assert whole(home) == before


# the artifact


@pytest.fixture(scope="module")
def made(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of two engines."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "mine.py").write_text(MODELS)
    passes = "prune(selector=random,keep=0.5,at=1)"
    args = f"optimize mine:small -p {passes} -b onnxruntime -b openvino -o engine --seconds 0.1 --json"
    done = driver.run(*args.split(), cwd=folder)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
    return folder / "engine"


@pytest.fixture
def artifact(made: Path, home: Path) -> Path:
    return Path(shutil.copytree(made, home / "engine"))


def edit(artifact: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def flip(artifact: Path) -> None:
    file = max(artifact.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(bytes(raw))


def leave(artifact: Path) -> None:
    def change(manifest: dict) -> None:  # type: ignore[type-arg]
        manifest["engines"][manifest["default"]]["entry"] = "../mine.py"

    edit(artifact, change)


def lose(artifact: Path) -> None:
    next(iter(sorted(artifact.rglob("*.onnx")))).unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "no-artifact"),
    "no manifest": (lambda artifact: (artifact / "manifest.json").unlink(), "no-artifact"),
    "manifest that is no JSON": (lambda artifact: (artifact / "manifest.json").write_text("{"), "manifest"),
    "another schema": (lambda artifact: edit(artifact, lambda m: m.update(schema_version=99)), "manifest-schema"),
    "missing engine": (lose, "artifact-file"),
    "flipped byte": (flip, "artifact-hash"),
    "path that leaves the directory": (leave, "artifact-path"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_artifact_is_one_line(name: str, driver: Driver, home: Path, artifact: Path) -> None:
    damage, error = DAMAGES[name]
    damage(artifact)
    check(driver.run("verify", "engine", cwd=home), 2, error)
    check(driver.run("bench", "engine", "--seconds", "0.1", cwd=home), 2, error)


def test_engine_that_is_not_there(driver: Driver, home: Path, artifact: Path) -> None:
    check(driver.run("bench", "engine", "--engine", "tensorrt-f16", cwd=home), 2, "engine-name")


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ("--provider vulkan", "provider"),
        ("--provider cpu --provider-option fast", "usage"),
        ("--provider-option fast=1", "usage"),
        ("--at-least 2", "usage"),
    ],
)
def test_provider_that_is_not_there(more: str, error: str, driver: Driver, home: Path, artifact: Path) -> None:
    check(driver.run("verify", "engine", *more.split(), cwd=home), 2, error)


def test_half_an_optimize_leaves_the_old_artifact(driver: Driver, home: Path, artifact: Path) -> None:
    before = {path: path.read_bytes() for path in artifact.rglob("*") if path.is_file()}
    done = driver.run("optimize", "mine:small", "-o", "engine", "--force", cwd=home, file_size=4096)
    assert done.code == 2
    assert {path: path.read_bytes() for path in artifact.rglob("*") if path.is_file()} == before


# the runtime

RUNTIME = """
import sys
sys.modules["torch"] = None
import numpy as np
import optpass
session = optpass.load(sys.argv[1])
good = np.zeros((2, 12, 16), np.float32)
assert session.run(x=good)["output"].shape == (2, 16)
for call in (
    lambda: session.run(x=good.astype(np.float64)),
    lambda: session.run(x=good[:, :11]),
    lambda: session.run(x=good[0]),
    lambda: session.run(y=good),
    lambda: session.run(),
    lambda: session.run(x=good, y=good),
    lambda: session.run(x=good.tolist()),
    lambda: optpass.load(sys.argv[1], engine="gone"),
    lambda: optpass.load(sys.argv[1] + "-gone"),
):
    try:
        call()
        print("nothing")
    except optpass.OptpassError as error:
        assert len(str(error).splitlines()) == 1 and error.refusal.remedy
        print(error.refusal.code)
"""


def test_bad_input_at_run_time(made: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUNTIME, str(made)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.split() == [
        "input-dtype",
        "input-shape",
        "input-rank",
        "input-missing",
        "input-missing",
        "input-unknown",
        "input-type",
        "engine-name",
        "no-artifact",
    ]


# without the driver, so that nothing is warmed up


def test_fresh_process_says_one_line_too(home: Path) -> None:
    command = [sys.executable, "-m", "optpass", *["optimize", "mine:branches", "-o", "engine", "--json"]]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "data-dependent"
    assert done.stderr.count("\n") == 1
    assert not (home / "engine").exists()


def test_there_are_forty() -> None:
    assert len(INPUTS) + len(DAMAGES) >= 40
