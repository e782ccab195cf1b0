"""Norms and clipped means of examples' gradients where numbers are unusual: against `vmap(grad)` in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import gradfn as gf

compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEYS = jax.random.split(jax.random.key(0), 8)


@pytest.fixture(autouse=True)
def usual_promotion():
    """These are about what users' promotion does."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def normal(i, *shape):
    return jax.random.normal(KEYS[i], shape)


def norms_in_float64(grads):
    flat = [np.asarray(g).astype(np.complex128).reshape(len(g), -1) for g in jax.tree.leaves(grads)]
    return [np.linalg.norm(g, axis=1) for g in flat]


def check(loss, params, *batch, rtol=2e-6, clip=True):
    """Compare norms, gradients and clipped gradients with `vmap(grad)`; return how they were found."""
    grads = compiled(jax.vmap(jax.grad(loss), (None, *[0] * len(batch))))(params, *batch)
    each = norms_in_float64(grads)
    total = np.linalg.norm(each, axis=0)
    found = compiled(gf.per_example.norms(loss))(params, *batch)
    np.testing.assert_allclose(found.total, total, rtol=rtol)
    for norm, expected in zip(jax.tree.leaves(found.norms), each, strict=True):
        assert norm.dtype in (jnp.float32, jnp.float64)
        np.testing.assert_allclose(norm, expected, rtol=rtol, atol=rtol * total.max())
    max_norm = float(np.median(total))
    clipped = compiled(gf.per_example.clipped_grads(loss, max_norm))(params, *batch) if clip else found
    weights = np.minimum(1, max_norm / total) if clip else np.ones_like(total)
    pairs = zip(*map(jax.tree.leaves, (params, grads, found.grads, clipped.grads)), strict=True)
    for leaf, g, mean, of_clipped in pairs:
        assert mean.dtype == of_clipped.dtype == leaf.dtype
        g = np.asarray(g).astype(np.complex128)
        atol = 10 * rtol * np.abs(g).max(initial=0)
        np.testing.assert_allclose(mean, g.mean(0), atol=atol, rtol=rtol)
        np.testing.assert_allclose(of_clipped, np.tensordot(weights, g, 1) / len(g), atol=atol, rtol=rtol)
    return dict(found.methods)


def bag_of_words(w, x):
    return jnp.sum(jnp.sin(x @ w / 10))


INTEGERS = [jnp.int8, jnp.uint8, jnp.int16, jnp.int32, jnp.bool]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_data_times_a_float_weight(dtype):
    """An integer is data where it is multiplied, and a row's number only where rows are looked up."""
    axes = () if dtype == jnp.int32 else (3,)
    x = jax.random.randint(KEYS[0], (4, *axes, 40), 0, 9).astype(dtype)
    method = check(bag_of_words, normal(1, 40, 30), x, clip=not axes)["params"]
    assert method == ("dense, Gram" if axes else "dense, |a||g|")


def test_the_issue_s_integers():
    w, x = jnp.ones((3, 2)), jnp.array([[5, 0, 0], [0, 0, 9]])
    loss = lambda w, x: jnp.sum(x @ w)  # noqa: E731
    np.testing.assert_allclose(gf.per_example.norms(loss)(w, x).total, [50**0.5, 162**0.5], rtol=1e-6)
    assert float(jnp.linalg.norm(gf.per_example.clipped_grads(loss, 1.0)(w, x).grads)) <= 1
    mean, n = np.array([[2.5, 2.5], [0, 0], [4.5, 4.5]]), 2
    variance = (106 - np.sum(mean**2)) * n / (n - 1)
    np.testing.assert_allclose(gf.per_example.noise_scale(loss)(w, x).variance, variance, rtol=1e-6)


def integers_everywhere(p, x, ids):
    """One-hot integers and a look-up of the same weight, pixels convolved, a count in a loop, mixed results."""
    one_hot = jax.nn.one_hot(ids, 50, dtype=jnp.int32)
    h = one_hot @ p["W"] + p["W"][ids]
    pixels = lax.conv_general_dilated(
        x[None, :, :, None].astype(p["C"].dtype),
        p["C"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    step = lambda h, row: (jnp.tanh(h / 9 + row @ p["R"]), None)  # noqa: E731
    h2 = lax.scan(step, jnp.zeros(30), x)[0]
    y = lax.dot_general(x, p["R"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return jnp.sum(jnp.sin(h)) + jnp.sum(jnp.cos(pixels / 9)) + h2.sum() + jnp.sum(jnp.sin(y / 9))


@pytest.mark.slow
def test_integers_in_tied_weights_convolutions_and_loops():
    params = {"W": normal(0, 50, 40), "C": normal(1, 3, 3, 1, 4), "R": normal(2, 7, 30) / 9}
    pixels = jax.random.randint(KEYS[3], (3, 7, 7), 0, 255).astype(jnp.uint8)
    methods = check(
        integers_everywhere, params, pixels, jax.random.randint(KEYS[4], (3, 5), 0, 50), rtol=2e-5
    )
    assert methods["W"] == "2 uses: dense, rows"


def spectrum(p, x):
    h = jnp.fft.fft(x)
    return jnp.sum(jnp.abs(h @ p["W"]) ** 2)


def complex_beside_real(p, x):
    y = (x @ p["W"]).astype(jnp.complex64) @ p["Z"] + p["b"]
    return jnp.sum(jnp.abs(y * lax.complex(p["g"], 2 * p["g"])) ** 2) + jnp.sum(jnp.sin(x @ p["W"]))


def complex_everywhere(p, x):
    """A complex input, a real weight used twice as a complex one, rows looked up and a loop."""
    h = x @ p["W"] + jnp.conj(x) @ p["W"].T
    h = lax.scan(lambda h, _: (jnp.tanh(h @ p["R"]), None), h, None, 3)[0]
    rows = p["W"].astype(jnp.complex64)[jnp.array([0, 3, 3])] * x[:3, :1]
    return jnp.sum(jnp.abs(h) ** 2) + jnp.sum(rows.imag**2 + rows.real)


def test_a_real_weight_in_a_complex_product():
    for axes in ((), (3,)):
        assert "dense" in check(spectrum, {"W": normal(0, 40, 30)}, normal(1, 4, *axes, 40))["W"]


def test_a_complex_weight_beside_a_real_one():
    params = {
        "W": normal(0, 30, 40),
        "Z": lax.complex(normal(1, 40, 30), normal(2, 40, 30)),
        "b": lax.complex(normal(3, 30), normal(4, 30)),
        "g": normal(5),
    }
    methods = check(complex_beside_real, params, normal(6, 4, 3, 30))
    assert methods["Z"] == "dense, Gram"


@pytest.mark.slow
def test_complex_numbers_in_tied_weights_and_loops():
    x = lax.complex(normal(0, 4, 6, 40), normal(1, 4, 6, 40)) / 9
    params = {"W": normal(2, 40, 40), "R": normal(3, 40, 40) / 9}
    check(complex_everywhere, params, x, rtol=2e-5)


TURNS = {
    "order F": lambda W: W.reshape(24, 50, order="F"),
    "ravel F": lambda W: W.ravel(order="F").reshape(24, 50),
    "dimensions": lambda W: lax.reshape(W, (24, 50), dimensions=(1, 0)),
    "dimensions alone": lambda W: lax.reshape(W, (30, 40), dimensions=(1, 0)).T[:24, :30],
    "turned": lambda W: W.T.reshape(24, 50),
    "reversed": lambda W: W[::-1, 3:30].reshape(24, 45),
    "squeezed": lambda W: W.T[None, :, None].swapaxes(0, 2)[0, 0][:24],
    "strided": lambda W: W[::2, ::3][:24].T,
}


@pytest.mark.parametrize(
    "turn", [t if t == "dimensions alone" else pytest.param(t, marks=pytest.mark.slow) for t in TURNS]
)
def test_a_weight_used_twice_that_was_reshaped(turn):
    def loss(W, x):
        V = TURNS[turn](W)
        return (
            jnp.sum(jnp.sin(x @ W / 9)) + jnp.sum(jnp.cos(x[: V.shape[0]] @ V)) + jnp.sum(jnp.sin(W @ x[:30]))
        )

    check(loss, normal(0, 40, 30), normal(1, 4, 40), clip=False)


def test_a_square_weight_transposed_by_a_reshape_and_used_twice():
    """The issue's: a permutation that leaves the shape as it was."""

    def loss(W, x):
        V = lax.reshape(W, (6, 6), dimensions=(1, 0))
        return (
            jnp.sum(jnp.sin(x @ W)) + jnp.sum(jnp.cos(x @ V)) + jnp.sum((x @ W.reshape(6, 6, order="F")) ** 2)
        )

    check(loss, normal(0, 6, 6), normal(1, 4, 3, 6))


def low(p, x):
    h = jnp.tanh(x @ p["W"] + p["b"])
    return (
        jnp.sum((h @ (p["V"] * p["V"])) * 3)
        + jnp.sum(p["E"][jnp.array([1, 1, 4])])
        + jnp.sum(x @ p["W"] * 30)
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_low_precision_sums_over_a_batch(dtype):
    """Sums over 2,000 examples of what is below the largest float16, beyond which they add up."""
    params = {
        "W": normal(0, 40, 30) / 40,
        "b": jnp.zeros(30),
        "V": normal(1, 30, 40) / 30,
        "E": jnp.zeros((60, 30)),
    }
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    x = jnp.abs(normal(2, 2000, 40)).astype(dtype)
    grads = compiled(jax.vmap(jax.grad(low), (None, 0)))(params, x)
    result = compiled(gf.per_example.norms(low))(params, x)
    clipped = compiled(gf.per_example.clipped_grads(low, 1e6))(params, x)
    assert result.methods[0] == ("E", "rows")
    assert result.fallback == ("V",)
    for name, g in grads.items():
        expected = np.asarray(g).astype(np.float64).mean(0)
        for actual in (result.grads[name], clipped.grads[name]):
            error = np.abs(np.asarray(actual).astype(np.float64) - expected).max()
            assert error <= 2 * float(jnp.finfo(dtype).eps) * np.abs(expected).max(), name
    np.testing.assert_allclose(result.norms["W"], norms_in_float64([grads["W"]])[0], rtol=0.02)


def test_low_precision_inside_a_model_of_float32():
    def loss(W, x):
        return jnp.sum(x.astype(jnp.float16) @ W.astype(jnp.float16) * 1000).astype(jnp.float32)

    x = jnp.full((2000, 40), 2.0)
    np.testing.assert_allclose(gf.per_example.norms(loss)(jnp.zeros((40, 30)), x).grads, 2000, rtol=1e-3)


def test_low_precision_weights_of_clipping_do_not_exceed_the_bound():
    loss = lambda w, x: jnp.sum(w * x)  # noqa: E731
    for dtype in (jnp.float16, jnp.bfloat16):
        x = (1 + jax.random.uniform(KEYS[0], (50, 1))).astype(dtype)
        clipped = gf.per_example.clipped_grads(loss, 1.0)(jnp.ones(1, dtype), x)
        assert float(clipped.grads[0]) <= 1


def mixed(p, x):
    h = jnp.tanh(x @ p["W"])  # [f, 30]
    return jnp.sum(jnp.sin(h @ p["T"]) @ p["T"].T) + jnp.sum(p["b"] * h) + jnp.sum(h @ (p["V"] * p["V"]))


MIXED = {"W": (40, 30), "T": (30, 40), "b": (30,), "V": (30, 40)}


@pytest.mark.parametrize(
    "f", [1, pytest.param(8, marks=pytest.mark.slow), pytest.param(90, marks=pytest.mark.slow)]
)
def test_squares_that_under_or_overflow(f):
    """Norms and clipping at any magnitude: one position, Gram matrices, products, tied, direct, and by fallback."""
    params = {name: normal(i, *shape) / 5 for i, (name, shape) in enumerate(MIXED.items())}
    x = normal(7, 4, f, 40)

    @compiled
    def found(scale, bound):
        loss = lambda p, x: scale * mixed(p, x)  # noqa: E731
        found = gf.per_example.norms(loss)(params, x)
        return found.norms, found.total, gf.per_example.clipped_grads(loss, bound * scale)(params, x).grads

    bound = float(np.median(found(1.0, 1.0)[1]))
    expected = jax.tree.map(np.float64, found(1.0, bound))
    for scale in [1e-30, 1e-25, 1e-12, 1e15, 1e20, 1e30]:
        actual = found(scale, bound)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            a = np.float64(a) / scale
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max(), err_msg=f"{scale}")


def test_norms_of_examples_of_different_magnitudes_and_what_is_not_finite():
    loss = lambda w, x: jnp.sum(jnp.sum(x @ w, 0) ** 2) / 2  # noqa: E731
    w, x = (
        normal(0, 40, 30),
        normal(1, 5, 3, 40) * jnp.array([1e-12, 1.0, 1e9, 0.0, jnp.nan]).reshape(5, 1, 1),
    )
    total = gf.per_example.norms(loss)(w, x).total
    expected = norms_in_float64([jax.vmap(jax.grad(loss), (None, 0))(w, x)])[0]
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert np.isnan(total[4])
    assert total[3] == 0


def two_layers(p, x):
    return jnp.sum(jnp.sin(jnp.tanh(x @ p["W"]) @ p["V"])), {"n": x.shape[0]}


def plain_norms(p, x):
    grads = jax.vmap(jax.grad(lambda p, x: two_layers(p, x)[0]), (None, 0))(p, x)
    return jnp.sqrt(sum(jnp.sum(g.reshape(len(x), -1) ** 2, 1) for g in jax.tree.leaves(grads)))


@pytest.mark.parametrize("transform", [jax.grad, pytest.param(jax.jacfwd, marks=pytest.mark.slow)])
def test_derivatives_of_per_example_norms(transform):
    """What a norm regularizer needs: by parameters, by data, and by what the loss closes over."""
    params, x = {"W": normal(0, 40, 5), "V": normal(1, 5, 300)}, normal(2, 3, 2, 40)

    def ours(p, x, s):
        return gf.per_example.norms(lambda p, x: (s * two_layers(p, x)[0], x))(p, x).total.sum()

    def theirs(p, x, s):
        return s * plain_norms(p, x).sum()

    a, b = (compiled(transform(f, (0, 1, 2)))(params, x, 2.0) for f in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), a, b)


def test_derivatives_of_clipped_gradients_and_of_noise():
    params, x = {"W": normal(0, 3, 2), "V": normal(1, 2, 2)}, normal(2, 4, 3)

    def clipped(p, bound):
        grads = jax.vmap(jax.grad(lambda p, x: two_layers(p, x)[0]), (None, 0))(p, x)
        weights = jnp.minimum(1, bound / plain_norms(p, x))
        return sum(jnp.sum(jnp.tensordot(weights, g, 1) ** 2) for g in jax.tree.leaves(grads)) / len(x) ** 2

    def ours(p, bound):
        return sum(
            jnp.sum(g**2)
            for g in jax.tree.leaves(gf.per_example.clipped_grads(two_layers, bound)(p, x).grads)
        )

    def variance(p):
        grads = jax.vmap(jax.grad(lambda p, x: two_layers(p, x)[0]), (None, 0))(p, x)
        return sum(jnp.sum(jnp.var(g, 0, ddof=1)) for g in jax.tree.leaves(grads))

    pairs = [
        (jax.grad(ours, (0, 1)), jax.grad(clipped, (0, 1)), (params, 1.0)),
        (
            jax.grad(lambda p: gf.per_example.noise_scale(two_layers)(p, x).variance),
            jax.grad(variance),
            (params,),
        ),
    ]
    for f, g, args in pairs:
        a, b = compiled(f)(*args), compiled(g)(*args)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), a, b)


def in_a_loop(p, x):
    h = jnp.tanh(x @ p["W"] + p["b"])
    h = lax.scan(lambda h, _: (jnp.tanh(h @ p["R"]), None), h, None, 2)[0]
    return jnp.sum(jnp.sin(h @ (p["V"] * p["V"]))) + jnp.sum(p["E"][jnp.array([1, 2])]) * h.sum()


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_inside_a_shard_map(check_vma):
    """Each device finds the norms of its own examples, and the mean gradient over them."""
    shapes = {"W": (6, 40), "b": (40,), "R": (40, 40), "V": (40, 30), "E": (50, 40)}
    # Small, for a loop that does not blow up rounding.
    params = {name: 0.2 * normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    x = normal(7, 4, 3, 6)
    each, same = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    one = gf.per_example.norms(in_a_loop)(params, x)
    bound = float(np.median(one.total))

    def both(params, x):
        found, clipped = (
            gf.per_example.norms(in_a_loop)(params, x),
            gf.per_example.clipped_grads(in_a_loop, bound)(params, x),
        )
        return (found.norms, found.total, clipped.total), lax.pmean((found.grads, clipped.grads), "data")

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    specs = {"in_specs": (same, each), "out_specs": (each, same), "check_vma": check_vma}
    on_two = compiled(jax.shard_map(both, mesh=mesh, **specs))(params, x)
    clipped = gf.per_example.clipped_grads(in_a_loop, bound)(params, x)
    on_one = (one.norms, one.total, clipped.total), (one.grads, clipped.grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), on_two, on_one)


MOVES = {
    "transpose": lambda W: W.T,
    "reverse": lambda W: W[::-1],
    "F": lambda W: W.reshape(W.shape[::-1], order="F"),
    "C": lambda W: W.reshape(W.shape[::-1]),
    "dimensions": lambda W: lax.reshape(W, W.shape, dimensions=(1, 0)),
    "narrow": lambda W: W.astype(jnp.bfloat16).astype(jnp.float32),
    "complex": lambda W: W.astype(jnp.complex64),
    "slice": lambda W: W[1:, : W.shape[1] // 2 + 1],
    "ones": lambda W: W[None, :, None].squeeze((0, 2)),
}
DATA = [jnp.float32, jnp.int8, jnp.uint8, jnp.bool, jnp.complex64]


@pytest.mark.slow
@settings(deadline=None, max_examples=3, derandomize=True)
@given(
    st.lists(st.lists(st.sampled_from(list(MOVES)), max_size=4), min_size=1, max_size=3),
    st.sampled_from(DATA),
)
def test_any_views_of_a_weight_times_any_data(chains, dtype):
    x = jax.random.randint(KEYS[0], (3, 2, 64), 0, 5).astype(dtype)

    def loss(W, x):
        out = jnp.float32(0)
        for chain in chains:
            V = functools.reduce(lambda V, move: MOVES[move](V), chain, W)
            y = x[:, : V.shape[0]] @ V
            out += jnp.sum(jnp.sin(y.real / 9) + y.imag**2 / 81)
        return out

    W = normal(1, 36, 36)
    expected = norms_in_float64([jax.vmap(jax.grad(loss), (None, 0))(W, x)])[0]
    np.testing.assert_allclose(
        gf.per_example.norms(loss)(W, x).total, expected, rtol=1e-2 if "narrow" in str(chains) else 1e-5
    )
