"""Llama: RoPE, RMS norms, SwiGLU, grouped-query attention; and what its descendants share."""

from __future__ import annotations

import reprlib
from typing import Any

from gradfn.files import FileError
from gradfn.nets._gpt import GPTConfig
from gradfn.nets.families.family import Entry, Family
from gradfn.nets.families.fields import Fields


def read_rope(fields: Fields, base: float = 10_000.0) -> dict[str, Any]:
    """Return the fields of a config that say how positions rotate, from where any version of transformers has them."""
    rope: dict[str, Any] = {}
    for name, does in (("rope_scaling", "None only, or "), ("rope_parameters", "")):
        given = fields.take(name, None, (dict, type(None))) or {}
        kind = given.get("rope_type", given.get("type", "default"))
        rest = {
            key
            for key, value in given.items()
            if key not in ("rope_type", "type", "rope_theta") and value != 1
        }
        if kind != "default" or rest:
            raise FileError(
                f"{fields.file}: {name}: gf.gpt does {does}rope_type 'default' only, got {reprlib.repr(given)}"
            )
        rope |= given
    base = fields.take("rope_theta", base)
    return {"rope_base": fields.positive("rope_theta", rope.get("rope_theta", base))}


def write_rope(config: GPTConfig) -> dict[str, Any]:
    """Return the inverse of `read_rope`, for old and new versions of transformers."""
    return {
        "rope_theta": config.rope_base,  # where older versions look
        "rope_parameters": {"rope_theta": config.rope_base, "rope_type": "default"},
    }


def read_sizes(fields: Fields) -> dict[str, Any]:
    """Return the sizes of a config, under the names that Llama and its descendants share."""
    width, n_heads = fields.size("hidden_size", 4096), fields.size("num_attention_heads", 32)
    head_size = fields.size("head_dim", None)
    return {
        "vocab": fields.size("vocab_size", 32000),
        "context": fields.size("max_position_embeddings", 2048),
        "n_layers": fields.size("num_hidden_layers", 32),
        "n_heads": n_heads,
        "width": width,
        "n_kv_heads": fields.size("num_key_value_heads", None),
        "head_size": None if head_size is not None and head_size * n_heads == width else head_size,
        "hidden": fields.size("intermediate_size", 11008),
        "norm_epsilon": fields.positive("rms_norm_eps", fields.take("rms_norm_eps", 1e-6)),
    }


def write_sizes(config: GPTConfig) -> dict[str, Any]:
    """Return the inverse of `read_sizes`."""
    return {
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "head_dim": config.head_size or config.width // config.n_heads,
        "hidden_size": config.width,
        "intermediate_size": config.hidden or 4 * config.width,
        "rms_norm_eps": config.norm_epsilon,
    }


def entries_of(config: GPTConfig) -> list[Entry]:
    """Return which tensor is which parameter, under the names that Llama and its descendants share."""
    gain = "gain_offset" if config.norm == "rms_unit_offset" else "gain"
    entries = [
        Entry("model.embed_tokens.weight", ("embed/W",)),
        Entry("model.norm.weight", (f"final_norm/{gain}",)),
    ]
    products = {f"self_attn.{part[0]}_proj": f"attention/{part}" for part in ("query", "key", "value", "out")}
    products |= {f"mlp.{part}_proj": f"feed/{part}" for part in ("gate", "up", "down")}
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_norm"}
    if config.norms_after:
        norms |= {
            "post_attention_layernorm": "attention_out_norm",
            "pre_feedforward_layernorm": "feed_norm",
            "post_feedforward_layernorm": "feed_out_norm",
        }
    for i in range(config.n_layers):
        theirs, ours = f"model.layers.{i}", f"blocks/{i}"
        entries += [
            Entry(f"{theirs}.{name}.weight", (f"{ours}/{path}/{gain}",)) for name, path in norms.items()
        ]
        for name, path in products.items():
            entries.append(Entry(f"{theirs}.{name}.weight", (f"{ours}/{path}/W",)))
            if config.bias:
                entries.append(Entry(f"{theirs}.{name}.bias", (f"{ours}/{path}/b",)))
    return entries if config.tied else [*entries, Entry("lm_head.weight", ("head/W",))]


def _read(fields: Fields) -> GPTConfig:
    fields.expect(hidden_act="silu", is_encoder_decoder=False, rope_interleaved=False)
    rope = read_rope(fields)
    bias, feed_bias = fields.take("attention_bias", False, bool), fields.take("mlp_bias", False, bool)
    if bias != feed_bias:
        raise FileError(
            f"{fields.file}: attention_bias: gf.gpt has biases in attention and feed-forward layers or in "
            f"neither, got {bias} with mlp_bias {feed_bias}"
        )
    tied = fields.take("tie_word_embeddings", False, bool)
    return GPTConfig(
        positions="rope", norm="rms", feed="swiglu", bias=bias, tied=tied, **rope, **read_sizes(fields)
    )


def _write(config: GPTConfig) -> dict[str, Any]:
    return {
        **write_sizes(config),
        **write_rope(config),
        "hidden_act": "silu",
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.tied,
    }


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    embedding="model.embed_tokens.weight",
    buffers=r"\.rotary_emb\.inv_freq$",
    fixed={"positions": "rope", "norm": "rms", "feed": "swiglu"},
    free=("n_kv_heads", "head_size", "rope_base"),
    read=_read,
    write=_write,
    entries=entries_of,
)
