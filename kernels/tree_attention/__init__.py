"""Attention of the nodes of a tree over kept rows and over each other: the op ``optpass::tree_attention``.

Paper: SpecInfer, arXiv 2305.09781, section 4.2; the softmax in pieces is that of Flash-Decoding.
"""

from __future__ import annotations

from typing import Any

from optpass.kernels.base import FLOATS, Checker, Kernel, shape_of
from optpass.kernels.tree_attention import reference


def _check(query: Any, key: Any, value: Any, past_key: Any, past_value: Any, bias: Any, scale: Any) -> None:
    check = Checker("tree_attention")
    check.tensor("past_key", past_key, (None, None, None, None), FLOATS)
    batch, groups, past, width = shape_of(past_key)
    check.tensor("past_value", past_value, (batch, groups, past, None), FLOATS)
    depth = shape_of(past_value)[3]
    folded = len(shape_of(query)) == 3
    lead = (None,) if folded else (batch, None)
    check.tensor("query", query, (*lead, None, width), FLOATS)
    tokens = shape_of(query)[-2]
    rows = _times(batch, groups)
    check.tensor("key", key, (rows, tokens, width) if folded else (batch, groups, tokens, width), FLOATS)
    check.tensor("value", value, (rows, tokens, depth) if folded else (batch, groups, tokens, depth), FLOATS)
    check.alike(query=query, key=key, value=value, past_key=past_key, past_value=past_value)
    heads, shared = shape_of(query)[0 if folded else 1], rows if folded else groups
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        what = f"got {heads} heads of queries and {shared} of keys"
        raise check.fail(what, "pass a number of heads that is a multiple of those of keys")
    columns = past + tokens if isinstance(past, int) and isinstance(tokens, int) else None
    check.tensor("bias", bias, (None, None, tokens, columns), FLOATS)
    wanted = None if folded else heads
    for name, size, whole in zip(("batch", "heads"), shape_of(bias), (batch, wanted), strict=False):
        if isinstance(size, int) and isinstance(whole, int) and size not in (1, whole):
            raise check.fail(f"got bias of shape {list(shape_of(bias))}", f"pass one with {name} of 1 or {whole}")


def _times(a: Any, b: Any) -> Any:
    return a * b if isinstance(a, int) and isinstance(b, int) else None


def _meta(query: Any, key: Any, value: Any, past_key: Any, past_value: Any, bias: Any, scale: Any) -> Any:
    return query.new_empty((*query.shape[:-1], past_value.shape[-1]))


tree_attention = Kernel(
    "tree_attention",
    reference=reference.attend,
    check=_check,
    meta=_meta,
    launcher="optpass.kernels.tree_attention.triton:attend",
)
