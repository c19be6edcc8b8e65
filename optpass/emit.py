"""Proxies that know their shape: torch code called with them appends nodes, and each node is checked as it is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_aggregate, map_arg
from torch.fx.proxy import GraphAppendingTracer

PROVENANCE = ("nn_module_stack", "stack_trace")


Base: Any = Proxy
"""What a proxy answers to is decided by tensors: typed as ``Any``."""


class Traced(Base):  # type: ignore[misc]
    """A proxy whose shape is known: ints where static, else proxies of the size."""

    @property
    def value(self) -> Any:
        """What the node yields, as a fake tensor or a symbolic number."""
        return self.node.meta["val"]

    @property
    def shape(self) -> tuple[Any, ...]:
        sizes = self.value.shape
        return tuple(s if isinstance(s, int) else self.size(axis) for axis, s in enumerate(sizes))

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.value.device  # type: ignore[no-any-return]

    def dim(self) -> int:
        """The rank."""
        return len(self.value.shape)

    def size(self, axis: int) -> Any:
        """The size along ``axis``: an int where static, else a proxy."""
        static = self.value.shape[axis]
        return (
            static
            if isinstance(static, int)
            else self.tracer.create_proxy("call_function", torch.ops.aten.sym_size.int, (self, axis % self.dim()), {})
        )

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self.value))])


class Emitter(GraphAppendingTracer):
    """Appends nodes to a graph, each with its fake value and the provenance of ``origin``."""

    def __init__(self, graph: Graph, example: Any) -> None:
        super().__init__(graph)
        self.fake = detect_fake_mode(example)
        self.origin: Node | None = None
        self.maker: str | None = None
        self.evaluated: dict[str, Any] = {}

    def proxy(self, node: Node) -> Traced:
        if "val" not in node.meta:
            node.meta["val"] = self._evaluate(node)
        if self.origin is not None:
            node.meta |= {key: self.origin.meta[key] for key in PROVENANCE if key in self.origin.meta}
        if self.maker is not None:
            node.meta["custom"] = {"optpass": self.maker}
        return Traced(node, self)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Traced:
        """One call of an op, with proxies or constants as arguments."""
        result = self.create_proxy("call_function", target, args, kwargs)
        assert isinstance(result, Traced)
        return result

    def copy(self, node: Node, lookup: Any) -> Traced:
        """``node`` of another graph, its inputs replaced by ``lookup(input)``; the value is kept, not computed."""
        made = self.graph.node_copy(node, lambda n: lookup(n).node)
        return Traced(made, self)

    @contextmanager
    def on_behalf(self, origin: Node | None, maker: str | None = None) -> Iterator[None]:
        """Nodes made inside carry the module path and source line of ``origin``, and ``maker`` as their author."""
        before = self.origin, self.maker
        self.origin, self.maker = origin, maker
        try:
            yield
        finally:
            self.origin, self.maker = before

    def _evaluate(self, node: Node) -> Any:
        """What the node yields; the blocks of a tower repeat the same ops on the same shapes, which are run once."""
        key = _static_call(node)
        if key is None:
            return self._run(node)
        if key not in self.evaluated:
            self.evaluated[key] = self._run(node)
        return self.evaluated[key]

    def _run(self, node: Node) -> Any:
        def real(arg: Any) -> Any:
            return arg.meta["val"] if isinstance(arg, Node) else arg

        args = map_aggregate(node.args, real)
        kwargs = map_aggregate(node.kwargs, real)
        with self.fake or torch.no_grad(), torch.no_grad():
            if isinstance(node.target, str):
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            return node.target(*args, **kwargs)


def _static_call(node: Node) -> str | None:
    """A text equal for calls that yield the same fake value; None where an input is no tensor of a static shape."""
    static = True

    def described(source: Node) -> str:
        nonlocal static
        value = source.meta["val"]
        if not isinstance(value, torch.Tensor) or not all(isinstance(size, int) for size in value.shape):
            static = False
            return ""
        return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device} {value.requires_grad}"

    text = repr(map_arg((node.args, dict(node.kwargs)), described))
    if not static:
        return None
    return f"{node.op} {node.target if isinstance(node.target, str) else id(node.target)} {text}"


def inputs_of(node: Node) -> list[Node]:
    """The nodes among the arguments, in order, repeats kept."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found
