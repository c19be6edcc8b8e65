"""What a kernel is: one meaning in plain torch, the same on a GPU in Triton, and where each of the two is used.

A pass calls a kernel while its graph is made, with proxies. By default this lays the ops of the reference into the
graph: they are what ONNX Runtime and OpenVINO run, what costs are counted on, and what a later pass follows tokens
through, so that an engine for a CPU has no op of ours in it. For a backend that ``keeps_kernels`` on a GPU the passes
are applied once more ``with kept()``: each call is then one node ``optpass::<name>``, which runs Triton on a GPU and
the reference elsewhere, and which ``torch.export`` keeps. AOTInductor looks into such a node and compiles what is in
it. ``spelled_out`` is the ONNX face of a graph so made: it puts the reference back, which is all that the translation
needs to know. With tensors a kernel runs Triton where they are on a GPU and Triton is there, else the reference. Triton
is imported at the first launch.

Not chosen: nodes of our own in every graph. Analysis, rules, costs and each backend would have to know them, to gain
nothing on a CPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Proxy
from torch.library import triton_op

import optpass.kernels
from optpass.errors import OptpassError
from optpass.program import Stage

NAMESPACE = "optpass"

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

ARCHITECTURES = (80, 90, 120)
"""Compute capabilities that every kernel is compiled for without a GPU: A100, H100 and H200, RTX 50."""

_KEPT: ContextVar[bool] = ContextVar("optpass_kernels_kept", default=False)


@contextmanager
def kept() -> Iterator[None]:
    """Graphs made inside hold each kernel as one node, for a lowering that has a GPU in view."""
    token = _KEPT.set(True)
    try:
        yield
    finally:
        _KEPT.reset(token)


def is_kept() -> bool:
    """Whether kernels stay whole in the graph that is being made."""
    return _KEPT.get()


def has_triton() -> bool:
    """Whether Triton is installed; it is not where there is no GPU to use it."""
    return importlib.util.find_spec("triton") is not None


class Kernel:
    """One op with its faces.

    Attributes:
        name: of the op ``optpass::<name>``.
        reference: plain torch, the meaning; it takes proxies as well.
        check: raises where shapes or dtypes are wrong; it takes whatever ``reference`` takes.
        meta: empty results of the right shapes and dtypes.
        launcher: ``module:function`` of the Triton face.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., Any],
        check: Callable[..., None],
        meta: Callable[..., Any],
        launcher: str,
    ) -> None:
        self.name = self.__name__ = self.__qualname__ = name
        self.reference = reference
        self.check = check
        self.meta = meta
        self.launcher = launcher
        ALL[f"{NAMESPACE}::{name}"] = self

    def __call__(self, *args: Any) -> Any:
        """The results; inside of ``kept`` one node of the graph."""
        self.check(*args)
        return self.op(*args) if is_kept() or _on_gpu(args) else self.reference(*args)

    @functools.cached_property
    def op(self) -> Any:
        """``torch.ops.optpass.<name>``, registered when it is first asked for: that imports much of torch."""
        launch = self.launch if has_triton() else None
        check, reference, meta = self.check, self.reference, self.meta

        def body(*args: Any) -> Any:
            check(*args)
            return launch(*args) if launch is not None and _on_gpu(args) else _owned(reference(*args))

        def fake(*args: Any) -> Any:
            check(*args)
            return meta(*args)

        # schemas are read off annotations, which are those of the reference
        body.__signature__ = inspect.signature(reference, eval_str=True)  # type: ignore[attr-defined]
        with _quiet():
            made: Any = triton_op(f"{NAMESPACE}::{self.name}", body, mutates_args=())
        made.register_fake(fake)
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    @property
    def launch(self) -> Callable[..., Any]:
        """The Triton face."""
        module, _, function = self.launcher.partition(":")
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]


ALL: dict[str, Kernel] = {}
"""Every kernel that was imported, by the name of its op."""


def kernels() -> Mapping[str, Kernel]:
    """Every kernel of this package."""
    for name in _packages():
        importlib.import_module(f"{optpass.kernels.__name__}.{name}")
    return ALL


def _packages() -> list[str]:
    return [info.name for info in pkgutil.iter_modules(optpass.kernels.__path__) if info.ispkg]


def register() -> None:
    """Make every op known to torch, as a saved program that holds some needs it before it is loaded."""
    for kernel in kernels().values():
        _ = kernel.op


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the note torch logs where Triton is missing, which is no fault of the user's."""
    logger = logging.getLogger("torch._library.triton")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _on_gpu(args: Sequence[Any]) -> bool:
    return any(getattr(arg, "device", None) is not None and arg.device.type == "cuda" for arg in args if is_value(arg))


def _owned(results: Any) -> Any:
    """Results as ops must return them: none a view, each laid out as its meta function says."""
    if isinstance(results, Tensor):
        return results.contiguous()
    return tuple(result.contiguous() for result in results)


def holds_any(stage: Stage) -> bool:
    """Whether a kernel is one node of the graph, or of a branch in it."""
    graphs = [module for module in stage.exported.graph_module.modules() if isinstance(module, GraphModule)]
    return any(_is_ours(node) for graph in graphs for node in graph.graph.nodes)


def spelled_out(stage: Stage) -> Stage:
    """The stage with the reference in the place of each kernel that is one node; itself where there is none.

    Those in branches stay: the translation takes them apart with the branch.
    """
    found = [str(node.target._schema.name) for node in stage.exported.graph.nodes if _is_ours(node)]
    if not found:
        return stage
    registered = kernels()
    module = stage.exported.module(check_guards=False)
    for node in module.graph.nodes:
        if _is_ours(node):
            node.target = registered[node.target._schema.name].reference
    module.recompile()
    return stage.retraced(module)


def _is_ours(node: Any) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == NAMESPACE


# checks


def is_value(arg: Any) -> bool:
    """Whether an argument is a tensor, or a proxy that stands for one."""
    return isinstance(arg, Tensor) or (isinstance(arg, Proxy) and isinstance(arg.node.meta.get("val"), Tensor))


def shape_of(value: Any) -> tuple[Any, ...]:
    """Sizes as they are known without a node in the graph: ints, or symbols where dynamic."""
    return tuple(value.node.meta["val"].shape if isinstance(value, Proxy) else value.shape)


@dataclass(frozen=True)
class Checker:
    """Checks the arguments of one kernel; dynamic sizes are left to the run, since to compare them narrows a graph."""

    kernel: str

    def fail(self, what: str, remedy: str) -> OptpassError:
        """The error."""
        return OptpassError("kernel-input", f"{self.kernel} {what}", remedy)

    def tensor(self, name: str, value: Any, sizes: Sequence[Any], dtypes: Sequence[torch.dtype]) -> None:
        """That a tensor has these sizes, None for any and ``...`` for whatever follows, and one of these dtypes.

        Raises:
            OptpassError: it has not; names the argument, what it is and what it should be.
        """
        if not is_value(value):
            raise self.fail(f"takes a tensor as {name}, not {type(value).__name__}", "pass a tensor")
        shape = shape_of(value)
        open_ended = bool(sizes) and sizes[-1] is ...
        wanted = list(sizes[:-1] if open_ended else sizes)
        fits = len(shape) >= len(wanted) if open_ended else len(shape) == len(wanted)
        if not fits or any(unlike(a, b) for a, b in zip(shape, wanted, strict=False)):
            words = ", ".join(["any" if size is None else str(size) for size in wanted] + ["..."] * open_ended)
            raise self.fail(f"got {name} of shape {list(shape)}", f"pass one of shape [{words}]")
        if value.dtype not in dtypes:
            words = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            dtype = str(value.dtype).removeprefix("torch.")
            raise self.fail(f"got {name} of dtype {dtype}", f"pass one of {words}")

    def range(self, name: str, value: Any, low: int, high: Any) -> None:
        """That a number lies between two, both included.

        Raises:
            OptpassError: it does not; names the range.
        """
        if isinstance(value, int) and (value < low or (isinstance(high, int) and value > high)):
            raise self.fail(f"got {name}={value}", f"pass {low} <= {name} <= {high}")

    def alike(self, **values: Any) -> None:
        """That tensors are of one dtype.

        Raises:
            OptpassError: they are not; names each.
        """
        dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in values.items()}
        if len(set(dtypes.values())) > 1:
            words = ", ".join(f"{name} of {dtype}" for name, dtype in dtypes.items())
            raise self.fail(f"got {words}", "pass tensors of one dtype")


def unlike(a: Any, b: Any) -> bool:
    """Whether two sizes are known to differ."""
    return isinstance(a, int) and isinstance(b, int) and a != b


# compiling ahead


@dataclass(frozen=True)
class Build:
    """One Triton function with types of its arguments, as it is compiled without a GPU.

    Attributes:
        function: made by ``triton.jit``.
        signature: type of each argument that is no constant, in Triton's words, such as ``*fp16``.
        constants: the others.
        warps: threads of a program, in groups of 32.
    """

    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4


def cubin(build: Build, architecture: int) -> bytes:
    """Machine code for one compute capability, such as 90; no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: build.signature.get(name, "constexpr") for name in build.function.arg_names}
    source = ASTSource(fn=build.function, signature=signature, constexprs=dict(build.constants))
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": build.warps})
    return bytes(made.asm["cubin"])


TRITON_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def builds() -> dict[str, list[Build]]:
    """What to compile, by package of kernels: each ``triton.py`` lists it for every dtype."""
    found = {}
    for name in _packages():
        module = importlib.import_module(f"{optpass.kernels.__name__}.{name}.triton")
        found[name] = [build for dtype in TRITON_TYPES.values() for build in module.builds(dtype)]
    return found
