"""The models that are measured, and how the peer takes them apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tome import Block, Parts
from optpass.zoo.fashion_vit.model import FashionViT


def deit_s(depth: int = 12, width: int = 384, heads: int = 6) -> nn.Module:
    """A vision transformer of the shape of DeiT-S, with random weights: for speed alone."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
    model = ViTForImageClassification(ViTConfig(**shape, num_attention_heads=heads, num_labels=1000))
    return model.eval()


def noise(batch: int) -> Tensor:
    """Images for a model whose weights are random as well."""
    return torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))


class Logits(nn.Module):
    """A model of transformers as one that returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images to logits."""
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits


def parts_of(model: nn.Module) -> Parts:
    """A model as the parts that the peer puts together again; its modules are used as they are."""
    return _fashion_parts(model) if isinstance(model, FashionViT) else _huggingface_parts(model)


def _fashion_parts(model: FashionViT) -> Parts:
    def embed(pixels: Tensor) -> Tensor:
        patches = model.stem(pixels).flatten(2).transpose(1, 2)
        return torch.cat([model.class_token.expand(len(patches), -1, -1), patches], 1) + model.positions

    def qkv(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, width = x.shape
        query, key, value = (
            block.qkv(x).view(batch, tokens, 3, block.heads, width // block.heads).permute(2, 0, 3, 1, 4)
        )
        return query, key, value

    blocks = [
        Block(b.norm1, lambda x, b=b: qkv(b, x), b.out, b.norm2, b.mlp)  # type: ignore[misc]
        for b in model.blocks
    ]
    return Parts(embed, blocks, lambda x: model.head(model.norm(x)[:, 0]))


def _huggingface_parts(model: Any) -> Parts:
    def qkv(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = layer.attention
        split = (*x.shape[:2], own.num_attention_heads, own.head_dim)
        query, key, value = (f(x).view(split).transpose(1, 2) for f in (own.q_proj, own.k_proj, own.v_proj))
        return query, key, value

    blocks = [
        Block(b.layernorm_before, lambda x, b=b: qkv(b, x), b.attention.o_proj, b.layernorm_after, b.mlp)  # type: ignore[misc]
        for b in model.vit.layers
    ]
    return Parts(model.vit.embeddings, blocks, lambda x: model.classifier(model.vit.layernorm(x)[:, 0]))
