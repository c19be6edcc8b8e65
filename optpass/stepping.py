"""The step: a causal stage made to continue a text whose keys and values are kept outside of it.

The graph is the captured one. It takes the tokens that are new, and where its positions and its attention looked at
the whole text, it now looks at the text so far as well: tables are read at the tokens' positions, and each attention
scores the kept keys beside the new ones. Kept rows are never copied: two products take the place of one product of a
concatenation. What is kept lies wherever there is room, each row with its position; a row with a negative one is empty.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from optpass.causal import Cached, Causal
from optpass.kernels.tree_attention import tree_attention
from optpass.kernels.tree_attention.reference import unfolded
from optpass.layout import same
from optpass.program import Range, Stage, TensorSpec
from optpass.rewrite import Rewritten
from optpass.runtime.kept import DEPTH, PAST_POSITION, PICK, PIECE, PLACE, POSITION, TREE
from optpass.runtime.manifest import PREFILL, STEP
from optpass.structure import hint, valued

BATCH, TOKENS, PAST, PICKED = "batch", "tokens", "past_", "picked"
"""Dynamic dimensions of a step: texts, new tokens of each, rows that a group keeps, tokens whose outputs are wanted."""

Finish = Callable[[Graph, Mapping[str, Node], dict[str, Node]], None]
"""Called with the graph, its inputs and its outputs by name; it may change the outputs."""

HIDDEN = -1e30
"""What is added to the logits of a key that is not seen; finite, so that a row of nothing but such is no NaN."""


def past_name(kind: str, number: int) -> str:
    """Name of the input that holds the kept ``key`` or ``value`` of an attention."""
    return f"past_{kind}_{number}"


def step(causal: Causal, *, tree: bool = False, finish: Finish | None = None) -> Stage:
    """The stage that continues a text.

    Args:
        causal: what analysis found.
        tree: the new tokens are nodes of a tree, not one after the other.
        finish: adds to what the step returns.

    Returns:
        A stage ``step``: ids, the inputs of ``optpass.runtime.kept``, and for each attention the kept ``past_key_N``
        and ``past_value_N`` ``[batch, key heads, past, head_dim]``; it returns the outputs of the model for the picked
        tokens, or for all where nothing can be picked, and the new rows ``key_N`` and ``value_N``
        ``[batch, key heads, tokens, head_dim]``.
    """
    made = _Step(causal, tree)
    outputs = made.outputs()
    if finish is not None:
        finish(made.graph, made.inputs, outputs)
    made.graph.output(tuple(outputs.values()))
    made.graph.eliminate_dead_code()
    module = GraphModule(made.attributes(), made.graph)
    return _traced(causal, module, list(outputs), made.inputs)


class _Step:
    def __init__(self, causal: Causal, tree: bool) -> None:
        self.causal = causal
        self.graph = Graph()
        self.new: dict[Node, Node] = {}
        self.constants: dict[str, Tensor] = {}
        self.read: dict[tuple[Node, int, int], Node] = {}
        self.biases: dict[Any, Node] = {}
        self.rows: dict[tuple[Node, Node], int] = {}
        self.kept: list[tuple[Node, Node]] = []
        old = self.causal.structure.module.graph
        self.valued = valued(causal.structure.module)
        self.by_node = {cached.node: cached for cached in causal.attentions}
        (ids,) = (node for node in old.nodes if node.op == "placeholder")
        self.batch, self.tokens = ids.meta["val"].shape
        self.ids = self.graph.node_copy(ids)
        self.new[ids] = self.ids
        self.inputs = {causal.ids.name: self.ids}
        groups = [f"{PAST_POSITION}{group}" for group in sorted({cached.group for cached in causal.attentions})]
        for name in (POSITION, *groups, *([PICK] if causal.head else []), *([TREE, DEPTH] if tree else [])):
            self.inputs[name] = self.graph.placeholder(name)
        for number, (_, pair) in enumerate(kept(causal)):
            self.rows[pair] = number
            past = [self.graph.placeholder(past_name(kind, number)) for kind in ("key", "value")]
            self.kept.append((past[0], past[1]))
            self.inputs |= {str(node.target): node for node in past}
        self.depth = self.inputs[DEPTH] if tree else self.graph.call_function(_depth, (self.ids,))
        limit = causal.context - 1
        self.positions = self.graph.call_function(_positions, (self.inputs[POSITION], self.depth, limit))

    def outputs(self) -> dict[str, Node]:
        """Emit the graph; the outputs by name."""
        graph = self.causal.structure.module.graph
        node: Node
        for node in graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            made = self._emitted(node)
            if node is self.causal.head:
                made = self._on_behalf(self.graph.call_function(_picked, (made, self.inputs[PICK])), node)
            self.new[node] = made
        returned: Any = graph.output_node().args[0]
        names = (spec.name for spec in self.causal.stage.outputs)
        results = {name: self.new[node] for name, node in zip(names, returned, strict=True)}
        for (key, value), number in self.rows.items():
            results[f"key_{number}"] = self._apart(key)
            results[f"value_{number}"] = self._apart(value)
        return results

    def _emitted(self, node: Node) -> Node:
        if node in self.by_node:
            return self._attention(node)
        if node not in self.valued or not any(source in self.causal.tables for source in node.all_input_nodes):
            return self.graph.node_copy(node, self.new.__getitem__)
        here = {
            source: self._at_positions(source, node) for source in node.all_input_nodes if source in self.causal.tables
        }
        return self.graph.node_copy(node, lambda n: here.get(n, self.new[n]))

    def _on_behalf(self, made: Node, origin: Node) -> Node:
        made.meta |= {name: origin.meta[name] for name in ("nn_module_stack", "stack_trace") if name in origin.meta}
        return made

    # positions

    def _at_positions(self, source: Node, user: Node) -> Node:
        """A table as an operand of ``user``, read at the positions of the new tokens."""
        table = self.causal.tables[source]
        rank = source.meta["val"].dim()
        width = max(user.meta["val"].dim(), rank)
        shape = [1] * (width - rank) + list(source.meta["val"].shape)
        # the table's own dimension of the batch, if it was expanded to it, or else that of the result
        sizes = [(d, size) for d, size in enumerate(shape) if not isinstance(size, int)]
        sizes += list(enumerate(user.meta["val"].shape))
        batch = next((d for d, size in sizes if same(size, self.batch)), 0)
        key = (source, batch, width)
        if key not in self.read:
            name = f"table_{len(self.constants)}"
            self.constants[name] = table.rows.reshape([1] * (width - rank) + list(table.rows.shape))
            rows = self.graph.get_attr(name)
            made = self.graph.call_function(_rows, (rows, self.positions, batch, table.dim + width - rank))
            self.read[key] = self._on_behalf(made, source)
        return self.read[key]

    # attention

    def _attention(self, node: Node) -> Node:
        cached = self.by_node[node]
        past = self.kept[self.rows[cached.key, cached.value]]
        bias = self._bias(cached)
        query: Any = node.args[0]
        new = (self.new[n] for n in (query, cached.key, cached.value))
        made = self.graph.call_function(tree_attention, (*new, *past, bias, cached.scale))
        return self._on_behalf(made, node)

    def _bias(self, cached: Cached) -> Node:
        """What is added to the logits, ``[batch, heads or 1, tokens, past + tokens]``; one for all alike."""
        visible, past = cached.visible, self.inputs[f"{PAST_POSITION}{cached.group}"]
        key = (visible, cached.group)
        if key not in self.biases:
            args = (self.positions, self.depth, past, self.inputs.get(TREE), visible.window)
            made = self.graph.call_function(_bias, args)
            if visible.slopes is not None:
                made = self.graph.call_function(_slope, (made, self.positions, past, list(visible.slopes)))
            self.biases[key] = made
        return self.biases[key]

    def _apart(self, node: Node) -> Node:
        """Rows ``[batch, heads, tokens, head_dim]``, also of an attention that has batch and heads in one."""
        if node.meta["val"].dim() == 4:
            return self.new[node]
        return self.graph.call_function(unfolded, (self.new[node], self.ids))

    def attributes(self) -> dict[str, Any]:
        """What the graph reads by name."""
        old = self.causal.structure.module
        names = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        return {n: self.constants[n] if n in self.constants else operator.attrgetter(n)(old) for n in sorted(names)}


# what is called in the graph, taken apart when it is traced


def _depth(ids: Tensor) -> Tensor:
    """How many new tokens come before each, ``[1, tokens]``."""
    return torch.arange(ids.shape[1]).unsqueeze(0)


def _positions(position: Tensor, depth: Tensor, limit: int) -> Tensor:
    # what pads a shorter text may lie beyond the tables
    return (position.unsqueeze(1) + depth).clamp(max=limit)


def _rows(table: Tensor, positions: Tensor, batch: int, tokens: int) -> Tensor:
    """Rows of a table ``[.., 1 at batch, .., context at tokens, ..]`` at ``positions [batch, tokens]``."""
    rows = table.squeeze(batch).movedim(tokens - (batch < tokens), 0)[positions]
    order = [d for d in range(2, rows.dim())]
    for dim, place in sorted(((batch, 0), (tokens, 1))):
        order.insert(dim, place)
    return rows.permute(order)


def _bias(positions: Tensor, depth: Tensor, past: Tensor, tree: Tensor | None, window: int | None) -> Tensor:
    before = (past >= 0).unsqueeze(1).expand(-1, positions.shape[1], -1)
    among = (
        tree if tree is not None else (depth.unsqueeze(-1) >= depth.unsqueeze(-2)).expand(positions.shape[0], -1, -1)
    )
    if window is not None:
        before = before & (positions.unsqueeze(-1) - past.unsqueeze(-2) < window)
        among = among & (depth.unsqueeze(-1) - depth.unsqueeze(-2) < window)
    seen = torch.cat([before, among], -1).unsqueeze(1)
    return torch.where(seen, 0.0, HIDDEN)


def _slope(bias: Tensor, positions: Tensor, past: Tensor, slopes: list[float]) -> Tensor:
    keys = torch.cat([past, positions], 1).unsqueeze(1) - positions.unsqueeze(-1)
    return bias + torch.tensor(slopes).view(-1, 1, 1) * keys.unsqueeze(1)


def _picked(stream: Tensor, pick: Tensor) -> Tensor:
    return stream.gather(1, pick.unsqueeze(-1).expand(-1, -1, stream.shape[-1]))


# tracing


def _traced(causal: Causal, module: GraphModule, outputs: list[str], inputs: dict[str, Node]) -> Stage:
    example = _example(causal, list(inputs))
    batch = causal.ids.shape[0]
    shapes: dict[str, tuple[int | str, ...]] = {
        causal.ids.name: (BATCH, TOKENS),
        POSITION: (BATCH,),
        PICK: (BATCH, PICKED),
        TREE: (BATCH, TOKENS, TOKENS),
        DEPTH: (BATCH, TOKENS),
    }
    for number, (cached, _) in enumerate(kept(causal)):
        for kind in ("key", "value"):
            name = past_name(kind, number)
            _, heads, _, width = example[name].shape
            shapes[name] = (BATCH, heads, f"{PAST}{cached.group}", width)
        shapes[f"{PAST_POSITION}{cached.group}"] = (BATCH, f"{PAST}{cached.group}")
    if isinstance(batch, int):
        shapes = {name: (batch, *shape[1:]) for name, shape in shapes.items()}
    specs = [TensorSpec(n, str(t.dtype).removeprefix("torch."), shapes[n]) for n, t in example.items()]
    used = {size for spec in specs for size in spec.shape if isinstance(size, str)}
    few, long = Range(1, min(PIECE, causal.context)), Range(1, causal.context)
    ranges = {name: long if name.startswith(PAST) else few for name in sorted(used - {BATCH})}
    if isinstance(batch, str):
        ranges[BATCH] = causal.stage.ranges[batch]
    unknown = tuple(TensorSpec(name, "float32", ()) for name in outputs)
    stage = Stage(STEP, causal.stage.exported, tuple(specs), unknown, tuple(example.values()), ranges)
    return stage.retraced(module)


def grouped(causal: Causal, groups: Sequence[int]) -> Causal:
    """The same with the group of each pair of ``kept``, in order."""
    number = {pair: group for (_, pair), group in zip(kept(causal), groups, strict=True)}
    attentions = tuple(replace(c, group=number[c.key, c.value]) for c in causal.attentions)
    return replace(causal, attentions=attentions)


def prefill(causal: Causal, rewritten: Rewritten) -> Stage:
    """The stage that takes a whole prompt, of which passes drop tokens on the way.

    It returns the outputs of the model, then the rows to keep of each attention, as ``step`` does, and for each group
    ``place_G``, int64 ``[batch, rows]``, the tokens of the prompt that these are.
    """
    pairs = kept(causal)
    names = [spec.name for spec in causal.stage.outputs]
    names += [f"{kind}_{number}" for number in range(len(pairs)) for kind in ("key", "value")]
    names += [f"{PLACE}{group}" for group in range(max(rewritten.levels) + 1)]
    stage = replace(causal.stage, name=PREFILL, outputs=tuple(TensorSpec(name, "", ()) for name in names))
    ranks = [node.meta["val"].dim() for _, pair in pairs for node in pair]
    return stage.retraced(rewritten.module if set(ranks) == {4} else _Apart(rewritten.module))


class _Apart(torch.nn.Module):
    """Rows of attentions that have batch and heads in one, ``[batch, heads, tokens, head_dim]``."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        first, *rest = self.module(ids)
        return (first, *(unfolded(x, ids) if x.dim() == 3 else x for x in rest))


def kept(causal: Causal) -> list[tuple[Cached, tuple[Node, Node]]]:
    """The pairs of key and value that are kept, each with the first attention that reads it."""
    found: dict[tuple[Node, Node], Cached] = {}
    for cached in causal.attentions:
        found.setdefault((cached.key, cached.value), cached)
    return [(cached, pair) for pair, cached in found.items()]


def _example(causal: Causal, names: list[str]) -> dict[str, Tensor]:
    """Inputs in the middle of a text: 3 new tokens on 4 kept rows of noise, of which a second text has 3."""
    ids = causal.stage.example[0]
    batch, past, new = len(ids), 4, min(3, ids.shape[1])
    generator = torch.Generator().manual_seed(0)
    filled = past - torch.arange(batch) % 2
    position = torch.arange(past).expand(batch, -1)
    found = {
        causal.ids.name: ids[:, :new],
        POSITION: filled,
        PICK: torch.arange(new).expand(batch, -1).clone(),
        TREE: torch.ones(batch, new, new, dtype=torch.bool).tril(),
        DEPTH: torch.arange(new).expand(batch, -1).clone(),
    }
    for number, (cached, nodes) in enumerate(kept(causal)):
        found[f"{PAST_POSITION}{cached.group}"] = position.masked_fill(position >= filled.unsqueeze(1), -1)
        for kind, node in zip(("key", "value"), nodes, strict=True):
            value = node.meta["val"]
            heads = value.shape[1] if value.dim() == 4 else hint(value.shape[0]) // batch
            shape = (batch, int(heads), past, int(value.shape[-1]))
            found[past_name(kind, number)] = torch.randn(shape, generator=generator, dtype=value.dtype)
    return {name: found[name] for name in names}


__all__ = ["grouped", "kept", "past_name", "prefill", "step"]
