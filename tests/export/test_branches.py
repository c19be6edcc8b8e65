"""A ``torch.cond`` is an ``If``: equal to eager whichever branch runs, one of them alone, with each weight once."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.functional import cosine_similarity

from optpass.errors import OptpassError
from optpass.export import graph as viewers
from optpass.export import onnxruntime
from optpass.export.base import Source, backend
from optpass.export.fidelity import chooses, work
from optpass.export.inductor import Inductor
from optpass.export.standard import halved, standard
from optpass.export.tensorrt import TensorRT
from optpass.export.translate import MODULE, translate
from optpass.kernels.select_diverse import select_diverse
from optpass.program import Range, Stage, TensorSpec, output_specs, trace
from optpass.runtime.engines import inductor as compiled
from optpass.runtime.engines import onnxruntime as ort
from optpass.runtime.engines import openvino, tensorrt
from tests.export.models import WIDTH, Block

ROUNDING = 1e-5
"""Of values around 1 through a few layers of width 32: some hundred roundings of 6e-8 in the worst order."""

TOKENS = 9

Pair = tuple[Tensor, Tensor]


def made(module: nn.Module, dynamic: bool = False, predicate: Tensor | None = None) -> Stage:
    """A stage of ``x`` and ``state``, both ``[batch, tokens, width]``, and the predicate ``fresh``."""
    torch.manual_seed(0)
    example = (
        torch.randn(2, TOKENS, WIDTH),
        torch.randn(2, TOKENS, WIDTH),
        torch.tensor(True) if predicate is None else predicate,
    )
    shape = ("batch", "tokens", WIDTH) if dynamic else (2, TOKENS, WIDTH)
    ranges = {"batch": Range(1, 4), "tokens": Range(4, 12)} if dynamic else {}
    names = ("x", "state", "fresh")
    inputs = tuple(
        TensorSpec(name, str(tensor.dtype).removeprefix("torch."), given)
        for name, tensor, given in zip(names, example, (shape, shape, tuple(example[2].shape)), strict=True)
    )
    exported = trace(module.eval(), example, inputs, ranges)
    count = len(exported.graph_signature.user_outputs)
    outputs = output_specs(exported, [f"out_{number}" for number in range(count)], inputs)
    return Stage("main", exported, inputs, outputs, example, ranges)


def calls(stage: Stage) -> Iterator[tuple[Tensor, ...]]:
    """Inputs at each size, for both branches."""
    for sizes in stage.trials():
        x, state, fresh = stage.resized(sizes)
        for value in (True, False):
            yield x, state, torch.full_like(fresh, value)


def difference(stage: Stage, engine: Any) -> float:
    worst = 0.0
    for inputs in calls(stage):
        for found, expected in zip(engine.run([t.numpy() for t in inputs]), stage.run(inputs), strict=True):
            assert found.shape == tuple(expected.shape)
            worst = max(worst, float(np.abs(found - expected.numpy()).max()))
    return worst


def worst(stage: Stage, folder: Path) -> float:
    """The larger difference of ONNX Runtime and of OpenVINO."""
    found = []
    for name, opened in (("onnxruntime", ort), ("openvino", openvino)):
        file = backend(name, "f32").lower(Source(stage), folder, "f32")
        found.append(difference(stage, opened.open_engine(folder / file, "f32", 1)))
    return max(found)


def nodes(model: ir.Model) -> list[ir.Node]:
    return list(ir.traversal.RecursiveGraphIterator(model.graph))


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in nodes(model))


def sides(model: ir.Model) -> tuple[ir.Graph, ir.Graph]:
    (node,) = [node for node in model.graph if node.op_type == "If"]
    return node.attributes["then_branch"].as_graph(), node.attributes["else_branch"].as_graph()


def stored(model: ir.Model) -> int:
    """Bytes of weights, wherever they are."""
    held = [value.const_value for value in model.graph.initializers.values()]
    held += [value.const_value for inner in model.graph.subgraphs() for value in inner.initializers.values()]
    held += [node.attributes["value"].as_tensor() for node in nodes(model) if "value" in node.attributes]
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def parameters(stage: Stage) -> int:
    return sum(tensor.nbytes for tensor in stage.exported.state_dict.values())


class Cached(nn.Module):
    """A block whose change is kept, to be used again where ``fresh`` is false."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.block, self.head = nn.Linear(WIDTH, WIDTH), Block(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, state: Tensor, fresh: Tensor) -> tuple[Tensor, ...]:
        def compute(x: Tensor, state: Tensor) -> tuple[Tensor, ...]:
            y = self.block(x)
            return y, y - x, x.clone()

        def reuse(x: Tensor, state: Tensor) -> tuple[Tensor, ...]:
            return x + state, state.clone(), x.clone()

        y, kept, same = torch.cond(fresh, compute, reuse, (self.before(x), state))
        return self.head(y), kept, same


class Choice(nn.Module):
    """Two branches as they are given, of ``[self, x, state]``."""

    def __init__(self, compute: Callable[..., Pair], reuse: Callable[..., Pair] | None = None) -> None:
        super().__init__()
        self.block, self.other, self.last = Block(), Block(), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Buffer(torch.rand(WIDTH))
        self.turns = nn.Buffer(torch.polar(torch.ones(2, WIDTH // 2), torch.rand(2, WIDTH // 2)))
        self.compute, self.reuse = compute, reuse or (lambda self, x, state: (x + state, state.clone()))

    def forward(self, x: Tensor, state: Tensor, fresh: Tensor) -> Pair:
        def then(x: Tensor, state: Tensor) -> Pair:
            return self.compute(self, x, state)

        def otherwise(x: Tensor, state: Tensor) -> Pair:
            return self.reuse(self, x, state)

        found: Pair = torch.cond(fresh, then, otherwise, (x, state))
        return found


@pytest.mark.parametrize("dynamic", [False, True])
def test_both_branches_compute_what_eager_execution_does(dynamic: bool, tmp_path: Path) -> None:
    stage = made(Cached(), dynamic)
    assert worst(stage, tmp_path) < ROUNDING
    model = translate(stage)
    found = ops(model)
    assert (found["If"], found["MultiHeadAttention"], found["Split"], found["Transpose"]) == (1, 1, 1, 0)
    then, otherwise = sides(model)
    assert Counter(node.op_type for node in otherwise) == {"Add": 1, "Identity": 2}
    assert [len(side.inputs) for side in (then, otherwise)] == [0, 0]
    # what is joined has its parts' sizes, and nothing else is added
    assert stored(model) - parameters(stage) == 3 * 8
    assert all(not inner.initializers for inner in model.graph.subgraphs())


def test_the_branch_that_is_not_chosen_does_not_run(tmp_path: Path) -> None:
    stage = made(Cached())
    onnxruntime.save(translate(stage), tmp_path / "model.onnx")
    ran = {}
    for inputs in calls(stage):
        timed = ort.profile(tmp_path / "model.onnx", "f32", 1, [t.numpy() for t in inputs], 1, 1)
        ran[bool(inputs[2])] = Counter(found.op for found in timed)
    assert ran[True]["MultiHeadAttention"] == 1
    assert not {"MultiHeadAttention", "LayerNormalization"} & set(ran[False])
    # those before and behind the branches
    assert ran[False]["MatMul"] + ran[False]["Gemm"] == 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_weights_that_both_branches_read_are_stored_and_joined_once(dynamic: bool, tmp_path: Path) -> None:
    def both(self: Any, x: Tensor, state: Tensor) -> Pair:
        return self.other(self.block(x)), x + state

    def first(self: Any, x: Tensor, state: Tensor) -> Pair:
        return self.block(x), x - state

    stage = made(Choice(both, first), dynamic)
    model = translate(stage)
    assert [ops(model)[name] for name in ("MatMul", "Split", "Transpose")] == [12, 3, 0]
    unread = parameters(stage) - sum(
        t.nbytes for n, t in stage.exported.state_dict.items() if "block" in n or "oth" in n
    )
    assert stored(model) == parameters(stage) - unread + 2 * 3 * 8
    assert worst(stage, tmp_path) < ROUNDING


@pytest.mark.parametrize("dynamic", [False, True])
def test_masks_from_outside_are_known_inside(dynamic: bool, tmp_path: Path) -> None:
    class Masked(Choice):
        def forward(self, x: Tensor, state: Tensor, fresh: Tensor) -> Pair:
            rows = torch.arange(x.shape[1])
            lower = rows[:, None] >= rows[None]
            every = (rows >= 0)[None, None, None, :].expand(x.shape[0], 1, x.shape[1], x.shape[1])
            window = lower & (rows[:, None] - rows[None] < 3)

            def then(x: Tensor, state: Tensor) -> Pair:
                return self.other(self.block(x, lower), every), self.block(state, window)

            def otherwise(x: Tensor, state: Tensor) -> Pair:
                inner = torch.arange(x.shape[1])
                return self.block(x, inner[:, None] >= inner[None]), state.clone()

            found: Pair = torch.cond(fresh, then, otherwise, (x, state))
            return found

    stage = made(Masked(lambda self, x, state: (x, state)), dynamic)
    forms = [
        ("unidirectional" in node.attributes, len(node.inputs) > 3)
        for node in nodes(translate(stage))
        if node.op_type == "MultiHeadAttention"
    ]
    assert forms == [(True, False), (False, False), (False, True), (True, False)]
    assert worst(stage, tmp_path) < ROUNDING


def test_rows_are_gathered_whole_by_an_index_from_outside(tmp_path: Path) -> None:
    class Kept(Choice):
        def forward(self, x: Tensor, state: Tensor, fresh: Tensor) -> Pair:
            batch = torch.arange(x.shape[0])[:, None]
            order = x.norm(dim=-1).topk(4, dim=1).indices.sort(dim=1).values

            def then(x: Tensor, state: Tensor) -> Pair:
                return self.block(x[batch, order]).mean(1), state.clone()

            def otherwise(x: Tensor, state: Tensor) -> Pair:
                return x.mean(1), state + 1

            found: Pair = torch.cond(fresh, then, otherwise, (x, state))
            return found

    stage = made(Kept(lambda self, x, state: (x, state)), dynamic=True)
    # without what the tracer took for granted of the batch
    stage = stage.retraced(stage.module)
    model = translate(stage)
    assert ops(model)["GatherND"] == 1
    # the index that nothing reads any more is not handed in, nor made
    assert "Range" not in ops(model)
    assert worst(stage, tmp_path) < ROUNDING


def test_nothing_is_fused_across_the_edge_of_a_branch(tmp_path: Path) -> None:
    class Normed(Choice):
        def forward(self, x: Tensor, state: Tensor, fresh: Tensor) -> Pair:
            size, query = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), self.last(x)

            def then(x: Tensor, state: Tensor) -> Pair:
                again = torch.rsqrt(state.pow(2).mean(-1, keepdim=True) + 1e-6)
                return self.block(x * size) * again, self.other.query(x)

            def otherwise(x: Tensor, state: Tensor) -> Pair:
                return query + state, self.other.key(x)

            found: Pair = torch.cond(fresh, then, otherwise, (x, state))
            return found

    stage = made(Normed(lambda self, x, state: (x, state)))
    model = translate(stage)
    around, within, without = (Counter(node.op_type for node in part) for part in (model.graph, *sides(model)))
    assert [part["Reciprocal"] for part in (around, within, without)] == [1, 0, 0]
    assert [part["Div"] for part in (around, within, without)] == [0, 1, 0]
    assert [part["MatMul"] for part in (around, within, without)] == [1, 5, 1]
    assert worst(stage, tmp_path) < ROUNDING


def apart(self: Any, x: Tensor, state: Tensor) -> Pair:
    """Ops that are taken apart, numbers of several types, and an output that is an operand."""
    return cosine_similarity(self.block(x), x, -1)[..., None] * (x > 0), state


def constants(self: Any, x: Tensor, state: Tensor) -> Pair:
    """What a branch holds itself."""
    return self.last(x) + torch.tensor([1.0, 2.0] * (WIDTH // 2)) + torch.arange(WIDTH), state * self.scale


def rotated(self: Any, x: Tensor, state: Tensor) -> Pair:
    """Rotations by a part of a table."""
    pairs = torch.view_as_complex(self.last(x).reshape(*x.shape[:-1], WIDTH // 2, 2))
    return torch.view_as_real(pairs * self.turns[1]).flatten(-2), state.masked_fill(x > 0, 0.0)


def doubled(self: Any, x: Tensor, state: Tensor) -> Pair:
    """One value as two outputs."""
    y = self.last(x)
    return y, y.clone()


def diverse(self: Any, x: Tensor, state: Tensor) -> Pair:
    """A kernel that is one node."""
    chosen = torch.ops.optpass.select_diverse(x, x.sum(-1), 4, 1.0, True)
    return x[torch.arange(x.shape[0])[:, None], chosen].mean(1, keepdim=True) + x, state + 1


def nested(self: Any, x: Tensor, state: Tensor) -> Pair:
    """A branch that has branches."""

    def then(x: Tensor, state: Tensor) -> Pair:
        return self.block(x), state.clone()

    def otherwise(x: Tensor, state: Tensor) -> Pair:
        return self.last(x), x + state

    found: Pair = torch.cond(x.sum() > 0, then, otherwise, (x, state))
    return found


@pytest.mark.parametrize("compute", [apart, constants, rotated, doubled, diverse, nested])
def test_all_that_is_translated_is_so_in_a_branch(compute: Callable[..., Pair], tmp_path: Path) -> None:
    assert select_diverse.op
    stage = made(Choice(compute), dynamic=True)
    before = str(stage.exported)
    assert worst(stage, tmp_path) < ROUNDING
    assert str(stage.exported) == before
    assert ops(translate(stage))["If"] == 1 + (compute is nested)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_predicate_has_one_element(shape: tuple[int, ...], tmp_path: Path) -> None:
    class Compared(Choice):
        def forward(self, x: Tensor, state: Tensor, fresh: Tensor) -> Pair:
            moved = (x - state).abs().mean() > 1.2
            return super().forward(x, state, fresh ^ moved)

    stage = made(Compared(lambda self, x, state: (self.block(x), x.clone())), predicate=torch.ones(shape).bool())
    assert worst(stage, tmp_path) < ROUNDING


def test_operands_that_are_called_like_ops_are_none(tmp_path: Path) -> None:
    class Counted(Choice):
        def forward(self, x: Tensor, state: Tensor, fresh: Tensor) -> Pair:
            # ``_to_copy`` and ``arange``, when they are taken apart
            positive, places = (x > 0).to(torch.int64), torch.arange(x.shape[0])

            def then(x: Tensor, state: Tensor) -> Pair:
                count = positive.sum([-1])[:, :4] % TOKENS
                return cosine_similarity(x[places[:, None], count], state[:, :4], -1), state.clone()

            def otherwise(x: Tensor, state: Tensor) -> Pair:
                return x[:, :4, 0] + positive.sum([1, 2])[:, None] + places[:, None], state + 1

            found: Pair = torch.cond(fresh, then, otherwise, (x, state))
            return found

    stage = made(Counted(lambda self, x, state: (x, state)))
    assert worst(stage, tmp_path) < ROUNDING


def test_no_name_stands_for_two_values() -> None:
    stage = made(Cached())
    names = ("layer_norm", "attention", "gelu")
    outputs = tuple(replace(spec, name=name) for spec, name in zip(stage.outputs, names, strict=True))
    model = translate(replace(stage, outputs=outputs))
    found = Counter(value.name for node in nodes(model) for value in node.outputs)
    assert set(names) < set(found)
    assert set(found.values()) == {1}


def test_what_is_in_a_branch_has_the_module_of_its_cond() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Cached()

        def forward(self, x: Tensor, state: Tensor, fresh: Tensor) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = self.inner(x, state, fresh)
            return found

    then, otherwise = sides(translate(made(Around())))
    assert {node.metadata_props[MODULE] for node in (*then, *otherwise)} == {"inner"}


def emitted(stage: Stage, inside: bool, clone: bool) -> Stage:
    """The block of a stage under a ``cond`` that is written into its graph, as a pass would."""
    source = stage.module
    weights = {str(node.target): str(node.target).replace(".", "_") for node in source.graph.find_nodes(op="get_attr")}
    root, holder = nn.Module(), nn.Module()
    for path, name in weights.items():
        value = operator.attrgetter(path)(source)
        setattr(root, name, value)
        setattr(holder, name, value)
    outer, then, otherwise = Graph(), Graph(), Graph()
    given = {name: outer.placeholder(name) for name in ("x", "state", "fresh")}
    operands = [given["x"], given["state"]]
    known: dict[Node, Node] = {}
    first, second = ([graph.placeholder(name) for name in ("x", "state")] for graph in (then, otherwise))
    for node in source.graph.nodes:
        if node.op == "placeholder":
            known[node] = dict(zip(("x", "state"), first, strict=True)).get(str(node.target), first[0])
        elif node.op == "get_attr" and inside:
            known[node] = then.get_attr(weights[str(node.target)])
        elif node.op == "get_attr":
            name = weights[str(node.target)]
            operands.append(outer.get_attr(name))
            known[node] = then.placeholder(name)
            otherwise.placeholder(name)
        elif node.op == "call_function":
            known[node] = then.node_copy(node, known.__getitem__)
        elif node.op == "output":
            passed = first[1]
            if clone:
                passed = then.call_function(torch.ops.aten.clone.default, (passed,))
            then.output((known[node.args[0][0]], passed))
    passed = otherwise.call_function(torch.ops.aten.clone.default, (second[1],)) if clone else second[1]
    otherwise.output((otherwise.call_function(torch.ops.aten.add.Tensor, (second[0], second[1])), passed))
    root.then, root.otherwise = GraphModule(holder, then), GraphModule(nn.Module(), otherwise)
    pair = outer.get_attr("then"), outer.get_attr("otherwise")
    cond = outer.call_function(torch.ops.higher_order.cond, (given["fresh"], *pair, tuple(operands)))
    outer.output(tuple(outer.call_function(operator.getitem, (cond, number)) for number in range(2)))
    return stage.retraced(GraphModule(root, outer))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor, state: Tensor, fresh: Tensor) -> Pair:
        return self.block(x), state + fresh


@pytest.mark.parametrize("clone", [False, True])
def test_a_cond_that_a_pass_writes_keeps_weights_and_modules(clone: bool, tmp_path: Path) -> None:
    stage = emitted(made(Plain(), dynamic=True), inside=False, clone=clone)
    model = translate(stage)
    assert stored(model) == parameters(stage) + 3 * 8
    (attention,) = [node for node in nodes(model) if node.op_type == "MultiHeadAttention"]
    assert attention.metadata_props[MODULE] == "block"
    assert worst(stage, tmp_path) < ROUNDING


def test_a_weight_that_a_branch_holds_is_refused_with_its_place() -> None:
    stage = emitted(made(Plain()), inside=True, clone=True)
    with pytest.raises(OptpassError, match=r"\[not-lowered\] a branch .*in block\.before .*models\.py:\d+; let the"):
        translate(stage)


def test_a_constant_in_a_branch_that_is_taken_apart_is_refused_with_its_place() -> None:
    def compute(self: Any, x: Tensor, state: Tensor) -> Pair:
        return apart(self, x + torch.tensor([1.0, 2.0] * (WIDTH // 2)), state)

    with pytest.raises(OptpassError, match=r"\[not-lowered\] a branch .*test_branches\.py:\d+; let the module around"):
        translate(made(Choice(compute)))


@torch.library.custom_op("optpass_tests::stranger", mutates_args=())
def stranger(x: Tensor) -> Tensor:
    return x * 2


@stranger.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_op_of_a_branch_without_a_translation_is_refused_with_its_place() -> None:
    with pytest.raises(OptpassError, match=r"\[not-lowered\].*stranger.*test_branches\.py:\d+"):
        translate(made(Choice(lambda self, x, state: (stranger(x), state.clone()))))


# what else reads graphs


def test_work_and_choices_of_branches_count() -> None:
    outside = made(Plain())
    inside = made(Choice(lambda self, x, state: (self.block(x), state.topk(TOKENS, 1).values)))
    assert work(inside).contractions == work(outside).contractions == 7
    assert (chooses(outside), chooses(inside)) == (False, True)


@pytest.mark.parametrize("attention", [True, False])
def test_branches_are_brought_into_standard_ops_and_half_precision(attention: bool, tmp_path: Path) -> None:
    stage = made(Cached(), dynamic=True)
    model = standard(translate(stage), attention=attention)
    assert {node.domain for node in nodes(model)} == {""}
    onnxruntime.save(model, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    assert difference(stage, ort.open_engine(tmp_path / "model.onnx", "f32", 1)) < ROUNDING
    halved(model, ir.DataType.FLOAT16)
    narrow = [v for v in model.graph.initializers.values() if v.const_value and v.const_value.dtype.itemsize == 2]
    assert len(narrow) == 6
    onnxruntime.save(model, tmp_path / "half.onnx")
    # six products in a row of factors that are off by 2^-11
    assert difference(stage, ort.open_engine(tmp_path / "half.onnx", "f32", 1)) < 6 * 2**-10


@pytest.mark.skipif(not tensorrt.module_name(tensorrt.RTX), reason="TensorRT-RTX has no wheel for this platform")
def test_tensorrt_builds_branches(tmp_path: Path) -> None:
    assert TensorRT().lower(Source(made(Cached(), dynamic=True)), tmp_path, "f16", ("sm_89",))


def test_bfloat16_is_widened_in_branches(tmp_path: Path) -> None:
    class Narrow(Choice):
        def forward(self, x: Tensor, state: Tensor, fresh: Tensor) -> Pair:
            found = super().forward(x.bfloat16(), state.bfloat16(), fresh)
            return found[0].float(), found[1].float()

    stage = made(Narrow(lambda self, x, state: (self.last(x), state.clone())).bfloat16())
    file = backend("onnxruntime", "f32").lower(Source(stage), tmp_path, "f32")
    # inputs, product and sum are rounded to 2^-8 in eager execution alone, of values below 8
    assert difference(stage, ort.open_engine(tmp_path / file, "f32", 1)) < 4 * 8 * 2**-8


def test_weights_of_branches_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "LARGEST_FILE", 1000)
    stage = made(Cached())
    onnxruntime.save(translate(stage), tmp_path / "model.onnx")
    assert (
        (tmp_path / "model.onnx").stat().st_size < parameters(stage) / 2 < (tmp_path / "model.onnx.data").stat().st_size
    )
    assert difference(stage, ort.open_engine(tmp_path / "model.onnx", "f32", 1)) < ROUNDING


@pytest.mark.parametrize("make", [viewers.netron, viewers.model_explorer])
def test_viewers_take_branches(make: Callable[[onnx.ModelProto, dict[str, float], str], bytes]) -> None:
    proto = ir.to_proto(translate(made(Cached())))
    viewers.without_weights(proto)
    assert b"node_cond" in make(proto, {}, "engine")


@pytest.mark.skipif(not compiled.compiler(), reason="here is no C++ compiler")
def test_inductor_compiles_both_branches(tmp_path: Path) -> None:
    stage = made(Cached(), dynamic=True)
    file = Inductor().lower(Source(stage), tmp_path, "f32")
    assert difference(stage, compiled.open_engine(tmp_path / file, "f32", 1)) < ROUNDING
    assert Inductor().ops(Source(stage))["linear"] == 8


def test_inductor_refuses_an_output_that_is_an_operand(tmp_path: Path) -> None:
    stage = made(Choice(lambda self, x, state: (self.last(x), state)))
    with pytest.raises(OptpassError, match=r"\[not-lowered\] AOTInductor .*aliasing the input or the output"):
        Inductor().lower(Source(stage), tmp_path, "f32")
