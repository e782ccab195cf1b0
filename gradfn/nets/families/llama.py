"""Llama: RoPE, RMS norms, SwiGLU, grouped-query attention; and what its descendants share."""

from __future__ import annotations

from typing import Any

from gradfn.nets._gpt import GPTConfig
from gradfn.nets.families.family import Entry, Family
from gradfn.nets.families.fields import Fields
from gradfn.nets.families.rope import read_rope, write_rope


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
    bias = config.bias if config.attention_bias is None else config.attention_bias
    biased = {path for path in products.values() if (bias if path.startswith("attention") else config.bias)}
    biased -= {"attention/out"} if bias == "qkv" else set()
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
        if config.qk_norm:
            for part in ("query", "key"):
                name = f"{theirs}.self_attn.{part[0]}_norm.weight"
                entries.append(Entry(name, (f"{ours}/attention/{part}_norm/{gain}",)))
        for name, path in products.items():
            entries.append(Entry(f"{theirs}.{name}.weight", (f"{ours}/{path}/W",)))
            if path in biased:
                entries.append(Entry(f"{theirs}.{name}.bias", (f"{ours}/{path}/b",)))
    return entries if config.tied else [*entries, Entry("lm_head.weight", ("head/W",))]


def _read(fields: Fields) -> GPTConfig:
    fields.expect(hidden_act="silu", is_encoder_decoder=False, rope_interleaved=False)
    fields.default(max_position_embeddings=2048)
    rope = read_rope(fields)
    attention_bias, bias = (fields.take(f"{part}_bias", False, bool) for part in ("attention", "mlp"))
    tied = fields.take("tie_word_embeddings", False, bool)
    return GPTConfig(
        positions="rope",
        norm="rms",
        feed="swiglu",
        bias=bias,
        tied=tied,
        attention_bias=None if attention_bias == bias else attention_bias,
        **rope,
        **read_sizes(fields),
    )


def _write(config: GPTConfig) -> dict[str, Any]:
    if config.attention_bias == "qkv":
        raise ValueError("llama has attention_bias True or False, got 'qkv'")
    return {
        **write_sizes(config),
        **write_rope(config),
        "hidden_act": "silu",
        "attention_bias": config.bias if config.attention_bias is None else config.attention_bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.tied,
    }


# How the files of Llama, and of the families that follow it, name their tensors.
FILES: dict[str, Any] = {
    "prefix": "model.",
    "embedding": "model.embed_tokens.weight",
    "buffers": r"\.rotary_emb\.inv_freq$",
    "entries": entries_of,
}
LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    fixed={"positions": "rope", "norm": "rms", "feed": "swiglu"},
    free=("n_kv_heads", "head_size", "attention_bias", "rope_base", "rope_scaling"),
    read=_read,
    write=_write,
    **FILES,
)
