"""Activation maximization: known optima, bounds, and units inside a net."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.attribution._maximize import total_variation

KEY = jax.random.key(0)


def test_the_optimum_of_a_quadratic_with_a_penalty():
    goal = jnp.array([0.3, 0.9, 2.0, -1.0])
    ascend = gf.attribution.maximize(
        lambda goal, x: -jnp.square(x - goal).sum(), l2=1.0, steps=400, learning_rate=0.02
    )
    result = ascend(goal, jnp.zeros(4), key=KEY)
    np.testing.assert_allclose(result.x, jnp.clip(goal / 2, 0, 1), atol=0.01)
    np.testing.assert_allclose(result.score, -jnp.square(result.x - goal).sum(), rtol=1e-5)
    assert result.scores.shape == (400,)
    np.testing.assert_allclose(result.scores[0], -jnp.square(goal).sum(), rtol=1e-5)
    free = gf.attribution.maximize(
        lambda goal, x: -jnp.square(x - goal).sum(), l2=0.0, steps=400, learning_rate=0.05, box=None
    )
    np.testing.assert_allclose(free(goal, jnp.zeros(4), key=KEY).x, goal, atol=0.02)


def test_a_unit_by_its_site_and_index_in_a_dense_net():
    net = gf.mlp([16, 3, 2])
    params = net.init(jax.random.key(1))
    ascend = jax.jit(
        gf.attribution.maximize(net.apply, ("z1", 2), shape=(4, 4), variation=0.0, jitter=0, l2=1e-4)
    )
    result = ascend(params, jnp.full(16, 0.5), key=KEY)
    np.testing.assert_allclose(result.x, params["W1"][2] > 0, atol=0.02)  # 1 where the weights are positive
    assert result.score > result.scores[0]


@pytest.mark.slow
def test_a_channel_of_a_convolutional_net():
    net = gf.cnn((6, 6, 1), (2,), (4,), 3)
    params = net.init(jax.random.key(2))
    ascend = gf.attribution.maximize(net.apply, ("a1", (..., 1)), steps=30, l2=0.0, variation=0.0)
    result = ascend(params, jnp.full((6, 6), 0.5), key=KEY)
    assert result.x.shape == (6, 6)
    assert result.scores[-1] > result.scores[0]
    assert ((result.x >= 0) & (result.x <= 1)).all()


@pytest.mark.slow
def test_variation_smooths_and_jitter_moves():
    dots = (jnp.indices((6, 6)).sum(0) % 2).astype(jnp.float32)
    f = lambda dots, x: jnp.sum(dots * x)  # noqa: E731
    rough, smooth = (
        gf.attribution.maximize(f, variation=v, jitter=0, l2=0.0, steps=100)(
            dots, jnp.full((6, 6), 0.5), key=KEY
        ).x
        for v in (0.0, 2.0)
    )
    assert total_variation(smooth) < total_variation(rough) / 2
    moved = gf.attribution.maximize(f, jitter=1, l2=0.0, variation=0.0, steps=20)(dots, dots, key=KEY)
    # Even shifts meet the dots, odd shifts miss them.
    assert len(np.unique(np.round(moved.scores[:5], 3))) > 1


def test_a_number_of_steps_below_one():
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
        gf.attribution.maximize(lambda _, x: x.sum(), steps=0)
