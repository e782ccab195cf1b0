"""Two moons: the frames are those of the training, the pictures are there, and the verdict."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn.experiments import moons
from gradfn.runs.training_set import load_training_set


def test_moments_start_at_0_and_end_with_the_last_step():
    for steps in (1, 7, 1000):
        found = moons.moments(steps)
        assert (found[0], found[-1]) == (0, steps)
        assert (np.diff(found) > 0).all()


def test_the_outcome():
    assert moons.judge(moons.Config(seed=4), 0.96).state == "reached"
    assert moons.judge(moons.Config(), 0.959).state == "missed"
    assert moons.judge(moons.Config(), float("nan")).state == "missed"
    assert moons.judge(moons.Config(hidden=()), 1.0).state == "open"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": (4, 0)}, "hidden must be an integer >= 1, got 0"),
        ({"activation": "tahn"}, "Did you mean 'tanh'"),
        ({"noise": -1.0}, "noise must be a finite number >= 0"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        moons.Config(**options)


@pytest.mark.slow
def test_the_frames_are_those_of_a_plain_training(tmp_path):
    config = moons.Config(hidden=(3,), steps=4, points=20, seed=1, folder=str(tmp_path / "run"))
    result = moons.run(config)
    assert {"strip.png", "curves.png", "boundary.gif"} <= {file.name for file in result.folder.iterdir()}
    assert result.frames.shape == (5, moons.GRID, moons.GRID)

    net, optimizer = gf.mlp([2, 3, 2], activation="tanh"), optax.adam(config.rate)
    step = gf.train_step(gf.batch_mean(gf.classification_loss(net)), optimizer)
    state = gf.train_state(net.init(jax.random.key(1)), optimizer, jax.random.key(0))
    kept = load_training_set(result.folder / "training_set.safetensors")
    jax.tree.map(np.testing.assert_array_equal, kept.params, dict(state.params))
    jax.tree.map(np.testing.assert_array_equal, (kept.train, kept.test), moons.moons(config))
    assert kept.about["rate"] == config.rate
    batch = jax.tree.map(jnp.asarray, moons.moons(config)[0])
    for _ in range(4):
        state, _ = step(state, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result.params, state.params
    )
    corner = jax.nn.softmax(net.apply(state.params, jnp.array([-1.7, -1.2])))[1]
    assert result.frames[-1, 0, 0] == pytest.approx(float(corner), rel=1e-4)
