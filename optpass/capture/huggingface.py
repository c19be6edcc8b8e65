"""Models of a Hugging Face directory: config.json and safetensors, complete or refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optpass.capture.examples import hugging_face_inputs
from optpass.capture.failure import quiet
from optpass.capture.sources import Source
from optpass.errors import OptpassError


def download(model_id: str) -> Path:
    """The local directory of a model of the hub, from the cache where it is there."""
    hub = library("huggingface_hub")
    patterns = ["*.json", "*.safetensors", "*/*.json", "*/*.safetensors"]
    try:
        with quiet():
            return Path(hub.snapshot_download(model_id, allow_patterns=patterns))
    except Exception as error:  # errors of the network are of many types
        raise OptpassError(
            "model-id",
            f"{model_id} is not in the local cache and cannot be downloaded ({type(error).__name__})",
            "check the id and the connection, or name a local directory",
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model directory."""
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise OptpassError("corrupt-file", f"{path / 'config.json'} is not readable JSON", "mend the file") from error
    if not isinstance(config, dict):
        raise OptpassError("corrupt-file", f"{path / 'config.json'} is no JSON object", "mend the file")
    return config


def check_weights(path: Path, stem: str) -> None:
    """Open every safetensors file of a model directory; refuse a missing or a damaged one."""
    from safetensors import SafetensorError, safe_open

    index = path / f"{stem}.safetensors.index.json"
    files = [path / f"{stem}.safetensors"]
    if index.is_file():
        try:
            files = sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError) as error:
            raise OptpassError("corrupt-file", f"{index} is no index of weights", "copy the file again") from error
    for file in files:
        if not file.is_file():
            raise OptpassError(
                "missing-weights", f"there is no {file}", "save the model with save_pretrained, as safetensors"
            )
        try:
            with safe_open(file, "pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise OptpassError(
                "corrupt-file", f"{file} is no readable safetensors file: {error}", "copy it again"
            ) from error


def load_model(name: str, path: Path, tensors: Mapping[str, torch.Tensor]) -> Source:
    """Load the class that config.json names, every weight from the files, in float32."""
    transformers = library("transformers")
    config = read_config(path)
    named = config.get("architectures") or []
    architecture = named if isinstance(named, str) else next(iter(named), None)
    if architecture is None:
        raise OptpassError(
            "no-architecture", f"config.json of {name} names no architecture", 'add "architectures": ["<class>"] to it'
        )
    cls = getattr(transformers, str(architecture), None) or _unlisted(str(config.get("model_type")), str(architecture))
    if not hasattr(cls, "from_pretrained") or not hasattr(cls, "forward"):
        raise OptpassError(
            "unknown-architecture",
            f"transformers {transformers.__version__} has no model class {architecture}",
            "write a module:factory that builds the model",
        )
    check_weights(path, "model")
    options = {"dtype": torch.float32, "use_safetensors": True, "ignore_mismatched_sizes": True}
    module = checked(name, lambda: cls.from_pretrained(path, output_loading_info=True, **options))
    kwargs = hugging_face_inputs(module, tensors)
    return Source(name, module, (), kwargs)


def _unlisted(model_type: str, architecture: str) -> Any:
    """A class that transformers has but does not list, such as the encoder of an encoder and decoder."""
    folder = model_type.replace("-", "_")
    try:
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    except ImportError:
        return None
    return getattr(module, architecture, None)


def checked(name: str, load: Any) -> nn.Module:
    """Run a loader that returns (module, info); refuse weights that were not in the files."""
    try:
        with quiet():
            module, info = load()
    except Exception as error:  # loading reads files that may be damaged in any way
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise OptpassError(
            "model-load", f"{name} cannot be loaded: {first}", "check config.json and the weights"
        ) from error
    mismatched = (key[0] if isinstance(key, tuple) else key for key in info.get("mismatched_keys") or ())
    missing = sorted(info["missing_keys"])
    if wrong := sorted(map(str, mismatched)):
        raise OptpassError(
            "missing-weights",
            f"weight {wrong[0]} of {name} has another shape than config.json asks for",
            "the weights and config.json must match",
        )
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise OptpassError(
            "missing-weights",
            f"the files of {name} lack weight {missing[0]}{more}",
            "the weights and config.json must match",
        )
    assert isinstance(module, nn.Module)
    return module


def library(name: str) -> Any:
    """Import an optional library, or say which extra brings it."""
    try:
        return __import__(name)
    except ImportError as error:
        raise OptpassError(
            "missing-library", f"{name} is not installed", "install the extra: pip install 'optpass[hf]'"
        ) from error
