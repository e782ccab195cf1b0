"""Which axes of a site are units, and the share of dead ones: against counts by hand, wherever the batch is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

DATA = np.random.default_rng(0)
X = DATA.normal(size=[32, 8]).astype("float32")  # [batch, in]
W = DATA.normal(size=[16, 8]).astype("float32")
W[[3, 5, 11]] = 0  # three of sixteen units are always zero
DEAD = 3 / 16


def batch_last(params, x):
    return jnp.sum(jax.nn.relu(params["W"] @ x.T + params["b"][:, None]))  # [out, batch]


def two_layers(params, x):
    hidden = jnp.maximum(params["W"] @ x, 0)
    return jnp.sum(params["V"] @ hidden)


def transposed(params, x):
    return jnp.sum(jax.nn.relu((params["W"] @ x.T).T))


def heads(params, x):
    per_head = params["W"].reshape(4, 4, 8)
    return jnp.sum(jax.nn.relu(jnp.einsum("hsi,bi->hbs", per_head, x)))


def split_and_merged(params, x):
    split = (params["W"] @ x.T).reshape(16, 4, 8)  # [out, batch, in] of more examples
    return jnp.sum(jax.nn.relu(split).reshape(16, 32))


def in_a_loop(params, x):
    def body(total, scale):
        return total + scale * jnp.sum(jax.nn.relu(params["W"] @ x.T)), None

    return jax.lax.scan(body, 0.0, jnp.ones(2))[0]


def in_jit(params, x):
    layer = jax.jit(lambda W, x: jax.nn.relu(W @ x.T))
    return jnp.sum(layer(params["W"], x))


PARAMS = {"W": W, "b": np.zeros(16, "float32"), "V": np.ones([2, 16], "float32")}
LOSSES = {
    "vmap, bare product": gf.batch_mean(lambda params, x: jnp.sum(jax.nn.relu(params["W"] @ x))),
    "vmap, two layers": gf.batch_mean(two_layers),
    "vmap, a weight on the right": gf.batch_mean(lambda params, x: jnp.sum(jax.nn.relu(x @ params["W"].T))),
    "batch last": batch_last,
    "transposed": transposed,
    "heads": heads,
    "reshaped": split_and_merged,
    "loop": in_a_loop,
    "jit": in_jit,
    "checkpoint": jax.checkpoint(batch_last),
    "two vmaps": gf.batch_mean(
        lambda params, x: jnp.sum(jax.vmap(lambda row: jax.nn.relu(params["W"] @ row))(x[None]))
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_dead_units_are_counted_wherever_the_batch_is(name):
    inspection = gf.inspect(LOSSES[name])(PARAMS, X)
    (relu,) = [site for site in inspection.sites if site.kind == "relu"]
    np.testing.assert_allclose(inspection.stats[relu.name].dead, DEAD, rtol=1e-6)
    n_rows = np.prod(relu.shape) / np.prod([relu.shape[axis] for axis in relu.units])
    assert n_rows == 32


@pytest.mark.parametrize(
    "layout", [("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC"), ("CHWN", "OIHW", "CHWN")]
)
@pytest.mark.parametrize("batched", [False, True])
def test_the_units_of_a_convolution_are_its_channels(layout, batched):
    kernel, images = np.ones([6, 3, 3, 3], "float32"), np.ones([10, 3, 8, 8], "float32")
    kernel[[1, 4]] = 0

    def arranged(x, order, letters):
        return jnp.transpose(x, [letters.index(letter) for letter in order])

    def loss(params, x):
        x = arranged(x if x.ndim == 4 else x[None], layout[0], "NCHW")
        weights = arranged(params["W"], layout[1], "OIHW")
        z = jax.lax.conv_general_dilated(x, weights, (1, 1), "SAME", dimension_numbers=layout)
        return jnp.sum(jax.nn.relu(z))

    inspection = gf.inspect(gf.batch_mean(loss) if batched else loss)({"W": kernel}, images)
    (relu,) = [site for site in inspection.sites if site.kind == "relu"]
    np.testing.assert_allclose(inspection.stats[relu.name].dead, 2 / 6, rtol=1e-6)


def test_pooling_keeps_the_channels():
    kernel, images = np.ones([6, 3, 3, 3], "float32"), np.ones([10, 3, 8, 8], "float32")
    kernel[2] = 0

    def loss(params, x):
        z = jax.lax.conv_general_dilated(x, params["W"], (1, 1), "SAME")
        pooled = jax.lax.reduce_window(z, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        return jnp.sum(jax.nn.relu(gf.tap(pooled, "pooled")))

    inspection = gf.inspect(loss)({"W": kernel}, images)
    (relu,) = [site for site in inspection.sites if site.kind == "relu"]
    assert relu.shape == (10, 6, 4, 4)
    np.testing.assert_allclose(inspection.stats[relu.name].dead, 1 / 6, rtol=1e-6)


def test_members_of_an_ensemble_have_units_of_their_own():
    members = {"W": np.stack([W, np.ones_like(W)])}
    loss = lambda params, x: jnp.sum(jax.vmap(lambda W: jax.nn.relu(W @ x.T))(params["W"]))  # noqa: E731
    inspection = gf.inspect(loss)(members, np.abs(X))
    (relu,) = [site for site in inspection.sites if site.kind == "relu"]
    values = np.maximum(np.einsum("moi,bi->mob", members["W"], np.abs(X)), 0)
    np.testing.assert_allclose(inspection.stats[relu.name].dead, np.mean((values == 0).all(-1)), rtol=1e-6)


def relu_of(f, params, *data):
    inspection = gf.inspect(f)(params, *data)
    (relu,) = [site for site in inspection.sites if site.kind == "relu"]
    return relu, inspection.stats[relu.name].dead


def test_the_axis_of_examples_that_choose_their_weights_is_not_a_unit():
    experts = {"W": np.stack([np.ones([6, 8]), -np.ones([6, 8]), -np.ones([6, 8])]).astype("float32")}
    x, chosen = np.ones([4, 16, 8], "float32"), np.array([0, 1, 2, 1])

    def of_examples(params, x, chosen):
        return jnp.sum(jax.vmap(lambda x, i: jax.nn.relu(x @ params["W"][i].T))(x, chosen))

    # Every unit is positive for the first example.
    assert relu_of(of_examples, experts, x, chosen)[1] == 0

    def of_tokens(params, x, chosen):
        return jnp.sum(jax.vmap(lambda x, i: jax.nn.relu(params["W"][i] @ x))(x, chosen))

    relu, dead = relu_of(of_tokens, experts, np.ones([32, 8], "float32"), np.full([32], 1))
    assert (relu.units, dead) == ((1,), 1)


def test_the_axis_of_tasks_whose_inner_step_changes_the_weights_is_not_a_unit():
    weights = {"W": np.concatenate([np.ones([3, 8]), -np.ones([3, 8])]).astype("float32")}
    tasks = np.ones([4, 16, 8], "float32") * np.array([1, -1, -1, -1], "float32")[:, None, None]

    def task(params, x):
        inner = jax.grad(lambda W: jnp.sum((x @ W.T) ** 2))(params["W"])
        return jnp.sum(jax.nn.relu(x @ (params["W"] - 0.0 * inner).T))

    _, dead = relu_of(lambda params, x: jnp.sum(jax.vmap(task, (None, 0))(params, x)), weights, tasks)
    assert dead == 0


def grouped(x, groups):
    """Normalize groups of channels: x is [batch, channels, height, width]."""
    split = x.reshape(len(x), groups, -1)  # [batch, groups, rest]
    split = (split - split.mean(2, keepdims=True)) / (split.std(2, keepdims=True) + 1)
    return split.reshape(x.shape)  # [batch, channels, height, width]


AFTERWARD = {
    "an axis split": lambda params, x: (x @ params["W"].T).reshape(len(x), 2, 8),
    "axes merged again": lambda params, x: (x @ params["W"].T).reshape(len(x), 2, 8).reshape(len(x), 16),
    "a reduction over time": lambda params, x: jnp.max((jnp.stack([x, x], 1) @ params["W"].T), axis=1),
    "a bias with axes of size one": lambda params, x: params["W"][None] @ x[..., None] + params["c"],
}


@pytest.mark.parametrize("name", AFTERWARD)
def test_units_are_followed_through(name):
    params = {"W": W, "c": np.zeros([1, 16, 1], "float32")}
    loss = lambda params, x: jnp.sum(jax.nn.relu(gf.tap(AFTERWARD[name](params, x), "z")))  # noqa: E731
    _, dead = relu_of(loss, params, X)
    np.testing.assert_allclose(dead, DEAD, rtol=1e-6)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_channels_of_a_convolution_after_a_norm_or_a_pooling_by_hand(pooled):
    params = {
        "K": np.ones([8, 3, 3, 3], "float32"),
        "b": np.where(np.arange(8) < 4, -99, 9).astype("float32"),
    }
    images = DATA.normal(size=[10, 3, 8, 8]).astype("float32")

    def loss(params, x):
        z = jax.lax.conv_general_dilated(x, params["K"], (1, 1), "SAME")  # [10, 8, 8, 8]
        if pooled:
            z = jnp.tanh(z).reshape(10, 8, 4, 2, 4, 2).max((3, 5))  # [10, 8, 4, 4]
        else:
            z = grouped(z, 2)
        return jnp.sum(jax.nn.relu(z + params["b"][:, None, None][None]))

    relu, dead = relu_of(loss, params, images)
    assert (relu.units, dead) == ((1,), 0.5)


def test_convolutions_of_an_ensemble():
    kernels = np.stack([np.ones([3, 3, 3, 4]), -np.ones([3, 3, 3, 4])]).astype("float32")

    def member(kernel, x):
        return jax.nn.relu(
            jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )

    loss = lambda params, x: jnp.sum(jax.vmap(member, (0, None))(params["K"], x))  # noqa: E731
    _, dead = relu_of(loss, {"K": kernels}, np.ones([10, 8, 8, 3], "float32"))
    assert dead == 0.5


def test_units_that_were_mixed_are_not_counted():
    def loss(params, x):
        z = x @ params["W"].T  # [32, 16]
        return jnp.sum(jax.nn.relu(gf.tap(z.reshape(16, 32), "z")))

    relu, dead = relu_of(loss, PARAMS, X)
    assert (relu.units, dead) == ((), None)


def test_without_a_product_units_are_on_the_last_axis():
    loss = gf.batch_mean(lambda params, x: jnp.sum(jax.nn.relu(x + params["b"])))
    inspection = gf.inspect(loss)({"b": np.where(np.arange(8) < 2, -99, 99).astype("float32")}, X)
    assert inspection.sites[-1].units == (1,)
    np.testing.assert_allclose(inspection.stats[inspection.sites[-1].name].dead, 2 / 8, rtol=1e-6)
