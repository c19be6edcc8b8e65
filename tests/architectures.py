"""Architectures to follow, unpatched: tiny configurations, random weights, all captured by torch.export.

Each factory returns ``(module, args, kwargs)``. The table may grow, never shrink. What is supported is decided
by the ops of a graph, never by a name, so the table is a sample and not a list to satisfy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

Sample = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]

VISION = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
TEXT = {**VISION, "vocab_size": 128, "max_position_embeddings": 256}
GROUPED = {**TEXT, "num_key_value_heads": 2}
SMALL_IMAGE = {"image_size": 28, "patch_size": 2}


def _image(channels: int = 3, size: int = 28) -> Tensor:
    return torch.randn(2, channels, size, size)


def _ids(length: int = 37, vocab: int = 128) -> Tensor:
    return torch.randint(4, vocab, (2, length))


def _padding() -> Tensor:
    return (torch.arange(37)[None] < torch.tensor([37, 30])[:, None]).long()


def _vision(name: str, config: str, image: dict[str, int] | None = None, **options: Any) -> Sample:
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options)).eval()
    return model, (), {"pixel_values": _image(**(image or {}))}


def _encoder(name: str, config: str, **options: Any) -> Sample:
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options)).eval()
    return model, (), {"input_ids": _ids(), "attention_mask": _padding()}


def _causal(name: str, config: str, **options: Any) -> Sample:
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options)).eval()
    return model, (), {"input_ids": _ids(), "use_cache": False}


def _denoiser(name: str, config: dict[str, Any], **inputs: Any) -> Sample:
    import diffusers

    torch.manual_seed(0)
    return getattr(diffusers, name)(**config).eval(), (), {**inputs, "return_dict": False}


# vision and audio encoders


def vit() -> Sample:
    return _vision("ViTForImageClassification", "ViTConfig", {"channels": 1}, **VISION, **SMALL_IMAGE, num_channels=1)


def dinov2() -> Sample:
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_ratio": 2}
    return _vision("Dinov2ForImageClassification", "Dinov2Config", **shape, **SMALL_IMAGE)


def clip_vision() -> Sample:
    return _vision("CLIPVisionModelWithProjection", "CLIPVisionConfig", **VISION, **SMALL_IMAGE)


def vit_msn() -> Sample:
    return _vision("ViTMSNForImageClassification", "ViTMSNConfig", **VISION, **SMALL_IMAGE)


def swin() -> Sample:
    return _vision(
        "SwinForImageClassification",
        "SwinConfig",
        {"size": 32},
        image_size=32,
        patch_size=2,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    )


def dpt_depth() -> Sample:
    return _vision(
        "DPTForDepthEstimation",
        "DPTConfig",
        {"size": 32},
        **VISION,
        image_size=32,
        patch_size=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 16, 16],
        fusion_hidden_size=16,
        is_hybrid=False,
    )


def hubert() -> Sample:
    torch.manual_seed(0)
    config = transformers.HubertConfig(
        **VISION,
        conv_dim=(32, 32),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    return transformers.HubertModel(config).eval(), (), {"input_values": torch.randn(2, 1600)}


# text encoders


def bert() -> Sample:
    return _encoder("BertForSequenceClassification", "BertConfig", **TEXT)


def distilbert() -> Sample:
    shape = {"dim": 64, "n_layers": 4, "n_heads": 4, "hidden_dim": 96}
    return _encoder(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        vocab_size=128,
        max_position_embeddings=256,
        **shape,
    )


def xlm_roberta_tokens() -> Sample:
    return _encoder("XLMRobertaForTokenClassification", "XLMRobertaConfig", **TEXT)


def bart_encoder() -> Sample:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=128,
        d_model=64,
        encoder_layers=4,
        encoder_attention_heads=4,
        encoder_ffn_dim=96,
        max_position_embeddings=256,
    )
    encoder = transformers.BartModel(config).encoder.eval()
    return encoder, (), {"input_ids": _ids(), "attention_mask": _padding()}


# causal language models


def llama() -> Sample:
    return _causal("LlamaForCausalLM", "LlamaConfig", **GROUPED)


def qwen2() -> Sample:
    return _causal("Qwen2ForCausalLM", "Qwen2Config", **GROUPED)


def qwen3() -> Sample:
    return _causal("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=16)


def mistral_window() -> Sample:
    return _causal("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=16)


def gemma3_alternating() -> Sample:
    shape = {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}
    return _causal("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, **shape)


def phi() -> Sample:
    return _causal("PhiForCausalLM", "PhiConfig", **TEXT)


def gpt2() -> Sample:
    shape = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}
    return _causal("GPT2LMHeadModel", "GPT2Config", vocab_size=128, **shape, bos_token_id=1, eos_token_id=2)


def gpt_neox() -> Sample:
    return _causal("GPTNeoXForCausalLM", "GPTNeoXConfig", **TEXT)


def opt() -> Sample:
    return _causal(
        "OPTForCausalLM",
        "OPTConfig",
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        ffn_dim=96,
        max_position_embeddings=256,
        word_embed_proj_dim=64,
    )


def bloom_alibi() -> Sample:
    return _causal("BloomForCausalLM", "BloomConfig", vocab_size=128, hidden_size=64, n_layer=4, n_head=4)


def mixtral_experts() -> Sample:
    return _causal("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4, num_experts_per_tok=2)


# multimodal models


def llava() -> Sample:
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3}, **SMALL_IMAGE)
    text = transformers.LlamaConfig(**{**GROUPED, "vocab_size": 130, "max_position_embeddings": 512})
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=129, vision_feature_layer=-2
    )
    ids = torch.cat([_ids(3), torch.full((2, 196), 129), _ids(11)], 1)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    return model, (), {"input_ids": ids, "pixel_values": _image(), "use_cache": False}


def smolvlm_vision() -> Sample:
    torch.manual_seed(0)
    config = transformers.Idefics3VisionConfig(**VISION, **SMALL_IMAGE)
    return transformers.Idefics3VisionTransformer(config).eval(), (), {"pixel_values": _image()}


def clip_dual() -> Sample:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**TEXT, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**VISION, **SMALL_IMAGE},
        projection_dim=32,
    )
    mask = torch.ones(2, 37, dtype=torch.long)
    inputs = {"input_ids": _ids(), "pixel_values": _image(), "attention_mask": mask}
    return transformers.CLIPModel(config).eval(), (), inputs


# denoisers


def dit() -> Sample:
    return _denoiser(
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "in_channels": 4,
            "num_layers": 4,
            "sample_size": 14,
            "patch_size": 1,
            "num_embeds_ada_norm": 10,
        },
        hidden_states=torch.randn(2, 4, 14, 14),
        timestep=torch.tensor([5, 9]),
        class_labels=torch.tensor([1, 2]),
    )


def auraflow() -> Sample:
    return _denoiser(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 14,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 64,
            "out_channels": 4,
            "pos_embed_max_size": 256,
        },
        hidden_states=torch.randn(2, 4, 14, 14),
        encoder_hidden_states=torch.randn(2, 7, 32),
        timestep=torch.tensor([0.5, 0.9]),
    )


def cogvideox() -> Sample:
    return _denoiser(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 32,
            "num_layers": 4,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 7,
        },
        hidden_states=torch.randn(2, 3, 4, 8, 8),
        encoder_hidden_states=torch.randn(2, 7, 32),
        timestep=torch.tensor([5, 9]),
    )


def hunyuan_dit() -> Sample:
    return _denoiser(
        "HunyuanDiT2DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "in_channels": 4,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "sample_size": 16,
            "hidden_size": 64,
            "num_layers": 4,
            "mlp_ratio": 2.0,
            "learn_sigma": True,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 16,
            "text_len": 7,
            "text_len_t5": 5,
        },
        hidden_states=torch.randn(2, 4, 16, 16),
        timestep=torch.tensor([5.0, 9.0]),
        encoder_hidden_states=torch.randn(2, 7, 32),
        text_embedding_mask=torch.ones(2, 7),
        encoder_hidden_states_t5=torch.randn(2, 5, 32),
        text_embedding_mask_t5=torch.ones(2, 5),
        image_meta_size=torch.randn(2, 6),
        style=torch.zeros(2, dtype=torch.long),
        image_rotary_emb=(torch.randn(64, 16), torch.randn(64, 16)),
    )


def sana() -> Sample:
    return _denoiser(
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "num_layers": 4,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 64,
            "caption_channels": 32,
            "mlp_ratio": 2.0,
            "sample_size": 14,
            "patch_size": 1,
        },
        hidden_states=torch.randn(2, 4, 14, 14),
        encoder_hidden_states=torch.randn(2, 7, 32),
        timestep=torch.tensor([5, 9]),
    )


# more forms of the same: attention that stays written out, positions inside it, tokens that join and leave


def deit_distilled() -> Sample:
    """Class and distillation token, two heads."""
    return _vision("DeiTForImageClassificationWithTeacher", "DeiTConfig", **VISION, **SMALL_IMAGE)


def beit_positions() -> Sample:
    """A relative position bias in each attention, mean pooling without the class token."""
    options = {"use_relative_position_bias": True, "use_mean_pooling": True}
    return _vision("BeitForImageClassification", "BeitConfig", **VISION, **SMALL_IMAGE, **options)


def dinov3_registers() -> Sample:
    """Rotary positions on the patches alone, beside a class token and four registers."""
    return _vision("DINOv3ViTModel", "DINOv3ViTConfig", **VISION, **SMALL_IMAGE, num_register_tokens=4)


def siglip_pooled() -> Sample:
    """A head that reads all tokens by one more attention."""
    return _vision("SiglipVisionModel", "SiglipVisionConfig", **VISION, **SMALL_IMAGE)


def t5_encoder() -> Sample:
    """Relative positions as a bias that all blocks share."""
    shape = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 4, "num_heads": 4}
    return _encoder("T5EncoderModel", "T5Config", vocab_size=128, **shape)


def deberta_disentangled() -> Sample:
    """Scores of content and position gathered and added: attention that stays written out."""
    options = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
    return _encoder("DebertaV2ForSequenceClassification", "DebertaV2Config", **TEXT, **options, type_vocab_size=0)


def albert_shared() -> Sample:
    """One layer called four times."""
    return _encoder("AlbertForSequenceClassification", "AlbertConfig", **TEXT, embedding_size=32)


def gemma2_capped() -> Sample:
    """Scores under a tanh, windows in every other block."""
    return _causal("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=16, sliding_window=16)


def gpt_oss_sinks() -> Sample:
    """A sink beside the keys, experts with biases."""
    shape = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    layers = ["sliding_attention", "full_attention"] * 2
    return _causal("GptOssForCausalLM", "GptOssConfig", **GROUPED, **shape, layer_types=layers, rope_parameters=rope)


def bart_whole() -> Sample:
    """An encoder whose tokens a decoder reads."""
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=128,
        d_model=64,
        encoder_layers=4,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=256,
    )
    inputs = {"input_ids": _ids(), "attention_mask": _padding(), "decoder_input_ids": _ids(9), "use_cache": False}
    return transformers.BartModel(config).eval(), (), inputs


def flux_streams() -> Sample:
    """Two streams that become one."""
    return _denoiser(
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        },
        hidden_states=torch.randn(2, 64, 16),
        encoder_hidden_states=torch.randn(2, 7, 32),
        pooled_projections=torch.randn(2, 16),
        timestep=torch.tensor([0.5, 0.9]),
        img_ids=torch.randn(64, 3),
        txt_ids=torch.zeros(7, 3),
    )


def tokens_first() -> Sample:
    """``[tokens, batch, features]`` throughout."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 96, norm_first=True)
    return torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval(), (torch.randn(33, 2, 64),), {}


FACTORIES: dict[str, Callable[[], Sample]] = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__module__", "") == __name__ and not name.startswith("_")
}
NAMES = list(FACTORIES)
