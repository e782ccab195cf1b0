"""The named edits, each against the same network computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn import circuits
from gradfn.circuits import Using

RNG = np.random.default_rng(0)
PARAMS = {
    "W": RNG.normal(size=(3, 4)).astype(np.float32),
    "U": RNG.normal(size=(4, 4)).astype(np.float32),
    "V": RNG.normal(size=(4, 2)).astype(np.float32),
}
X = RNG.normal(size=(5, 3)).astype(np.float32)
OTHER = RNG.normal(size=(5, 3)).astype(np.float32)


def f(params, x):
    a = gf.tap(jnp.tanh(x @ params["W"]), "a")
    b = gf.tap(jnp.tanh(a @ params["U"]), "b")
    return b @ params["V"]


def parts(x):
    a = np.tanh(x @ PARAMS["W"])
    return a, np.tanh(a @ PARAMS["U"])


def from_a(a):
    return np.tanh(a @ PARAMS["U"]) @ PARAMS["V"]


def close(actual, expected, rtol=1e-4):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-5)


def patched(edits):
    return jax.jit(gf.patch(f, edits))(PARAMS, X)


def test_zero_and_mean():
    a, _ = parts(X)
    close(patched({"a": circuits.zero}), np.zeros((5, 2)))
    close(patched({"a": circuits.mean_ablate()}), from_a(np.broadcast_to(a.mean(0), a.shape)))
    mean = np.arange(4, dtype=np.float32)
    close(patched({"a": circuits.mean_ablate(mean)}), from_a(np.broadcast_to(mean, a.shape)))


def test_resample_gives_each_example_the_value_of_another_one_at_every_site():
    key = jax.random.key(3)
    source = np.asarray(circuits.resample(key)(jnp.arange(5)))
    assert sorted(source) == list(range(5))
    assert all(source != np.arange(5))
    a, b = parts(X)
    close(patched({"a": circuits.resample(key)}), from_a(a[source]))
    close(patched({"b": circuits.resample(key)}), b[source] @ PARAMS["V"])
    close(
        circuits.resample(key, axis=1)(jnp.arange(10).reshape(2, 5)), np.arange(10).reshape(2, 5)[:, source]
    )
    with pytest.raises(ValueError, match=r"at least 2 examples, got a value of shape \[1, 4\]"):
        gf.patch(f, {"a": circuits.resample(key)})(PARAMS, X[:1])


def test_steer():
    vector = RNG.normal(size=4).astype(np.float32)
    close(patched({"a": circuits.steer(vector, -2.0)}), from_a(parts(X)[0] - 2 * vector))


@pytest.mark.parametrize("dependent", [False, True])
def test_project_off_removes_what_the_directions_span(dependent):
    directions = RNG.normal(size=(2, 4)).astype(np.float32)
    given = np.concatenate([directions, directions[:1] - 2 * directions[1:]]) if dependent else directions
    q, _ = np.linalg.qr(directions.T)
    a, _ = parts(X)
    close(patched({"a": circuits.project_off(given)}), from_a(a - a @ q @ q.T))
    one = directions[0] / np.linalg.norm(directions[0])
    close(patched({"a": circuits.project_off(directions[0])}), from_a(a - np.outer(a @ one, one)))


def test_at_edits_one_head_or_position():
    value = jnp.asarray(RNG.normal(size=(6, 4, 8)))
    edited = circuits.at((slice(None), 2), circuits.steer(jnp.ones(8)))(value)
    expected = np.array(value)
    expected[:, 2] += 1
    close(edited, expected)
    close(circuits.at(0, 7.0)(value)[0], np.full((4, 8), 7.0))


def test_swap_of_a_feed_forward_layer_unrolled_and_in_a_scan():
    config = dict(vocab=17, context=6, n_layers=2, n_heads=2, width=8)
    tokens = jnp.arange(6)
    unrolled, scanned = (gf.gpt(gf.GPTConfig(**config, scan=scan)) for scan in (False, True))
    params = unrolled.init(jax.random.key(0))

    def transcoder(x):
        return jnp.sin(x) * 0.3

    # By hand: the transcoder's output, computed from what goes into the layer.
    expected, edits = gf.gpt(gf.GPTConfig(**config)).apply, {}
    for layer in "01":
        into = f"blocks/{layer}/feed_norm"
        value = gf.capture(expected, keep=into)(params, tokens)[into].value
        expected = gf.patch(expected, {f"blocks/{layer}/feed_out": transcoder(value)})
        edits[f"blocks/{layer}/feed_out"] = circuits.swap(transcoder, of=into)
    expected = expected(params, tokens)
    close(gf.patch(unrolled.apply, edits)(params, tokens), expected)
    stacked = gf.stack_blocks(params)
    swap = {"feed_out": circuits.swap(transcoder, of="blocks/feed_norm")}
    close(gf.patch(scanned.apply, swap)(stacked, tokens), expected)
    # The gradient is that of the swapped network.
    loss = jax.grad(lambda p: jnp.sum(gf.patch(scanned.apply, swap)(p, tokens) ** 2))
    blocks = loss(stacked)["blocks"]
    assert float(jnp.max(jnp.abs(blocks["feed"]["up"]["W"]))) == 0.0
    assert float(jnp.max(jnp.abs(blocks["feed_norm"]["gain"]))) > 0.0


def test_an_edit_may_read_outside_of_its_loop_and_what_other_edits_made_of_a_value():
    def loop(w, x):
        x = gf.tap(x * 2, "start")

        def step(c, _):
            return gf.tap(c * w, "c"), None

        return jax.lax.scan(step, x, None, length=3)[0]

    edits = {"start": lambda s: s + 1, "c": Using("start", lambda c, start: c + start)}
    # start = 3; 3 -> 9 -> 21 -> 45
    assert float(jax.jit(gf.patch(loop, edits))(2.0, 1.0)) == 45.0
    with pytest.raises(ValueError, match="reads site 'b', which is computed after it"):
        gf.patch(f, {"a": circuits.swap(jnp.sin, of="b")})(PARAMS, X)

    def two(w, x):
        c, _ = jax.lax.scan(lambda c, _: (gf.tap(c * w, "c"), None), x, None, length=3)
        return gf.tap(c, "end")

    with pytest.raises(ValueError, match="reads site 'c', which is inside another loop"):
        gf.patch(two, {"end": circuits.swap(jnp.sin, of="c")})(2.0, 1.0)
    with pytest.raises(ValueError, match="there is no site 'd'"):
        gf.patch(two, {"end": circuits.swap(jnp.sin, of="d")})(2.0, 1.0)


def test_splice_of_a_sparse_autoencoder():
    W = RNG.normal(size=(4, 6)).astype(np.float32)

    def encode(x):
        return gf.tap(jax.nn.relu(x @ W), "features")

    def decode(z):
        return z @ (0.1 * W.T)

    off = circuits.at((slice(None), 2), 0.0)
    a, _ = parts(X)
    z = np.maximum(a @ W, 0)
    without = np.where(np.arange(6) == 2, 0, z)
    close(patched({"a": circuits.splice(encode, decode)}), from_a(decode(z)))
    close(patched({"a": circuits.splice(encode, decode, off)}), from_a(decode(without)))
    close(patched({"a": circuits.splice(encode, decode, error_term=True)}), from_a(a))
    close(
        patched({"a": circuits.splice(encode, decode, off, error_term=True)}),
        from_a(a + decode(without) - decode(z)),
    )
    # Gradients flow through the features alone.
    spliced = gf.patch(f, {"a": circuits.splice(encode, decode, error_term=True)})
    inspection = gf.inspect(lambda p, x: jnp.sum(spliced(p, x)), keep="features")(PARAMS, X)
    at_a = (1 - np.tanh(a @ PARAMS["U"]) ** 2) * PARAMS["V"].sum(1) @ PARAMS["U"].T
    close(inspection["features"].grad, at_a @ (0.1 * W))


def test_interchange_of_values_and_of_a_subspace():
    run = circuits.interchange(f, ["a"], (PARAMS, OTHER))
    close(jax.jit(run)(PARAMS, X), f(PARAMS, OTHER))
    (a, _), (other, _) = parts(X), parts(OTHER)
    directions = RNG.normal(size=(2, 4)).astype(np.float32)
    q, _ = np.linalg.qr(directions.T)
    aligned = circuits.interchange(f, "a", (PARAMS, OTHER), directions=directions)
    close(aligned(PARAMS, X), from_a(a + (other - a) @ q @ q.T))

    def loss(directions):
        params, x, source = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (PARAMS, X, OTHER))
        return jnp.sum(circuits.interchange(f, "a", (params, source), directions=directions)(params, x) ** 2)

    with jax.enable_x64(True):
        d, step = np.asarray(directions, np.float64), 1e-5
        slope = jax.grad(loss)(jnp.asarray(d))
        one = np.eye(8).reshape(2, 4, 8)[..., 3]
        close(slope[0, 3], (loss(d + step * one) - loss(d - step * one)) / (2 * step), rtol=1e-3)
        # Orthonormal rows have equal singular values.
        assert np.all(np.isfinite(jax.grad(loss)(jnp.asarray(q.T, jnp.float64))))


def test_interchange_in_a_scan_and_where_it_is_impossible():
    net = gf.gpt(gf.GPTConfig(vocab=17, context=6, n_layers=2, n_heads=2, width=8, scan=True))
    params, tokens = net.init(jax.random.key(0)), jnp.arange(6)
    run = circuits.interchange(net.apply, "residual", (params, tokens[::-1]))
    close(run(params, tokens), net.apply(params, tokens[::-1]))

    def branching(w, x):
        return jax.lax.cond(x > 0, lambda: gf.tap(w * x, "a"), lambda: x)

    with pytest.raises(ValueError, match=r"'a' is inside a branch of a lax\.cond"):
        circuits.interchange(branching, "a", (2.0, 3.0))(2.0, 1.0)
    with pytest.raises(ValueError, match=r"expected float32\[5, 3\], .* got float32\[2, 3\] in source"):
        circuits.interchange(f, "a", (PARAMS, X[:2]))(PARAMS, X)
    with pytest.raises(TypeError, match="expected source to be a tuple of all arguments"):
        circuits.interchange(f, "a", X)


def test_errors_of_directions():
    with pytest.raises(ValueError, match=r"directions must have shape \[k, d\] or \[d\]"):
        gf.patch(f, {"a": circuits.project_off(jnp.ones(3))})(PARAMS, X)
    with pytest.raises(TypeError, match="must be real and floating, got int32"):
        circuits.project_off(jnp.ones(3))(jnp.arange(3))
