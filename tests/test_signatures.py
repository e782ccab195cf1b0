"""What a transform returns tells its name, its arguments and what it is for: `help(gf.curvature.hvp(loss))`."""

import inspect
import types
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.core.signature import keys_for, transform_of

NAMESPACES = ("attribution", "circuits", "curvature", "per_example")


def loss(params, x, label, *, weight=1.0, key=None):
    return weight * jnp.sum(params * x) - label


SAME = "(params, x, label, *, weight=1.0, key=None)"
ESTIMATE = "(params, /, x, label, *, key=None, weight=1.0)"
PRODUCT = "(params, vector, /, x, label, *, weight=1.0, key=None)"
MAP, DRAWN_MAP = "(params, x, label, /)", "(params, x, label, /, *, key)"
NOISY = "(params, x, label, /, *, key=None)"
OUTER = {
    "backprop": (SAME, {}),
    "capture": (SAME, {}),
    "chain_rule": ("(params, x, y)", None),
    "check_grads": (SAME, {}),
    "inspect": (SAME, {}),
    "nan_guard": (SAME, {}),
    "nan_origin": (SAME, {}),
    "patch": (SAME, {"edits": {}}),
    "sites": (SAME, {}),
    "attribution.grad_cam": (MAP, {"site": "a1"}),
    "attribution.grad_times_input": (MAP, {}),
    "attribution.guided_backprop": (MAP, {}),
    "attribution.influence": ("(params, train, test)", {}),
    "attribution.integrated_gradients": (MAP, {}),
    "attribution.lrp": (MAP, {}),
    "attribution.maximize": (DRAWN_MAP, {}),
    "attribution.occlusion": (MAP, {"size": 2}),
    "attribution.randomize_labels": ("(data, x, *, key)", {"train": loss}),
    "attribution.randomize_weights": ("(params, x, *, key)", {"init": loss}),
    "attribution.regions": ("(params, x, /)", {"masks": np.ones([1, 2], bool)}),
    "attribution.saliency": (MAP, {}),
    "attribution.smooth_grad": (DRAWN_MAP, {}),
    "attribution.tracin": ("(checkpoints, train, test, learning_rates)", {}),
    "circuits.backward_lens": (MAP, {}),
    "circuits.direct_effects": (MAP, {"metric": loss}),
    "circuits.head_scores": ("(params, tokens, label, /)", {}),
    "circuits.interchange": (SAME, {"sites": [], "source": ()}),
    "circuits.jacobian_lens": (MAP, {}),
    "circuits.logit_lens": (MAP, {}),
    "curvature.ekfac": ("(params, batch, *, key=None)", {}),
    "curvature.fisher_vp": ("(params, vector, batch, /, *, label, weight=1.0, key=None)", {}),
    "curvature.ggn_diagonal": ("(params, batch, *, key=None)", {}),
    "curvature.ggn_vp": ("(params, vector, batch)", {}),
    "curvature.hessian_diagonal": (ESTIMATE, {}),
    "curvature.hessian_eigs": (ESTIMATE, {}),
    "curvature.hessian_spectrum": (ESTIMATE, {}),
    "curvature.hessian_trace": (ESTIMATE, {}),
    "curvature.hvp": (PRODUCT, {}),
    "curvature.kfac": ("(params, batch, *, key=None)", {}),
    "curvature.loss_landscape": ("(params, /, x, label, *, directions=None, key=None, weight=1.0)", {}),
    "curvature.product": (SAME, {}),
    "curvature.sharpness": (ESTIMATE, {"learning_rate": 0.1}),
    "per_example.clipped_grads": (NOISY, {"max_norm": 1.0}),
    "per_example.grad_cosines": ("(params, x, label, /, *, by=None, key=None)", {}),
    "per_example.grads": (NOISY, {}),
    "per_example.noise_scale": (NOISY, {}),
    "per_example.norm_test": (NOISY, {}),
    "per_example.norms": (NOISY, {}),
}
NOT_OF_A_FUNCTION = {
    *("accuracy", "stalled", "train_step"),
    *(f"circuits.{name}" for name in ("at", "mean_ablate", "project_off", "resample", "splice", "steer")),
}


def transforms():
    """Every public function that returns a function, by name."""
    spaces = {"": gf} | {f"{name}.": getattr(gf, name) for name in NAMESPACES}
    for prefix, space in spaces.items():
        for name in space.__all__:
            value = getattr(space, name)
            if isinstance(value, types.FunctionType):
                returned = typing.get_type_hints(value).get("return")
                if typing.get_origin(returned) is Callable or returned is Callable:
                    yield prefix + name, value


TRANSFORMS = dict(transforms())


def test_every_transform_is_listed():
    assert set(TRANSFORMS) - NOT_OF_A_FUNCTION == set(OUTER)


@pytest.mark.parametrize("name", OUTER)
def test_a_returned_function_tells_its_arguments(name):
    expected, settings = OUTER[name]
    transform = TRANSFORMS[name]
    returned = transform() if settings is None else transform(loss, **settings)
    signature = inspect.signature(returned)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=signature.empty)) == expected
    # These return the same function, changed.
    if name in ("patch", "circuits.interchange", "curvature.product"):
        assert returned.__name__ == "loss"
    else:
        assert returned.__name__ == name.rpartition(".")[2]
        assert inspect.getdoc(returned)
        assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", OUTER)
def test_settings_are_outside_and_keys_inside(name):
    assert not {"key", "by", "batch"} & set(inspect.signature(TRANSFORMS[name]).parameters)


def test_arguments_of_one_name_leave_those_that_are_sure():
    def own(params, vector, /, *args, **kwargs): ...

    clash = transform_of(lambda params, vector: ..., "clash")(own)
    assert str(inspect.signature(clash)) == "(params, vector, /, *args, **kwargs)"
    assert str(inspect.signature(transform_of(max, "builtin")(own))) == "(params, vector, /, *args, **kwargs)"


def test_a_key_is_shared_with_a_loss_that_wants_one():
    key, other = jax.random.split(jax.random.key(3))
    assert keys_for(lambda params, x: ..., (1, 2), key, {}) == (key, {})
    assert keys_for(lambda params, x, key: ..., (1, 2, other), key, {"a": 1}) == (key, {"a": 1})
    own, kwargs = keys_for(loss, (1, 2, 3), key, {"weight": 2.0})
    assert kwargs.keys() == {"weight", "key"}
    assert len({str(jax.random.key_data(k)) for k in (key, own, kwargs["key"])}) == 3
    assert keys_for(loss, (1, 2, 3), None, {}) == (jax.random.key(0), {})


def test_estimates_of_a_noisy_loss_depend_on_the_key():
    def noisy(w, x, key):
        return jnp.sum(w**2 * (x + jax.random.normal(key, x.shape)))

    trace = gf.curvature.hessian_trace(noisy, samples=2)
    first, again, other = (trace(jnp.ones(3), jnp.ones(3), key=jax.random.key(k)).value for k in (0, 0, 1))
    assert first == again != other
    fixed = jax.random.key(5)
    # A diagonal Hessian has the same `v . H v` for all signs: the loss gets its own key, the signs do not matter.
    expected = 2 * jnp.sum(1 + jax.random.normal(fixed, [3]))
    np.testing.assert_allclose(trace(jnp.ones(3), jnp.ones(3), fixed).value, expected, rtol=1e-6)
