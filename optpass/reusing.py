"""The stages of a denoiser that reuses features between its steps: the graph in three parts, put together anew.

``full`` computes a step and ``reuse`` predicts it; ``steered`` does either, by a branch in its graph. Where the graph
is cut is in ``optpass.denoising``; when to compute and how to predict, in the policies of ``optpass.passes.cache``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from optpass import partial
from optpass.denoising import Cut, ahead, behind, extract
from optpass.errors import Refusal
from optpass.program import Stage, TensorSpec, op_name
from optpass.rewrite import Refused
from optpass.runtime.features import (
    COMPUTED,
    COUNT,
    COUNTED,
    COUNTERS,
    DAMAGED,
    KNOBS,
    MANY,
    NEW,
    REFUSED,
    ROOM,
    SINCE,
    STATE,
    STEP,
    STEPS,
    STREAK,
    THRESHOLD,
    WARMUP,
    counted,
    counter,
    recognise,
)
from optpass.runtime.manifest import FULL, REUSE, STEERED

if TYPE_CHECKING:
    from optpass.passes.cache.policies import Policy


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
        needed = ahead([*outputs, *anchors, *found.probes], found.features) - set(found.features) | set(placeholders)
        # of an op with several results, each by itself is handed on
        needed |= {n for n in nodes if op_name(n) == "getitem" and n.args[0] in needed}
        skipped = ahead(found.features) - needed
        tail = behind(nodes, found.features)
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
        self.knobs = {name: value for name, value in policy.options.model_dump().items() if name in KNOBS}
        self.own = policy.start(features, probes)
        self.names = list(self.started(0))
        self.few: GraphModule | None = None
        if recompute:
            self._recompute(recompute)

    def _recompute(self, share: float) -> None:
        """Compute a share of the tokens in each step that is predicted."""
        found, policy = self.found, self.policy
        space, count = partial.space_of(found), partial.tokens(found)
        score = policy.score(self.started(0))
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
        found: Tensor = (counter(state, ROOM) < 1) | damaged
        due = self.policy.due(state, probes) if self.policy.probe else None
        return found if due is None else found | due

    def over(self, state: Mapping[str, Tensor]) -> Tensor | None:
        """Whether the step behind this state has to be computed by what the state says alone, bool ``[1]``."""
        return None if self.policy.probe else self.policy.due(state, ())

    def after(
        self, state: Mapping[str, Tensor], features: Sequence[Tensor], anchors: Sequence[Tensor], probes: list[Tensor]
    ) -> dict[str, Tensor]:
        """The state behind a computed step."""
        own = self.policy.computed(state, self.less(features, anchors), probes)
        new = {name: counter(state, name) for name in COUNTERS}
        new |= {name: new[name] + 1 for name in (STEP, COUNT)}
        enough = (new[STEP] >= new[WARMUP]) & (new[COUNT] >= self.policy.needs)
        over = self.over({**state, **own})
        enough = enough if over is None else enough & ~over
        # the last step of a run is always computed
        room = torch.minimum(new[STREAK], new[STEPS] - 1 - new[STEP])
        new |= {SINCE: torch.ones_like(new[SINCE]), ROOM: torch.where(enough, room, 0)}
        return {COUNTED: torch.cat(list(new.values())), **own}

    def ways(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """The counters behind a step that is predicted: where the next one may be as well, and where it may not."""
        onward = [{STEP: 1, SINCE: 1, ROOM: room} for room in (-1, -2 * MANY)]
        steps = [torch.tensor([more.get(name, 0) for name in COUNTERS], dtype=torch.int32) for more in onward]
        return [state[COUNTED] + step for step in steps]

    def passed(
        self, state: Mapping[str, Tensor], ways: Sequence[Tensor], probes: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """What is new in the state behind a step that was predicted."""
        own = self.policy.predicted(state, probes)
        over = self.over({**state, **own})
        return {COUNTED: ways[0] if over is None else torch.where(over, ways[1], ways[0]), **own}

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

    def started(self, steps: int, **knobs: float) -> dict[str, Tensor]:
        """The state before the first of so many steps, by name."""
        begun = {**self.knobs, **knobs, STEPS: steps}
        found = {COUNTED: torch.tensor(counted(begun), dtype=torch.int32)}
        if THRESHOLD in begun:
            found[THRESHOLD] = torch.tensor([float(begun[THRESHOLD])])
        return found | {name: value.clone() for name, value in self.own.items()}

    def states(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The state by name."""
        return dict(zip(self.names, tensors[self.count :], strict=True))

    @property
    def changing(self) -> list[str]:
        """What is handed back of it."""
        return [name for name in self.names if name != THRESHOLD]


class _Full(nn.Module):
    """Computes the step."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.names = parts.changing

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
            changed = parts.policy.predicted(parts.started(0), probes)
        self.names = [COUNTED, *changed, REFUSED, DAMAGED]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        parts, state = self.parts, self.parts.states(tensors)
        anchors, probes, into, around = parts.look(tensors[: parts.count])
        predicted, damaged = parts.predicted(state)
        new = parts.passed(state, parts.ways(state), probes)
        new |= {REFUSED: parts.must(state, probes, damaged), DAMAGED: damaged}
        features = parts.completed(state, predicted, anchors, into)
        return (*parts.back(*around, *features), *(new[name] for name in self.names))


class _Steered(nn.Module):
    """Decides in the graph; the branch that is not taken costs nothing."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.names = [*parts.changing, COMPUTED, DAMAGED]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        parts, state = self.parts, self.parts.states(tensors)
        anchors, probes, into, around = parts.look(tensors[: parts.count])
        predicted, damaged = parts.predicted(state)
        compute = parts.must(state, probes, damaged)
        kept = parts.changing
        given = {"anchors": anchors, "probes": probes, "into": into, "predicted": predicted}
        # a branch holds no constants
        given["ways"] = parts.ways(state)
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
            new = {**state, **parts.passed(state, own["ways"], own["probes"])}
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
    fixed = {COUNTED, THRESHOLD, "times", "change"}
    specs = []
    for key, value in parts.started(0).items():
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
        initial=dict(parts.knobs),
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
    state = parts.started(50)
    for number in range(max(parts.policy.needs, parts.policy.options.warmup, 3)):
        inputs = [x.roll(number + 1, -1) if x.is_floating_point() and x.dim() > 1 else x for x in stage.example]
        anchors, probes, into, _ = parts.look(inputs)
        state |= parts.after(state, list(parts.inner(*into)), anchors, probes)
    return state


def _variable(node: Node) -> bool:
    return node.op != "get_attr"


def _handed(node: Node) -> bool:
    """Whether it is one tensor, or one number: not several, nor a graph that an op runs."""
    value = node.meta.get("val")
    return value is not None and not isinstance(value, list | tuple)


__all__ = ["Parts", "stages"]
