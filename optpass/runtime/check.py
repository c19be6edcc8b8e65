"""Fidelity without torch: recorded inputs and eager outputs, and an engine held against them.

The inputs at other sizes are not stored but made from the example, tiled or cropped, as ``Stage.resized`` does.
Of a large output an even sample is stored, with its shape.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from optpass.errors import OptpassError
from optpass.results import Fidelity, VerifyResult
from optpass.runtime import choice
from optpass.runtime import manifest as manifests
from optpass.runtime.engines.base import Array
from optpass.runtime.features import NEW
from optpass.runtime.kept import CANDIDATES, TOKEN
from optpass.runtime.manifest import Manifest
from optpass.runtime.providers import Provider
from optpass.runtime.session import open_session

SAMPLE = 1 << 16
"""Values kept of one output at one size."""


class Runs(Protocol):
    """A session, or anything that runs like one."""

    def run(self, **arrays: Any) -> dict[str, Array]: ...


@dataclass(frozen=True)
class Sampled:
    """An output: its shape, its largest magnitude, and every ``stride``-th value of it in memory order."""

    shape: tuple[int, ...]
    largest: float
    stride: int
    values: Array

    @classmethod
    def of(cls, array: Array) -> Sampled:
        """Take the sample."""
        # An odd stride, so that no power of two in the shape makes it see one column alone.
        stride = -(-array.size // SAMPLE) | 1
        finite = np.abs(array[np.isfinite(array)].astype(np.float64)) if array.dtype.kind == "f" else np.zeros(0)
        return cls(array.shape, float(finite.max(initial=0.0)), stride, array.reshape(-1)[::stride].copy())


@dataclass(frozen=True)
class Recorded:
    """The outputs of eager execution at some sizes of the dynamic dimensions."""

    sizes: Mapping[str, int]
    outputs: Mapping[str, Sampled]

    @classmethod
    def of(cls, sizes: Mapping[str, int], outputs: Mapping[str, Array]) -> Recorded:
        """Sample the outputs."""
        return cls(sizes, {name: Sampled.of(array) for name, array in outputs.items()})


@dataclass(frozen=True)
class Reference:
    """What a stage computes.

    Attributes:
        example: one array per input.
        axes: the names of the dynamic dimensions of each input, by axis.
        recorded: outputs at the smallest, the example and the largest sizes.
    """

    example: Mapping[str, Array]
    axes: Mapping[str, Mapping[int, str]]
    recorded: Sequence[Recorded]

    def inputs(self, sizes: Mapping[str, int]) -> dict[str, Array]:
        """The example with its dynamic dimensions tiled or cropped to ``sizes``, which may hold a number for all of an
        input as well.
        """
        arrays = {n: np.full_like(array, sizes[n]) if n in sizes else array for n, array in self.example.items()}
        for name, axes in self.axes.items():
            for axis, dimension in axes.items():
                if dimension in sizes:
                    pick = np.arange(sizes[dimension]) % arrays[name].shape[axis]
                    arrays[name] = np.ascontiguousarray(arrays[name].take(pick, axis))
        return arrays

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file without pickled objects."""
        arrays: dict[str, Any] = {f"input/{name}": array for name, array in self.example.items()}
        index: dict[str, Any] = {"axes": {n: {str(a): d for a, d in x.items()} for n, x in self.axes.items()}}
        index["recorded"] = []
        for number, record in enumerate(self.recorded):
            facts = {}
            for name, sampled in record.outputs.items():
                arrays[f"output/{number}/{name}"] = sampled.values
                facts[name] = {"shape": sampled.shape, "largest": sampled.largest, "stride": sampled.stride}
            index["recorded"].append({"sizes": dict(record.sizes), "outputs": facts})
        arrays["index"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
        np.savez(path, **arrays)

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Read what ``save`` wrote.

        Raises:
            OptpassError: the file is not there or of another form.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            index = json.loads(arrays["index"].tobytes())
            recorded = [_recorded(arrays, number, entry) for number, entry in enumerate(index["recorded"])]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OptpassError("reference", f"{path} holds no recorded outputs", "rebuild the artifact") from error
        example = {name.removeprefix("input/"): a for name, a in arrays.items() if name.startswith("input/")}
        axes = {name: {int(axis): d for axis, d in by_axis.items()} for name, by_axis in index["axes"].items()}
        return cls(example, axes, recorded)


def _recorded(arrays: Mapping[str, Array], number: int, entry: Mapping[str, Any]) -> Recorded:
    outputs = {
        name: Sampled(tuple(facts["shape"]), facts["largest"], facts["stride"], arrays[f"output/{number}/{name}"])
        for name, facts in entry["outputs"].items()
    }
    return Recorded(entry["sizes"], outputs)


CHOICES = {TOKEN: "logits", CANDIDATES[0]: "logits"}
"""Outputs that name the largest values of another: of two that rounding makes equal either may be named."""


SORTING = (f"{NEW}curvature_", f"{NEW}group_")
"""Outputs by which tokens are sorted into groups: quotients of differences, in which rounding is as large as they are
where nothing moves. What they are made of is compared."""


def valued(outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs with the values that choices stand for in their place, and without those that only sort others."""
    found = {name: array for name, array in outputs.items() if not name.startswith(SORTING)}
    for name, source in CHOICES.items():
        if name in outputs and source in outputs:
            places = outputs[name]
            places = places if places.ndim == outputs[source].ndim else places[..., None]
            found[name] = np.take_along_axis(outputs[source], places, -1)
    return found


def fidelity(name: str, session: Runs, reference: Reference, tolerance: float) -> list[Fidelity]:
    """Hold an engine against recorded eager outputs at all their sizes; one result per output.

    Args:
        name: id of the engine, for the results.
        session: the engine.
        reference: inputs and eager outputs.
        tolerance: allowed difference, relative to the largest value of each output. Integers must be equal.
    """
    outputs = list(reference.recorded[0].outputs)
    worst = {output: _Worst() for output in outputs}
    for record in reference.recorded:
        results = valued(session.run(**reference.inputs(record.sizes)))
        for output in outputs:
            worst[output].add(record.outputs[output], results.get(output), tolerance)
    sizes = [dict(record.sizes) for record in reference.recorded]
    return [
        Fidelity(engine=name, output=output, difference=w.difference, tolerance=w.tolerance, shapes=sizes, ok=w.ok)
        for output, w in worst.items()
    ]


class _Worst:
    """The trial of one output that comes nearest to, or goes furthest beyond, its tolerance."""

    def __init__(self) -> None:
        self.difference, self.tolerance, self.ok = 0.0, 0.0, True
        self.share = -1.0

    def add(self, expected: Sampled, found: Array | None, relative: float) -> None:
        inexact = expected.values.dtype.kind == "f"
        allowed = relative * expected.largest if inexact else 0.0
        difference = _difference(expected, found)
        self.ok = self.ok and difference <= allowed
        share = difference / allowed if allowed else (0.0 if difference == 0 else np.inf)
        if share > self.share:
            self.share, self.difference, self.tolerance = share, difference, allowed


def _difference(expected: Sampled, found: Array | None) -> float:
    """Largest absolute difference; infinity for another shape or dtype, or where one is finite and the other is not."""
    if found is None or found.shape != expected.shape or found.dtype.kind != expected.values.dtype.kind:
        return float("inf")
    if found.dtype.kind == "f" and not np.isfinite(found).all() and np.isfinite(expected.values).all():
        return float("inf")
    a, b = expected.values.astype(np.float64), found.reshape(-1)[:: expected.stride].astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if not np.isfinite(a[~same]).all() or not np.isfinite(b[~same]).all():
        return float("inf")
    return float(np.abs(a[~same] - b[~same]).max(initial=0.0))


def reference_path(role: str, form: str) -> str:
    """Where the recorded outputs of a form of a stage are, inside an artifact."""
    return f"recorded/{role}/{form}.npz"


def read(folder: Path, manifest: Manifest, engine: str) -> Reference:
    """What an artifact recorded for an engine.

    Raises:
        OptpassError: it recorded nothing.
    """
    entry = manifest.engines[engine]
    name = reference_path(entry.role, entry.form)
    if name not in manifest.files:
        raise OptpassError("reference", f"{folder} recorded no outputs for {engine}", "rebuild the artifact")
    return Reference.read(folder / name)


def verify(
    path: str | os.PathLike[str],
    *,
    engines: Sequence[str] | None = None,
    backend: str | None = None,
    threads: int | None = None,
    provider: Provider | None = None,
    progress: Callable[[str], None] | None = None,
) -> VerifyResult:
    """Hold an artifact against its hashes, and its engines against the eager outputs recorded in it.

    Args:
        path: the artifact.
        engines: ids; by default all that run here, machine code left out.
        backend: whose machine code to run as well.
        threads: cores for one call; all by default.
        provider: of ONNX Runtime; the engines of other backends are left out then.
        progress: called with each engine as its turn comes.

    Raises:
        OptpassError: a file is missing or changed, or an engine does not open here.
    """
    folder = Path(path)
    manifest = manifests.read(folder)
    results: list[Fidelity] = []
    unrun = choice.unrun(manifest, manifest.engines, backend) if engines is None else []
    left = {row.engine for row in unrun}
    here = [name for name in manifest.engines if name not in left]
    if engines is None and not here:
        raise choice.none_here(unrun)
    if provider is not None:
        here = [name for name in here if manifest.engines[name].backend == "onnxruntime"]
    providers = {}
    for name in here if engines is None else engines:
        if progress:
            progress(name)
        opened = open_session(folder, manifest, name, threads, provider)
        if provider is not None:
            providers[name] = opened.taken
        session = opened.raw
        results += fidelity(name, session, read(folder, manifest, name), session.engine.tolerance)
    ok = bool(results) and all(result.ok for result in results)
    return VerifyResult(
        ok=ok, artifact=str(folder), files=len(manifest.files), fidelity=results, unrun=unrun, providers=providers
    )
