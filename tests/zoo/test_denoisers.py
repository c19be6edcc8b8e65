"""The zoo's denoisers: their scenes and figures, their recipes, and what their weights know."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from optpass.runtime.schedules import alphas_cumprod
from optpass.zoo import diffusion
from optpass.zoo.fashion_dit import entry as dit
from optpass.zoo.fashion_dit import quality
from optpass.zoo.fashion_dit import train as dit_recipe
from optpass.zoo.fashion_vit import data
from optpass.zoo.fashion_world import entry as world
from optpass.zoo.fashion_world import scenes
from optpass.zoo.fashion_world import train as world_recipe

ITEM = np.ones((1, scenes.ITEM, scenes.ITEM), np.float32)


def small(split: str) -> data.Split:
    images, labels = data.shipped()
    return images[:32], labels[:32]


def test_noise_of_the_recipe_is_that_of_the_sampler() -> None:
    ours, known = diffusion.cosine(1000).numpy(), alphas_cumprod("cosine", 1000)
    # float32 of both: a product of a thousand factors, each rounded by 6e-8
    assert np.abs(ours - known).max() < 1e-4
    assert np.abs(ours[:900] / known[:900] - 1).max() < 1e-3


def test_near_item_goes_where_it_is_told_and_stops_at_the_border() -> None:
    drawn = scenes.draw(ITEM, 40, 12, seed=3)
    near = drawn.frames[:, :, 1] > 2 * 0.5 - 1  # nearness above one half
    for scene in range(40):
        for frame in range(1, 12):
            before, after = (np.argwhere(near[scene, at]).min(0) for at in (frame - 1, frame))
            moved = np.clip(before + scenes.ACTIONS[drawn.actions[scene, frame]], 0, scenes.SIZE - scenes.ITEM)
            assert after.tolist() == moved.tolist()


def test_near_item_hides_the_far_one() -> None:
    drawn = scenes.draw(ITEM, 200, 1, seed=5)
    depth = (drawn.frames[:, 0, 1] + 1) / 2
    near, far = depth > 0.5, (depth > 0.1) & (depth <= 0.5)
    assert (near.sum((1, 2)) == scenes.ITEM**2).all()
    assert (far.sum((1, 2)) <= scenes.ITEM**2).all()
    assert (far.sum((1, 2)) < scenes.ITEM**2).any()  # somewhere they overlap


def test_far_item_keeps_its_pace_and_bounces() -> None:
    drawn = scenes.draw(ITEM, 60, 30, seed=7)
    depth = (drawn.frames[:, :, 1] + 1) / 2
    turned = 0
    for scene in range(60):
        far = [np.argwhere((frame > 0.1) & (frame <= 0.5)) for frame in depth[scene]]
        whole = [at for at, place in enumerate(far) if len(place) == scenes.ITEM**2]
        steps = [far[b].min(0) - far[a].min(0) for a, b in pairwise(whole) if b == a + 1]
        assert all(np.abs(step).max() <= 2 for step in steps)
        turned += len({tuple(step) for step in steps if step.any()}) > 1
    assert turned > 20


def test_scenes_are_drawn_by_their_seed() -> None:
    a, b, c = (scenes.draw(ITEM, 4, 3, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(a.frames, b.frames)
    assert not np.array_equal(a.frames, c.frames)


def test_distance_of_features() -> None:
    rng = np.random.default_rng(0)
    one = rng.standard_normal((4000, 3))
    assert quality.frechet(one, one) == pytest.approx(0, abs=1e-9)
    # of normal distributions: squared distance of means, and of deviations
    other = 2 * rng.standard_normal((4000, 3)) + [1, 0, 0]
    assert quality.frechet(one, other) == pytest.approx(1 + 3, rel=0.1)


def test_classifier_agrees_with_the_labels_of_real_images() -> None:
    images, labels = data.shipped()
    judged = quality.judged(data.pixels(images[:300]), labels[:300])
    assert judged.agreement > 0.76  # a model of 89 %: four standard errors below, and more
    noise = quality.judged(np.random.default_rng(0).standard_normal((300, 1, 28, 28)), labels[:300])
    assert noise.agreement < 0.3
    assert noise.distance > 5 * judged.distance


@torch.no_grad()
def test_fashion_dit_knows_its_noise() -> None:
    model, _, kwargs = dit.factory()
    assert {name: tuple(x.shape) for name, x in kwargs.items()} == {
        "sample": (2, 1, 28, 28),
        "timestep": (2,),
        "label": (2,),
    }
    split = dit.test_split(200)
    given = [torch.from_numpy(split[name]) for name in ("sample", "timestep", "label")]
    images = torch.from_numpy(data.pixels(data.shipped()[0][:200]))
    level = torch.from_numpy(alphas_cumprod("cosine")[split["timestep"].astype(int)]).float().view(-1, 1, 1, 1)
    noise = (given[0] - level.sqrt() * images) / (1 - level).sqrt()
    velocity = level.sqrt() * noise - (1 - level).sqrt() * images
    error = float((model(*given) - velocity).pow(2).mean())
    # what no model reaches that predicts nothing, and what mixed up labels cost
    assert error < 0.3 * float(velocity.pow(2).mean())


@torch.no_grad()
def test_fashion_world_knows_the_next_frame() -> None:
    model, _, _ = world.factory()
    split = world.test_split(100)
    frame, sample = torch.from_numpy(split["frame"]), torch.from_numpy(split["sample"])
    share = torch.from_numpy(split["timestep"]).view(-1, 1, 1, 1)
    given = [torch.from_numpy(split[name]) for name in ("timestep", "past", "action")]
    found = sample - share * model(sample, *given)
    still = torch.from_numpy(split["past"][:, 2:])
    # a frame that only stays as it was is the least to beat
    assert float((found - frame).pow(2).mean()) < 0.3 * float((still - frame).pow(2).mean())
    wrong = (given[2] + 4) % len(scenes.ACTIONS)
    misled = sample - share * model(sample, given[0], given[1], wrong)
    assert float((misled - frame).pow(2).mean()) > 1.5 * float((found - frame).pow(2).mean())


def test_recipe_of_fashion_dit_goes_on_where_it_was_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "whole", small)
    for name, value in (("BATCHES", 3), ("SCHEDULED", 4), ("BATCH", 4), ("JUDGED", 10)):
        monkeypatch.setattr(dit_recipe, name, value)
    monkeypatch.setattr(diffusion, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(dit_recipe, "_samples", lambda model, labels: torch.zeros(len(labels), 1, 28, 28))

    def stop(done: int, total: int, line: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dit_recipe.train(tmp_path, stop)
    steps: list[int] = []
    found = dit_recipe.train(tmp_path, lambda done, total, line: steps.append(done))
    assert steps == [3]
    whole = tmp_path / "whole"
    dit_recipe.train(whole, lambda *step: None)
    written = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path, whole)]
    assert written[0] == written[1]
    assert json.loads((tmp_path / "training.json").read_text())[-1]["test_agreement"] == found
    assert not (tmp_path / "checkpoint.pt").exists()


def test_recipe_of_fashion_world_writes_weights_that_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "whole", small)
    for name, value in (("BATCHES", 2), ("BATCH", 4), ("ROLLOUTS", 2), ("FRAMES", 2), ("STEPS", 2)):
        monkeypatch.setattr(world_recipe, name, value)
    found = world_recipe.train(tmp_path, lambda *step: None)
    assert json.loads((tmp_path / "training.json").read_text())[-1]["test_psnr"] == found
    monkeypatch.setattr(world, "WEIGHTS", tmp_path / "model.safetensors")
    world.factory()
