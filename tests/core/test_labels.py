"""Labels out of range raise where their values are known, give NaN where they are traced, and never alias a class."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf

N, CLASSES = 8, 4
net = gf.mlp([3, CLASSES])
params = net.init(jax.random.key(1)) | {"b1": jnp.arange(4.0)}
x = np.random.default_rng(0).normal(size=[N, 3]).astype(np.float32)
right = np.array([0, 1, 2, 3, 0, 1, 2, 3])
LOSSES = {"classification": gf.classification_loss, "quadratic": gf.quadratic_loss}
lm = gf.rnn(5, 4, "vanilla")
lm_params = lm.init(jax.random.key(0))


def fit(loss, y, start=params, host=False):
    data = gf.train.from_host(lambda step: (x, y)) if host else (x, y)
    return gf.fit(gf.batch_mean(loss), start, data, optax.sgd(0.1), 2, batch_size=4, progress=False)


BAD = {
    "-1 is not the last class": (
        np.where(right == 3, -1, right),
        ValueError,
        "got -1 to 2. Leave out the examples",
    ),
    "-100 is not padding": (np.where(right == 3, -100, right), ValueError, "got -100 to 2"),
    "1 to n": (right + 1, ValueError, r"must be in \[0, 4\), got 1 to 4. Pass labels - 1"),
    "too large": (right + 3, ValueError, "got 3 to 6. Give the net 7 outputs"),
    "too large, unsigned": (np.uint8([0, 1, 2, 255] * 2), ValueError, "got 0 to 255"),
    "one-hot integers": (np.eye(4, dtype=int)[right], ValueError, r"got shape \[8, 4\].*labels.argmax\(-1\)"),
}
FLOATS = {
    "floats": (right.astype(np.float32), TypeError, "labels must be integers, got float32"),
    "a column of floats": (
        right[:, None].astype(np.float64),
        TypeError,
        "labels must be integers, got float",
    ),
    "one-hot floats": (np.eye(4, dtype=np.float32)[right], ValueError, r"labels.argmax\(-1\)"),
}


@pytest.mark.parametrize("kind", [*BAD, *FLOATS])
def test_known_labels_out_of_range_raise(kind):
    y, error, message = (BAD | FLOATS)[kind]
    with pytest.raises(error, match=message):
        gf.accuracy(net)(params, (x, y))
    with pytest.raises(error, match=message):
        fit(gf.classification_loss(net), y)
    with pytest.raises(error, match=message):
        fit(gf.classification_loss(net), y, host=True)
    if kind in BAD:
        with pytest.raises(error, match=message):
            fit(gf.quadratic_loss(net), y)


def test_narrow_target_dtypes_work_with_larger_vocabularies():
    wide = gf.Net({}, lambda params, x: x)
    logits = np.eye(300, dtype=np.float32)[[0, 299, 44]] * 9
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for targets in (np.uint8([0, 255, 44]), np.int8([0, 127, 44])):
        expected = -np.log(p[np.arange(3), targets]).mean()
        np.testing.assert_allclose(gf.next_token_loss(wide)({}, (logits, targets)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_traced_labels_out_of_range_give_nan(name):
    loss = LOSSES[name](net)
    value_and_grad = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))
    for y in (np.array([-1, 4, 5, 0, 1, 2, 3, -100]), np.uint8([255, 4, 5, 0, 1, 2, 3, 200])):
        values, grads = value_and_grad(params, (x, y))
        bad = (y < 0) | (y > 3) if y.dtype.kind == "i" else y > 3
        np.testing.assert_array_equal(np.isnan(values), bad)
        np.testing.assert_array_equal(np.isnan(grads["W1"]).any((1, 2)), bad)
    assert np.isnan(jax.jit(gf.accuracy(net))(params, (x, np.where(right == 3, -1, right))))
    assert np.isnan(jax.jit(gf.accuracy(net))(params, (x, right + 1)))
    scanned = jax.lax.scan(lambda c, e: (c, loss(params, e)), 0, (jnp.asarray(x), jnp.asarray(right - 1)))[1]
    np.testing.assert_array_equal(np.isnan(scanned), right == 0)


def test_a_column_of_labels_equals_a_vector():
    z = x @ np.asarray(params["W1"]).T + np.asarray(params["b1"])[None]
    share = (z.argmax(-1) == right).mean()
    for y in (right, right[:, None], jnp.asarray(right, jnp.uint8), right.tolist()):
        np.testing.assert_allclose(gf.accuracy(net)(params, (x, y)), share, rtol=1e-6)
    row, column = (fit(gf.classification_loss(net), y) for y in (right, right[:, None]))
    np.testing.assert_array_equal(row.params["W1"], column.params["W1"])
    for make in LOSSES.values():
        loss = gf.batch_mean(make(net))
        np.testing.assert_allclose(loss(params, (x, right)), loss(params, (x, right[:, None])), rtol=1e-6)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    expected = -log_p[np.arange(N), right].mean()
    loss = gf.batch_mean(gf.classification_loss(net))
    np.testing.assert_allclose(loss(params, (x, right[:, None])), expected, rtol=1e-5)
    two = gf.mlp([3, 2])
    loss = gf.batch_mean(gf.classification_loss(two))
    start = two.init(jax.random.key(0))
    assert loss(start, (x, right % 2 == 1)) == loss(start, (x, right % 2))


def test_narrow_label_dtypes_work_with_more_classes_than_they_hold():
    wide = gf.Net({}, lambda params, x: x)
    logits = np.eye(300, dtype=np.float32)[[0, 256, 44]] * 9
    y = np.uint8([0, 0, 44])
    np.testing.assert_allclose(gf.accuracy(wide)({}, (logits, y)), 2 / 3, rtol=1e-6)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for make, expected in (
        (gf.classification_loss, -np.log(p[np.arange(3), y])),
        (gf.quadratic_loss, 0.5 * ((logits - np.eye(300)[y]) ** 2).sum(-1)),
    ):
        np.testing.assert_allclose(jax.vmap(make(wide), (None, 0))({}, (logits, y)), expected, rtol=1e-5)


def test_integer_labels_need_more_than_one_output():
    one = gf.mlp([3, 1], output="sigmoid")
    start, y = one.init(jax.random.key(0)), right % 2
    for loss in (gf.classification_loss(one), gf.quadratic_loss(one)):
        with pytest.raises(ValueError, match="one output per class, got 1 output"):
            fit(loss, y, start)
        with pytest.raises(ValueError, match="one output per class, got 1 output"):
            jax.jit(loss)(start, (x[0], 1))
    with pytest.raises(ValueError, match="one output per class, got 1 output"):
        gf.accuracy(one)(start, (x, y))
    p = jax.nn.sigmoid(x @ np.asarray(start["W1"]).T)[:, 0]
    floats = y.astype(np.float32)
    value = gf.batch_mean(gf.quadratic_loss(one))(start, (x, floats))
    np.testing.assert_allclose(value, (0.5 * (p - floats) ** 2).mean(), rtol=1e-5)


def test_accuracy_does_not_broadcast():
    with pytest.raises(ValueError, match=r"expected one label per example, got shape \[4\] for 8"):
        gf.accuracy(net)(params, (x, right[:4]))
    with pytest.raises(ValueError, match=r"expected one label per example, got shape \[4\] for 8"):
        jax.jit(gf.accuracy(net))(params, (x, right[:4]))
    with pytest.raises(ValueError, match=r"expected a pair \(inputs, targets\), got 3 parts"):
        gf.accuracy(net)(params, (x, right, right))
    assert np.isnan(gf.accuracy(net)({"W1": params["W1"] * jnp.nan, "b1": params["b1"]}, (x, right)))
    pixels = gf.Net({}, lambda params, x: x.reshape(3, 1) * jnp.ones([1, 2]))
    with pytest.raises(ValueError, match=r"outputs \[classes\], got \[3, 2\]"):
        gf.accuracy(pixels)({}, (x, right))


def test_several_labels_for_one_example_raise_while_tracing():
    for make in LOSSES.values():
        with pytest.raises(ValueError, match=r"expected one label, got shape \[8\].*gf.batch_mean"):
            make(net)(params, (x[0], right))


@pytest.mark.parametrize("target", [5, 255])
def test_targets_beyond_the_vocabulary(target):
    tokens, targets = np.array([[0, 1, 2], [3, 4, 0]]), np.array([[1, 2, target], [4, 0, -1]])
    loss = gf.next_token_loss(lm)
    with pytest.raises(ValueError, match=rf"non-negative targets must be in \[0, 5\), got -1 to {target}"):
        gf.fit(
            gf.batch_mean(loss), lm_params, (tokens, targets), optax.sgd(0.1), 1, batch_size=2, progress=False
        )
    values = jax.jit(jax.vmap(loss, (None, 0)))(lm_params, (tokens, targets))
    np.testing.assert_array_equal(np.isnan(values), [True, False])
    targets[0, 2] = -1
    gf.fit(gf.batch_mean(loss), lm_params, (tokens, targets), optax.sgd(0.1), 1, batch_size=2, progress=False)
    logits = np.asarray(jax.jit(lm.apply)(lm_params, tokens[1]), np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(3), [4, 0, 0]]
    np.testing.assert_allclose(values[1], nats[:2].mean(), rtol=1e-5)  # a negative target is padding


def test_targets_of_another_shape_or_dtype_raise():
    loss = gf.next_token_loss(lm)
    with pytest.raises(ValueError, match=r"expected targets \[3\] for logits \[3, 5\], got \[3, 1\]"):
        loss(lm_params, (jnp.arange(3), jnp.ones([3, 1], int)))
    with pytest.raises(TypeError, match="targets must be integers, got float32"):
        loss(lm_params, (jnp.arange(3), jnp.ones(3)))


def test_regression_targets_do_not_broadcast():
    one, image = gf.mlp([3, 1]), gf.Net({}, lambda params, x: jnp.ones([2, 3]))
    start = one.init(jax.random.key(0))
    y = x.sum(-1)
    error = (x @ np.asarray(start["W1"]).T)[:, 0] - y
    for target in (y, y[:, None]):
        value = gf.batch_mean(gf.regression_loss(one))(start, (x, target))
        np.testing.assert_allclose(value, (error**2).mean(), rtol=1e-5)
    ints = gf.batch_mean(gf.regression_loss(one))(start, (x, np.arange(8)))
    floats = gf.batch_mean(gf.regression_loss(one))(start, (x, np.arange(8.0, dtype=np.float32)))
    assert ints == floats
    assert gf.regression_loss(image)({}, (x[0], jnp.ones(6))) == 0  # flat, in the order of rows
    for turned in (jnp.ones([3, 2]), jnp.ones([1, 5])):
        with pytest.raises(ValueError, match=r"like the net's output \[2, 3\], got"):
            gf.regression_loss(image)({}, (x[0], turned))
    with pytest.raises(ValueError, match="1 of 8 target values are NaN"):
        fit(gf.regression_loss(one), np.where(y == y[0], np.nan, y), start)
    with pytest.raises(ValueError, match="expected a target of 1 values"):
        fit(gf.regression_loss(one), x, start)


def test_losses_in_half_precision_are_those_of_float32():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    inputs = x.astype(jnp.bfloat16)
    z = np.asarray(jax.vmap(net.apply, (None, 0))(half, inputs)).astype(np.float64)
    y = np.linspace(-3, 3, 32).reshape(8, 4).astype(np.float32)
    value = gf.batch_mean(gf.regression_loss(net))(half, (inputs, y))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, ((z - y) ** 2).mean(), rtol=1e-5)


@pytest.mark.parametrize("sequence", [False, True])
def test_ggn_vp_has_the_same_rule(sequence):
    vector = jax.tree.map(jnp.ones_like, lm_params if sequence else params)
    if sequence:
        product, start = gf.curvature.ggn_vp(lm.apply), lm_params
        inputs, y, bad = np.array([[0, 1, 2]]), np.array([[1, -1, 2]]), np.array([[1, -1, 5]])
    else:
        product, start, inputs, y, bad = gf.curvature.ggn_vp(net.apply), params, x, right, right - 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(product(start, vector, (inputs, y))))
    with pytest.raises(ValueError, match=r"ggn_vp: .* must be in"):
        product(start, vector, (inputs, bad))
    leaves = jax.tree.leaves(jax.jit(product)(start, vector, (inputs, bad)))
    assert any(np.isnan(leaf).any() for leaf in leaves)
    if not sequence:
        with pytest.raises(ValueError, match="needs >= 2 classes"):
            product(start, vector, (inputs, np.eye(4, dtype=int)[right]))
