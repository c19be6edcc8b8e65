"""A language model from the command line to a text without torch, and what the other commands say of its artifact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.driver import Driver
from tests.cli.test_bad_inputs import MODELS

DYNAMIC = "--dynamic input_ids:0=batch:1..4 --dynamic input_ids:1=tokens:2..64"
CONTINUE = """
import sys
import numpy as np
import optpass
model = optpass.load("lm", engine=sys.argv[1])
ids = np.array([[5, 9, 11, 9, 5, 9]])
plain = model.generate(ids, max_new_tokens=20)
assert (model.generate(ids, max_new_tokens=20, drafter="goose", nodes=8) == plain).all()
dense = optpass.load("lm", engine="dense/" + sys.argv[1].removeprefix("step/"))
for count in range(6, 26):
    assert dense.run(input_ids=plain[:, :count])["logits"][0, -1].argmax() == plain[0, count]
assert np.isclose(model.score(plain)[0, -1], np.log(1 / 64), atol=3)
print("torch" in sys.modules, plain.shape, plain.dtype)
"""


@pytest.fixture(scope="module")
def home(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    (folder / "mine.py").write_text(MODELS)
    for passes, out in (("cache,speculate", "lm"), ("cache,prune(at=1,keep=0.5,selector=random)", "pruned")):
        args = f"optimize mine:causal {DYNAMIC} -p {passes} -b onnxruntime -b openvino -o {out} --seconds 0.2"
        done = driver.run(*args.split(), cwd=folder)
        assert done.code == 0, done.stderr
    return folder


def said(driver: Driver, home: Path, text: str) -> dict[str, Any]:
    done = driver.run(*text.split(), "--json", cwd=home)
    assert done.code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("engine", ["step/onnxruntime-f32", "step/openvino-f32"])
def test_texts_are_continued_without_torch_as_the_dense_engine_would(home: Path, engine: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE, engine], cwd=home, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["False", "(1,", "26)", "int64"], done.stderr


def test_default_engine_is_one_that_continues_a_text(home: Path) -> None:
    for name in ("lm", "pruned"):
        manifest = json.loads((home / name / "manifest.json").read_text())
        assert manifest["default"].startswith("step/")
    assert {engine["stage"] for engine in manifest["engines"].values()} == {"prefill", "step", "main"}


@pytest.mark.parametrize("name", ["lm", "pruned"])
def test_other_commands_know_what_to_do_with_it(driver: Driver, home: Path, name: str) -> None:
    assert said(driver, home, f"verify {name}")["ok"]
    timed = said(driver, home, f"bench {name} --seconds 0.3")["latency"]
    assert {one["engine"] for one in timed} == {"step/onnxruntime-f32", "step/openvino-f32"}
    (home / "budget.toml").write_text(
        'seconds = 2\n[speedup]\nat_least = 0.01\n[quality]\nmetric = "top1-agreement"\nmax_drop = 100\n'
    )
    # whether the time sufficed to decide is the machine's business
    found = said(driver, home, f"gate {name} --budget budget.toml --inconclusive pass")["checks"]
    assert [one["verdict"] for one in found if one["limit"] != 0.01] == ["pass"]
    assert [one["verdict"] in ("pass", "inconclusive") for one in found] == [True, True]
    assert said(driver, home, f"diff {name} {name}")["same"]
    page = said(driver, home, f"report {name} --force")["report"]
    text = (home / page).read_text()
    assert "Incremental" in text
    assert ("Drafts that were right" in text) is (name == "lm")


def test_manifest_counts_the_steps_of_each_drafter(home: Path) -> None:
    manifest = json.loads((home / "lm" / "manifest.json").read_text())
    assert [row["drafter"] for row in manifest["accepted"]] == ["lookup", "suffix", "recycling", "goose"]
    for row in manifest["accepted"]:
        # the first token of each of two texts of 48 is that of the prompt, and the last is verified alone
        assert sum(tokens * steps for tokens, steps in enumerate(row["steps"], 1)) == 2 * 47
    assert not json.loads((home / "pruned" / "manifest.json").read_text())["accepted"]


def test_dry_run_places_the_passes(driver: Driver, home: Path) -> None:
    found = said(driver, home, f"optimize mine:causal {DYNAMIC} -p cache,speculate --dry-run")
    assert [(one["name"], one["status"]) for one in found["passes"]] == [("cache", "placed"), ("speculate", "placed")]


def test_model_of_fixed_length_is_told_what_to_declare(driver: Driver, home: Path) -> None:
    done = driver.run(*["optimize", "mine:causal", "-p", "cache", "-o", "no"], cwd=home)
    assert (done.code, done.error) == (1, "not-dynamic")
    assert "--dynamic input_ids:1=tokens:2..2048" in done.stderr
    assert not (home / "no").exists()
