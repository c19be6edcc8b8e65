"""Token maps: typed maps from one token axis to a shorter, longer or reordered one.

A map is written once over ``Tensor`` and works unchanged on ``torch.fx.Proxy``: called with tensors it computes, called
with proxies it appends the same ops to a graph. Everything is ``[batch, tokens, ...]``; the rewriter brings other
layouts into that form. No map uses a scatter: selection is a gather, averaging a matmul, so every engine agrees.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch.fx import Proxy

Value = Any
"""A ``Tensor``, or the rewriter's proxy that stands for one and knows its shape."""

Count = Any
"""A number of tokens: ``int``, or a proxy of a symbolic size."""


def arange(count: Count, like: Value) -> Value:
    """``0 .. count`` on the device of ``like``; in the graph of ``like`` where that is a proxy."""
    if isinstance(like, Proxy):
        return like.tracer.create_proxy("call_function", torch.arange, (count,), {"device": like.device})
    return torch.arange(count, device=like.device)


def take(x: Value, index: Value) -> Value:
    """Rows of ``x`` ``[batch or 1, tokens, ...]`` at ``index`` ``[batch, kept]`` -> ``[batch, kept, ...]``."""
    # Whole rows are gathered by two indices: engines copy rows, where an index expanded over the features would make
    # them fetch single elements.
    if isinstance(x.shape[0], int) and x.shape[0] == 1:
        return torch.ops.aten.index.Tensor(x.squeeze(0), [index])
    batch = arange(index.shape[0], index).unsqueeze(1)
    return torch.ops.aten.index.Tensor(x, [batch, index])


def one_hot(index: Value, count: Count, dtype: torch.dtype) -> Value:
    """``[batch, n]`` -> ``[batch, count, n]``, one where ``index`` equals the row."""
    rows = arange(count, index)
    return (rows.unsqueeze(0).unsqueeze(-1) == index.unsqueeze(1)).to(dtype)


@dataclass(frozen=True)
class TokenMap:
    """From a space of ``source`` tokens to one of ``target`` tokens.

    Attributes:
        source, target: token counts.
        ordered: the order of tokens is kept, so that a causal flag stays true.
        exact: ``restore`` needs no other value for tokens that the map dropped.
        proportional: attention after the map weighs each key by the number of tokens it stands for.
        hides: some tokens count as nothing.
    """

    source: Count
    target: Count

    ordered = True
    exact = True
    proportional = True
    hides = False

    def carry(self, x: Value, sizes: Value | None = None) -> Value:
        """Contents ``[batch, source, ...]`` -> ``[batch, target, ...]``; ``sizes`` ``[batch, source]`` weigh means."""
        raise NotImplementedError

    def pick(self, x: Value) -> Value:
        """What belongs to a position and must not be averaged: rotary tables, masks, indices."""
        raise NotImplementedError

    def restore(self, y: Value, stale: Value | None = None) -> Value:
        """Back to the source; a token that has no image takes its row of ``stale``."""
        raise NotImplementedError

    def resize(self, sizes: Value | None) -> Value | None:
        """Tokens that each target token stands for, float ``[batch, target]``; None where all are one."""
        raise NotImplementedError

    def cut(self, left: int, right: int) -> TokenMap:
        """The map without the first ``left`` and the last ``right`` tokens, which map to themselves."""
        raise NotImplementedError


@dataclass(frozen=True)
class Identity(TokenMap):
    """Every token stays; ``sizes`` all one."""

    def carry(self, x: Value, sizes: Value | None = None) -> Value:
        return x

    def pick(self, x: Value) -> Value:
        return x

    def restore(self, y: Value, stale: Value | None = None) -> Value:
        return y

    def resize(self, sizes: Value | None) -> Value | None:
        return sizes


@dataclass(frozen=True)
class Gather(TokenMap):
    """Keep the tokens at ``index`` ``[batch, target]``.

    Attributes:
        in_order: the index ascends.
        bijective: the index is a permutation, so that nothing is dropped.
    """

    index: Value = None
    in_order: bool = True
    bijective: bool = False

    @property
    def ordered(self) -> bool:  # type: ignore[override]
        return self.in_order

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return self.bijective

    def carry(self, x: Value, sizes: Value | None = None) -> Value:
        return take(x, self.index)

    def pick(self, x: Value) -> Value:
        return take(x, self.index)

    def restore(self, y: Value, stale: Value | None = None) -> Value:
        hits = one_hot(self.index, self.source, torch.float32)  # [batch, source, target]
        place = hits.argmax(-1)  # [batch, source]
        if stale is None:
            return take(y, place)
        kept = hits.amax(-1) > 0
        for _ in range(y.dim() - 2):
            kept = kept.unsqueeze(-1)
        return torch.where(kept, take(y, place), stale)

    def resize(self, sizes: Value | None) -> Value | None:
        return None if sizes is None else take(sizes, self.index)

    def cut(self, left: int, right: int) -> Gather:
        index = self.index[:, left : self.target - right] - left
        return Gather(self.source - left - right, self.target - left - right, index, self.in_order, self.bijective)


@dataclass(frozen=True)
class Assign(TokenMap):
    """Merge: source token i goes wholly to target ``group[:, i]``, which holds the size-weighted mean.

    Attributes:
        group: int64 ``[batch, source]``.
        index: int64 ``[batch, target]``, the source token that each target takes its position from.
    """

    group: Value = None
    index: Value = None
    in_order: bool = False
    weighs: bool = True

    @property
    def ordered(self) -> bool:  # type: ignore[override]
        return self.in_order

    @property
    def proportional(self) -> bool:  # type: ignore[override]
        return self.weighs

    def matrix(self) -> Value:
        """The assignment as float ``[batch, target, source]`` of zeros and ones."""
        return one_hot(self.group, self.target, torch.float32)

    def carry(self, x: Value, sizes: Value | None = None) -> Value:
        return _weighted_mean(self.matrix(), x, sizes)

    def pick(self, x: Value) -> Value:
        return take(x, self.index)

    def restore(self, y: Value, stale: Value | None = None) -> Value:
        return take(y, self.group)

    def resize(self, sizes: Value | None) -> Value | None:
        return _sum_sizes(self.matrix(), sizes)

    def cut(self, left: int, right: int) -> Assign:
        group = self.group[:, left : self.source - right] - left
        index = self.index[:, left : self.target - right] - left
        return Assign(self.source - left - right, self.target - left - right, group, index, self.in_order, self.weighs)


@dataclass(frozen=True)
class Merge(TokenMap):
    """Merge in the form that costs least: most tokens stay, the few of ``moved`` are added to others.

    Attributes:
        index: int64 ``[batch, target]``, the source token that each target stands on.
        moved: int64 ``[batch, r]``, the source tokens that are merged away.
        slot: int64 ``[batch, r]``, the target that each of them joins.
    """

    index: Value = None
    moved: Value = None
    slot: Value = None
    weighs: bool = True

    ordered = False

    @property
    def proportional(self) -> bool:  # type: ignore[override]
        return self.weighs

    @property
    def group(self) -> Value:
        """Int64 ``[batch, source]``: the target of each source token."""
        # index and moved together name each source token once: sorting that permutation inverts it
        inverse = torch.cat([self.index, self.moved], 1).argsort(1)
        stay = torch.zeros_like(self.index) + arange(self.index.shape[1], self.index)
        return take(torch.cat([stay, self.slot], 1), inverse)

    def carry(self, x: Value, sizes: Value | None = None) -> Value:
        stay, away = take(x, self.index), take(x, self.moved)
        joins = one_hot(self.slot, self.target, torch.float32)  # [batch, target, r]
        if sizes is not None:
            kept, gone = take(sizes, self.index), take(sizes, self.moved)
            joins = joins * gone.unsqueeze(1)
            total = joins.sum(-1) + kept
            joins, share = joins / total.unsqueeze(-1), kept / total
        else:
            total = joins.sum(-1) + 1
            joins, share = joins / total.unsqueeze(-1), 1 / total
        added = _mix(joins, away)
        for _ in range(x.dim() - 2):
            share = share.unsqueeze(-1)
        return stay * share.to(x.dtype) + added

    def pick(self, x: Value) -> Value:
        return take(x, self.index)

    def restore(self, y: Value, stale: Value | None = None) -> Value:
        return take(y, self.group)

    def resize(self, sizes: Value | None) -> Value | None:
        joins = one_hot(self.slot, self.target, torch.float32)
        if sizes is None:
            return joins.sum(-1) + 1
        return torch.matmul(joins, take(sizes, self.moved).unsqueeze(-1)).squeeze(-1) + take(sizes, self.index)

    def cut(self, left: int, right: int) -> Merge:
        return replace(
            self,
            source=self.source - left - right,
            target=self.target - left - right,
            index=self.index[:, left : self.target - right] - left,
            moved=self.moved - left,
            slot=self.slot - left,
        )


@dataclass(frozen=True)
class Matrix(TokenMap):
    """Many to many: ``weight`` ``[batch, target, source]`` >= 0, each column sums to one (or to zero: dropped).

    Paper: Token Transforming, arXiv 2506.05709 (the abstract's unifying form; the map itself is the pass's).
    """

    weight: Value = None
    index: Value = None
    in_order: bool = True
    weighs: bool = True

    @property
    def ordered(self) -> bool:  # type: ignore[override]
        return self.in_order

    @property
    def proportional(self) -> bool:  # type: ignore[override]
        return self.weighs

    def carry(self, x: Value, sizes: Value | None = None) -> Value:
        return _weighted_mean(self.weight, x, sizes)

    def pick(self, x: Value) -> Value:
        return take(x, self.index)

    def restore(self, y: Value, stale: Value | None = None) -> Value:
        return _mix(self.weight.transpose(1, 2), y)

    def resize(self, sizes: Value | None) -> Value | None:
        return _sum_sizes(self.weight, sizes)

    def cut(self, left: int, right: int) -> Matrix:
        weight = self.weight[:, left : self.target - right, left : self.source - right]
        index = self.index[:, left : self.target - right] - left
        return Matrix(self.source - left - right, self.target - left - right, weight, index, self.in_order, self.weighs)


NOTHING = 1e-37
"""The size of a token that counts as nothing: its logarithm is finite, so that no row of a softmax becomes NaN."""


@dataclass(frozen=True)
class Masked(TokenMap):
    """The reference of a prune: no token moves, those where ``kept`` ``[batch, source]`` is false count as nothing."""

    kept: Value = None

    exact = False
    hides = True

    def carry(self, x: Value, sizes: Value | None = None) -> Value:
        return x

    def pick(self, x: Value) -> Value:
        return x

    def restore(self, y: Value, stale: Value | None = None) -> Value:
        kept = self.kept
        for _ in range(y.dim() - 2):
            kept = kept.unsqueeze(-1)
        return y if stale is None else torch.where(kept, y, stale)

    def resize(self, sizes: Value | None) -> Value | None:
        kept = self.kept.to(torch.float32)
        return (kept if sizes is None else sizes * kept).clamp(NOTHING)

    def cut(self, left: int, right: int) -> Masked:
        count = self.source - left - right
        return Masked(count, count, self.kept[:, left : self.source - right])


@dataclass(frozen=True)
class Averaged(TokenMap):
    """The reference of a merge: no token moves, each takes the mean of its ``group`` ``[batch, source]``.

    Attributes:
        index: int64 ``[batch, source]``, the token whose position stands for the group of each.
    """

    group: Value = None
    index: Value = None

    ordered = False

    def carry(self, x: Value, sizes: Value | None = None) -> Value:
        same_group = (self.group.unsqueeze(1) == self.group.unsqueeze(2)).to(torch.float32)
        return _weighted_mean(same_group, x, None)

    def pick(self, x: Value) -> Value:
        return take(x, self.index)

    def restore(self, y: Value, stale: Value | None = None) -> Value:
        return y

    def resize(self, sizes: Value | None) -> Value | None:
        return sizes

    def cut(self, left: int, right: int) -> Averaged:
        count = self.source - left - right
        group, index = self.group[:, left : self.source - right], self.index[:, left : self.source - right] - left
        return Averaged(count, count, group, index)


@dataclass(frozen=True)
class Concat(TokenMap):
    """Maps side by side along one token axis, such as text that stays beside an image that is pruned."""

    parts: tuple[TokenMap, ...] = ()

    @classmethod
    def of(cls, parts: tuple[TokenMap, ...]) -> TokenMap:
        """The parts as one map; a single part is itself."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            reduce(operator.add, (p.source for p in parts)), reduce(operator.add, (p.target for p in parts)), parts
        )

    @property
    def ordered(self) -> bool:  # type: ignore[override]
        return all(part.ordered for part in self.parts)

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return all(part.exact for part in self.parts)

    def _split(self, x: Value, sizes: list[Count]) -> list[Value]:
        pieces, start = [], 0
        for size in sizes:
            pieces.append(x[:, start : start + size])
            start = start + size
        return pieces

    def carry(self, x: Value, sizes: Value | None = None) -> Value:
        counts = [part.source for part in self.parts]
        weights = self._split(sizes, counts) if sizes is not None else [None] * len(counts)
        pieces = [
            part.carry(piece, w) for part, piece, w in zip(self.parts, self._split(x, counts), weights, strict=True)
        ]
        return torch.cat(pieces, 1)

    def pick(self, x: Value) -> Value:
        if isinstance(x.shape[0], int) and x.shape[0] == 1:
            batch = next(_batch(part) for part in self.parts if not isinstance(part, Identity))
            x = x.expand(batch, *[-1] * (x.dim() - 1))
        counts = [part.source for part in self.parts]
        return torch.cat([part.pick(piece) for part, piece in zip(self.parts, self._split(x, counts), strict=True)], 1)

    def restore(self, y: Value, stale: Value | None = None) -> Value:
        if stale is None:
            stale = [None] * len(self.parts)
        old = stale if isinstance(stale, list) else self._split(stale, [p.source for p in self.parts])
        new = self._split(y, [p.target for p in self.parts])
        return torch.cat([part.restore(n, o) for part, n, o in zip(self.parts, new, old, strict=True)], 1)


@dataclass(frozen=True)
class Slice(TokenMap):
    """``target`` tokens from ``start`` on: for a past that is cut, or a prompt that is dropped."""

    start: Count = 0

    exact = False

    def carry(self, x: Value, sizes: Value | None = None) -> Value:
        return x[:, self.start : self.start + self.target]

    def pick(self, x: Value) -> Value:
        return self.carry(x)

    def restore(self, y: Value, stale: Value | None = None) -> Value:
        if stale is None:
            raise ValueError("a slice has dropped tokens: restore needs their stale rows")
        return torch.cat([stale[:, : self.start], y, stale[:, self.start + self.target :]], 1)

    def resize(self, sizes: Value | None) -> Value | None:
        return None if sizes is None else self.carry(sizes)


def _batch(token_map: TokenMap) -> Count:
    """The number of samples of a map: the first size of any tensor that defines it."""
    values = (getattr(token_map, name, None) for name in ("index", "kept", "group", "weight"))
    return next(value.shape[0] for value in values if value is not None)


def pool(source: int, target: int, batch: int) -> Matrix:
    """Average pooling of a token axis to ``target`` tokens as a fixed matrix; sizes need not divide evenly."""
    group = (torch.arange(source) * target) // source
    weight = (torch.arange(target).unsqueeze(1) == group).float()
    index = weight.argmax(1)
    return Matrix(source, target, weight.expand(batch, -1, -1), index.expand(batch, -1))


def compose(first: TokenMap, second: TokenMap) -> TokenMap:
    """One map that does ``first``, then ``second``."""
    if isinstance(first, Identity):
        return second
    if isinstance(second, Identity):
        return first
    if isinstance(first, Gather) and isinstance(second, Gather):
        index = take(first.index, second.index)
        return Gather(first.source, second.target, index, first.in_order and second.in_order)
    if isinstance(first, Assign) and isinstance(second, Assign):
        group, index = take(second.group, first.group), take(first.index, second.index)
        order, weighs = first.in_order and second.in_order, first.weighs and second.weighs
        return Assign(first.source, second.target, group, index, order, weighs)
    index = second.pick(first.pick(_positions(first)))
    return Matrix(first.source, second.target, torch.matmul(_weights(second), _weights(first)), index, False)


def _positions(token_map: TokenMap) -> Value:
    batch = _weights(token_map).shape[0]
    return torch.arange(token_map.source).unsqueeze(0).expand(batch, -1)


def _weights(token_map: TokenMap) -> Value:
    """Column-stochastic ``[batch, target, source]`` of any map with an index."""
    match token_map:
        case Matrix(weight=weight):
            return weight
        case Assign():
            return token_map.matrix()
        case Merge():
            return one_hot(token_map.group, token_map.target, torch.float32)
        case Gather():
            return one_hot(token_map.index, token_map.source, torch.float32).transpose(1, 2)
    raise TypeError(f"{type(token_map).__name__} has no matrix form")


def _weighted_mean(weight: Value, x: Value, sizes: Value | None) -> Value:
    if sizes is not None:
        weight = weight * sizes.unsqueeze(1)
    return _mix(weight / weight.sum(-1, keepdim=True), x)


def _mix(weight: Value, x: Value) -> Value:
    """``weight`` ``[batch, n, m]`` times ``x`` ``[batch, m, ...]``."""
    if x.dim() == 3:
        return torch.matmul(weight.to(x.dtype), x)
    flat = torch.matmul(weight.to(x.dtype), x.flatten(2))
    return flat.reshape([*flat.shape[:2], *x.shape[2:]])


def _sum_sizes(weight: Value, sizes: Value | None) -> Value:
    return weight.sum(-1) if sizes is None else torch.matmul(weight, sizes.unsqueeze(-1)).squeeze(-1)
