"""The peer of denoise.py in a process and an environment of its own: cache-dit on the same module, eager or compiled.

Reads a line of JSON for each run and answers with a line: the sample, the seconds, and the steps that were computed.
The figures are drawn here too, since matplotlib is in this environment and not in that of the project.

    peers/bin/python benchmarks/denoise_cachedit.py serve
    peers/bin/python benchmarks/denoise_cachedit.py draw benchmarks/results/denoise.json benchmarks/results
"""

from __future__ import annotations

import base64
import copy
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from numpy.typing import NDArray

from optpass.runtime.schedules import asked

Array = NDArray[Any]
Predict = Callable[[int, Array, float, Mapping[str, Array]], Array]
"""What the model predicts, given the number of the step, a noisy sample, its timestep and the conditions."""

SETTINGS: dict[str, dict[str, Any]] = {
    "F1 R0.08": {"first": 1, "warmup": 8, "threshold": 0.08},
    "S": {"first": 4, "warmup": 4, "streak": 4, "threshold": 0.12},
    "M": {"first": 1, "warmup": 4, "streak": 6, "threshold": 0.24},
    "F": {"first": 1, "warmup": 8, "every": 2, "streak": 8, "threshold": 0.8},
    "U": {"first": 1, "warmup": 8, "every": 4, "streak": 10, "threshold": 0.8},
    "S+TS": {"first": 1, "warmup": 4, "streak": 4, "threshold": 0.2, "order": 1},
    "M+TS": {"first": 1, "warmup": 4, "streak": 6, "threshold": 0.24, "order": 1},
    "F+TS": {"first": 1, "warmup": 8, "every": 2, "streak": 8, "threshold": 0.8, "order": 1},
    "U+TS": {"first": 1, "warmup": 8, "every": 4, "streak": 10, "threshold": 0.8, "order": 1},
    "mask fast+TS": {"first": 1, "warmup": 8, "mask": "fast", "threshold": 0.3, "order": 1},
    "mask ultra+TS": {"first": 1, "warmup": 8, "mask": "ultra", "threshold": 0.34, "order": 1},
}
"""S, M, F and U are those of its benchmark for 50 steps, the masks and their thresholds those of its example. Its
default of 8 first blocks is every block of ours: ``F1 R0.08`` is the default with one."""

EAGER, COMPILED = "eager", "compiled"


def packed(array: Array) -> dict[str, Any]:
    """An array as JSON takes it."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": data}


def unpacked(value: Mapping[str, Any]) -> Array:
    """The inverse of ``packed``."""
    flat = np.frombuffer(base64.b64decode(value["data"]), value["dtype"])
    return flat.reshape(value["shape"]).copy()


def walk(
    predict: Predict,
    noise: Array,
    sampler: str,
    steps: int,
    conditions: Mapping[str, Array],
    guidance: float = 1.0,
    unconditional: Mapping[str, Array] | None = None,
) -> Array:
    """From noise to a sample with a model that is called from outside; with guidance both halves are one call."""
    way = asked(sampler).start(steps)
    sample: Array = way.initial(noise)
    other = {**conditions, **(unconditional or {})}
    both = {name: np.concatenate([array, other[name]]) for name, array in conditions.items()}
    for index, timestep in enumerate(way.timesteps):
        if guidance == 1:
            predicted = predict(index, sample, float(timestep), conditions)
        else:
            wanted, free = np.split(predict(index, np.concatenate([sample, sample]), float(timestep), both), 2)
            predicted = free + guidance * (wanted - free)
        sample = way.step(index, predicted, sample)
    return sample


class Peer:
    """One setting of cache-dit on a copy of the module, or the module as it is.

    As its documentation says for a transformer without a pipeline: a ``BlockAdapter`` with the pattern of the blocks,
    whose forward takes and returns the stream. The context is refreshed before each run; left to the number of steps
    that it was given, the first step of a run would count as the last one of the run before.
    """

    def __init__(self, module: Any, setting: Mapping[str, Any] | None, steps: int, compiled: bool = False) -> None:
        import torch

        self.module, self.setting, self.steps = copy.deepcopy(module), setting, steps
        if setting is not None:
            import cache_dit  # type: ignore[import-not-found]

            pattern = cache_dit.ForwardPattern.Pattern_3
            adapter = cache_dit.BlockAdapter(
                transformer=self.module, blocks=self.module.blocks, forward_pattern=pattern
            )
            cache_dit.enable_cache(adapter, **self.configured())
        self.run: Any = torch.compile(self.module) if compiled else self.module

    def configured(self) -> dict[str, Any]:
        """Its configuration, made anew."""
        import cache_dit

        setting = dict(self.setting or {})
        mask = cache_dit.steps_mask(mask_policy=setting["mask"], total_steps=self.steps) if "mask" in setting else None
        found = {
            "cache_config": cache_dit.DBCacheConfig(
                Fn_compute_blocks=setting["first"], Bn_compute_blocks=0, max_warmup_steps=setting["warmup"],
                warmup_interval=setting.get("every", 1), max_continuous_cached_steps=setting.get("streak", -1),
                residual_diff_threshold=setting["threshold"], num_inference_steps=self.steps,
                steps_computation_mask=mask,
            )
        }  # fmt: skip
        if "order" in setting:
            found["calibrator_config"] = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=setting["order"])
        return found

    def refresh(self) -> None:
        """Begin a run."""
        if self.setting is not None:
            import cache_dit

            cache_dit.refresh_context(self.module, **self.configured())

    def computed(self) -> list[int]:
        """The steps of the last run in which the blocks behind the first ones were computed."""
        if self.setting is None:
            return list(range(self.steps))
        import cache_dit

        skipped = set(cache_dit.summary(self.module, logging=False)[0].cached_steps)
        return [step for step in range(self.steps) if step not in skipped]

    def predict(self, index: int, sample: Array, timestep: float, conditions: Mapping[str, Array]) -> Array:
        """One step, of arrays whose memory torch takes as it is."""
        import torch

        times = torch.full((len(sample),), timestep)
        given = {name: torch.from_numpy(array) for name, array in conditions.items()}
        found: Array = self.run(sample=torch.from_numpy(sample), timestep=times, **given).numpy()
        return found


def module_of(name: str, weights: str) -> Any:
    """A model of the zoo with the weights that the engines were made of."""
    import torch

    if name == "fashion-dit":
        from optpass.zoo.fashion_dit.model import FashionDiT as Model
    else:
        from optpass.zoo.fashion_world.model import FashionWorld as Model  # type: ignore[assignment]
    module = Model()
    module.load_state_dict(torch.load(weights, weights_only=True))
    return module.eval()


def serve() -> None:
    """Answer requests until the input ends; the first one says of which model."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import cache_dit
    import torch

    logging.disable(logging.WARNING)
    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    module, steps = module_of(job["model"], job["weights"]), job["steps"]
    arms = {EAGER: Peer(module, None, steps)} | {name: Peer(module, s, steps) for name, s in SETTINGS.items()}
    if job["compile"]:
        cache_dit.set_compile_configs()
        arms[COMPILED] = Peer(module, None, steps, compiled=True)
        arms[f"{COMPILED}, M+TS"] = Peer(module, SETTINGS["M+TS"], steps, compiled=True)
    options = job["options"]
    if "unconditional" in options:
        options["unconditional"] = {name: unpacked(value) for name, value in options["unconditional"].items()}
    versions = {"torch": torch.__version__, "cache-dit": cache_dit.__version__}
    print(json.dumps({"ready": versions, "arms": list(arms)}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        peer = arms[job["arm"]]
        noise, conditions = unpacked(job["noise"]), {n: unpacked(value) for n, value in job["conditions"].items()}
        begin = time.perf_counter()
        with torch.inference_mode():
            peer.refresh()
            sample = walk(peer.predict, noise, job["sampler"], steps, conditions, **options)
        seconds = time.perf_counter() - begin
        answer = {"sample": packed(sample), "seconds": seconds, "computed": peer.computed()}
        print(json.dumps(answer), file=answers, flush=True)


CONTROL = "fewer steps"
COLOURS = {
    CONTROL: "#000000",
    "interval": "#009E73",
    "taylorseer": "#0072B2",
    "teacache": "#E69F00",
    "first-block": "#56B4E9",
    "worldcache": "#D55E00",
    "cache-dit's": "#CC79A7",
    "cache-dit": "#888888",
}
"""Of Okabe and Ito, which the colour-blind tell apart. A family is a colour, its members are lines and markers."""
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v")
PANELS = {
    "ssim": "1 - SSIM to all steps computed, better above",
    "psnr": "PSNR to all steps computed (dB)",
    "rollout": "dB to the true frames, % of all steps computed",
}
HIGHEST = {"psnr": 60.0, "ssim": 0.9999}
"""Above that samples look alike."""


def draw(source: str, folder: str) -> None:
    """Quality against speed, a figure for each model; of several backends the first."""
    import matplotlib  # type: ignore[import-not-found]

    matplotlib.use("Agg")
    data = json.loads(Path(source).read_text())
    for slug in dict.fromkeys(row["slug"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["slug"] == slug]
        _figure([row for row in rows if row["backend"] == rows[0]["backend"]], Path(folder) / f"denoise_{slug}.png")


def _figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt  # type: ignore[import-not-found]

    shown = [key for key in PANELS if any(row.get(key) is not None for row in rows)]
    shown = [key for key in shown if key != "psnr" or "rollout" not in shown]
    figure, axes = plt.subplots(1, len(shown), figsize=(6 * len(shown) + 2.5, 5), squeeze=False, layout="constrained")
    for key, axis in zip(shown, axes[0], strict=True):
        members: dict[str, int] = {}
        highest = HIGHEST.get(key, float("inf"))
        for group in dict.fromkeys(row["group"] for row in rows if row["group"]):
            family = next((name for name in COLOURS if group.startswith(name)), "")
            number = members[family] = members.get(family, -1) + 1
            known = [row for row in rows if row["group"] == group and row.get(key) is not None]
            points = sorted((row["speedup"]["value"], min(row[key], highest)) for row in known)
            heights = [1 - y if key == "ssim" else y for _, y in points]
            axis.plot(
                [x for x, _ in points], heights, LINES[number % len(LINES)],
                marker=MARKERS[number % len(MARKERS)], markersize=5, color=COLOURS.get(family, "#F0E442"),
                linewidth=2.2 if family == CONTROL else 1.3, zorder=3 if family == CONTROL else 2, label=group,
            )  # fmt: skip
        axis.set_xlabel(f"times as fast as all 50 steps on {rows[0]['backend']}")
        axis.set_ylabel(PANELS[key])
        if key == "ssim":
            axis.set_yscale("log")
            axis.invert_yaxis()
        axis.grid(color="#dddddd", linewidth=0.6)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(f"{rows[0]['model']}: the control in black")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        draw(*sys.argv[2:])
