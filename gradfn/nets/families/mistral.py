"""Mistral: Llama in which each position attends to a window of those before it."""

from __future__ import annotations

from typing import Any

from gradfn.nets._gpt import GPTConfig
from gradfn.nets.families.family import Family
from gradfn.nets.families.fields import Fields
from gradfn.nets.families.llama import FILES, read_sizes, write_sizes
from gradfn.nets.families.rope import read_rope, write_rope


def _read(fields: Fields) -> GPTConfig:
    fields.default(
        intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096
    )
    fields.expect(hidden_act="silu", is_encoder_decoder=False, attention_bias=False, mlp_bias=False)
    return GPTConfig(
        positions="rope",
        norm="rms",
        feed="swiglu",
        bias=False,
        tied=fields.take("tie_word_embeddings", False, bool),
        window=fields.size("sliding_window", None),
        **read_rope(fields),
        **read_sizes(fields),
    )


def _write(config: GPTConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        **write_rope(config),
        "hidden_act": "silu",
        "sliding_window": config.window,
        "tie_word_embeddings": config.tied,
    }


MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    fixed={"positions": "rope", "norm": "rms", "feed": "swiglu", "bias": False},
    free=("n_kv_heads", "head_size", "rope_base", "rope_scaling", "window"),
    read=_read,
    write=_write,
    **FILES,
)
