"""Two artifacts side by side: passes, tokens, graphs, figures, and what they were made with and on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from optpass.results import (
    DiffResult,
    FigureDiff,
    GraphDiff,
    Interval,
    LayerDiff,
    PassDiff,
    TextDiff,
)
from optpass.runtime import manifest as manifests
from optpass.runtime.manifest import Engine, Manifest


def diff(first: Path, second: Path) -> DiffResult:
    """Compare two artifacts.

    Raises:
        OptpassError: one of them is no artifact, or damaged.
    """
    a, b = manifests.read(first), manifests.read(second)
    same_machine = a.hardware == b.hardware
    passes = _passes(a, b)
    layers = _layers(a, b)
    serving = [name for name, engine in {**a.engines, **b.engines}.items() if not engine.dense]
    graphs = [_graph(name, (first, a), (second, b)) for name in serving]
    made = [*_texts("library", a.libraries, b.libraries), *_texts("machine", _machine(a), _machine(b))]
    made += _texts("artifact", _about(a), _about(b))
    return DiffResult(
        first=str(first),
        second=str(second),
        same=not passes and not layers and _engine_files(a) == _engine_files(b),
        same_machine=same_machine,
        passes=passes,
        layers=layers,
        graphs=graphs,
        figures=_figures((first, a), (second, b), same_machine),
        made=made,
    )


def _passes(a: Manifest, b: Manifest) -> list[PassDiff]:
    """Passes matched by name and by which of that name they are; options that differ."""
    sides = [_numbered(manifest) for manifest in (a, b)]
    found = []
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        before, after = (side.get(key) for side in sides)
        if before == after:
            continue
        old, new = before or {}, after or {}
        changed = {name: (old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)}
        change: Literal["added", "removed", "changed"] = "changed"
        if before is None or after is None:
            change = "added" if before is None else "removed"
        found.append(PassDiff(name=key[0], change=change, options=changed))
    return found


def _numbered(manifest: Manifest) -> dict[tuple[str, int], dict[str, Any]]:
    seen: Counter[str] = Counter()
    found = {}
    for record in manifest.passes:
        found[record.name, seen[record.name]] = {**record.options, "sites": record.sites, "status": record.status}
        seen[record.name] += 1
    return found


def _layers(a: Manifest, b: Manifest) -> list[LayerDiff]:
    """Blocks whose tokens or operations differ."""
    sides = [{layer.path: layer for layer in manifest.layers} for manifest in (a, b)]
    found = []
    for path in dict.fromkeys([*sides[0], *sides[1]]):
        before, after = (side.get(path) for side in sides)
        if before != after:
            found.append(
                LayerDiff(
                    path=path,
                    tokens=(before.tokens if before else None, after.tokens if after else None),
                    flops=(before.flops if before else None, after.flops if after else None),
                )
            )
    return found


# graphs


def _graph(name: str, first: tuple[Path, Manifest], second: tuple[Path, Manifest]) -> GraphDiff:
    """Ops by type in the files of an engine."""
    counts = [
        ops(folder, manifest.engines[name]) if name in manifest.engines else None
        for folder, manifest in (first, second)
    ]
    before, after = (count or Counter() for count in counts)
    changed = {op: (before[op], after[op]) for op in sorted(before | after) if before[op] != after[op]}
    nodes = [None if count is None else count.total() for count in counts]
    return GraphDiff(engine=name, nodes=(nodes[0], nodes[1]), ops=changed)


def ops(folder: Path, engine: Engine) -> Counter[str]:
    """How many ops of each type the file of an engine has, those of subgraphs and functions among them.

    None where the file is code, in which there are no ops any more.
    """
    path = folder / engine.entry
    if path.suffix == ".xml":
        layers = ElementTree.parse(path).iter("layer")
        return Counter(layer.get("type", "") for layer in layers)
    if path.suffix != ".onnx":
        return Counter()
    import onnx

    model = onnx.load(path, load_external_data=False)
    found: Counter[str] = Counter()
    waiting = [model.graph.node, *(function.node for function in model.functions)]
    while waiting:
        for node in waiting.pop():
            found[node.op_type] += 1
            for attribute in node.attribute:
                waiting += [graph.node for graph in (attribute.g, *attribute.graphs) if graph.node]
    return found


# figures


def _figures(first: tuple[Path, Manifest], second: tuple[Path, Manifest], same_machine: bool) -> list[FigureDiff]:
    """Size, latency, speed-up, quality and fidelity, engine by engine, where they differ."""
    rows: dict[tuple[str, str], list[Interval | float | None]] = {}

    def put(side: int, engine: str, figure: str, value: Interval | float) -> None:
        rows.setdefault((engine, figure), [None, None])[side] = value

    for side, (folder, manifest) in enumerate((first, second)):
        for name, engine in manifest.engines.items():
            if not engine.dense:
                put(side, name, "MiB of files", engine.mib(folder))
        for latency in manifest.latency:
            put(side, latency.engine, f"median ms, batch {latency.batch}", latency.optimized.median_ms)
            put(side, latency.engine, f"dense median ms, batch {latency.batch}", latency.dense.median_ms)
            put(side, latency.engine, f"speed-up, batch {latency.batch}", latency.speedup)
        for metric in manifest.metric:
            put(side, metric.engine, metric.name, metric.optimized)
            put(side, metric.engine, f"{metric.name} drop", metric.drop)
        for row in manifest.fidelity:
            put(side, row.engine, f"difference of {row.output} from eager", row.difference)
    return [
        FigureDiff(
            engine=engine,
            figure=figure,
            values=(values[0], values[1]),
            comparable=same_machine or " ms" not in figure,
        )
        for (engine, figure), values in rows.items()
        if values[0] != values[1]
    ]


def _engine_files(manifest: Manifest) -> dict[str, dict[str, str]]:
    """The hash of each file of each engine."""
    return {name: {file: manifest.files[file] for file in engine.files} for name, engine in manifest.engines.items()}


# how they were made


def _about(manifest: Manifest) -> dict[str, str]:
    return {"source": manifest.source, "optpass": manifest.optpass, "default engine": manifest.default}


def _machine(manifest: Manifest) -> dict[str, str]:
    hardware = manifest.hardware
    return {
        "cpu": hardware.cpu,
        "cores": str(hardware.cores),
        "flags": " ".join(hardware.flags),
        "system": hardware.system,
    }


def _texts(
    kind: Literal["library", "machine", "artifact"], first: Mapping[str, str], second: Mapping[str, str]
) -> list[TextDiff]:
    names = dict.fromkeys([*first, *second])
    return [
        TextDiff(kind=kind, name=name, values=(first.get(name), second.get(name)))
        for name in names
        if first.get(name) != second.get(name)
    ]
