"""What the masks of attention do, found by evaluating them at some sizes, and their form for the kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from optpass.export import branches
from optpass.export.spelling import call
from optpass.program import Stage, op_name

aten = torch.ops.aten

ATTENDS_ALL, CAUSAL = "nothing", "causal"


class Masks:
    """What the masks of a program do, and their form for the attention kernel, each made once.

    A mask that depends on its inputs through sizes alone is evaluated at the smallest, the example and the largest
    sizes. One that masks nothing is dropped; one that is a lower triangle becomes the flag that kernels have for it.
    """

    def __init__(self, stage: Stage, program: ExportedProgram) -> None:
        self.trials = stage.trials()
        self.constants = constants(program)
        self.symbols = _symbols(stage, program)
        self.kinds: dict[Node, str] = {}
        self.known: dict[Node, list[Any] | None] = {}
        self.biases: dict[tuple[Node, str, str], tuple[Node, Node | None]] = {}

    def kind(self, mask: Node) -> str:
        """``nothing`` if it masks nothing, ``causal`` for a lower triangle, else ``other``."""
        if mask not in self.kinds:
            self.kinds[mask] = self._kind(mask)
        return self.kinds[mask]

    def _kind(self, mask: Node) -> str:
        moved = mask = branches.origin(mask)
        while moved.op == "call_function" and op_name(moved) in MOVES and isinstance(moved.args[0], Node):
            # Moving the elements of a mask that masks nothing about gives one that masks nothing.
            values = self._values(moved)
            if values is not None:
                break
            moved = branches.origin(moved.args[0])
        values = self._values(moved)
        if values is None:
            return "other"
        if all(bool(value.all()) if value.dtype == torch.bool else not bool(value.any()) for value in values):
            return ATTENDS_ALL
        return CAUSAL if moved is mask and all(_is_lower_triangle(value) for value in values) else "other"

    def bias(self, graph: Graph, mask: Node, query: Node, key: Node) -> tuple[Node, Node | None]:
        """The mask as an additive ``[batch or 1, heads or 1, queries, keys]``, and which rows attend to anything.

        The rows are ``[batch or 1, queries, 1]``, 0 where all is masked: there torch returns 0, while a softmax of
        equal values returns the mean. None for a float mask, whose values torch itself takes as they are.
        """
        sizes = query.meta["val"].shape[2], key.meta["val"].shape[2]
        place = mask, str(sizes[0]), str(sizes[1])
        if place not in self.biases:
            self.biases[place] = self._bias(graph, mask, query, key)
        return self.biases[place]

    def _bias(self, graph: Graph, mask: Node, query: Node, key: Node) -> tuple[Node, Node | None]:
        dtype = query.meta["val"].dtype
        made = mask
        for _ in range(4 - mask.meta["val"].dim()):
            made = call(graph, aten.unsqueeze.default, made, 0)
        rows = None
        if mask.meta["val"].dtype == torch.bool:
            if made.meta["val"].shape[1] == 1:
                attended = call(graph, aten.any.dim, made, -1, True)
                rows = call(graph, aten._to_copy.default, call(graph, aten.select.int, attended, 1, 0), dtype=dtype)
            value = made.meta["val"]
            bias = graph.call_function(bias_of, (made, dtype))
            bias.meta = {"val": value.to(dtype)}
            made = bias
        elif mask.meta["val"].dtype != dtype:
            made = call(graph, aten._to_copy.default, made, dtype=dtype)
        lengths = []
        for node, axis in ((query, 2), (key, 3)):
            size = node.meta["val"].shape[2]
            same = str(made.meta["val"].shape[axis]) == str(size)
            lengths.append(-1 if same else size if isinstance(size, int) else call(graph, aten.sym_size.int, node, 2))
        if lengths != [-1, -1]:
            made = call(graph, aten.expand.default, made, [-1, -1, *lengths])
        return made, rows

    def _values(self, node: Node) -> list[Any] | None:
        """The tensor at each trial, None where it depends on data or is too large to look at."""
        node = branches.origin(node)
        self._evaluate(node)
        values = self.known[node]
        return values if values and all(isinstance(value, torch.Tensor) for value in values) else None

    def _evaluate(self, node: Node) -> None:
        # By a stack of our own: a chain of nodes may be deeper than Python recurses.
        stack = [node]
        while stack:
            top = stack[-1]
            sources = [branches.origin(n) for n in top.all_input_nodes]
            needed = [] if self._is_size(top) else [n for n in sources if n not in self.known]
            if top in self.known or not needed:
                stack.pop()
                if top not in self.known:
                    self.known[top] = self._evaluated(top)
            elif any(self.known.get(n, True) is None for n in sources):
                self.known[top] = None
            else:
                stack.append(needed[0])

    @staticmethod
    def _is_size(node: Node) -> bool:
        return node.target is aten.sym_size.int

    def _evaluated(self, node: Node) -> list[Any] | None:
        if node.op == "placeholder":
            return [self.constants[node.name]] * len(self.trials) if node.name in self.constants else None
        if self._is_size(node):
            return self._size(node.meta["val"])
        if node.op != "call_function" or _elements(node) > LARGEST_MASK:
            return None
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            return None
        found = [self.known[branches.origin(n)] for n in node.all_input_nodes]
        if any(values is None for values in found):
            return None
        results = []
        for trial in range(len(self.trials)):
            look = {n: values[trial] for n, values in zip(node.all_input_nodes, found, strict=True) if values}
            args = torch.fx.node.map_arg((node.args, node.kwargs), look.__getitem__)
            try:
                results.append(node.target(*args[0], **args[1]))  # type: ignore[operator]
            except (RuntimeError, TypeError, ValueError, IndexError):
                return None
        return results

    def _size(self, value: Any) -> list[Any] | None:
        if isinstance(value, int):
            return [value] * len(self.trials)
        expression = value.node.expr
        sizes = []
        for trial in self.trials:
            known = {s: trial[self.symbols[str(s)]] for s in expression.free_symbols if str(s) in self.symbols}
            result = expression.subs(known)
            if not result.is_Integer:
                return None
            sizes.append(int(result))
        return sizes


LARGEST_MASK = 1 << 28
"""In elements at the largest sizes: what may be evaluated in passing."""

MOVES = (
    "index", "gather", "index_select", "expand", "view", "reshape", "transpose", "permute", "slice", "select",
    "unsqueeze", "squeeze", "clone", "contiguous",
)  # fmt: skip


def _elements(node: Node) -> int:
    """An upper estimate by the hints of the example; expanded views take no memory, so this errs on the safe side."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    total = 1
    for size in value.shape:
        total *= size if isinstance(size, int) else 1
    return total


def _is_lower_triangle(value: torch.Tensor) -> bool:
    rows, columns = value.shape[-2:]
    if rows != columns:
        return False
    lower = torch.ones(rows, columns, dtype=torch.bool).tril()
    if value.dtype == torch.bool:
        return bool((value == lower).all())
    open_ = (value == 0) | ~lower
    shut = (value <= MASKED) | lower
    return bool((open_ & shut).all())


MASKED = -1e4
"""An additive mask at or below this leaves a weight of 0 in float32, whatever the scores of a sane model."""


def constants(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Tensors that a program holds beside its weights, by the names of their placeholders."""
    signature = program.graph_signature
    state = {**program.state_dict, **program.constants}
    names = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    found = {node: state.get(name) for node, name in names.items()}
    return {node: value for node, value in found.items() if isinstance(value, torch.Tensor)}


def _symbols(stage: Stage, program: ExportedProgram) -> dict[str, str]:
    """Names of the dynamic dimensions by the symbols that the graph uses for them."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    symbols: dict[str, str] = {}
    for spec, name in zip(stage.inputs, program.graph_signature.user_inputs, strict=True):
        shape = nodes[str(name)].meta["val"].shape
        symbols |= {str(s): size for s, size in zip(shape, spec.shape, strict=True) if isinstance(size, str)}
    return symbols


def bias_of(mask: Any, dtype: Any) -> Any:
    """Target of 0 where a boolean mask is true, and the lowest finite number elsewhere."""
    raise NotImplementedError
