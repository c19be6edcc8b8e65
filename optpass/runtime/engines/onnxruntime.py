"""Engines of ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optpass.runtime.engines.base import Array, Timed, typical
from optpass.runtime.manifest import PRESENT, Engine
from optpass.runtime.providers import Provider, Taken, open_session

LIBRARY = "onnxruntime"
EXTRA = "cpu"
NATIVE = False


def unfit(engine: Engine) -> str:
    """Nothing: an ONNX graph runs on any CPU."""
    return ""


class Opened:
    """A session of ONNX Runtime."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.names = [value.name for value in session.get_inputs()]
        self.outputs = [value.name for value in session.get_outputs()]

    def run(self, arrays: Sequence[Array], wanted: Sequence[int] | None = None) -> list[Array]:
        names = None if wanted is None else [self.outputs[number] for number in wanted]
        return list(self.session.run(names, dict(zip(self.names, arrays, strict=True))))


class InPlace(Opened):
    """A session that writes rows into the buffers it is given: outputs ``present_X`` lie where inputs ``past_X`` do.

    ONNX Runtime takes several tokens of one text alone in such a step, so those of several texts run one by one.
    """

    def __init__(self, session: Any) -> None:
        super().__init__(session)
        self.past = [name for name in self.names if _present(name) in self.outputs]
        self.bindings: dict[Any, _Binding] = {}

    def run(self, arrays: Sequence[Array], wanted: Sequence[int] | None = None) -> list[Array]:
        key = None if wanted is None else tuple(wanted)
        if key not in self.bindings:
            names = self.outputs if wanted is None else [self.outputs[number] for number in wanted]
            self.bindings[key] = _Binding(self.session, self.past, names)
        binding, ids = self.bindings[key], arrays[0]
        if len(ids) == 1 or ids.shape[1] == 1:
            return binding.run(dict(zip(self.names, arrays, strict=True)))
        parts = [
            binding.run({name: array[text : text + 1] for name, array in zip(self.names, arrays, strict=True)})
            for text in range(len(ids))
        ]
        return [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]


class _Binding:
    """The inputs and some of the outputs of a session; buffers stay bound from one call to the next."""

    def __init__(self, session: Any, past: Sequence[str], wanted: Sequence[str]) -> None:
        self.session = session
        self.binding = session.io_binding()
        self.buffers: dict[str, Array | None] = dict.fromkeys(past)
        self.wanted = wanted
        self.others = [name for name in wanted if name not in map(_present, past)]

    def run(self, given: Mapping[str, Array]) -> list[Array]:
        for name, array in given.items():
            if name not in self.buffers:
                self.binding.bind_cpu_input(name, np.ascontiguousarray(array))
            elif self.buffers[name] is not array:
                self._lay(name, array)
        for name in self.others:
            self.binding.bind_output(name)
        self.session.run_with_iobinding(self.binding)
        # behind the buffers, which were bound first
        values = self.binding.get_outputs_as_ortvaluevector()
        found = {name: values[len(self.buffers) + i].numpy() for i, name in enumerate(self.others)}
        found |= {_present(name): buffer for name, buffer in self.buffers.items() if buffer is not None}
        return [found[name] for name in self.wanted]

    def _lay(self, name: str, array: Array) -> None:
        import onnxruntime

        self.buffers[name] = buffer = np.require(array, requirements=["C", "W"])
        value = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
        self.binding.bind_ortvalue_input(name, value)
        self.binding.bind_ortvalue_output(_present(name), value)


def _present(name: str) -> str:
    return name.replace("past_", PRESENT, 1)


class Bound(Opened):
    """A session on another device than the CPU, whose inputs and outputs are bound to it for each call."""

    def __init__(self, session: Any, taken: Taken) -> None:
        super().__init__(session)
        self.taken = taken
        self.binding = session.io_binding()

    def run(self, arrays: Sequence[Array], wanted: Sequence[int] | None = None) -> list[Array]:
        self.binding.clear_binding_inputs()
        self.binding.clear_binding_outputs()
        for name, array in zip(self.names, arrays, strict=True):
            self.binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in self.outputs if wanted is None else [self.outputs[number] for number in wanted]:
            self.binding.bind_output(name)
        self.session.run_with_iobinding(self.binding)
        return list(self.binding.copy_outputs_to_cpu())


def open_on(path: Path, threads: int, provider: Provider) -> Bound:
    """Open an ``.onnx`` file on an execution provider.

    Raises:
        OptpassError: it is not there, or takes fewer of the nodes than asked.
    """
    return Bound(*open_session(str(path), _options(threads), provider))


def open_engine(path: Path, precision: str, threads: int) -> Opened:
    """Open an ``.onnx`` file with all graph optimizations."""
    return _opened(_session(path, _options(threads)))


def _opened(session: Any) -> Opened:
    opened = InPlace(session)
    return opened if opened.past else Opened(session)


def profile(path: Path, precision: str, threads: int, arrays: Sequence[Array], warm_up: int, calls: int) -> list[Timed]:
    """Time each node of the optimized graph, by the trace that the session leaves in a file."""
    options = _options(threads)
    options.enable_profiling = True
    with tempfile.TemporaryDirectory(prefix="optpass-") as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = _session(path, options)
        opened = _opened(session)
        for _ in range(warm_up + calls):
            opened.run(arrays)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    begins = sorted(event["ts"] for event in events if event["name"] == "model_run")[warm_up:]
    times: list[dict[tuple[str, str], float]] = [defaultdict(float) for _ in begins]
    for event in events:
        call = bisect_right(begins, event["ts"]) - 1
        if event["cat"] == "Node" and event["name"].endswith(KERNEL) and call >= 0:
            times[call][event["name"].removesuffix(KERNEL), event["args"]["op_name"]] += event["dur"] / 1e3
    return typical(times)


KERNEL = "_kernel_time"
"""What the name of an event has behind that of its node."""


def _options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin between two calls take the cores from whatever runs there, another engine among them.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _session(path: Path, options: Any) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
