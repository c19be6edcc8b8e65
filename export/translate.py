"""A captured stage as an ONNX graph that engines run fast.

The aten graph is brought into a form that engines have kernels for, then translated by torch's own table of ONNX
functions. Two things are left out of ``torch.onnx.export`` because they are most of its time and change nothing here:
the re-trace that decomposes ops (done only if the graph holds an op without a translation) and the optimizer passes
(engines fold constants themselves). Everything is one walk over the nodes, so time is linear in depth.

Attention becomes ``com.microsoft.MultiHeadAttention`` on ``[batch, tokens, heads * head_dim]``, the layout in which
the linear layers around it already work, so that no transpose is left. Both ONNX Runtime and OpenVINO have it as one
fused kernel; OpenVINO takes the standard ``Attention`` of opset 23 apart.
"""

from __future__ import annotations

import ast
import copy
import functools
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass
from onnxscript import opset18 as op
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.onnx._internal.exporter import _core, _decomp, _fx_passes, _registration, _tensors
from torch.onnx._internal.exporter._torchlib.ops.hop import higher_order_cond

from optpass import appending  # noqa: F401 - registers the op
from optpass.errors import OptpassError
from optpass.export import branches
from optpass.export.fuse import fuse
from optpass.kernels.base import NAMESPACE, kernels, spelled_out
from optpass.program import Stage, op_name, strip_wrapper

aten = torch.ops.aten

OPSET = 18
"""That of torch's translations, so that no version conversion is needed."""

CONTRIB = "com.microsoft"

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
        _spell_out(module.graph)
    if any(not _translatable(node) for node in branches.nodes(program.graph_module)):
        program = _decomposed(program)
    _fold_complex(program)
    # The private passes of torch run the graph, so they come before ops of our own do.
    if any(_mixes_dtypes(node) for node in branches.nodes(program.graph_module)):
        _fx_passes.insert_type_promotion_nodes(program.graph_module)
    _fx_passes.remove_assertion_nodes(program.graph_module)
    inner_first = branches.modules(program.graph_module)[::-1]
    branches.keep_constants(program.graph_module)
    for module in inner_first:
        _type_numbers(module.graph)
        _skip_no_ops(module.graph)
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
            _attend(node, masks)
        elif node.target is APPEND:
            _append(node)
        elif node.target in RESHAPES:
            _reshape_by_constants(node)
        elif node.target is aten.index.Tensor:
            _gather_rows(node)
        elif node.target is aten.sum.dim_IntList:
            _count(node)


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
    constants = _constants(program)
    for module in branches.modules(program.graph_module):
        for node in module.graph.nodes:
            source = branches.origin(node)
            if node.op == "placeholder":
                held = constants.get(source.name) if source is node else known.get(source)
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


CASTS = ("to", "type_as", "_to_copy")
LOGIC = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
}


def _spell_out(graph: Graph) -> None:
    """Ops that are another under a second name, so that they alone do not call for decomposition."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        node.target = LOGIC.get(node.target, node.target)
        if node.target is aten.diff.default and isinstance(node.args[0], Node):
            _spell_out_diff(graph, node)
        elif node.target is aten.sort.stable:
            # the lower index comes first where values are equal, in ONNX as well
            given = {"dim": -1, "descending": False, **node.kwargs}
            node.target, node.args, node.kwargs = (
                aten.sort.default,
                (node.args[0], given["dim"], given["descending"]),
                {},
            )
        elif node.target is aten.square.default:
            node.target, node.args = aten.mul.Tensor, (node.args[0], node.args[0])
        elif node.target in PARTING:
            _spell_out_parts(node)
        elif node.target is aten.masked_fill.Scalar and node.meta["val"].dtype == torch.bool:
            _spell_out_fill(graph, node)
        elif node.target is aten.movedim.int:
            node.target, node.args = aten.permute.default, (node.args[0], _moved(*node.args))
        elif node.target is aten.scaled_dot_product_attention.default and node.meta["val"].dim() == 3:
            _with_leading_axis(graph, node)
        elif op_name(node) in CASTS and node.target is not aten._to_copy.default:
            node.args, node.kwargs = node.args[:1], {"dtype": node.meta["val"].dtype}
            node.target = aten._to_copy.default


PARTING = (aten.chunk.default, aten.split.Tensor)
"""Ops that give several parts, of which torch's translation makes a sequence, inside of a branch at least."""


def _spell_out_parts(node: Node) -> None:
    axis: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    lengths = [part.shape[axis] for part in node.meta["val"]]
    if all(isinstance(length, int) for length in lengths):
        node.target, node.args, node.kwargs = aten.split_with_sizes.default, (node.args[0], lengths, axis), {}


def _spell_out_fill(graph: Graph, node: Node) -> None:
    """Truth values where a mask says so, by logic: engines choose among numbers alone."""
    source, mask, value = node.args
    with graph.inserting_before(node):
        if value:
            made = _call(graph, aten.logical_or.default, source, mask)
        else:
            made = _call(graph, aten.logical_and.default, source, _call(graph, aten.logical_not.default, mask))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _with_leading_axis(graph: Graph, node: Node) -> None:
    """Attention on ``[batch * heads, tokens, head_dim]`` as one on a batch of one with as many heads."""
    query, key, value, *rest = node.args
    mask = rest[0] if rest else node.kwargs.get("attn_mask")
    with graph.inserting_before(node):
        lifted = [_call(graph, aten.unsqueeze.default, n, 0) for n in (query, key, value)]
        if isinstance(mask, Node) and mask.meta["val"].dim() == 3:
            mask = _call(graph, aten.unsqueeze.default, mask, 0)
        kwargs = {name: given for name, given in node.kwargs.items() if name != "attn_mask"}
        made = graph.call_function(node.target, (*lifted, mask, *rest[1:]), kwargs)  # type: ignore[arg-type]
        made.meta = {**node.meta, "val": node.meta["val"].unsqueeze(0)}
        back = _call(graph, aten.squeeze.dim, made, 0)
        back.meta = dict(node.meta)
    node.replace_all_uses_with(back)
    graph.erase_node(node)


def _moved(value: Node, source: int, target: int) -> list[int]:
    """The order of dimensions when one of them has moved."""
    rank = value.meta["val"].dim()
    order = [dim for dim in range(rank) if dim != source % rank]
    order.insert(target % rank, source % rank)
    return order


def _spell_out_diff(graph: Graph, node: Node) -> None:
    """Differences of neighbours, as two slices."""
    names = ("self", "n", "dim", "prepend", "append")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    source, order, axis = given["self"], given.get("n", 1), given.get("dim", -1)
    before, after = given.get("prepend"), given.get("append")
    if order != 1 or node.meta["val"].dtype == torch.bool:
        return
    with graph.inserting_before(node):
        parts = [part for part in (before, source, after) if part is not None]
        whole = _call(graph, aten.cat.default, parts, axis) if len(parts) > 1 else parts[0]
        left = _call(graph, aten.slice.Tensor, whole, axis, 0, -1)
        right = _call(graph, aten.slice.Tensor, whole, axis, 1, END)
        made = _call(graph, aten.sub.Tensor, right, left)
        made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


END = 2**63 - 1


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


NO_OPS = ("dropout", "alias", "contiguous", "clone", "detach", "lift_fresh_copy", "detach_")


def _skip_no_ops(graph: Graph) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
            continue
        drops = op_name(node) == "dropout" and node.args[2]
        if (op_name(node) in NO_OPS and not drops) or _changes_nothing(node, node.args[0]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _changes_nothing(node: Node, source: Node) -> bool:
    if node.target not in RESHAPES and op_name(node) not in ("squeeze", "expand", "to", "_to_copy", "type_as"):
        return False
    old, new = source.meta["val"], node.meta["val"]
    return old.dtype == new.dtype and str(list(old.shape)) == str(list(new.shape))


def _has_effect(node: Node) -> bool:
    """Attention counts as impure in torch, for the dropout it could have."""
    return node.op in ("placeholder", "output")


SUMS = ("cumsum", "sum", "prod", "cumprod", "mean")
"""Reductions that widen booleans and integers, which ONNX does not."""

KEEPS_DTYPES = ("where", "to", "_to_copy", "masked_fill", "clamp", "clone", "copy")


def _mixes_dtypes(node: Node) -> bool:
    """Whether a pointwise op relies on type promotion, which ONNX does not have."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.pointwise not in node.target.tags and op_name(node) not in SUMS:
        return False
    made = node.meta.get("val")
    tensors = [arg.meta.get("val") for arg in node.args if isinstance(arg, Node)]
    dtypes = {value.dtype for value in tensors if isinstance(value, torch.Tensor)}
    if op_name(node) == "where":
        dtypes -= {torch.bool}
    if len(dtypes) > 1:
        return True
    if op_name(node) in KEEPS_DTYPES or not isinstance(made, torch.Tensor):
        return False
    if made.dtype is torch.bool:
        numbers = [arg.meta.get("val") if isinstance(arg, Node) else arg for arg in node.args]
        floats = any(isinstance(number, float | torch.SymFloat) for number in numbers)
        return floats and not any(dtype.is_floating_point for dtype in dtypes)
    return bool(dtypes) and made.dtype not in dtypes


UNTAGGED = ("where", "floor_divide")
"""Pointwise ops that torch does not tag so."""

WITH_TENSORS = {"Scalar": "Tensor", "Tensor_Scalar": "Tensor_Tensor"}
"""The overload that takes a tensor in the place of a number."""


def _type_numbers(graph: Graph) -> None:
    """Give numbers the type of the tensors that they meet: ONNX promotes none, and a size there is an int64."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        pointwise = torch.Tag.pointwise in node.target.tags and op_name(node) not in KEEPS_DTYPES
        if not isinstance(node.meta.get("val"), torch.Tensor) or not (pointwise or op_name(node) in UNTAGGED):
            continue
        operands = [str(argument.type) in ("Tensor", "number") for argument in node.target._schema.arguments]
        given = zip(node.args, operands, strict=False)
        node.args = tuple(_typed(node, arg) if operand else arg for arg, operand in given)


def _typed(node: Node, number: Any) -> Any:
    """An operand in the type that the node computes in, where it is a number."""
    wanted: torch.dtype = node.meta["val"].dtype
    if wanted is torch.bool:
        values = [source.meta["val"] for source in node.all_input_nodes]
        # numbers are compared in the type of the tensor
        wanted = next(value.dtype for value in values if isinstance(value, torch.Tensor))
    if isinstance(number, Node) and isinstance(number.meta["val"], torch.SymInt | torch.SymFloat):
        with node.graph.inserting_before(node):
            made = node.graph.call_function(aten.scalar_tensor.default, (number,), {"dtype": wanted})
        made.meta = {**node.meta, "val": torch.empty((), dtype=wanted)}
        assert isinstance(node.target, torch._ops.OpOverload)
        overload = WITH_TENSORS.get(node.target._overloadname, "")
        if overload in node.target.overloadpacket.overloads():
            node.target = getattr(node.target.overloadpacket, overload)
        return made
    # torch's translations know the type of a number only where it stands behind a tensor; squares are known by their 2
    return float(number) if type(number) is int and wanted.is_floating_point and op_name(node) != "pow" else number


# Reshape


def reshape(value: Any, sizes: Sequence[int]) -> Any:
    """Target of a reshape by constants: 0 keeps the size at that place, -1 is what is left."""
    raise NotImplementedError


RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)


def _reshape_by_constants(node: Node) -> None:
    """Write sizes as constants, so that engines see the layout and no arithmetic on shapes is left."""
    source = node.args[0]
    assert isinstance(source, Node)
    sizes = _sizes(source.meta["val"].shape, node.meta["val"].shape)
    if sizes is None:
        return
    node.target, node.args, node.kwargs = reshape, (source, sizes), {}


def _sizes(old: Sequence[Any], new: Sequence[Any]) -> list[int] | None:
    sizes = [
        size if isinstance(size, int) else 0 if axis < len(old) and str(old[axis]) == str(size) else -1
        for axis, size in enumerate(new)
    ]
    static_zero = any(isinstance(size, int) and size == 0 for size in new)
    return None if static_zero or sizes.count(-1) > 1 else sizes


# Rows of each sample


def rows_of(value: Any, rows: Any) -> Any:
    """Target of ``value[arange(batch)[:, None], rows]``: ``[batch, tokens, ...]`` and ``[batch, kept]``."""
    raise NotImplementedError


def _gather_rows(node: Node) -> None:
    """Gather the tokens of each sample by whole rows, without the pairs of indices that a general index needs."""
    value, indices = node.args[0], node.args[1]
    if not isinstance(value, Node) or not isinstance(indices, list | tuple) or len(indices) != 2:
        return
    batch, rows = indices
    if not isinstance(batch, Node) or not isinstance(rows, Node) or rows.meta["val"].dtype != torch.int64:
        return
    size, of = value.meta["val"].shape[0], rows.meta["val"].shape
    if len(of) != 2 or str(of[0]) != str(size) or not _counts_up_a_column(batch, size):
        return
    node.target, node.args = rows_of, (value, rows)


def _counts_up_a_column(node: Node, size: Any) -> bool:
    """Whether a node is ``arange(size)[:, None]``."""
    shape = node.meta["val"].shape
    if len(shape) != 2 or shape[1] != 1 or str(shape[0]) != str(size):
        return False
    node = branches.origin(node)
    while node.target in (aten.unsqueeze.default, reshape, *RESHAPES):
        node = branches.origin(node.args[0])  # type: ignore[arg-type]
    if node.op != "call_function" or op_name(node) != "arange" or node.meta["val"].dtype != torch.int64:
        return False
    start, step = {1: (0, 1), 2: (node.args[0], 1), 3: (node.args[0], node.args[-1])}[len(node.args)]
    return isinstance(start, int) and isinstance(step, int) and (start, step) == (0, 1)


# Counts


def count_of(mask: Any, axes: Sequence[int], keep: bool) -> Any:
    """Target of an integer sum over a boolean mask."""
    raise NotImplementedError


WIDENS = ("_to_copy", "prims.convert_element_type")


def _count(node: Node) -> None:
    """Count in float32, which is exact up to 16 million: OpenVINO 2026.4 gets a sum of integers wrong.

    It does where a subtraction follows and more than a hundred rows of 16 or fewer are summed.
    """
    mask = node.args[0]
    if isinstance(mask, Node) and mask.op == "call_function" and op_name(mask) in WIDENS:
        mask = mask.args[0]
    if not isinstance(mask, Node) or mask.meta["val"].dtype != torch.bool or node.meta["val"].dtype != torch.int64:
        return
    axes = node.args[1] if len(node.args) > 1 else None
    if not isinstance(axes, list | tuple) or not axes:
        return
    keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    node.target, node.args, node.kwargs = count_of, (mask, list(axes), keep), {}


# Attention


def attention(query: Any, key: Any, value: Any, bias: Any, heads: int, scale: float, causal: bool) -> Any:
    """Target of an attention on ``[batch, tokens, heads * head_dim]``; the bias is rank 4 or None."""
    raise NotImplementedError


LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.float16, torch.bfloat16)}
"""What attention computes in, and the lowest finite number there."""


def _attend(node: Node, masks: Masks) -> None:
    """Replace an attention on ``[batch, heads, tokens, head_dim]`` by one in the layout of the linear layers."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    query, key, value = given["query"], given["key"], given["value"]
    shapes = [n.meta["val"].shape for n in (query, key, value)]
    if any(len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int) for shape in shapes):
        return
    if node.meta["val"].dtype not in LOWEST:
        return
    heads, groups = shapes[0][1], shapes[1][1]
    if len({str(shape[0]) for shape in shapes}) > 1 or heads % groups or groups != shapes[2][1]:
        return
    mask, causal = given.get("attn_mask"), bool(given.get("is_causal", False))
    square = str(shapes[0][2]) == str(shapes[1][2])
    kind = masks.kind(mask) if mask is not None else "nothing"
    if kind == "causal" and square:
        mask, causal = None, True
    elif kind == "nothing":
        mask = None
    if causal and not square:
        return
    graph = node.graph
    scale = float(shapes[0][3]) ** -0.5 if given.get("scale") is None else float(given["scale"])
    with graph.inserting_before(node):
        bias, rows = masks.bias(graph, mask, query, key) if mask is not None else (None, None)
        flat = [_flat(graph, n, heads // shape[1]) for n, shape in zip((query, key, value), shapes, strict=True)]
        made = graph.call_function(attention, (*flat, bias, heads, scale, causal))
        made.meta = {**node.meta, "val": node.meta["val"].transpose(1, 2).flatten(2)}
        if rows is not None:
            meta = made.meta
            made = graph.call_function(aten.mul.Tensor, (made, rows))
            made.meta = dict(meta)
    _stand_in(node, made, heads, shapes[2][3])


APPEND = torch.ops.optpass_step.append_attention.default


def appended(query: Any, key: Any, value: Any, *rest: Any) -> Any:
    """Target of ``append_attention`` on ``[batch, tokens, heads * head_dim]``; its last arguments count heads."""
    raise NotImplementedError


def _append(node: Node) -> None:
    """Replace an attention that writes its rows in place by one in the layout of the linear layers."""
    graph = node.graph
    rows: list[Any] = list(node.args[:3])
    heads, groups = (int(n.meta["val"].shape[1]) for n in rows[:2])
    mixed, *present = node.meta["val"]
    with graph.inserting_before(node):
        flat = [_flat(graph, n, 1) for n in rows]
        made = graph.call_function(appended, (*flat, *node.args[3:], heads, groups))
        made.meta = {**node.meta, "val": (mixed.transpose(1, 2).flatten(2), *present)}
        parts = [graph.call_function(operator.getitem, (made, place)) for place in range(3)]
        for part, value in zip(parts, made.meta["val"], strict=True):
            part.meta = {**node.meta, "val": value}
    for user in list(node.users):
        place: Any = user.args[1]
        if place == 0:
            _stand_in(user, parts[0], heads, int(mixed.shape[3]))
        else:
            user.replace_all_uses_with(parts[place])


def _stand_in(node: Node, made: Node, heads: int, width: int) -> None:
    """Let ``made [batch, tokens, heads * width]`` take the place of an attention, and of the reshapes behind it."""
    graph = node.graph
    merges = [_merge_of(user) for user in node.users]
    for end in (end for ends in merges for end in ends):
        end.replace_all_uses_with(made)
    if all(merges):
        return
    with graph.inserting_before(node):
        split = graph.call_function(reshape, (made, [0, 0, heads, width]))
        split.meta = {**node.meta, "val": node.meta["val"].transpose(1, 2)}
        back = graph.call_function(aten.transpose.int, (split, 1, 2))
        back.meta = dict(node.meta)
    node.replace_all_uses_with(back)


def _merge_of(user: Node) -> list[Node]:
    """The reshapes to ``[batch, tokens, heads * head_dim]`` behind a transpose of heads and tokens; all or none."""
    if not _swaps_heads(user):
        return []
    lead = user.meta["val"].shape
    after = [n for n in user.users if op_name(n) not in ("contiguous", "clone")]
    if len(after) < len(user.users):
        return []
    ends = []
    for n in after:
        if n.target not in RESHAPES:
            return []
        shape = n.meta["val"].shape
        if len(shape) != 3 or str(shape[1]) != str(lead[1]) or shape[2] != lead[2] * lead[3]:
            return []
        ends.append(n)
    return ends


def _swaps_heads(node: Node) -> bool:
    if node.target is aten.transpose.int:
        return {axis % 4 for axis in node.args[1:]} == {1, 2}  # type: ignore[operator]
    return node.target is aten.permute.default and list(node.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]


def _flat(graph: Graph, node: Node, repeat: int) -> Node:
    """``[batch, heads, tokens, head_dim]`` in the layout of the linear layers, grouped heads repeated."""
    value = node.meta["val"]
    if repeat == 1 and _swaps_heads(node):
        split = node.args[0]
        assert isinstance(split, Node)
        if split.target in (*RESHAPES, reshape):
            whole = split.args[0]
            assert isinstance(whole, Node)
            shape = whole.meta["val"].shape
            if len(shape) == 3 and shape[2] == value.shape[1] * value.shape[3] and str(shape[1]) == str(value.shape[2]):
                return whole
    swapped = graph.call_function(aten.transpose.int, (node, 1, 2))
    swapped.meta = {**node.meta, "val": value.transpose(1, 2)}
    if repeat > 1:
        swapped = _repeated(graph, swapped, repeat)
    whole = swapped.meta["val"].flatten(2)
    merged = graph.call_function(reshape, (swapped, [0, 0, whole.shape[2]]))
    merged.meta = {**node.meta, "val": whole}
    return merged


def _repeated(graph: Graph, node: Node, repeat: int) -> Node:
    """``[batch, tokens, heads, head_dim]`` with each head ``repeat`` times in a row."""
    value = node.meta["val"]
    wide = graph.call_function(aten.unsqueeze.default, (node, 3))
    wide.meta = {**node.meta, "val": value.unsqueeze(3)}
    copies = graph.call_function(aten.cat.default, ([wide] * repeat, 3))
    copies.meta = {**node.meta, "val": value.unsqueeze(3).expand(-1, -1, -1, repeat, -1)}
    merged = graph.call_function(reshape, (copies, [0, 0, value.shape[2] * repeat, value.shape[3]]))
    merged.meta = {**node.meta, "val": value.repeat_interleave(repeat, 2)}
    return merged


ATTENDS_ALL, CAUSAL = "nothing", "causal"


class Masks:
    """What the masks of a program do, and their form for the attention kernel, each made once.

    A mask that depends on its inputs through sizes alone is evaluated at the smallest, the example and the largest
    sizes. One that masks nothing is dropped; one that is a lower triangle becomes the flag that kernels have for it.
    """

    def __init__(self, stage: Stage, program: ExportedProgram) -> None:
        self.trials = trials(stage)
        self.constants = _constants(program)
        self.symbols = _symbols(stage, program)
        self.kinds: dict[Node, str] = {}
        self.known: dict[Node, list[Any] | None] = {}
        self.biases: dict[tuple[Node, str, str], tuple[Node, Node | None]] = {}

    def kind(self, mask: Node) -> str:
        """``nothing`` if it masks nothing, ``causal`` for a lower triangle, else ``other``."""
        if mask not in self.kinds:
            self.kinds[mask] = self._kind(mask)
        return self.kinds[mask]

    def _kind(self, mask: Node) -> str:
        moved = mask = branches.origin(mask)
        while moved.op == "call_function" and op_name(moved) in MOVES and isinstance(moved.args[0], Node):
            # Moving the elements of a mask that masks nothing about gives one that masks nothing.
            values = self._values(moved)
            if values is not None:
                break
            moved = branches.origin(moved.args[0])
        values = self._values(moved)
        if values is None:
            return "other"
        if all(bool(value.all()) if value.dtype == torch.bool else not bool(value.any()) for value in values):
            return ATTENDS_ALL
        return CAUSAL if moved is mask and all(_is_lower_triangle(value) for value in values) else "other"

    def bias(self, graph: Graph, mask: Node, query: Node, key: Node) -> tuple[Node, Node | None]:
        """The mask as an additive ``[batch or 1, heads or 1, queries, keys]``, and which rows attend to anything.

        The rows are ``[batch or 1, queries, 1]``, 0 where all is masked: there torch returns 0, while a softmax of
        equal values returns the mean. None for a float mask, whose values torch itself takes as they are.
        """
        sizes = query.meta["val"].shape[2], key.meta["val"].shape[2]
        place = mask, str(sizes[0]), str(sizes[1])
        if place not in self.biases:
            self.biases[place] = self._bias(graph, mask, query, key)
        return self.biases[place]

    def _bias(self, graph: Graph, mask: Node, query: Node, key: Node) -> tuple[Node, Node | None]:
        dtype = query.meta["val"].dtype
        made = mask
        for _ in range(4 - mask.meta["val"].dim()):
            made = _call(graph, aten.unsqueeze.default, made, 0)
        rows = None
        if mask.meta["val"].dtype == torch.bool:
            if made.meta["val"].shape[1] == 1:
                attended = _call(graph, aten.any.dim, made, -1, True)
                rows = _call(graph, aten._to_copy.default, _call(graph, aten.select.int, attended, 1, 0), dtype=dtype)
            value = made.meta["val"]
            bias = graph.call_function(bias_of, (made, dtype))
            bias.meta = {"val": value.to(dtype)}
            made = bias
        elif mask.meta["val"].dtype != dtype:
            made = _call(graph, aten._to_copy.default, made, dtype=dtype)
        lengths = []
        for node, axis in ((query, 2), (key, 3)):
            size = node.meta["val"].shape[2]
            same = str(made.meta["val"].shape[axis]) == str(size)
            lengths.append(-1 if same else size if isinstance(size, int) else _call(graph, aten.sym_size.int, node, 2))
        if lengths != [-1, -1]:
            made = _call(graph, aten.expand.default, made, [-1, -1, *lengths])
        return made, rows

    def _values(self, node: Node) -> list[Any] | None:
        """The tensor at each trial, None where it depends on data or is too large to look at."""
        node = branches.origin(node)
        self._evaluate(node)
        values = self.known[node]
        return values if values and all(isinstance(value, torch.Tensor) for value in values) else None

    def _evaluate(self, node: Node) -> None:
        # By a stack of our own: a chain of nodes may be deeper than Python recurses.
        stack = [node]
        while stack:
            top = stack[-1]
            sources = [branches.origin(n) for n in top.all_input_nodes]
            needed = [] if self._is_size(top) else [n for n in sources if n not in self.known]
            if top in self.known or not needed:
                stack.pop()
                if top not in self.known:
                    self.known[top] = self._evaluated(top)
            elif any(self.known.get(n, True) is None for n in sources):
                self.known[top] = None
            else:
                stack.append(needed[0])

    @staticmethod
    def _is_size(node: Node) -> bool:
        return node.target is aten.sym_size.int

    def _evaluated(self, node: Node) -> list[Any] | None:
        if node.op == "placeholder":
            return [self.constants[node.name]] * len(self.trials) if node.name in self.constants else None
        if self._is_size(node):
            return self._size(node.meta["val"])
        if node.op != "call_function" or _elements(node) > LARGEST_MASK:
            return None
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            return None
        found = [self.known[branches.origin(n)] for n in node.all_input_nodes]
        if any(values is None for values in found):
            return None
        results = []
        for trial in range(len(self.trials)):
            look = {n: values[trial] for n, values in zip(node.all_input_nodes, found, strict=True) if values}
            args = torch.fx.node.map_arg((node.args, node.kwargs), look.__getitem__)
            try:
                results.append(node.target(*args[0], **args[1]))  # type: ignore[operator]
            except (RuntimeError, TypeError, ValueError, IndexError):
                return None
        return results

    def _size(self, value: Any) -> list[Any] | None:
        if isinstance(value, int):
            return [value] * len(self.trials)
        expression = value.node.expr
        sizes = []
        for trial in self.trials:
            known = {s: trial[self.symbols[str(s)]] for s in expression.free_symbols if str(s) in self.symbols}
            result = expression.subs(known)
            if not result.is_Integer:
                return None
            sizes.append(int(result))
        return sizes


LARGEST_MASK = 1 << 28
"""In elements at the largest sizes: what may be evaluated in passing."""

MOVES = (
    "index", "gather", "index_select", "expand", "view", "reshape", "transpose", "permute", "slice", "select",
    "unsqueeze", "squeeze", "clone", "contiguous",
)  # fmt: skip


def trials(stage: Stage) -> list[dict[str, int]]:
    """The sizes of the dynamic dimensions at which a stage is tried: smallest, example, largest."""
    if not stage.ranges:
        return [{}]
    example: dict[str, int] = {}
    for spec, tensor in zip(stage.inputs, stage.example, strict=True):
        example |= {size: tensor.shape[axis] for axis, size in enumerate(spec.shape) if isinstance(size, str)}
    smallest = {name: bounds.minimum for name, bounds in stage.ranges.items()}
    largest = {name: bounds.maximum for name, bounds in stage.ranges.items()}
    found = []
    for sizes in (smallest, {name: example[name] for name in stage.ranges}, largest):
        if sizes not in found:
            found.append(sizes)
    return found


def _elements(node: Node) -> int:
    """An upper estimate by the hints of the example; expanded views take no memory, so this errs on the safe side."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    total = 1
    for size in value.shape:
        total *= size if isinstance(size, int) else 1
    return total


def _is_lower_triangle(value: torch.Tensor) -> bool:
    rows, columns = value.shape[-2:]
    if rows != columns:
        return False
    lower = torch.ones(rows, columns, dtype=torch.bool).tril()
    if value.dtype == torch.bool:
        return bool((value == lower).all())
    open_ = (value == 0) | ~lower
    shut = (value <= MASKED) | lower
    return bool((open_ & shut).all())


MASKED = -1e4
"""An additive mask at or below this leaves a weight of 0 in float32, whatever the scores of a sane model."""


def _constants(program: ExportedProgram) -> dict[str, torch.Tensor]:
    signature = program.graph_signature
    state = {**program.state_dict, **program.constants}
    names = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    found = {node: state.get(name) for node, name in names.items()}
    return {node: value for node, value in found.items() if isinstance(value, torch.Tensor)}


def _symbols(stage: Stage, program: ExportedProgram) -> dict[str, str]:
    """Names of the dynamic dimensions by the symbols that the graph uses for them."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    symbols: dict[str, str] = {}
    for spec, name in zip(stage.inputs, program.graph_signature.user_inputs, strict=True):
        shape = nodes[str(name)].meta["val"].shape
        symbols |= {str(s): size for s, size in zip(shape, spec.shape, strict=True) if isinstance(size, str)}
    return symbols


def _call(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A node with its fake value."""
    node = graph.call_function(target, args, kwargs)
    values = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta = {"val": target(*values[0], **values[1])}
    return node


def bias_of(mask: Any, dtype: Any) -> Any:
    """Target of 0 where a boolean mask is true, and the lowest finite number elsewhere."""
    raise NotImplementedError


# The ONNX side of the targets above, and of ops that torch translates less well


def _onnx_reshape(value: Any, sizes: Sequence[int]) -> Any:
    return op.Reshape(value, op.Constant(value_ints=list(sizes)))


def _onnx_attention(query: Any, key: Any, value: Any, bias: Any, heads: int, scale: float, causal: bool) -> Any:
    inputs = [query, key, value, *([None, None, bias] if bias is not None else [])]
    attributes: dict[str, Any] = {"num_heads": heads, "scale": scale}
    if causal:
        attributes["unidirectional"] = 1
    return _contrib("MultiHeadAttention", inputs, attributes)


def _onnx_appended(
    query: Any, key: Any, value: Any, past_key: Any, past_value: Any, start: Any, positions: Any, cos: Any, sin: Any,
    bias: Any, scale: float, heads: int, groups: int,
) -> Any:  # fmt: skip
    # written for each attention alike, of which engines make one
    tokens = op.Shape(positions, start=1, end=2)
    last = op.Cast(op.Sub(op.Add(start, tokens), op.Constant(value_ints=[1])), to=int(ir.DataType.INT32))
    if bias is None:
        room = op.Add(op.ReduceMax(last, keepdims=0), op.Cast(op.Constant(value_int=1), to=int(ir.DataType.INT32)))
    else:
        room = op.Cast(op.Squeeze(op.Shape(bias, start=3, end=4)), to=int(ir.DataType.INT32))
    inputs = [query, key, value, past_key, past_value, last, room, cos, sin, None if cos is None else positions, bias]
    attributes = {"num_heads": heads, "kv_num_heads": groups, "scale": scale, "do_rotary": int(cos is not None)}
    return _made("GroupQueryAttention", inputs, attributes, CONTRIB, 3)


def _contrib(name: str, inputs: Sequence[Any], attributes: dict[str, Any]) -> Any:
    """A node of ONNX Runtime's own domain, whose schemas onnxscript does not know."""
    (made,) = _made(name, inputs, attributes, CONTRIB, 1)
    return made


def _made(name: str, inputs: Sequence[Any], attributes: dict[str, Any], domain: str, outputs: int) -> list[Any]:
    """A node of so many outputs."""
    recorder = onnxscript.evaluator.default()
    made = [_tensors.SymbolicTensor(recorder.opset) for _ in range(outputs)]
    recorder.nodes.append(ir.node(name, inputs, attributes, domain=domain, outputs=made))
    return made


def _onnx_split(value: Any, sizes: Sequence[Any], axis: int = 0) -> Any:
    # torch's translation makes a sequence of the parts, which TensorRT does not take
    if all(isinstance(size, int) for size in sizes):
        lengths = op.Constant(value_ints=list(sizes))
    else:
        one = op.Constant(value_ints=[1])
        lengths = op.Concat(*(op.Reshape(size, one) for size in sizes), axis=0)
    return _made("Split", [value, lengths], {"axis": axis}, "", len(sizes))


def _onnx_bias_of(mask: Any, dtype: int) -> Any:
    lowest = next(low for kept, low in LOWEST.items() if _core.torch_dtype_to_onnx_dtype(kept) == dtype)
    zero, low = (op.Cast(op.Constant(value_float=x), to=int(dtype)) for x in (0.0, lowest))
    return op.Where(mask, zero, low)


def _onnx_rows_of(value: Any, rows: Any) -> Any:
    return op.GatherND(value, op.Unsqueeze(rows, op.Constant(value_ints=[2])), batch_dims=1)


def _onnx_count_of(mask: Any, axes: Sequence[int], keep: bool) -> Any:
    ones = op.Cast(mask, to=int(ir.DataType.FLOAT))
    total = op.ReduceSum(ones, op.Constant(value_ints=list(axes)), keepdims=int(keep))
    return op.Cast(total, to=int(ir.DataType.INT64))


def _onnx_grouped_mm(value: Any, weight: Any, ends: Any) -> Any:
    """Rows in groups, each times the matrix of its group: ``ends`` is where each group ends."""
    ends = op.Cast(ends, to=int(ir.DataType.INT64))
    parts, start = [], op.Constant(value_ints=[0])
    for group in range(int(weight.shape[0])):
        end = op.Slice(ends, op.Constant(value_ints=[group]), op.Constant(value_ints=[group + 1]))
        rows = op.Slice(value, start, end, op.Constant(value_ints=[0]))
        parts.append(op.MatMul(rows, op.Gather(weight, op.Constant(value_int=group), axis=0)))
        start = end
    return op.Concat(*parts, axis=0)


def _onnx_cond(predicate: Any, then: ir.Function, otherwise: ir.Function, operands: Sequence[Any]) -> Any:
    rank, dtype = len(predicate.shape), predicate.dtype
    if dtype != ir.DataType.BOOL:
        predicate = op.Cast(predicate, to=int(ir.DataType.BOOL))
    if rank:
        predicate = op.Squeeze(predicate)
    for function in (then, otherwise):
        branches.close(function)
    return higher_order_cond(predicate, then, otherwise, operands)


def _onnx_linear(value: Any, weight: Any, bias: Any = None) -> Any:
    product = op.MatMul(value, op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def _onnx_gelu(value: Any, approximate: str = "none") -> Any:
    # As one node: engines find the form in erf that torch writes only where constants are initializers.
    return _contrib("Gelu" if approximate == "none" else "FastGelu", [value], {})


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    reshape: _onnx_reshape,
    attention: _onnx_attention,
    appended: _onnx_appended,
    branches.COND: _onnx_cond,
    bias_of: _onnx_bias_of,
    rows_of: _onnx_rows_of,
    count_of: _onnx_count_of,
    aten.linear.default: _onnx_linear,
    aten.split_with_sizes.default: _onnx_split,
    aten.gelu.default: _onnx_gelu,
}
"""By target of a node; what is not here is torch's business."""

OF_LIBRARIES: dict[str, Callable[..., Any]] = {"transformers::grouped_mm_fallback": _onnx_grouped_mm}
"""The same for ops that other libraries register when they are imported, by name."""


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


@dataclass(frozen=True)
class Work:
    """How much rounding a stage does: contractions in a row, at most, and the longest sum in one of them."""

    contractions: int
    longest: int


def work(stage: Stage) -> Work:
    """Count the contractions of a stage; an upper estimate of those on one path."""
    count, longest = 0, 1
    for node in branches.nodes(stage.exported.graph_module):
        if node.op != "call_function" or op_name(node) not in CONTRACTIONS:
            continue
        count += 1
        weight = node.args[CONTRACTIONS[op_name(node)]]
        shape = weight.meta["val"].shape if isinstance(weight, Node) else ()
        sizes = [size if isinstance(size, int) else 1 for size in shape]
        if op_name(node).startswith("conv"):
            longest = max(longest, functools.reduce(int.__mul__, sizes[1:], 1))
        elif sizes:
            longest = max(longest, sizes[-1] if op_name(node) in LAST_SUMMED else sizes[0])
    return Work(max(count, 1), longest)


CONTRACTIONS = {
    "linear": 1, "matmul": 1, "bmm": 1, "mm": 1, "addmm": 2, "baddbmm": 2, "conv1d": 1, "conv2d": 1, "conv3d": 1,
    "convolution": 1, "scaled_dot_product_attention": 1, "append_attention": 1, "einsum": 0,
}  # fmt: skip
"""Ops that sum products, and the argument whose shape says how many."""

LAST_SUMMED = ("linear", "scaled_dot_product_attention", "append_attention")
