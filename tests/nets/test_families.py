"""Each family of models, compared with `transformers` on small random models.

A row of `ROWS` is a name, a configuration class of `transformers`, and its fields beside `SIZES`.
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.nets import families
from gradfn.nets.families import fields

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]
CONTEXT = 16
SIZES = {
    **{"vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT},
}


def scaled(kind, **settings):
    """Return the field of a scaled RoPE, with a small base, so that the frequencies matter in short sequences."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 50.0, "factor": 4.0, **settings}}


LLAMA_3 = scaled(
    "llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8, factor=8.0
)
ROWS = {
    "llama 2": ("LlamaConfig", {}),
    "llama 3": ("LlamaConfig", {**LLAMA_3, "head_dim": 6, "tie_word_embeddings": True}),
    "llama, biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama, biases of attention": ("LlamaConfig", {"attention_bias": True, **scaled("linear")}),
    "llama, biases of feed-forward layers": ("LlamaConfig", {"mlp_bias": True}),
    # Sequences longer than the original context.
    "llama, dynamic": ("LlamaConfig", {**scaled("dynamic"), "max_position_embeddings": 4}),
    "llama, yarn": ("LlamaConfig", scaled("yarn", original_max_position_embeddings=4, truncate=False)),
    "smollm": ("LlamaConfig", {"num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2, yarn, last layer with a window": (
        "Qwen2Config",
        {
            **scaled("yarn", original_max_position_embeddings=8, mscale=1.0, mscale_all_dim=0.5),
            **{"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        },
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 6}),
    "qwen3, biases, first layer with a window": (
        "Qwen3Config",
        {
            **{"head_dim": 4, "attention_bias": True, "use_sliding_window": True, "sliding_window": 3},
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}

# Sequences are longer than the window, which the layer in the middle does not have.
LAYERS = {
    **{"num_hidden_layers": 3, "head_dim": 6, "sliding_window": 3, "query_pre_attn_scalar": 10},
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# Its heads share no keys. What is None is left out.
NEOX = {"num_key_value_heads": None, "rotary_pct": 0.5, "rotary_emb_base": 50}
ROWS |= {
    "mistral": ("MistralConfig", {"sliding_window": 3, "head_dim": 6}),
    "mistral without a window": ("MistralConfig", {"sliding_window": 32, **scaled("linear")}),
    "gemma": ("GemmaConfig", {"head_dim": 6, "num_key_value_heads": 1}),
    "gemma 2": ("Gemma2Config", {**LAYERS, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}),
    "gemma 2 without caps": (
        "Gemma2Config",
        {"sliding_window": 2, "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 4},
    ),
    "gemma 3": (
        "Gemma3TextConfig",
        {
            **LAYERS,
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 50.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
    "pythia": ("GPTNeoXConfig", NEOX),
    "gpt-neox, in sequence": (
        "GPTNeoXConfig",
        {**NEOX, "use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
    ),
    "gpt-neox without biases of attention": (
        "GPTNeoXConfig", {**NEOX, "attention_bias": False, "intermediate_size": 64}
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
    return pytest.importorskip("transformers", reason="needs transformers: pip install transformers")


def their_model(transformers, name):
    import torch

    torch.manual_seed(0)
    config_class, fields = ROWS[name]
    sizes = {key: value for key, value in (SIZES | fields).items() if (value is not None or key not in SIZES)}
    config = getattr(transformers, config_class)(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():  # not the symmetric initial values
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    return model.eval()


def their_loss(model):
    """Return the logits, and the loss, whose gradients are then those of the parameters."""
    import torch

    logits = model(torch.tensor(INPUTS)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(TARGETS).flatten())
    loss.backward()
    return logits.detach().numpy(), loss.item()


def loaded(folder, **options):
    config, params = gf.load_pretrained(folder, **options)
    # Dynamic scaling is of sequences longer than the configured context.
    return dataclasses.replace(config, context=CONTEXT), params


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_family_equals_transformers(name, transformers, tmp_path):
    import torch

    model = their_model(transformers, name)
    model.save_pretrained(tmp_path / "model", max_shard_size="4KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    config, params = loaded(tmp_path / "model")
    stacked_net = gf.gpt(dataclasses.replace(config, scan=True))
    stacked = gf.stack_blocks(params)

    logits, loss = their_loss(model)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(stacked_net.apply, (None, 0)))(stacked, INPUTS), logits, rtol=1e-4, atol=1e-5
    )
    mean = gf.batch_mean(gf.next_token_loss(gf.gpt(config)))
    value, grads = jax.jit(jax.value_and_grad(mean))(params, (INPUTS, TARGETS))
    np.testing.assert_allclose(value, loss, rtol=1e-5)

    prompt = TOKENS[0, :3]
    theirs = model.generate(torch.tensor(prompt[None]), max_new_tokens=10, do_sample=False, pad_token_id=0)
    ours = gf.generate(stacked_net, stacked, prompt, 10, temperature=0)
    np.testing.assert_array_equal(ours, theirs[0, 3:])

    # Saved by us, loaded by them.
    kind = model.config.model_type
    gf.save_pretrained(tmp_path / "ours", config, params, family=kind)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", dtype=torch.float32
    )
    assert again.config.model_type == kind
    np.testing.assert_allclose(
        again.eval()(torch.tensor(INPUTS)).logits.detach(), logits, rtol=1e-5, atol=1e-6
    )
    config_again, params_again = loaded(tmp_path / "ours")
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, params_again, params)

    # Convert their gradients like weights: write them into a model, save it, and load it.
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(tmp_path / "gradients")
    _, their_grads = loaded(tmp_path / "gradients")
    assert gf.shapes(their_grads) == gf.shapes(grads)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(their_grads)):
        assert np.abs(theirs).max() > 0, path
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max(), err_msg=str(path)
        )

    # In bfloat16, kept and widened.
    with torch.no_grad():
        model.bfloat16().save_pretrained(tmp_path / "narrow")
    _, narrow = loaded(tmp_path / "narrow", dtype=None)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype("bfloat16")}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), narrow, their_grads)


GEMMA = gf.GPTConfig(
    vocab=13, context=8, n_layers=2, n_heads=2, width=4, n_kv_heads=1, hidden=6, positions="rope",
    norm="rms_unit_offset", feed="geglu", bias=False, window=3, global_layers=(1,), attention_scale=0.5,
    embed_scale=2.0, norms_after=True, qk_norm=True,
    rope_base_local=20.0,
)  # fmt: skip


def test_fields_of_layers_with_windows_are_read_or_refused(tmp_path):
    gf.save_pretrained(tmp_path, GEMMA, gf.gpt(GEMMA).init(jax.random.key(0)))
    assert gf.load_pretrained(tmp_path)[0] == GEMMA
    file = tmp_path / "config.json"
    described = json.loads(file.read_text())
    assert described["model_type"] == "gemma3_text"

    def read(**changes):
        file.write_text(json.dumps({k: v for k, v in (described | changes).items() if v != "absent"}))
        return gf.load_pretrained(tmp_path)[0]

    # As versions of transformers before layer_types and nested rope_parameters wrote it.
    old = {
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 1e4,
    }
    config = read(
        layer_types="absent", rope_parameters="absent", sliding_window_pattern=2, hidden_act="gelu", **old
    )
    assert config == dataclasses.replace(
        GEMMA, rope_base=1e6, rope_base_local=1e4, rope_scaling=gf.RopeScaling("linear", 8.0)
    )
    full = read(layer_types=["full_attention"] * 2)
    assert (full.window, full.global_layers, full.rope_base_local) == (None, (), None)
    local = read(layer_types=["sliding_attention"] * 2)
    assert (local.window, local.rope_base, local.rope_base_local) == (3, 20.0, None)
    for changes, message in (
        ({"model_type": "gemma3"}, "model_type: gemma3 is a model of texts and images"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected 2 of 'sliding_attention'"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types: expected 2 of"),
        (
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention: gf.gpt does False only, got True",
        ),
        ({"hidden_activation": "gelu"}, "hidden_activation: expected one of 'gelu_pytorch_tanh'; got 'gelu'"),
        ({"attn_logit_softcapping": -1.0}, "attn_logit_softcapping: expected a number above 0, got -1.0"),
        ({"sliding_window": None}, "sliding_window: expected int, got None"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_type 'default' in layers with a window only",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(**changes)


# As published, with the fields that newer versions of transformers no longer write.
PUBLISHED = {
    "gemma-2-2b": (
        {
            **{"architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0},
            **{"attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid"},
            **{"eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256},
            **{"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
            **{"hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 9216},
            **{"max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8},
            **{"num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0},
            **{"query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0},
            **{"sliding_window": 4096, "torch_dtype": "float32", "transformers_version": "4.42.4"},
            **{"use_cache": True, "vocab_size": 256000},
        },
        {"window": 4096, "global_layers": tuple(range(1, 26, 2)), "score_cap": 50.0, "feed": "geglu"},
    ),
    "gemma-3-1b-it": (
        {
            **{"architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0},
            **{"attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid"},
            **{"eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256},
            **{"hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02},
            **{"intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text"},
            **{"num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1},
            **{"pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06},
            **{"rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000},
            **{"sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16"},
            **{"transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144},
        },
        {"window": 512, "global_layers": (5, 11, 17, 23), "rope_base": 1e6, "rope_base_local": 1e4},
    ),
    "gpt-neox-20b": (
        {
            **{"architectures": ["GPTNeoXForCausalLM"], "attention_probs_dropout_prob": 0},
            **{"bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu_fast", "hidden_dropout_prob": 0},
            **{"hidden_size": 6144, "initializer_range": 0.02, "intermediate_size": 24576},
            **{"layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox"},
            **{"num_attention_heads": 64, "num_hidden_layers": 44, "rotary_emb_base": 10000},
            **{"rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16"},
            **{"transformers_version": "4.19.0.dev0", "use_cache": True, "vocab_size": 50432},
        },
        {"feed": "gelu", "parallel": True, "rope_fraction": 0.25, "width": 6144, "tied": False},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(name, tmp_path):
    published, expected = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(published))
    described = fields.Fields(tmp_path / "config.json")
    kind = described.choice("model_type", families.FAMILIES)
    config = families.FAMILIES[kind].read(described)
    described.end()
    assert {key: getattr(config, key) for key in expected} == expected


def test_what_a_family_cannot_express_is_named(tmp_path):
    for changes, message in (
        ({"embed_scale": 3.0}, "gemma3_text has embed_scale 2.0, got 3.0"),
        (
            {"attention_scale": 0.3},
            "gemma3_text has an attention_scale that is 1 / sqrt(n) of an integer n, got 0.3",
        ),
        ({"attention_bias": "qkv"}, "gemma3_text has attention_bias True or False, got 'qkv'"),
        ({"parallel": True, "norms_after": False}, "gemma3_text has norms_after True, got False"),
    ):
        config = dataclasses.replace(GEMMA, **changes)
        with pytest.raises(ValueError, match=re.escape(message)):
            gf.save_pretrained(tmp_path, config, gf.gpt(config).init(jax.random.key(0)))
