"""Denoisers of a diffusers directory: a model's own, or the one of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from optpass.capture.examples import diffusers_inputs
from optpass.capture.huggingface import check_weights, checked, library, read_config
from optpass.capture.sources import Source
from optpass.errors import OptpassError

DENOISERS = ("transformer", "unet", "prior")
"""Folders of a pipeline that may hold its denoiser."""


def load_pipeline(name: str, path: Path, tensors: Mapping[str, torch.Tensor]) -> Source:
    """The denoiser of a pipeline directory."""
    found = next((path / folder for folder in DENOISERS if (path / folder / "config.json").is_file()), None)
    if found is None:
        raise OptpassError(
            "no-denoiser", f"pipeline {name} has no folder {', '.join(DENOISERS)}", "name the folder of one model"
        )
    return load_model(name, found, tensors)


def load_model(name: str, path: Path, tensors: Mapping[str, torch.Tensor]) -> Source:
    """Load the class that config.json names, every weight from the files, in float32."""
    diffusers = library("diffusers")
    config = read_config(path)
    cls = getattr(diffusers, str(config["_class_name"]), None)
    if cls is None:
        raise OptpassError(
            "unknown-architecture",
            f"diffusers {diffusers.__version__} has no class {config['_class_name']}",
            "write a module:factory that builds the model",
        )
    check_weights(path, "diffusion_pytorch_model")
    module = checked(
        name,
        lambda: cls.from_pretrained(
            path, output_loading_info=True, torch_dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False
        ),
    )
    return Source(name, module, (), diffusers_inputs(module, config, tensors))
