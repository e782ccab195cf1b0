"""GPT-NeoX and Pythia: RoPE of a part of each head's features, layers side by side, biases, a head of its own."""

from __future__ import annotations

from typing import Any

from gradfn.nets._gpt import GPTConfig
from gradfn.nets.families.activations import ACTIVATIONS, activation_name
from gradfn.nets.families.family import Entry, Family
from gradfn.nets.families.fields import Fields
from gradfn.nets.families.rope import read_rope, write_rope


def _read(fields: Fields) -> GPTConfig:
    fields.expect(is_encoder_decoder=False)
    fields.default(max_position_embeddings=2048)
    # Where versions of transformers keep what they call rotary_pct and rotary_emb_base.
    base, fraction = fields.take("rotary_emb_base", 10_000.0), fields.take("rotary_pct", 0.25)
    given = fields.left.get("rope_parameters")
    if isinstance(given, dict):
        fraction = given.pop("partial_rotary_factor", fraction)
    fraction = fields.take("partial_rotary_factor", fraction)
    rope = read_rope(fields, base)
    width, hidden = fields.size("hidden_size", 6144), fields.size("intermediate_size", 24576)
    return GPTConfig(
        vocab=fields.size("vocab_size", 50432),
        context=fields.size("max_position_embeddings", 2048),
        n_layers=fields.size("num_hidden_layers", 44),
        n_heads=fields.size("num_attention_heads", 64),
        width=width,
        hidden=None if hidden == 4 * width else hidden,
        positions="rope",
        feed=ACTIVATIONS[fields.choice("hidden_act", ACTIVATIONS, "gelu")],
        tied=fields.take("tie_word_embeddings", False, bool),
        norm_epsilon=fields.positive("layer_norm_eps", fields.take("layer_norm_eps", 1e-5)),
        rope_fraction=fields.positive("partial_rotary_factor", fraction),
        attention_bias=None if fields.take("attention_bias", True, bool) else False,
        parallel=fields.take("use_parallel_residual", True, bool),
        **rope,
    )


def _write(config: GPTConfig) -> dict[str, Any]:
    if config.attention_bias == "qkv":
        raise ValueError("gpt_neox has attention_bias True or False, got 'qkv'")
    rope = write_rope(config)
    rope["rope_parameters"]["partial_rotary_factor"] = config.rope_fraction
    return {
        "rotary_pct": config.rope_fraction,
        "rotary_emb_base": config.rope_base,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "hidden_size": config.width,
        "intermediate_size": config.hidden or 4 * config.width,
        "hidden_act": activation_name("gpt_neox", config.feed),
        "layer_norm_eps": config.norm_epsilon,
        "attention_bias": config.attention_bias is not False,
        "use_parallel_residual": config.parallel,
        "tie_word_embeddings": config.tied,
        # Last: with dynamic scaling it has max_position_embeddings, too.
        **rope,
    }


def _entries(config: GPTConfig) -> list[Entry]:
    entries = [Entry("gpt_neox.embed_in.weight", ("embed/W",))]

    def both(name: str, *paths: str, weight: str = "W", heads: int = 1, bias: bool = True) -> None:
        for theirs, ours in (("weight", weight), ("bias", "b"))[: 1 + bias]:
            entries.append(Entry(f"{name}.{theirs}", tuple(f"{path}/{ours}" for path in paths), heads=heads))

    biased = config.attention_bias is not False
    for i in range(config.n_layers):
        theirs, ours = f"gpt_neox.layers.{i}", f"blocks/{i}"
        both(f"{theirs}.input_layernorm", f"{ours}/attention_norm", weight="gain")
        both(f"{theirs}.post_attention_layernorm", f"{ours}/feed_norm", weight="gain")
        qkv = [f"{ours}/attention/{part}" for part in ("query", "key", "value")]
        both(f"{theirs}.attention.query_key_value", *qkv, heads=config.n_heads, bias=biased)
        both(f"{theirs}.attention.dense", f"{ours}/attention/out", bias=biased)
        both(f"{theirs}.mlp.dense_h_to_4h", f"{ours}/feed/up")
        both(f"{theirs}.mlp.dense_4h_to_h", f"{ours}/feed/down")
    both("gpt_neox.final_layer_norm", "final_norm", weight="gain")
    return entries if config.tied else [*entries, Entry("embed_out.weight", ("head/W",))]


GPT_NEOX = Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    embedding="gpt_neox.embed_in.weight",
    head="embed_out.weight",
    # The causal mask, which older files contain, its fill value, and the frequencies of RoPE.
    buffers=r"\.attention\.(masked_)?bias$|\.rotary_emb\.inv_freq$",
    fixed={"positions": "rope", "norm": "layer"},
    free=("feed", "attention_bias", "rope_base", "rope_scaling", "rope_fraction", "parallel"),
    read=_read,
    write=_write,
    entries=_entries,
    always_biased=True,
)
