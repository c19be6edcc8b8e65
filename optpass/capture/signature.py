"""Calls and results of a user's module as flat lists of named tensors."""

from __future__ import annotations

import dataclasses
import inspect
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from optpass.capture.lines import innermost
from optpass.errors import OptpassError, Place
from optpass.program import WRAPPED

if TYPE_CHECKING:
    from optpass.capture.sources import Source


@dataclass(frozen=True)
class Call:
    """A call with its tensors taken out.

    Attributes:
        names, tensors: the tensors in order of call, named by the signature of ``forward``.
        args, kwargs: the call, with an ``int`` index wrapped in ``Slot`` in place of each tensor.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Slot:
    """The place of tensor number ``index`` in a call."""

    index: int


def flat_call(source: Source) -> Call:
    """Take the tensors out of a call; what is no tensor stays in it as a constant."""
    names: list[str] = []
    tensors: list[Tensor] = []

    def take(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            if name in names:
                raise OptpassError("input-names", f"two inputs are named {name}", "rename the argument or the key")
            names.append(name)
            tensors.append(value)
            return Slot(len(names) - 1)
        if isinstance(value, Mapping):
            return {key: take(f"{name}_{key}", item) for key, item in value.items()}
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(take(f"{name}_{i}", item) for i, item in enumerate(value))
        return value

    positions = positional_names(source.module, len(source.args))
    args = tuple(take(name, value) for name, value in zip(positions, source.args, strict=True))
    kwargs = {name: take(name, value) for name, value in source.kwargs.items()}
    if not tensors:
        raise OptpassError("no-inputs", f"{source.name} is called with no tensor", "give example tensors")
    return Call(tuple(names), tuple(tensors), args, kwargs)


def positional_names(module: nn.Module, count: int) -> list[str]:
    """Names of the first ``count`` positional arguments of a call of ``module``."""
    names: list[str] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    if len(names) < count:
        raise OptpassError(
            "arguments", f"forward takes {len(names)} positional arguments and {count} are given", "mend the factory"
        )
    return names[:count]


def wrap(module: nn.Module, call: Call, example: Sequence[Tensor]) -> tuple[fx.GraphModule, list[str]]:
    """A module of flat tensors around ``module``, and the names of its outputs, learned from one run."""
    result = _run(module, call, example)
    leaves = list(_leaves("", result, ()))
    if not leaves:
        raise OptpassError(
            "no-outputs", f"the model returns {type(result).__name__} and no tensor in it", "return tensors"
        )
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in call.names]
    value = graph.call_module(WRAPPED, _fill(call.args, inputs), _fill(dict(call.kwargs), inputs))
    outputs = []
    for _, steps in leaves:
        leaf = value
        for function, key in steps:
            leaf = graph.call_function(function, (leaf, key))
        outputs.append(leaf)
    graph.output(tuple(outputs))
    return fx.GraphModule({WRAPPED: module}, graph), [name for name, _ in leaves]


def _fill(value: Any, items: Sequence[Any]) -> Any:
    if isinstance(value, Slot):
        return items[value.index]
    if isinstance(value, dict):
        return {key: _fill(item, items) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_fill(item, items) for item in value)
    return value


@torch.no_grad()
def _run(module: nn.Module, call: Call, example: Sequence[Tensor]) -> Any:
    """Call the user's module once; what it raises is the user's, told with the user's line."""
    try:
        return module(*_fill(call.args, example), **_fill(dict(call.kwargs), example))
    except Exception as error:
        line = innermost(traceback.extract_tb(error.__traceback__))
        message = str(error).strip().splitlines() or [""]
        raise OptpassError(
            "model-fails",
            f"the model fails on its example inputs: {type(error).__name__}: {message[0]}",
            "check names, dtypes and shapes of the inputs",
            Place(type(module).__name__, line=line),
        ) from error


Step = tuple[Callable[[Any, Any], Any], Any]


def _leaves(name: str, value: Any, steps: tuple[Step, ...]) -> Iterator[tuple[str, tuple[Step, ...]]]:
    """The tensors of a result, each with a name and the accesses that lead to it."""
    if isinstance(value, Tensor):
        yield name or "output", steps
    elif value is None or isinstance(value, str):
        return
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(_join(name, str(key)), item, (*steps, (operator.getitem, key)))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for field in value._fields:
            yield from _leaves(_join(name, field), getattr(value, field), (*steps, (getattr, field)))
    elif isinstance(value, list | tuple):
        several = sum(item is not None for item in value) > 1
        for i, item in enumerate(value):
            inner = f"{name or 'output'}_{i}" if several or name else ""
            yield from _leaves(inner, item, (*steps, (operator.getitem, i)))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves(_join(name, field.name), getattr(value, field.name), (*steps, (getattr, field.name)))
    else:
        raise OptpassError(
            "output-type",
            f"output {name or 'of the model'} is a {type(value).__name__}, not a tensor",
            "switch it off (a cache by use_cache=False) or return tensors",
        )


def _join(name: str, part: str) -> str:
    return f"{name}_{part}" if name else part
