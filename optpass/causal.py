"""What a causal language model must show before its keys and values may be cached.

Nothing is known by name. What depends on sizes alone is evaluated at several lengths: a mask that shows each query the
tokens up to itself, or a window of them, is causal whatever wrote it; a value that a longer text only continues, such
as a rotary table or rows of a position embedding, is a table of positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from optpass.errors import Refusal
from optpass.layout import same
from optpass.program import Stage, TensorSpec, op_name, place_of
from optpass.rewrite import MASKED_OUT, Refused
from optpass.structure import Attention, Structure, analyse, evaluate, valued

LONGEST = 2048
"""The longest text at which a mask is evaluated: it is a square."""


@dataclass(frozen=True)
class Visible:
    """What a query at position ``i`` sees of a key at ``j <= i``.

    Attributes:
        window: only those with ``i - j < window``; None for all.
        slopes: for each head, ``slope * (j - i)`` is added to the logits; None for nothing.
    """

    window: int | None = None
    slopes: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Cached:
    """An attention, and the tensors whose rows are kept.

    Attributes:
        node: ``scaled_dot_product_attention`` in the graph.
        key, value: before they are repeated for the query heads, if they are: ``[batch, key heads, tokens, head_dim]``,
            or ``[batch * heads, tokens, head_dim]``.
        scale: factor of the logits.
        group: attentions of one group keep rows of the same tokens.
    """

    node: Node
    key: Node
    value: Node
    scale: float
    visible: Visible
    group: int = 0


@dataclass(frozen=True)
class Table:
    """A value by position: tokens along ``dim``, as many as the context holds, and one sample."""

    rows: Tensor
    dim: int


@dataclass(frozen=True)
class Causal:
    """A stage that may be run a few tokens at a time.

    Attributes:
        stage: its only input is ids ``[batch, tokens]``; a padding mask and positions among the inputs are gone.
        structure: of that stage.
        context: the most tokens of a text.
        tables: what depends on positions alone.
        head: what the last projection reads, ``[batch, tokens, features]``; None where nothing of the kind ends it.
    """

    stage: Stage
    structure: Structure
    context: int
    attentions: tuple[Cached, ...]
    tables: Mapping[Node, Table]
    head: Node | None

    @property
    def ids(self) -> TensorSpec:
        """The input."""
        return self.stage.inputs[0]


def analyse_causal(stage: Stage) -> Causal | Refusal:
    """Find what there is to cache, or say why it cannot be."""
    try:
        return _Analysis(_of_ids(stage)).run()
    except Refused as refused:
        return refused.refusal


# inputs


def _of_ids(stage: Stage) -> Stage:
    """The stage with token ids as its only input: padding and positions are the business of who runs it."""
    kinds = [_kind(spec, tensor) for spec, tensor in zip(stage.inputs, stage.example, strict=True)]
    for spec, kind in zip(stage.inputs, kinds, strict=True):
        if kind is None:
            what = f"input {spec.name} is neither token ids, nor positions, nor a mask for padding"
            raise Refused(Refusal("cache-input", what, "capture the model with its token ids alone"))
    if kinds.count("ids") != 1:
        what = f"{kinds.count('ids')} of the inputs are token ids"
        raise Refused(Refusal("cache-input", what, "capture the model with its token ids alone"))
    place = kinds.index("ids")
    shape = stage.inputs[place].shape
    if not isinstance(shape[1], str):
        what = f"the number of tokens is fixed to {shape[1]}"
        raise Refused(
            Refusal("not-dynamic", what, f"declare it: --dynamic {stage.inputs[place].name}:1=tokens:2..2048")
        )
    if len(kinds) == 1:
        return stage
    graph = Graph()
    new: dict[Node, Node] = {}
    graph.output(graph.graph_copy(stage.module.graph, new))
    inputs = [new[node] for node in stage.module.graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        for node, kind, tensor in zip(inputs, kinds, stage.example, strict=True):
            if kind != "ids":
                made = graph.call_function(_MADE[str(kind)], (inputs[place], tensor.dtype))
                node.replace_all_uses_with(made)
                graph.erase_node(node)
    ranges = {name: range_ for name, range_ in stage.ranges.items() if name in shape}
    fewer = replace(stage, inputs=(stage.inputs[place],), example=(stage.example[place],), ranges=ranges)
    return fewer.retraced(GraphModule(stage.module, graph))


def _kind(spec: TensorSpec, tensor: Tensor) -> str | None:
    """``ids``, ``positions`` or ``padding``, by the values of the example; None for anything else."""
    if tensor.dim() != 2:
        return None
    if bool(((tensor == 0) | (tensor == 1)).all()):
        return "padding"
    if tensor.is_floating_point():
        return None
    return "positions" if bool((tensor == torch.arange(tensor.shape[1])).all()) else "ids"


def _unpadded(ids: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ones(ids.shape[0], ids.shape[1], dtype=dtype)


def _counted(ids: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.arange(ids.shape[1], dtype=dtype).unsqueeze(0).expand(ids.shape[0], -1)


_MADE = {"padding": _unpadded, "positions": _counted}


class _Analysis:
    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.structure = analyse(stage)
        self.nodes = list(self.structure.module.graph.nodes)
        self.valued = valued(self.structure.module)
        self.batch, self.tokens = next(n for n in self.nodes if n.op == "placeholder").meta["val"].shape
        self.name = str(stage.inputs[0].shape[1])
        self.context = stage.ranges[self.name].maximum

    def run(self) -> Causal:
        towers = self.structure.towers
        attentions = [a for tower in towers for block in tower.blocks for a in block.attentions]
        attentions += [attention for attention, _ in self.structure.unplaced]
        if not attentions:
            raise Refused(Refusal("no-attention", "no attention was found", "see optpass inspect for what was found"))
        order = {node: i for i, node in enumerate(self.nodes)}
        attentions.sort(key=lambda attention: order[attention.node])
        for attention in attentions:
            self._check(attention)
        seen = self._visible([a.mask for a in attentions if a.mask is not None])
        cached = tuple(self._cached(a, seen) for a in attentions)
        tables = self._tables({attention.node for attention in attentions})
        return Causal(self.stage, self.structure, self.context, cached, tables, self._head())

    def _check(self, attention: Attention) -> None:
        node = attention.node
        if op_name(node) != "scaled_dot_product_attention":
            what = "something acts on the scores of this attention beside a mask"
            raise Refused(Refusal("cache-attention", what, "this form cannot be cached yet", place_of(node)))
        if attention.cross or not same(attention.key.meta["val"].shape[-2], self.tokens):
            what = "the keys of this attention are not those of the text"
            raise Refused(Refusal("cache-attention", what, "cache takes decoder-only models", place_of(node)))
        if attention.mask in self.valued:
            what = "the mask of this attention depends on the text itself"
            raise Refused(Refusal("cache-mask", what, "give the mask as an input, or leave it out", place_of(node)))
        if not attention.causal:
            what = "this attention lets tokens see later ones"
            raise Refused(Refusal("not-causal", what, "only a causal model can be cached", place_of(node)))

    # masks

    def _visible(self, masks: Sequence[Node]) -> dict[Node, Visible]:
        """What each mask shows: read off the longest text, and held against shorter ones."""
        masks = list(dict.fromkeys(masks))
        longest = min(self.context, LONGEST)
        found: dict[Node, Visible] = {}
        for length in (longest, *self._shorter(longest)):
            values = self._at(length, masks)
            for mask in masks:
                scores = _scores(values[mask], length)
                if mask not in found:
                    found[mask] = _read(scores)
                expected = _expected(found[mask], len(scores), length)
                if not torch.allclose(scores, expected, rtol=1e-4, atol=1e-3):
                    what = "this mask is neither causal, nor a sliding window, nor linear in the distance (ALiBi)"
                    raise Refused(Refusal("cache-mask", what, "this form cannot be cached yet", place_of(mask)))
        return found

    def _shorter(self, longest: int) -> list[int]:
        least = self.stage.ranges[self.name].minimum
        return sorted({max(least, min(n, longest)) for n in (least, least + 1, 7, longest // 3, longest - 1)})

    def _at(self, length: int, wanted: Sequence[Node]) -> dict[Node, Tensor]:
        smallest = {name: range_.minimum for name, range_ in self.stage.ranges.items()}
        inputs = self.stage.resized({**smallest, self.name: length})
        return evaluate(self.structure.module, inputs, wanted)

    # attention

    def _cached(self, attention: Attention, seen: Mapping[Node, Visible]) -> Cached:
        visible = seen[attention.mask] if attention.mask is not None else Visible()
        key, value = (self._unrepeated(n) for n in (attention.key, attention.value))
        scale = attention.node.kwargs.get("scale")
        head_dim = int(attention.query.meta["val"].shape[-1])
        factor = float(scale) if isinstance(scale, int | float) else 1 / math.sqrt(head_dim)
        return Cached(attention.node, key, value, factor, visible)

    def _unrepeated(self, node: Node) -> Node:
        """Keys before each head is repeated for its group of query heads: ``[b, h, t, d]`` to ``[b, h * g, t, d]``."""
        at: Node = node
        while op_name(at) in ("reshape", "expand", "unsqueeze") and isinstance(at.args[0], Node):
            at = at.args[0]
        shapes = [n.meta["val"].shape for n in (at, node)]
        if at is node or any(len(shape) != 4 for shape in shapes):
            return node
        (_, few, rows, width), (_, heads, tokens, last) = shapes
        grouped = isinstance(few, int) and isinstance(heads, int) and heads % few == 0
        return at if grouped and same(rows, tokens) and same(width, last) else node

    def _head(self) -> Node | None:
        """The input of the projection to the vocabulary, behind which each token is on its own."""
        results: Any = self.nodes[-1].args[0]
        if len(results) != 1:
            return None
        at: Any = results[0]
        while isinstance(at, Node) and at in self.valued and at.op == "call_function":
            source: Any = at.args[0]
            if op_name(at) == "linear":
                shape = source.meta["val"].shape
                return source if len(shape) == 3 and same(shape[1], self.tokens) else None
            if not isinstance(at.target, torch._ops.OpOverload) or torch.Tag.pointwise not in at.target.tags:
                return None
            at = source
        return None

    # positions

    def _tables(self, attentions: set[Node]) -> dict[Node, Table]:
        """What depends on sizes alone and meets the text, beside masks."""
        wanted: list[Node] = []
        for node in self.nodes:
            users = [u for u in node.users if u in self.valued and not (u in attentions and node is _mask_of(u))]
            sized = node.op == "call_function" and node not in self.valued
            if sized and users and isinstance(node.meta.get("val"), Tensor):
                wanted.append(node)
        longest = self._at(self.context, wanted)
        tables = {}
        for node in wanted:
            dims = [d for d, size in enumerate(node.meta["val"].shape) if not isinstance(size, int)]
            dims = [d for d in dims if not same(node.meta["val"].shape[d], self.batch)]
            if len(dims) > 1 or any(not same(node.meta["val"].shape[d], self.tokens) for d in dims):
                what = "a value that depends on the length of the text alone is no table of positions"
                raise Refused(Refusal("cache-position", what, "this form cannot be cached yet", place_of(node)))
            if dims:
                tables[node] = Table(longest[node], dims[0])
        for length in self._shorter(self.context):
            for node, short in self._at(length, wanted).items():
                whole = longest[node]
                if node in tables:
                    whole = whole.narrow(tables[node].dim, 0, length)
                if not torch.allclose(whole.double(), short.double(), rtol=1e-6, atol=1e-6):
                    what = "a value for a position changes with the length of the text"
                    raise Refused(Refusal("cache-position", what, "this form cannot be cached yet", place_of(node)))
        return {node: replace(table, rows=self._of_one(node, table.rows)) for node, table in tables.items()}

    def _of_one(self, node: Node, rows: Tensor) -> Tensor:
        """A table without copies of itself for each sample."""
        for dim, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, int) and same(size, self.batch):
                rows = rows.narrow(dim, 0, 1)
        return rows.clone()


def _mask_of(node: Node) -> Any:
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")


def _scores(mask: Tensor, length: int) -> Tensor:
    """A mask of one sample as what is added to logits, ``[heads, rows, columns]``, each row less its own diagonal."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    square = mask.double().reshape(-1, *mask.shape[-2:])
    if square.shape[-2] == 1:
        square = square.expand(-1, length, -1)
    hidden = square <= MASKED_OUT
    below = square - square.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    return below.masked_fill(hidden, -torch.inf)


def _read(scores: Tensor) -> Visible:
    """The form that a mask seems to have, by its last row and the distance of one."""
    seen = int(scores[0, -1].isfinite().sum())
    length = scores.shape[-1]
    slopes = -scores[:, -1, -2] if length > 1 and bool(scores[:, -1, -2].isfinite().all()) else scores.new_zeros(1)
    sloped = bool((slopes != 0).any())
    return Visible(seen if seen < length else None, tuple(slopes.tolist()) if sloped else None)


def _expected(visible: Visible, heads: int, length: int) -> Tensor:
    """What a mask of a form looks like."""
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    hidden = distance < 0
    if visible.window is not None:
        hidden = hidden | (distance >= visible.window)
    slopes = torch.tensor(visible.slopes or [0.0] * heads, dtype=torch.float64)
    return (-slopes.view(-1, 1, 1) * distance).masked_fill(hidden, -torch.inf)
