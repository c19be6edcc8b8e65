"""The rewriter: insert token maps at sites and follow them through everything downstream.

One walk over the graph, in order, emits a new one. Each value downstream of a site carries a layout (which dimensions
are batch and tokens) and a level (how many maps it is behind). Where levels meet, the older value is coerced by the
maps between, at its use. An op that needs the old space gets its inputs restored; where nothing can be restored the
walk ends in a refusal. No op is guessed: what has no rule is restored first, which is right for any op.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from optpass.emit import Emitter, Traced, inputs_of
from optpass.errors import Refusal
from optpass.layout import Atom, Group, Layout, Part, has_tokens, is_token_axis, plain, same, same_group, token_dims
from optpass.program import place_of
from optpass.tokens import NOTHING, Concat, Identity, TokenMap, Value


@dataclass(frozen=True)
class Tracked:
    """A value of the new graph.

    Attributes:
        layout: None for a value of the space before all maps, or without tokens.
        level: how many maps its token axes are behind.
        local: each token was computed from its own inputs alone, so that it can be computed again in the old space.
        rows: its integers are row numbers of the new token space.
    """

    proxy: Traced
    layout: Layout | None = None
    level: int = 0
    local: bool = True
    rows: bool = False


Several = list[Tracked]
Rule = Callable[["Walker", Node], "Tracked | Several"]


class Fallback(Exception):
    """A rule cannot follow the tokens through its op; the message says why."""


class Refused(Exception):
    """The walk cannot go on."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(str(refusal))


@dataclass(frozen=True)
class Space:
    """The token axis that sites of one walk share.

    Attributes:
        token_dim, batch_dim: of the stream at the first site.
        prefix, suffix: counts of protected tokens at either end, which every map keeps in place.
        streams: nodes of the residual stream, where a dropped token may take its old value again.
    """

    token_dim: int = 1
    batch_dim: int = 0
    prefix: int = 0
    suffix: int = 0
    streams: frozenset[Node] = frozenset()


@dataclass(frozen=True)
class Level:
    """One map of the chain: ``sizes`` after it, and the stream before it."""

    map: TokenMap
    sizes: Value | None
    stale: Tracked


HIDDEN = -1e30
"""What is added to the logits of a key that counts as nothing."""

MASKED_OUT = -1e4
"""A float mask at or below this counts as no attention at all."""

Build = Callable[["Builder"], TokenMap]


@dataclass
class Rewritten:
    """A rewritten module, and what the walk found.

    Attributes:
        module: the new graph; with taps, its outputs are followed by those of the maps.
        maps: the maps in order, their values being nodes of ``module``.
        restored: nodes of the old graph that need the old space, and why.
        tapped: names of the appended outputs, ``<number of the map>.<attribute>``.
        levels: behind how many maps each of the nodes is that were asked for.
    """

    module: GraphModule
    maps: list[TokenMap]
    restored: list[tuple[Node, str]]
    tapped: list[str]
    levels: list[int]

    def untap(self) -> GraphModule:
        """The module freed of the outputs of the maps, and of what serves them alone; cheaper than a second walk."""
        if self.tapped:
            graph = self.module.graph
            output = graph.output_node()
            output.args = (output.args[0][: -len(self.tapped)],)  # type: ignore[index]
            graph.eliminate_dead_code()
            self.module.recompile()
            self.tapped.clear()
        return self.module


class Walker:
    """Rewrites one module for one chain of sites."""

    def __init__(
        self,
        module: GraphModule,
        sites: Mapping[Node, Sequence[tuple[str, Build]]],
        space: Space,
        reads: Sequence[Node] = (),
    ) -> None:
        self.old = module
        self.sites = sites
        self.reads = reads
        self.space = space
        self.maker = ""
        self.graph = Graph()
        self.env: dict[Node, Tracked | Several] = {}
        self.levels: list[Level] = []
        self.restores: list[tuple[Node, str]] = []
        self.node: Node = next(iter(module.graph.nodes))
        first = next(iter(sites))
        self.emit = Emitter(self.graph, first.meta["val"])
        self.batch: Any = None
        self.root_count: Any = None
        self.constants: dict[str, torch.Tensor] = {}
        self.seen: dict[Node, Tracked] = {}
        self._coerced: dict[Any, Traced] = {}
        self._reached: dict[Any, dict[int, Traced]] = {}
        self._maps: dict[Any, TokenMap] = {}
        self._restored: dict[Node, Traced] = {}
        self._biases: dict[Any, Traced | None] = {}

    # the walk

    def run(self, tap: bool = False) -> Rewritten:
        """Emit the whole graph.

        Behind its outputs come the ``reads``, each in the token space that it is in, and the tokens of the old space
        that each of these spaces holds, int64 ``[batch, tokens]``; ``tap`` appends the tensors of each map.
        """
        from optpass.rules import rule_for  # the rules are written in terms of the walker

        for node in self.old.graph.nodes:
            self.node = node
            if node.op == "output":
                with self.emit.on_behalf(None, self.maker):
                    return self._finish(node, tap)
            tracked = [n for n in inputs_of(node) if self._is_tracked(n)]
            if not tracked:
                self.env[node] = Tracked(self.emit.copy(node, self._plain))
            else:
                with self.emit.on_behalf(node):
                    self.env[node] = self._settle(self._follow(node, rule_for(node)))
            for maker, build in self.sites.get(node, ()):
                self.maker = maker
                with self.emit.on_behalf(node, maker):
                    self.env[node] = self._enter(node, build)
        raise AssertionError("a graph ends in its output")

    def _follow(self, node: Node, rule: Rule | None) -> Tracked | Several:
        try:
            if rule is None:
                raise Fallback("no rule follows tokens through it")
            return rule(self, node)
        except Fallback as why:
            self.restores.append((node, str(why)))
            inputs = {n: self.restored(n, str(why)) for n in inputs_of(node)}
            return Tracked(self.emit.copy(node, inputs.__getitem__))

    def _settle(self, result: Tracked | Several) -> Tracked | Several:
        """A value without tokens is like one of the old space; one of the stream can be restored from here on."""
        if isinstance(result, list) or result.layout is None:
            return result
        if not token_dims(result.layout):
            return Tracked(result.proxy)
        return replace(result, local=True) if self.node in self.space.streams else result

    def _finish(self, node: Node, tap: bool) -> Rewritten:
        results = []
        outputs: Any = node.args[0]
        for result in outputs:
            if self._is_tracked(result):
                self.restores.append((result, "a per-token output of the model"))
            results.append(self.restored(result, "the model returns it per token").node)
        read = [self.env[wanted] for wanted in self.reads]
        levels = [value.level for value in read if isinstance(value, Tracked)]
        results += [value.proxy.node for value in read if isinstance(value, Tracked)]
        results += [self._places(level).node for level in range(max(levels, default=-1) + 1)]
        maps = [level.map for level in self.levels]
        taps = [(f"{i}.{name}", value) for i, m in enumerate(maps) for name, value in _tensors(m)] if tap else []
        self.graph.output(tuple(results) + tuple(value.node for _, value in taps))
        self.graph.eliminate_dead_code()
        module = GraphModule(self._attributes(), self.graph)
        return Rewritten(module, maps, self.restores, [name for name, _ in taps], levels)

    def _places(self, level: int) -> Traced:
        """The tokens of the old space that are there after ``level`` maps, ``[batch, tokens]``."""
        x = self.emit.call(torch.arange, self.root_count).unsqueeze(0).expand(self.batch, -1)
        for entry in self.levels[:level]:
            x = entry.map.pick(x)
        return x  # type: ignore[no-any-return]

    def _attributes(self) -> dict[str, Any]:
        """What the new graph reads by name: attributes of the old module, and constants of the pass."""
        names = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        return {
            n: self.constants[n] if n in self.constants else operator.attrgetter(n)(self.old) for n in sorted(names)
        }

    def _enter(self, node: Node, build: Build) -> Tracked:
        """Apply one map at the site ``node``."""
        stream = self.env[node]
        assert isinstance(stream, Tracked)
        if not self.levels:
            stream = self._root(stream)
        if stream.layout is None:
            what = "the tokens of an earlier site do not reach this one"
            raise Refused(Refusal("site-apart", what, "give the two token axes a pass of their own", place_of(node)))
        if stream.level != len(self.levels):
            stream = Tracked(self.lift(stream, len(self.levels)), stream.layout, len(self.levels))
        token_map = build(Builder(self, stream))
        before = self.sizes(len(self.levels))
        self.levels.append(Level(token_map, token_map.resize(before), stream))
        return Tracked(self.lift(stream, len(self.levels), content=True), stream.layout, len(self.levels))

    def _root(self, stream: Tracked) -> Tracked:
        value = stream.proxy.value
        groups: list[Group] = []
        for dim, size in enumerate(value.shape):
            if dim == self.space.token_dim:
                groups.append((Atom("tokens", size, (Part(size),)),))
            elif dim == self.space.batch_dim:
                groups.append((Atom("batch", size),))
            else:
                groups.append(plain(size))
        self.batch = stream.proxy.size(self.space.batch_dim)
        self.root_count = stream.proxy.size(self.space.token_dim)
        return Tracked(stream.proxy, tuple(groups), 0)

    # values

    def _is_tracked(self, node: Node) -> bool:
        value = self.env[node]
        return any(t.layout is not None for t in value) if isinstance(value, list) else value.layout is not None

    def _plain(self, node: Node) -> Traced:
        value = self.env[node]
        assert isinstance(value, Tracked)
        return value.proxy

    def value(self, node: Any) -> Tracked:
        """What an input node became."""
        value = self.env[node]
        if isinstance(value, list):
            raise Fallback("it takes several tensors at once")
        return value

    def count(self, atom: Atom, level: int) -> Any:
        """Tokens along an axis after ``level`` maps."""
        whole = self.levels[level - 1].map.target if level else self.root_count
        return reduce(operator.add, (p.size if p.fixed else whole - p.left - p.right for p in atom.parts))

    def extent(self, group: Group, level: int) -> Any:
        """Size of a dimension in the new graph, an int or a proxy."""
        size: Any = 1
        for atom in group:
            if atom.kind == "tokens":
                size = size * self.count(atom, level)
            elif atom.kind == "batch":
                size = size * self.batch
            elif atom.kind == "rows":
                size = size * self.extent(atom.members, level)
            elif isinstance(atom.size, int):
                size = size * atom.size
            else:
                raise Fallback("a dimension mixes tokens with a symbolic size")
        return size

    def sizes(self, level: int) -> Value | None:
        """How many tokens each token stands for after ``level`` maps; None where all are one."""
        return self.levels[level - 1].sizes if level else None

    def axis_sizes(self, atom: Atom, level: int) -> Traced | None:
        """The sizes along one axis, ``[batch, tokens]``; fixed parts count one each."""
        sizes = self.sizes(level)
        if sizes is None:
            return None
        pieces = []
        for part in atom.parts:
            if part.fixed:
                pieces.append(self.emit.call(torch.ones, (self.batch, part.size)))
            elif part.left or part.right:
                pieces.append(sizes[:, part.left : sizes.shape[1] - part.right])
            else:
                pieces.append(sizes)
        return pieces[0] if len(pieces) == 1 else self.emit.call(torch.cat, pieces, 1)

    def bias(self, atom: Atom, level: int) -> Traced | None:
        """What is added to attention logits per key, ``[batch, tokens]``: the log of its size.

        Paper: Token Merging, arXiv 2210.09461, section 3 (proportional attention).
        """
        key = (level, tuple((p.fixed, p.left, p.right) for p in atom.parts), len(atom.parts))
        if key not in self._biases:
            counts = self.axis_sizes(atom, level) if self.proportional(level) else None
            bias = None if counts is None else counts.log()
            if counts is not None and any(entry.map.hides for entry in self.levels[:level]):
                # the logarithm of a size of nothing is outweighed by logits that differ by more than 85
                bias = self.emit.call(torch.where, counts > 2 * NOTHING, bias, HIDDEN)
            self._biases[key] = bias
        return self._biases[key]

    def proportional(self, level: int) -> bool:
        return all(entry.map.proportional for entry in self.levels[:level])

    def in_order(self, level: int) -> bool:
        """Whether tokens are still in the order of the old space."""
        return all(entry.map.ordered for entry in self.levels[:level])

    def spread(self, vector: Traced, layout: Layout, dim: int) -> Traced:
        """``[batch, tokens]`` shaped to broadcast against ``layout`` with its tokens along ``dim``."""
        shape: list[Any] = []
        expand: list[Any] = []
        for d, group in enumerate(layout):
            atoms = group or plain(2)[:0]
            if d == dim:
                shape.append(vector.shape[1])
                expand.append(-1)
            elif any(atom.kind == "batch" for atom in atoms):
                for atom in atoms:
                    shape.append(self.batch if atom.kind == "batch" else 1)
                    expand.append(-1 if atom.kind == "batch" else self.extent((atom,), 0))
            else:
                shape.append(1)
                expand.append(-1)
        behind = any(atom.kind == "batch" for group in layout[dim + 1 :] for atom in group)
        x = (vector.transpose(0, 1) if behind else vector).reshape(shape)
        if len(shape) == len(layout):
            return x  # type: ignore[no-any-return]
        x = x.expand(expand)
        flat = [
            1 if d != dim and not any(a.kind == "batch" for a in group) else -1 if d != dim else vector.shape[1]
            for d, group in enumerate(layout)
        ]
        return x.reshape(flat)  # type: ignore[no-any-return]

    # coercion

    def lift(self, value: Tracked, level: int, content: bool = False) -> Traced:
        """A tracked value brought to ``level``."""
        assert value.layout is not None
        return self.coerce(value, value.layout, level, content)

    def coerce(self, value: Tracked, layout: Layout, level: int, content: bool = False) -> Traced:
        """``value`` as an operand of something laid out as ``layout`` at ``level``, dimensions aligned at the right.

        ``content`` is averaged by a merge; anything else (positions, masks, rotary tables) follows the token that
        stands for the merged ones.
        """
        x = value.proxy
        offset = len(layout) - x.dim()
        if offset < 0:
            raise Fallback("its operands have different ranks")
        start: dict[int, int] = {}
        present = [False] * len(layout)
        for dim in range(offset, len(layout)):
            group, own = layout[dim], value.layout[dim - offset] if value.layout is not None else None
            size = x.value.shape[dim - offset] if own is None else None
            if own == () or (own is None and same(size, 1) and not all(same(a.size, 1) for a in group)):
                continue
            present[dim] = True
            if own is not None and same_group(own, group):
                origin = value.level
            elif own is not None and not all(a.kind == "plain" for a in own):
                raise Fallback("its operands order batch and tokens differently")
            else:
                origin = 0
                old = reduce(operator.mul, (a.size for a in group), 1)
                if not same(old, size if own is None else reduce(operator.mul, (a.size for a in own), 1)):
                    if has_tokens(group):
                        raise Fallback("an operand has another number of tokens")
                    continue
            if has_tokens(group) and origin < level:
                if any(a.kind == "rows" for a in group):
                    raise Fallback("an operand is in the order of the old tokens")
                start[dim] = origin
        if not start:
            return x
        self._batch_dim(layout)
        key = (x.node, content, tuple(start.items()), tuple(map(_signature, layout)))
        if (key, level) not in self._coerced:
            self._coerced[key, level] = self._map_dims(x, layout, present, start, level, content, key)
        return self._coerced[key, level]

    def _batch_dim(self, layout: Layout) -> int:
        found = [d for d, group in enumerate(layout) if any(a.kind == "batch" for a in group)]
        if len(found) != 1:
            raise Fallback("no single batch dimension goes with the tokens")
        return found[0]

    def _map_dims(
        self, x: Traced, layout: Layout, present: list[bool], start: dict[int, int], level: int, content: bool, key: Any
    ) -> Traced:
        """Bring the token axes at the dimensions in ``start`` up to ``level``, from the level given there.

        What was reached on the way to an earlier level is kept under ``key``: a mask that every block reads is brought
        one level further by each, not up from the first.
        """
        for _ in range(len(layout) - x.dim()):
            x = x.unsqueeze(0)
        slots = [(dim, atom) for dim, group in enumerate(layout) for atom in (group or (Atom("plain", 1),))]
        split = len(slots) > len(layout)
        # other token axes of the value are at this very level, so that nothing can be taken over from an earlier one
        settled = any(has_tokens(g) and present[d] and d not in start for d, g in enumerate(layout))
        reached = self._reached.setdefault((key, level) if settled else key, {})
        first = max((step for step in reached if step <= level), default=min(start.values()))
        if first in reached:
            x = reached[first]
        elif split:
            x = x.reshape([
                1 if not present[dim]
                else x.shape[dim] if len(layout[dim]) <= 1
                else self.extent((atom,), start.get(dim, level))
                for dim, atom in slots
            ])  # fmt: skip
        batch = next(i for i, (_, atom) in enumerate(slots) if atom.kind == "batch")
        for step in range(first, level):
            for i, (dim, atom) in enumerate(slots):
                if atom.kind == "tokens" and start.get(dim, level) <= step:
                    x = self._map_dim(x, batch, i, atom, step, content)
            reached[step + 1] = x
        if split:
            full = [self.extent((atom,), level) for _, atom in slots]
            grown = {d for (d, atom), here in zip(slots, x.value.shape, strict=True) if not same(here, 1)}
            x = x.expand(
                [n if d in grown and len(layout[d]) > 1 else -1 for (d, _), n in zip(slots, full, strict=True)]
            )
            x = x.reshape([
                x.shape[next(i for i, slot in enumerate(slots) if slot[0] == d)] if len(group) <= 1
                else self.extent(group, level) if d in grown else 1
                for d, group in enumerate(layout)
            ])  # fmt: skip
        return x

    def _map_dim(self, x: Traced, batch: int, tokens: int, atom: Atom, step: int, content: bool) -> Traced:
        """Apply map number ``step`` along one dimension of ``x``."""
        token_map = self.axis_map(atom, step)
        sizes = self.axis_sizes(atom, step) if content else None
        return self._front(x, batch, tokens, lambda y: token_map.carry(y, sizes) if content else token_map.pick(y))

    def _front(self, x: Traced, batch: int, tokens: int, fn: Callable[[Traced], Any]) -> Traced:
        """``fn`` applied with batch and tokens as the first two dimensions."""
        order = [batch, tokens, *(d for d in range(x.dim()) if d not in (batch, tokens))]
        if order == list(range(x.dim())):
            return fn(x)  # type: ignore[no-any-return]
        back = [order.index(d) for d in range(x.dim())]
        return fn(x.permute(order)).permute(back)  # type: ignore[no-any-return]

    def axis_map(self, atom: Atom, step: int) -> TokenMap:
        """Map number ``step`` as it acts on an axis, which may hold other tokens beside the space."""
        key = (step, tuple((str(p.size) if p.fixed else "", p.left, p.right) for p in atom.parts))
        if key not in self._maps:
            whole = self.levels[step].map
            parts = [
                Identity(p.size, p.size) if p.fixed else whole.cut(p.left, p.right) if p.left or p.right else whole
                for p in atom.parts
            ]
            self._maps[key] = Concat.of(tuple(parts))
        return self._maps[key]

    # restoring

    def restored(self, node: Node, why: str) -> Traced:
        """The value of ``node`` in the old space."""
        if not self._is_tracked(node):
            return self._plain(node)
        if node not in self._restored:
            self._restored[node] = self._restore(node, why)
        return self._restored[node]

    def _restore(self, node: Node, why: str) -> Traced:
        value = self.env[node]
        if isinstance(value, Tracked):
            maps = [entry.map for entry in self.levels[: value.level]]
            if all(m.exact for m in maps):
                if any(atom.kind == "rows" for group in value.layout or () for atom in group):
                    raise self._refusal(node, f"{why}, and its rows are in an order that data decided")
                return self._unmap(value, stale=False)
            if node in self.space.streams:
                return self._unmap(value, stale=True)
        if isinstance(value, Tracked) and not value.local:
            raise self._refusal(node, why)
        inputs = {n: self.restored(n, why) for n in inputs_of(node)}
        return self.emit.copy(node, inputs.__getitem__)

    def _refusal(self, node: Node, why: str) -> Refused:
        here, there = place_of(self.node), place_of(node)
        what = f"{self.maker} drops tokens that {here.op} needs back ({why}), and {there.op} has mixed them by then"
        remedy = "use merge or transform, which can give every token back, or name a later block with at="
        return Refused(Refusal("cannot-restore", what, remedy, here))

    def _unmap(self, value: Tracked, stale: bool) -> Traced:
        """Undo the maps, last first; with ``stale`` a dropped token takes the value that it was dropped with."""
        assert value.layout is not None
        layout, x = value.layout, value.proxy
        slots = [(dim, atom) for dim, group in enumerate(layout) for atom in (group or (Atom("plain", 1),))]
        split = len(slots) > len(layout)
        if split:
            x = x.reshape([self.extent((atom,), value.level) for _, atom in slots])
        batch = next((i for i, (_, atom) in enumerate(slots) if atom.kind == "batch"), None)
        if batch is None:
            raise self._refusal(self.node, "it holds tokens of several samples at once")
        for i, (_, atom) in enumerate(slots):
            if atom.kind == "tokens":
                for step in reversed(range(value.level)):
                    old = self._stale(atom, step) if stale else None
                    x = self._front(x, batch, i, partial(self.axis_map(atom, step).restore, stale=old))
        return x.reshape([self.extent(group, 0) for group in layout]) if split else x

    def _stale(self, atom: Atom, step: int) -> Any:
        """The stream before map ``step``, ``[batch, tokens, ...]``, one piece for each part of the axis."""
        before = self.levels[step].stale
        assert before.layout is not None
        tokens = token_dims(before.layout)[0]
        x = self._front(before.proxy, self._batch_dim(before.layout), tokens, lambda y: y)
        order = [self._batch_dim(before.layout), tokens]
        x = before.proxy.permute([*order, *(d for d in range(x.dim()) if d not in order)]) if order != [0, 1] else x
        site = before.layout[tokens][0]
        if len(site.parts) > 1:
            place = next(i for i, p in enumerate(site.parts) if not p.fixed)
            left = sum(p.size for p in site.parts[:place])
            x = x[:, left : left + self.count(Atom("tokens", 0, (site.parts[place],)), step)]
        pieces = [
            None if p.fixed else x[:, p.left : x.shape[1] - p.right] if p.left or p.right else x for p in atom.parts
        ]
        return pieces[0] if len(pieces) == 1 else pieces


class Builder:
    """What a pass sees at its site: the stream and other values as ``[batch, tokens, ...]``, and token counts.

    Attributes:
        prefix, suffix: protected tokens at either end.
        count: tokens now, protected ones included; an int, or a proxy where symbolic.
    """

    def __init__(self, walker: Walker, stream: Tracked) -> None:
        self._walker = walker
        self._tracked = stream
        self.level = len(walker.levels)
        self.prefix, self.suffix = walker.space.prefix, walker.space.suffix
        self.count = walker.levels[-1].map.target if walker.levels else walker.root_count
        self.batch = walker.batch
        self.emit = walker.emit

    @property
    def stream(self) -> Value:
        """The residual stream, ``[batch, tokens, features]``."""
        return self._tokens_first(self._tracked)

    @property
    def sizes(self) -> Value | None:
        """How many tokens each one stands for, ``[batch, tokens]``; None where all are one."""
        return self._walker.sizes(self.level)

    def arange(self, *bounds: Any) -> Value:
        """``torch.arange`` in the graph: ``stop``, or ``start, stop``; symbolic ones too."""
        return self.emit.call(torch.arange, *bounds)

    def eye(self, size: Any) -> Value:
        """``torch.eye`` in the graph."""
        return self.emit.call(torch.eye, size)

    def read(self, node: Node, tokens: int = -2) -> Value | None:
        """A value of the block such as the key, its tokens in front, ``[batch, tokens, heads, head_dim]``.

        Args:
            node: a node of the old graph.
            tokens: its token dimension.

        Returns:
            None where the value holds other tokens than the stream, as the joint keys of text and image do.
        """
        value, space = self._walker.value(node), self._walker.space
        stream = self._tracked.proxy.value.shape
        if value.layout is not None:
            try:
                x: Value = self._tokens_first(value)
            except Fallback:
                return None
        elif self.level or not same(value.proxy.value.shape[tokens], stream[space.token_dim]):
            return None
        else:
            x = value.proxy.movedim(tokens, 1)
        return x if same(x.value.shape[0], stream[space.batch_dim]) else self._unfolded(x)

    def _unfolded(self, x: Value) -> Value | None:
        """``[batch * heads, tokens, head_dim]`` with its heads apart, ``[batch, tokens, heads, head_dim]``."""
        rows, batch = x.value.shape[0], self._tracked.proxy.value.shape[self._walker.space.batch_dim]
        if x.dim() != 3 or not isinstance(rows, int) or not isinstance(batch, int) or rows % batch:
            return None
        return x.reshape(batch, rows // batch, x.shape[1], x.shape[2]).movedim(1, 2)

    def follow(self, node: Node) -> Value:
        """A value of the old graph, shaped like the stream, brought to the tokens of this site."""
        walker = self._walker
        layout = self._tracked.layout
        assert layout is not None
        return walker.coerce(walker.value(node), layout, self.level)

    def given(self, node: Node) -> Value:
        """A value of the old graph without tokens of this site, as it is."""
        return self._walker.value(node).proxy

    def visible(self, mask: Node | None) -> Value | None:
        """Which tokens any query sees, bool ``[batch or 1, tokens]``.

        Args:
            mask: ``[batch or 1, heads or 1, rows, tokens]``, or ``[batch * heads, rows, tokens]``.

        Returns:
            None where the mask is of other tokens than the stream.
        """
        if mask is None:
            return None
        walker = self._walker
        value = walker.value(mask)
        if value.layout is not None or not same(value.proxy.value.shape[-1], self._old_count()):
            return None
        if mask not in walker.seen:
            x: Any = value.proxy
            if x.dim() == 3:
                x = self._unfolded(x)
                x = None if x is None else x.movedim(2, 1)
            if x is None or x.dim() != 4:
                return None
            open_ = x if x.dtype == torch.bool else x > MASKED_OUT
            walker.seen[mask] = Tracked(open_.to(torch.float32).amax((1, 2)) > 0)
        site = self._tracked.layout
        assert site is not None
        layout = (site[self._walker.space.batch_dim], site[self._walker.space.token_dim])
        return walker.coerce(walker.seen[mask], layout, self.level)

    def constant(self, tensor: torch.Tensor, name: str, shape: tuple[Any, ...] | None = None) -> Value:
        """A tensor of the pass's own, stored with the model; ``shape`` where the graph must see it as dynamic."""
        self._walker.constants[name] = tensor
        node = self._walker.graph.get_attr(name)
        sizes = tuple(tensor.shape) if shape is None else tuple(getattr(s, "value", s) for s in shape)
        if self.emit.fake is None:
            node.meta["val"] = tensor
        else:
            with self.emit.fake:
                node.meta["val"] = torch.empty(sizes, dtype=tensor.dtype)
        return self.emit.proxy(node)

    def _old_count(self) -> Any:
        shape = (
            self._walker.levels[0].stale.proxy.value.shape if self._walker.levels else self._tracked.proxy.value.shape
        )
        return shape[self._walker.space.token_dim]

    def _tokens_first(self, value: Tracked) -> Traced:
        walker = self._walker
        layout = value.layout
        assert layout is not None
        x = walker.lift(value, self.level)
        dims = token_dims(layout)
        if len(dims) != 1 or not is_token_axis(layout[dims[0]]):
            raise Fallback("a value read at the site mixes tokens with other axes")
        (dim,) = dims
        atom = layout[dim][0]
        order = [walker._batch_dim(layout), dim]
        order += [d for d in range(x.dim()) if d not in order]
        x = x.permute(order) if order != sorted(order) else x
        if len(atom.parts) > 1:
            place = next(i for i, p in enumerate(atom.parts) if not p.fixed)
            left = sum(p.size for p in atom.parts[:place])
            x = x[:, left : left + self.count]
        return x


def _signature(group: Group) -> Any:
    """What tells how maps act on a dimension: its factors in order, and the stretches of each token axis."""
    return tuple(
        (atom.kind, tuple((str(p.size) if p.fixed else "", p.left, p.right) for p in atom.parts)) for atom in group
    )


TAPPED = ("index", "group", "weight")
"""What tells where the tokens of a map go."""


def _tensors(token_map: TokenMap) -> list[tuple[str, Value]]:
    """The tensors that define a map."""
    return [(name, v) for name in TAPPED if (v := getattr(token_map, name, None)) is not None]
