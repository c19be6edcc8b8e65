"""Capture: from what the user names to a ``Program`` of flat, named tensors.

A source is a zoo name, a Hugging Face or diffusers directory, a Hugging Face id, a ``.pt2`` file,
``package.module:factory``, or ``(module, args, kwargs)`` itself. The module is run once to learn the
names of its outputs, wrapped so that tensors go in and come out flat, traced, and freed of in-place ops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from optpass.capture.dynamic import Declared, check_symbolic, declare, resize
from optpass.capture.failure import explain, quiet
from optpass.capture.sameness import check_range, check_same
from optpass.capture.signature import Call, flat_call, wrap
from optpass.capture.sources import Source, resolve
from optpass.errors import OptpassError
from optpass.program import Program, Stage, TensorSpec, output_specs, strip_wrapper, trace

KEPT_WHOLE = ("linear", "layer_norm", "scaled_dot_product_attention")
"""Ops that functionalisation must not take apart: analysis and backends know them by name."""


def capture(
    source: Source | str | tuple[Any, ...],
    *,
    dynamic: Mapping[str, str] | Sequence[str] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Program:
    """Capture a model.

    Args:
        source: zoo name, directory, id, ``.pt2`` file, ``package.module:factory``, or ``(module, args, kwargs)``.
            The module is switched to ``eval()`` and its gradients are switched off.
        dynamic: dynamic dimensions, ``input:axis=[name:]min..max`` each; dimensions of one name are equal.
            ``None`` takes what the source itself declares, an empty sequence makes every dimension static.
        inputs: example tensors or arrays by input name, in place of those of the source.

    Raises:
        OptpassError: the source is no model, or the model cannot be captured as declared.
    """
    found = resolve(source, inputs or {})
    found.module.eval().requires_grad_(False)
    _check_weights(found.module)
    call = flat_call(found)
    declared = declare(found.dynamic if dynamic is None else dynamic, call)
    example = resize(call, declared)
    inputs_specs = _input_specs(call, example, declared)
    wrapped, names, results = wrap(found.module, call, example)
    traced = _export(wrapped, example, inputs_specs, declared)
    with quiet():
        exported = _functional(traced)
        _check_stateless(exported)
        check_symbolic(exported, inputs_specs, declared)
        outputs = output_specs(exported, names, inputs_specs)
        ranges = {name: d.range for name, d in declared.items()}
        stage = Stage("main", exported, inputs_specs, outputs, example, ranges)
        check_same(stage, results)
        check_range(stage, wrapped)
    return Program({"main": stage}, source=found.name)


def _check_weights(module: nn.Module) -> None:
    broken = [name for name, p in module.named_parameters() if p.is_floating_point() and not torch.isfinite(p).all()]
    broken += [name for name, b in module.named_buffers() if b.is_floating_point() and torch.isnan(b).any()]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise OptpassError(
            "weights-not-finite", f"weight {broken[0]}{more} holds NaN or infinity", "mend the checkpoint"
        )


def _input_specs(
    call: Call, example: Sequence[torch.Tensor], declared: Mapping[str, Declared]
) -> tuple[TensorSpec, ...]:
    axes = {at: name for name, d in declared.items() for at in d.places}
    specs = []
    for name, tensor in zip(call.names, example, strict=True):
        shape = tuple(axes.get((name, axis), size) for axis, size in enumerate(tensor.shape))
        specs.append(TensorSpec(name, str(tensor.dtype).removeprefix("torch."), shape))
    return tuple(specs)


def _export(
    module: nn.Module,
    example: Sequence[torch.Tensor],
    specs: Sequence[TensorSpec],
    declared: Mapping[str, Declared],
) -> ExportedProgram:
    """Trace in plain Python first, through the bytecode interpreter second; explain where both fail."""
    ranges = {name: d.range for name, d in declared.items()}
    failures = []
    for strict in (False, True):
        try:
            with quiet():
                return trace(module, example, specs, ranges, strict=strict)
        except Exception as error:  # noqa: BLE001 - torch.export lets errors of any type through, the user's own among them
            failures.append(error)
    raise explain(failures, module, example, specs, declared) from failures[0]


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """Replace in-place ops by pure ones, if there are any."""
    if not any(_mutates(node) for node in exported.graph.nodes):
        return exported
    pure: ExportedProgram = exported.run_decompositions({})
    if _whole(pure) != _whole(exported):
        raise OptpassError(
            "functionalise",
            "making the graph free of in-place ops took a linear, norm or attention apart",
            "use the torch version of constraints.txt",
            exit_code=1,
        )
    return pure


def _mutates(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _whole(exported: ExportedProgram) -> list[int]:
    """How often each of the ops occurs among those that an output depends on."""
    waiting = [node for node in exported.graph.nodes if node.op == "output" or _mutates(node)]
    live: set[torch.fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in live:
            live.add(node)
            waiting += node.all_input_nodes
    targets = [str(node.target) for node in live]
    return [sum(target.startswith(f"aten.{op}.") for target in targets) for op in KEPT_WHOLE]


def _check_stateless(exported: ExportedProgram) -> None:
    signature = exported.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        raise OptpassError(
            "mutates-state",
            f"the model writes to {strip_wrapper(changed[0])} in each call",
            "return the new value as an output, or switch the statistic or cache off",
        )


__all__ = ["Source", "capture"]
