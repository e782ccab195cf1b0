"""Layer-wise relevance propagation against formulas by hand, and what it conserves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.attribution import lrp

X = np.linspace(-1.0, 2.0, 4)
W = np.linspace(-1.0, 1.0, 12).reshape(3, 4) + 0.05
V = np.array([0.5, -1.0, 2.0])


@pytest.fixture(autouse=True)
def _wide(x64):
    pass


def wide(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)


def relevance(f, params, x, *rest, **options):
    x = wide(x) if np.issubdtype(np.asarray(x).dtype, np.floating) else x
    result = jax.jit(lrp(f, epsilon=0.0, **options))(wide(params), x, *rest)
    np.testing.assert_allclose(sum(result.absorbed), result.gap, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.score - result.attributions.sum(), result.gap, rtol=1e-9, atol=1e-12)
    return result


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


ACTIVATIONS = ["relu", "sigmoid", "tanh", "gelu", "gelu_exact", "silu", "softplus", "elu", "leaky_relu"]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_passes_all_to_its_input(name):
    x = jnp.array([-1.5, -0.2, 0.7, 3.0])
    f = gf.layers.activation(name)
    result = relevance(lambda _, x: f(x).sum(), None, x)
    close(result.attributions, f(wide(x)))


def test_the_epsilon_rule_of_a_layer_by_hand():
    params, x = wide({"W": W, "b": V}), wide(X)

    def f(params, x):
        return jnp.sum(jnp.tanh(params["W"] @ x + params["b"]))

    z = params["W"] @ x + params["b"]
    shares = jnp.tanh(z) / (z + 0.1 * jnp.sign(z))
    result = lrp(f, epsilon=0.1)(params, x)
    close(result.attributions, x * (params["W"].T @ shares))
    close(result.absorbed.constants, jnp.sum(params["b"] * shares))
    close(sum(result.absorbed), result.gap)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        # A residual connection shares in proportion, also with a function that is not linear.
        (lambda W, x: jnp.sum(x + jnp.tanh(3 * x)), X + np.tanh(3 * X)),
        # Products of two values: half to each; powers and quotients alike.
        (lambda W, x: x[0] * x[3], [-1.0, 0, 0, -1.0]),
        (lambda W, x: x[0] * x[0] + x[1] ** 3, [1.0, 0, 0, 0]),
        (lambda W, x: x[3] / x[0], [-1.0, 0, 0, -1.0]),
        (lambda W, x: 1 / x[0] + 3.0, [2.0, 0, 0, 0]),
        # Gates: silu(u) * v.
        (lambda W, x: jax.nn.silu(x[2]) * x[3], [0, 0, 1 / (1 + np.exp(-1.0)), 1 / (1 + np.exp(-1.0))]),
        # Norms and masks only scale.
        (lambda W, x: (x / jnp.linalg.norm(x))[3], [0, 0, 0, 2 / np.sqrt(6.0)]),
        (lambda W, x: (x * jax.lax.rsqrt(jnp.mean(x**2) + 1.0))[0], [-1 / np.sqrt(2.5), 0, 0, 0]),
        (lambda W, x: jnp.sum(x * (x > 0.5).astype(x.dtype)), [0, 0, 1.0, 2.0]),
        # ... unless a norm is what the score is.
        (lambda W, x: jnp.linalg.norm(x), X**2 / np.sqrt(6.0)),
        # The largest gets all.
        (lambda W, x: jnp.max(x) + jnp.minimum(x[1], x[2]), [0, 0, 0, 2.0]),
        (lambda W, x: jnp.clip(x, -0.5, 1.5).sum(), [-0.5, 0, 1.0, 1.5]),
        # Moves.
        (lambda W, x: jnp.concatenate([x[::-1], jnp.zeros(2)]).reshape(3, 2)[0].sum(), [0, 0, 1.0, 2.0]),
        (lambda W, x: jax.lax.cond(x[0] > 0, lambda: x[1], lambda: 2 * x[3]), [0, 0, 0, 4.0]),
        (lambda W, x: jnp.sort(x)[::-1][:1].sum() + jax.lax.top_k(x, 1)[0].sum(), [0, 0, 0, 4.0]),
        (lambda W, x: jnp.cumsum(x)[2], [-1.0, 0, 1.0, 0]),
        (lambda W, x: jnp.zeros(3).at[jnp.array([1, 1, 2])].add(x[:3])[1], [-1.0, 0, 0, 0]),
        (lambda W, x: jax.checkpoint(jnp.tanh)(x)[3], [0, 0, 0, np.tanh(2.0)]),
    ],
)
def test_rules_by_hand(f, expected):
    close(relevance(f, W, X).attributions, wide(jnp.asarray(expected)))


def test_constants_get_their_share_of_a_sum():
    result = relevance(lambda b, x: jnp.sum(x + b) + jnp.where(x > 0, x, b)[0], V[0], X)
    close(result.attributions, wide(X))
    close(result.absorbed.constants, 5 * 0.5)
    replaced = relevance(lambda b, x: jnp.sum(b.at[1].set(x[3]) * 2.0) + jnp.maximum(x, b[2]).sum(), V, X)
    close(replaced.attributions, [0, 0, 0, 6.0])
    stopped = relevance(lambda _, x: jnp.sum(x + jax.lax.stop_gradient(x)), None, X)
    close(stopped.attributions, wide(X))
    close(stopped.absorbed.constants, X.sum())


def attention(params, x):
    """One head, without scores' scale."""
    q, k, v = (x @ params[name] for name in "qkv")
    return jax.nn.softmax(q @ k.T, -1) @ v


def test_attention_by_hand():
    rng = np.random.default_rng(0)
    params = wide({name: rng.normal(size=(3, 3)) for name in "qkv"})
    x = wide(rng.normal(size=(5, 3)))
    q, k, v = (x @ params[name] for name in "qkv")
    s = q @ k.T
    p = jax.nn.softmax(s, -1)
    # Equations 13 and 15 of the paper, for relevance 1 of one output o = (p v)[2, 1].
    of_p = np.zeros_like(p)
    of_p[2] = p[2] * v[:, 1] / 2
    of_s = s * (of_p - p * of_p.sum(-1, keepdims=True))
    of_q = q * ((of_s / (2 * s)) @ k)
    of_k = k * ((of_s / (2 * s)).T @ q)
    of_v = np.zeros_like(v)
    of_v[:, 1] = p[2] * v[:, 1] / 2
    expected = sum(
        x * (of / value @ params[name].T) for name, of, value in zip("qkv", (of_q, of_k, of_v), (q, k, v))
    )
    result = relevance(attention, params, x, target=(2, 1))
    close(result.attributions, expected)
    close(result.absorbed.softmax, of_p.sum() - of_s.sum())
    assert abs(result.absorbed.softmax) > 1e-3


def test_a_softmax_is_recognized_however_it_is_written():
    def by_hand(_, x):
        e = jnp.exp(x - jax.lax.stop_gradient(x.max()))
        return (e / e.sum())[1]

    def masked(_, x):
        e = jnp.where(jnp.arange(4) < 4, jnp.exp(x), 0.0)
        return (e / (jnp.sum(e) + 0.0))[1]

    x, p = wide(X), jax.nn.softmax(wide(X))
    expected = x * p[1] * (np.arange(4) == 1).astype(float) - x * p[1] * p
    from_logarithms = (
        lambda _, x: jnp.exp(jax.nn.log_softmax(x)[1]),
        lambda _, x: jnp.exp(x - jax.nn.logsumexp(x))[1],
    )
    for f in (by_hand, masked, lambda _, x: jax.nn.softmax(x)[1], *from_logarithms):
        close(relevance(f, None, x).attributions, expected)
    close(relevance(lambda _, x: jax.nn.log_softmax(x)[1], None, x).attributions, expected / p[1])
    close(relevance(lambda _, x: jax.nn.logsumexp(x), None, x).attributions, x * p)
    infinite = relevance(lambda _, x: jax.nn.softmax(jnp.where(jnp.arange(4) < 2, x, -jnp.inf))[1], None, x)
    assert np.all(np.isfinite(infinite.attributions))


def weights(net, biases=True, seed=0):
    """Random parameters of a net."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        is_bias = path[-1].key.rstrip("123") in ("b", "bn")
        return np.zeros(shape.shape) if is_bias and not biases else rng.normal(0.1, 0.5, shape.shape)

    return jax.tree.map_with_path(draw, jax.eval_shape(net.init, jax.random.key(0)))


NETS = {
    "mlp": (gf.mlp([6, 5, 4, 3], activation="relu"), np.linspace(-1.0, 2.0, 6), 1, None),
    "cnn": (gf.cnn((4, 4, 1), (3,), (4,), 3), np.sin(np.arange(16.0)), 1, None),
}


@pytest.mark.parametrize("name", NETS)
def test_without_biases_everything_is_conserved(name):
    net, x, target, at = NETS[name]
    result = relevance(net.apply, weights(net, biases=False), x, target=target, at=at)
    assert abs(result.score) > 0.01
    np.testing.assert_allclose(result.attributions.sum(), result.score, rtol=1e-9)
    # With them, their share is what is missing.
    result = relevance(net.apply, weights(net), x, target=target, at=at)
    np.testing.assert_allclose(result.absorbed.constants, result.gap, rtol=1e-9)
    assert abs(result.gap) > 0.01


TOKENS = np.array([3, 1, 4, 1, 5])


def gpt(**options):
    config = {"vocab": 11, "context": 6, "n_layers": 2, "n_heads": 2, "width": 6, "hidden": 8} | options
    return gf.gpt(gf.GPTConfig(**config))


def test_a_transformer_conserves_all_but_what_its_softmaxes_absorb():
    net = gpt()
    target = (-1, 7)
    result = relevance(net.apply, weights(net, biases=False), TOKENS, target=target, at="embedded")
    np.testing.assert_allclose(result.attributions.sum() + result.absorbed.softmax, result.score, rtol=1e-9)
    assert max(abs(part) for part in result.absorbed._replace(softmax=0)) < 1e-9
    # The same in a loop, and with the insides of blocks computed again.
    params = weights(net)
    expected = relevance(net.apply, params, TOKENS, target=target, at="embedded")
    looped = gpt(scan=True, remat=True)
    actual = relevance(looped.apply, gf.stack_blocks(params), TOKENS, target=target, at="embedded")
    close(actual.attributions, expected.attributions)
    close(jnp.stack(actual.absorbed), jnp.stack(expected.absorbed))


# The second is between a product with weights and its bias, which have one rule.
@pytest.mark.parametrize("site", ["residual", "attention/query/W"])
def test_the_values_of_a_loop_have_their_own_relevance(site):
    net, looped = gpt(), gpt(scan=True)
    params, stacked_site = weights(net), site if site == "residual" else f"blocks/{site}"
    stacked = lrp(looped.apply, (-1, 7), stacked_site)(gf.stack_blocks(params), TOKENS).attributions
    alone = lrp(net.apply, (-1, 7), f"blocks/0/{site}")(params, TOKENS)
    assert float(abs(alone.attributions).max()) > 1e-4
    np.testing.assert_allclose(stacked[0], alone.attributions, rtol=1e-5, atol=1e-8)
    close(sum(alone.absorbed), alone.gap)


def test_a_recurrent_net():
    net = gf.rnn(11, 5, cell="gru")
    relevance(net.apply, weights(net), TOKENS, target=(-1, 2), at="embedded")


@pytest.fixture
def usual_promotion():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
def test_models_of_other_frameworks_conserve_the_score(usual_promotion):
    linen, eqx = pytest.importorskip("flax.linen"), pytest.importorskip("equinox")

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Conv(4, (3, 3), param_dtype=jnp.float64)(x))
            x = linen.avg_pool(x[None], (2, 2), (2, 2))[0].reshape(4, 4)
            y = linen.LayerNorm(param_dtype=jnp.float64)(x)
            x = x + linen.MultiHeadDotProductAttention(2, param_dtype=jnp.float64)(y)
            return linen.Dense(3, param_dtype=jnp.float64)(linen.gelu(x.mean(0)))

    image = np.sin(np.arange(16.0)).reshape(4, 4, 1)
    model, key = Model(), jax.random.key(0)
    params = jax.jit(model.init)(key, image)
    result = relevance(model.apply, params, image, target=1)
    assert float(abs(result.score)) > 0.01
    assert float(abs(result.absorbed.constants)) < 1e-9
    layers = [eqx.nn.Conv2d(1, 4, 3, key=key), jax.nn.relu, eqx.nn.MaxPool2d(2, 2), jnp.ravel]
    layers += [eqx.nn.Linear(4, 4, key=key), eqx.nn.LayerNorm(4), eqx.nn.Linear(4, 3, key=key)]
    sequence = eqx.nn.Sequential(
        [layer if isinstance(layer, eqx.Module) else eqx.nn.Lambda(layer) for layer in layers]
    )
    result = lrp(lambda model, x: model(x), 1, epsilon=0.0)(sequence, image.transpose(2, 0, 1))
    assert float(abs(result.score)) > 0.01
    close(sum(result.absorbed), result.gap)


def test_sites_on_parallel_paths_share_the_score():
    def f(params, x):
        a, b = gf.tap(jnp.tanh(params["W"] @ x), "a"), gf.tap(params["V"] * (params["W"] @ x), "b")
        return jnp.sum(a * b + a + b)

    params = {"W": W, "V": V}
    parts = [relevance(f, params, X, at=at) for at in ("a", "b")]
    close(sum(part.attributions.sum() for part in parts), parts[0].score)
    close(parts[0].absorbed.other_paths, parts[1].attributions.sum())


def test_batches_classes_and_half_precision():
    net = gf.mlp([6, 5, 3], activation="relu")
    xs = np.random.default_rng(1).normal(size=[4, 6])
    params, xs = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (weights(net), xs))
    one = lrp(net.apply, 1)
    batch = jax.vmap(one, (None, 0))(params, xs)
    np.testing.assert_allclose(batch.attributions[2], one(params, xs[2]).attributions, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(batch.absorbed.constants.shape, (4,))
    inside = lrp(lambda params, xs: jax.vmap(net.apply, (None, 0))(params, xs), (..., 1))(params, xs)
    np.testing.assert_allclose(inside.attributions * 4, batch.attributions, rtol=1e-5, atol=1e-6)
    classes = jax.vmap(lambda k: lrp(net.apply, k)(params, xs[2]).attributions)(jnp.arange(3))
    np.testing.assert_allclose(classes[1], batch.attributions[2], rtol=1e-5, atol=1e-6)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, xs[2]))
    result = one(*half)
    assert result.attributions.dtype == jnp.bfloat16
    assert result.gap.dtype == jnp.float32


def test_the_result_is_a_table():
    result = lrp(lambda w, x: jnp.sum(w * x))(W[0], X)
    assert "absorbed: constants 0, stabilizer 0" in str(result)
    assert "sum of relevance" in str(result)
    batch = jax.vmap(lrp(lambda w, x: jnp.sum(w * x)), (0, None))(W, X)
    assert "Relevance, batched by vmap" in str(batch)


def halving(c):
    return jax.lax.while_loop(lambda c: c[0] > 1, lambda c: c / 2, c)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (
            lambda _, x: jnp.prod(x),
            r"lrp: no rule for reduce_prod, at .*test_lrp.py:\d+ .*Write it with sums",
        ),
        (lambda _, x: x[0] ** x[1], "lrp: no rule for pow, at "),
        (lambda _, x: jnp.linalg.cholesky(x.reshape(2, 2))[0, 0], "lrp: no rule for "),
        (lambda _, x: halving(x).sum(), r"lrp: no gradient passes through the while loop at .*test_lrp.py"),
        (
            lambda _, x: jnp.exp(x) @ x / jnp.exp(x).sum(),
            "lrp: no rule for a division by a sum of exponentials that are not its numerator, .*Normalize",
        ),
        (lambda _, x: jnp.argmax(x).astype(x.dtype), "lrp: the score is not computed from the input by diff"),
        (
            lambda _, x: x,
            r"lrp: expected a scalar output, got float64\[4\]. Select an element of it: target=",
        ),
    ],
)
def test_what_has_no_rule_is_an_error(f, message):
    with pytest.raises(ValueError, match=message):
        lrp(f)(None, wide(X))


def test_what_the_score_does_not_depend_on_needs_no_rule():
    f = lambda _, x: (x.sum(), jnp.prod(x))  # noqa: E731
    close(relevance(f, None, X).attributions, wide(X))


def test_bad_arguments():
    net = gpt()
    with pytest.raises(
        TypeError, match=r"lrp: expected a floating array as input x, got int.*For tokens, name a site"
    ):
        lrp(net.apply, (-1, 0))(weights(net), TOKENS)
    with pytest.raises(ValueError, match="lrp: rule must be one of epsilon, gamma, z\\+; got 'alpha'"):
        lrp(net.apply, rule="alpha")
    with pytest.raises(ValueError, match="lrp: epsilon must be >= 0, got -1"):
        lrp(net.apply, epsilon=-1)
    with pytest.raises(ValueError, match="lrp: there is no site 'a9'"):
        lrp(gf.mlp([4, 3]).apply, 0, at="a9")(wide(weights(gf.mlp([4, 3]))), X)
