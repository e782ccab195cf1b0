"""What a function may be called with and return, in every tool: as under `jax.value_and_grad`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.jaxpr import find_sites, trace

W = jnp.array([1.0, 2.0, 3.0])
X = np.array([1.0, -2.0, 0.5], np.float32)
MASK = np.array([True, False, True])
BATCH = np.stack([X, X + 1])


def masked(w, x, mask, scale, power=2):
    """Index by a numpy mask, and branch on a Python float: both need their values."""
    h = jnp.tanh(w * x)
    if scale > 1:
        h = h * scale
    return jnp.sum(h[mask] ** power)


def with_objects(w, x):
    return jnp.sum((w * x) ** 2), {"text": "text", "none": None, "class": dict, "n": 3, "h": w * x}


ARGS = (W, X, MASK, 2.0)
GRADS = jax.grad(masked, argnums=(0, 1))(*ARGS)

CONCRETE = {
    "inspect": lambda: gf.inspect(masked)(*ARGS).grads,
    "inspect by keyword": lambda: gf.inspect(masked)(W, X, scale=2.0, mask=MASK).grads,
    "nan_guard": lambda: gf.nan_guard(masked)(*ARGS)[1],
    "saliency": lambda: gf.attribution.saliency(lambda x, w: masked(w, x, *ARGS[2:]))(X, W),
    "fisher_vp": lambda: (
        gf.curvature.fisher_vp(lambda w, x, mask=MASK: masked(w, x, mask, 2.0))(W, GRADS[0], X[None])
        / jnp.vdot(GRADS[0], GRADS[0])
    ),
    "per_example_grads": lambda: gf.per_example.grads(lambda w, x: masked(w, x, *ARGS[2:]))(W, X[None])[0],
    "tracin": lambda: (
        gf.attribution.tracin(lambda w, x: masked(w, x, *ARGS[2:]))([W], X[None], X[None], 1.0)
        * GRADS[0]
        / jnp.vdot(GRADS[0], GRADS[0])
    ),
}


@pytest.mark.parametrize("name", CONCRETE)
def test_numbers_that_a_function_needs_stay_concrete(name):
    with jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(np.ravel(CONCRETE[name]()), GRADS[0], rtol=1e-5)


@pytest.mark.slow
def test_numbers_that_a_function_needs_stay_concrete_beside_those_that_are_differentiated():
    """Floating numpy arrays have input gradients still, names go with the right leaf, data stay data to sites."""
    inspection = gf.inspect(masked)(*ARGS)
    np.testing.assert_allclose(inspection.input_grads[0], GRADS[1], rtol=1e-6)
    assert inspection.input_grads[1:] == (None, None)
    assert [
        c.name for c in gf.backprop(lambda w, scale, x: masked(w, x, MASK, scale))(W, 2.0, X)[-1].outgoing
    ] == [
        "w",
        "x",
    ]
    assert str(gf.nan_origin(masked)(*ARGS)).startswith("value 5.597")
    assert gf.check_grads(masked)(*ARGS)
    np.testing.assert_allclose(
        gf.curvature.hvp(masked)(W, W, *ARGS[1:]), jax.hessian(masked)(*ARGS) @ W, rtol=1e-5
    )
    landscape = gf.curvature.loss_landscape(masked, dims=1, points=3)(*ARGS)
    np.testing.assert_allclose(landscape.losses[1], masked(*ARGS), rtol=1e-6)

    def lookup(params, tokens, n):
        return jnp.sum(params["embed"][np.unique(tokens)][:n] @ params["head"])

    params = {"embed": jnp.ones([5, 3]), "head": jnp.ones([3, 2])}
    program = trace(lookup, params, np.array([1, 3, 3]), np.int64(2))
    assert program.fixed_data
    assert [site.name for site in find_sites(program)] == ["embed", "head"]
    # An array that was traced by the caller cannot be had: jax's own error.
    with pytest.raises((jax.errors.ConcretizationTypeError, IndexError)):
        jax.jit(gf.inspect(masked))(*ARGS)


def text_of(aux):
    return {name: aux[name] for name in ("text", "none", "class")}


AUX = {
    "inspect": lambda: gf.inspect(with_objects)(W, X).aux,
    "capture": lambda: gf.capture(with_objects)(W, X).output[1],
    "backprop": lambda: gf.backprop(with_objects)(W, X).aux,
    "nan_guard": lambda: gf.nan_guard(with_objects)(W, X)[0][1],
    "patch": lambda: gf.patch(with_objects, {"params": 0.0})(W, X)[1],
    "per_example_norms": lambda: gf.per_example.norms(with_objects)(W, BATCH).aux,
    "clipped_grads": lambda: gf.per_example.clipped_grads(with_objects, 1.0)(W, BATCH).aux,
    "batch_mean": lambda: gf.batch_mean(with_objects)(W, BATCH)[1],
    "inspect batch_mean": lambda: gf.inspect(gf.batch_mean(with_objects))(W, BATCH).aux,
}


@pytest.mark.parametrize("name", AUX)
def test_aux_that_is_not_an_array_is_returned_as_it_is(name):
    aux = AUX[name]()
    assert text_of(aux) == {"text": "text", "none": None, "class": dict}
    assert int(np.ravel(aux["n"])[0]) == 3
    assert aux["h"].shape in ((3,), (2, 3))


@pytest.mark.slow
def test_aux_that_is_not_an_array_is_passed_over_where_there_is_no_aux():
    H = jnp.diag(2 * X**2)
    np.testing.assert_allclose(gf.curvature.hvp(with_objects)(W, W, X), H @ W, rtol=1e-6)
    np.testing.assert_allclose(gf.curvature.sharpness(with_objects, 0.1)(W, X).value, 8.0, rtol=1e-5)
    assert gf.check_grads(with_objects)(W, X)
    assert gf.nan_origin(with_objects)(W, X).ok
    assert "params" in gf.sites(with_objects)(W, X).names
    assert gf.curvature.loss_landscape(with_objects, dims=1, points=3)(W, X).losses.shape == (3,)
    G = 2 * np.asarray(W)[None] * BATCH**2
    np.testing.assert_allclose(gf.per_example.grads(with_objects)(W, BATCH), G, rtol=1e-6)
    np.testing.assert_allclose(
        gf.attribution.tracin(with_objects)([W], BATCH, BATCH, 1.0), G @ G.T, rtol=1e-5
    )
    assert gf.per_example.noise_scale(with_objects)(W, BATCH).variance.shape == ()


def test_calls_by_keyword_alone():
    def loss(params, x):
        return jnp.sum((params * x) ** 2)

    expected = jax.grad(loss)(W, X)
    np.testing.assert_allclose(gf.nan_guard(loss)(params=W, x=X)[1], expected)
    assert gf.nan_origin(loss)(x=X, params=W * jnp.inf).nonfinite_grads == ("params",)
    np.testing.assert_allclose(gf.inspect(loss)(params=W, x=X).grads, expected)
    assert [leaf.name for leaf in gf.check_grads(loss)(x=X, params=W).leaves] == ["params", "x"]
    assert gf.backprop(loss)(x=X, params=W)[-1].outgoing[0].name == "params"
    with pytest.raises(TypeError, match="expected the parameters as the first argument"):
        gf.nan_guard(loss)(x=X)


def test_keywords_of_the_loss_are_its_own_under_curvature():
    def loss(w, vector=1.0, params=1.0, batch=1.0, key=None):
        return jnp.sum(w**2) * vector * params * batch

    names = {"vector": 2.0, "params": 3.0, "batch": 5.0, "key": jax.random.key(0)}
    np.testing.assert_allclose(gf.curvature.hvp(loss)(W, W, **names), 60 * W, rtol=1e-6)
    np.testing.assert_allclose(gf.curvature.sharpness(loss, 0.1)(W, **names).value, 60.0, rtol=1e-5)
    one = lambda w, x, vector, params: jnp.sum(w * x) * vector * params  # noqa: E731
    expected = 36 * BATCH.T @ (BATCH @ W) / 2
    np.testing.assert_allclose(
        gf.curvature.fisher_vp(one)(W, W, BATCH, vector=2.0, params=3.0), expected, rtol=1e-5
    )


def test_nan_origin_under_jax_debug_nans():
    def loss(w):
        return jnp.sum(jnp.log(w) * 0.0)

    with jax.debug_nans(True), jax.debug_infs(True):
        found = gf.nan_origin(loss)(jnp.array([1.0, 0.0]))
    assert (found.nan.operation, found.inf.operation) == ("mul", "log")
    assert found.nan.element == (1,)


def in_a_ref(w, x):
    ref = jax.new_ref(jnp.zeros(3))
    ref[...] = w * x

    def step(carry, i):
        ref[...] += jnp.log(ref[...])
        return carry, None

    jax.lax.scan(step, 0, None, length=2)
    return jnp.sum(ref[...])


@pytest.mark.slow
def test_nan_tools_read_mutable_arrays():
    x = jnp.ones(3)
    fine = gf.nan_origin(in_a_ref)(W, x)
    assert fine.ok
    np.testing.assert_allclose(fine.value, in_a_ref(W, x), rtol=1e-6)
    _, grads, record = jax.jit(gf.nan_guard(in_a_ref))(W, x)
    assert bool(record.ok)
    np.testing.assert_allclose(grads, jax.grad(in_a_ref)(W, x), rtol=1e-6)
    found = gf.nan_origin(in_a_ref)(W, x.at[1].set(0.0))
    assert (found.inf.operation, found.inf.iteration, found.inf.element) == ("log", (0,), (1,))
    assert found.nan.operation == "log"
    assert found.nan.iteration == (1,)
    with pytest.raises(TypeError, match="without mutable arrays"):
        gf.backprop(in_a_ref)(W, x)


EMPTY = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "none": jnp.zeros([0, 3]), "rows": jnp.zeros([2, 0])}
POINTS = jax.random.normal(jax.random.key(0), (4, 2))


def beside_empty(params, x):
    return (
        jnp.sum(jnp.tanh(params["w"] @ x) ** 2)
        + jnp.sum(params["none"] ** 2)
        + jnp.sum(jnp.sin(params["rows"]))
    )


EMPTIES = {
    "inspect": lambda f: gf.inspect(f, stats=["rms", "histogram"])(EMPTY, POINTS).grads,
    "nan_guard": lambda f: gf.nan_guard(f)(EMPTY, POINTS)[1],
    "hvp": lambda f: gf.curvature.hvp(f)(EMPTY, EMPTY, POINTS),
    "fisher_vp": lambda f: gf.curvature.fisher_vp(beside_empty)(EMPTY, EMPTY, POINTS),
    "hessian_diagonal": lambda f: gf.curvature.hessian_diagonal(f, samples=2)(EMPTY, POINTS).value,
    "per_example_grads": lambda f: jax.tree.map(
        lambda g: g[0], gf.per_example.grads(beside_empty)(EMPTY, POINTS)
    ),
    "per_example_norms": lambda f: gf.per_example.norms(beside_empty)(EMPTY, POINTS).grads,
    "clipped_grads": lambda f: gf.per_example.clipped_grads(beside_empty, 1.0)(EMPTY, POINTS).grads,
}


@pytest.mark.parametrize("name", EMPTIES)
def test_empty_leaves_have_empty_gradients_in(name):
    grads = EMPTIES[name](gf.batch_mean(beside_empty))
    assert gf.shapes(grads) == gf.shapes(EMPTY)
    assert jnp.all(jnp.isfinite(grads["w"]))


@pytest.mark.slow
def test_empty_leaves_do_not_count():
    mean = gf.batch_mean(beside_empty)
    alone = lambda w: mean({**EMPTY, "w": w.reshape(2, 2)}, POINTS)  # noqa: E731
    values = jnp.linalg.eigvalsh(jax.hessian(alone)(EMPTY["w"].ravel()))
    np.testing.assert_allclose(
        gf.curvature.hessian_eigs(mean, k=4, which="smallest")(EMPTY, POINTS).values,
        values,
        rtol=1e-4,
        atol=1e-6,
    )
    assert gf.check_grads(mean)(EMPTY, POINTS)
    assert gf.nan_origin(mean)(EMPTY, POINTS).ok
    for sizes in (gf.curvature.hessian_spectrum, gf.curvature.hessian_eigs):
        with pytest.raises(ValueError, match=r"0"):
            sizes(lambda w: jnp.sum(w**2))(jnp.zeros([0]))
