"""The lenses, against their formulas written out and against dense Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

SIZES = dict(vocab=17, context=8, n_layers=2, n_heads=2, width=8)
TOKENS = jnp.array([3, 1, 4, 1, 5, 9])
TARGETS = jnp.array([1, 4, 1, 5, 9, -1])


def gpt(**changes):
    """A GPT whose parameters are all random."""
    net = gf.gpt(gf.GPTConfig(**SIZES | changes))
    leaves, tree = jax.tree.flatten(net.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys, strict=True)]
    return net, jax.tree.unflatten(tree, leaves)


def streams_of(f, params, tokens, names=("embedded", "blocks/0/residual", "blocks/1/residual")):
    captured = jax.jit(gf.capture(f, sites=names, keep=names, stats=["rms"]))(params, tokens)
    return [captured[name].value for name in names]


def normalized(params, x, at=None):
    """The final layer norm without its bias, with the scale of `at`."""
    at = x if at is None else at
    scale = jnp.sqrt(at.var(-1, keepdims=True) + 1e-5)
    return (x - x.mean(-1, keepdims=True)) / scale * params["final_norm"]["gain"][None]


def test_logit_lens_is_norm_and_unembedding_of_each_stream():
    net, params = gpt()
    lens = gf.circuits.logit_lens(net.apply)(params, TOKENS)
    W, b = params["embed"]["W"], params["final_norm"]["b"]
    for logits, x in zip(lens.logits, streams_of(net.apply, params, TOKENS), strict=True):
        np.testing.assert_allclose(logits, (normalized(params, x) + b[None]) @ W.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lens.logits[-1], net.apply(params, TOKENS), rtol=1e-5, atol=1e-6)


def test_scanned_blocks_give_the_same_lenses():
    net, params = gpt(n_layers=2)
    scanned, stacked = gf.gpt(gf.GPTConfig(**SIZES, scan=True, remat=True)), gf.stack_blocks(params)
    ours = jax.jit(gf.circuits.logit_lens(scanned.apply))(stacked, TOKENS)
    theirs = gf.circuits.logit_lens(net.apply)(params, TOKENS)
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    assert ours.layers == ("embedded", *[f"residual[{i}]" for i in range(2)])
    assert theirs.layers[1] == "blocks/0/residual"
    batch = jnp.stack([TOKENS, TOKENS[::-1]])
    ours = gf.circuits.jacobian_lens(scanned.apply)(stacked, batch)
    theirs = gf.circuits.jacobian_lens(net.apply)(params, batch)
    np.testing.assert_allclose(ours.jacobians, theirs.jacobians, rtol=1e-3, atol=1e-4)
    example = TOKENS, TARGETS
    ours = gf.circuits.backward_lens(gf.next_token_loss(scanned))(stacked, example)
    theirs = gf.circuits.backward_lens(gf.next_token_loss(net))(params, example)
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-3, atol=1e-5)
    assert ours.parts[:3] == ("embedded", "attention_out[0]", "feed_out[0]")


def test_the_streams_in_one_loop_are_in_the_order_of_computation():
    net, params = gpt(scan=True)
    lens = gf.circuits.logit_lens(net.apply, sites=["residual_mid", "residual"])(params, TOKENS)
    assert lens.layers == ("residual_mid[0]", "residual[0]", "residual_mid[1]", "residual[1]")
    every = gf.circuits.logit_lens(net.apply, sites=["residual_mid", "blocks"])(params, TOKENS)
    np.testing.assert_array_equal(every.logits, lens.logits[jnp.array([0, 2, 3])])


def test_what_the_result_says_of_each_distribution():
    net, params = gpt()
    lens = gf.circuits.logit_lens(net.apply)(params, TOKENS)
    p = np.asarray(jax.nn.softmax(lens.logits), np.float64)
    np.testing.assert_allclose(lens.entropy, -(p * np.log(p)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(lens.kl, (p[-1] * np.log(p[-1] / p)).sum(-1), rtol=1e-4, atol=1e-6)
    assert not lens.kl[-1].any()
    np.testing.assert_array_equal(lens.top(3), np.argsort(-p, -1)[..., :3])
    at = np.arange(5), TARGETS[:5]
    np.testing.assert_allclose(lens.log_probability(TARGETS)[:, :5], np.log(p[:, *at]), rtol=1e-5)
    np.testing.assert_allclose(lens.cross_entropy(TARGETS), -np.log(p[:, *at]).mean(1), rtol=1e-5)
    expected = (p[:, :5] > p[:, *at][..., None]).sum(-1)
    np.testing.assert_array_equal(lens.rank(TARGETS), np.pad(expected, ((0, 0), (0, 1)), constant_values=-1))
    assert "blocks/1/residual" in str(lens)
    with pytest.raises(ValueError, match=r"one token per position, int\[6\], got int32\[5\]"):
        lens.rank(TARGETS[:5])


def test_logit_lens_inside_vmap_and_with_an_impossible_token():
    net, params = gpt()
    lens = gf.circuits.logit_lens(lambda p, t: net.apply(p, t).at[:, 0].set(-jnp.inf))
    batch = jnp.stack([TOKENS, TOKENS[::-1]])
    several = jax.vmap(lens, (None, 0))(params, batch)
    one = lens(params, batch[1])
    np.testing.assert_allclose(several.logits[1], one.logits, rtol=1e-5, atol=1e-5)
    assert jnp.isfinite(one.entropy).all()
    assert jnp.isfinite(one.kl).all()
    with pytest.raises(ValueError, match=r"results of several inputs. Use jax.vmap"):
        _ = several.entropy
    np.testing.assert_allclose(jax.vmap(lambda lens: lens.kl)(several)[1], one.kl, rtol=1e-3, atol=1e-5)


def test_jacobian_lens_is_the_mean_of_dense_jacobians(x64):
    net, params = gpt()
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    batch = jnp.stack([TOKENS, TOKENS[::-1], TOKENS + 2])
    lenses = {
        skip: gf.circuits.jacobian_lens(net.apply, skip=skip, chunk=3)(params, batch) for skip in (0, 2)
    }
    for k, name in enumerate(lenses[0].layers[:-1]):

        def jacobian(tokens, name=name):
            def last(x):
                edited = gf.patch(net.apply, {name: lambda old: x})
                return streams_of(edited, params, tokens, ["blocks/1/residual"])[0]

            return jax.jacobian(last)(*streams_of(net.apply, params, tokens, [name]))  # [T, width, T, width]

        dense = np.asarray(jax.jit(jax.vmap(jacobian))(batch))
        for skip, lens in lenses.items():
            # Over targets, then over sources.
            found = [one[skip:, :, skip:].sum(0).mean(1) for one in dense]
            mean = np.mean(found, 0)
            np.testing.assert_allclose(lens.jacobians[k], mean, rtol=1e-9, atol=1e-10)
            error = np.sqrt(np.var(found, 0, ddof=1).sum() / 3) / np.linalg.norm(mean)
            np.testing.assert_allclose(lens.relative_error[k], error, rtol=1e-6)
        np.testing.assert_array_equal(lens.jacobians[-1], np.eye(8))
    assert "embedded" in str(lens)


def test_jacobian_lens_of_a_linear_model_is_exact():
    def f(params, x):
        for i in range(3):
            x = gf.tap(x + x @ params["W"][i], f"h{i}")
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)) @ params["U"]

    keys = jax.random.split(jax.random.key(0), 3)
    params = {"W": jax.random.normal(keys[0], (3, 4, 4)), "U": jax.random.normal(keys[1], (4, 7))}
    x = jax.random.normal(keys[2], (5, 6, 4))
    jacobians = gf.circuits.jacobian_lens(f, sites="h*")(params, x)
    lens = gf.circuits.logit_lens(f, sites="h*", transport=jacobians)(params, x[0])
    for logits in lens.logits:
        np.testing.assert_allclose(logits, f(params, x[0]), rtol=1e-4, atol=1e-4)
    plain = gf.circuits.logit_lens(f, sites="h*")(params, x[0])
    assert jnp.abs(plain.logits[0] - plain.logits[-1]).max() > 0.1
    np.testing.assert_allclose(jacobians.relative_error, 0, atol=1e-3)
    with pytest.raises(ValueError, match=r"of the layers h0, h1, h2, got width 4 of h1, h2. Fit the lens"):
        gf.circuits.logit_lens(f, sites=["h1", "h2"], transport=jacobians)(params, x[0])


def test_backward_lens_is_the_unembedding_of_the_negative_gradient():
    net, params = gpt()
    loss = gf.next_token_loss(net)
    example = TOKENS, TARGETS
    lens = gf.circuits.backward_lens(loss)(params, example)
    (end,) = streams_of(net.apply, params, TOKENS, ["blocks/1/residual"])
    np.testing.assert_allclose(lens.loss, loss(params, example), rtol=1e-5)
    inspection = jax.jit(gf.inspect(loss, sites=lens.parts, keep=lens.parts, stats=["rms"]))(params, example)
    for name, logits, norms in zip(lens.parts, lens.logits, lens.norms, strict=True):
        grad = inspection[name].grad
        expected = normalized(params, -grad, end) @ params["embed"]["W"].T
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(norms, jnp.linalg.norm(grad, axis=-1), rtol=1e-4, atol=1e-6)
    assert lens.parts[1::2] == ("blocks/0/attention_out", "blocks/1/attention_out")
    np.testing.assert_array_equal(lens.promoted()[..., 0], lens.logits.argmax(-1))
    np.testing.assert_array_equal(lens.demoted(2)[..., 0], lens.logits.argmin(-1))
    assert not lens.norms[-1, -1]  # of the position whose target does not count
    assert "promotes" in str(lens)


def test_backward_lens_of_a_batch_equals_that_of_its_examples():
    net, params = gpt(n_layers=1)
    batch = jnp.stack([TOKENS, TOKENS[::-1]]), jnp.stack([TARGETS, TARGETS[::-1]])
    loss = gf.next_token_loss(net)
    together = gf.circuits.backward_lens(gf.batch_mean(loss))(params, batch)
    each = jax.vmap(gf.circuits.backward_lens(loss), (None, 0))(params, batch)
    np.testing.assert_allclose(2 * together.logits, jnp.moveaxis(each.logits, 0, 1), rtol=1e-3, atol=1e-5)


def test_errors_say_what_to_type():
    net, params = gpt()
    logit_lens, jacobian_lens = gf.circuits.logit_lens, gf.circuits.jacobian_lens
    with pytest.raises(ValueError, match=r"there is no site 'blocks/\*/residul'. Did you mean"):
        logit_lens(net.apply, sites="blocks/*/residul")(params, TOKENS)
    with pytest.raises(ValueError, match=r"have one shape, got .*sites="):
        logit_lens(net.apply, sites=["embedded", "logits"])(params, TOKENS)
    other = gf.mlp([3, 2])
    with pytest.raises(ValueError, match=r"no site named residual. Name .* out of W1, z1"):
        logit_lens(other.apply)(other.init(jax.random.key(0)), jnp.ones(3))
    with pytest.raises(
        TypeError, match=r"must return logits \[..., vocab\], one floating array, got float32\[\]"
    ):
        logit_lens(gf.next_token_loss(net))(params, (TOKENS, TARGETS))
    with pytest.raises(ValueError, match=r"T > skip = 6, got"):
        jacobian_lens(net.apply, skip=6)(params, TOKENS[None])
    with pytest.raises(ValueError, match=r"one leading axis over sequences, got shapes"):
        jacobian_lens(net.apply)(params, jnp.int32(1))
    with pytest.raises(ValueError, match=r"chunk >= 1, got 0 and 0"):
        jacobian_lens(net.apply, chunk=0)
    with pytest.raises(ValueError, match=r"two or more layers, got only embedded"):
        jacobian_lens(net.apply, sites="embedded")(params, TOKENS[None])
    with pytest.raises(TypeError, match=r"backward_lens: the loss must return a floating scalar"):
        gf.circuits.backward_lens(net.apply)(params, TOKENS)
    with pytest.raises(ValueError, match=r"'logits' cannot be added to the stream: expected shape \[6, 8\]"):
        gf.circuits.backward_lens(gf.next_token_loss(net), parts="logits")(params, (TOKENS, TARGETS))


def test_a_stream_that_its_loop_does_not_return_is_refused():
    def f(W, x):
        def step(x, w):
            x = gf.tap(x + jnp.tanh(w * x), "residual")
            return 2 * x, None

        return jax.lax.scan(step, x, W)[0]

    with pytest.raises(ValueError, match=r"inside a loop that does not return it .*Add a site behind it"):
        gf.circuits.logit_lens(f)(jnp.ones([3, 4]), jnp.ones(4))

    def g(W, x):
        return jax.lax.cond(x[0] > 0, lambda x: gf.tap(W * x, "residual"), lambda x: x, x)

    with pytest.raises(ValueError, match=r"is inside a cond .*Select a site outside"):
        gf.circuits.logit_lens(g)(jnp.ones(4), jnp.ones(4))
