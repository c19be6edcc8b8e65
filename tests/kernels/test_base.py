"""Where a kernel is used: by its reference in every graph, as one node in those that are made to keep it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optpass.capture import capture
from optpass.errors import OptpassError
from optpass.export import onnxruntime
from optpass.export.base import Source
from optpass.export.translate import translate
from optpass.grammar import parse
from optpass.kernels import base
from optpass.kernels.bipartite_merge import bipartite_match
from optpass.manager import apply, with_whole_kernels
from optpass.program import Stage, op_name
from optpass.runtime.engines.onnxruntime import open_engine

sys.path.insert(0, str(Path(__file__).parents[1]))
from small import program

SPREAD = {"many_to_many", "many_to_many_sizes", "many_to_many_back"}

SCHEDULES = {
    "merge(r=4,at=[1,2])": {"bipartite_match", "bipartite_merge", "bipartite_unmerge"},
    "transform(selector=divprune,keep=0.6,at=[1,2])": {"select_diverse", *SPREAD},
}


def ours(stage: Stage) -> set[str]:
    return {op_name(n).partition(".")[2] for n in stage.exported.graph.nodes if op_name(n).startswith("optpass.")}


@pytest.mark.parametrize("passes", SCHEDULES)
def test_a_graph_that_keeps_kernels_computes_the_same_as_one_that_does_not(passes: str, tmp_path: Path) -> None:
    model: Any = program(head="dense", mask="padding")
    plain = apply(model, parse(passes))
    with base.kept():
        whole = apply(model, parse(passes))
    assert whole.ok, whole.records
    assert [record.probes for record in whole.records] == [record.probes for record in plain.records]
    stage = whole.program.main
    assert (ours(plain.program.main), ours(stage)) == (set(), SCHEDULES[passes])
    (expected,) = plain.program.main.run(stage.example)
    assert torch.equal(stage.run(stage.example)[0], expected)
    # the ONNX face
    onnxruntime.save(translate(stage), tmp_path / "model.onnx")
    (found,) = open_engine(tmp_path / "model.onnx", "f32", 1).run([t.numpy() for t in stage.example])
    # some hundred roundings of outputs around 10
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)


def test_every_op_is_known_to_torch_by_its_name_and_its_meta_function_is_true() -> None:
    base.register()
    for name, kernel in base.kernels().items():
        assert kernel.op is getattr(torch.ops.optpass, name.partition("::")[2]).default
        torch.library.opcheck(kernel.op, EXAMPLES[kernel.name](), test_utils=("test_schema", "test_faketensor"))


def _pairs() -> tuple[torch.Tensor, ...]:
    return torch.tensor([[0, 1, 3]]), torch.tensor([[2, 4]]), torch.tensor([[1, 2]])


def _factors() -> tuple[Any, ...]:
    index = torch.tensor([[0, 1, 3, 6], [0, 2, 4, 5]])
    return torch.randn(2, 7, 4), index, torch.ones(1, 7, dtype=torch.bool), 1, 0, 2, 0.1


EXAMPLES: dict[str, Any] = {
    "bipartite_match": lambda: (torch.randn(2, 7, 4), torch.ones(1, 7, dtype=torch.bool), 3),
    "bipartite_merge": lambda: (torch.randn(1, 5, 2, 3), torch.rand(1, 5) + 1, *_pairs()),
    "tree_attention": lambda: (*torch.randn(3, 4, 3, 8), *torch.randn(2, 2, 2, 5, 8), torch.zeros(1, 2, 3, 8), 0.5),
    "bipartite_unmerge": lambda: (torch.randn(1, 3, 4).half(), *_pairs()),
    "select_diverse": lambda: (torch.randn(2, 7, 4).half(), torch.zeros(2, 7), 3, 0.5, True),
    "many_to_many": lambda: (torch.randn(2, 7, 2, 3).half(), torch.rand(2, 7) + 1, *_factors()),
    "many_to_many_sizes": lambda: (None, *_factors()),
    "many_to_many_back": lambda: (torch.randn(2, 4, 5), *_factors()),
}


def test_without_triton_everything_is_the_reference() -> None:
    text = """
        import sys
        sys.modules["triton"] = None
        import importlib.util
        whole = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "triton" else whole(name, *rest)
        import torch
        from optpass.kernels import base
from optpass.kernels.bipartite_merge import bipartite_match
        from optpass.kernels.bipartite_merge import bipartite_match
        base.register()
        x = torch.randn(2, 8, 4)
        plain = bipartite_match(x, None, 2)
        assert all(map(torch.equal, plain, torch.ops.optpass.bipartite_match(x, None, 2)))
        assert all(map(torch.equal, plain, bipartite_match.reference(x, None, 2)))
    """
    lines = "\n".join(line.removeprefix("        ") for line in text.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_graphs_forget_to_keep_kernels_when_the_block_ends() -> None:
    with contextlib.suppress(ZeroDivisionError), base.kept():
        assert base.is_kept()
        raise ZeroDivisionError
    assert not base.is_kept()


# Graphs for backends that keep kernels


def test_a_backend_that_keeps_kernels_gets_a_second_form_of_each_stage() -> None:
    model: Any = program(head="dense", mask="padding")
    passes = parse("merge(r=4,at=1),prune(at=2,selector=random,keep=0.5)")
    plain = apply(model, passes)
    found = with_whole_kernels(model, passes, plain)
    stage = found.program.main
    assert (found.records, found.maps) == (plain.records, plain.maps)
    assert stage.exported is plain.program.main.exported
    assert stage.whole is not None
    assert (ours(stage), ours(stage.whole)) == (set(), SCHEDULES["merge(r=4,at=[1,2])"])
    assert torch.equal(stage.whole.run(stage.example)[0], stage.results[0])
    assert Source(stage).whole is stage.whole
    assert stage.retraced(stage.module).whole is None
    stage.release()
    assert not stage.whole.exported.state_dict


def test_a_stage_without_kernels_has_one_form() -> None:
    model: Any = program(head="dense", mask="padding")
    passes = parse("prune(at=2,selector=random,keep=0.5)")
    stage = with_whole_kernels(model, passes, apply(model, passes)).program.main
    assert stage.whole is None
    assert Source(stage).whole is stage


def test_passes_that_were_left_out_stay_out() -> None:
    model: Any = program(head="dense", mask="padding")
    passes = parse("merge(r=100,at=1),prune(at=2,selector=divprune,keep=0.5)")
    plain = apply(model, passes, on_fail="skip")
    assert [record.done for record in plain.records] == [False, True]
    stage = with_whole_kernels(model, passes, plain).program.main
    assert stage.whole is not None
    assert ours(stage.whole) == {"select_diverse"}


def test_a_pass_that_holds_in_one_form_alone_is_a_bug_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = program(head="dense", mask="padding")
    passes = parse("merge(r=4,at=1)")
    plain = apply(model, passes)
    whole = base.ALL["optpass::bipartite_merge"]
    monkeypatch.setattr(type(whole), "op", property(lambda self: lambda *args: self.reference(*args) * 1.01))
    with pytest.raises(OptpassError, match=r"\[internal\] merge holds, and with its kernels whole it does not: "):
        with_whole_kernels(model, passes, plain)


class Branch(nn.Module):
    """A kernel in each of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.match = bipartite_match.op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.match(x, None, 2)[0], lambda x: self.match(-x, None, 2)[0], (x,))  # type: ignore[no-any-return]


def test_a_kernel_in_a_branch_alone_is_found() -> None:
    # eagerly cond is compiled, and sizes that another test had otherwise would be dynamic ones
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    stage = capture((Branch(), (), {"x": torch.randn(2, 8, 4)})).main
    assert ours(stage) == set()
    assert base.holds_any(stage)
