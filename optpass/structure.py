"""What analysis finds in a graph: attention, blocks, the residual stream, token spaces. Recomputed after each rewrite.

Everything is read off the ops and the module paths that capture left on them; no model is known by name.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import pairwise
from typing import Any

import networkx as nx
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from optpass.canonical import PRODUCTS, RESHAPED, SOFTMAX, canonical, product_above
from optpass.layout import same
from optpass.program import Stage, module_path, op_name, strip_wrapper
from optpass.rewrite import MASKED_OUT

INDEX = re.compile(r"(?:^|(?<=\.))\d+(?:@\d+)?(?=\.|$)")
NUMBERED = re.compile(r"(?:^|(?<=\.))[A-Za-z_]+\d+(?:@\d+)?(?=\.|$)")
CALL = re.compile(r"@\d+")
"""The number of a call, where the model calls one module several times."""

PASS_THROUGH = {"to", "_to_copy", "contiguous", "clone", "dropout", "alias", "type_as"}
NORMS = {"layer_norm", "rms_norm", "_fused_rms_norm", "native_layer_norm"}
JOINING = {"cat", "slice", "split", "split_with_sizes", "chunk", "getitem", "add", "mul", *NORMS, *PASS_THROUGH}
"""Ops between two blocks of one tower whose token counts differ: another modality joins, or leaves."""


@dataclass(frozen=True)
class Attention:
    """One attention: ``query [batch, heads, tokens, head_dim]``, ``key`` and ``value``, an optional mask.

    Attributes:
        causal: no token attends to a later one, by flag or by the values of the mask.
        cross: the keys come from another sequence than the queries.
        padded: the mask depends on the values of an input, as one for padding does.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    causal: bool
    cross: bool
    padded: bool


@dataclass(frozen=True)
class TokenSpace:
    """A token axis.

    Attributes:
        size: tokens; symbolic where dynamic.
        prefix, suffix: protected tokens at either end: class and register tokens, text beside an image, what the
            output reads by its index, and in causal models the first and the last token.
        causal: attention over these tokens is causal, so that their order must be kept.
        grid: rows and columns of the free tokens, where their number is a square.
        spans: contiguous runs ``name -> (start, count)`` as they are in the example.
        members: for each span found in the values of an input, the node that marks it, bool ``[batch, tokens, 1]``.
    """

    size: Any
    token_dim: int
    batch_dim: int
    prefix: int
    suffix: int
    causal: bool
    grid: tuple[int, int] | None
    spans: dict[str, tuple[int, int]]
    members: dict[str, Node]

    @property
    def protected(self) -> int:
        """How many tokens no map may move."""
        return self.prefix + self.suffix


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        path: module path, such as ``model.layers.2``; a module that is called again is ``model.layers.0@1``.
        attentions: its attentions in order, self-attention first among equals.
        entry: the residual stream that enters its first attention.
        after_attention: the stream after the residual of its last attention.
        exit: the stream it hands on.
        streams: the residual stream inside it, in order.
    """

    path: str
    attentions: tuple[Attention, ...]
    entry: Node
    after_attention: Node
    exit: Node
    streams: tuple[Node, ...]

    @property
    def attention(self) -> Attention | None:
        """Its self-attention."""
        return next((a for a in self.attentions if not a.cross), None)


@dataclass(frozen=True)
class Tower:
    """Blocks that follow each other along one residual stream.

    Attributes:
        path: module path that holds them all.
        streams: every node of the residual stream, from the entry of the first block on.
    """

    path: str
    blocks: tuple[Block, ...]
    spaces: dict[Any, TokenSpace]
    streams: tuple[Node, ...]

    def space_at(self, block: Block) -> TokenSpace:
        """The token axis of the stream that enters a block; it changes where another modality joins."""
        return self.spaces[str(block.entry.meta["val"].shape)]

    @property
    def space(self) -> TokenSpace:
        """The token axis at the first block."""
        return self.space_at(self.blocks[0])

    @property
    def work(self) -> float:
        """A number that grows with the cost of the tower: tokens times the square of the width, over the blocks."""
        width = int(self.blocks[0].entry.meta["val"].shape[-1])
        return len(self.blocks) * float(hint(self.space.size)) * width * width


@dataclass(frozen=True)
class Structure:
    """The analysis of one stage.

    Attributes:
        module: the canonical graph that all nodes belong to.
        unplaced: attentions in no block, with the reason.
    """

    stage: Stage
    module: GraphModule
    towers: tuple[Tower, ...]
    unplaced: tuple[tuple[Attention, str], ...]

    @property
    def main(self) -> Tower | None:
        """The tower that costs most."""
        return max(self.towers, key=lambda tower: tower.work, default=None)

    @property
    def kind(self) -> str:
        """``vision-language``, ``denoiser``, ``causal-lm``, ``vision`` or ``encoder``, by inputs and attention."""
        names = {spec.name for spec in self.stage.inputs}
        main = self.main
        if any("timestep" in name for name in names):
            return "denoiser"
        if main is not None and main.space.members:
            return "vision-language"
        if main is not None and main.space.causal:
            return "causal-lm"
        integer = any(spec.dtype.startswith("int") for spec in self.stage.inputs)
        return "encoder" if integer else "vision"


def analyse(stage: Stage) -> Structure:
    """Find attentions, blocks, streams and token spaces of a stage."""
    module = canonical(stage)
    return _Analysis(stage, module).run()


class _Analysis:
    def __init__(self, stage: Stage, module: GraphModule) -> None:
        self.stage = stage
        self.module = module
        self.nodes = list(module.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.graph = nx.DiGraph()
        self.graph.add_nodes_from(self.nodes)
        self.graph.add_edges_from((source, node) for node in self.nodes for source in node.all_input_nodes)
        self.paths = {node: call_path(node) for node in self.nodes}

    def run(self) -> Structure:
        found: list[tuple[Attention, tuple[Node, ...]]] = []
        for node in self.nodes:
            if op_name(node) == "scaled_dot_product_attention":
                attention = self._attention(node)
                found.append((attention, () if attention.mask is None else (attention.mask,)))
            elif op_name(node) in SOFTMAX:
                found += self._written(node)
        attentions = _with_causality(self.stage, self.module, found)
        self.cores = {attention.node for attention in attentions}
        blocks, unplaced = self._blocks(attentions)
        return Structure(self.stage, self.module, tuple(self._towers(blocks)), tuple(unplaced))

    @cached_property
    def _variable(self) -> set[Node]:
        """Nodes that depend on an input."""
        found = {node for node in self.nodes if node.op == "placeholder"}
        for node in self.nodes:
            if any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    @cached_property
    def _valued(self) -> set[Node]:
        return valued(self.module)

    def _attention(self, node: Node) -> Attention:
        query, key, value = (arg for arg in node.args[:3])
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        causal = bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))
        assert isinstance(query, Node)
        assert isinstance(key, Node)
        assert isinstance(value, Node)
        mask = mask if isinstance(mask, Node) else None
        return Attention(node, query, key, value, mask, causal, cross=False, padded=mask in self._valued)

    def _written(self, node: Node) -> Iterator[tuple[Attention, tuple[Node, ...]]]:
        """An attention that stays written out, since something acts on its scores, and its masks."""
        product, after = product_above(node.args[0]), self._product_below(node)
        if product is None or after is None:
            return
        query, key = product.args[-2:] if op_name(product) == "baddbmm" else product.args[:2]
        value = next((arg for arg in _operands(after) if not self._depends_or_is(arg, node)), None)
        if not isinstance(query, Node) or not isinstance(key, Node) or value is None:
            return
        if not {query, key, value} <= self._variable:
            return
        key = _unturned(key)
        between = {product, node}
        for at in self.nodes[self.order[product] : self.order[node]]:
            if any(source in between for source in at.all_input_nodes):
                between.add(at)
        masks = [
            arg
            for at in sorted(between - {product, node}, key=self.order.__getitem__)
            if op_name(at) in ("add", "sub") and self._depends(node, at)
            for arg in _operands(at)
            if arg not in between and _rank(arg) >= 2
        ]
        mask = next((m for m in masks if m in self._valued), masks[0] if masks else None)
        yield Attention(after, query, key, value, mask, False, False, padded=mask in self._valued), tuple(masks)

    def _product_below(self, node: Node) -> Node | None:
        """The matrix product that the probabilities of a softmax go into."""
        queue, seen = [node], {node}
        while queue and len(seen) < 24:
            for user in queue.pop(0).users:
                name = op_name(user)
                if name in PRODUCTS:
                    return user
                moved = name in (*RESHAPED, "slice", "transpose", "permute", "dropout", "masked_fill", "where")
                elementwise = isinstance(user.target, torch._ops.OpOverload) and torch.Tag.pointwise in user.target.tags
                if user not in seen and (moved or elementwise):
                    seen.add(user)
                    queue.append(user)
        return None

    def _depends_or_is(self, node: Node, source: Node) -> bool:
        return node is source or self._depends(node, source)

    # blocks

    def _blocks(self, attentions: Sequence[Attention]) -> tuple[list[Block], list[tuple[Attention, str]]]:
        unplaced: list[tuple[Attention, str]] = []
        placed: list[tuple[Attention, Node, Node]] = []
        for attention in attentions:
            found = self._residual(attention)
            if found is None:
                unplaced.append((attention, "its output is added to no residual stream"))
                continue
            add, stream = found
            if _rank(stream) != 3 or _features_first(stream, attention.query):
                shape = ", ".join(str(size) for size in stream.meta["val"].shape)
                what = f"its residual stream [{shape}] is no [batch, tokens, features]"
                unplaced.append((attention, what))
                continue
            cross = not self._depends(attention.key, stream)
            placed.append((replace(attention, cross=cross), add, stream))
        groups: dict[str, list[tuple[Attention, Node, Node]]] = defaultdict(list)
        own = {item[0].node: item[0].cross for item in placed}
        for item in placed:
            groups[self._block_path(item[0], own)].append(item)
        blocks = []
        for path, name, members, end in self._separate(groups):
            stream = members[0][2]
            same_shape = [m for m in members if _same_shape(m[2], stream)]
            inner = [s for s in self._streams(stream, same_shape[0][1], path) if end is None or self.order[s] <= end]
            after = self._settled(same_shape[-1][1], path)
            blocks.append(Block(name, tuple(m[0] for m in members), stream, after, inner[-1], tuple(inner)))
        blocks.sort(key=lambda block: self.order[block.after_attention])
        return blocks, unplaced

    def _separate(
        self, groups: Mapping[str, list[tuple[Attention, Node, Node]]]
    ) -> Iterator[tuple[str, str, list[tuple[Attention, Node, Node]], int | None]]:
        """Path, name and members of each block, and where the next one begins that is written in the same module.

        A module without a number that holds several attentions in a row is no block but a whole model in one forward.
        """
        for path, members in groups.items():
            starts = [i for i, (attention, _, _) in enumerate(members) if not attention.cross]
            numbered = INDEX.search(path) or NUMBERED.search(path)
            if numbered or any(not self._depends_or_is(members[j][2], members[i][1]) for i, j in pairwise(starts)):
                yield path, path, members, None
                continue
            for number, (start, stop) in enumerate(pairwise([0, *starts[1:], len(members)])):
                name = f"{path}@{number}" if number else path
                end = self.order[members[stop][2]] if stop < len(members) else None
                yield path, name, members[start:stop], end

    def _residual(self, attention: Attention) -> tuple[Node, Node] | None:
        """The add that joins an attention to the stream, and the stream; of several the one with most tokens."""
        queue, seen = [attention.node], {attention.node}
        found: list[tuple[Node, Node]] = []
        while queue:
            node = queue.pop(0)
            for user in sorted(node.users, key=self.order.__getitem__):
                if user in seen or user in self.cores:
                    continue
                seen.add(user)
                stream = None
                if op_name(user) == "add":
                    stream = next((s for s in _operands(user) if self._depends(attention.node, s)), None)
                if stream is not None and _same_shape(stream, user) and stream in self._variable:
                    found.append((user, stream))
                else:
                    queue.append(user)
            if len(seen) > 400:
                break
        # an attention may feed two streams at once (text and image): the one with more tokens is pruned
        return max(found[:2], key=lambda pair: hint(_numel(pair[0])), default=None)

    def _depends(self, node: Node, source: Node) -> bool:
        """Whether ``node`` is computed from ``source``; only what lies between them is visited."""
        queue, seen = [node], {node}
        while queue:
            for above in queue.pop().all_input_nodes:
                if above is source:
                    return True
                if above not in seen and self.order[above] > self.order[source]:
                    seen.add(above)
                    queue.append(above)
        return False

    def _block_path(self, attention: Attention, cross: dict[Node, bool]) -> str:
        """The outermost numbered module that holds one self-attention, or the innermost numbered one."""
        path = self.paths[attention.node]
        for pattern in (INDEX, NUMBERED):
            prefixes = [path[: match.end()] for match in pattern.finditer(path)]
            for prefix in prefixes:
                selves = [n for n in cross if _inside(self.paths[n], prefix) and not cross[n]]
                if len(selves) <= 1:
                    return prefix
            if prefixes:
                return prefixes[-1]
        return path

    def _settled(self, stream: Node, path: str) -> Node:
        """A stream after the norm that alone reads it: of a post-norm block the norm is the stream."""
        while len(stream.users) == 1:
            user = next(iter(stream.users))
            if op_name(user) not in NORMS | PASS_THROUGH or not _inside(self.paths[user], path):
                break
            leaves = all(not _inside(self.paths[u], path) for u in user.users)
            joins = any(op_name(u) == "add" and _same_shape(u, user) for u in user.users)
            if op_name(user) in NORMS and not leaves and not joins:
                break
            stream = user
        return stream

    def _streams(self, entry: Node, first: Node, path: str) -> list[Node]:
        """The residual stream of a block in order: its first residual, and the adds that follow upon it."""
        found = [first]
        while True:
            settled = self._settled(found[-1], path)
            found += [settled] if settled is not found[-1] else []
            after = [u for s in (entry, found[-1]) for u in self._joined(s) if _inside(self.paths[u], path)]
            after = [u for u in after if self.order[u] > self.order[found[-1]]]
            if not after:
                return found
            found.append(min(after, key=self.order.__getitem__))

    def _joined(self, stream: Node) -> Iterator[Node]:
        """Adds with the stream as an operand, also where the model flattens it for them and unfolds the sum again."""
        for user in stream.users:
            if op_name(user) == "add" and _same_shape(stream, user):
                yield user
            elif op_name(user) == "reshape":
                for add in (u for u in user.users if op_name(u) == "add" and _same_shape(user, u)):
                    yield from (u for u in add.users if op_name(u) == "reshape" and _same_shape(stream, u))

    # towers

    def _towers(self, blocks: Sequence[Block]) -> Iterator[Tower]:
        groups: list[tuple[Any, list[Block]]] = []
        for block in blocks:
            shape = block.entry.meta["val"].shape
            key = (_container(block.path), str(shape[self._axes(block)[1]]), str(shape[2]))
            own = next((g for k, g in reversed(groups) if k == key and self._follows(g[-1], block)), None)
            if own is None:
                groups.append((key, [block]))
            else:
                own.append(block)
        for (path, *_), members in groups:
            yield self._tower(path, members)

    def _follows(self, before: Block, block: Block) -> bool:
        """Whether the stream of one block goes on in another, whole or with tokens joined to it or taken away."""
        if _same_shape(before.exit, block.entry):
            return self._depends_or_is(block.entry, before.exit) or self._depends_or_is(block.entry, before.streams[0])
        queue, seen = [block.entry], {block.entry}
        while queue and len(seen) < 60:
            at = queue.pop(0)
            if at in before.streams:
                return True
            if op_name(at) in JOINING:
                fresh = [source for source in at.all_input_nodes if source not in seen]
                seen.update(fresh)
                queue += fresh
        return False

    def _tower(self, path: str, blocks: Sequence[Block]) -> Tower:
        streams = {node for block in blocks for node in (block.entry, *block.streams)}
        spaces: dict[Any, TokenSpace] = {}
        causal = any(a.causal and not a.cross for block in blocks for a in block.attentions)
        for block in blocks:
            key = str(block.entry.meta["val"].shape)
            if key not in spaces:
                spaces[key] = self._space(block, causal)
        ordered = tuple(sorted(streams, key=self.order.__getitem__))
        return Tower(path, tuple(blocks), spaces, ordered)

    def _space(self, first: Block, causal: bool) -> TokenSpace:
        value = first.entry.meta["val"]
        token_dim, batch_dim = self._axes(first)
        size = value.shape[token_dim]
        prefix, suffix = self._learned_ends(first.entry, token_dim)
        low, high = self._read_ends(first.entry, token_dim, size)
        prefix, suffix = max(prefix, low), max(suffix, high)
        if causal:
            prefix, suffix = max(prefix, 1), max(suffix, 1)
        members, spans = self._marked(first.entry, size)
        grid = None
        if isinstance(size, int):
            side = round((size - prefix - suffix) ** 0.5)
            grid = (side, side) if side > 1 and side * side == size - prefix - suffix else None
        return TokenSpace(size, token_dim, batch_dim, prefix, suffix, causal, grid, spans, members)

    def _axes(self, block: Block) -> tuple[int, int]:
        """Token and batch dimension of the stream: queries have its tokens as rows, and its batch in front."""
        shape = [hint(size) for size in block.entry.meta["val"].shape]
        attention = block.attention or block.attentions[0]
        lead, rows = hint(attention.query.meta["val"].shape[0]), hint(attention.query.meta["val"].shape[-2])
        first = [rows == shape[0] and lead % shape[1] == 0, rows == shape[1] and lead % shape[0] == 0]
        if first[0] != first[1]:
            return (0, 1) if first[0] else (1, 0)
        batches = [v.shape[0] for v in self.stage.example if v.dim()]
        turned = bool(batches) and all(b == batches[0] for b in batches) and shape[0] != batches[0] == shape[1]
        return (0, 1) if turned else (1, 0)

    def _learned_ends(self, entry: Node, dim: int) -> tuple[int, int]:
        """Tokens that a ``cat`` before the first block takes from parameters, in front and behind."""
        for node in self._chain_up(entry):
            if op_name(node) != "cat" or (len(node.args) > 1 and node.args[1] not in (dim, dim - _rank(node))):
                continue
            parts = list(node.args[0])  # type: ignore[arg-type]
            sizes = [p.meta["val"].shape[dim] for p in parts]
            learned = [p not in self._variable or self._is_learned(p) for p in parts]
            if all(learned):
                continue
            before = learned.index(False)
            after = learned[::-1].index(False)
            ends = sizes[:before], sizes[len(sizes) - after :]
            if all(isinstance(s, int) for side in ends for s in side):
                return sum(ends[0]), sum(ends[1])
        return 0, 0

    def _is_learned(self, node: Node) -> bool:
        """A parameter expanded to the batch depends on the input by its size alone."""
        while op_name(node) in ("expand", "repeat", "reshape", "unsqueeze", *PASS_THROUGH) and node.args:
            node = node.args[0]  # type: ignore[assignment]
            if node not in self._variable:
                return True
        return False

    def _chain_up(self, node: Node) -> Iterator[Node]:
        """Ancestors along operands of the same rank and token count, nearest first."""
        seen: set[Node] = set()
        queue = [node]
        while queue and len(seen) < 60:
            at = queue.pop(0)
            if at in seen:
                continue
            seen.add(at)
            yield at
            queue += [s for s in at.all_input_nodes if s in self._variable and _rank(s) == _rank(node)]

    def _read_ends(self, entry: Node, dim: int, size: Any) -> tuple[int, int]:
        """Tokens that the graph reads by their index, counted from either end."""
        prefix = suffix = 0
        for node in nx.descendants(self.graph, entry):
            if op_name(node) not in ("select", "slice"):
                continue
            value = node.args[0].meta["val"]
            at = node.args[1] if len(node.args) > 1 else 0
            if value.dim() != 3 or at not in (dim, dim - 3) or not same(value.shape[dim], size):
                continue
            if op_name(node) == "select":
                low, high = _ends(node.args[2], size)
            else:
                start = node.args[2] if len(node.args) > 2 else None
                stop = node.args[3] if len(node.args) > 3 else None
                low, high = (max(pair) for pair in zip(_cut(start, size), _cut(stop, size), strict=True))
            prefix, suffix = max(prefix, low), max(suffix, high)
        return prefix, suffix

    def _marked(self, entry: Node, size: Any) -> tuple[dict[str, Node], dict[str, tuple[int, int]]]:
        """Tokens that another modality was scattered into, by the mask of the scatter."""
        if not isinstance(size, int):
            return {}, {}
        for node in self._chain_up(entry):
            if op_name(node) != "masked_scatter":
                continue
            mask, source = node.args[1], node.args[2]
            shape = node.meta["val"].shape
            if len(shape) != 3 or not isinstance(mask, Node) or not same(shape[1], size):
                continue
            count = hint(_numel(source)) // (hint(shape[0]) * hint(shape[2]))  # type: ignore[arg-type]
            flags = evaluate(self.module, self.stage.example, [mask])[mask]
            first = int(flags.expand(*(hint(size) for size in shape))[0, :, 0].float().argmax())
            return {"image": mask}, {"image": (first, count)}
        return {}, {}


def valued(module: GraphModule) -> set[Node]:
    """Nodes that depend on the values of an input, not on its sizes alone."""
    found: set[Node] = set()
    for node in module.graph.nodes:
        above = not op_name(node).startswith("sym_size") and any(source in found for source in node.all_input_nodes)
        if node.op == "placeholder" or above:
            found.add(node)
    return found


def _with_causality(
    stage: Stage, module: GraphModule, found: Sequence[tuple[Attention, tuple[Node, ...]]]
) -> list[Attention]:
    """Attentions of which one mask lets no token see a later one are causal, however the model wrote it."""
    wanted = {mask for a, masks in found for mask in masks if hint(a.query.meta["val"].shape[-2]) > 1}
    hidden = {mask: _is_causal(value) for mask, value in evaluate(module, stage.example, list(wanted)).items()}
    return [replace(a, causal=a.causal or any(hidden.get(mask, False) for mask in masks)) for a, masks in found]


def _is_causal(mask: Tensor) -> bool:
    rows, columns = mask.shape[-2:] if mask.dim() >= 2 else (1, 1)
    if rows != columns or rows < 2:
        return False
    open_ = mask if mask.dtype == torch.bool else mask > MASKED_OUT
    above = torch.ones(rows, columns, dtype=torch.bool).triu(1)
    return not bool((open_ & above).any())


def evaluate(module: GraphModule, inputs: Sequence[Tensor], wanted: Sequence[Node]) -> dict[Node, Tensor]:
    """Values of some nodes on given inputs; only what they depend on is run."""
    if not wanted:
        return {}
    needed: set[Node] = set()
    queue = list(wanted)
    while queue:
        node = queue.pop()
        if node not in needed:
            needed.add(node)
            queue += node.all_input_nodes
    found: dict[Node, Tensor] = {}

    class Partial(Interpreter):
        def run_node(self, n: Node) -> Any:
            if n not in needed and n.op not in ("placeholder", "output"):
                return None
            if n.op == "output":
                return ()
            result = super().run_node(n)
            if n in wanted:
                found[n] = result
            return result

    with torch.no_grad():
        Partial(module).run(*inputs)
    return found


def _operands(node: Node) -> list[Node]:
    return [arg for arg in node.args[:2] if isinstance(arg, Node)]


def _features_first(stream: Node, query: Node) -> bool:
    """Whether a stream is ``[batch, features, tokens]``, by a query ``[batch, heads, tokens, head_dim]`` of it."""
    if _rank(query) != 4:
        return False
    (_, middle, last), (_, heads, rows, width) = stream.meta["val"].shape, query.meta["val"].shape
    return same(last, rows) and not same(middle, rows) and same(middle, heads * width)


def _unturned(key: Node) -> Node:
    """The key ``[..., tokens, head_dim]`` behind one whose last two dimensions were swapped for the product."""
    source, last = key.args[0] if key.args else None, _rank(key) - 1
    swapped = (-1, -2), (-2, -1), (last, last - 1), (last - 1, last)
    turned = op_name(key) == "mT" or (op_name(key) == "transpose" and key.args[1:3] in swapped)
    turned |= op_name(key) == "permute" and key.args[1] == [*range(last - 1), last, last - 1]
    return source if turned and isinstance(source, Node) else key


def _rank(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1


def _same_shape(a: Node, b: Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.dim() != y.dim():
        return False
    return all(same(s, t) for s, t in zip(x.shape, y.shape, strict=True))


def _numel(node: Node) -> Any:
    return reduce(operator.mul, node.meta["val"].shape, 1)


def hint(size: Any) -> int:
    """A size as a number: of a dynamic one the size in the example; 1 where it depends on data."""
    if isinstance(size, int):
        return size
    return 1 if size.node.hint is None else int(size.node.hint)


def call_path(node: Node) -> str:
    """The module path of a node, with the number of the call behind each module that is called again."""
    path = module_path(node)
    for key, (outer, _) in reversed((node.meta.get("nn_module_stack") or {}).items()):
        call = CALL.search(key.rpartition(".")[2])
        if call is not None:
            outer = strip_wrapper(outer)
            path = outer + call[0] + path[len(outer) :]
    return path


def _inside(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + ".")


def _container(path: str) -> str:
    """What holds a block and its siblings, ``encoder`` for ``encoder.layer.3``; stacks side by side share it."""
    stem = re.sub(r"\.?\d+$", "", CALL.sub("", path))
    return stem.rpartition(".")[0]


def _ends(index: Any, size: Any) -> tuple[int, int]:
    """How many tokens from either end a read of one index needs: only the nearer end is protected."""
    if not isinstance(index, int):
        return 0, 0
    if index < 0:
        return (0, -index) if not isinstance(size, int) or -index <= size // 2 else (size + index + 1, 0)
    if isinstance(size, int) and index >= size // 2:
        return 0, size - index
    return index + 1, 0


def _cut(bound: Any, size: Any) -> tuple[int, int]:
    """How many tokens from either end lie outside a slice bound."""
    if not isinstance(bound, int) or bound == 0 or bound >= 2**62 or (isinstance(size, int) and bound >= size):
        return 0, 0
    if bound < 0 and isinstance(size, int) and -bound >= size:
        return 0, 0
    if bound < 0:
        return 0, -bound
    if isinstance(size, int) and bound > size // 2:
        return 0, size - bound
    return bound, 0


__all__ = ["Attention", "Block", "Structure", "TokenSpace", "Tower", "analyse", "evaluate", "valued"]
