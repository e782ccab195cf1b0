"""K-FAC, EK-FAC and the Gauss-Newton diagonal: against dense matrices and explicit formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import gradfn as gf
from gradfn.curvature import _factors

pytestmark = pytest.mark.usefixtures("x64")
KEY = jax.random.key(0)


def normal(i, *shape):
    return jnp.asarray(np.random.default_rng(i).normal(size=shape))


def dense_ggn(outputs, loss, params, x, y):
    """Return the Gauss-Newton matrix `[P, P]`, from Jacobians."""
    flat, fill = ravel_pytree(params)

    def of_one(x, y):
        z, pull = jax.vjp(lambda v: outputs(fill(v), x).ravel(), flat)
        shape = jax.eval_shape(outputs, params, x).shape
        H = jax.hessian(lambda u: loss(u.reshape(shape), y))(z)
        J = jax.vmap(pull)(jnp.eye(z.size))[0]
        return J.T @ H @ J

    return jax.jit(jax.vmap(of_one))(x, y).mean(0)


def dense_fisher(loss, params, batch):
    """Return the empirical Fisher matrix `[P, P]`."""
    flat, fill = ravel_pytree(params)
    g = jax.jit(jax.vmap(jax.grad(lambda v, e: loss(fill(v), e)), (None, 0)))(flat, batch)
    return g.T @ g / len(g)


def matrix_of(curvature, params):
    """Return the matrix `[P, P]` of a curvature, from products with unit vectors."""
    flat, fill = ravel_pytree(params)
    product = jax.vmap(lambda v: ravel_pytree(curvature.product(fill(v)))[0])
    return jax.jit(product)(jnp.eye(flat.size))


def block(matrix, params, name):
    """Return the rows and columns of one parameter."""
    marks = np.concatenate([np.full(params[k].size, k == name) for k in sorted(params)])
    return np.asarray(matrix)[np.ix_(marks, marks)]


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11 * np.abs(b).max())


def cross_entropy(z, y):
    return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()


def squared(z, y):
    return jnp.mean((z - y) ** 2)


def consistent(curvature, params):
    """Check the methods of a result against the dense matrix that its products make."""
    flat, fill = ravel_pytree(params)

    @jax.jit
    def measured(curvature, v):
        solved, diagonal = curvature.inverse_product(fill(v), 0.3), curvature.diagonal()
        flats = [ravel_pytree(tree)[0] for tree in (solved, diagonal)]
        return *flats, curvature.trace(), curvature.log_determinant(0.3)

    dense, v = np.asarray(matrix_of(curvature, params)), np.asarray(normal(99, flat.size))
    solved, diagonal, trace, log_determinant = measured(curvature, v)
    damped = dense + 0.3 * np.eye(flat.size)
    close(dense, dense.T)
    close(diagonal, np.diagonal(dense))
    close(trace, np.trace(dense))
    close(solved, np.linalg.solve(damped, v))
    close(log_determinant, np.linalg.slogdet(damped)[1])
    return dense


def test_a_dense_layer_with_one_example_is_exact():
    params, x, y = {"w": normal(0, 3, 4)}, normal(1, 1, 4), jnp.array([2])
    outputs = lambda p, x: p["w"] @ x  # noqa: E731
    exact = dense_ggn(outputs, cross_entropy, params, x, y)
    for curvature in (gf.curvature.kfac, gf.curvature.ekfac):
        close(consistent(curvature(outputs, "softmax")(params, (x, y)), params), exact)
    loss = lambda p, e: cross_entropy(p["w"] @ e[0], e[1])  # noqa: E731
    close(matrix_of(gf.curvature.kfac(loss)(params, (x, y)), params), dense_fisher(loss, params, (x, y)))


@pytest.mark.parametrize("batch_size", [2, 64])
def test_factors_of_a_net_are_second_moments_of_inputs_and_cotangents(batch_size):
    net = gf.mlp([4, 3, 2])
    params = jax.tree.map(lambda p: normal(p.size, *p.shape), net.init(KEY))
    x, y = normal(1, 5, 4), jnp.arange(5) % 2
    curvature = gf.curvature.kfac(net.apply, "softmax", batch_size=batch_size)(params, (x, y))
    dense = consistent(curvature, params)
    exact = dense_ggn(net.apply, cross_entropy, params, x, y)

    W1, W2, b1, b2, x = map(np.asarray, (*params.values(), x))
    a = 1 / (1 + np.exp(-x @ W1.T - b1))
    p = np.exp(a @ W2.T + b2)
    p /= p.sum(1, keepdims=True)
    H = p[:, :, None] * np.eye(2) - p[:, :, None] * p[:, None]
    back = W2[None] * (a * (1 - a))[:, None]  # [n, out, hidden]
    B2, B1 = H.mean(0), np.einsum("noi,nop,npj->ij", back, H, back) / 5
    for name, out, into in (("W1", B1, x.T @ x / 5), ("W2", B2, a.T @ a / 5)):
        of = curvature.blocks[name]
        close(of.first[0], out)
        close(of.second[0], into)
        close(block(dense, params, name), np.kron(out, into))
    for name in ("b1", "b2"):
        close(block(dense, params, name), block(exact, params, name))
    assert curvature.methods == (
        ("W1", "K-FAC, dense"),
        ("W2", "K-FAC, dense"),
        ("b1", "exact block"),
        ("b2", "exact block"),
    )
    corrected = gf.curvature.ekfac(net.apply, "softmax", batch_size=batch_size)(params, (x, y))
    better = consistent(corrected, params)
    close(corrected.trace(), np.trace(exact))
    for name in ("W1", "W2"):
        errors = [np.linalg.norm(block(m - exact, params, name)) for m in (better, dense)]
        assert errors[0] < errors[1]
    diagonal = gf.curvature.ggn_diagonal(net.apply, "softmax", batch_size=batch_size)(params, (x, y))
    close(ravel_pytree(diagonal)[0], np.diagonal(exact))


def test_a_deep_linear_net_with_squared_error_is_exact():
    """The cotangents do not depend on the example: the expectation of the products factorizes."""
    params, x, y = {"u": normal(0, 3, 4), "v": normal(1, 2, 3)}, normal(2, 6, 4), normal(3, 6, 2)
    outputs = lambda p, x: p["v"] @ (p["u"] @ x)  # noqa: E731
    exact = dense_ggn(outputs, squared, params, x, y)
    for curvature in (gf.curvature.kfac, gf.curvature.ekfac):
        for loss in ("squared", squared):
            dense = matrix_of(curvature(outputs, loss)(params, (x, y)), params)
            for name in params:
                close(block(dense, params, name), block(exact, params, name))


def tied(params, tokens):
    """Embed tokens, mix positions, and multiply by the embedding again."""
    h = params["embedding"][tokens]  # [T, D]
    h = h + jnp.tanh(h.mean(0, keepdims=True) @ params["w"])
    return h @ params["embedding"].T  # [T, V]


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_positions_are_summed_before_or_after_the_outer_products(weight_sharing):
    params = {"embedding": normal(0, 5, 3), "w": normal(1, 3, 3), "v": normal(2, 3, 2)}
    tokens, y = np.array([[0, 1, 1, 4], [2, 2, 2, 0], [4, 0, 1, 3]]), np.array([0, 1, 1])

    def hidden(params, tokens):
        h = params["embedding"][tokens]
        return h, h @ params["w"]

    def rest(u, y):
        return cross_entropy(jnp.tanh(u).mean(0) @ params["v"], y)

    def loss(params, example):
        return cross_entropy(jnp.tanh(hidden(params, example[0])[1]).mean(0) @ params["v"], example[1])

    curvature = gf.curvature.kfac(loss, weight_sharing=weight_sharing)(params, (tokens, y))
    consistent(curvature, params)
    a, u = jax.vmap(hidden, (None, 0))(params, tokens)
    g = jax.vmap(jax.grad(rest))(u, y)
    a, g = np.asarray(a), np.asarray(g)  # [n, T, D]
    if weight_sharing == "expand":
        first, second = np.einsum("nti,ntj->ij", a, a) / 12, np.einsum("nti,ntj->ij", g, g) / 3
    else:
        first, second = np.einsum("nti,nsj->ij", a, a) / 48, np.einsum("nti,nsj->ij", g, g) / 3
    close(curvature.blocks["w"].first[0], first)
    close(curvature.blocks["w"].second[0], second)
    # The rows of an embedding are counted in both.
    back = g @ params["w"].T
    close(curvature.blocks["embedding"].first[0], np.bincount(tokens.ravel()) / 12)
    close(curvature.blocks["embedding"].second[0], np.einsum("nti,ntj->ij", back, back) / 3)
    corrected = gf.curvature.ekfac(loss, weight_sharing=weight_sharing)(params, (tokens, y))
    consistent(corrected, params)
    for name in params:
        # The eigenvalues are second moments along the eigenvectors: repeated tokens of an example add up.
        close(
            corrected.blocks[name].trace(),
            np.trace(block(dense_fisher(loss, params, (tokens, y)), params, name)),
        )


def test_a_tied_weight_has_the_average_of_its_uses_factors():
    params = {"embedding": normal(0, 5, 3), "w": normal(1, 3, 3)}
    tokens, y = (
        np.array([[0, 1, 1, 4], [2, 2, 2, 0], [4, 0, 1, 3]]),
        np.array([[1, 1, 0, 2], [3, -1, 4, 0], [0, 0, 1, 2]]),
    )

    def loss(z, y):
        each = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(y, 0))
        return jnp.mean(each, where=y >= 0)

    exact = dense_ggn(tied, loss, params, tokens, y)
    curvature = gf.curvature.kfac(tied, "softmax")(params, (tokens, y))
    dense = consistent(curvature, params)
    assert dict(curvature.methods)["embedding"] == "K-FAC, 2 uses: rows, dense"

    def both(params, tokens):
        h = params["in"][tokens]
        h = h + jnp.tanh(h.mean(0, keepdims=True) @ params["w"])
        return h @ params["out"].T

    two = {"in": params["embedding"], "out": params["embedding"], "w": params["w"]}
    uses = gf.curvature.kfac(both, "softmax")(two, (tokens, y)).blocks
    weights = np.array([uses["in"].trace(), uses["out"].trace()])
    firsts = [np.diag(uses["in"].first[0]), np.asarray(uses["out"].first[0])]
    seconds = [np.asarray(uses[name].second[0]) for name in ("in", "out")]
    mean = lambda factors: sum(w * f / np.trace(f) for w, f in zip(weights / weights.sum(), factors))  # noqa: E731
    close(block(dense, params, "embedding"), weights.sum() * np.kron(mean(firsts), mean(seconds)))
    corrected = consistent(gf.curvature.ekfac(tied, "softmax")(params, (tokens, y)), params)
    errors = [np.linalg.norm(block(m - exact, params, "embedding")) for m in (corrected, dense)]
    assert errors[0] < errors[1]
    close(np.trace(corrected), np.trace(exact))
    diagonal = gf.curvature.ggn_diagonal(tied, "softmax")(params, (tokens, y))
    close(ravel_pytree(diagonal)[0], np.diagonal(exact))


@pytest.mark.slow
def test_stacked_layers_have_factors_each_and_recurrent_ones_share_theirs():
    params = {"layers": normal(0, 2, 3, 3), "again": normal(1, 3, 3), "bias": normal(2, 2, 3)}

    def scanned(params, x):
        def step(x, layer):
            w, b = layer
            return jnp.tanh(w @ x + b) @ params["again"], None

        return jax.lax.scan(step, x, (params["layers"], params["bias"]))[0]

    def unrolled(params, x):
        for i in range(2):
            x = jnp.tanh(params[f"layer{i}"] @ x + params["bias"][i]) @ params["again"]
        return x

    x, y = normal(3, 4, 3), normal(4, 4, 3)
    apart = {
        "layer0": params["layers"][0],
        "layer1": params["layers"][1],
        "again": params["again"],
        "bias": params["bias"],
    }
    exact = dense_ggn(scanned, squared, params, x, y)
    for of in (gf.curvature.kfac, gf.curvature.ekfac):
        found, expected = of(scanned, "squared")(params, (x, y)), of(unrolled, "squared")(apart, (x, y))
        consistent(found, params)
        v = {"layers": normal(5, 2, 3, 3), "again": normal(6, 3, 3), "bias": normal(7, 2, 3)}
        w = {"layer0": v["layers"][0], "layer1": v["layers"][1], "again": v["again"], "bias": v["bias"]}
        products = found.product(v), expected.product(w)
        for i in range(2):
            close(products[0]["layers"][i], products[1][f"layer{i}"])
        close(products[0]["bias"], products[1]["bias"])
    close(block(matrix_of(found, params), params, "bias"), block(exact, params, "bias"))
    close(np.trace(matrix_of(found, params)), np.trace(exact))
    diagonal = gf.curvature.ggn_diagonal(scanned, "squared")(params, (x, y))
    close(ravel_pytree(diagonal)[0], np.diagonal(exact))


@pytest.mark.slow
@pytest.mark.parametrize(("weight_sharing", "groups"), [("expand", 2), ("reduce", 1)])
def test_convolutions(weight_sharing, groups):
    params = {"w": normal(0, 3, 2, 2 // groups, 4), "v": normal(1, 4, 2)}  # HWIO
    x, y = normal(2, 3, 6, 5, 2), np.array([0, 1, 1])

    def convolved(params, x):
        return jax.lax.conv_general_dilated(
            x[None],
            params["w"],
            (1, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )[0]

    outputs = lambda params, x: jnp.tanh(convolved(params, x)).mean((0, 1)) @ params["v"]  # noqa: E731
    loss = lambda params, example: cross_entropy(outputs(params, example[0]), example[1])  # noqa: E731
    curvature = gf.curvature.kfac(loss, weight_sharing=weight_sharing)(params, (x, y))
    dense = consistent(curvature, params)
    z = jax.vmap(convolved, (None, 0))(params, x)
    of_rest = lambda z, y: cross_entropy(jnp.tanh(z).mean((0, 1)) @ params["v"], y)  # noqa: E731
    # [n, positions, s, out]
    g = np.asarray(jax.vmap(jax.grad(of_rest))(z, y)).reshape(3, -1, groups, 4 // groups)
    # A convolution with the derivative by its kernel is a matrix of patches.
    J = jax.vmap(jax.jacobian(lambda w, x: convolved({"w": w}, x)[..., :: 4 // groups]), (None, 0))(
        params["w"], x
    )
    J = np.asarray(J).reshape(3, -1, groups, 3, 2, 2 // groups, groups, 4 // groups)
    a = np.stack([J[:, :, s, ..., s, 0] for s in range(groups)], 2).reshape(3, -1, groups, 12 // groups)
    positions = a.shape[1]
    if weight_sharing == "reduce":
        a, g, positions = a.mean(1, keepdims=True), g.sum(1, keepdims=True), 1
    A, B = np.einsum("npsi,npsj->sij", a, a) / 3 / positions, np.einsum("npsi,npsj->sij", g, g) / 3
    expected = np.zeros([3, 2, 2 // groups, groups, 4 // groups] * 2)
    k = 12 // groups
    for s in range(groups):
        of_group = np.kron(A[s], B[s]).reshape([3, 2, 2 // groups, 4 // groups] * 2)
        expected[:, :, :, s, :, :, :, :, s, :] = of_group
    close(block(dense, params, "w"), expected.reshape(k * 4, k * 4))
    corrected = gf.curvature.ekfac(loss, weight_sharing=weight_sharing)(params, (x, y))
    exact = dense_fisher(loss, params, (x, y))
    close(np.trace(consistent(corrected, params)), np.trace(exact))
    exact = dense_ggn(outputs, cross_entropy, params, x, y)
    diagonal = gf.curvature.ggn_diagonal(outputs, "softmax")(params, (x, y))
    close(ravel_pytree(diagonal)[0], np.diagonal(exact))


def test_large_sides_are_cut_to_their_diagonal_and_large_blocks_to_rows(monkeypatch):
    params = {"w": normal(0, 2, 4), "b": normal(1, 3, 2), "c": normal(2, 3, 2)}
    x, y = normal(3, 5, 4), normal(4, 5, 3, 2)

    def outputs(params, x):
        return jnp.tanh((params["w"] @ x)[None] * params["b"] + jnp.cumsum(params["c"], 0))

    exact = dense_ggn(outputs, squared, params, x, y)
    whole = gf.curvature.kfac(outputs, "squared")(params, (x, y))
    close(block(matrix_of(whole, params), params, "b"), block(exact, params, "b"))
    monkeypatch.setattr(_factors, "LARGEST_SIDE", 3)
    monkeypatch.setattr(_factors, "LARGEST_BLOCK", 12)
    cut = gf.curvature.kfac(outputs, "squared")(params, (x, y))
    dense = consistent(cut, params)
    assert dict(cut.methods) == {
        "w": "K-FAC, dense, factor cut to its diagonal",
        "b": "exact blocks of rows",
        "c": "exact blocks of rows",
    }
    close(cut.blocks["w"].second[0], np.diagonal(whole.blocks["w"].second[0]))
    close(block(dense, params, "b"), block(exact, params, "b") * np.kron(np.eye(3), np.ones([2, 2])))
    monkeypatch.setattr(_factors, "LARGEST_BLOCK", 4)
    diagonal = gf.curvature.ekfac(outputs, "squared")(params, (x, y))
    assert dict(diagonal.methods)["c"] == "exact diagonal"
    dense = consistent(diagonal, params)
    close(block(dense, params, "c"), block(exact, params, "c") * np.eye(6))
    close(np.trace(dense), np.trace(exact))


def test_samples_have_the_second_moments_of_the_columns():
    params, x = {"w": normal(0, 1, 4)}, normal(1, 3, 4)
    outputs = lambda params, x: params["w"] @ x  # noqa: E731
    y = normal(2, 3, 1)
    of = lambda **options: gf.curvature.kfac(outputs, "squared", **options)(params, (x, y)).blocks["w"]  # noqa: E731
    # With one output there is one column, up to its sign.
    close(of(samples=3).first, of().first)
    params, y = {"w": normal(0, 3, 4)}, np.array([0, 2, 1])
    exact = gf.curvature.ggn_diagonal(outputs, "softmax")(params, (x, y))["w"]
    sampled = gf.curvature.ggn_diagonal(outputs, "softmax", samples=2000)
    first, other = (sampled(params, (x, y), key=jax.random.key(k))["w"] for k in (1, 2))
    assert not np.array_equal(first, other)
    np.testing.assert_allclose(first, exact, rtol=0.1)


def test_it_can_be_compiled_and_mapped_and_shows_a_table():
    net = gf.mlp([3, 2])
    params, x, y = net.init(KEY), normal(0, 6, 3).astype(jnp.float32), np.arange(6) % 2
    of = gf.curvature.kfac(net.apply, "softmax")
    plain, compiled = of(params, (x, y)), jax.jit(of)(params, (x, y))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)
    assert "K-FAC, dense" in str(plain)
    assert "2 ⊗ 3" in str(plain)
    many = jax.vmap(of, (None, 0))(params, (x.reshape(2, 3, 3), y.reshape(2, 3)))
    assert many.blocks["W1"].first.shape == (2, 1, 2, 2)
    assert "batched by vmap" in str(many)


def test_what_the_loss_does_not_use_and_what_is_not_floating():
    params = {"w": normal(0, 3), "n": jnp.array(3), "unused": normal(1, 2)}
    loss = lambda params, x: jnp.vdot(params["w"], x) ** 2  # noqa: E731
    curvature = gf.curvature.kfac(loss)(params, normal(2, 4, 3))
    assert curvature.blocks["n"] is None
    assert dict(curvature.methods)["unused"] == "unused"
    product = curvature.inverse_product(params, 2.0)
    assert product["n"] is None
    close(product["unused"], params["unused"] / 2)
    assert "unused" in str(curvature)


def test_bad_input():
    net = gf.mlp([3, 2])
    params, batch = net.init(KEY), (normal(0, 4, 3).astype(jnp.float32), np.arange(4) % 2)
    kfac = gf.curvature.kfac
    with pytest.raises(ValueError, match=r"loss must be 'softmax', 'squared' or a function .*, got 'hinge'"):
        kfac(net.apply, "hinge")
    with pytest.raises(ValueError, match="weight_sharing must be 'expand' or 'reduce', got 'both'"):
        kfac(net.apply, "softmax", weight_sharing="both")
    with pytest.raises(ValueError, match=r"got 2. Pass kfac\(outputs, 'softmax', samples=2\)"):
        kfac(gf.classification_loss(net), samples=2)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        kfac(net.apply, "softmax", batch_size=0)
    with pytest.raises(ValueError, match=r"kfac: expected a batch \(x, y\), got list"):
        kfac(net.apply, "softmax")(params, [batch[0], batch[1]])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), got 1 to 4"):
        kfac(net.apply, "softmax")(params, (batch[0], np.arange(1, 5)))
    with pytest.raises(TypeError, match="expected one floating array as the outputs, got tuple"):
        kfac(lambda params, x: (x, x), "squared")(params, batch)
    with pytest.raises(TypeError, match="loss of one example must return a floating scalar"):
        kfac(lambda params, example: params["W1"] @ example[0])(params, batch)
    with pytest.raises(gf.ParameterError, match="expected real parameters, got complex"):
        kfac(lambda w, x: jnp.abs(w) * x)(jnp.ones(3, jnp.complex64), batch[0])
    with pytest.raises(ValueError, match="ggn_diagonal: loss must be 'softmax'"):
        gf.curvature.ggn_diagonal(net.apply, None)
    found = kfac(net.apply, "softmax")(params, batch)
    with pytest.raises(gf.ParameterError, match=r"W1: .*expected a vector of shape \[2, 3\], .*got \[3, 2\]"):
        found.product({"W1": jnp.ones([3, 2]), "b1": jnp.ones(2)})
    with pytest.raises(gf.ParameterError, match="expected the parameters' structure, W1, b1"):
        found.product({"W1": jnp.ones([2, 3])})
    with pytest.raises(ValueError, match="damping must be >= 0, got -1"):
        found.inverse_product(params, -1.0)
    with pytest.raises(ValueError, match="damping must be a scalar or a tree of one scalar per parameter"):
        found.log_determinant({"W1": 1.0, "b1": 2.0, "c": 3.0})


@pytest.mark.slow
def test_attention_and_norms_of_flax():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(4)(x)
            h = nn.LayerNorm()(h + nn.MultiHeadDotProductAttention(num_heads=2)(h, h))
            return nn.Dense(3)(nn.Conv(3, (3,))(h[None])[0].mean(0))

    x, y = normal(0, 4, 5, 3).astype(jnp.float32), np.arange(4) % 3
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        params = Net().init(KEY, x[0])
        curvature = gf.curvature.ekfac(Net().apply, "softmax")(params, (x, y))
        methods = dict(curvature.methods)
        assert {method for path, method in methods.items() if path.endswith("kernel")} == {
            "EK-FAC, dense",
            "EK-FAC, convolution",
        }
        assert {method for path, method in methods.items() if not path.endswith("kernel")} == {"exact block"}
        exact = dense_ggn(Net().apply, cross_entropy, params, x, y)
        np.testing.assert_allclose(curvature.trace(), np.trace(exact), rtol=1e-4)


def test_narrow_parameters_have_wide_blocks():
    params = {"w": normal(0, 2, 4).astype(jnp.bfloat16)}
    x, y = normal(1, 3, 4).astype(jnp.bfloat16), np.array([0, 1, 1])
    found = gf.curvature.kfac(lambda params, x: params["w"] @ x, "softmax")(params, (x, y))
    assert found.blocks["w"].first.dtype == found.blocks["w"].second.dtype == jnp.float32
    assert found.inverse_product(params, 0.1)["w"].dtype == jnp.bfloat16
    whole = found.product({"w": jnp.ones([2, 4], int)})["w"]
    np.testing.assert_array_equal(whole, found.product({"w": jnp.ones([2, 4], jnp.float32)})["w"])
    wide = np.asarray(x, np.float32)
    np.testing.assert_allclose(found.blocks["w"].second[0], wide.T @ wide / 3, rtol=1e-5)
