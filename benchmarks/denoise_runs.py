"""What the arms of denoise.py make, run after run, and how good it is: images, and rollouts of a world model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from optpass import similarity
from optpass.runtime.denoise import drawn
from optpass.zoo.fashion_dit import entry as dit
from optpass.zoo.fashion_dit import quality
from optpass.zoo.fashion_vit import data as clothes
from optpass.zoo.fashion_vit import entry as vit
from optpass.zoo.fashion_world import entry as world

Array = NDArray[Any]
FRAMES, SCENES = 16, 64
"""Of a rollout, behind the two that are given; and how many scenes there are to roll out."""

CLASSES = 10
SEED, APART = 10_000, 900_000
"""Seeds of the samples in the tables, and of those that thresholds are chosen on."""


class Course(ABC):
    """A model and the runs that every arm makes of it, one after the other."""

    name: ClassVar[str]
    slug: str
    entry: ClassVar[Any]
    columns: ClassVar[tuple[str, ...]]
    """Of the verdicts, in words."""
    trials: ClassVar[tuple[int, ...]] = (0,)
    """Runs that thresholds are chosen on."""

    def __init__(self, batch: int, guidance: float = 1.0, first: int = SEED) -> None:
        self.batch, self.guidance, self.first = batch, guidance, first
        self.options: dict[str, Any] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the noise."""
        return (self.batch, *self.example["sample"].shape[1:])

    @cached_property
    def example(self) -> dict[str, Array]:
        """Inputs of the model."""
        split = self.entry.test_split(self.batch)
        return {name: array for name, array in split.items() if name in self.inputs}

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.entry.factory()[2])

    @property
    def title(self) -> str:
        """The model and how it is guided."""
        return self.name if self.guidance == 1 else f"{self.name}, guidance {self.guidance:g}"

    @property
    def sampler(self) -> str:
        """What the model was trained for."""
        sampler: str = self.entry.SAMPLER
        return sampler

    def dynamic(self) -> list[str]:
        """With guidance both halves are one call of twice the size."""
        if self.guidance == 1:
            return []
        return [f"{name}:0=batch:1..{2 * self.batch}" for name in self.inputs]

    def whole(self, runs: int) -> int:
        """Of so many runs those that quality is taken on."""
        return runs

    def noise(self, run: int) -> Array:
        """Of a run."""
        return drawn(self.shape, self.first + run * self.batch)

    @abstractmethod
    def conditions(self, run: int, made: Sequence[Array]) -> dict[str, Array]:
        """Of a run, behind what the same arm has made so far."""

    @abstractmethod
    def others(self, steps: int) -> dict[str, str]:
        """Other samplers that take fewer steps, so that a poor grid of steps makes no policy look good."""

    @abstractmethod
    def verdict(self, made: Sequence[Array], dense: Sequence[Array]) -> dict[str, float]:
        """What samples are worth by themselves."""

    @abstractmethod
    def cells(self, row: Mapping[str, Any]) -> list[str]:
        """The verdict in words, one for each of ``columns``."""

    @abstractmethod
    def floor(self, dense: Sequence[Array]) -> dict[str, Any]:
        """A row of what takes no model: the scale that quality is read on."""

    def apart(self) -> list[tuple[Array, dict[str, Array]]]:
        """Noise and conditions of runs that are in no table."""
        other = type(self)(self.batch, self.guidance, APART)
        return [(other.noise(run), other.conditions(run, other.before(run))) for run in self.trials]

    def before(self, run: int) -> list[Array]:
        """What is taken for made before a run where nothing was."""
        return []


class Images(Course):
    """Samples of all classes in turn."""

    name = "fashion-dit"
    entry: ClassVar[Any] = dit
    columns = ("agreement", "Frechet")

    def __init__(self, batch: int, guidance: float = 1.0, first: int = SEED) -> None:
        super().__init__(batch, guidance, first)
        self.slug = "dit" if guidance == 1 else "dit_guided"
        if guidance != 1:
            none = np.full(batch, CLASSES, np.int64)
            self.options = {"guidance": guidance, "unconditional": {"label": none}}

    def conditions(self, run: int, made: Sequence[Array]) -> dict[str, Array]:
        return {"label": (run * self.batch + np.arange(self.batch)) % CLASSES}

    def others(self, steps: int) -> dict[str, str]:
        return {
            "trailing": "ddim(prediction=velocity,noise=cosine,spacing=trailing)",
            "dpm-solver++": "dpm-solver++(prediction=velocity,noise=cosine)",
        }

    def verdict(self, made: Sequence[Array], dense: Sequence[Array]) -> dict[str, float]:
        images = np.concatenate([shown(part) for part in made])
        features, guesses = _seen((images + 1) / 2)
        labels = np.arange(len(images)) % CLASSES
        distance = quality.frechet(features, self.real)
        return {"agreement": float((guesses == labels).mean()), "frechet": distance, "images": len(images)}

    @cached_property
    def real(self) -> Array:
        """Features of the shipped test images."""
        return _seen(clothes.pixels(clothes.shipped()[0]) / 2 + 0.5)[0]

    def cells(self, row: Mapping[str, Any]) -> list[str]:
        return [f"{100 * row['agreement']:.1f} %", f"{row['frechet']:.2f}"] if "agreement" in row else ["", ""]

    def floor(self, dense: Sequence[Array]) -> dict[str, Any]:
        images = np.concatenate([shown(part) for part in dense])
        if len(images) <= CLASSES:
            return {}
        return {"arm": "another image of the class", **near(images[CLASSES:], images[:-CLASSES])}


class Worlds(Course):
    """Rollouts, a run for each frame: past frames are those that the arm itself has made."""

    name = "fashion-world"
    slug = "world"
    entry: ClassVar[Any] = world
    columns = ("dB to the true frames", "of dense", "error, times dense", "detail")
    trials = (0, FRAMES // 2, FRAMES - 1)

    def whole(self, runs: int) -> int:
        """Whole rollouts, since what is made first is best."""
        return runs - runs % FRAMES if runs >= FRAMES else runs

    @cached_property
    def scenes(self) -> Any:
        """True frames and actions."""
        return world.rollouts(SCENES, FRAMES, seed=1_000_000 + self.first)

    def conditions(self, run: int, made: Sequence[Array]) -> dict[str, Array]:
        rows, frame = self._place(run)
        known = [self.scenes.frames[rows, 0], self.scenes.frames[rows, 1], *map(shown, made[run - frame : run])]
        past = np.stack(known[-2:], 1).reshape(self.batch, 4, *self.shape[2:])
        return {"past": past, "action": self.scenes.actions[rows, frame + 2]}

    def _place(self, run: int) -> tuple[Array, int]:
        rollout, frame = divmod(run, FRAMES)
        return (rollout * self.batch + np.arange(self.batch)) % SCENES, frame

    def others(self, steps: int) -> dict[str, str]:
        return {"even": f"euler(train_steps={steps})"}

    def before(self, run: int) -> list[Array]:
        return [self._truth(number) for number in range(run)]

    def _truth(self, run: int) -> Array:
        rows, frame = self._place(run)
        frames: Array = self.scenes.frames[rows, frame + 2]
        return frames

    def verdict(self, made: Sequence[Array], dense: Sequence[Array]) -> dict[str, float]:
        truth = np.concatenate([self._truth(run) for run in range(len(made))])
        found, base = (np.concatenate([shown(part) for part in side]) for side in (made, dense))
        ratio, base_ratio = (float(similarity.psnr(frames, truth).mean()) for frames in (found, base))
        error, base_error = (float(((frames - truth) ** 2).mean()) for frames in (found, base))
        detail = 100 * _detail(found) / _detail(truth)
        return {"truth_psnr": ratio, "rollout": 100 * ratio / base_ratio, "error": error / base_error, "detail": detail}

    def cells(self, row: Mapping[str, Any]) -> list[str]:
        if "truth_psnr" not in row:
            return ["", "", "", ""]
        cells = [f"{row['truth_psnr']:.2f}", f"{row['rollout']:.1f} %", f"{row['error']:.3f}"]
        return [*cells, f"{row['detail']:.1f} %"]

    def floor(self, dense: Sequence[Array]) -> dict[str, Any]:
        """The last frame that was given, over and over."""
        still = [self.scenes.frames[self._place(run)[0], 1] for run in range(len(dense))]
        alike = near(np.concatenate(still), np.concatenate([shown(frames) for frames in dense]))
        return {"arm": "the last given frame, kept", **alike, **self.verdict(still, dense)}


def shown(samples: Array) -> Array:
    """Samples as they are seen, and as the next frame is made of them."""
    return samples.clip(-1, 1)


def _detail(frames: Array) -> float:
    """Mean distance of neighbouring pixels."""
    return float(np.abs(np.diff(frames, axis=-1)).mean() + np.abs(np.diff(frames, axis=-2)).mean())


@cache
def _judge() -> Any:
    return vit.factory()[0]


def _seen(pixels: Array) -> tuple[Array, Array]:
    """Features and classes that fashion-vit sees in images in [0, 1]."""
    model = _judge()
    features: list[torch.Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    scaled = torch.from_numpy(((pixels - clothes.MEAN) / clothes.STD).astype(np.float32))
    with torch.inference_mode():
        guesses = torch.cat([model(part).argmax(-1) for part in torch.split(scaled, 250)])
    handle.remove()
    return torch.cat(features).double().numpy(), guesses.numpy()


def near(found: Array, expected: Array) -> dict[str, Any]:
    """Means over samples; the ratio to the error over those that are not equal, None where all are."""
    ratios = similarity.psnr(found, expected)
    finite = ratios[np.isfinite(ratios)]
    ssim = float(similarity.ssim(found, expected).mean())
    return {"ssim": round(ssim, 5), "psnr": round(float(finite.mean()), 3) if len(finite) else None}
