"""A denoiser made to reuse features between steps: the cut, and the stages that come of it.

What is predicted are the values along the cheapest cut of the graph behind a range of blocks. All that feeds the cut
alone is skipped in a step that is predicted; all that is cheap, and all that depends on time and condition, is computed
anew in every step. Nothing is known by name: blocks come from ``optpass.structure``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from optpass import partial
from optpass.canonical import PRODUCTS
from optpass.errors import Refusal
from optpass.program import Stage, TensorSpec, op_name
from optpass.rewrite import Refused
from optpass.runtime.features import (
    COMPUTED,
    COUNT,
    DAMAGED,
    KNOBS,
    LAST,
    NEW,
    REFUSED,
    STATE,
    STEP,
    STEPS,
    STREAK,
    WARMUP,
    Roles,
    recognise,
)
from optpass.runtime.manifest import FULL, REUSE, STEERED
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
        self.noisy = _behind(self.nodes, [sample])
        self.heavy = [n for n in self.nodes if n in self.noisy and op_name(n) in HEAVY and self._within(n, blocks)]
        if not self.heavy:
            raise Refused(Refusal("region", "the blocks compute nothing of the noisy input", "name other blocks"))
        self.behind = _behind(self.nodes, self.heavy)
        self.variable = _behind(self.nodes, [node for node in self.nodes if node.op == "placeholder"])

    def _within(self, node: Node, blocks: Iterable[Block]) -> bool:
        return any(_inside(self.paths[node], block.path) for block in blocks)

    def cut(self, whole: bool) -> tuple[Node, ...]:
        """The minimum vertex cut between the skipped ops and what has to be computed in each step."""
        output = self.nodes[-1]
        ahead = _ahead(self.heavy)
        # turned round, since of equal cuts the one next to the end is found, and the one next to the blocks is wanted
        graph = nx.DiGraph()
        for node in self.nodes:
            if node not in self.behind or node is output:
                continue
            graph.add_edge((node, 1), (node, 0), capacity=self._size(node, whole))
            if node in self.heavy:
                graph.add_edge((node, 0), "blocks")
            for user in node.users:
                last = user is output or (not whole and user not in ahead and self._fresh(user))
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


def _behind(nodes: Sequence[Node], sources: Iterable[Node]) -> set[Node]:
    """The sources and what depends on them."""
    found = set(sources)
    for node in nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _ahead(nodes: Iterable[Node], stop: Collection[Node] = ()) -> set[Node]:
    """The nodes and what they depend on; what ``stop`` depends on is not looked at."""
    found: set[Node] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue += [] if node in stop else node.all_input_nodes
    return found


# the stages


def stages(parts: Parts, form: str) -> list[Stage]:
    """The stages that a driver runs.

    Args:
        parts: the denoiser, taken apart.
        form: ``branch``, one stage that decides in the graph, or ``split``, where ``reuse`` asks for ``full``.

    Each takes the inputs of the model and the state, and returns the outputs of the model and the new state; ``reuse``
    returns what of it changes.
    """
    if form == "split":
        return [_stage(FULL, parts, _Full(parts)), _stage(REUSE, parts, _Reuse(parts))]
    return [_stage(STEERED, parts, _Steered(parts))]


class Parts(nn.Module):
    """The graph in three: ``front`` runs in each step, ``inner`` is skipped, ``back`` goes on from the features."""

    def __init__(self, found: Cut, policy: Policy, recompute: float = 0.0) -> None:
        super().__init__()
        self.found, self.policy = found, policy
        module = found.structure.module
        nodes = list(module.graph.nodes)
        outputs: Any = nodes[-1].args[0]
        placeholders = [node for node in nodes if node.op == "placeholder"]
        anchors = [node for node in found.anchors if node is not None]
        needed = _ahead([*outputs, *anchors, *found.probes], found.features) - set(found.features) | set(placeholders)
        # of an op with several results, each by itself is handed on
        needed |= {n for n in nodes if op_name(n) == "getitem" and n.args[0] in needed}
        skipped = _ahead(found.features) - needed
        tail = _behind(nodes, found.features)
        # weights too: what a branch of the graph reads has to be handed to it
        given_weights = {n for n in nodes if n.op == "get_attr"}
        into = [
            n
            for n in nodes
            if n in needed | given_weights and n not in tail and _handed(n) and n.users.keys() & skipped
        ]
        on = [n for n in nodes if n in needed and n not in tail and _handed(n) and n.users.keys() & (needed & tail)]
        given = list(dict.fromkeys([*(n for n in on if _variable(n)), *(n for n in outputs if n not in tail)]))
        self.sizes = len(anchors), len(found.probes), len(into)
        self.front, _ = extract(module, placeholders, [*anchors, *found.probes, *into, *given])
        self.inner, _ = extract(module, into, found.features)
        self.back, _ = extract(module, [*given, *found.features], list(outputs))
        self.into = into
        self.count = len(placeholders)
        self.example = found.structure.stage.example
        with torch.no_grad():
            anchored, probes, into_values, _ = self.look(self.example)
            features = self.less(self.inner(*into_values), anchored)
        one = torch.zeros(1, dtype=torch.int64)
        shared = {name: one for name in (STEP, STEPS, LAST, COUNT)}
        self.start = {n: torch.tensor([v]) for n, v in policy.options.model_dump().items() if n in KNOBS}
        every = shared | self.start | policy.start(features, probes)
        self.initial = {name: value.clone() for name, value in every.items()}
        self.lasting = {STEPS, *self.start}
        self.few: GraphModule | None = None
        if recompute:
            self._recompute(recompute)

    def _recompute(self, share: float) -> None:
        """Compute a share of the tokens in each step that is predicted."""
        found, policy = self.found, self.policy
        space, count = partial.space_of(found), partial.tokens(found)
        score = policy.score(self.initial)
        if score is None:
            what = f"policy {policy.name} tells no tokens apart"
            raise Refused(Refusal("recompute", what, "use worldcache, or a polynomial with order=1 or more"))
        if any(feature.meta["val"].dim() < 3 or feature.meta["val"].shape[1] != count for feature in found.features):
            what = "what is predicted has other tokens than the blocks"
            raise Refused(Refusal("recompute", what, "predict another region, or leave recompute out"))
        self.width = max(round(share * (count - space.protected)), 1) + space.protected
        self.few = partial.gathered(found, self.into, self.width)

    def look(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Anchors, probes, what the skipped part is given, and what goes around it."""
        found = list(self.front(*inputs))
        anchors, probes, into = self.sizes
        a, b, c = anchors, anchors + probes, anchors + probes + into
        shown = found[a:b]
        if self.policy.probe == "first-block":
            shown = [shown[0] - shown[1]]
        return found[:a], shown, found[b:c], found[c:]

    def less(self, features: Sequence[Tensor], anchors: Sequence[Tensor]) -> list[Tensor]:
        """What the range adds to its anchors."""
        rest = iter(anchors)
        return [x if a is None else x - next(rest) for x, a in zip(features, self.found.anchors, strict=True)]

    def plus(self, features: Sequence[Tensor], anchors: Sequence[Tensor]) -> list[Tensor]:
        """Features on their anchors."""
        rest = iter(anchors)
        return [x if a is None else x + next(rest) for x, a in zip(features, self.found.anchors, strict=True)]

    def must(self, state: Mapping[str, Tensor], probes: Sequence[Tensor], damaged: Tensor) -> Tensor:
        """Whether the step has to be computed, bool ``[1]``."""
        step, steps = state[STEP], state[STEPS]
        found = (step < state[WARMUP]) | (step >= steps - 1) | (state[COUNT] < self.policy.needs) | damaged
        found = found | (step - state[LAST] > state[STREAK])
        due = self.policy.due(state, probes)
        return found if due is None else found | due

    def after(
        self, state: Mapping[str, Tensor], features: Sequence[Tensor], anchors: Sequence[Tensor], probes: list[Tensor]
    ) -> dict[str, Tensor]:
        """The state behind a computed step."""
        own = self.policy.computed(state, self.less(features, anchors), probes)
        return {STEP: state[STEP] + 1, LAST: state[STEP] + 0, COUNT: state[COUNT] + 1, **own}

    def chosen(self, state: Mapping[str, Tensor]) -> Tensor:
        """The tokens that are computed in a step that is predicted, ascending."""
        score = self.policy.score(state)
        assert score is not None
        return partial.choose(score, self.width, partial.space_of(self.found))

    def completed(
        self,
        state: Mapping[str, Tensor],
        predicted: Sequence[Tensor],
        anchors: Sequence[Tensor],
        into: Sequence[Tensor],
    ) -> list[Tensor]:
        """Features of a step that is predicted; some tokens are computed after all, where that is asked for."""
        features = self.plus(predicted, anchors)
        if self.few is None:
            return features
        chosen = self.chosen(state)
        return partial.put(self.few(chosen, *into), chosen, features)

    def predicted(self, state: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """Features by the policy, and whether any of them is no number."""
        found = self.policy.predict(state)
        finite = torch.ones(1, dtype=torch.bool)
        for feature in found:
            # a product with nothing is nothing, unless it is no number
            finite = finite & ((feature * 0).sum() == 0)
        return found, ~finite

    def states(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The state by name."""
        return dict(zip(self.initial, tensors[self.count :], strict=True))


class _Full(nn.Module):
    """Computes the step."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.names = [name for name in parts.initial if name not in parts.lasting]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        parts, state = self.parts, self.parts.states(tensors)
        anchors, probes, into, around = parts.look(tensors[: parts.count])
        features = list(parts.inner(*into))
        new = parts.after(state, features, anchors, probes)
        return (*parts.back(*around, *features), *(new[name] for name in self.names))


class _Reuse(nn.Module):
    """Predicts the step, and says whether it has to be computed instead."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        with torch.no_grad():
            probes = parts.look(parts.example)[1]
            changed = parts.policy.predicted(parts.initial, probes)
        self.names = [STEP, *changed, REFUSED, DAMAGED]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        parts, state = self.parts, self.parts.states(tensors)
        anchors, probes, into, around = parts.look(tensors[: parts.count])
        predicted, damaged = parts.predicted(state)
        new = {STEP: state[STEP] + 1, **parts.policy.predicted(state, probes)}
        new |= {REFUSED: parts.must(state, probes, damaged), DAMAGED: damaged}
        features = parts.completed(state, predicted, anchors, into)
        return (*parts.back(*around, *features), *(new[name] for name in self.names))


class _Steered(nn.Module):
    """Decides in the graph; the branch that is not taken costs nothing."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.kept = [name for name in parts.initial if name not in parts.lasting]
        self.names = [*self.kept, COMPUTED, DAMAGED]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        parts, state = self.parts, self.parts.states(tensors)
        anchors, probes, into, around = parts.look(tensors[: parts.count])
        predicted, damaged = parts.predicted(state)
        compute = parts.must(state, probes, damaged)
        kept = self.kept
        given = {"anchors": anchors, "probes": probes, "into": into, "predicted": predicted}
        every = [*(x for part in given.values() for x in part), *state.values()]
        # a tensor is handed over once, however many read it
        operands = list({id(tensor): tensor for tensor in every}.values())
        place = {id(tensor): number for number, tensor in enumerate(operands)}
        places = [place[id(tensor)] for tensor in every]

        def named(tensors: Sequence[Tensor]) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
            rest = iter([tensors[number] for number in places])
            parts = {name: [next(rest) for _ in part] for name, part in given.items()}
            return parts, dict(zip(state, rest, strict=True))

        def computed(*tensors: Tensor) -> tuple[Tensor, ...]:
            own, state = named(tensors)
            features = list(parts.inner(*own["into"]))
            new = parts.after(state, features, own["anchors"], own["probes"])
            return tuple(map(_own, [*features, *(new[name] for name in kept)]))

        def reused(*tensors: Tensor) -> tuple[Tensor, ...]:
            own, state = named(tensors)
            new = {**state, STEP: state[STEP] + 1, **parts.policy.predicted(state, own["probes"])}
            features = parts.completed(state, own["predicted"], own["anchors"], own["into"])
            return tuple(map(_own, [*features, *(new[name] for name in kept)]))

        # the op itself: its wrapper takes sizes for dynamic that are not
        found = torch.ops.higher_order.cond(compute.squeeze(0), computed, reused, tuple(operands))
        features, states = found[: len(predicted)], found[len(predicted) :]
        return (*parts.back(*around, *features), *states, compute, damaged)


def _own(result: Tensor) -> Tensor:
    """A result of a branch, in an order of memory that the other branch has too, and no other name of an input."""
    return result.clone(memory_format=torch.contiguous_format)


def _stage(name: str, parts: Parts, module: Any) -> Stage:
    before = parts.found.structure.stage
    example = _running(before, parts)
    batch = _batch(before)
    fixed = {STEP, STEPS, LAST, COUNT, "times", *KNOBS, "change"}
    specs = []
    for key, value in parts.initial.items():
        shape: list[int | str] = list(example[key].shape)
        if batch is not None and value.dim() and key not in fixed:
            shape = [batch[0] if d == 0 else size for d, size in enumerate(shape)]
        specs.append(TensorSpec(STATE + key, str(value.dtype).removeprefix("torch."), tuple(shape)))
    outputs = [spec.name for spec in before.outputs]
    outputs += [key if key in (COMPUTED, REFUSED, DAMAGED) else NEW + key for key in module.names]
    stage = replace(
        before,
        name=name,
        inputs=(*before.inputs, *specs),
        outputs=tuple(TensorSpec(output, "", ()) for output in outputs),
        example=(*before.example, *example.values()),
        initial={STATE + key: value.item() for key, value in parts.start.items()},
    )
    return stage.retraced(_positional(module, len(stage.inputs)))


def _positional(module: nn.Module, count: int) -> GraphModule:
    """The module with so many arguments, each of which may have dynamic dimensions of its own."""
    graph = Graph()
    given = [graph.placeholder(f"given_{number}") for number in range(count)]
    called = graph.call_module("run", tuple(given))
    graph.output(called)
    return GraphModule({"run": module}, graph)


def _batch(stage: Stage) -> tuple[str, int] | None:
    """Name and size of the dynamic first dimension of the noisy input."""
    roles = recognise(stage.inputs, stage.outputs)
    assert roles is not None
    for spec, tensor in zip(stage.inputs, stage.example, strict=True):
        if spec.name == roles.sample and isinstance(spec.shape[0], str):
            return spec.shape[0], tensor.shape[0]
    return None


@torch.no_grad()
def _running(stage: Stage, parts: Parts) -> dict[str, Tensor]:
    """A state in the middle of a run: enough computed steps, at inputs so different that differences of features are as
    large as features, and as exact.
    """
    state = {**parts.initial, STEPS: torch.tensor([50])}
    for number in range(max(parts.policy.needs, parts.policy.options.warmup, 3)):
        inputs = [x.roll(number + 1, -1) if x.is_floating_point() and x.dim() > 1 else x for x in stage.example]
        anchors, probes, into, _ = parts.look(inputs)
        state |= parts.after(state, list(parts.inner(*into)), anchors, probes)
    return state


def _variable(node: Node) -> bool:
    return node.op != "get_attr"


def _handed(node: Node) -> bool:
    """Whether it is one tensor, or one number."""
    return not isinstance(node.meta.get("val"), list | tuple)


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
    needed = _ahead(outputs, inputs)
    for node in module.graph.nodes:
        if node in needed and node not in new and node.op != "output":
            new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(tuple(new[node] for node in outputs))
    graph.lint()
    return GraphModule(module, graph), new


__all__ = ["Cut", "Parts", "cut", "extract", "stages"]
