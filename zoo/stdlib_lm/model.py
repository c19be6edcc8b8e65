"""stdlib-lm as transformers builds it: a Llama with grouped-query attention, rotary positions and tied embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from optpass.capture.huggingface import library
from optpass.zoo.stdlib_lm import tokens

WIDTH, DEPTH, INNER, QUERIES, KEYS, HEAD_DIM = 256, 4, 768, 8, 4, 32
POSITIONS = 2048
"""The longest text; a share of the training is on windows of this length."""
OUTPUT, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def build(seed: int = 0) -> nn.Module:
    """The model with random weights, in float32, ready to be trained or to get its own."""
    transformers = library("transformers")
    config: Any = transformers.LlamaConfig(
        vocab_size=tokens.VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=DEPTH,
        num_attention_heads=QUERIES,
        num_key_value_heads=KEYS,
        head_dim=HEAD_DIM,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokens.END_ID,
        eos_token_id=tokens.END_ID,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.eval()


def save(model: nn.Module, path: Path) -> None:
    """Write the weights in float16; the output layer's are those of the embedding, and are left out."""
    state = model.state_dict()
    del state[OUTPUT]
    save_file({name: value.half().contiguous() for name, value in state.items()}, path)


def load(path: Path) -> nn.Module:
    """The model with the weights that a file holds, in float32."""
    state = {name: value.float() for name, value in load_file(path).items()}
    model = build()
    model.load_state_dict({**state, OUTPUT: state[EMBEDDING]})
    return model
