"""Parameters chosen by path: the masks, and what is frozen by them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf

PARAMS = {"embed": {"W": jnp.ones([3, 2])}, "blocks": {"0": {"W": jnp.ones([2, 2]), "b": jnp.ones(2)}}}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("embed/W", {"embed/W"}),
        ("*/W", {"embed/W", "blocks/0/W"}),
        (["embed/*", "*b"], {"embed/W", "blocks/0/b"}),
        (lambda path: path.endswith("b"), {"blocks/0/b"}),
        (lambda path: False, set()),
    ],
)
def test_masks(where, expected):
    mask = gf.train.path_mask(PARAMS, where)
    assert jax.tree.structure(mask) == jax.tree.structure(PARAMS)
    flat = {
        "embed/W": mask["embed"]["W"],
        "blocks/0/W": mask["blocks"]["0"]["W"],
        "blocks/0/b": mask["blocks"]["0"]["b"],
    }
    assert {name for name, chosen in flat.items() if chosen} == expected


def test_a_path_that_matches_nothing_is_refused():
    with pytest.raises(
        ValueError, match=r"path_mask: no parameter has the path 'embd/W'\. Did you mean embed/W"
    ):
        gf.train.path_mask(PARAMS, "embd/W")


def test_frozen_parameters_stay_and_have_no_state():
    labels = lambda params: gf.train.path_mask(params, "embed/*")  # noqa: E731
    optimizer = optax.partition({True: optax.set_to_zero(), False: optax.adam(0.1)}, labels)

    def loss(params, x):
        hidden = x @ params["embed"]["W"] @ params["blocks"]["0"]["W"].T
        return jnp.square(hidden + params["blocks"]["0"]["b"][None]).mean()

    fitted = gf.fit(loss, PARAMS, np.ones([8, 3], "float32"), optimizer, 3, batch_size=4, progress=False)
    np.testing.assert_array_equal(fitted.params["embed"]["W"], PARAMS["embed"]["W"])
    assert not np.array_equal(fitted.params["blocks"]["0"]["W"], PARAMS["blocks"]["0"]["W"])
    assert [leaf.shape for leaf in jax.tree.leaves(fitted.state.opt_state)].count((3, 2)) == 0
