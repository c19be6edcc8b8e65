"""Example inputs of library models, read off their configuration. Values are random but in their domain."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optpass.capture.signature import check_names
from optpass.errors import OptpassError

BATCH, LENGTH, SAMPLES = 2, 32, 16000


def hugging_face_inputs(module: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of one call of a transformers model, without cache.

    Args:
        module: a ``PreTrainedModel``; its ``main_input_name`` and the parameters of ``forward`` decide.
        given: the user's tensors; where there are any, nothing is made up beside them.
    """
    config: Any = module.config
    parameters = inspect.signature(module.forward).parameters
    constants = {"use_cache": False} if "use_cache" in parameters or _causal(module) else {}
    if given:
        check_names(module, given)
        return {**given, **constants}
    generator = torch.Generator().manual_seed(0)
    inputs = _inputs(config, parameters, _main(module), generator, causal=_causal(module))
    return {**inputs, **constants}


def _inputs(
    config: Any, parameters: Mapping[str, Any], main: str, generator: torch.Generator, *, causal: bool
) -> dict[str, Tensor]:
    vision = getattr(config, "vision_config", None)
    text = getattr(config, "text_config", None) or config
    inputs: dict[str, Tensor] = {}
    if main not in parameters:  # a part of a model, which bears the name of the whole
        main = next(iter(parameters), main)
    if main == "input_ids" or ("input_ids" in parameters and vision is not None):
        inputs["input_ids"] = _ids(config, text, vision, generator)
    if main == "pixel_values" or ("pixel_values" in parameters and vision is not None):
        inputs["pixel_values"] = _pixels(vision or config, generator)
    if main == "input_values":
        inputs["input_values"] = torch.randn(BATCH, SAMPLES, generator=generator)
    if not inputs:
        raise OptpassError("no-example", f"no example is known for input {main}", "give one: --inputs example.npz")
    if "input_ids" in inputs and "attention_mask" in parameters and not causal:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = inputs.get("input_ids", torch.zeros(BATCH, LENGTH, dtype=torch.long)).clone()
    return inputs


def _main(module: nn.Module) -> str:
    return str(getattr(module, "main_input_name", "input_ids"))


def _causal(module: nn.Module) -> bool:
    name = type(module).__name__
    return name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def _ids(config: Any, text: Any, vision: Any, generator: torch.Generator) -> Tensor:
    """Random ids clear of the special ones; for a model with image tokens, as many of them as the image has."""
    vocabulary = int(text.vocab_size)
    ids = torch.randint(min(4, vocabulary - 1), vocabulary, (BATCH, LENGTH), generator=generator)
    image_token = getattr(config, "image_token_id", None)
    if image_token is None or vision is None:
        return ids
    patches = _square(vision.image_size)[0] // vision.patch_size
    image = torch.full((BATCH, patches * patches), int(image_token))
    ids = torch.where(ids == image_token, ids - 1, ids)
    return torch.cat([ids[:, :3], image, ids[:, 3:]], 1)


def _pixels(config: Any, generator: torch.Generator) -> Tensor:
    height, width = _square(config.image_size)
    return torch.randn(BATCH, int(getattr(config, "num_channels", 3)), height, width, generator=generator)


def _square(size: Any) -> tuple[int, int]:
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[1])
    return int(size), int(size)


def diffusers_inputs(module: nn.Module, config: Mapping[str, Any], given: Mapping[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of one call of a denoiser, from the widths that its configuration names."""
    parameters = inspect.signature(module.forward).parameters
    constants = {"return_dict": False} if "return_dict" in parameters else {}
    if given:
        check_names(module, given)
        return {**given, **constants}
    generator = torch.Generator().manual_seed(0)
    widths = {
        "encoder_hidden_states": (
            _first(config, "max_text_seq_length") or LENGTH,
            _first(config, "joint_attention_dim", "caption_channels", "text_embed_dim", "cross_attention_dim"),
        ),
        "pooled_projections": (_first(config, "pooled_projection_dim"),),
    }
    inputs: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if name in ("hidden_states", "sample"):
            inputs[name] = torch.randn(_latent_shape(config), generator=generator)
        elif name == "timestep":
            inputs[name] = torch.full((BATCH,), 9)
        elif name == "class_labels" and config.get("num_embeds_ada_norm"):
            inputs[name] = torch.arange(BATCH) % int(config["num_embeds_ada_norm"])
        elif name in widths and all(widths[name]):
            inputs[name] = torch.randn(BATCH, *widths[name], generator=generator)
        elif parameter.default is inspect.Parameter.empty and name != "kwargs":
            raise OptpassError("no-example", f"no example is known for input {name}", "give one: --inputs example.npz")
    return {**inputs, **constants}


def _first(config: Mapping[str, Any], *names: str) -> int:
    return next((int(config[name]) for name in names if config.get(name)), 0)


def _latent_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    size = config.get("sample_size")
    height, width = _square(size) if size else (int(config["sample_height"]), int(config["sample_width"]))
    if config.get("sample_frames"):
        frames = (int(config["sample_frames"]) - 1) // int(config.get("temporal_compression_ratio") or 1) + 1
        return BATCH, frames, int(config["in_channels"]), height, width
    return BATCH, int(config["in_channels"]), height, width
