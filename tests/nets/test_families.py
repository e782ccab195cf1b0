"""Each family of models, compared with `transformers` on small random models.

A row of `ROWS` is a name, a configuration class of `transformers`, and its fields beside `SIZES`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

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


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
    return pytest.importorskip("transformers", reason="needs transformers: pip install transformers")


def their_model(transformers, name):
    import torch

    torch.manual_seed(0)
    config_class, fields = ROWS[name]
    config = getattr(transformers, config_class)(**SIZES | fields)
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
