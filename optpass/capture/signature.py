"""Calls and results of a user's module as flat lists of named tensors."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import operator
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
            name = identifier(name, "input")
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


def identifier(name: str, prefix: str) -> str:
    """``name`` as a word that an engine and a keyword argument can bear."""
    word = re.sub(r"\W+", "_", name).strip("_")
    return word if word.isidentifier() else f"{prefix}_{word}".rstrip("_")


def check_names(module: nn.Module, names: Iterable[str]) -> None:
    """Refuse an input that ``forward`` does not take."""
    parameters = inspect.signature(module.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in names:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, 1)
            remedy = f"did you mean {near[0]}?" if near else f"inputs are {', '.join(parameters)}"
            raise OptpassError("input-names", f"the model has no input {name}", remedy)


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


def wrap(
    module: nn.Module, call: Call, example: Sequence[Tensor]
) -> tuple[fx.GraphModule, list[str], tuple[Tensor, ...]]:
    """A module of flat tensors around ``module``, and the names and values of its outputs, learned from one run."""
    result = _run(module, call, [tensor.clone() for tensor in example])
    leaves = list(_leaves("", result, ()))
    if not leaves:
        raise OptpassError(
            "no-outputs", f"the model returns {type(result).__name__} and no tensor in it", "return tensors"
        )
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in call.names]
    value = graph.call_module(WRAPPED, _fill(call.args, inputs), _fill(dict(call.kwargs), inputs))
    outputs = []
    results = []
    for _, steps in leaves:
        leaf, tensor = value, result
        for function, key in steps:
            leaf, tensor = graph.call_function(function, (leaf, key)), function(tensor, key)
        outputs.append(leaf)
        results.append(tensor)
    graph.output(tuple(outputs))
    names = _distinct([identifier(name, "output") for name, _ in leaves])
    return fx.GraphModule({WRAPPED: module}, graph), names, tuple(results)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number behind one that is already taken."""
    distinct: list[str] = []
    for name in names:
        numbered = (f"{name}_{i}" for i in itertools.count(2))
        distinct.append(name if name not in distinct else next(n for n in numbered if n not in {*names, *distinct}))
    return distinct


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
            f"output {name or 'of the model'} is of type {type(value).__name__}, not a tensor",
            "switch it off (a cache by use_cache=False) or return tensors",
        )


def _join(name: str, part: str) -> str:
    return f"{name}_{part}" if name else part
