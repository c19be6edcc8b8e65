"""The manager: order, composition, rollback, and what a third party adds."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from optpass.errors import OptpassError, Refusal
from optpass.grammar import make, parse
from optpass.manager import apply, ordered
from optpass.passes.base import Pass, Reduction, ReductionOptions, Site, registry
from optpass.probes import difference
from optpass.rewrite import Builder
from optpass.structure import Structure
from optpass.tokens import Gather, TokenMap

sys.path.insert(0, str(Path(__file__).parent))
from small import program


class Named(Pass):
    identity: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, name: str, before: tuple[str, ...] = (), after: tuple[str, ...] = (), conflicts: tuple[str, ...] = ()
    ):
        self.name, self.before, self.after, self.conflicts = name, before, after, conflicts  # type: ignore[misc]


def test_declared_order_wins_over_the_order_asked_for() -> None:
    a, b, c = Named("a", after=("c",)), Named("b"), Named("c", before=("b",))
    assert [made.name for made in ordered([a, b, c])] == ["c", "a", "b"]
    assert [made.name for made in ordered([b, a])] == ["b", "a"]


def test_conflicts_and_circles_are_refused() -> None:
    with pytest.raises(OptpassError, match="a cannot be combined with b"):
        ordered([Named("a", conflicts=("b",)), Named("b")])
    with pytest.raises(OptpassError, match="circle"):
        ordered([Named("a", before=("b",)), Named("b", before=("a",))])


HALVED, MERGED = "prune(at=2,keep=0.5,selector=norm)", "merge(at=all,r=2)"


@pytest.mark.parametrize("text", [f"{HALVED},{MERGED}", f"{MERGED},{HALVED}"])
def test_two_reductions_follow_each_other_along_the_stream(text: str) -> None:
    made = apply(program(mask="padding", rotary=True, head="mean"), parse(text))
    assert made.ok, made.records
    first = text.startswith("prune")
    assert made.records[-1].tokens == [18, 16, 14, *([7, 5, 3] if first else [12, 6, 4])]
    assert made.records[-1].probes.equivalence is not None
    stage = made.program.main
    assert stage.run(stage.example)[0].shape == (2, 5)


def test_a_kept_pass_changes_the_outputs_and_a_refused_one_does_not() -> None:
    before = program()
    reference = before.main.run(before.main.example)
    kept = apply(before, parse("prune(at=0,keep=0.3,selector=random)")).program.main
    assert difference(kept.run(kept.example), reference) > 1e-3
    refused = apply(program(causal=True), parse("merge(at=1,r=2)"))
    assert refused.records[0].status == "refused"
    assert "causal" in refused.records[0].reason
    assert refused.program.main.run(before.main.example)[0].shape == (2, 5)


def test_a_failed_pass_stops_or_is_skipped() -> None:
    text = "prune(at=9,keep=0.5),merge(at=1,r=2)"
    stopped = apply(program(), parse(text), on_fail="stop")
    assert [r.status for r in stopped.records] == ["refused"]
    skipped = apply(program(), parse(text), on_fail="skip")
    assert [r.status for r in skipped.records] == ["refused", "kept"]
    assert not skipped.ok


class Broken(Reduction):
    """Keeps all tokens at its identity setting, but moves the protected one."""

    name = "broken"
    options_type = ReductionOptions
    identity: ClassVar[dict[str, Any]] = {"keep": 1.0}

    def build(self, site: Site, b: Builder) -> TokenMap:
        index = b.arange(b.count).flip(0).unsqueeze(0).expand(b.batch, b.count)
        return Gather(b.count, b.count, index)


def test_a_pass_that_lies_of_its_map_is_rolled_back() -> None:
    made = apply(program(), [Broken(ReductionOptions(at=1))])
    assert made.records[0].status == "rolled_back"
    assert "identity probe" in made.records[0].reason
    before = program().main
    assert difference(made.program.main.run(before.example), before.run(before.example)) == 0


class Crashing(Broken):
    name = "crashing"

    def build(self, site: Site, b: Builder) -> TokenMap:
        return Gather(b.count, 3, torch.zeros(1, 99, dtype=torch.long))


def test_a_pass_that_crashes_is_rolled_back_and_named() -> None:
    record = apply(program(), [Crashing(ReductionOptions(at=1))]).records[0]
    assert record.status == "rolled_back"
    assert "[internal] crashing" in record.reason


@pytest.mark.parametrize(
    ("at", "paths"),
    [
        (1, ["1"]),
        (-1, ["3"]),
        ([0, 2], ["0", "2"]),
        ("1:", ["1", "2", "3"]),
        ("::2", ["0", "2"]),
        ("all", ["0", "1", "2", "3"]),
        ("layers.2", ["2"]),
        ("layers.[13]", ["1", "3"]),
    ],
)
def test_sites_are_named_by_number_range_path_or_glob(at: object, paths: list[str]) -> None:
    from optpass.structure import analyse

    found = make("prune", {"at": at, "keep": 0.9}).sites(analyse(program().main))
    assert not isinstance(found, Refusal)
    assert [site.block.path for site in found] == [f"layers.{path}" for path in paths]


@pytest.mark.parametrize("at", [4, -5, "5:9", "blocks.*", "layers.7"])
def test_a_site_that_matches_nothing_is_refused(at: object) -> None:
    record = apply(program(), [make("prune", {"at": at, "keep": 0.9})]).records[0]
    assert record.status == "refused"
    assert "[no-site]" in record.reason


def test_a_schedule_needs_one_number_a_site() -> None:
    record = apply(program(), parse("prune(at=[1,2],keep=[0.5,0.5,0.5],selector=norm)")).records[0]
    assert "[schedule-length]" in record.reason


def test_a_plug_in_package_adds_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(__file__).parent / "plugin"
    monkeypatch.syspath_prepend(str(package))
    importlib.invalidate_caches()
    assert "keep-every-second" in registry()
    made = apply(program(head="mean"), parse("keep-every-second(at=1)"))
    assert made.ok, made.records
    assert made.records[0].tokens == [18, 9]


def test_a_plug_in_that_is_no_pass_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "wrong-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wrong\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[optpass.passes]\nwrong = math:pi\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(OptpassError, match="plug-in wrong is no pass"):
        registry()


def test_analysis_finds_the_blocks_of_the_small_model(structure: Structure) -> None:
    assert structure.main is not None
    assert [block.path for block in structure.main.blocks] == [f"layers.{i}" for i in range(4)]


@pytest.fixture
def structure() -> Structure:
    from optpass.structure import analyse

    return analyse(program().main)
