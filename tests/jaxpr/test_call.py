"""Calls taken apart: value, aux, differentiable arrays, and the hint at `gf.batch_mean`."""

import jax
import jax.numpy as jnp
import pytest

import gradfn as gf
from gradfn.jaxpr.call import scalar, scalar_and_aux, value_and_aux, with_hint

MEAN = r"gf.batch_mean\(loss\) averages a loss of one example over a batch\."
PARAMS = {"W": jnp.ones((3, 2)), "b": jnp.zeros(3)}


def linear(params, x):
    return jnp.sum((params["W"] @ x + params["b"]) ** 2)


def elementwise(params, x):
    return (x @ params["W"].T).sum(-1)


def test_a_value_alone_has_no_aux_and_a_pair_is_split():
    assert value_and_aux(1.0) == (1.0, None)
    assert value_and_aux((1.0, {"a": 2})) == (1.0, {"a": 2})


def test_names_are_paths_and_arguments_after_the_first_are_named_by_the_signature():
    of = scalar(linear, (PARAMS, jnp.ones(2)), {}, (0, 1), "test")
    assert of.names == ("W", "b", "x")
    value, aux = of.call([jnp.zeros((3, 2)), jnp.ones(3), jnp.ones(2)])
    assert (float(value), aux) == (3.0, None)


@pytest.mark.parametrize("out", [jnp.ones(3), jnp.array(1), "text", None, (jnp.ones(3), {})])
def test_everything_but_a_floating_scalar_is_refused(out):
    with pytest.raises(
        TypeError, match=r"f: the function must return a floating scalar or \(scalar, aux\), got .*"
    ):
        scalar_and_aux(out, "f")


TRANSFORMS = {
    "inspect": gf.inspect,
    "backprop": gf.backprop,
    "nan_origin": gf.nan_origin,
    "nan_guard": gf.nan_guard,
    "check_grads": gf.check_grads,
    "hvp": lambda f: lambda params, x: gf.curvature.hvp(f)(params, params, x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_an_output_per_example_points_to_batch_mean(name):
    expected = (
        rf"{name}: the function must return a floating scalar or \(scalar, aux\), got float32\[4\]. {MEAN}"
    )
    with pytest.raises(TypeError, match=expected):
        TRANSFORMS[name](elementwise)(PARAMS, jnp.ones((4, 2)))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_shape_error_inside_points_to_batch_mean(name):
    with pytest.raises((TypeError, ValueError)) as caught:
        TRANSFORMS[name](linear)(PARAMS, jnp.ones((4, 2)))
    assert "gf.batch_mean(loss) averages a loss of one example over a batch." in caught.value.__notes__


def test_a_mean_over_a_batch_and_other_errors_get_no_hint():
    def broken(params, x):
        raise ValueError("unrelated")

    with pytest.raises(ValueError, match="unrelated") as caught:
        with_hint(broken)(PARAMS, 1.0)
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("transform", [gf.per_example.norms, gf.per_example.grads])
def test_per_example_transforms_say_what_they_take(transform):
    def of_batch(params, x):
        return jnp.mean(jnp.sum(x @ params["W"].T, axis=1))

    with pytest.raises((TypeError, ValueError)) as caught:
        transform(of_batch)(PARAMS, jnp.ones((4, 2)))
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "Per-example transforms take the loss of one example, or gf.batch_mean(loss)." in text


def test_the_loss_of_one_example_gives_the_same_through_batch_mean():
    x = jax.random.normal(jax.random.key(0), (4, 2))
    value, grads = jax.value_and_grad(gf.batch_mean(linear))(PARAMS, x)
    inspection = gf.inspect(gf.batch_mean(linear))(PARAMS, x)
    assert jnp.allclose(inspection.value, value)
    assert jax.tree.all(jax.tree.map(jnp.allclose, inspection.grads, grads))
