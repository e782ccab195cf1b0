import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf


def reference(query, key, value, mask):
    """Compute attention in numpy, one head and one query at a time."""
    group = query.shape[1] // key.shape[1]
    out = np.zeros(query.shape)
    for t in range(query.shape[0]):
        for h in range(query.shape[1]):
            scores = key[:, h // group] @ query[t, h] / np.sqrt(query.shape[-1])
            weights = np.where(mask[t], np.exp(scores - scores.max()), 0)
            out[t, h] = (weights / weights.sum()) @ value[:, h // group]
    return out


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attend_is_a_weighted_mean_of_values(kv_heads):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=[n, h, 6]) for n, h in ((5, 4), (7, kv_heads), (7, kv_heads)))
    mask = rng.random([5, 7]) < 0.6
    mask[:, 0] = True
    found = gf.layers.attend(*(jnp.asarray(a, jnp.float32) for a in (query, key, value)), jnp.asarray(mask))
    np.testing.assert_allclose(found, reference(query, key, value, mask), rtol=1e-5, atol=1e-6)


def test_causal_attention_ignores_later_positions():
    layer = gf.layers.attention(8, 2, causal=True, rope_base=100.0)
    params = layer.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), [6, 8])
    later = x.at[4:].set(jax.random.normal(jax.random.key(2), [2, 8]))
    apply = jax.jit(layer.apply)
    np.testing.assert_array_equal(apply(params, x)[:4], apply(params, later)[:4])
    assert (apply(params, x)[4:] != apply(params, later)[4:]).any()


def test_cross_attention_reads_keys_and_values_from_memory():
    layer = gf.layers.attention(8, 2)
    params = layer.init(jax.random.key(0))
    x, memory = jnp.ones([3, 8]), jax.random.normal(jax.random.key(1), [5, 8])
    np.testing.assert_allclose(layer.apply(params, x, x), layer.apply(params, x), rtol=1e-6)
    # Equal queries give equal outputs, and the order of the memory does not matter.
    y = layer.apply(params, x, memory)
    np.testing.assert_allclose(y[0], y[2], rtol=1e-6)
    np.testing.assert_allclose(layer.apply(params, x, memory[::-1]), y, rtol=1e-5, atol=1e-6)


def test_a_cache_continues_a_sequence():
    layer = gf.layers.attention(8, 4, n_kv_heads=2, causal=True, rope_base=50.0)
    params = layer.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), [7, 8])
    cache, parts, start = gf.layers.kv_cache(9, 2, 2), [], 0
    apply = jax.jit(layer.apply)
    for n in (3, 3, 1):
        y, cache = apply(params, x[start : start + n], cache=cache, start=start)
        parts.append(y)
        start += n
    np.testing.assert_allclose(np.concatenate(parts), apply(params, x), rtol=1e-5, atol=1e-6)
    assert not cache["key"][7:].any()


@pytest.mark.slow
def test_tapped_probabilities_cost_nothing_without_inspection():
    layer = gf.layers.attention(8, 2, causal=True)
    params, x = layer.init(jax.random.key(0)), jnp.ones([3, 8])
    inspection = gf.inspect(lambda p, x: layer.apply(p, x).sum(), keep="probabilities")(params, x)
    weights = inspection["probabilities"].value
    np.testing.assert_allclose(
        weights, np.tile(np.tril(np.ones([3, 3])) / [[1], [2], [3]], [2, 1, 1]), rtol=1e-6
    )
    compiled = jax.jit(layer.apply).lower(params, x).as_text()
    assert "probabilities" not in compiled  # names compile to nothing


def test_shapes_that_do_not_match_raise():
    with pytest.raises(ValueError, match="n_heads must divide width, got n_heads 3, width 8"):
        gf.layers.attention(8, 3)
    with pytest.raises(ValueError, match="n_kv_heads must divide n_heads, got n_kv_heads 3, n_heads 4"):
        gf.layers.attention(8, 4, 3)
    layer = gf.layers.attention(8, 2, causal=True)
    with pytest.raises(ValueError, match="memory cannot be combined with causal=True"):
        layer.apply(layer.init(jax.random.key(0)), jnp.ones([2, 8]), jnp.ones([2, 8]))
    with pytest.raises(
        gf.ParameterError, match=r"query/W: W is \[8, 8\], expected an input of \[\.\.\., 8\]"
    ):
        layer.apply(layer.init(jax.random.key(0)), jnp.ones([2, 4]))
    one = jnp.ones([2, 1, 4])
    with pytest.raises(ValueError, match=r"got \[2, 1, 4\], \[2, 1, 3\], \[2, 1, 4\]"):
        gf.layers.attend(one, one[..., :3], one)


def test_rope_depends_on_distances_only():
    x = jax.random.normal(jax.random.key(0), [2, 1, 8])

    def product(i, j):
        turned = gf.layers.rope(x, jnp.array([i, j]), base=100.0)
        return (turned[0] * turned[1]).sum()

    np.testing.assert_allclose(product(3, 7), product(13, 17), rtol=1e-4)
    assert abs(product(3, 7) - product(3, 8)) > 1e-3
    with pytest.raises(ValueError, match="the head size must be even, got 3"):
        gf.layers.rope(jnp.ones([1, 1, 3]), jnp.array([0]))


def test_sinusoidal_equals_the_formula():
    table = np.asarray(gf.layers.sinusoidal(50, 6))
    for t, i in ((0, 0), (7, 1), (49, 2)):
        angle = t / 10_000 ** (2 * i / 6)
        np.testing.assert_allclose(table[t, 2 * i : 2 * i + 2], [np.sin(angle), np.cos(angle)], atol=1e-6)
    with pytest.raises(ValueError, match="width must be even, got 5"):
        gf.layers.sinusoidal(3, 5)


def test_embed_gives_nan_for_indices_out_of_range():
    layer = gf.layers.embed(3, 2)
    params = layer.init(jax.random.key(0))
    answer = layer.apply(params, np.array([0, 2, 3, -1]))
    np.testing.assert_array_equal(answer[:2], params["W"][jnp.array([0, 2])])
    assert np.isnan(answer[2:]).all()
    with pytest.raises(gf.ParameterError, match=r"W: expected integer indices, got \[2\] float32"):
        layer.apply(params, jnp.ones(2))
