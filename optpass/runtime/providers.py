"""Execution providers of ONNX Runtime by option: what is asked for is what runs, or it is refused.

ONNX Runtime gives nodes that a provider does not take, and whole models where its libraries are missing, to the CPU
without an error. Here the share of the nodes that each provider took is counted and held against what was asked.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optpass.errors import OptpassError

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
}

PLUGINS = {"openvino": "onnxruntime_ep_openvino", "tensorrt-rtx": "onnxruntime_ep_nv_tensorrt_rtx"}
"""Modules of wheels that bring a provider to an ONNX Runtime that was built without it."""

DEFAULTS: Mapping[str, Mapping[str, str]] = {"cuda": {"use_tf32": "0"}}
"""Options that keep float32 what it is."""

RECORD = "session.record_ep_graph_assignment_info"


@dataclass(frozen=True)
class Provider:
    """What is asked for.

    Attributes:
        name: one of ``PROVIDERS``.
        options: of the provider, as ONNX Runtime names them.
        at_least: share of the nodes that it has to take, 0 to 1.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    at_least: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in PROVIDERS:
            raise OptpassError("provider", f"there is no provider {self.name!r}", f"name one of {', '.join(PROVIDERS)}")
        if not 0 <= self.at_least <= 1:
            raise OptpassError("provider", f"a share of {self.at_least:g} is asked for", "give 0 to 1")


@dataclass(frozen=True)
class Taken:
    """How many nodes each provider took, by ONNX Runtime's names of them."""

    nodes: Mapping[str, int]

    def __str__(self) -> str:
        total = sum(self.nodes.values())
        return ", ".join(f"{name} took {count} of {total} nodes" for name, count in self.nodes.items())


def open_session(path: str, settings: Any, provider: Provider) -> tuple[Any, Taken]:
    """A session of ONNX Runtime on a provider.

    Raises:
        OptpassError: the provider is not there, or takes fewer of the nodes than asked.
    """
    import onnxruntime

    wanted = PROVIDERS[provider.name]
    options = {**DEFAULTS.get(provider.name, {}), **provider.options}
    settings.add_session_config_entry(RECORD, "1")
    if wanted in onnxruntime.get_available_providers():
        given = [(wanted, options)] if provider.name == "cpu" else [(wanted, options), PROVIDERS["cpu"]]
        session = onnxruntime.InferenceSession(path, settings, providers=given)
    else:
        settings.add_provider_for_devices(_plugged_in(provider.name, wanted), options)
        session = onnxruntime.InferenceSession(path, settings)
    taken = _taken(session)
    _hold(provider, wanted, taken)
    return session, taken


def _plugged_in(name: str, wanted: str) -> list[Any]:
    """The first device of a provider that a plug-in brings."""
    import onnxruntime

    module = PLUGINS.get(name, "")
    if not module or importlib.util.find_spec(module) is None:
        known = ", ".join(onnxruntime.get_available_providers())
        what = f"onnxruntime {onnxruntime.__version__} here has no {wanted}, only {known}"
        remedy = f"pip install {module.replace('_', '-')}" if module else "install a build of onnxruntime that has it"
        raise OptpassError("provider", what, remedy)
    if not any(device.ep_name == wanted for device in onnxruntime.get_ep_devices()):
        onnxruntime.register_execution_provider_library(wanted, importlib.import_module(module).get_library_path())
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == wanted]
    if not found:
        raise OptpassError("provider", f"{wanted} finds no device on this machine", "use another provider")
    return found[:1]


def _taken(session: Any) -> Taken:
    if not hasattr(session, "get_provider_graph_assignment_info"):
        what = "this onnxruntime does not tell which provider took which nodes"
        raise OptpassError("provider", what, "update it to 1.24 or later")
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return Taken(dict(counts.most_common()))


def _hold(provider: Provider, wanted: str, taken: Taken) -> None:
    total = max(sum(taken.nodes.values()), 1)
    share = taken.nodes.get(wanted, 0) / total
    if share < provider.at_least:
        told = f"{wanted} took {taken.nodes.get(wanted, 0)} of {total} nodes, and {provider.at_least:.0%} are asked for"
        least = int(share * 100) / 100
        remedy = (
            f"ask for at_least={least:g} (--at-least {least:g}), or for another provider"
            if share
            else ("see that its libraries and device are there, or ask for another provider")
        )
        raise OptpassError("provider", told, remedy)
