"""One text for a graph and for its structure: for inspection, golden files and errors. Names are canonical."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from optpass.program import Stage, module_path, op_name, place_of, strip_wrapper
from optpass.structure import Structure, TokenSpace

DTYPES = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "float64": "f64",
    "int64": "i64",
    "int32": "i32",
    "bool": "b",
}


def tree(structure: Structure) -> str:
    """What analysis found, as a tree for people."""
    stage = structure.stage
    lines = [f"{stage.name}: {structure.kind}, {_signature(stage)}"]
    for tower in sorted(structure.towers, key=lambda t: -t.work):
        mark = " (the main tower)" if tower is structure.main and len(structure.towers) > 1 else ""
        lines.append(f"  {tower.path or 'the model'}: {len(tower.blocks)} blocks{mark}")
        lines += [f"    {line}" for line in _space_lines(tower.space)]
        for number, block in enumerate(tower.blocks):
            kinds = ", ".join(_attention_words(a) for a in block.attentions)
            shape = "x".join(str(s) for s in block.entry.meta["val"].shape)
            lines.append(f"    {number:>3} {block.path:<40} {shape:<14} {kinds}")
    for attention, why in structure.unplaced:
        lines.append(f"  {module_path(attention.node)}: attention outside of any block, {why}")
    if not structure.towers:
        lines.append("  no attention block with a residual stream was found: no pass can act here")
    return "\n".join(lines)


def describe(structure: Structure) -> dict[str, Any]:
    """The same for programs."""
    stage = structure.stage
    return {
        "stage": stage.name,
        "kind": structure.kind,
        "inputs": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in stage.inputs],
        "outputs": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in stage.outputs],
        "dynamic": {name: [r.minimum, r.maximum] for name, r in stage.ranges.items()},
        "towers": [
            {
                "path": tower.path,
                "main": tower is structure.main,
                "tokens": _space_dict(tower.space),
                "blocks": [
                    {
                        "path": block.path,
                        "width": int(block.entry.meta["val"].shape[-1]),
                        "tokens": _space_dict(tower.space_at(block))["size"],
                        "attentions": [
                            {"op": str(place_of(a.node)), "causal": a.causal, "cross": a.cross, "padding": a.padded}
                            for a in block.attentions
                        ],
                    }
                    for block in tower.blocks
                ],
            }
            for tower in structure.towers
        ],
        "unplaced": [{"path": module_path(a.node), "why": why} for a, why in structure.unplaced],
    }


def graph(module: GraphModule) -> str:
    """Every node on a line: canonical name, type, call, the user's line; a heading where the module changes."""
    names: dict[Node, str] = {}
    lines = []
    path = None
    for node in module.graph.nodes:
        if node.op == "output":
            lines.append(f"return {_argument(node.args[0], names)}")
            continue
        if node.op == "get_attr":
            names[node] = f"${strip_wrapper(str(node.target))}"
            continue
        names[node] = f"%{node.target if node.op == 'placeholder' else len(names)}"
        if node.op == "placeholder":
            lines.append(f"input {names[node]}: {_type(node)}")
            continue
        if module_path(node) != path:
            path = module_path(node)
            lines.append(path or "the model")
        maker = node.meta.get("custom", {}).get("optpass", "")
        arguments = ", ".join([*(_argument(a, names) for a in node.args), *_keywords(node, names)])
        end = maker or place_of(node).line
        lines.append(
            f"{'+' if maker else ' '} {names[node]}: {_type(node)} = {op_name(node)}({arguments})  {end}".rstrip()
        )
    return "\n".join(lines) + "\n"


def _keywords(node: Node, names: dict[Node, str]) -> Iterator[str]:
    for key, value in node.kwargs.items():
        if key not in ("device", "pin_memory", "layout"):
            yield f"{key}={_argument(value, names)}"


def _argument(value: Any, names: dict[Node, str]) -> str:
    text = map_aggregate(value, lambda a: _Bare(names[a]) if isinstance(a, Node) else a)
    return str(text)


class _Bare(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _type(node: Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{DTYPES.get(dtype, dtype)}[{', '.join(str(s) for s in value.shape)}]"
    return "tuple" if isinstance(value, list | tuple) else "size"


def _signature(stage: Stage) -> str:
    def words(specs: Any) -> str:
        return ", ".join(f"{s.name}: {DTYPES.get(s.dtype, s.dtype)}[{', '.join(map(str, s.shape))}]" for s in specs)

    ranges = "".join(f", {name} in {r.minimum}..{r.maximum}" for name, r in stage.ranges.items())
    return f"({words(stage.inputs)}) -> ({words(stage.outputs)}){ranges}"


def _space_lines(space: TokenSpace) -> Iterator[str]:
    grid = f", grid {space.grid[0]}x{space.grid[1]}" if space.grid else ""
    order = ", causal" if space.causal else ""
    yield f"tokens {space.size}, protected {space.prefix} in front and {space.suffix} behind{grid}{order}"
    for name, (start, count) in space.spans.items():
        yield f"span {name}: {count} tokens from {start} on, in the example"


def _space_dict(space: TokenSpace) -> dict[str, Any]:
    size = space.size if isinstance(space.size, int) else str(space.size)
    return {
        "size": size,
        "prefix": space.prefix,
        "suffix": space.suffix,
        "causal": space.causal,
        "grid": list(space.grid) if space.grid else None,
        "spans": {name: list(span) for name, span in space.spans.items()},
    }


def _attention_words(attention: Any) -> str:
    words = "cross-attention" if attention.cross else "attention"
    heads = attention.query.meta["val"].shape[-3] if attention.query.meta["val"].dim() > 3 else "?"
    groups = attention.key.meta["val"].shape[-3] if attention.key.meta["val"].dim() > 3 else heads
    shared = f", {groups} of keys" if str(groups) != str(heads) else ""
    kind = ", causal" if attention.causal else ""
    padding = ", padding mask" if attention.padded and not attention.causal else ""
    return f"{words} of {heads} heads{shared}{kind}{padding}"
