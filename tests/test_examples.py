"""The deployment examples, run as their README says."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import numpy as np
import pytest
import yaml

from optpass.zoo import registry

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
SCHEDULE = "merge(at=0,keep=0.5)"


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    dynamic = ("--dynamic", "pixel_values:0=1..32")
    call = ("optpass", "optimize", "fashion-vit", "-p", SCHEDULE, *dynamic, "--samples", "64", "--seconds", "0.1")
    done = run(*call, "-o", "engine", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "engine"


@pytest.fixture(scope="module")
def service(engine: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES / "service"), "app:app", "--port", str(port)]
    process = subprocess.Popen(command, env={**ENVIRONMENT, "OPTPASS_ENGINE": str(engine)}, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except urllib.error.URLError:
                assert process.poll() is None
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def post(address: str, body: bytes) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"{address}/predict", data=body, method="POST")
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_the_service_sees_what_is_in_the_images(service: str) -> None:
    data = registry.load("fashion-vit").test_split(20)
    code, answer = post(service, npy(data["pixel_values"]))
    assert code == 200
    right = np.mean(np.array(answer["classes"]) == data["labels"])
    assert right >= 0.75
    assert all(0 < p <= 1 for p in answer["probabilities"])


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"not an array", "no .npy file"),
        (npy(np.zeros((1, 1, 28, 28))), "input-dtype"),
        (npy(np.zeros((1, 1, 9, 9), np.float32)), "input-shape"),
        (npy(np.zeros((33, 1, 28, 28), np.float32)), "1 to 32"),
    ],
)
def test_the_service_says_what_is_wrong_with_a_request(service: str, body: bytes, sentence: str) -> None:
    code, answer = post(service, body)
    assert code == 422
    assert sentence in answer["detail"]


def test_the_service_says_what_it_serves(service: str) -> None:
    with urllib.request.urlopen(f"{service}/health") as answer:
        health = json.load(answer)
    assert health["source"] == "fashion-vit"
    assert health["passes"] == ["merge at blocks.0"]
    with urllib.request.urlopen(f"{service}/metrics") as answer:
        assert b'optpass_recorded_latency_ms{quantile="0.95"}' in answer.read()


def test_serving_needs_no_torch(engine: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES / 'service')!r}); import app, optpass\n"
    code += f"optpass.load({str(engine)!r}); assert 'torch' not in sys.modules, 'torch was imported'"
    done = run(sys.executable, "-c", code, cwd=EXAMPLES)
    assert done.returncode == 0, done.stderr


def test_the_batch_job_does_what_is_left_and_tells_of_what_it_cannot(engine: Path, tmp_path: Path) -> None:
    images = registry.load("fashion-vit").test_split(12)["pixel_values"]
    inputs, outputs = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    for number in range(3):
        np.savez(inputs / f"{number}.npz", pixel_values=images[4 * number : 4 * number + 4])
    job = (sys.executable, str(EXAMPLES / "batch.py"), str(engine), "in", "out")
    done = run(*job, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 files done, 0 were done before, 0 failed; 12 rows" in done.stdout
    (outputs / "1.npz").unlink()
    (inputs / "broken.npz").write_bytes(b"PK and no more")
    again = run(*job, cwd=tmp_path)
    assert again.returncode == 1
    assert "1 files done, 2 were done before, 1 failed" in again.stdout
    assert "broken.npz" in again.stderr
    assert sorted(file.name for file in outputs.iterdir()) == ["0.npz", "1.npz", "2.npz"]
    with np.load(outputs / "1.npz") as found:
        assert found["output"].shape == (4, 10)


def test_the_notebook_runs_to_its_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "pass quality.max_drop" in said
    assert re.search(r"speedup.at_least at over dense is", said)


def test_a_bad_option_turns_the_gate_red_and_bisect_names_pass_and_site(tmp_path: Path) -> None:
    """The whole story in a real repository: a green commit, a change of one option, a red gate, the site to blame."""
    project = tmp_path / "project"
    shutil.copytree(EXAMPLES / "ci", project)
    # What is timed may not decide a test; the budget's other limits are exact.
    budget = project / "budget.toml"
    budget.write_text(re.sub(r"\[speedup\][^\[]*", "", budget.read_text()))
    git = ("git", "-c", "user.name=optpass", "-c", "user.email=optpass@localhost")

    def commit(message: str) -> None:
        for call in (("add", "recipe.toml", "budget.toml", "check.sh"), ("commit", "-qm", message)):
            done = run(*git, *call, cwd=project)
            assert done.returncode == 0, done.stderr

    assert run(*git, "init", "-q", cwd=project).returncode == 0
    commit("a schedule within the budget")
    green = run("./check.sh", cwd=project)
    assert green.returncode == 0, green.stderr
    recipe = project / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("keep = [0.5, 0.9]", "keep = [0.02, 0.9]"))
    commit("faster")
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    red = run("./check.sh", "--blame", "--markdown", "summary.md", cwd=project, **cache)
    assert red.returncode == 1
    assert "error[budget-broken]: quality.max_drop" in red.stderr
    for said in (red.stderr, (project / "summary.md").read_text(), (project / "gate.xml").read_text()):
        assert "to blame: prune at blocks.2" in said
    call = ("optpass", "bisect", "engine", "--budget", "budget.toml", "--seconds", "0.2")
    blamed = run(*call, cwd=project, **cache)
    assert blamed.returncode == 1, blamed.stderr
    assert "prune at blocks.2 is" in blamed.stderr  # to blame, or likely: 500 samples leave a wide interval


def test_the_action_is_a_call_of_the_gate(engine: Path, tmp_path: Path) -> None:
    action = yaml.safe_load((ROOT / ".github/actions/gate/action.yml").read_text())
    (step,) = action["runs"]["steps"]
    environment = {
        name: re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda m: str(action["inputs"][m[1]].get("default", "")), value)
        for name, value in step["env"].items()
    }
    summary, output = tmp_path / "summary", tmp_path / "output"
    files = {"GITHUB_STEP_SUMMARY": str(summary), "GITHUB_OUTPUT": str(output), "ARTIFACT": str(engine)}
    for mib, code, verdict in ((50, 0, "pass"), (0.001, 1, "fail")):
        (tmp_path / "budget.toml").write_text(f"[size]\nmib = {mib}\n")
        done = run("bash", "-c", step["run"], cwd=tmp_path, **{**environment, **files})
        assert done.returncode == code, done.stderr
        assert output.read_text().splitlines()[-1] == f"verdict={verdict}"
    assert "::error file=budget.toml,title=size.mib::" in done.stdout
    assert summary.read_text().count("### optpass gate:") == 2
    assert (tmp_path / "optpass-gate.xml").is_file()


def test_every_example_is_in_the_table_and_every_file_in_it_is_there() -> None:
    table = (EXAMPLES / "README.md").read_text()
    named = {name for name in re.findall(r"^\|[^|]*\| `([^`]+)`", table, re.MULTILINE)}
    assert {name.split("/")[0] for name in named} == {path.name for path in EXAMPLES.iterdir()} - {"README.md"}
    assert all((EXAMPLES / name).exists() for name in named)
