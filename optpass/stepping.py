"""The step: a causal stage made to continue a text whose keys and values are kept outside of it.

The graph is the captured one. It takes the tokens that are new, and where its positions and its attention looked at
the whole text, it now looks at the text so far as well: tables are read at the tokens' positions, and each attention
scores the kept keys beside the new ones. Kept rows are never copied: two products take the place of one product of a
concatenation. What is kept lies wherever there is room, each row with its position; a row with a negative one is empty.

Where every attention allows it there is a second form of the step, for engines that write new rows into the buffers of
the kept ones (``optpass.appending``): there the filled rows of a text come first, and the new ones go behind them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional

from optpass import appending  # noqa: F401 - registers the op
from optpass.causal import Cached, Causal, Visible
from optpass.kernels.tree_attention import tree_attention
from optpass.kernels.tree_attention.reference import unfolded
from optpass.layout import same
from optpass.program import Range, Stage, TensorSpec, op_name
from optpass.rewrite import Rewritten
from optpass.runtime.kept import DEPTH, LENGTH, PARENT, PAST_POSITION, PICK, PIECE, PLACE, POSITION, TREE
from optpass.runtime.manifest import PREFILL, PRESENT, STEP
from optpass.structure import hint, valued

BATCH, TOKENS, PAST, PICKED = "batch", "tokens", "past_", "picked"
"""Dynamic dimensions of a step: texts, new tokens of each, rows that a group keeps, tokens whose outputs are wanted."""

Angles = tuple[Node | None, Node | None]
"""Cosines and sines ``[context, head_dim / 2]``, or neither."""

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
        ``[batch, key heads, tokens, head_dim]``. Its form ``in_place``, where there is one, is told in
        ``length_G [batch]`` how many rows of each text are filled, and returns ``present_key_N`` and
        ``present_value_N``, the buffers with the new rows behind those.
    """
    made = _built(causal, tree, finish, in_place=False)
    return replace(made, in_place=_built(causal, tree, finish, in_place=True)) if _may_append(causal) else made


def _built(causal: Causal, tree: bool, finish: Finish | None, in_place: bool) -> Stage:
    made = _Step(causal, tree, in_place)
    outputs = made.outputs()
    if finish is not None:
        finish(made.graph, made.inputs, outputs)
    made.graph.output(tuple(outputs.values()))
    made.graph.eliminate_dead_code()
    for name, node in list(made.inputs.items()):
        if name.startswith(PAST_POSITION) and not node.users and in_place:
            made.graph.erase_node(node)
            del made.inputs[name]
    module = GraphModule(made.attributes(), made.graph)
    return _traced(causal, module, list(outputs), made.inputs)


def _may_append(causal: Causal) -> bool:
    """Whether every attention has rows of its own, of one width, as ``append_attention`` takes them."""
    if len(kept(causal)) < len(causal.attentions):
        return False
    for cached in causal.attentions:
        query: Any = cached.node.args[0]
        values = [n.meta["val"] for n in (query, cached.key, cached.value)]
        if any(value.dim() != 4 or value.dtype != torch.float32 for value in values):
            return False
        if len({value.shape[3] for value in values}) > 1 or not all(isinstance(v.shape[1], int) for v in values):
            return False
    return True


class _Step:
    def __init__(self, causal: Causal, tree: bool, in_place: bool) -> None:
        self.causal = causal
        self.in_place = in_place
        self.graph = Graph()
        self.new: dict[Node, Node] = {}
        self.constants: dict[str, Tensor] = {}
        self.angles: dict[str, Node] = {}
        self.read: dict[tuple[Node, int, int], Node] = {}
        self.biases: dict[Any, Node] = {}
        self.rows: dict[tuple[Node, Node], int] = {}
        self.present: dict[str, Node] = {}
        self.starts: dict[int, Node] = {}
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
        if in_place:
            groups += [group.replace(PAST_POSITION, LENGTH) for group in groups]
        shape = [TREE, DEPTH, PARENT] if tree else []
        for name in (POSITION, *groups, *([PICK] if causal.head else []), *shape):
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
        if self.in_place:
            return {**results, **self.present}
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
        if self.in_place:
            return self._appended(cached, past)
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

    def _appended(self, cached: Cached, past: tuple[Node, Node]) -> Node:
        number = self.rows[cached.key, cached.value]
        if cached.group not in self.starts:
            length = self.inputs[f"{LENGTH}{cached.group}"]
            self.starts[cached.group] = self.graph.call_function(_start, (length, past[0], self.ids))
        start, visible = self.starts[cached.group], cached.visible
        query: Any = cached.node.args[0]
        key = cached.key
        angles: Angles = (None, None)
        turned = [self._unrotated(n) for n in (query, key)]
        if turned[0] is not None and turned[1] is not None and turned[0][1] == turned[1][1]:
            (query, angles), (key, _) = turned[0], turned[1]
        bias = None
        if TREE in self.inputs or visible != Visible():
            bias = self._bias_in_place(cached, start, past[0])
        new = (self.new[n] for n in (query, key, cached.value))
        args = (*new, *past, start, self.positions, *angles, bias, cached.scale)
        made = self._on_behalf(
            self.graph.call_function(torch.ops.optpass_step.append_attention.default, args), cached.node
        )
        for place, kind in enumerate(("key", "value"), 1):
            name = f"{PRESENT}{kind}_{number}"
            self.present[name] = self.graph.call_function(operator.getitem, (made, place))
        return self.graph.call_function(operator.getitem, (made, 0))

    def _bias_in_place(self, cached: Cached, start: Node, past: Node) -> Node:
        visible = cached.visible
        key = (visible, cached.group)
        if key not in self.biases:
            place = self.inputs[f"{PAST_POSITION}{cached.group}"] if visible != Visible() else None
            slopes = None if visible.slopes is None else list(visible.slopes)
            args = (start, self.positions, past, place, self.inputs.get(TREE), visible.window, slopes)
            self.biases[key] = self.graph.call_function(_bias_in_place, args)
        return self.biases[key]

    def _unrotated(self, node: Node) -> tuple[Node, Angles] | None:
        """What is rotated to ``node`` by halves, and the tables of it, ``x * cos + cat(-second, first) * sin``."""
        if op_name(node) != "add":
            return None
        for terms in (node.args, node.args[::-1]):
            plain, crossed = (_factors(term, self.causal.tables) for term in terms)
            if plain is not None and crossed is not None and _crosses(crossed[0], plain[0]):
                angles = self._half(plain[1]), self._half(crossed[1])
                return (plain[0], angles) if None not in angles else None
        return None

    def _half(self, node: Node) -> Node | None:
        """A table of angles ``[context, head_dim / 2]``, of one whose halves are alike."""
        table = self.causal.tables[node]
        rows = table.rows.movedim(table.dim, 0).flatten(1)
        first, second = rows.chunk(2, -1)
        if rows.shape[1] % 16 or rows.dtype != torch.float32 or not torch.equal(first, second):
            return None
        name = f"angles_{node.name}"
        if name not in self.constants:
            # a row for each that there may be room for, of which those beyond the context are not read
            self.constants[name] = functional.pad(first, (0, 0, 0, PIECE))
            self.angles[name] = self.graph.get_attr(name)
        return self.angles[name]

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


def _start(length: Tensor, past: Tensor, ids: Tensor) -> Tensor:
    # no more than the room allows: a step that is run on its own may be given less
    return length.clamp(max=past.shape[2] - ids.shape[1])


def _bias_in_place(
    start: Tensor,
    positions: Tensor,
    past: Tensor,
    place: Tensor | None,
    tree: Tensor | None,
    window: int | None,
    slopes: list[float] | None,
) -> Tensor:
    """``[batch, heads or 1, tokens, room]``; that a token sees none after it is the attention's own business."""
    behind = torch.arange(past.shape[2]).unsqueeze(0) - start.unsqueeze(1)  # [batch, room], of the new tokens which
    number = behind.clamp(0, positions.shape[1] - 1)
    old = behind < 0
    seen = old.unsqueeze(1)
    if tree is not None:
        seen = seen | tree.gather(2, number.unsqueeze(1).expand(-1, tree.shape[1], -1))
    else:
        seen = seen | ~seen
    if place is None:
        return torch.where(seen, 0.0, HIDDEN).unsqueeze(1)
    before = torch.where(old, place, positions.gather(1, number)).unsqueeze(1) - positions.unsqueeze(-1)
    if window is not None:
        seen = seen & (before > -window)
    bias = torch.where(seen, 0.0, HIDDEN).unsqueeze(1)
    return bias if slopes is None else bias + torch.tensor(slopes).view(-1, 1, 1) * before.unsqueeze(1)


def _picked(stream: Tensor, pick: Tensor) -> Tensor:
    return stream.gather(1, pick.unsqueeze(-1).expand(-1, -1, stream.shape[-1]))


# rotation


def _factors(term: Any, tables: Mapping[Node, Any]) -> tuple[Node, Node] | None:
    """A product of a value and a table."""
    if not isinstance(term, Node) or op_name(term) != "mul":
        return None
    for value, table in (term.args, term.args[::-1]):
        if isinstance(value, Node) and isinstance(table, Node) and table in tables and value not in tables:
            return value, table
    return None


def _crosses(node: Node, source: Node) -> bool:
    """Whether a node is the second half of ``source``, negated, and its first half behind it."""
    if op_name(node) != "cat" or not isinstance(node.args[0], list | tuple) or len(node.args[0]) != 2:
        return False
    negated: Any
    first: Any
    negated, first = node.args[0]
    if op_name(negated) != "neg" or node.args[1] not in (-1, 3):
        return False
    half = source.meta["val"].shape[-1] // 2
    return _span(negated.args[0], source) == (half, 2 * half) and _span(first, source) == (0, half)


def _span(node: Node, source: Node) -> tuple[int, int] | None:
    """Where a slice of the last dimension of ``source`` begins and ends."""
    if op_name(node) != "slice" or node.args[0] is not source or node.args[1] not in (-1, 3) or len(node.args) > 4:
        return None
    size = source.meta["val"].shape[-1]
    given: list[Any] = [*node.args[2:], None, None]
    return int(given[0] or 0), size if given[1] is None else min(int(given[1]), size)


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
        PARENT: (BATCH, TOKENS),
    }
    for number, (cached, _) in enumerate(kept(causal)):
        for kind in ("key", "value"):
            name = past_name(kind, number)
            _, heads, _, width = example[name].shape
            shapes[name] = (BATCH, heads, f"{PAST}{cached.group}", width)
        shapes[f"{PAST_POSITION}{cached.group}"] = (BATCH, f"{PAST}{cached.group}")
        shapes[f"{LENGTH}{cached.group}"] = (BATCH,)
    if isinstance(batch, int):
        shapes = {name: (batch, *shape[1:]) for name, shape in shapes.items()}
    specs = [TensorSpec(n, str(t.dtype).removeprefix("torch."), shapes[n]) for n, t in example.items()]
    used = {size for spec in specs for size in spec.shape if isinstance(size, str)}
    few = Range(1, min(PIECE, causal.context))
    # new rows that are written in place need room, those of wrong guesses too
    long = Range(1, causal.context + few.maximum * (f"{LENGTH}0" in inputs))
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
    found = {
        causal.ids.name: ids[:, :new],
        POSITION: filled,
        PICK: torch.arange(new).expand(batch, -1).clone(),
        TREE: torch.ones(batch, new, new, dtype=torch.bool).tril(),
        DEPTH: torch.arange(new).expand(batch, -1).clone(),
        PARENT: (torch.arange(new) - 1).clamp(min=0).expand(batch, -1).clone(),
    }
    room = past + (new if f"{LENGTH}0" in names else 0)
    for number, (cached, nodes) in enumerate(kept(causal)):
        position = torch.arange(room).expand(batch, -1)
        found[f"{PAST_POSITION}{cached.group}"] = position.masked_fill(position >= filled.unsqueeze(1), -1)
        found[f"{LENGTH}{cached.group}"] = filled.clone()  # two inputs, not one given twice
        for kind, node in zip(("key", "value"), nodes, strict=True):
            value = node.meta["val"]
            heads = value.shape[1] if value.dim() == 4 else hint(value.shape[0]) // batch
            shape = (batch, int(heads), room, int(value.shape[-1]))
            found[past_name(kind, number)] = torch.randn(shape, generator=generator, dtype=value.dtype)
    return {name: found[name] for name in names}


__all__ = ["grouped", "kept", "past_name", "prefill", "step"]
