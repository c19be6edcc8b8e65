"""The zoo: what comes with the package, and its training recipe."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from optpass.cli.main import run
from optpass.errors import OptpassError
from optpass.zoo import registry
from optpass.zoo.fashion_vit import data, entry, train


def test_models_are_found_by_scanning() -> None:
    folders = {path.parent.name.replace("_", "-") for path in Path(registry.__file__).parent.glob("*/entry.py")}
    assert set(registry.names()) == folders
    assert "fashion-vit" in folders


def test_list_needs_no_torch() -> None:
    text = (
        "import sys; sys.modules['torch'] = None\n"
        "from optpass.zoo import registry; print(registry.describe('fashion-vit')['metric'])"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("top1\n", "")


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(OptpassError, match="did you mean fashion-vit"):
        registry.load("fashion-vitt")


def test_shipped_images_are_real_and_normalised() -> None:
    images, labels = data.shipped()
    assert images.shape == (2000, 1, 28, 28)
    assert images.dtype == np.float32
    assert set(labels.tolist()) == set(range(10))
    assert abs(float(images.mean())) < 0.05  # the statistics are those of the training split


def test_model_knows_the_shipped_images() -> None:
    model, _, kwargs = entry.factory()
    split = entry.test_split(200)
    with torch.no_grad():
        guesses = model(torch.from_numpy(split["pixel_values"])).argmax(-1).numpy()
    assert kwargs["pixel_values"].shape == (8, 1, 28, 28)
    # 200 images of a model of 86 % and more: four standard errors below
    assert float((guesses == split["labels"]).mean()) > 0.76


@pytest.mark.parametrize("name", registry.names())
def test_all_of_the_test_split_is_there_without_a_count(name: str) -> None:
    found = registry.load(name).test_split(None)
    sizes = {len(array) for array in found.values()}
    assert len(sizes) == 1
    assert min(sizes) > 200


def test_count_of_images_is_checked() -> None:
    assert entry.test_split(3)["labels"].shape == (3,)
    with pytest.raises(OptpassError, match="ask for 1 to 2000"):
        entry.test_split(0)


def test_directory_without_the_data_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPTPASS_DATA", str(tmp_path))
    with pytest.raises(OptpassError, match="lacks the Fashion-MNIST files"):
        data.directory()


def small(split: str) -> data.Split:
    images, labels = data.shipped()
    count = {"train": 16, "t10k": 20}[split]
    return images[:count], labels[:count]


def test_recipe_writes_weights_that_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "whole", small)
    monkeypatch.setattr(train, "CYCLES", 1)
    monkeypatch.setattr(train, "EPOCHS", 2)
    steps: list[tuple[int, int, str]] = []
    monkeypatch.setattr(train, "BATCH", 4)
    top1 = train.train(tmp_path, lambda *step: steps.append(step))
    assert 0 <= top1 <= 1
    assert [done for done, _, _ in steps] == list(range(1, 9))
    assert json.loads((tmp_path / "training.json").read_text())[-1]["test_top1"] == top1
    monkeypatch.setattr(entry, "WEIGHTS", tmp_path / "model.safetensors")
    entry.factory()


def test_training_from_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Path] = []

    def trainer(output: Path, progress: Callable[[int, int, str], None]) -> float:
        progress(1, 2, "loss 0.5")
        seen.append(output)
        return 0.9

    monkeypatch.setattr(train, "train", trainer)
    stdout = io.StringIO()
    assert run(["zoo", "train", "fashion-vit", "--output", str(tmp_path), "--json"], stdout) == 0
    assert json.loads(stdout.getvalue())["quality"] == 0.9
    assert seen == [tmp_path]
    assert run(["zoo", "train", "no-such", "--output", str(tmp_path)], stdout) == 2
