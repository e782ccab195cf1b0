"""Gemma 1, 2 and 3 (its texts): scaled embeddings, gains held as gain - 1, gated GELU, some layers with a window.

Gemma 2 normalizes what layers add to the stream, too, and bounds scores and logits; Gemma 3 normalizes queries and keys
instead, and rotates them more slowly in layers without a window.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from typing import Any

from gradfn.files import FileError
from gradfn.nets._gpt import GPTConfig
from gradfn.nets.families.family import Family
from gradfn.nets.families.fields import Fields
from gradfn.nets.families.llama import FILES, read_sizes, write_sizes
from gradfn.nets.families.rope import read_rope, write_rope

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def _read_common(fields: Fields) -> dict[str, Any]:
    """Return what all versions have."""
    # Attention in both directions is for embeddings of texts, not for their next tokens.
    fields.expect(is_encoder_decoder=False, use_bidirectional_attention=False)
    # Older files of Gemma 1 say "gelu" in hidden_act, which was computed as its tanh form all the same.
    if fields.left.get("hidden_activation") is None:
        fields.left.pop("hidden_activation", None)
        fields.choice("hidden_act", ("gelu_pytorch_tanh", "gelu"), "gelu_pytorch_tanh")
    else:
        fields.left.pop("hidden_act", None)
        fields.choice("hidden_activation", ("gelu_pytorch_tanh",))
    sizes = read_sizes(fields)
    return {
        "positions": "rope",
        "norm": "rms_unit_offset",
        "feed": "geglu",
        "bias": False,
        "attention_bias": fields.take("attention_bias", False, bool) or None,
        "tied": fields.take("tie_word_embeddings", True, bool),
        "embed_scale": sizes["width"] ** 0.5,
        **sizes,
    }


def _read(fields: Fields) -> GPTConfig:
    fields.default(
        vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=16, head_dim=256, max_position_embeddings=8192,
    )  # fmt: skip
    return GPTConfig(**_read_common(fields), **read_rope(fields))


def _read_2(fields: Fields) -> GPTConfig:
    fields.default(
        vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, max_position_embeddings=8192,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    )  # fmt: skip
    return GPTConfig(**_read_layers(fields, every=2), **read_rope(fields))


def _read_3(fields: Fields) -> GPTConfig:
    fields.default(
        vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, max_position_embeddings=131072,
    )  # fmt: skip
    pattern = fields.size("sliding_window_pattern", fields.size("_sliding_window_pattern", 6))
    layers = _read_layers(fields, pattern)
    local = fields.take("rope_local_base_freq", 10_000.0)
    # Since version 5, transformers keeps both kinds of layers in one field.
    both = fields.left.get("rope_parameters")
    if isinstance(both, dict) and not {"rope_theta", "rope_type"} & both.keys():
        fields.left["rope_parameters"] = both.pop(GLOBAL, None)
        inside = both.pop(LOCAL, None) or {}
        local = inside.pop("rope_theta", local)
        if both or inside.pop("rope_type", "default") != "default" or inside:
            raise FileError(
                f"{fields.file}: rope_parameters: gf.gpt does rope_type 'default' in layers with a window only, got "
                f"{reprlib.repr({LOCAL: inside, **both})}"
            )
    rope = read_rope(fields, 1_000_000.0)
    if layers.get("window"):
        layers["rope_base_local"] = fields.positive("rope_local_base_freq", local)
        if not layers["global_layers"]:
            rope["rope_base"], rope["rope_scaling"] = layers.pop("rope_base_local"), None
    return GPTConfig(qk_norm=True, **layers, **rope)


def _read_layers(fields: Fields, every: int) -> dict[str, Any]:
    """Return what Gemma 2 and 3 have; `every` how many layers one has no window."""
    common = _read_common(fields)
    n = common["n_layers"]
    scalar = fields.positive("query_pre_attn_scalar", fields.take("query_pre_attn_scalar", 256))
    caps = {"score_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping"}
    for ours, theirs in caps.items():
        cap = fields.take(theirs)
        common[ours] = None if cap is None else fields.positive(theirs, cap)
    window = fields.size("sliding_window", 4096)
    kinds = fields.take("layer_types", None, (list, type(None)))
    if kinds is None:
        global_layers: Sequence[int] = range(every - 1, n, every)
    elif len(kinds) != n or not set(map(str, kinds)) <= {LOCAL, GLOBAL}:
        raise FileError(
            f"{fields.file}: layer_types: expected {n} of {LOCAL!r} or {GLOBAL!r}, got {reprlib.repr(kinds)}"
        )
    else:
        global_layers = [i for i, kind in enumerate(kinds) if kind == GLOBAL]
    if len(global_layers) < n:
        common |= {"window": window, "global_layers": tuple(global_layers)}
    return common | {"attention_scale": scalar**-0.5, "norms_after": True}


def _write(config: GPTConfig) -> dict[str, Any]:
    return {**_write_common("gemma", config), **write_rope(config), "hidden_act": "gelu_pytorch_tanh"}


def _write_2(config: GPTConfig) -> dict[str, Any]:
    return {**_write_layers("gemma2", config), **write_rope(config)}


def _write_3(config: GPTConfig) -> dict[str, Any]:
    described = write_rope(config)
    local = config.rope_base if config.rope_base_local is None else config.rope_base_local
    described["rope_parameters"] = {
        GLOBAL: described["rope_parameters"],
        LOCAL: {"rope_theta": local, "rope_type": "default"},
    }
    return {**_write_layers("gemma3_text", config), **described, "rope_local_base_freq": local}


def _write_common(family: str, config: GPTConfig) -> dict[str, Any]:
    if config.embed_scale != config.width**0.5:
        raise ValueError(f"{family} has embed_scale {config.width**0.5}, got {config.embed_scale}")
    if config.attention_bias == "qkv":
        raise ValueError(f"{family} has attention_bias True or False, got 'qkv'")
    biased = {"attention_bias": bool(config.attention_bias)}
    return {**write_sizes(config), **biased, "tie_word_embeddings": config.tied}


def _write_layers(family: str, config: GPTConfig) -> dict[str, Any]:
    scale = (config.head_size or config.width // config.n_heads) ** -0.5
    scale = scale if config.attention_scale is None else config.attention_scale
    scalar = round(scale**-2)
    if not scalar or not math.isclose(scalar**-0.5, scale, rel_tol=1e-12):
        raise ValueError(f"{family} has an attention_scale that is 1 / sqrt(n) of an integer n, got {scale}")
    local = [config.window is not None and i not in config.global_layers for i in range(config.n_layers)]
    return {
        **_write_common(family, config),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": config.score_cap,
        "final_logit_softcapping": config.logit_cap,
        "sliding_window": config.window or config.context,
        "layer_types": [LOCAL if inside else GLOBAL for inside in local],
    }


_FIXED = {"positions": "rope", "norm": "rms_unit_offset", "feed": "geglu", "bias": False}
_FREE = ("n_kv_heads", "head_size", "attention_bias", "rope_base", "rope_scaling", "embed_scale")
_FREE_LAYERS = (*_FREE, "window", "global_layers", "score_cap", "logit_cap", "attention_scale")

GEMMA = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    fixed=_FIXED,
    free=_FREE,
    read=_read,
    write=_write,
    **FILES,
)
GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    fixed=_FIXED | {"norms_after": True},
    free=_FREE_LAYERS,
    read=_read_2,
    write=_write_2,
    **FILES,
)
GEMMA3 = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    fixed=_FIXED | {"norms_after": True, "qk_norm": True},
    free=(*_FREE_LAYERS, "rope_base_local"),
    read=_read_3,
    write=_write_3,
    **FILES,
)
