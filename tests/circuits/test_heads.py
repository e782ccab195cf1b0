"""Head detectors, composition scores and singular values, against patterns, dense matrices and TransformerLens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

CONFIG = dict(vocab=11, context=12, n_layers=3, n_heads=2, width=8)


def shows(attention):
    """A function whose only site is the given attention."""
    return lambda params, tokens: jnp.sum(params) + jnp.sum(gf.tap(jnp.asarray(attention), "probabilities"))


def test_heads_that_follow_a_pattern_score_one():
    tokens = jnp.array([5, 6, 7, 5, 6, 7])
    previous = np.eye(6, k=-1)
    duplicate, induction = np.zeros([6, 6]), np.zeros([6, 6])
    for t in (3, 4, 5):
        duplicate[t, t - 3] = 1
    # After 5 came 6, after 6 came 7; at the last position, after 7 came 5.
    induction[3, 1] = induction[4, 2] = induction[5, 3] = 1
    scores = gf.circuits.head_scores(shows([previous, duplicate, induction]))(jnp.ones(1), tokens)
    np.testing.assert_allclose(scores.previous_token, [[1, 0, 0]])
    np.testing.assert_allclose(scores.duplicate_token, [[0, 1, 0]])
    np.testing.assert_allclose(scores.induction, [[0, 0, 1]])


def test_several_occurrences_count_together_and_the_position_itself_does_not():
    tokens = jnp.array([1, 1, 2, 1])
    uniform = jnp.full((1, 4, 4), 0.25)
    scores = gf.circuits.head_scores(shows(uniform))(jnp.ones(1), tokens)
    # Duplicates: position 1 has one, position 3 has two. Induction: 3 attends to 1 and 2; 1 would attend to itself.
    np.testing.assert_allclose(scores.duplicate_token, [[(0.25 + 0.5) / 2]])
    np.testing.assert_allclose(scores.induction, [[0.5]])


def test_no_repeated_token_leaves_nothing_to_measure():
    scores = gf.circuits.head_scores(shows(jnp.full((1, 3, 3), 1 / 3)))(jnp.ones(1), jnp.arange(3))
    assert np.isnan(scores.induction).all()
    assert np.isnan(scores.duplicate_token).all()
    np.testing.assert_allclose(scores.previous_token, 1 / 3, rtol=1e-6)


def test_scanned_batched_and_unrolled_layers_score_alike():
    unrolled, scanned = (gf.gpt(gf.GPTConfig(**CONFIG, scan=scan)) for scan in (False, True))
    params = jax.tree.map(lambda x: 20 * x if x.ndim == 2 else x, unrolled.init(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (3, 12), 0, 5)
    each = [gf.circuits.head_scores(unrolled.apply)(params, row) for row in tokens]
    stacked = gf.circuits.head_scores(scanned.apply)(gf.stack_blocks(params), tokens[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), stacked.induction, each[0].induction
    )
    assert stacked.layers[2] == "probabilities[2]"
    batched = jax.jit(gf.circuits.head_scores(jax.vmap(unrolled.apply, (None, 0))))(params, tokens)
    expected = np.mean([one.previous_token for one in each], 0)
    np.testing.assert_allclose(batched.previous_token, expected, atol=1e-5)


def test_grouped_queries_are_heads():
    net = gf.gpt(gf.GPTConfig(**CONFIG | dict(n_heads=4, n_kv_heads=2)))
    scores = gf.circuits.head_scores(net.apply)(net.init(jax.random.key(0)), jnp.array([1, 2, 1, 2]))
    assert scores.induction.shape == (3, 4)


def test_what_is_no_attention_is_refused():
    net = gf.gpt(gf.GPTConfig(**CONFIG))
    params, tokens = net.init(jax.random.key(0)), jnp.arange(4)
    with pytest.raises(ValueError, match=r"site 'blocks/0/residual' has shape \[4, 8\], expected attention"):
        gf.circuits.head_scores(net.apply, sites="*residual")(params, tokens)
    with pytest.raises(ValueError, match="there is no site"):
        gf.circuits.head_scores(net.apply, sites="*pattern")(params, tokens)
    with pytest.raises(TypeError, match=r"expected integer tokens, got float32\[4\]"):
        gf.circuits.head_scores(net.apply)(params, jnp.ones(4))


def weights_of(config=CONFIG, key=0):
    net = gf.gpt(gf.GPTConfig(**config))
    params = net.init(jax.random.key(key))
    noise = iter(jax.random.split(jax.random.key(1), 200))
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(noise), x.shape), params)
    return params, gf.circuits.head_weights(params, config["n_heads"])


def test_head_weights_reproduce_the_attention_layer():
    params, weights = weights_of()
    attention = params["blocks"]["1"]["attention"]
    gain = params["blocks"]["1"]["attention_norm"]["gain"]
    x, head = np.random.default_rng(0).normal(size=(8,)), slice(4, 8)
    for name in ("query", "key", "value"):
        expected = attention[name]["W"][head] @ (gain * x)
        np.testing.assert_allclose(getattr(weights, name)[1, 1] @ x, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(weights.out[1, 1], attention["out"]["W"][:, head])
    stacked = gf.circuits.head_weights(gf.stack_blocks(params), 2)
    jax.tree.map(np.testing.assert_array_equal, stacked, weights)


def test_composition_and_singular_values_equal_those_of_dense_matrices():
    _, weights = weights_of()
    Q, K, V, out = weights
    scores, values = gf.circuits.composition(weights), gf.circuits.singular_values(weights)
    norm = np.linalg.norm
    for i in range(3):
        for h in range(2):
            ov, qk = out[i, h] @ V[i, h], Q[i, h].T @ K[i, h]
            np.testing.assert_allclose(values.ov[i, h], np.linalg.svd(ov)[1][:4], rtol=1e-4)
            np.testing.assert_allclose(values.qk[i, h], np.linalg.svd(qk)[1][:4], rtol=1e-4)
            for j in range(3):
                for k in range(2):
                    qk2, ov2 = Q[j, k].T @ K[j, k], out[j, k] @ V[j, k]
                    expected = [qk2.T @ ov, qk2 @ ov, ov2 @ ov]
                    actual = [s[i, h, j, k] for s in (scores.query, scores.key, scores.value)]
                    if j <= i:
                        assert not np.any(actual)
                        continue
                    sizes = [norm(qk2) * norm(ov)] * 2 + [norm(ov2) * norm(ov)]
                    np.testing.assert_allclose(
                        actual, [norm(m) / s for m, s in zip(expected, sizes)], rtol=1e-4
                    )


def test_shared_heads_are_repeated_and_wrong_sizes_refused():
    params, weights = weights_of(CONFIG | dict(n_heads=4, n_kv_heads=2))
    np.testing.assert_array_equal(weights.key[:, 0], weights.key[:, 1])
    assert weights.query.shape == (3, 4, 2, 8)
    with pytest.raises(ValueError, match="n_heads must divide 8, got 3"):
        gf.circuits.head_weights(params, 3)
    with pytest.raises(ValueError, match="expected blocks with attention/query"):
        gf.circuits.head_weights(gf.mlp([3, 2]).init(jax.random.key(0)), 1)


def test_transformer_lens_agrees():
    torch = pytest.importorskip("torch")
    lens = pytest.importorskip("transformer_lens")
    from transformer_lens import head_detector
    from transformer_lens.utilities import composition_scores

    tokens = np.array([1, 2, 3, 4, 1, 2, 3, 4])
    draw = np.random.default_rng(0)
    attention = np.tril(draw.uniform(size=[2, 8, 8]))
    attention /= attention.sum(-1, keepdims=True)
    ours = gf.circuits.head_scores(shows(attention))(jnp.ones(1), jnp.asarray(tokens))
    # They divide by all rows, we by those that have any of the pattern.
    for name, score, n_rows in (
        ("previous_token_head", ours.previous_token, 7),
        ("duplicate_token_head", ours.duplicate_token, 4),
        ("induction_head", ours.induction, 4),
    ):
        pattern = getattr(head_detector, f"get_{name}_detection_pattern")(torch.tensor(tokens)[None])
        for head in range(2):
            theirs = head_detector.compute_head_attention_similarity_score(
                torch.tensor(attention[head]),
                pattern.double(),
                exclude_bos=False,
                exclude_current_token=False,
                error_measure="mul",
            )
            assert float(score[0, head]) * n_rows / 8 == pytest.approx(theirs, abs=1e-3)  # they round
    _, (Q, K, V, out) = weights_of()
    ours = gf.circuits.composition(gf.circuits.HeadWeights(Q, K, V, out))
    # Their vectors are rows.
    Q, K, V, out = (torch.tensor(np.asarray(w)).mT for w in (Q, K, V, out))
    qk, ov = lens.FactoredMatrix(Q, K.mT), lens.FactoredMatrix(V, out)
    for actual, reads in ((ours.query, qk), (ours.key, qk.T), (ours.value, ov)):
        theirs = composition_scores(ov[0][:, None], reads[1][None], broadcast_dims=False)
        np.testing.assert_allclose(actual[0, :, 1], theirs.numpy(), atol=1e-5)
