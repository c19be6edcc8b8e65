"""Where an engine spends its time, as the profiler of its own library says. It slows engines down: shares matter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optpass.runtime import check
from optpass.runtime import manifest as manifests
from optpass.runtime.engines.base import Timed, profile_engine
from optpass.runtime.manifest import Manifest
from optpass.runtime.session import check_inputs

WARM_UP, CALLS = 3, 15


def profile(
    folder: Path,
    manifest: Manifest,
    engine: str,
    *,
    inputs: Mapping[str, Any] | None = None,
    threads: int | None = None,
    calls: int = CALLS,
) -> list[Timed]:
    """Time the ops of an engine, longest first.

    Args:
        folder: the artifact, whose manifest was read before.
        manifest: that manifest.
        engine: id of the engine.
        inputs: arrays by name; by default the example that was recorded.
        threads: cores for one call; all by default.
        calls: how many to take the median of, node by node.

    Raises:
        OptpassError: the engine does not open here, or nothing was recorded for it.
    """
    entry = manifest.engines[engine]
    arrays = check_inputs(entry, inputs if inputs is not None else check.read(folder, manifest, engine).example)
    file, cores = folder / entry.entry, threads or manifests.cores()
    timed = profile_engine(engine, entry.backend, entry.precision, file, cores, arrays, WARM_UP, calls)
    return sorted(timed, key=lambda found: -found.milliseconds)


def by_op(timed: list[Timed]) -> dict[str, float]:
    """Milliseconds per call of each type of op, longest first."""
    total: dict[str, float] = defaultdict(float)
    for found in timed:
        total[found.op] += found.milliseconds
    return dict(sorted(total.items(), key=lambda pair: -pair[1]))
