"""Translations of targets of our own, and of ops that torch translates less well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from onnxscript import opset18 as op
from torch.onnx._internal.exporter import _core, _tensors
from torch.onnx._internal.exporter._torchlib.ops.hop import higher_order_cond

from optpass.export import branches
from optpass.export.attention import LOWEST, appended, attention
from optpass.export.masks import bias_of
from optpass.export.spelling import count_of, reshape, rows_of

aten = torch.ops.aten

CONTRIB = "com.microsoft"


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


def _onnx_clamp(value: Any, low: Any = None, high: Any = None) -> Any:
    # torch's translation casts the limits, which ONNX Runtime does in each call
    limits = [limit if limit is None else _of_type(limit, value) for limit in (low, high)]
    return op.Identity(value) if limits == [None, None] else op.Clip(value, *limits)


def _of_type(number: Any, value: Any) -> Any:
    """A number as a tensor of the type of another one."""
    if not isinstance(number, int | float):
        return op.CastLike(number, value)
    return op.Constant(value=ir.tensor(number, dtype=value.dtype))


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
    aten.clamp.default: _onnx_clamp,
    aten.linear.default: _onnx_linear,
    aten.split_with_sizes.default: _onnx_split,
    aten.gelu.default: _onnx_gelu,
}
"""By target of a node; what is not here is torch's business."""

OF_LIBRARIES: dict[str, Callable[..., Any]] = {"transformers::grouped_mm_fallback": _onnx_grouped_mm}
"""The same for ops that other libraries register when they are imported, by name."""
