"""The classics on MNIST: their networks and recipes, and one short run of each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradfn.experiments.mnist import RECIPES, Config, judge, run, shifted

import gradfn as gf


def test_the_recipes_have_the_documented_networks():
    sizes = {name: gf.count(make().net.spec) for name, make in RECIPES.items()}
    assert sizes == {"tutorial": 12_730, "nielsen": 23_860, "best": 79_510}


def test_nielsens_parameters_are_all_from_a_standard_normal():
    params = RECIPES["nielsen"]().net.init(jax.random.key(0))
    W1, biases = np.asarray(params["W1"]), np.concatenate([params["b1"], params["b2"]])
    # Within five standard errors of what N(0, 1) has.
    assert abs(W1.mean()) < 5 / np.sqrt(W1.size)
    assert abs(W1.std() - 1) < 5 / np.sqrt(2 * W1.size)
    assert abs((biases**2).mean() - 1) < 5 * np.sqrt(2 / biases.size)


def test_shifted_moves_an_image_by_at_most_a_pixel_in_each_direction():
    image = jnp.zeros([28, 28]).at[10, 20].set(1.0).reshape(784)

    def where(params, example):  # the index of the one pixel
        return jnp.argmax(example[0]).astype(jnp.float32)

    keys = jax.random.split(jax.random.key(0), 200)
    positions = jax.vmap(lambda key: shifted(where)({}, (image[None], jnp.zeros(1)), key=key))(keys)
    assert set(np.asarray(positions, int)) == {
        28 * (10 + down) + 20 + right for down in (-1, 0, 1) for right in (-1, 0, 1)
    }


@pytest.mark.parametrize(
    ("recipe", "accuracies", "epochs", "state"),
    [
        ("best", [0.97, 0.981], 20, "reached"),
        ("best", [0.97], 20, "missed"),
        ("tutorial", [0.93, 0.96], 40, "missed"),
        ("tutorial", [0.96], 40, "reached"),
        ("tutorial", [0.96], 1, "open"),
    ],
)
def test_the_outcome_is_of_the_best_seed_or_of_the_mean(recipe, accuracies, epochs, state):
    assert judge(recipe, accuracies, epochs).state == state


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_epoch_of_each_recipe(recipe, tmp_path, shared_data):
    path = str(shared_data / "mnist")
    config = Config(recipe=recipe, epochs=1, seeds=2, data_path=path, folder=str(tmp_path / "run"))
    result = run(config)
    assert len(result.test_accuracies) == 2
    assert min(result.test_accuracies) > {"tutorial": 0.88, "nielsen": 0.75, "best": 0.94}[recipe]
    files = {file.name for file in result.folder.iterdir()}
    assert {"weights.png", "curves.png", "confusion.png", "mistakes.png", "seed-0", "seed-1"} <= files
