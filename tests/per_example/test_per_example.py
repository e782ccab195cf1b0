"""Norms of single examples' gradients, in one pass, against `vmap(grad)`; clipping against optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradfn as gf
from gradfn.per_example import ghost

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 8)
# What is computed is tested, not how fast: code that is not made fast compiles in half the time.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CLASSES = jnp.array([0, 2, 1, 2, 0])


def normal(i, *shape):
    return jax.random.normal(KEYS[i], shape)


def check(loss, params, *batch, rtol=1e-5, fallback=()):
    """Compare with `vmap(grad)`; a gradient that is zero but for rounding may be any rounding."""

    @compiled
    def both(params, *batch):
        expected = jax.vmap(jax.value_and_grad(loss), (None, *[0] * len(batch)))
        return gf.per_example.norms(loss)(params, *batch), expected(params, *batch)

    found, (values, grads) = both(params, *batch)
    np.testing.assert_allclose(found.values, values, rtol=rtol)
    flat = [np.asarray(g, np.float64).reshape(len(g), -1) for g in jax.tree.leaves(grads)]
    norms = [np.linalg.norm(g, axis=1) for g in flat]
    total = np.linalg.norm(norms, axis=0)
    np.testing.assert_allclose(found.total, total, rtol=rtol)
    atol = rtol * 1e-2 * total.max()
    assert jax.tree.structure(found.norms) == jax.tree.structure(params) == jax.tree.structure(found.grads)
    leaves = zip(found.methods, jax.tree.leaves(found.norms), norms, jax.tree.leaves(found.grads), flat)
    for (path, _), norm, its, mean, g in leaves:
        np.testing.assert_allclose(norm, its, rtol=rtol, atol=atol, err_msg=path)
        of_mean = np.asarray(mean, np.float64).ravel()
        np.testing.assert_allclose(of_mean, g.mean(0), rtol=10 * rtol, atol=atol, err_msg=path)
    assert found.fallback == fallback
    return dict(found.methods)


def test_mlp():
    net = gf.mlp([6, 5, 3])
    methods = check(gf.classification_loss(net), net.init(KEY), (normal(0, 5, 6), CLASSES))
    assert methods == {"W1": "dense, |a||g|", "W2": "dense, |a||g|", "b1": "direct", "b2": "direct"}


def test_the_mean_square_is_what_noise_is_computed_from():
    loss = lambda w, x: w @ x  # noqa: E731
    found = gf.per_example.norms(loss)(jnp.ones(2), jnp.array([[3.0, 4.0], [0.0, 1.0]]))
    assert float(found.mean_square) == 13.0
    np.testing.assert_allclose(found.grads, [1.5, 2.5])


def many_positions(p, x):
    return jnp.mean(jnp.sin(jnp.tanh(x @ p["A"]) @ p["B"].T))


def tied(p, x, ids):
    W = p["W"]  # [7, 5]: a product either way, and an embedding
    h = jnp.tanh(x @ W) + W.T[:, ids].T
    return jnp.sum(jnp.sin(jnp.tanh(h @ W.T) + h.sum()))


def tied_layers(p, x):
    def layer(h, w):
        return jnp.tanh(h @ w) + jnp.tanh(h @ w.T), None

    there, _ = jax.lax.scan(layer, x, p["W"])
    back, _ = jax.lax.scan(layer, jnp.sin(x), p["W"], reverse=True)
    return jnp.sum(jnp.sin(there) + jnp.cos(back))


def heads(p, x):
    h = jnp.einsum("td,hde->hte", x, p["to"])  # an attention projection: a product for each head
    return jnp.sum(jnp.sin(jnp.einsum("hte,hed->td", jnp.tanh(h), p["from"])))


def in_branches(p, x):
    return jnp.sum(jax.lax.cond(x.sum() > 0, lambda: jnp.sin(x @ p["W"]), lambda: x @ p["V"]))


def one_row_at_a_time(p, ids):
    return jax.lax.scan(lambda h, i: (jnp.tanh(h + p["W"][i]), None), jnp.zeros(40), ids)[0].sum()


def in_parts(p, x):
    to, back = jnp.split(p["W"], [20], axis=1)  # [40, 20], [40, 30]
    for i in range(2):
        x = jnp.tanh(x @ p["layers"][i]) + jnp.tanh(x @ to) @ to.T
    return jnp.sum(jnp.sin(x @ back))


CASES = {
    "parts": (in_parts, {"W": (40, 50), "layers": (2, 40, 40)}, [(5, 6, 40)]),
    "many positions": (many_positions, {"A": (40, 30), "B": (50, 30)}, [(5, 100, 40)]),
    "tied": (tied, {"W": (7, 5)}, [(5, 6, 7), [0, 6, 6, 2, 3, 6]]),
    "tied layers": (tied_layers, {"W": (3, 20, 20)}, [(5, 6, 20)]),
    "heads": (heads, {"to": (3, 30, 20), "from": (3, 20, 30)}, [(5, 6, 30)]),
    "branches": (in_branches, {"W": (60, 20), "V": (60, 20)}, [(5, 6, 60)]),
    "one row at a time": (one_row_at_a_time, {"W": (30, 40)}, [[0, 6, 6, 2, 3, 6]]),
}


def inputs(shapes, batch):
    params = {name: 0.3 * normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    ids = lambda row: jnp.stack([jnp.roll(jnp.array(row), i) for i in range(5)])  # noqa: E731
    return params, *[ids(b) if isinstance(b, list) else normal(7, *b) for b in batch]


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c != "tied" else c for c in CASES]
)
def test_rules(case):
    loss, shapes, batch = CASES[case]
    fallback = ("W",) if case == "parts" else ()  # one of its parts is used twice
    methods = check(loss, *inputs(shapes, batch), fallback=fallback)
    assert case != "parts" or methods["layers"] == "2 parts: dense"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["many positions", "tied"])
def test_products_of_some_examples_at_a_time(case, monkeypatch):
    """Five examples, two at a time, and the one that remains: as where a cache does not hold them all."""
    monkeypatch.setattr(ghost, "CACHED", 0)
    monkeypatch.setattr(ghost, "AT_ONCE", 3000 if case == "many positions" else 70)
    loss, shapes, batch = CASES[case]
    methods = check(loss, *inputs(shapes, batch))
    assert "product" in methods["A"] if case == "many positions" else "3 uses" in methods["W"]


@pytest.mark.slow
def test_rules_in_double_precision(x64):
    loss, shapes, batch = CASES["tied layers"]
    wide = [jax.tree.map(lambda a: a.astype(jnp.float64), a) for a in inputs(shapes, batch)]
    check(loss, *wide, rtol=1e-12)


@pytest.mark.slow
def test_convolutions_of_every_kind():
    def loss(p, x):
        y = jax.lax.conv_general_dilated(
            x[None],
            p["a"],
            *((2, 1), [(1, 2), (0, 1)]),
            lhs_dilation=(1, 2),
            rhs_dilation=(2, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )
        numbers = ("NHWC", "OIHW", "NCHW")
        y = jax.lax.conv_general_dilated(jnp.tanh(y), p["b"], (1, 1), "VALID", dimension_numbers=numbers)
        return jnp.sum(jnp.sin(y))

    params = {"a": normal(0, 2, 3, 2, 6), "b": 0.1 * normal(1, 5, 6, 2, 2)}
    methods = check(loss, params, normal(2, 5, 7, 6, 4))
    assert methods == {"a": "convolution, product", "b": "convolution, product"}


@pytest.mark.parametrize("precision", ["highest", "tensorfloat32"])
def test_convolutions_under_a_default_precision(precision):
    def loss(p, x):
        return jnp.sum(jnp.sin(jax.lax.conv(x[None], p["W"], (1, 1), "SAME")))

    with jax.default_matmul_precision(precision):
        check(loss, {"W": normal(0, 3, 2, 3, 3)}, normal(1, 4, 2, 5, 5))


def rows_of(p, ids, x):
    dropped = p["W"].at[ids].get(mode="fill", fill_value=0.0, wrap_negative_indices=False)
    brought_in = p["W"].at[ids].get(mode="clip", wrap_negative_indices=False)
    return jnp.sum(jnp.sin(dropped * x + brought_in))


@functools.cache
def norms_of_rows():
    expected = jax.vmap(jax.grad(rows_of), (None, 0, 0))
    return compiled(gf.per_example.norms(rows_of)), compiled(expected)


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-3, 9), min_size=12, max_size=12), st.integers(0, 2**20))
def test_rows_looked_up_in_any_order_and_beyond_the_ends(ids, seed):
    """Repeated rows add up; those out of range are dropped or clipped, depending on the mode of the look-up."""
    params = {"W": jax.random.normal(jax.random.key(seed), (7, 200))}
    batch = jnp.array(ids).reshape(3, 4), jax.random.normal(jax.random.key(seed + 1), (3, 4, 200))
    ours, theirs = norms_of_rows()
    found, grads = ours(params, *batch), theirs(params, *batch)["W"]
    assert found.methods == (("W", "2 uses: rows"),)
    np.testing.assert_allclose(found.total, jnp.linalg.norm(grads.reshape(3, -1), axis=1), rtol=1e-5)


@pytest.mark.slow
def test_what_no_rule_covers_falls_back_alone():
    def loss(p, x):
        decayed = 0.1 * jnp.sum(p["decayed"] ** 2)  # two uses, one of them no product
        return jnp.sum(jnp.sin(x @ p["W"]) @ (p["V"] * p["V"]) @ p["decayed"]) + decayed

    params = {"W": normal(0, 6, 40), "V": normal(1, 40, 30), "decayed": normal(2, 30, 40)}
    batch = normal(3, 37, 2, 6)  # two chunks, and what remains
    methods = check(loss, params, batch, fallback=("V", "decayed"))
    assert methods["W"] == "dense, Gram"


@pytest.mark.slow
def test_unused_parameters_integers_and_aux():
    def loss(p, x):
        return jnp.sum(x @ p["W"]) * p["n"].astype(jnp.float32), {"x": x, "W": p["W"]}

    params = {"W": normal(0, 40, 30), "unused": normal(1, 40, 30), "n": jnp.array(2)}
    found = gf.per_example.norms(loss)(params, normal(2, 3, 40))
    assert found.methods == (("W", "dense, |a||g|"), ("unused", "unused"))
    assert found.norms["n"] is None
    assert found.aux["W"].shape == (3, 40, 30)
    np.testing.assert_array_equal(found.norms["unused"], jnp.zeros(3))
    np.testing.assert_array_equal(found.grads["unused"], jnp.zeros((40, 30)))
    grads = gf.per_example.grads(loss, chunk=2)(params, normal(2, 3, 40))
    assert grads["n"] is None
    np.testing.assert_allclose(found.total, jnp.linalg.norm(grads["W"].reshape(3, -1), axis=1), rtol=1e-5)


def test_stopped_gradients_do_not_count():
    def loss(p, x):
        return jnp.sum(jnp.sin(x @ p["W"])) + jnp.sum(x @ jax.lax.stop_gradient(p["W"]))

    assert check(loss, {"W": normal(0, 40, 30)}, normal(1, 5, 40)) == {"W": "dense, |a||g|"}


@pytest.mark.slow
def test_several_models_at_once():
    """A vmap around it all, over two models."""
    loss, shapes, batch = CASES["many positions"]
    params, x = inputs(shapes, batch)
    both = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), params)
    found = compiled(jax.vmap(gf.per_example.norms(loss), (0, None)))(both, x)
    second = compiled(gf.per_example.norms(loss))(jax.tree.map(lambda a: 2 * a, params), x)
    np.testing.assert_allclose(found.total[1], second.total, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-7), found.grads, second.grads
    )


@pytest.mark.slow
def test_keys_are_examples_too():
    def loss(w, x, key):
        return jnp.sum(w * x * jax.random.normal(key, x.shape))

    x, keys = normal(0, 4, 3), jax.random.split(KEY, 4)
    found = gf.per_example.norms(loss)(jnp.ones(3), x, keys)
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    np.testing.assert_allclose(found.total, jnp.linalg.norm(x * noise, axis=1), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("max_norm", [30.0])
def test_clipping_is_optax_s(max_norm):
    def loss(p, x):
        return jnp.sum(jnp.sin(x @ p["W"] + p["b"][None]) @ (p["V"] * p["V"]))

    params = {"W": normal(0, 6, 40), "V": normal(1, 40, 30), "b": normal(2, 40)}
    x = normal(3, 7, 2, 6) * jnp.arange(7.0).reshape(7, 1, 1)
    clipped = compiled(gf.per_example.clipped_grads(loss, max_norm, chunk=3))(params, x)
    leaves, tree = jax.tree.flatten(gf.per_example.grads(loss)(params, x))
    sums, n_clipped = optax.per_example_global_norm_clip(leaves, max_norm)
    for ours, theirs in zip(jax.tree.leaves(clipped.grads), sums):
        np.testing.assert_allclose(ours, theirs / 7, rtol=2e-5, atol=1e-6)
    assert int(n_clipped) == round(float(clipped.clipped) * 7)
    private = optax.contrib.differentially_private_aggregate(max_norm, 0.0, 0)
    updates, _ = private.update(jax.tree.unflatten(tree, leaves), private.init(params))
    np.testing.assert_allclose(clipped.grads["b"], updates["b"], rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_it_prints():
    loss = lambda p, x: jnp.sum(jnp.sin(x @ p["W"]))  # noqa: E731
    norms_of = gf.per_example.norms(loss)
    text = str(norms_of({"W": normal(0, 3, 2)}, normal(1, 4, 3)))
    assert "4 examples" in text
    assert "dense, |a||g|" in text
    traced = []
    jax.jit(lambda p, x: traced.append(str(norms_of(p, x))))({"W": normal(0, 3, 2)}, normal(1, 4, 3))
    assert "being traced" in traced[0]


W, X = jnp.ones((3, 2)), jnp.ones((4, 3))


def vector(w, x):
    return x @ w


def scalar(w, x):
    return jnp.sum(x @ w)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda f: f(vector)(W, X),
            TypeError,
            r"one example must return .*got float32\[2\]. Per-example",
        ),
        (lambda f: f(lambda w, x, y: scalar(w, x))(W, X, X[:3]), ValueError, r"argument 2: expected 4 exam"),
        (
            lambda f: f(lambda w, b: scalar(w, b["x"]))(W, {"x": X, "y": 1.0}),
            ValueError,
            r"y: expected an arr",
        ),
        (lambda f: f(lambda w: jnp.sum(w))(W), ValueError, "expected a batch after the parameters"),
        (lambda f: f(scalar)(W, X[:0]), ValueError, "at least one example"),
        (
            lambda f: f(lambda w, x: x.sum())(jnp.ones(2, int), X),
            TypeError,
            r"no floating.* params int32\[2\]",
        ),
        (lambda f: f(scalar, chunk=0), ValueError, "chunk must be an integer >= 1, got 0"),
    ],
)
@pytest.mark.parametrize("f", [gf.per_example.grads, gf.per_example.norms])
def test_errors(f, call, error, message):
    with pytest.raises(error, match=message):
        call(f)


def test_clipping_needs_a_positive_norm():
    with pytest.raises(ValueError, match="max_norm must be > 0, got 0"):
        gf.per_example.clipped_grads(scalar, 0)


def tokens():
    text = jax.random.randint(KEY, (3, 17), 0, 11)
    return text[:, :-1], text[:, 1:]


GPTS = {
    "unrolled": {"n_layers": 1},
    "scanned": {"scan": True, "n_layers": 2},
    "remat": {"remat": True, "n_layers": 1, "bias": False, "norm": "rms", "feed": "swiglu", "n_kv_heads": 1},
}


def gpt(**settings):
    small = {"vocab": 11, "context": 16, "n_heads": 2, "width": 8}
    return gf.gpt(gf.GPTConfig(**small, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("kind", GPTS)
def test_gpt(kind):
    net = gpt(**GPTS[kind])
    params = jax.tree.map(lambda a: 5 * a, net.init(KEY))  # so that attention has something to choose
    methods = check(gf.next_token_loss(net), params, tokens())
    assert methods["embed/W"] == "2 uses: rows, dense"


@pytest.mark.slow
def test_gpt_in_bfloat16():
    net = gpt(compute="bfloat16", bias=False, n_layers=1)
    params = jax.tree.map(lambda a: 5 * a, net.init(KEY))
    loss = gf.next_token_loss(net)
    both = compiled(lambda *args: (gf.per_example.norms(loss)(*args), gf.per_example.grads(loss)(*args)))
    found, grads = both(params, tokens())
    for norm, g in zip(jax.tree.leaves(found.norms), jax.tree.leaves(grads)):
        np.testing.assert_allclose(norm, jnp.linalg.norm(g.reshape(3, -1), axis=1), rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["vanilla", "lstm"])
def test_recurrence(cell):
    net = gf.rnn(11, 6, cell)
    methods = check(gf.next_token_loss(net), net.init(KEY), tokens())
    assert methods["layers/0/Wh"] == "dense, in a loop"


@pytest.mark.slow
def test_recurrence_in_stacked_layers():
    net = gf.repeat(gf.layers.lstm(8, 8), 3)
    check(lambda p, x: jnp.sum(jnp.sin(net.apply(p, x))), net.init(KEY), normal(0, 3, 5, 8))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_images(kind):
    config = gf.ViTConfig(image=(8, 8, 1), patch=4, classes=3, n_layers=1, n_heads=2, width=8, pool="class")
    net = gf.cnn((8, 8, 1), [4, 6], [8], 3) if kind == "cnn" else gf.vit(config)
    check(gf.classification_loss(net), net.init(KEY), (normal(0, 5, 8, 8, 1), CLASSES))


@pytest.fixture
def their_promotion():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_nnx(their_promotion):
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 4, 64, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.last = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(self.norm(self.attention(x)).mean(0))

    graph, state = nnx.split(Model(nnx.Rngs(0)))

    def loss(state, x, label):
        logits = nnx.merge(graph, state)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    methods = check(loss, state, normal(0, 5, 12, 4), CLASSES)
    assert methods["attention/query/kernel"] == methods["attention/out/kernel"] == "dense, Gram"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_equinox(their_promotion):
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        norm: eqx.nn.LayerNorm
        cell: eqx.nn.GRUCell
        mlp: eqx.nn.MLP

        def __init__(self, key):
            self.embed = eqx.nn.Embedding(11, 20, key=key)
            self.norm = eqx.nn.LayerNorm(20)
            self.cell = eqx.nn.GRUCell(20, 24, key=key)
            self.mlp = eqx.nn.MLP(24, 11, 30, 1, key=key)

        def __call__(self, ids):
            x = jax.vmap(self.norm)(jax.vmap(self.embed)(ids))
            _, h = jax.lax.scan(lambda h, x: (self.cell(x, h),) * 2, jnp.zeros(24), x)
            return jax.vmap(self.mlp)(h)

    arrays, rest = eqx.partition(Model(KEY), eqx.is_array)

    def loss(arrays, ids, targets):
        logits = eqx.combine(arrays, rest)(ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    methods = check(loss, arrays, *tokens())
    assert methods["cell/weight_hh"] == methods["cell/weight_ih"] == "dense, in a loop"
    assert methods["mlp/layers/0/weight"] == "dense, Gram"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["convolution", "dense"])
def test_gradients_are_summed_once_if_examples_choose_a_branch(kind, dtype):
    """Under `vmap` such a branch has a copy of the parameter for each example."""
    W = jax.random.normal(jax.random.key(0), (3, 2, 2) if kind == "convolution" else (2, 2)).astype(dtype)
    xs = jax.random.normal(jax.random.key(1), (4, 5, 2)).astype(dtype)

    def product(W, x):
        if kind == "dense":
            return x @ W
        return jax.lax.conv_general_dilated(
            x[None], W, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )[0]

    def loss(W, x):
        y = jax.lax.cond(x[0, 0] > -1, lambda: product(W, x), lambda: jnp.zeros_like(x))
        return jnp.sum(jnp.sin(y).astype(jnp.float32))

    found = gf.per_example.norms(loss)(W, xs)
    each = jax.vmap(jax.grad(loss), (None, 0))(W, xs).astype(jnp.float32)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    scale = float(jnp.abs(each).max())
    np.testing.assert_allclose(found.grads.astype(jnp.float32), each.mean(0), atol=tolerance * scale)
    np.testing.assert_allclose(found.total, jnp.sqrt(jnp.sum(each**2, range(1, each.ndim))), rtol=tolerance)
