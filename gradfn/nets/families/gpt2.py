"""GPT-2: learned positions, layer norms, plain feed-forward layers, biases everywhere."""

from __future__ import annotations

from typing import Any

from gradfn.nets._gpt import GPTConfig
from gradfn.nets.families.activations import ACTIVATIONS, activation_name
from gradfn.nets.families.family import Entry, Family
from gradfn.nets.families.fields import Fields


def _read(fields: Fields) -> GPTConfig:
    fields.expect(
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        add_cross_attention=False,
        is_encoder_decoder=False,
    )
    activation = fields.choice("activation_function", ACTIVATIONS, "gelu_new")
    width, hidden = fields.size("n_embd", 768), fields.size("n_inner", None)
    return GPTConfig(
        vocab=fields.size("vocab_size", 50257),
        context=fields.size("n_positions", 1024),
        n_layers=fields.size("n_layer", 12),
        n_heads=fields.size("n_head", 12),
        width=width,
        hidden=None if hidden == 4 * width else hidden,
        feed=ACTIVATIONS[activation],
        tied=fields.take("tie_word_embeddings", True, bool),
        norm_epsilon=fields.positive("layer_norm_epsilon", fields.take("layer_norm_epsilon", 1e-5)),
    )


def _write(config: GPTConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.hidden,
        "activation_function": activation_name("gpt2", config.feed),
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
    }


def _entries(config: GPTConfig) -> list[Entry]:
    entries = [
        Entry("transformer.wte.weight", ("embed/W",)),
        Entry("transformer.wpe.weight", ("positions/W",)),
    ]

    def norm(name: str, path: str) -> None:
        entries.append(Entry(f"{name}.weight", (f"{path}/gain",)))
        entries.append(Entry(f"{name}.bias", (f"{path}/b",)))

    def product(name: str, *paths: str) -> None:
        entries.append(Entry(f"{name}.weight", tuple(f"{path}/W" for path in paths), transposed=True))
        entries.append(Entry(f"{name}.bias", tuple(f"{path}/b" for path in paths)))

    for i in range(config.n_layers):
        theirs, ours = f"transformer.h.{i}", f"blocks/{i}"
        norm(f"{theirs}.ln_1", f"{ours}/attention_norm")
        product(f"{theirs}.attn.c_attn", *(f"{ours}/attention/{part}" for part in ("query", "key", "value")))
        product(f"{theirs}.attn.c_proj", f"{ours}/attention/out")
        norm(f"{theirs}.ln_2", f"{ours}/feed_norm")
        product(f"{theirs}.mlp.c_fc", f"{ours}/feed/up")
        product(f"{theirs}.mlp.c_proj", f"{ours}/feed/down")
    norm("transformer.ln_f", "final_norm")
    return entries if config.tied else [*entries, Entry("lm_head.weight", ("head/W",))]


GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    embedding="transformer.wte.weight",
    buffers=r"\.attn\.(masked_)?bias$",
    fixed={"positions": "learned", "norm": "layer"},
    free=("feed", "rope_base"),
    read=_read,
    write=_write,
    entries=_entries,
    always_biased=True,
)
