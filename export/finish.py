"""Passes that act on the files of an engine: applied, measured against eager execution, kept or taken back."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from optpass import metrics
from optpass.export import fidelity as fidelities
from optpass.export.artifact import Writer
from optpass.passes.base import Arrays, Finishing
from optpass.program import Stage
from optpass.results import Fidelity, PassRecord
from optpass.runtime.engines.base import Array, Opened
from optpass.runtime.generate import Generator

CALLS = 64
"""Most calls to calibrate by, of as many samples as the engine takes at once."""


def finish(
    new: Writer, made: Finishing, engines: Mapping[str, Stage], dense: Stage, data: Arrays | None
) -> tuple[PassRecord, list[Fidelity]]:
    """Apply a pass to the files of engines that were added, and hold each to the limit of the pass.

    Args:
        new: the artifact in the making.
        made: the pass.
        engines: ids, with the stage of each; those that share files all of them.
        dense: the unmodified stage.
        data: samples to calibrate on, which nothing is judged by.

    Returns:
        The record, and the rows of the engines; where the pass is not kept the files are as before, and there are none.
    """
    record = PassRecord(name=made.name, options=made.options.model_dump(exclude_none=True), status="rolled_back")
    plain = dict(new.engines)
    ops: Counter[str] = Counter()
    told: dict[str, None] = {}
    rows: list[Fidelity] = []
    worst, limit = 0.0, 0.0
    done: set[str] = set()
    with tempfile.TemporaryDirectory(dir=new.folder) as work:
        kept = Path(work)
        for name, stage in engines.items():
            engine = new.engines[name]
            allowed = _allowed(made, stage, dense)
            if engine.entry not in done:
                samples, words = _samples(new, name, made, data)
                told[words] = None
                new.step(f"{made.name} {name}")
                try:
                    ops.update(
                        _applied(new.folder / engine.entry, kept / str(len(done)), made, engine.backend, samples)
                    )
                except Exception as error:  # noqa: BLE001  of the tool's own types
                    line = next((text.strip() for text in str(error).splitlines() if text.strip()), "no message")
                    reason = f"the tool for {engine.backend} failed: {type(error).__name__}: {line[:200]}"
                    return _taken_back(new, plain, kept, record, reason), []
                done.add(engine.entry)
            place = (new.folder / engine.entry).parent
            files = sorted(p.relative_to(new.folder).as_posix() for p in place.rglob("*") if p.is_file())
            new.engines[name] = engine.model_copy(update={"files": files, "tolerance": allowed})
            new.forget(name)
            found = new.fidelity([name])
            rows += found
            moved = max((row.difference / row.tolerance * allowed for row in found if row.tolerance), default=0.0)
            if moved * limit >= worst * allowed:
                worst, limit = moved, allowed
            if not all(row.ok for row in found):
                row = next(row for row in found if not row.ok)
                reason = f"{row.output} of {name} moved by {moved:.1e} of the largest, more than {allowed:.1e}"
                record = record.model_copy(update={"error": moved, "max_error": allowed})
                return _taken_back(new, plain, kept, record, reason), []
    update = {
        "status": "kept",
        "error": worst,
        "max_error": limit,
        "ops": dict(ops),
        "data": "; ".join(filter(None, told)),
    }
    return record.model_copy(update=update), rows


def _applied(entry: Path, kept: Path, made: Finishing, backend: str, samples: Sequence[Arrays]) -> Mapping[str, int]:
    """Put the new files in the place of those that are there, which go to ``kept``."""
    place = entry.parent
    place.rename(kept)
    place.mkdir()
    (kept / "place").write_text(str(place), encoding="utf-8")
    return made.finish(backend, kept / entry.name, entry, samples)


def _taken_back(new: Writer, plain: Mapping[str, object], kept: Path, record: PassRecord, reason: str) -> PassRecord:
    for name in plain:
        new.forget(name)
    for folder in sorted(kept.iterdir()):
        place = Path((folder / "place").read_text(encoding="utf-8"))
        (folder / "place").unlink()
        shutil.rmtree(place)
        folder.rename(place)
    new.engines.update(plain)  # type: ignore[arg-type]
    return record.model_copy(update={"reason": reason})


def _allowed(made: Finishing, stage: Stage, dense: Stage) -> float:
    """The limit of the pass; where none was named and tokens are chosen, as much as another choice moves outputs."""
    named = getattr(made.options, "max_error", None) is not None
    same = [spec.name for spec in stage.outputs] == [spec.name for spec in dense.outputs]
    if named or not same or not fidelities.chooses(stage):
        return made.limit(stage)
    return max(made.limit(stage), fidelities.effect(stage, dense))


def _samples(new: Writer, name: str, made: Finishing, data: Arrays | None) -> tuple[Sequence[Arrays], str]:
    """Inputs to calibrate by, and what they are."""
    if not made.samples(new.engines[name].backend):
        return [], ""
    session, engine = new.session(name), new.engines[name]
    reference = new.reference(engine.role, engine.form)
    # a step is held to kept rows of noise, which no text has, and is to be right on them at all their sizes
    sizes = [record.sizes for record in reference.recorded] if isinstance(session, Generator) else [{}]
    held = [reference.inputs(each) for each in sizes]
    if data is None or not all(info.name in data for info in session.inputs):
        return held, "calibrated on the example inputs alone"
    words = f"calibrated on {len(next(iter(data.values())))} samples, which no metric was taken on"
    batches = (inputs for _, _, inputs, _ in metrics.batches(session, dict(data)))
    if not isinstance(session, Generator):
        return list(islice(batches, CALLS)), words
    return [*islice(_steps(session, batches), CALLS), *held], f"{words}, and on the example inputs"


class _Watched:
    """An engine of which the inputs of each call are kept."""

    def __init__(self, opened: Opened, names: Sequence[str]) -> None:
        self.opened, self.names = opened, names
        self.calls: list[Arrays] = []

    def run(self, arrays: Sequence[Array], wanted: Sequence[int] | None = None) -> list[Array]:
        # of buffers that the steps to come write into
        self.calls.append({name: array.copy() for name, array in zip(self.names, arrays, strict=True)})
        return self.opened.run(arrays, wanted)


def _steps(model: Generator, texts: Iterator[Arrays]) -> Iterator[Arrays]:
    """What the steps through texts are given: tokens, and what is kept of those before them."""
    model.opened = watched = _Watched(model.opened, [info.name for info in model.engine.inputs])
    for inputs in texts:
        rows = list(inputs[model.ids.name])
        for _ in model.feed(model.start(len(rows)), rows):
            yield watched.calls.pop()
