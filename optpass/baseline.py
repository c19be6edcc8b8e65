"""What ``over = "baseline"`` is measured against: another artifact, or figures stored on this machine before."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

import numpy as np
from pydantic import ValidationError

from optpass import budget as budgets
from optpass.errors import OptpassError
from optpass.measure import Round
from optpass.results import Interval, Metric, Result
from optpass.runtime import manifest as manifests
from optpass.runtime.manifest import Hardware, Manifest, TensorInfo

ROUNDS = 12
"""Rounds that a stored figure rests on at least."""

RESAMPLES = 2000


class StoredLatency(Result):
    """Milliseconds of one call at some sizes, with intervals of 99 % over rounds."""

    at: str
    p50_ms: Interval
    p95_ms: Interval


class Stored(Result):
    """Figures of an engine on one machine; ``kind`` tells the file from others."""

    kind: Literal["optpass-baseline"] = "optpass-baseline"
    version: Literal[1] = 1
    created: str
    source: str
    engine: str
    threads: int
    inputs: list[TensorInfo]
    hardware: Hardware
    libraries: dict[str, str]
    latency: list[StoredLatency]
    metric: list[Metric]

    def latency_at(self, at: str, percentile: int) -> Interval:
        """The stored latency at the sizes that a label names.

        Raises:
            OptpassError: none was stored.
        """
        for one in self.latency:
            if one.at == at:
                return one.p50_ms if percentile == 50 else one.p95_ms
        known = ", ".join(one.at or "the example's sizes" for one in self.latency) or "none"
        what = f"the baseline has no latency at {at or 'the sizes of the example'}, only at {known}"
        raise OptpassError("baseline", what, "write it again with gate --save")

    def against(self, measured: Metric) -> Metric:
        """A metric with the stored figure in the place of the dense one; not paired, so the drop is as wide as both.

        Raises:
            OptpassError: none was stored, or on other samples.
        """
        for one in self.metric:
            if (one.name, one.samples) == (measured.name, measured.samples):
                old, new = one.optimized, measured.optimized
                drop = Interval(value=old.value - new.value, low=old.low - new.high, high=old.high - new.low)
                return measured.model_copy(update={"dense": old, "drop": drop})
        what = f"the baseline has no {measured.name} on {measured.samples} samples"
        raise OptpassError("baseline", what, "write it again with gate --save")


@dataclass(frozen=True)
class Artifact:
    """Another artifact, to be measured in turn."""

    folder: Path
    manifest: Manifest


Baseline = Artifact | Stored


def resolve(
    given: str | os.PathLike[str] | None,
    declared: budgets.Reference | None,
    manifest: Manifest,
    engine: str,
    threads: int,
    saving: bool,
) -> Baseline | None:
    """The baseline that was asked for, held against the artifact and the machine.

    Args:
        given: a directory or file named on the call, in place of what the budget declares.
        declared: what the budget declares.
        manifest: of the artifact that is to be judged.
        engine: which of its engines.
        threads: cores for one call.
        saving: whether a baseline is being written, so that its file need not be there.

    Raises:
        OptpassError: there is none, or it is of another model, engine or machine.
    """
    path = Path(given) if given is not None else None
    if path is None and declared is not None:
        path = Path(declared.artifact or declared.file or "")
    if path is None:
        if saving:
            return None
        what = "the budget compares with a baseline, and names none"
        raise OptpassError("baseline", what, 'add [baseline] artifact = "DIR", or give --baseline')
    if path.is_dir():
        other = manifests.read(path)
        _check_model(path, other.source, other.engines[engine].inputs if engine in other.engines else None,
                     manifest, engine)  # fmt: skip
        return Artifact(path, other)
    if saving:
        return None
    stored = read(path)
    _check_model(path, stored.source, stored.inputs if stored.engine == engine else None, manifest, engine)
    here = manifests.hardware()
    for what, then, now in (
        ("the CPU", stored.hardware.cpu, here.cpu),
        ("CPU features", stored.hardware.flags, here.flags),
        ("cores", stored.hardware.cores, here.cores),
        ("threads", stored.threads, threads),
    ):
        if then != now:
            said = f"baseline {path} was written on another machine: {what} {then}, here {now}"
            raise OptpassError("baseline-machine", said, "write it here with gate --save, or compare with an artifact")
    return stored


def _check_model(path: Path, source: str, inputs: Sequence[TensorInfo] | None, manifest: Manifest, engine: str) -> None:
    if PurePath(source).name != PurePath(manifest.source).name:
        what = f"baseline {path} is of {source}, the artifact of {manifest.source}"
        raise OptpassError("baseline-model", what, "compare with a baseline of the same model")
    if inputs is None:
        raise OptpassError("baseline-model", f"baseline {path} has no engine {engine}", "name an engine that both have")
    if list(inputs) != manifest.engines[engine].inputs:
        what = f"baseline {path} takes other inputs than the artifact"
        raise OptpassError("baseline-model", what, "compare with a baseline of the same model and sizes")


def store(
    manifest: Manifest, engine: str, threads: int, rounds: Mapping[str, Sequence[Round]], figures: Sequence[Metric]
) -> Stored:
    """Figures of an engine as a baseline; ``rounds`` by the label of their sizes, the engine last in each."""
    return Stored(
        created=manifests.now(),
        source=manifest.source,
        engine=engine,
        threads=threads,
        inputs=manifest.engines[engine].inputs,
        hardware=manifests.hardware(),
        libraries=manifests.libraries(),
        latency=[
            StoredLatency(at=at, p50_ms=_milliseconds(done, 50), p95_ms=_milliseconds(done, 95))
            for at, done in rounds.items()
        ],
        metric=list(figures),
    )


def _milliseconds(done: Sequence[Round], percentile: float) -> Interval:
    values = np.exp([one.log_time(percentile) for one in done]) * 1e3
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[draws], axis=1), (0.5, 99.5))
    return Interval(value=float(np.median(values)), low=float(low), high=float(high))


def read(path: Path) -> Stored:
    """A file that ``write`` wrote.

    Raises:
        OptpassError: it is missing, or of another form.
    """
    try:
        return Stored.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        what = f"baseline {path} cannot be read: {error.strerror}"
        raise OptpassError("missing-file", what, "write it with gate --save, or check the path") from error
    except (ValueError, ValidationError) as error:
        raise OptpassError("baseline", f"{path} holds no stored baseline", "write it with gate --save") from error
