"""Every architecture of the table through every pass: probes hold to rounding, and ONNX Runtime computes the same.

What is refused is refused with the sentence pinned here, so that a refusal that stops being true fails as well.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optpass.capture import capture
from optpass.export import artifact
from optpass.grammar import parse
from optpass.manager import apply
from optpass.program import Program, Stage, op_name
from optpass.results import PassRecord
from optpass.runtime.denoise import Denoiser
from optpass.structure import Block, analyse
from tests.denoisers import session

sys.path.insert(0, str(Path(__file__).parent))
import architectures

ROUNDING = 1e-5
CAUSAL = "[token-order] merging breaks token order, and this attention is causal in {} ({}); use prune"


@pytest.fixture(scope="module", params=architectures.NAMES)
def captured(request: pytest.FixtureRequest) -> Program:
    return capture(architectures.FACTORIES[request.param]())


def middle(program: Program) -> tuple[int, Block, bool]:
    """Number of the middle block of the main tower, the block, and whether it is causal."""
    tower = analyse(program.main).main
    assert tower is not None
    number = (len(tower.blocks) - 1) // 2
    return number, tower.blocks[number], tower.space.causal


def check_engine(stage: Stage, folder: Path) -> None:
    with artifact.writer(folder / "engine") as new:
        new.add(stage, "onnxruntime", "f32")
        for entry in new.fidelity():
            assert entry.ok, entry
            assert entry.difference <= 1e-4, entry


def check_probes(record: PassRecord) -> None:
    assert record.status == "kept", record
    found = record.probes.model_dump(exclude={"incremental", "reuse"})  # that of passes with a state
    assert all(value is not None and value <= ROUNDING for value in found.values()), found


def test_prune_holds_in_a_middle_block(captured: Program, tmp_path: Path) -> None:
    number, block, _ = middle(captured)
    made = apply(captured, parse(f"prune(selector=norm,keep=0.5,at={number})"))
    record = made.records[0]
    check_probes(record)
    assert record.sites == [block.path]
    assert int(record.tokens[1]) < int(record.tokens[0])
    check_engine(made.program.main, tmp_path)


def test_merge_holds_in_a_middle_block_or_is_refused_for_order(captured: Program, tmp_path: Path) -> None:
    number, block, causal = middle(captured)
    made = apply(captured, parse(f"merge(r=4,at={number})"))
    record = made.records[0]
    if causal:
        assert record.status == "refused"
        assert record.reason == CAUSAL.format(block.path, op_name(block.attentions[0].node))
        return
    check_probes(record)
    assert record.tokens == [record.tokens[0], int(record.tokens[0]) - 4]
    check_engine(made.program.main, tmp_path)


CACHED = {
    "dit": ("worldcache,form=branch", "taylorseer,form=split"),
    "auraflow": ("taylorseer,form=split", "first-block,form=branch"),
    "cogvideox": ("first-block,form=branch", "worldcache,form=split"),
    "hunyuan_dit": ("first-block,form=split", "worldcache,form=branch"),
    "sana": ("worldcache,form=split", "taylorseer,form=branch"),
}
"""Policies that are held to probes, and the first of them on engines too."""

EXTRAPOLATED = 31 * 2e-6
"""Of the largest value: at the fifth step the parabola through steps 0, 1 and 2 is 6, -15 and 10 times what they are,
and so are their roundings."""


@pytest.mark.parametrize("captured", CACHED, indirect=True)
def test_cache_holds_in_denoisers(captured: Program, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    chosen = CACHED[request.node.callspec.params["captured"]]
    for options in chosen:
        made = apply(captured, parse(f"cache(policy={options})"))
        (record,) = made.records
        assert record.status == "kept", record
        assert record.probes.identity is not None
        assert record.probes.reuse is not None
        assert max(record.probes.identity, record.probes.reuse) <= ROUNDING, record
        assert len(record.sites) == 4 - ("first-block" in options)
        if options == chosen[0]:
            check_steps(made.program.deployed, captured.main, tmp_path)


def check_steps(stages: list[Stage], main: Stage, folder: Path) -> None:
    """Hold engines to eager execution over a run with steps of both kinds."""
    with artifact.writer(folder / "engine") as new:
        names = [[new.add(stage, backend, "f32") for stage in stages] for backend in ("onnxruntime", "openvino")]
        models = [session(stages), *(new.session(name, threads=1) for *_, name in names)]
    given = {spec.name: tensor.numpy() for spec, tensor in zip(main.inputs, main.example, strict=True)}
    eager = models[0]
    assert isinstance(eager, Denoiser)
    sample, start = given[eager.roles.sample], given[eager.roles.timestep]
    conditions = {name: given[name] for name in eager.roles.conditions}
    # what the first block adds changes more than its threshold between inputs so far apart, or less
    shown = "state_probe" in {info.name for info in eager.state}
    knobs: dict[str, Any] = {"threshold": 0.5, "streak": 3} if shown else {}
    runs = [model.begin(12, **knobs) for model in models if isinstance(model, Denoiser)]
    for step in range(12):
        # whole numbers are steps of some hundred, fractions shares of the noise
        time = start * (100 - step) if start.dtype.kind == "i" else (start * (100 - step) / 100).astype(start.dtype)
        expected, *found = (run.step(sample, time, **conditions) for run in runs)
        for each in found:
            np.testing.assert_allclose(each, expected, rtol=0, atol=EXTRAPOLATED * np.abs(expected).max())
        sample = sample - np.float32(0.05) * expected
    assert len(runs) == 3
    assert runs[0].taken == runs[1].taken == runs[2].taken
    assert 2 < len(runs[0].taken.computed) < 12
