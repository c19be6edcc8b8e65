"""What the user names, resolved to a module and a call of it."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import re
import sys
import traceback
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from optpass.capture.failure import quiet
from optpass.capture.lines import innermost
from optpass.errors import OptpassError, Place, first_line

FACTORY = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<factory>[A-Za-z_]\w*)")
LEAST = 3
"""The smallest upper end that a range of a dynamic dimension may have."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A module and one call of it.

    Attributes:
        name: what the user named.
        dynamic: the dynamic dimensions that the source itself declares, in the grammar of ``--dynamic``.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic: Sequence[str] = ()


def resolve(source: Source | str | os.PathLike[str] | tuple[Any, ...], inputs: Mapping[str, Any]) -> Source:
    """Find the model that ``source`` names, with ``inputs`` in place of its own examples of the same name."""
    tensors = {name: _tensor(name, value) for name, value in inputs.items()}
    if isinstance(source, Source):
        return _with_inputs(source, tensors)
    if isinstance(source, tuple | nn.Module):
        return _with_inputs(from_result(type(source).__name__, source), tensors)
    name = str(source)
    path = Path(name)
    if path.is_dir():
        return _from_directory(name, path, tensors)
    if path.is_file():
        return _with_inputs(_from_file(name, path), tensors)
    if match := FACTORY.fullmatch(name):
        return _with_inputs(_from_factory(name, match["module"], match["factory"]), tensors)
    from optpass.zoo import registry

    if name in registry.names():
        return _with_inputs(from_result(name, registry.load(name).factory()), tensors)
    if path.suffix in {".pt2", ".pt", ".pth", ".onnx", ".safetensors", ".json"} or name.startswith((".", os.sep, "~")):
        raise OptpassError("missing-file", f"there is no file or directory {name}", "check the path")
    if HUB_ID.fullmatch(name):
        from optpass.capture import huggingface

        return _from_directory(name, huggingface.download(name), tensors)
    near = difflib.get_close_matches(name, registry.names(), 1)
    raise OptpassError(
        "unknown-model",
        f"{name!r} is no zoo model, directory, .pt2 file, id or module:factory",
        f"did you mean {near[0]}?" if near else f"zoo models are {', '.join(registry.names())}",
    )


def from_result(name: str, result: Any) -> Source:
    """A factory's result: ``(module, args, kwargs)``, ``(module, args)``, or a module with ``example_inputs``."""
    if isinstance(result, tuple) and 1 < len(result) <= 3 and isinstance(result[0], nn.Module):
        module, *call = result
        args, kwargs = call if len(call) == 2 else ((), call[0]) if isinstance(call[0], Mapping) else (call[0], {})
        return Source(name, module, _positional(args), dict(kwargs), getattr(module, "dynamic", ()))
    if isinstance(result, nn.Module):
        examples = getattr(result, "example_inputs", None)
        if examples is None:
            raise OptpassError(
                "no-example",
                f"{name} gives a {type(result).__name__} without example inputs",
                "return (module, args, kwargs), or set module.example_inputs to a tuple or a dict",
            )
        examples = examples() if callable(examples) else examples
        dynamic = getattr(result, "dynamic", ())
        if isinstance(examples, Mapping):
            return Source(name, result, (), dict(examples), dynamic)
        return Source(name, result, _positional(examples), {}, dynamic)
    raise OptpassError(
        "not-a-model", f"{name} gives a {type(result).__name__}, not a model", "return (module, args, kwargs)"
    )


def _positional(args: Any) -> tuple[Any, ...]:
    return (args,) if isinstance(args, torch.Tensor) else tuple(args)


def _tensor(name: str, value: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptpassError(
            "input-dtype", f"input {name} is no tensor: {first_line(error)}", "give numbers or booleans"
        ) from error


def _with_inputs(source: Source, tensors: Mapping[str, torch.Tensor]) -> Source:
    if not tensors:
        return source
    from optpass.capture.signature import check_names, positional_names

    check_names(source.module, tensors)
    positions = positional_names(source.module, len(source.args))
    args = tuple(tensors.get(name, value) for name, value in zip(positions, source.args, strict=True))
    rest = {name: value for name, value in tensors.items() if name not in positions}
    return replace(source, args=args, kwargs={**source.kwargs, **rest})


def _from_directory(name: str, path: Path, tensors: Mapping[str, torch.Tensor]) -> Source:
    from optpass.capture import diffusion, huggingface

    if (path / "model_index.json").is_file():
        return diffusion.load_pipeline(name, path, tensors)
    if not (path / "config.json").is_file():
        raise OptpassError(
            "not-a-model",
            f"directory {name} has neither config.json nor model_index.json",
            "name a Hugging Face or diffusers directory",
        )
    if "_class_name" in huggingface.read_config(path):
        return diffusion.load_model(name, path, tensors)
    return huggingface.load_model(name, path, tensors)


def _from_file(name: str, path: Path) -> Source:
    if path.suffix != ".pt2":
        remedy = {
            ".safetensors": "name its directory, with config.json beside it",
            ".onnx": "name the PyTorch model it was made from",
            ".py": f"write {path.stem}:factory",
        }.get(path.suffix, "name a directory, a .pt2 file or module:factory")
        raise OptpassError("not-a-model", f"{name} is no model that can be captured", remedy)
    try:
        with zipfile.ZipFile(path) as archive, quiet():
            if broken := archive.testzip():  # torch reads weights without looking at their checksum
                raise ValueError(f"the checksum of {broken} is wrong")
            exported = torch.export.load(path)
    except Exception as error:  # the reader of archives raises errors of many types on damaged ones
        raise OptpassError(
            "corrupt-file", f"{name} is no readable torch.export file: {first_line(error)}", "write it again"
        ) from error
    if exported.example_inputs is None:
        raise OptpassError("no-example", f"{name} holds no example inputs", "save it with its example inputs")
    args, kwargs = exported.example_inputs
    module = exported.module(check_guards=False)
    module.eval = lambda *_: module  # type: ignore[method-assign]  # an exported graph has no train mode to leave
    source = Source(name, module, args, kwargs)
    return replace(source, dynamic=_dynamic_of(exported, source))


def _dynamic_of(exported: ExportedProgram, source: Source) -> list[str]:
    """The dynamic dimensions of an exported graph that are sizes of inputs and bounded, in the grammar of --dynamic."""
    from optpass.capture.signature import flat_call

    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    users = [values.get(str(user)) for user in exported.graph_signature.user_inputs]
    tensors = [value for value in users if isinstance(value, torch.Tensor)]
    names: dict[str, str] = {}
    texts = []
    for name, value in zip(flat_call(source).names, tensors, strict=True):
        for axis, size in enumerate(value.shape):
            symbol = getattr(getattr(size, "node", None), "expr", None)
            bounds = exported.range_constraints.get(symbol)
            if bounds is None or not str(bounds.upper).isdigit() or int(bounds.upper) < LEAST:
                continue
            dimension = names.setdefault(str(symbol), f"{name}_{axis}")
            texts.append(f"{name}:{axis}={dimension}:{max(1, int(bounds.lower))}..{int(bounds.upper)}")
    return texts


def _from_factory(name: str, module_name: str, factory_name: str) -> Source:
    with _importable_cwd():
        module = _import(name, module_name)
        factory = getattr(module, factory_name, None)
        if factory is None:
            near = difflib.get_close_matches(factory_name, dir(module), 1)
            remedy = f"did you mean {module_name}:{near[0]}?" if near else "name a function of that module"
            raise OptpassError("unknown-factory", f"module {module_name} has no {factory_name}", remedy)
        try:
            result = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
        except OptpassError:
            raise
        except Exception as error:  # the user's own code
            line = innermost(traceback.extract_tb(error.__traceback__))
            raise OptpassError(
                "factory-fails",
                f"{name} raised {type(error).__name__}: {first_line(error)}",
                "mend the factory",
                Place(module_name, line=line),
            ) from error
    return from_result(name, result)


def _import(name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise OptpassError(
            "unknown-module",
            f"{name}: no module named {error.name}",
            "run from the directory that holds it, or install it",
        ) from error
    except Exception as error:  # the user's own code
        line = innermost(traceback.extract_tb(error.__traceback__))
        raise OptpassError(
            "factory-fails",
            f"importing {module_name} raised {type(error).__name__}: {first_line(error)}",
            "mend the module",
            Place(module_name, line=line),
        ) from error


@contextlib.contextmanager
def _importable_cwd() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
