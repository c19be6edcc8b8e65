"""A captured stage as an ONNX graph that engines run fast.

The aten graph is brought into a form that engines have kernels for, then translated by torch's own table of ONNX
functions. Two things are left out of ``torch.onnx.export`` because they are most of its time and change nothing here:
the re-trace that decomposes ops (done only if the graph holds an op without a translation) and the optimizer passes
(engines fold constants themselves). Everything is one walk over the nodes, so time is linear in depth.
"""

from __future__ import annotations

import ast
import copy
import functools
import logging
import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.onnx._internal.exporter import _core, _decomp, _fx_passes, _registration

from optpass.errors import OptpassError
from optpass.export import branches
from optpass.export.attention import APPEND, append, attend
from optpass.export.fuse import fuse
from optpass.export.masks import Masks, constants
from optpass.export.spelling import (
    NO_OPS,
    RESHAPES,
    count,
    gather_rows,
    mixes_dtypes,
    reshape_by_constants,
    skip_no_ops,
    spell_out,
    type_numbers,
)
from optpass.export.translations import CONTRIB, OF_LIBRARIES, TRANSLATIONS
from optpass.kernels.base import NAMESPACE, kernels, spelled_out
from optpass.program import Stage, op_name, strip_wrapper

aten = torch.ops.aten

OPSET = 18
"""That of torch's translations, so that no version conversion is needed."""

MODULE = "module"
"""Key of the metadata of a node under which the path of its module in the user's model is kept."""


def translate(stage: Stage) -> ir.Model:
    """The stage as an ONNX model with the names and dynamic dimensions of its specs.

    Raises:
        OptpassError: an op has no translation; names it and its place in the user's model.
    """
    with _quiet():
        program = _prepared(spelled_out(stage))
        try:
            model = _core._exported_program_to_onnx_program(program, registry=_registry()).model
        except Exception as error:  # torch raises its own types, whose module is private
            raise _untranslated(error, program) from error
    model.opset_imports[""] = OPSET
    if any(node.domain == CONTRIB for node in _nodes(model)):
        model.opset_imports[CONTRIB] = 1
    if model.functions:
        # OpenVINO does not know functions that a model brings itself
        InlinePass()(model)
    # torch writes all results of an op; mean and deviation of a norm engines refuse, the latter in mixed types
    RemoveUnusedNodesPass()(model)
    _fold_transposed_weights(model)
    fuse(model, _rows(stage))
    _forget(model)
    _name(model, stage)
    return model


def _rows(stage: Stage) -> int:
    """About how many tokens the example has: its ids, or the rows of its first input."""
    first = stage.example[0]
    return first.numel() // (max(first.shape[-1], 1) if first.is_floating_point() and first.dim() else 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes torch logs about packages it lacks, which the user can do nothing about."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@functools.cache
def _registry() -> _registration.ONNXRegistry:
    registry = _registration.ONNXRegistry.from_torchlib(opset_version=OPSET)
    for target, function in TRANSLATIONS.items():
        registry.register_op(target, function, is_complex=False)
    return registry


def _untranslated(error: Exception, program: ExportedProgram) -> OptpassError:
    """The innermost cause, at the node that torch names in its message."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    named = [node for node in branches.nodes(program.graph_module) if str(node.format_node()) in str(error)]
    text = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    return OptpassError(
        "not-lowered",
        f"an op has no translation to ONNX: {text[:200]}",
        "write that part of the model with ops that have one",
        branches.place(program.graph_module, named[0]) if named else None,
    )


# The aten graph, in the form to be translated


def _prepared(stage: Stage) -> ExportedProgram:
    program = copy.copy(stage.exported)
    program._graph_module = branches.copied(program.graph_module)
    for module in branches.modules(program.graph_module):
        spell_out(module.graph)
    if any(not _translatable(node) for node in branches.nodes(program.graph_module)):
        program = _decomposed(program)
    _fold_complex(program)
    # The private passes of torch run the graph, so they come before ops of our own do.
    if any(mixes_dtypes(node) for node in branches.nodes(program.graph_module)):
        _fx_passes.insert_type_promotion_nodes(program.graph_module)
    _fx_passes.remove_assertion_nodes(program.graph_module)
    inner_first = branches.modules(program.graph_module)[::-1]
    branches.keep_constants(program.graph_module)
    for module in inner_first:
        type_numbers(module.graph)
        skip_no_ops(module.graph)
    _rewrite(program.graph, Masks(stage, program))
    # Masks look at how a value came about, so constants are folded when they have looked.
    for graph in (module.graph for module in inner_first):
        _fold_constants(graph)
        for node in graph.find_nodes(op="call_function", target=branches.COND):
            branches.drop_unread_operands(node)
        graph.eliminate_dead_code(_has_effect)
    _rename_outputs(program)
    return program


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    """The program in ops that have a translation, and in those of the reference where a branch has a kernel."""
    table = _decomp.create_onnx_friendly_decomposition_table(set(_decomp.get_onnx_implemented_overloads(_registry())))
    if any(str(node.target).startswith(f"{NAMESPACE}.") for node in branches.nodes(program.graph_module)):
        table |= {kernel.op: kernel.reference for kernel in kernels().values()}
    branches.make_retraceable(program.graph_module)
    # As torch.onnx does: sizes of 0 and 1 must not become constants on the way.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        made: ExportedProgram = program.run_decompositions(table)
    return made


def _rewrite(graph: Graph, masks: Masks) -> None:
    """Put nodes in the form to be translated, those of a branch in the place of the ``cond`` that has it."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is branches.COND:
            for branch in branches.enter(node):
                _rewrite(branch, masks)
        elif op_name(node) == "arange" and any(isinstance(arg, float) for arg in node.args):
            _as_constant(node)
        elif node.target is aten.scaled_dot_product_attention.default:
            attend(node, masks)
        elif node.target is APPEND:
            append(node)
        elif node.target in RESHAPES:
            reshape_by_constants(node)
        elif node.target is aten.index.Tensor:
            gather_rows(node)
        elif node.target is aten.sum.dim_IntList:
            count(node)


def _rename_outputs(program: ExportedProgram) -> None:
    """Make the signature, which knows outputs by the names of their nodes, follow nodes that were replaced."""
    signature = program.graph_signature
    results = next(node for node in program.graph.nodes if node.op == "output").args[0]
    specs = [
        replace(spec, arg=replace(spec.arg, name=node.name)) if isinstance(node, Node) else spec
        for spec, node in zip(signature.output_specs, results, strict=True)
    ]
    program._graph_signature = replace(signature, output_specs=specs)


LARGEST_CONSTANT = 1 << 16
"""In elements; what is larger is made anew in each call, so that files stay small."""


def _fold_constants(graph: Graph) -> None:
    """Evaluate what depends on nothing: engines fold less, and do not see the shapes of what follows from it."""
    folded: dict[Node, torch.Tensor] = {}
    for node in list(graph.nodes):
        made = node.meta.get("val")
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not isinstance(made, torch.Tensor) or not all(isinstance(size, int) for size in made.shape):
            continue
        if made.numel() > LARGEST_CONSTANT or torch.Tag.nondeterministic_seeded in node.target.tags:
            continue
        if any(source not in folded for source in node.all_input_nodes):
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), folded.__getitem__)
        folded[node] = node.target(*args, **kwargs)
    for node, value in folded.items():
        if any(user not in folded for user in node.users):
            _replace_by_constant(node, value.contiguous())


def _fold_complex(program: ExportedProgram) -> None:
    """Evaluate what is made of complex constants alone, such as tables of rotations: engines have no such numbers."""
    known: dict[Node, torch.Tensor] = {}
    held_by_name = constants(program)
    for module in branches.modules(program.graph_module):
        for node in module.graph.nodes:
            source = branches.origin(node)
            if node.op == "placeholder":
                held = held_by_name.get(source.name) if source is node else known.get(source)
                if held is not None and held.is_complex():
                    known[node] = held
            elif node.target is branches.COND:
                branches.enter(node)
            elif isinstance(node.target, torch._ops.OpOverload) and node.all_input_nodes:
                if all(given in known for given in node.all_input_nodes):
                    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                    known[node] = node.target(*args, **kwargs)
            elif node.target is operator.getitem and node.args[0] in known:
                known[node] = known[node.args[0]][node.args[1]]
    for node, value in known.items():
        if node.op != "placeholder" and isinstance(value, torch.Tensor) and any(u not in known for u in node.users):
            if value.is_complex():
                # in pairs of numbers, of which alone there are tensors in ONNX
                with node.graph.inserting_before(node):
                    pairs = node.graph.call_function(aten.view_as_complex.default, (node,))
                pairs.meta = dict(node.meta)
                node.replace_all_uses_with(pairs)
                pairs.args, value = (node,), torch.view_as_real(value)
                node.append(pairs)
            _replace_by_constant(node, value.contiguous())


def _as_constant(node: Node) -> None:
    """Evaluate a range of fractions here: torch counts its steps in float64, engines in float32, to another number."""
    _replace_by_constant(node, node.target(*node.args, **node.kwargs))  # type: ignore[operator]


def _replace_by_constant(node: Node, value: torch.Tensor) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        made = graph.create_node("get_attr", f"folded_{node.name}")
    made.meta = {"val": value}
    assert graph.owning_module is not None
    graph.owning_module.register_buffer(str(made.target), made.meta["val"])
    node.replace_all_uses_with(made)


ASSERTIONS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size")


def _translatable(node: Node) -> bool:
    if node.op != "call_function" or node.target in TRANSLATIONS or node.target is APPEND:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or op_name(node) in (*ASSERTIONS, *NO_OPS):
        return True
    registry = _registry()
    if not registry.is_registered(node.target) and node.target._schema.name in OF_LIBRARIES:
        registry.register_op(node.target, OF_LIBRARIES[node.target._schema.name], is_complex=False)
    return registry.is_registered(node.target)


def _has_effect(node: Node) -> bool:
    """Attention counts as impure in torch, for the dropout it could have."""
    return node.op in ("placeholder", "output")


# The ONNX graph, cleaned


def _fold_transposed_weights(model: ir.Model) -> None:
    """Store the weights of linear layers the way they are multiplied, unless something else reads them too."""
    graph = model.graph
    for name, weight in list(graph.initializers.items()):
        tensor, users = weight.const_value, [use.node for use in weight.uses()]
        if not isinstance(tensor, _core.TorchTensor) or not users or weight.is_graph_output():
            continue
        if not all(_turns(node) for node in users):
            continue
        folded = ir.Value(name=f"{name}.T", type=weight.type, shape=ir.Shape(list(tensor.shape)[::-1]))
        folded.const_value = _turned(tensor, str(folded.name))
        graph.register_initializer(folded)
        for node in users:
            ir.convenience.replace_all_uses_with(node.outputs[0], folded)
            assert node.graph is not None
            node.graph.remove(node, safe=True)
        del graph.initializers[name]


def _turns(node: ir.Node) -> bool:
    transpose = node.op_type == "Transpose" and node.domain == ""
    return transpose and list(node.attributes["perm"].as_ints()) == [1, 0] and not node.outputs[0].is_graph_output()


def _turned(tensor: _core.TorchTensor, name: str) -> ir.LazyTensor:
    """A transposed weight, turned when it is written, so that no second copy of all weights is held."""

    def made() -> _core.TorchTensor:
        return _core.TorchTensor(tensor.raw.t().contiguous(), name=name)

    return ir.LazyTensor(made, dtype=tensor.dtype, shape=ir.Shape(list(tensor.shape)[::-1]), name=name)


def _forget(model: ir.Model) -> None:
    """Drop what only the exporter knew: source lines of another machine, and shapes that engines infer themselves.

    Of each node the path of its module stays, for those who look at the graph.
    """
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "optpass", None
    outputs = set(model.graph.outputs)
    for name, value in list(model.graph.initializers.items()):
        value.metadata_props.clear()
        if not value.uses() and value not in outputs:
            del model.graph.initializers[name]
    around: dict[ir.Graph, str] = {}
    for node in _nodes(model):
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        path = strip_wrapper(scopes[-2]) if len(scopes) > 1 else ""
        # the tracer forgets the modules of what is in a branch
        path = path or (around.get(node.graph, "") if isinstance(node.graph, ir.Graph) else "")
        around |= {value.as_graph(): path for value in node.attributes.values() if value.type == GRAPH}
        node.metadata_props.clear()
        if path:
            node.metadata_props[MODULE] = path
        node.meta.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in outputs:
                value.shape, value.type = None, None
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()


GRAPH = ir.AttributeType.GRAPH


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(model.graph)
    for function in model.functions.values():
        yield from ir.traversal.RecursiveGraphIterator(function)


def _name(model: ir.Model, stage: Stage) -> None:
    """Give inputs and outputs the names and dimensions of the specs; other values make way."""
    graph = model.graph
    names = [spec.name for spec in (*stage.inputs, *stage.outputs)]
    inner = [value for node in _nodes(model) for value in node.outputs] + list(graph.initializers.values())
    for value in (*graph.inputs, *inner):
        if value.name in names:
            value.name = f"{value.name}.inner"
    for value, spec in zip(graph.inputs, stage.inputs, strict=True):
        value.name = spec.name
        value.shape = ir.Shape(list(spec.shape))
    seen: set[ir.Value] = set(graph.inputs) | set(graph.initializers.values())
    for index, spec in enumerate(stage.outputs):
        value = graph.outputs[index]
        if value in seen:
            copied = ir.node("Identity", [value])
            copied.outputs[0].type = value.type
            graph.append(copied)
            value = graph.outputs[index] = copied.outputs[0]
        seen.add(value)
        value.name = spec.name
        value.shape = ir.Shape(list(spec.shape))
