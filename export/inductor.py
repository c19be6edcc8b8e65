"""AOTInductor: the exported program compiled to machine code, in one ``.pt2`` package that torch runs without Python.

The code uses the features of the CPU that compiles it, and belongs to the release of torch that made it; both are in
the manifest. It takes a C++ compiler here, none where it runs.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from optpass.errors import OptpassError
from optpass.export import branches
from optpass.export.base import Backend, Source
from optpass.program import Stage, op_name, place_of
from optpass.runtime.engines import inductor as engine

FILE = "model.pt2"

SETTINGS: dict[str, bool | str] = {
    # the number of threads is that of the session, not that of the machine that compiled
    "cpp.dynamic_threads": True,
    # the wrapper only allocates and calls: optimized it takes longer to compile and runs no faster
    "aot_inductor.compile_wrapper_opt_level": "O0",
}


def _contiguous(stage: Stage) -> Stage:
    """The stage captured with inputs as the runtime gives them: strides of the example become part of the code."""
    if all(tensor.is_contiguous() for tensor in stage.example):
        return stage
    example = tuple(tensor.contiguous() for tensor in stage.example)
    return replace(stage, example=example).retraced(stage.module)


class Inductor(Backend):
    """AOTInductor on the CPU."""

    name = "inductor"
    precisions = ("f32",)
    form = "the exported program, in ATen"
    limits = ("machine code of this CPU and this release of torch", "opened on request only")

    def check(self, precision: str) -> None:
        if not engine.compiler():
            raise OptpassError(
                "compiler",
                f"AOTInductor needs a C++ compiler, and here is none of {', '.join(engine.COMPILERS)}",
                "install g++, or name a compiler by the environment variable CXX",
            )

    def lower(self, source: Source, folder: Path, precision: str, target: Sequence[str] = ()) -> str:
        import torch._inductor

        exported = _contiguous(source.stage).exported
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch._inductor.aoti_compile_and_package(
                    exported, package_path=str(folder / FILE), inductor_configs=SETTINGS
                )
        except Exception as error:  # of torch's own types, or of the compiler
            named = [node for node in exported.graph.nodes if node.op == "call_function" and node.name in str(error)]
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            text = lines[0][:200] if lines else type(error).__name__
            raise OptpassError(
                "not-lowered",
                f"AOTInductor cannot compile the model: {text}",
                "use onnxruntime or openvino",
                place_of(named[0]) if named else None,
            ) from error
        return FILE

    def ops(self, source: Source) -> Counter[str]:
        nodes = branches.nodes(source.stage.exported.graph_module)
        return Counter(op_name(node) for node in nodes if node.op == "call_function")

    def rehearse(self, source: Source, folder: Path, precision: str, target: Sequence[str] = ()) -> None:
        """Nothing: what torch exports it compiles, in minutes."""

    def target(self, asked: Sequence[str]) -> list[str]:
        return engine.features()

    def version(self, target: Sequence[str]) -> str:
        return engine.version()
