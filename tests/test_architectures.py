"""Every architecture of the table through every pass: probes hold to rounding, and ONNX Runtime computes the same.

What is refused is refused with the sentence pinned here, so that a refusal that stops being true fails as well.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from optpass.capture import capture
from optpass.export import artifact
from optpass.grammar import parse
from optpass.manager import apply
from optpass.program import Program, Stage, op_name
from optpass.results import PassRecord
from optpass.structure import Block, analyse

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
