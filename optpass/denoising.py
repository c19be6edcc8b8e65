"""Where a denoiser is cut, so that features are reused between its steps.

What is predicted are the values along the cheapest cut of the graph behind a range of blocks. All that feeds the cut
alone is skipped in a step that is predicted; all that is cheap, and all that depends on time and condition, is computed
anew in every step. Nothing is known by name: blocks come from ``optpass.structure``. What becomes of the cut is in
``optpass.reusing``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import networkx as nx
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from optpass.canonical import PRODUCTS
from optpass.errors import Refusal
from optpass.program import Stage, op_name
from optpass.rewrite import Refused
from optpass.runtime.features import Roles, recognise
from optpass.structure import PASS_THROUGH, Block, Structure, analyse, call_path, hint

if TYPE_CHECKING:
    from optpass.passes.cache.policies import Policy

HEAVY = {
    *PRODUCTS,
    "linear",
    "addmm",
    "mm",
    "convolution",
    "conv2d",
    "conv1d",
    "conv3d",
    "scaled_dot_product_attention",
}
"""Ops that a step is worth skipping for."""

OUTSIDE = 2.0
"""Weight of a value outside of all blocks in the cut: a stream is predicted before a norm rather than behind it."""


@dataclass(frozen=True)
class Cut:
    """Where a denoiser is cut.

    Attributes:
        structure: of the stage.
        roles: of its inputs.
        blocks: the range that is skipped.
        features: the values that are predicted.
        anchors: what each of them was when it entered the range, so that only what the range adds is predicted; None
            where a feature has no such value.
        probes: what the policy is shown.
    """

    structure: Structure
    roles: Roles
    blocks: tuple[Block, ...]
    features: tuple[Node, ...]
    anchors: tuple[Node | None, ...]
    probes: tuple[Node, ...]


def cut(stage: Stage, policy: Policy, region: str | None = None) -> Cut:
    """Find what to predict.

    Args:
        stage: a denoiser.
        policy: says what it is shown, and what it predicts by default.
        region: ``blocks``, ``output``, or a range of blocks such as ``2:10``.

    Raises:
        Refused: no denoiser, no such blocks, or nothing to cut there.
    """
    roles = recognise(stage.inputs, stage.outputs)
    if roles is None:
        what = "the model has no noisy input of the shape of its output and no timestep"
        raise Refused(Refusal("no-denoiser", what, "name its inputs sample and timestep"))
    structure = analyse(stage)
    if structure.main is None:
        raise Refused(Refusal("no-blocks", "no blocks were found to skip", "see optpass inspect"))
    blocks = sorted((b for t in structure.towers for b in t.blocks), key=_order(structure.module.graph))
    region = region or ("output" if policy.whole else "blocks")
    first = 1 if policy.probe == "first-block" else 0
    chosen = _range(blocks, region, first)
    graph = _Flow(structure, roles, chosen)
    features = graph.cut(whole=region == "output")
    anchors = tuple(None if region == "output" else graph.anchor(feature) for feature in features)
    probes = graph.probes(policy.probe, blocks)
    graph.check_sizes((*features, *probes))
    return Cut(structure, roles, tuple(chosen), features, anchors, probes)


def _order(graph: Graph) -> Any:
    place = {node: i for i, node in enumerate(graph.nodes)}
    return lambda block: place[block.after_attention]


def _range(blocks: list[Block], region: str, first: int) -> list[Block]:
    if region in ("blocks", "output"):
        chosen = blocks[first:]
    else:
        start, _, stop = region.partition(":")
        low, high = int(start or 0), int(stop or len(blocks))
        if low < first:
            what = f"region={region} holds block {low}, which this policy computes in each step"
            raise Refused(Refusal("region", what, f"begin with {first}"))
        chosen = blocks[low:high]
    if not chosen:
        what = f"region={region} holds none of {len(blocks)} blocks to skip"
        raise Refused(Refusal("region", what, f"name a range inside 0:{len(blocks)}"))
    return chosen


class _Flow:
    """What depends on the skipped blocks, and the cheapest values that all of it goes through."""

    def __init__(self, structure: Structure, roles: Roles, blocks: Sequence[Block]) -> None:
        self.nodes = list(structure.module.graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.blocks = blocks
        self.paths = {node: call_path(node) for node in self.nodes}
        self.all = [block.path for tower in structure.towers for block in tower.blocks]
        (sample,) = (node for node in self.nodes if node.op == "placeholder" and node.target == roles.sample)
        self.batch = str(sample.meta["val"].shape[0])
        self.noisy = behind(self.nodes, [sample])
        self.heavy = [n for n in self.nodes if n in self.noisy and op_name(n) in HEAVY and self._within(n, blocks)]
        if not self.heavy:
            raise Refused(Refusal("region", "the blocks compute nothing of the noisy input", "name other blocks"))
        self.behind = behind(self.nodes, self.heavy)
        self.variable = behind(self.nodes, [node for node in self.nodes if node.op == "placeholder"])

    def _within(self, node: Node, blocks: Iterable[Block]) -> bool:
        return any(_inside(self.paths[node], block.path) for block in blocks)

    def cut(self, whole: bool) -> tuple[Node, ...]:
        """The minimum vertex cut between the skipped ops and what has to be computed in each step."""
        output = self.nodes[-1]
        feeding = ahead(self.heavy)
        # turned round, since of equal cuts the one next to the end is found, and the one next to the blocks is wanted
        graph = nx.DiGraph()
        for node in self.nodes:
            if node not in self.behind or node is output:
                continue
            graph.add_edge((node, 1), (node, 0), capacity=self._size(node, whole))
            if node in self.heavy:
                graph.add_edge((node, 0), "blocks")
            for user in node.users:
                last = user is output or (not whole and user not in feeding and self._fresh(user))
                graph.add_edge("rest" if last else (user, 0), (node, 1))
        value, (_, near) = nx.minimum_cut(graph, "rest", "blocks")
        if math.isinf(value):
            raise Refused(Refusal("region", "the blocks are read by what cannot be cut off", "name other blocks"))
        return tuple(node for node in self.nodes if (node, 0) in near and (node, 1) not in near and node in self.behind)

    def _fresh(self, node: Node) -> bool:
        """Whether an op behind the region has to be computed in each step: where time or condition come in anew, or the
        work of another block or of the head.
        """
        if any(_inside(self.paths[node], block.path) for block in self.blocks):
            return False
        joins = any(source in self.variable and source not in self.behind for source in node.all_input_nodes)
        return joins or op_name(node) in HEAVY

    def _size(self, node: Node, whole: bool) -> float:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            return math.inf
        outside = not whole and not any(_inside(self.paths[node], path) for path in self.all)
        return float(math.prod(hint(size) for size in value.shape)) * (OUTSIDE if outside else 1.0)

    def anchor(self, feature: Node) -> Node | None:
        """The value of the same shape that the blocks were given, along the additions of the stream."""
        shape = str(feature.meta["val"].shape)
        queue = [feature]
        seen: set[Node] = set()
        while queue:
            node = queue.pop()
            if node in seen or str(getattr(node.meta.get("val"), "shape", None)) != shape:
                continue
            seen.add(node)
            if node not in self.behind:
                if node in self.noisy:
                    return node
            elif op_name(node) in {"add", *PASS_THROUGH}:
                queue += node.all_input_nodes
        return None

    def check_sizes(self, kept: Iterable[Node]) -> None:
        """Refuse what a driver could not make a state for: of dynamic sizes it knows the batch, and that in front."""
        for node in kept:
            first, *rest = (str(size) for size in node.meta["val"].shape)
            if not all(size.isdigit() for size in ([] if first == self.batch else [first]) + rest):
                what = "what is kept between steps has a dynamic size that is not the batch in front"
                raise Refused(Refusal("dynamic-range", what, "declare a range for the batch alone, or for nothing"))

    def probes(self, kind: str, blocks: Sequence[Block]) -> tuple[Node, ...]:
        """What a policy of this kind looks at."""
        if kind == "first-block":
            return blocks[0].exit, blocks[0].entry
        if kind == "modulated":
            read = [source for source in self.heavy[0].all_input_nodes if source in self.noisy]
            return (read[0],)
        return ()


def _inside(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + ".")


def behind(nodes: Sequence[Node], sources: Iterable[Node]) -> set[Node]:
    """The sources and what depends on them."""
    found = set(sources)
    for node in nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def ahead(nodes: Iterable[Node], stop: Collection[Node] = ()) -> set[Node]:
    """The nodes and what they depend on; what ``stop`` depends on is not looked at."""
    found: set[Node] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue += [] if node in stop else node.all_input_nodes
    return found


def extract(
    module: GraphModule, inputs: Sequence[Node], outputs: Sequence[Node]
) -> tuple[GraphModule, dict[Node, Node]]:
    """What computes ``outputs`` of ``inputs``, as a module of its own, and what each node became in it; weights are
    shared.
    """
    graph = Graph()
    new: dict[Node, Node] = {}
    for number, node in enumerate(inputs):
        new[node] = graph.placeholder(f"given_{number}")
        new[node].meta = dict(node.meta)
    needed = ahead(outputs, inputs)
    for node in module.graph.nodes:
        if node in needed and node not in new and node.op != "output":
            new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(tuple(new[node] for node in outputs))
    graph.lint()
    return GraphModule(module, graph), new


__all__ = ["Cut", "ahead", "behind", "cut", "extract"]
