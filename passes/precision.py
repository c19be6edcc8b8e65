"""Compute in half precision what a stated error leaves room for, found by measuring and not by a list of ops.

Paper: Mixed Precision Training, arXiv 1710.03740, section 3 (products in half precision, sums and what overflows in
float32). Which ops are which is a table there and in autocast; here the graph is run, and three things decide. Places
and counts are exact: what comes of integers alone, and all that a choice is made from, stays float32. What half
precision cannot hold, at these inputs with ``HEADROOM`` to spare, stays float32. Of the rest, that stays float32 whose
share in the error of the outputs the contract has no room for.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from optpass.cost import flops
from optpass.errors import Refusal
from optpass.export.fidelity import tolerance
from optpass.passes.base import Conversion, Converted, Options
from optpass.probes import relative
from optpass.program import Stage, module_path, op_name
from optpass.rewrite import Refused

aten = torch.ops.aten

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}

HEADROOM = 4.0
"""Other inputs may have values this many times larger than those that were measured."""

MOVES = (
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "expand", "slice", "select",
    "squeeze", "unsqueeze", "split", "split_with_sizes", "chunk", "unbind", "getitem", "cat", "stack", "contiguous",
    "clone", "alias", "detach", "dropout", "t", "movedim", "repeat", "repeat_interleave", "flip", "roll", "numpy_T",
)  # fmt: skip
"""Ops that compute nothing and so have no precision of their own."""

CASTS = ("to", "_to_copy", "type_as")

LOOKUPS = ("embedding", "index", "index_select", "gather")
"""Ops whose integers are places, which their values do not come of."""


class PrecisionOptions(Options):
    """Options of ``precision``."""

    dtype: Literal["bf16", "f16"] = Field("bf16", description="the half precision")
    max_error: float | None = Field(
        None,
        gt=0,
        description="largest error of an output, relative to its largest value; by default what the rounding of so "
        "many products in a row explains",
    )


class Precision(Conversion):
    """Compute in half precision as far as a stated error of the outputs allows."""

    name = "precision"
    options_type = PrecisionOptions
    identity: ClassVar[dict[str, Any]] = {}

    def limit(self, stage: Stage) -> float:
        """``max_error``, or what rounding explains, relative to the largest value of an output."""
        return self.options.max_error or tolerance(stage, self.options.dtype)

    def convert(self, stage: Stage) -> Converted:
        """The stage with casts, its weights in the precision that they are used in.

        Raises:
            Refused: no product is left for half precision.
        """
        search = _Search(stage, DTYPES[self.options.dtype], self.limit(stage))
        half = search.largest()
        if not any(flops(node) for node in half):
            raise Refused(self._refusal(search))
        new, moved = _converted(search.module, half, search.dtype, search.types(half)), set(half)
        computing = [node for node in search.module.graph.nodes if node in search.floats and not _moves(node)]
        stayed = [node for node in computing if node not in moved]
        ops = {self.options.dtype: len(half), "f32": len(stayed)}
        return Converted(stage.retraced(new), ops, sorted({f"{module_path(n)} {op_name(n)}".strip() for n in stayed}))

    def _refusal(self, search: _Search) -> Refusal:
        dtype = self.options.dtype
        if not any(flops(node) for node in search.candidates):
            what = f"all products feed a choice of tokens, which {dtype} would make another"
            return Refusal("precision", what, "leave precision out, or the passes that choose")
        what = f"no product can be {dtype} within max_error={search.limit:.1e}"
        return Refusal("precision", what, "allow a larger max_error, or try the other dtype")


class _Search:
    """Which nodes of a graph can be half.

    Attributes:
        floats: nodes whose result is float32.
        candidates: those of them that are computed from values, in order.
    """

    def __init__(self, stage: Stage, dtype: torch.dtype, limit: float) -> None:
        self.module, self.dtype, self.limit = stage.module, dtype, limit
        self.inputs = [stage.resized(sizes) for sizes in stage.trials()]
        self.expected = [stage.run(inputs) for inputs in self.inputs]
        nodes = [node for node in self.module.graph.nodes if node.op == "call_function"]
        self.floats = {node for node in nodes if _dtype(node) is torch.float32}
        exact = _counted(self.module.graph) | _chosen_from(self.module.graph)
        # an op of another library takes and gives what it was written for
        own = [n for n in nodes if n in self.floats and "." not in op_name(n)]
        self.candidates = [n for n in own if n not in exact and not _moves(n)]
        self.weights: dict[Node, Tensor] = {}

    def largest(self) -> list[Node]:
        """All candidates but those that half precision cannot hold, and those whose error is too much."""
        half, unfit, error = self.candidates, set(self.candidates), math.inf
        while unfit and half:
            unfit, error = self._tried(half)
            half = [node for node in half if node not in unfit]
        if error <= self.limit:
            return half
        groups = sorted(self._bearable(half), key=lambda pair: pair[0] / math.sqrt(1 + sum(map(flops, pair[1]))))
        few, many = 0, len(groups)
        while few < many:
            some = (few + many + 1) // 2
            if self.error(_flat(groups[:some])) <= self.limit:
                few = some
            else:
                many = some - 1
        found = set(_flat(groups[:few]))
        return [node for node in half if node in found]

    def _bearable(self, half: Sequence[Node]) -> Iterator[tuple[float, list[Node]]]:
        """Groups of ops, alike and in one module, with the error that each brings alone, if that is bearable."""
        groups: dict[tuple[str, str], list[Node]] = defaultdict(list)
        for node in half:
            groups[module_path(node), op_name(node)].append(node)
        for group in groups.values():
            alone = self.error(group)
            if alone <= self.limit:
                yield alone, group
            elif len(group) > 1:
                yield from ((error, [node]) for node in group if (error := self.error([node])) <= self.limit)

    def error(self, half: Collection[Node]) -> float:
        """The largest error of an output, relative to its largest value, or more than the limit."""
        return self._tried(half, stop=True)[1]

    def _tried(self, half: Collection[Node], stop: bool = False) -> tuple[set[Node], float]:
        """What does not fit at some size, and the largest error; with ``stop`` only until it is beyond the limit."""
        unfit: set[Node] = set()
        worst = 0.0
        for inputs, expected in zip(self.inputs, self.expected, strict=True):
            trial = self._trial(half, inputs)
            unfit |= trial.unfit
            worst = max(worst, relative(trial.results, expected))
            if stop and worst > self.limit:
                break
        return unfit, worst

    def types(self, half: Collection[Node]) -> dict[Node, torch.dtype]:
        """The dtype of each result."""
        return self._trial(half, self.inputs[0]).types

    def _trial(self, half: Collection[Node], inputs: Sequence[Tensor]) -> _Trial:
        return _Trial(self.module, half, self.dtype, self.weights, inputs)


class _Trial(Interpreter):
    """One run with some nodes in half precision; where one does not fit it is computed in float32, and noted.

    Attributes:
        unfit: nodes in ``half`` that did not fit.
        types: the dtype of each result.
        results: the outputs.
    """

    def __init__(
        self,
        module: GraphModule,
        half: Collection[Node],
        dtype: torch.dtype,
        weights: dict[Node, Tensor],
        inputs: Sequence[Tensor],
    ) -> None:
        super().__init__(module)
        self.half, self.dtype, self.weights = set(half), dtype, weights
        self.unfit: set[Node] = set()
        self.types: dict[Node, torch.dtype] = {}
        with torch.no_grad():
            self.results: tuple[Tensor, ...] = self.run(*inputs)

    def run_node(self, n: Node) -> Any:
        result = self._computed(n)
        if isinstance(result, Tensor):
            self.types[n] = result.dtype
        return result

    def _computed(self, node: Node) -> Any:
        if node.op == "output":
            results: Any = map_arg(node.args[0], self._wide)
            return tuple(results)
        if node.op != "call_function":
            return super().run_node(node)
        if _changes_nothing(node):
            return self.env[node.all_input_nodes[0]]
        if node in self.half:
            result = self._halved(node)
            if result is not None:
                return result
            self.unfit.add(node)
        given = [value.dtype for value in tree_leaves([self.env[n] for n in node.all_input_nodes]) if _is_float(value)]
        return self._call(node, self.env.__getitem__ if _follows(node, given) else self._wide)

    def _halved(self, node: Node) -> Tensor | None:
        """The result in half precision, None where an input or the result does not fit in it."""
        inputs = {n: self._narrow(n) for n in node.all_input_nodes}
        if not all(_fits(self.env[n], narrow) for n, narrow in inputs.items()):
            return None
        try:
            result = self._call(node, inputs.__getitem__)
        except (RuntimeError, NotImplementedError):  # no kernel for it, or a number that it cannot take
            return None
        if not isinstance(result, Tensor) or result.dtype is not self.dtype or not _fits(result, result):
            return None
        finite = result.isfinite()
        return result if finite.all() or finite.equal(self._call(node, self._wide).isfinite()) else None

    def _wide(self, node: Node) -> Any:
        return _cast(self.env[node], _dtype(node))

    def _narrow(self, node: Node) -> Any:
        if _dtype(node) is not torch.float32:
            return self.env[node]
        if node.op != "get_attr":
            return _cast(self.env[node], self.dtype)
        if node not in self.weights:
            self.weights[node] = _cast(self.env[node], self.dtype)
        return self.weights[node]

    @staticmethod
    def _call(node: Node, value: Callable[[Node], Any]) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _fits(value: Any, narrow: Any) -> bool:
    """Whether half precision holds a tensor, with ``HEADROOM``, and tells whole numbers apart that it told apart."""
    if not _is_float(value) or not value.numel():
        return True
    largest = value.abs().masked_fill(value.isinf(), 0).amax()
    if largest * HEADROOM > torch.finfo(narrow.dtype).max:
        return False
    if value.dtype == narrow.dtype or not (value == value.round()).all() or (narrow == value).all():
        return True
    return bool(value.unique().numel() == narrow.unique().numel())


def _converted(
    module: GraphModule, half: Collection[Node], dtype: torch.dtype, types: Mapping[Node, torch.dtype]
) -> GraphModule:
    """The graph that a trial ran."""
    graph, halves = Graph(), set(half)
    attributes: dict[str, Any] = {}
    env: dict[Node, Node] = {}
    casts: dict[tuple[Node, torch.dtype], Node] = {}

    def cast(node: Node, to: torch.dtype | None, user: Node) -> Node:
        now = types.get(node)
        if to is None or now is None or now is to:
            return env[node]
        if (node, to) not in casts:
            if node.op == "get_attr":
                name = f"{node.target}_{str(to).rpartition('.')[2]}"
                attributes[name] = _attribute(node).to(to)
                casts[node, to] = graph.get_attr(name)
            else:
                casts[node, to] = graph.call_function(aten.to.dtype, (env[node], to))
                casts[node, to].meta = {k: user.meta[k] for k in ("nn_module_stack", "stack_trace") if k in user.meta}
        return casts[node, to]

    def wanted(node: Node) -> Callable[[Node], Node]:
        if node in halves:
            return lambda n: cast(n, dtype if _dtype(n) is torch.float32 else None, node)
        if _follows(node, [types[n] for n in node.all_input_nodes if n in types and types[n].is_floating_point]):
            return env.__getitem__
        return lambda n: cast(n, _dtype(n), node)

    for node in module.graph.nodes:
        if node.op == "get_attr":
            attributes[str(node.target)] = _attribute(node)
        same = _changes_nothing(node)
        env[node] = env[node.all_input_nodes[0]] if same else graph.node_copy(node, wanted(node))
    graph.eliminate_dead_code()
    return GraphModule(attributes, graph)


def _follows(node: Node, dtypes: Collection[torch.dtype]) -> bool:
    """Whether a node takes its inputs in the precision that they have."""
    return node.op == "call_function" and _moves(node) and len(set(dtypes)) <= 1


def _changes_nothing(node: Node) -> bool:
    """Whether a node makes sure that a value is float32, which it is: what it is now is found by measuring."""
    return op_name(node) in CASTS and _dtype(node) is torch.float32 is _dtype(node.all_input_nodes[0])


def _moves(node: Node) -> bool:
    if _changes_nothing(node):
        return True
    if op_name(node) in LOOKUPS:
        return not (isinstance(node.args[0], Node) and node.args[0].op == "get_attr")
    return op_name(node) in MOVES


CONSTANT, COUNTED, VALUE = range(3)


def _counted(graph: Graph) -> set[Node]:
    """Nodes that come of integers or of constants alone: places, counts and angles of rotation."""
    kinds: dict[Node, int] = {}
    for node in graph.nodes:
        sources = [kinds[n] for n in node.all_input_nodes if n in kinds]
        if node.op == "get_attr":
            kinds[node] = CONSTANT
        elif node.op == "placeholder":
            kinds[node] = VALUE if _real(node) else COUNTED
        elif op_name(node) in LOOKUPS and isinstance(node.args[0], Node):
            # what is looked up in a table of weights was learned
            kinds[node] = kinds.get(node.args[0], VALUE) or VALUE
        else:
            kinds[node] = max(sources, default=CONSTANT)
    return {node for node, kind in kinds.items() if kind != VALUE}


def _chosen_from(graph: Graph) -> set[Node]:
    """Nodes that a choice depends on: integers or truths made of numbers that rounding moves."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        results = [value for value in tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
        whole = any(not value.is_floating_point() and not value.is_complex() for value in results)
        chooses = node.op == "call_function" and whole and any(map(_real, node.all_input_nodes))
        if chooses or any(user in found for user in node.users):
            found.add(node)
    return found


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    return value.to(dtype) if dtype is not None and _is_float(value) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _real(node: Node) -> bool:
    dtype = _dtype(node)
    return dtype is not None and (dtype.is_floating_point or dtype.is_complex)


def _dtype(node: Node) -> torch.dtype | None:
    value = _attribute(node) if node.op == "get_attr" else node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _attribute(node: Node) -> Any:
    return operator.attrgetter(str(node.target))(node.graph.owning_module)


def _flat(groups: Iterable[tuple[float, list[Node]]]) -> list[Node]:
    return [node for _, group in groups for node in group]
