"""Curvature against the dense matrices of a net with 28 parameters, in float64, and against known quadratics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import gradfn as gf

NET = gf.mlp([3, 4, 3], activation="tanh")
LOSS = gf.batch_mean(gf.classification_loss(NET))


def task():
    """Return parameters, a vector like them and a batch, in the default precision."""
    params = jax.tree.map(lambda a: 0.7 * jnp.asarray(a, float), NET.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    vector = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), params)
    return params, vector, (jnp.asarray(rng.normal(size=[9, 3])), jnp.asarray(rng.integers(0, 3, 9)))


def dense(loss, params, *args):
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda w: loss(unravel(w), *args)))(flat))


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def rows(tree):
    """Return a tree with a leading axis k as `[k, P]`."""
    return np.asarray(jax.vmap(lambda t: ravel_pytree(t)[0])(tree))


@pytest.fixture(scope="module")
def known():
    """The task and its dense Hessian, in float64."""
    with jax.enable_x64(True):
        params, vector, batch = task()
        return params, vector, batch, dense(LOSS, params, batch)


def test_hvp_is_the_dense_hessian_times_the_vector_and_the_slope_of_the_gradient(x64, known):
    params, vector, batch, H = known
    product = jax.jit(gf.curvature.hvp(LOSS))(params, vector, batch)
    assert jax.tree.structure(product) == jax.tree.structure(params)
    np.testing.assert_allclose(flat(product), H @ flat(vector), rtol=1e-12, atol=1e-14)
    gradient = jax.jit(jax.grad(LOSS))
    ahead, behind = (
        gradient(jax.tree.map(lambda p, v, s=s: p + s * v, params, vector), batch) for s in (1e-5, -1e-5)
    )
    np.testing.assert_allclose(flat(product), (flat(ahead) - flat(behind)) / 2e-5, atol=1e-8)


def jacobian(f, params):
    values, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.jacobian(lambda w: f(unravel(w))))(values))


CONVEX = {
    "softmax": lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y),
    "squared": lambda z, y: ((z - y) ** 2).mean(),
    "other": lambda z, y: jnp.log(jnp.cosh(z - y)).sum(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVEX)
def test_ggn_is_the_jacobian_around_the_hessian_of_the_outputs(x64, known, name):
    params, vector, (x, labels), _ = known
    y = labels if name == "softmax" else jnp.linspace(-1.0, 1.0, 27).reshape(9, 3)
    product = jax.jit(gf.curvature.ggn_vp(NET.apply, CONVEX[name] if name == "other" else name))

    def outputs(params):
        return jax.vmap(NET.apply, (None, 0))(params, x)

    J, z = jacobian(outputs, params), outputs(params)  # [9, 3, P], [9, 3]
    H = np.asarray(jax.vmap(jax.hessian(CONVEX[name]))(z, y))  # [9, 3, 3]
    expected = np.einsum("nip,nij,njq,q->p", J, H, J, flat(vector)) / 9
    np.testing.assert_allclose(flat(product(params, vector, (x, y))), expected, rtol=1e-11, atol=1e-14)


def test_softmax_ggn_of_sequences_ignores_padding(x64):
    """The net is linear in its only matrix, so the Gauss-Newton matrix is the Hessian."""
    net = gf.Net({"W": gf.Param((4, 3))}, lambda params, x: x @ params["W"].T)  # [T, 3] -> [T, 4]
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.normal(size=[2, 5, 3])), jnp.asarray(rng.integers(0, 4, [2, 5])).at[0, 3:].set(-1)
    params, vector = ({"W": jnp.asarray(rng.normal(size=[4, 3]))} for _ in range(2))
    loss = gf.batch_mean(gf.next_token_loss(net))
    expected = jax.jit(gf.curvature.hvp(loss))(params, vector, (x, y))["W"]
    np.testing.assert_allclose(
        jax.jit(gf.curvature.ggn_vp(net.apply))(params, vector, (x, y))["W"], expected, rtol=1e-12
    )


def test_fisher_is_the_mean_of_the_gradients_outer_products(x64, known):
    params, vector, batch, _ = known
    loss = gf.classification_loss(NET)
    gradients = rows(jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batch))  # [9, P]
    expected = gradients.T @ (gradients @ flat(vector)) / 9
    for either in (loss, gf.batch_mean(loss)):
        product = jax.jit(gf.curvature.fisher_vp(either))(params, vector, batch)
        np.testing.assert_allclose(flat(product), expected, rtol=1e-11)


def test_errors_of_products_name_the_parameter():
    product = gf.curvature.hvp(lambda params: params["W"].sum() ** 2)
    params = {"W": jnp.ones([2, 3]), "steps": jnp.int32(3)}
    with pytest.raises(
        gf.ParameterError, match=r"^W: hvp: expected a vector of shape \[2, 3\].*got \[3, 2\]"
    ):
        product(params, {"W": jnp.ones([3, 2]), "steps": None})
    with pytest.raises(gf.ParameterError, match=r"^steps: hvp: .*structure, W, steps; got W, b"):
        product(params, {"W": jnp.ones([2, 3]), "b": jnp.ones(1)})
    with pytest.raises(gf.ParameterError, match="got None"):
        product(params, {"W": None, "steps": None})
    with pytest.raises(gf.ParameterError, match="complex"):
        product({"W": jnp.ones(2, complex)}, {"W": jnp.ones(2)})
    with pytest.raises(TypeError, match="no floating array"):
        product({"W": jnp.ones(2, int)}, {"W": jnp.ones(2)})
    with pytest.raises(TypeError, match=r"must return a floating scalar.*gf.batch_mean"):
        gf.curvature.hvp(lambda w: w)(jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match="'softmax', 'squared' or a function"):
        gf.curvature.ggn_vp(NET.apply, "hinge")
    with pytest.raises(TypeError, match="integer labels"):
        gf.curvature.ggn_vp(NET.apply)(*task()[:2], (jnp.ones([2, 3]), jnp.ones([2])))


def test_only_floating_arrays_take_part_and_aux_is_ignored():
    params = {"W": jnp.array([2.0, 3.0]), "steps": jnp.int32(3), "half": jnp.ones(2, jnp.bfloat16)}

    def loss(params):
        return (params["W"] ** 3).sum() + (params["half"].astype(jnp.float32) ** 2).sum(), {"aux": 1}

    vector = {"W": jnp.ones(2), "steps": None, "half": jnp.ones(2)}
    product = jax.jit(gf.curvature.hvp(loss))(params, vector)
    assert product["steps"] is None
    assert product["half"].dtype == jnp.bfloat16
    np.testing.assert_allclose(product["W"], [12.0, 18.0])
    eigs = gf.curvature.hessian_eigs(loss, k=2)(params)
    np.testing.assert_allclose(eigs.values, [18.0, 12.0], rtol=1e-3)  # the vectors are rounded to bfloat16
    assert eigs.vectors["steps"] is None


@pytest.mark.slow
@pytest.mark.parametrize("which", ["magnitude", "largest", "smallest"])
def test_eigenvalues_are_those_of_the_dense_hessian(x64, known, which):
    params, _, batch, H = known
    eigs = gf.curvature.hessian_eigs(LOSS, k=4, which=which, tolerance=1e-8)(params, batch)
    order = {"magnitude": lambda v: -abs(v), "largest": lambda v: -v, "smallest": lambda v: v}[which]
    np.testing.assert_allclose(eigs.values, sorted(np.linalg.eigvalsh(H), key=order)[:4], rtol=1e-10)
    assert eigs.converged.all()
    V = rows(eigs.vectors)
    np.testing.assert_allclose(V @ V.T, np.eye(4), atol=1e-12)
    assert (np.linalg.norm(V @ H - eigs.values[:, None] * V, axis=1) <= 1.01 * eigs.residuals + 1e-14).all()


def quadratic(w, A):
    """A loss whose Hessian is A."""
    return 0.5 * w @ A @ w


def symmetric(eigenvalues):
    U = np.linalg.qr(np.random.default_rng(0).normal(size=[len(eigenvalues)] * 2))[0]
    return (U * np.asarray(eigenvalues)) @ U.T


@pytest.mark.slow
def test_residuals_are_correct_in_float32_after_restarts():
    spectrum = np.random.default_rng(0).uniform(0.9, 1, 300)  # no gaps: the basis of 30 vectors fills up
    A = symmetric(spectrum)
    A32 = jnp.asarray(A, jnp.float32)
    eigs = gf.curvature.hessian_eigs(quadratic, k=5, tolerance=1e-4)(jnp.ones(300), A32)
    assert eigs.products > 60
    assert eigs.converged.all()
    np.testing.assert_allclose(eigs.values, np.sort(spectrum)[:-6:-1], atol=1e-4)
    V, values = (np.asarray(a, np.float64) for a in (eigs.vectors, eigs.values))
    np.testing.assert_allclose(np.linalg.norm(V @ A - values[:, None] * V, axis=1), eigs.residuals, atol=1e-6)
    short = gf.curvature.hessian_eigs(quadratic, k=5, tolerance=1e-4, max_products=8)(jnp.ones(300), A32)
    assert short.products == 8
    assert not short.converged.all()
    assert "NO" in str(short)


@pytest.mark.slow
def test_eigenvalues_if_the_process_ends_early():
    eigs_of = gf.curvature.hessian_eigs(quadratic, k=5)
    for spectrum in ([0.0] * 5, [2.0] * 5, [3.0, -1.0, 0.0, 0.0, 0.0]):
        eigs = eigs_of(jnp.ones(5), jnp.asarray(symmetric(spectrum), jnp.float32))
        np.testing.assert_allclose(np.sort(eigs.values), np.sort(spectrum), atol=5e-6)
        np.testing.assert_allclose(eigs.vectors @ eigs.vectors.T, np.eye(5), atol=5e-6)


@pytest.mark.slow
def test_eigenvalues_of_other_matrices_and_inside_jit(x64, known):
    params, _, batch, _ = known
    J = jacobian(lambda params: jax.vmap(NET.apply, (None, 0))(params, batch[0]), params)
    p = jax.nn.softmax(jax.vmap(NET.apply, (None, 0))(params, batch[0]))
    H = np.asarray(jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :])
    G = np.einsum("nip,nij,njq->pq", J, H, J) / 9
    eigs = jax.jit(gf.curvature.hessian_eigs(gf.curvature.ggn_vp(NET.apply), k=2))(params, batch)
    np.testing.assert_allclose(eigs.values, np.linalg.eigvalsh(G)[:-3:-1], rtol=1e-6)


@pytest.mark.slow
def test_sharpness_and_its_limit():
    A = jnp.asarray(symmetric([3.0, 1.0, -5.0, 0.1]), jnp.float32)
    result = gf.curvature.sharpness(quadratic, learning_rate=0.5)(jnp.ones(4), A)
    np.testing.assert_allclose([result.value, result.limit, result.ratio], [3.0, 4.0, 0.75], rtol=1e-5)
    assert result.vector.shape == (4,)
    assert result.converged
    with pytest.raises(ValueError, match="above 0"):
        gf.curvature.sharpness(quadratic, learning_rate=0.0)


def test_eigenvalues_refuse_unknown_settings():
    with pytest.raises(ValueError, match="at most the number of parameters, 2, got 3"):
        gf.curvature.hessian_eigs(quadratic, k=3)(jnp.ones(2), jnp.eye(2))
    with pytest.raises(ValueError, match="k must be an integer >= 1, got 0"):
        gf.curvature.hessian_eigs(quadratic, k=0)
    with pytest.raises(ValueError, match="max_products must be at least k = 5, got 4"):
        gf.curvature.hessian_eigs(quadratic, k=5, max_products=4)
    with pytest.raises(ValueError, match="magnitude, largest, smallest"):
        gf.curvature.hessian_eigs(quadratic, which="LM")


@pytest.mark.slow
def test_eigenvalues_of_any_size():
    spectrum = np.r_[9.0, -7.0, 5.0, np.linspace(-1, 1, 97)]
    eigs_of = gf.curvature.hessian_eigs(quadratic, k=3)
    for scale in (0.0, 1e-12, 1e12):
        eigs = eigs_of(jnp.ones(100), jnp.asarray(scale * symmetric(spectrum), jnp.float32))
        np.testing.assert_allclose(eigs.values, scale * spectrum[:3], rtol=1e-5)
        np.testing.assert_allclose(eigs.vectors @ eigs.vectors.T, np.eye(3), atol=5e-6)
        assert eigs.converged.all()


@pytest.mark.slow
def test_a_hessian_that_is_not_finite_ends_the_search_at_once():
    eigs = gf.curvature.hessian_eigs(lambda w: jnp.sqrt(w - 2).sum(), k=2)(jnp.ones(60))
    assert eigs.products <= 4
    assert not eigs.converged.any()


@pytest.mark.slow
def test_trace_and_diagonal_agree_with_the_dense_hessian_and_their_errors_are_calibrated(x64, known):
    params, _, batch, H = known
    estimate = jax.jit(
        jax.vmap(lambda key: gf.curvature.hessian_trace(LOSS, samples=20)(params, batch, key=key)),
    )(jax.random.split(jax.random.key(1), 300))
    spread = np.sqrt(2 * (np.sum(H**2) - np.sum(np.diag(H) ** 2)) / 20)  # of Hutchinson's estimator, exactly
    np.testing.assert_allclose(estimate.value.mean(), np.trace(H), atol=4 * spread / np.sqrt(300))
    np.testing.assert_allclose(estimate.value.std(), spread, rtol=0.15)
    np.testing.assert_allclose(np.sqrt((estimate.standard_error**2).mean()), spread, rtol=0.1)
    within = np.abs(estimate.value - np.trace(H)) < estimate.standard_error
    assert 0.60 < within.mean() < 0.74  # 0.67 of a t distribution with 19 degrees of freedom

    diagonal = gf.curvature.hessian_diagonal(LOSS, samples=2000)(params, batch)
    assert jax.tree.structure(diagonal.value) == jax.tree.structure(params)
    off = (flat(diagonal.value) - np.diag(H)) / flat(diagonal.standard_error)
    assert 0.6 < off.std() < 1.5  # 31 of them
    assert np.abs(off).max() < 4.5


@pytest.mark.slow
def test_the_spectrum_has_the_moments_of_the_dense_one(x64, known):
    params, _, batch, H = known
    eigenvalues = np.linalg.eigvalsh(H)
    # With 31 steps each row is exact for its direction; only the directions are random.
    spectrum = gf.curvature.hessian_spectrum(LOSS, samples=400, steps=40)(params, batch)
    np.testing.assert_allclose(spectrum.weights.sum(1), 1.0, rtol=1e-10)
    assert spectrum.size == len(eigenvalues)
    for power in (1, 2, 3):
        moments = (spectrum.weights * spectrum.nodes**power).sum(1)
        error = moments.std() / np.sqrt(400)
        np.testing.assert_allclose(moments.mean(), np.mean(eigenvalues**power), atol=4 * error)
    grid, density = spectrum.density(width=0.05)
    np.testing.assert_allclose(np.trapezoid(density, grid), 1.0, rtol=1e-2)
    middle = eigenvalues[[-3, -4]].mean()
    np.testing.assert_allclose(spectrum.above(middle), 3.0, atol=0.4)


@pytest.mark.slow
def test_a_few_steps_have_the_exact_low_moments_of_their_direction(x64):
    """The Gauss quadrature of n steps is exact up to degree 2n - 1, whatever the spectrum."""
    A = jnp.asarray(symmetric(np.random.default_rng(2).normal(size=40)))
    spectrum = gf.curvature.hessian_spectrum(quadratic, samples=3, steps=4)(jnp.ones(40), A)
    signs = [
        jax.random.rademacher(jax.random.split(k)[0], [40], float)
        for k in jax.random.split(jax.random.key(0), 3)
    ]
    for power in range(8):
        exact = [v @ np.linalg.matrix_power(A, power) @ v / 40 for v in signs]
        np.testing.assert_allclose((spectrum.weights * spectrum.nodes**power).sum(1), exact, rtol=1e-9)


def test_estimates_need_enough_samples():
    with pytest.raises(ValueError, match="samples must be >= 2 for a standard error, got 1"):
        gf.curvature.hessian_trace(quadratic, samples=1)
    with pytest.raises(ValueError, match="steps >= 2, got samples=8, steps=1"):
        gf.curvature.hessian_spectrum(quadratic, steps=1)


def test_landscape_is_the_loss_at_the_moved_parameters():
    params, _, batch = task()
    result = gf.curvature.loss_landscape(LOSS, points=3, span=0.5)(params, batch)
    assert result.losses.shape == (3, 3)
    np.testing.assert_allclose(result.steps, [-0.5, 0.0, 0.5])
    moved = jax.tree.map(lambda p, d: p + 0.5 * d[0] - 0.5 * d[1], params, result.directions)
    np.testing.assert_allclose(result.losses[2, 0], jax.jit(LOSS)(moved, batch), rtol=1e-5)
    for name, p in params.items():
        lengths = np.linalg.norm(np.asarray(result.directions[name]).reshape(2, len(p), -1), axis=2)
        expected = np.linalg.norm(p, axis=1) if p.ndim == 2 else np.zeros(len(p))
        np.testing.assert_allclose(lengths, np.stack([expected] * 2), rtol=1e-5)


def test_landscape_along_given_directions_and_with_filters_on_the_last_axis():
    along = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    result = gf.curvature.loss_landscape(lambda w: w[0] ** 2 + w[1], points=3)(jnp.zeros(2), directions=along)
    np.testing.assert_allclose(result.losses, [[-1.0, 1.0, 3.0], [-2.0, 0.0, 2.0], [-1.0, 1.0, 3.0]])
    kernel = jnp.array([[3.0, 1.0], [4.0, 0.0]])  # [in, out], as Flax has it
    last = gf.curvature.loss_landscape(lambda w: w.sum(), 1, points=2, filter_axis=-1)(kernel).directions
    np.testing.assert_allclose(np.linalg.norm(last[0], axis=0), [5.0, 1.0], rtol=1e-5)
    with pytest.raises(ValueError, match="expected dims 1 or 2"):
        gf.curvature.loss_landscape(quadratic, dims=3)
    with pytest.raises(gf.ParameterError, match="expected a vector of shape"):
        gf.curvature.loss_landscape(lambda w: w.sum(), 1)(jnp.zeros(2), directions=jnp.ones([1, 3]))


@pytest.mark.slow
def test_models_of_equinox_and_flax_have_the_eigenvalues_of_their_dense_hessians(x64):
    eqx, nnx = pytest.importorskip("equinox"), pytest.importorskip("flax.nnx")
    _, _, (x, y) = task()

    def loss(answers):
        return optax.softmax_cross_entropy_with_integer_labels(answers, y).mean()

    model = eqx.nn.MLP(3, 3, 2, 1, key=jax.random.key(0))  # some of its leaves are functions
    graph, state = nnx.split(nnx.Linear(3, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    arrays, static = eqx.partition(model, eqx.is_array)
    for params, f, rest in [
        (model, lambda model: loss(jax.vmap(model)(x)), lambda w: eqx.combine(w, static)),
        (state, lambda state: loss(nnx.merge(graph, state)(x)), lambda w: w),
    ]:
        eigs = gf.curvature.hessian_eigs(f, k=2, tolerance=1e-8)(params)
        expected = np.linalg.eigvalsh(
            dense(lambda w, f=f, rest=rest: f(rest(w)), arrays if params is model else params)
        )
        np.testing.assert_allclose(eigs.values, sorted(expected, key=lambda v: -abs(v))[:2], rtol=1e-8)
