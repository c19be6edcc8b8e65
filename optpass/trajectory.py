"""Does a denoiser that reuses features take the steps that it says? Probes over a run, by eager execution.

Beside the stages walks a plain interpreter of the captured graph, in which the predicted values are put in the place of
the cut ones: no part, no branch and no trace of the stages is in it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from optpass import partial
from optpass.denoising import Cut
from optpass.probes import difference
from optpass.program import Stage
from optpass.results import Probes
from optpass.reusing import Parts
from optpass.runtime.features import COMPUTED, NEW, REFUSED, STATE, STREAK, THRESHOLD, WARMUP
from optpass.runtime.manifest import FULL, REUSE, STEERED

RUN = 12
"""Steps of the run."""

PREDICTING = {WARMUP: 3, STREAK: 3, THRESHOLD: math.inf}
"""Knobs of a second run, where the first one computes every step and so says nothing of the others."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Walked:
    """One step: the outputs of the model, the state behind it, and whether it was computed."""

    outputs: tuple[Tensor, ...]
    state: State
    computed: bool


@torch.no_grad()
def walk(parts: Parts, stages: Sequence[Stage]) -> Probes:
    """Take a run with the stages and beside them.

    Returns:
        ``identity``: largest difference of a computed step from the model. ``reuse``: of any step and of the state
        behind it from the interpreter, and of a step that is predicted where nothing changes from the model.
    """
    by_name = {stage.name: stage for stage in stages}
    identity, reuse, predicts = _run(parts, by_name, {})
    if not predicts:
        knobs = {name: value for name, value in PREDICTING.items() if name in parts.knobs}
        identity, reuse = (max(pair) for pair in zip((identity, reuse), _run(parts, by_name, knobs)[:2], strict=True))
    # tokens that are computed without the others are not what they are with them, at rest neither
    return Probes(identity=identity, reuse=max(reuse, 0.0 if parts.few else _at_rest(parts, by_name)))


def _run(parts: Parts, stages: Mapping[str, Stage], knobs: Mapping[str, float]) -> tuple[float, float, bool]:
    """Largest difference of a computed step from the model, of any from the interpreter, and whether one is predicted.

    Args:
        parts: the denoiser.
        stages: by name.
        knobs: in place of those that the policy was given.
    """
    found, main = parts.found, parts.found.structure.stage
    state = parts.started(RUN, **knobs)
    identity = reuse = 0.0
    predicts = False
    inputs = main.example
    for number in range(RUN):
        expected = _beside(parts, inputs, state)
        step = _take(stages, inputs, state)
        identity = max(identity, difference(step.outputs, main.run(inputs)) if expected.computed else 0.0)
        reuse = max(reuse, _gap(step, expected))
        predicts = predicts or not expected.computed
        state = step.state
        inputs = _next(found, inputs, step.outputs[0], number)
    return identity, reuse, predicts


def _at_rest(parts: Parts, stages: Mapping[str, Stage]) -> float:
    """Difference from the model of a step that is predicted after some at the very same inputs."""
    main = parts.found.structure.stage
    before = max(int(parts.knobs[WARMUP]), parts.policy.needs) + 5
    state = parts.started(100, warmup=before)
    for _ in range(before):
        state = _take(stages, main.example, state).state
    step = _take(stages, main.example, state)
    return 0.0 if step.computed else difference(step.outputs, main.results)


def _take(stages: Mapping[str, Stage], inputs: Sequence[Tensor], state: State) -> Walked:
    """One step as a driver takes it."""
    if STEERED in stages:
        return _split(stages[STEERED], inputs, state)
    step = _split(stages[REUSE], inputs, state)
    return _split(stages[FULL], inputs, state) if step.computed else step


def _split(stage: Stage, inputs: Sequence[Tensor], state: State) -> Walked:
    results = stage.run([*inputs, *state.values()])
    named = {spec.name: result for spec, result in zip(stage.outputs, results, strict=True)}
    said = named.get(COMPUTED, named.get(REFUSED))
    new = {name.removeprefix(NEW): named.pop(name) for name in list(named) if name.startswith(NEW)}
    count = sum(not name.startswith(STATE) for name in (spec.name for spec in stage.inputs))
    assert count == len(inputs)
    outputs = tuple(value for name, value in named.items() if name not in (COMPUTED, REFUSED, "damaged"))
    return Walked(outputs, {**state, **new}, True if said is None else bool(said))


def _beside(parts: Parts, inputs: Sequence[Tensor], state: State) -> Walked:
    """The same step by the interpreter."""
    found, policy = parts.found, parts.policy
    read = [*(n for n in found.anchors if n is not None), *found.probes, *found.features]
    whole, values = _interpreted(found, inputs, read)
    anchors = [values[n] for n in found.anchors if n is not None]
    probes = [values[n] for n in found.probes]
    if policy.probe == "first-block":
        probes = [probes[0] - probes[1]]
    predicted = policy.predict(state)
    damaged = torch.tensor([not all(bool(x.isfinite().all()) for x in predicted)])
    if bool(parts.must(state, probes, damaged)):
        features = [values[n] for n in found.features]
        return Walked(whole, {**state, **parts.after(state, features, anchors, probes)}, True)
    features = parts.plus(predicted, anchors)
    if parts.few is not None:
        features = _some_computed(parts, inputs, state, features)
    outputs, _ = _interpreted(found, inputs, (), dict(zip(found.features, features, strict=True)))
    return Walked(outputs, {**state, **parts.passed(state, parts.ways(state), probes)}, False)


def _some_computed(parts: Parts, inputs: Sequence[Tensor], state: State, features: list[Tensor]) -> list[Tensor]:
    """The same with no token moved: those that are not chosen are hidden from the others instead of left out."""
    found = parts.found
    chosen = torch.zeros(len(features[0]), partial.tokens(found), dtype=torch.bool).scatter(
        1, parts.chosen(state), True
    )
    _, values = _interpreted(found, inputs, [node for node in parts.into if node.op != "get_attr"])
    weight = found.structure.module
    given = [values[n] if n in values else operator.attrgetter(str(n.target))(weight) for n in parts.into]
    computed = partial.hidden(found, parts.into)(chosen, *given)
    return [torch.where(chosen.unsqueeze(-1), new, old) for new, old in zip(computed, features, strict=True)]


def _interpreted(
    found: Cut, inputs: Sequence[Tensor], read: Sequence[Node], put: Mapping[Node, Tensor] | None = None
) -> tuple[tuple[Tensor, ...], dict[Node, Tensor]]:
    """Outputs and some values of the captured graph, with other values put in the place of some."""
    values: dict[Node, Tensor] = {}

    class Reading(Interpreter):
        def run_node(self, n: Node) -> Any:
            result = put[n] if put and n in put else super().run_node(n)
            if n in read:
                values[n] = result
            return result

    return tuple(Reading(found.structure.module).run(*inputs)), values


def _gap(step: Walked, expected: Walked) -> float:
    """How far two steps are apart, whatever they say of it."""
    if step.computed != expected.computed:
        return float("inf")
    names = sorted(expected.state)
    states = [step.state[name] for name in names], [expected.state[name] for name in names]
    return max(difference(step.outputs, expected.outputs), difference(*states))


def _next(found: Cut, inputs: Sequence[Tensor], output: Tensor, number: int) -> tuple[Tensor, ...]:
    """The inputs of the next step: a little less noise, and less time."""
    new = []
    for spec, tensor, first in zip(found.structure.stage.inputs, inputs, found.structure.stage.example, strict=True):
        if spec.name == found.roles.sample:
            size = tensor.shape[found.roles.channels]
            tensor = tensor - 0.05 * output.narrow(found.roles.channels, 0, size)
        elif spec.name == found.roles.timestep:
            tensor = (first.double() * (RUN - 1 - number) / RUN).to(first.dtype)
        new.append(tensor)
    return tuple(new)
