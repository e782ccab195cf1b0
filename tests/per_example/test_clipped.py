"""Means of clipped gradients from what one backward pass keeps, against `vmap(grad)` clipped by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.per_example import ghost

compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEYS = jax.random.split(jax.random.key(0), 8)


def normal(i, *shape):
    return jax.random.normal(KEYS[i], shape)


def by_hand(loss, params, *batch):
    """Return the gradients of all examples, in the tree of the parameters, and their norms `[B]`, in float64."""
    grads = compiled(jax.vmap(jax.grad(loss), (None, *[0] * len(batch))))(params, *batch)
    grads = jax.tree.map(lambda g: np.asarray(g, np.float64), grads)
    flat = [g.reshape(len(g), -1) for g in jax.tree.leaves(grads)]
    return grads, np.linalg.norm(np.concatenate(flat, 1), axis=1)


def check(loss, params, *batch, rtol=1e-5, second_pass=()):
    """Compare with no, half and all of the gradients clipped."""
    grads, total = by_hand(loss, params, *batch)
    clip = compiled(lambda bound, params, *batch: gf.per_example.clipped_grads(loss, bound)(params, *batch))
    for bound in (2 * total.max(), 1.01 * np.median(total), total.min() / 2):
        found = clip(bound, params, *batch)
        np.testing.assert_allclose(found.total, total, rtol=rtol)
        np.testing.assert_allclose(found.clipped, np.mean(total > bound), atol=1e-6)
        weights = np.minimum(1, bound / total)
        for (path, g), mean in zip(
            jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(found.grads), strict=True
        ):
            expected = np.tensordot(weights, g, 1) / len(g)
            np.testing.assert_allclose(mean, expected, rtol, rtol * np.abs(expected).max(), err_msg=path)
        assert found.second_pass == second_pass
    return found


def dense(p, x):
    return jnp.sum(jnp.sin(jnp.tanh(p["W"] @ x + p["b"]) @ p["V"]))


DENSE = {"W": normal(0, 40, 30), "b": normal(1, 40), "V": normal(2, 40, 50)}


def positions(p, x):
    h = jnp.einsum("td,hed->the", x, p["to"])
    return jnp.sum(jnp.sin(jnp.einsum("the,hed->td", jnp.tanh(h), p["from"])) @ p["out"])


def tied(p, ids):
    h = jnp.tanh(p["E"][ids] @ p["W"])
    return jnp.sum(jax.nn.logsumexp(h @ p["E"].T, axis=1)) + jnp.sum(p["E"][ids[::-1]] * h)


def recurrent(p, x):
    def step(h, x):
        return jnp.tanh(h @ p["Wh"] + x @ p["Wx"] + h @ p["Wh"].T), None

    return jnp.sum(jnp.sin(jax.lax.scan(step, jnp.zeros(40), x)[0]))


def two_loops(p, x):
    def outer(h, x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["W"] + x), None), h, None, 2)[0], None

    return jnp.sum(jnp.sin(jax.lax.scan(outer, jnp.zeros(40), x)[0]))


def branches(p, x):
    h = jax.lax.cond(x.sum() > 0, lambda: jnp.sin(x @ p["W"]), lambda: x @ p["V"])
    return jnp.sum(h**2)


KEPT = {
    "dense": (dense, DENSE, [normal(3, 5, 30)]),
    "positions": (
        positions,
        {"to": normal(0, 3, 20, 30), "from": normal(1, 3, 20, 30), "out": normal(2, 30, 40)},
        [0.2 * normal(3, 5, 6, 30)],
    ),
    "many positions": (
        lambda p, x: jnp.sum(jnp.sin(x @ p["W"])),
        {"W": normal(0, 40, 30)},
        [normal(3, 5, 90, 40)],
    ),
    "tied": (
        tied,
        {"E": 0.3 * normal(0, 50, 30), "W": 0.3 * normal(1, 30, 30)},
        [jax.random.randint(KEYS[2], (5, 9), 0, 50)],
    ),
    "recurrent": (
        recurrent,
        {"Wh": 0.1 * normal(0, 40, 40), "Wx": normal(1, 30, 40)},
        [normal(3, 5, 6, 30)],
    ),
    "two loops": (two_loops, {"W": 0.1 * normal(0, 40, 40)}, [normal(3, 5, 6, 40)]),
    "branches": (branches, {"W": normal(0, 40, 30), "V": normal(1, 40, 30)}, [normal(3, 5, 40)]),
}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    "case",
    [c if c in ("dense", "tied", "recurrent") else pytest.param(c, marks=pytest.mark.slow) for c in KEPT],
)
def test_one_pass(case, cached, monkeypatch):
    """With products that are kept, where they are little work and fit, and without."""
    if not cached:
        monkeypatch.setattr(ghost, "CACHED", 0)
    loss, params, batch = KEPT[case]
    check(loss, params, *batch)


@pytest.mark.parametrize("case", [pytest.param("dense", marks=pytest.mark.slow), "tied"])
def test_one_pass_in_double_precision(case, x64):
    loss, params, batch = KEPT[case]
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    check(loss, wide, *[x if x.dtype == jnp.int32 else x.astype(jnp.float64) for x in batch], rtol=1e-12)


def stacked(p, x):
    return jnp.sum(jnp.sin(jax.lax.scan(lambda h, W: (jnp.tanh(h @ W), None), x, p["W"])[0] @ p["V"]))


def rematerialized(p, x):
    return jnp.sum(jnp.sin(jax.checkpoint(lambda x: jnp.tanh(x @ p["W"]))(x) @ p["V"]))


def convolved(p, x):
    return jnp.sum(jnp.sin(jax.lax.conv(x[None], p["W"], (1, 1), "SAME") @ p["V"]))


def reshaped(p, x):
    return jnp.sum(jnp.sin(jnp.tanh(x @ p["W"].reshape(40, 30)) @ p["V"]))


def no_rule(p, x):
    return jnp.sum(jnp.sin(x @ (p["W"] * p["W"])) @ p["V"])


TWO_PASSES = {
    "stacked": (stacked, {"W": 0.1 * normal(0, 3, 40, 40), "V": normal(1, 40, 50)}, normal(3, 5, 6, 40)),
    "rematerialized": (rematerialized, {"W": normal(0, 40, 30), "V": normal(1, 30, 50)}, normal(3, 5, 6, 40)),
    "convolved": (convolved, {"W": normal(0, 30, 20, 3, 3), "V": normal(1, 9, 200)}, normal(3, 5, 20, 7, 9)),
    "reshaped": (reshaped, {"W": normal(0, 30, 40), "V": normal(1, 30, 50)}, normal(3, 5, 6, 40)),
    "no rule": (no_rule, {"W": normal(0, 40, 30), "V": normal(1, 30, 50)}, normal(3, 5, 6, 40)),
}


@pytest.mark.parametrize(
    "case",
    [c if c in ("stacked", "no rule") else pytest.param(c, marks=pytest.mark.slow) for c in TWO_PASSES],
)
def test_what_is_not_kept_takes_a_second_pass(case):
    loss, params, x = TWO_PASSES[case]
    check(loss, params, x, second_pass=("W",))


def loops(f, *args):
    """Return the number of loops in the program of a function."""
    return str(jax.make_jaxpr(f)(*args)).count("= scan[")


def test_one_backward_pass_is_all_that_runs():
    """A recurrent loss has a loop forward and one for each pass backward."""
    loss, params, batch = KEPT["recurrent"]
    stacked_loss, stacked_params, x = TWO_PASSES["stacked"]
    assert loops(jax.grad(lambda p: gf.batch_mean(loss)(p, *batch)), params) == 2
    assert loops(gf.per_example.clipped_grads(loss, 1.0), params, *batch) == 2
    assert loops(gf.per_example.clipped_grads(stacked_loss, 1.0), stacked_params, x) == 3


def test_one_example_and_no_gradient_at_all():
    loss, params, (x,) = KEPT["dense"]
    check(loss, params, x[:1])
    zero = gf.per_example.clipped_grads(lambda p, x: 0 * loss(p, x), 1.0)(params, x)
    np.testing.assert_array_equal(zero.total, 0)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), zero.grads)


@pytest.mark.parametrize("case", [pytest.param("dense", marks=pytest.mark.slow), "many positions"])
def test_an_example_that_is_not_finite_makes_the_mean_nan(case):
    """It does not vanish, as it would with a weight of zero."""
    loss, params, (x,) = KEPT[case]
    for value in (jnp.nan, jnp.inf):
        found = compiled(gf.per_example.clipped_grads(loss, 1.0))(params, x.at[1].set(value))
        assert np.isnan(found.total[1])
        assert np.isfinite(np.delete(found.total, 1)).all()
        jax.tree.map(lambda g: np.testing.assert_array_equal(g, np.nan), found.grads)


@pytest.mark.slow
def test_weights_beyond_the_range_of_squares():
    """Gradients of 1e30 clipped to 1, and of 1e-24 clipped to a thousandth of it."""
    loss, params, (x,) = KEPT["many positions"]
    grads, total = by_hand(loss, params, x)
    for scale, bound in ((1e30, 1.0), (1e-24, 1e-27)):
        scaled = lambda p, x, scale=scale: scale * loss(p, x)  # noqa: E731
        found = compiled(gf.per_example.clipped_grads(scaled, bound))(params, x)
        expected = np.tensordot(bound / total, grads["W"], 1) / len(x)
        np.testing.assert_allclose(found.grads["W"], expected, 1e-4, 1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_keys_and_aux():
    def loss(p, x, key):
        kept = jax.random.bernoulli(key, 0.5, x.shape)
        return dense(p, jnp.where(kept, x, 0)), {"kept": kept.sum()}

    x, keys = normal(3, 5, 30), jax.random.split(KEYS[4], 5)
    grads, total = by_hand(lambda *args: loss(*args)[0], DENSE, x, keys)
    bound = float(np.median(total))
    found = compiled(gf.per_example.clipped_grads(loss, bound))(DENSE, x, keys)
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (30,)))(keys)
    np.testing.assert_array_equal(found.aux["kept"], kept.sum(1))
    expected = np.tensordot(np.minimum(1, bound / total), grads["V"], 1) / 5
    np.testing.assert_allclose(found.grads["V"], expected, 1e-4, 1e-5)


@pytest.mark.slow
def test_in_bfloat16():
    """Weighted and summed in float32."""
    loss, params, (x,) = KEPT["many positions"]
    params, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
    grads, total = by_hand(loss, params, x)
    bound = float(np.median(total))
    found = compiled(gf.per_example.clipped_grads(loss, bound))(params, x)
    expected = np.tensordot(np.minimum(1, bound / total), grads["W"], 1) / 5
    assert found.grads["W"].dtype == jnp.bfloat16
    assert found.second_pass == ()
    np.testing.assert_allclose(found.grads["W"].astype(float), expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.slow
def test_inside_vmap_and_scan_and_exported():
    loss, params, (x,) = KEPT["tied"]
    clip = gf.per_example.clipped_grads(loss, 3.0)
    one = compiled(clip)(params, x)
    both = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params)
    two = compiled(jax.vmap(clip, (0, None)))(both, x)
    _, repeated = compiled(lambda p, x: jax.lax.scan(lambda p, _: (p, clip(p, x)), p, None, 2))(params, x)
    exported = jax.export.export(jax.jit(lambda p, x: clip(p, x).grads), platforms=["cpu", "cuda", "tpu"])
    again = exported(params, x).call(params, x)
    for grads in (
        jax.tree.map(lambda a: a[0], two.grads),
        jax.tree.map(lambda a: a[1], repeated.grads),
        again,
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, one.grads)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["vanilla", "lstm", "gpt", "mlp"])
def test_nets(cell):
    text = jax.random.randint(KEYS[0], (3, 17), 0, 11)
    batch = text[:, :-1], text[:, 1:]
    if cell == "mlp":
        net = gf.mlp([6, 30, 40, 3])
        check(gf.classification_loss(net), net.init(KEYS[1]), (normal(2, 5, 6), jnp.arange(5) % 3))
    elif cell == "gpt":
        net = gf.gpt(gf.GPTConfig(vocab=11, context=16, n_heads=2, width=32, n_layers=2))
        check(gf.next_token_loss(net), jax.tree.map(lambda a: 3 * a, net.init(KEYS[1])), batch, rtol=3e-5)
    else:
        net = gf.rnn(11, 40, cell)
        check(gf.next_token_loss(net), net.init(KEYS[1]), batch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_opacus():
    """Its ghost clipping has the same norms and, but for 1e-6 in the weights, the same mean."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("opacus")
    from benchmarks import per_example as benchmark

    net = gf.mlp([6, 30, 3], "relu")
    params, x, labels = net.init(KEYS[1]), normal(2, 5, 6), jnp.arange(5) % 3
    loss = gf.classification_loss(net)
    bound = float(np.median(gf.per_example.norms(loss)(params, (x, labels)).total))
    ours = gf.per_example.clipped_grads(loss, bound)(params, (x, labels))
    model, run = benchmark.clipped_by_opacus(
        params, torch.from_numpy(np.array(x)), torch.from_numpy(np.array(labels)).long(), bound
    )
    np.testing.assert_allclose(run().detach().numpy(), ours.total, rtol=1e-5)
    assert 0 < float(ours.clipped) < 1
    for p, name in zip(model.parameters(), ("W1", "b1", "W2", "b2"), strict=True):
        np.testing.assert_allclose(p.grad.numpy() / 5, ours.grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_jax_privacy():
    clipping = pytest.importorskip("jax_privacy.clipping")
    loss, params, (x,) = KEPT["dense"]
    bound = float(np.median(by_hand(loss, params, x)[1]))
    theirs = clipping.clipped_grad(loss, l2_clip_norm=bound, normalize_by=len(x), keep_batch_dim=False)
    ours = gf.per_example.clipped_grads(loss, bound)(params, x).grads
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), ours, theirs(params, x))
