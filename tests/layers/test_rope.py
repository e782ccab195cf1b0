"""RoPE with scaled frequencies, compared with those of `transformers`."""

import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

FULL = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn with limits": {
        **{"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 128},
        **{"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.5},
    },
    "llama3": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128, **FULL},
}


def scaling_of(fields):
    renamed = {"rope_type": "kind", "original_max_position_embeddings": "original_context"}
    ours = {renamed.get(name, name): value for name, value in fields.items()}
    return gf.RopeScaling(**{"original_context": 512} | ours)


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("name", KINDS)
def test_rotations_equal_those_of_transformers(name, size):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    config = transformers.LlamaConfig(
        hidden_size=2 * size,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={**KINDS[name], "rope_theta": 10_000.0},
    )
    # Longer than the context, where dynamic scaling changes the base.
    positions = np.array([0, 1, 7, 130, 700])
    frequencies, factor = ROPE_INIT_FUNCTIONS[KINDS[name]["rope_type"]](config, "cpu", seq_len=701)
    x = np.random.default_rng(0).normal(size=(len(positions), 1, size)).astype(np.float32)
    angles = np.outer(positions, np.asarray(frequencies, np.float64))
    # [T, size / 2] -> [1, T, size]
    cos, sin = (
        torch.tensor(factor * np.concatenate([f(angles), f(angles)], -1)[None]) for f in (np.cos, np.sin)
    )
    # [T, 1, size] -> [1, 1, T, size]
    theirs, _ = apply_rotary_pos_emb(*2 * [torch.tensor(x).permute(1, 0, 2)[None].double()], cos, sin)
    ours = gf.layers.rope(jnp.asarray(x), jnp.asarray(positions), 10_000.0, scaling_of(KINDS[name]))
    np.testing.assert_allclose(ours[:, 0], theirs[0, 0], atol=3e-4)


def test_dynamic_scaling_changes_nothing_up_to_the_original_context():
    x, positions = jnp.ones([8, 1, 4]), jnp.arange(8)
    scaling = gf.RopeScaling("dynamic", 2.0, 8)
    plain = gf.layers.rope(x, positions)
    np.testing.assert_allclose(gf.layers.rope(x, positions, scaling=scaling), plain, rtol=1e-6)
    assert jnp.abs(gf.layers.rope(x, positions, scaling=scaling, length=16) - plain).max() > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kind": "longrope", "factor": 2.0},
            "kind must be one of linear, dynamic, yarn, llama3; got 'longrope'",
        ),
        ({"kind": "linear", "factor": 0.5}, "factor must be a number >= 1, got 0.5"),
        ({"kind": "yarn", "factor": 2.0}, "yarn needs original_context, an integer >= 1, got None"),
        (
            {"kind": "llama3", "factor": 2.0, "original_context": 8, "high_freq_factor": 1.0},
            "low_freq_factor must be above 0 and below high_freq_factor, got 1.0 and 1.0",
        ),
        (
            {"kind": "yarn", "factor": 2.0, "original_context": 8, "attention_factor": 0.0},
            "attention_factor must be a number above 0 or None, got 0.0",
        ),
    ],
)
def test_scalings_that_mean_nothing_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        gf.RopeScaling(**settings)


def test_a_size_too_small_for_dynamic_scaling_raises():
    with pytest.raises(ValueError, match="dynamic scaling needs a head size of at least 4, got 2"):
        gf.layers.rope(jnp.ones([1, 1, 2]), jnp.array([0]), scaling=gf.RopeScaling("dynamic", 2.0, 8))
