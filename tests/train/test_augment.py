import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.train.augment import shift_images, shifted


def test_each_image_is_shifted_by_its_own_random_amount():
    image = np.zeros([6, 5], np.float32)
    image[2:4, 2] = [1.0, 2.0]
    moved = shift_images(jnp.tile(image.reshape(1, 30), [200, 1]), jax.random.key(0), (6, 5), pixels=1)
    moved = np.asarray(moved).reshape(200, 6, 5)
    found = {tuple(np.argwhere(one == 1)[0] - [2, 2]) for one in moved}
    assert found == {(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
    for one in moved:
        down, right = np.argwhere(one == 1)[0] - [2, 2]
        np.testing.assert_array_equal(one, np.roll(image, (down, right), (0, 1)))


def test_pixels_that_move_in_are_background():
    moved = shift_images(jnp.ones([50, 9]), jax.random.key(0), (3, 3), pixels=2)
    assert set(np.unique(moved)) == {0.0, 1.0}
    assert moved.sum(1).min() == 1  # shifts by two pixels in both directions leave one


@pytest.mark.slow
def test_the_loss_is_that_of_the_shifted_images():
    net = gf.mlp([9, 2])
    params, key = net.init(jax.random.key(0)), jax.random.key(1)
    images, labels = jax.random.uniform(key, [4, 9]), jnp.array([0, 1, 1, 0])
    loss = gf.batch_mean(gf.classification_loss(net))
    expected = loss(params, (shift_images(images, key, (3, 3), 1), labels))
    assert shifted(loss, (3, 3), 1)(params, (images, labels), key) == expected
