"""Influence functions: against training again with other weights, and against dense matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import gradfn as gf

pytestmark = pytest.mark.usefixtures("x64")
KEY = jax.random.key(0)


def normal(i, *shape):
    return np.random.default_rng(i).normal(size=shape)


NET = gf.mlp([3, 2])
LOSS = gf.classification_loss(NET)
TRAIN, TEST = (normal(0, 12, 3), np.arange(12) % 2), (normal(1, 4, 3), np.arange(4) % 2)


def regularized(params, example):
    squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    return LOSS(params, example) + 0.05 * squares


@jax.jit
def minimum(weights):
    """Return the parameters at the minimum of the weighted mean of the regularized losses, by Newton's method."""
    flat, fill = ravel_pytree(jax.tree.map(lambda p: jnp.zeros(p.shape), NET.init(KEY)))
    total = lambda v: weights @ jax.vmap(regularized, (None, 0))(fill(v), TRAIN) / len(weights)  # noqa: E731
    step = lambda _, v: v - jnp.linalg.solve(jax.hessian(total)(v), jax.grad(total)(v))  # noqa: E731
    return fill(jax.lax.fori_loop(0, 12, step, flat))


def test_conjugate_gradients_predict_training_with_another_weight():
    """The score over N is minus the derivative of the test loss at the minimum by the training example's weight."""
    params = minimum(jnp.ones(12))
    hessian = gf.curvature.hvp(gf.batch_mean(regularized))
    found = gf.attribution.influence(regularized, hessian, damping=0, tolerance=1e-9)(params, TRAIN, TEST)

    @jax.jit
    @functools.partial(jax.vmap, out_axes=1)
    def by_training(i):
        change = 1e-4 * jax.nn.one_hot(i, 12, dtype=jnp.float64)
        low, high = (
            jax.vmap(regularized, (None, 0))(minimum(jnp.ones(12) + sign * change), TEST) for sign in (-1, 1)
        )
        return -(high - low) / 2e-4

    np.testing.assert_allclose(found / 12, by_training(jnp.arange(12)), rtol=1e-5, atol=1e-9)


def test_every_curvature_is_exact_for_a_linear_model_with_squared_error():
    outputs = lambda params, x: params["w"] @ x  # noqa: E731
    loss = lambda params, example: jnp.mean((outputs(params, example[0]) - example[1]) ** 2)  # noqa: E731
    params, train, test = (
        {"w": normal(2, 2, 3)},
        (normal(3, 9, 3), normal(4, 9, 2)),
        (normal(5, 4, 3), normal(6, 4, 2)),
    )
    x = np.asarray(train[0])
    H = np.kron(np.eye(2), x.T @ x / 9)  # of the mean over 2 outputs of squared errors, 2 / 2
    of_train, of_test = (
        np.asarray(jax.vmap(jax.grad(loss), (None, 0))(params, batch)["w"]).reshape(-1, 6)
        for batch in (train, test)
    )
    expected = of_test @ np.linalg.solve(H + 0.1 * np.eye(6), of_train.T)
    matrices = [
        gf.curvature.ekfac(outputs, "squared"),
        gf.curvature.kfac(outputs, "squared", batch_size=4),
        gf.curvature.ggn_vp(outputs, "squared"),
    ]
    for matrix in matrices:
        scores = gf.attribution.influence(loss, matrix, damping=0.1, tolerance=1e-10, batch_size=2)
        np.testing.assert_allclose(scores(params, train, test), expected, rtol=1e-8)


def test_the_defaults_are_the_empirical_fisher_and_a_tenth_of_the_mean_eigenvalues():
    params = jax.tree.map(lambda p: normal(p.size, *p.shape), NET.init(KEY))
    found = gf.attribution.influence(LOSS)(params, TRAIN, TEST)
    matrix = gf.curvature.ekfac(LOSS)(params, TRAIN)
    of_train, of_test = (jax.vmap(jax.grad(LOSS), (None, 0))(params, batch) for batch in (TRAIN, TEST))
    solved = jax.vmap(lambda v: matrix.inverse_product(v, matrix.relative_damping(0.1)))(of_test)
    products = [
        np.asarray(a).reshape(4, -1) @ np.asarray(b).reshape(12, -1).T
        for a, b in zip(jax.tree.leaves(solved), jax.tree.leaves(of_train), strict=True)
    ]
    np.testing.assert_allclose(found, sum(products), rtol=1e-9)


def test_what_does_not_converge_is_not_a_number():
    loss = lambda w, example: 0.5 * w @ (example * w)  # noqa: E731
    hessian = gf.curvature.hvp(gf.batch_mean(loss))
    w, test = jnp.ones(3), jnp.ones([2, 3])
    positive, indefinite = jnp.array([[1.0, 10.0, 100.0]]), jnp.array([[1.0, -2.0, 3.0]])
    few = gf.attribution.influence(loss, hessian, damping=0, max_products=2)
    assert np.isnan(few(w, positive, test)).all()
    enough = gf.attribution.influence(loss, hessian, damping=0, max_products=3)
    np.testing.assert_allclose(enough(w, positive, test), 3 * np.ones([2, 1]), rtol=1e-6)
    assert np.isnan(enough(w, indefinite, test)).all()


def test_what_is_not_a_curvature():
    with pytest.raises(ValueError, match="a curvature product needs damping"):
        gf.attribution.influence(LOSS, gf.curvature.ggn_vp(NET.apply))
    with pytest.raises(ValueError, match="damping must be >= 0, got -1"):
        gf.attribution.influence(LOSS, damping=-1)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        gf.attribution.influence(LOSS, batch_size=0)
    with pytest.raises(TypeError, match=r"curvature must be a function such as .*, got str"):
        gf.attribution.influence(LOSS, "ekfac")
    with pytest.raises(TypeError, match="it returned float"):
        gf.attribution.influence(LOSS, lambda params, batch: 1.0)(NET.init(KEY), TRAIN, TEST)
