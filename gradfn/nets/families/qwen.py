"""Qwen 2 and 3: Llama with biases of queries, keys and values, or with norms of queries and keys."""

from __future__ import annotations

import reprlib
from typing import Any

from gradfn.files import FileError
from gradfn.nets._gpt import GPTConfig
from gradfn.nets.families.family import Family
from gradfn.nets.families.fields import Fields
from gradfn.nets.families.llama import FILES, read_rope, read_sizes, write_rope, write_sizes

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def _read_common(fields: Fields) -> dict[str, Any]:
    fields.expect(hidden_act="silu", is_encoder_decoder=False)
    fields.default(
        vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768
    )
    tied = fields.take("tie_word_embeddings", False, bool)
    rope, sizes = read_rope(fields), read_sizes(fields)
    windows = _read_windows(fields, sizes["n_layers"])
    return {"positions": "rope", "norm": "rms", "feed": "swiglu", "tied": tied, **rope, **sizes, **windows}


def _read_windows(fields: Fields, n_layers: int) -> dict[str, Any]:
    """Return which layers have a window: those that `layer_types` names, or the last ones."""
    used, window = fields.take("use_sliding_window", False, bool), fields.size("sliding_window", None)
    first = fields.take("max_window_layers", 28, int)
    kinds = fields.take("layer_types", None, (list, type(None)))
    if kinds is None:
        has_window = [used and window is not None and i >= first for i in range(n_layers)]
    elif len(kinds) == n_layers and all(kind in (LOCAL, GLOBAL) for kind in kinds):
        has_window = [kind == LOCAL for kind in kinds]
    else:
        raise FileError(
            f"{fields.file}: layer_types: expected {n_layers:,} of {LOCAL!r} or {GLOBAL!r}, got {reprlib.repr(kinds)}"
        )
    if not any(has_window):
        return {}
    if not used or window is None:
        raise FileError(
            f"{fields.file}: layer_types: {LOCAL!r} needs use_sliding_window and sliding_window, got {used}, {window}"
        )
    return {"window": window, "global_layers": tuple(i for i in range(n_layers) if not has_window[i])}


def _write_common(config: GPTConfig) -> dict[str, Any]:
    has_window = [config.window is not None and i not in config.global_layers for i in range(config.n_layers)]
    return {
        **write_sizes(config),
        **write_rope(config),
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied,
        "use_sliding_window": any(has_window),
        "sliding_window": config.window,
        # Where versions look that do not have layer_types.
        "max_window_layers": has_window.index(True) if any(has_window) else config.n_layers,
        "layer_types": [LOCAL if local else GLOBAL for local in has_window],
    }


def _read_2(fields: Fields) -> GPTConfig:
    return GPTConfig(bias=False, attention_bias="qkv", **_read_common(fields))


def _read_3(fields: Fields) -> GPTConfig:
    fields.default(head_dim=128)
    bias = fields.take("attention_bias", False, bool)
    return GPTConfig(bias=False, attention_bias=bias or None, qk_norm=True, **_read_common(fields))


def _write_3(config: GPTConfig) -> dict[str, Any]:
    if config.attention_bias == "qkv":
        raise ValueError("qwen3 has attention_bias True or False, got 'qkv'")
    return _write_common(config) | {"attention_bias": bool(config.attention_bias)}


_FIXED = {"positions": "rope", "norm": "rms", "feed": "swiglu", "bias": False}
_FREE = ("n_kv_heads", "head_size", "rope_base", "rope_scaling", "window", "global_layers")

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    fixed={**_FIXED, "attention_bias": "qkv"},
    free=_FREE,
    read=_read_2,
    write=_write_common,
    **FILES,
)
QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed={**_FIXED, "qk_norm": True},
    free=(*_FREE, "attention_bias"),
    read=_read_3,
    write=_write_3,
    **FILES,
)
