"""A small diffusion transformer that caches are laid over, and sessions that run its stages eagerly."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optpass.capture import capture
from optpass.grammar import parse
from optpass.manager import apply
from optpass.program import Program, Stage
from optpass.runtime.denoise import Denoiser
from optpass.runtime.engines.base import Array
from optpass.runtime.manifest import Bounds, Engine, Hardware, Manifest, TensorInfo

WIDTH, TOKENS, LABELS = 16, 16, 5
SAMPLER = "ddim(prediction=velocity,noise=cosine)"


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,)) * (1 + scale[:, None]) + shift[:, None]


class Condition(nn.Module):
    """Time ``[batch]``, 0 to 1000, and label to ``[batch, width]``."""

    rates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.labels, self.mix = nn.Embedding(LABELS, WIDTH), nn.Linear(8, WIDTH)
        self.register_buffer("rates", torch.tensor([0.002, 0.004, 0.008, 0.016]))

    def forward(self, timestep: Tensor, label: Tensor) -> Tensor:
        angles = timestep[:, None] * self.rates
        found: Tensor = self.mix(torch.cat([angles.cos(), angles.sin()], -1)) + self.labels(label)
        return found


class Block(nn.Module):
    """Attention and an MLP, modulated and gated; one that joins takes an earlier stream in, as a U-Net does."""

    def __init__(self, joins: bool, conditions: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.join = nn.Linear(2 * WIDTH, WIDTH) if joins else None
        self.condition = Condition() if conditions else None

    def forward(self, x: Tensor, condition: Tensor, skip: Tensor | None) -> Tensor:
        if self.join is not None and skip is not None:
            x = self.join(torch.cat([x, skip], -1))
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, -1)
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(modulated(x, shift, scale)).view(batch, tokens, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, WIDTH)
        x = x + gate[:, None] * self.out(mixed)
        found: Tensor = x + gate2[:, None] * self.narrow(F.gelu(self.wide(modulated(x, shift2, scale2))))
        return found


class Small(nn.Module):
    """Blocks over 16 patches of an image of two channels.

    Args:
        form: ``plain``; ``shared`` asks block 0 for the condition of the head, as DiT of diffusers does; ``long`` joins
            the stream of block 0 to that before the last one; ``variance`` predicts one beside the noise.
        depth: how many blocks.
    """

    def __init__(self, form: str = "plain", depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.embed = nn.Linear(8, WIDTH)
        self.positions = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.condition = None if form == "shared" else Condition()
        self.blocks = nn.ModuleList(Block(form == "long" and i == depth - 1, form == "shared") for i in range(depth))
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(WIDTH, 16 if form == "variance" else 8)

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        batch = sample.shape[0]
        x = sample.view(batch, 2, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, TOKENS, 8)
        x = self.embed(x) + self.positions
        own = None if self.condition is None else self.condition(timestep, label)
        first: Tensor | None = None
        for block in self.blocks:
            x = block(x, block.condition(timestep, label) if own is None else own, first)  # type: ignore[operator]
            first = x if first is None else first
        last = self.blocks[0].condition(timestep, label) if own is None else own  # type: ignore[operator]
        shift, scale = self.modulation(F.silu(last)).chunk(2, -1)
        x = self.head(modulated(x, shift, scale))
        found: Tensor = x.view(batch, 4, 4, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, 8, 8)
        return found


def example(batch: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(1)
    times = torch.tensor([100.0, 700.0, 400.0])[:batch]
    return {"sample": torch.randn(batch, 2, 8, 8), "timestep": times, "label": torch.tensor([1, 3, 2])[:batch]}


@functools.cache
def program(form: str = "plain", dynamic: bool = False) -> Program:
    """Three blocks captured with a batch of two, or of 1 to 6."""
    axes = [f"{name}:0=batch:1..6" for name in example()] if dynamic else []
    return capture((Small(form, depth=3).eval(), (), example()), dynamic=axes)


@functools.cache
def stages(options: str, form: str = "plain", dynamic: bool = False) -> list[Stage]:
    """What ``cache`` makes of it with these options, not probed; the stage that is run most at the end."""
    (record,) = (outcome := apply(program(form, dynamic), parse(f"cache({options})"), verify=False)).records
    assert record.status == "placed", record
    return outcome.program.deployed


class Eager:
    """A stage as an engine, which counts its calls."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.calls = stage, 0

    def run(self, arrays: Sequence[Array], wanted: Sequence[int] | None = None) -> list[Array]:
        self.calls += 1
        results = [tensor.numpy() for tensor in self.stage.run([torch.from_numpy(array) for array in arrays])]
        return [results[n] for n in (range(len(results)) if wanted is None else wanted)]


def entry(stage: Stage) -> Engine:
    """What a manifest says of the stage."""
    inputs, outputs = (
        [TensorInfo(name=spec.name, dtype=spec.dtype, shape=list(spec.shape)) for spec in specs]
        for specs in (stage.inputs, stage.outputs)
    )
    return Engine(
        stage=stage.name, backend="eager", precision="f32", entry="", files=[], inputs=inputs, outputs=outputs,
        dynamic={name: Bounds(minimum=r.minimum, maximum=r.maximum) for name, r in stage.ranges.items()},
        initial=dict(stage.initial), tolerance=0.0,
    )  # fmt: skip


def session(made: Sequence[Stage], sampler: str = SAMPLER) -> Denoiser:
    """A session that runs the stages eagerly: ``main``, ``steered``, or ``full`` and ``reuse``."""
    engines = {stage.name: entry(stage) for stage in made}
    manifest = Manifest(
        optpass="", created="", source="", libraries={}, files={}, default=made[-1].name, sampler=sampler,
        hardware=Hardware(cpu="", flags=[], cores=1, system=""), engines=engines,
    )  # fmt: skip
    full = Eager(made[0]) if len(made) > 1 else None
    return Denoiser(manifest, made[-1].name, Eager(made[-1]), 1, full, engines.get("full"))
