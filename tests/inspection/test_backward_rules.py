"""Values inside backward rules (`jax.custom_vjp`), and what such rules log, against rules called by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.jaxpr.backward_rules import HAS_LOGS

needs_logs = pytest.mark.skipif(
    not HAS_LOGS, reason=f"jax {jax.__version__} has no jax.custom_vjp.defvjp_with_logs"
)


def clip_gradient(tap=True, key=None):
    """Return an identity whose backward rule scales the cotangent to at most the norm 1."""

    @jax.custom_vjp
    def clip(x, n):
        return x

    def backward(_, g):
        norm = jnp.sqrt(jnp.sum(g**2))
        norm = gf.tap(norm, "norm") if tap else norm
        scaled = g / jnp.maximum(norm, 1)
        return ((scaled, None), {key: norm}) if key else (scaled, None)

    define = clip.defvjp_with_logs if key else clip.defvjp
    define(lambda x, n: (x, None), backward)
    return lambda x: clip(x, 3)


def chain(clip, steps=3):
    """Return a loss that passes its gradient through `clip` in each iteration of a scan."""

    def loss(w, x):
        h, _ = jax.lax.scan(lambda h, _: (clip(jnp.sin(w * h)), None), x, None, length=steps)
        return jnp.sum(h**2)

    return loss


W, X = jnp.float32(1.7), jnp.array([0.3, -0.8, 2.0])


def norms_by_hand(w, x, steps=3):
    """Return the norms that the rule receives, by iteration."""
    states = [x]
    for _ in range(steps):
        states.append(jnp.sin(w * states[-1]))
    g, norms = 2 * states[-1], []
    for h in states[-2::-1]:
        norms.append(jnp.sqrt(jnp.sum(g**2)))
        g = g / jnp.maximum(norms[-1], 1) * w * jnp.cos(w * h)
    return jnp.stack(norms[::-1])


def test_a_value_in_the_rule_by_name_in_a_scan():
    loss = chain(clip_gradient())
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(W, X)
    inspection = jax.jit(gf.inspect(loss, keep="norm", stats="rms"))(W, X)
    expected = norms_by_hand(W, X)
    np.testing.assert_allclose(inspection["norm"].value, expected, rtol=1e-5)
    np.testing.assert_allclose(inspection["norm"].stats.rms, expected, rtol=1e-5)
    assert inspection["norm"].grad_stats is None
    assert inspection["norm"].site.source == "backward"
    np.testing.assert_allclose(inspection.value, value, rtol=1e-6)
    np.testing.assert_allclose(inspection.grads, grads[0], rtol=1e-5)
    np.testing.assert_allclose(inspection.input_grads[0], grads[1], rtol=1e-5)
    assert "norm" in str(inspection)
    assert inspection.to_dict()["sites"]["norm"]["rms"] == pytest.approx(expected.tolist(), rel=1e-5)


def test_under_vmap_and_in_a_batched_loss():
    clip = clip_gradient()
    loss = chain(clip, 1)
    batch = jnp.stack([X, 2 * X])
    each = jax.vmap(gf.inspect(loss, sites="norm", keep="norm", stats=()), (None, 0))(W, batch)
    expected = jnp.stack([norms_by_hand(W, x, 1) for x in batch])
    np.testing.assert_allclose(each["norm"].value, expected, rtol=1e-5)
    mean = gf.batch_mean(lambda w, x: jnp.sum(clip(w * x) ** 2))
    inspection = gf.inspect(mean, sites="norm", keep="norm", stats=())(W, batch)
    # One rule per example, of a mean over two.
    rms = jnp.sqrt(jnp.sum((W * batch) ** 2, axis=1))
    np.testing.assert_allclose(inspection["norm"].value, rms, rtol=1e-5)


def test_loops_in_the_rule_stand_behind_those_around_the_call():
    @jax.custom_vjp
    def f(x):
        return x

    def backward(_, g):
        return (jax.lax.map(lambda part: gf.tap(2 * part, "doubled"), g),)

    f.defvjp(lambda x: (x, None), backward)

    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda h, _: (f(w * h), None), x, None, length=2)[0])

    inspection = gf.inspect(loss, sites="doubled", keep="doubled", stats="max")(W, X)
    expected = np.array([[4 * 1.7] * 3, [2.0] * 3])
    np.testing.assert_allclose(inspection["doubled"].value, expected, rtol=1e-5)
    np.testing.assert_allclose(inspection["doubled"].stats.max, expected, rtol=1e-5)
    np.testing.assert_allclose(inspection.grads, jax.grad(loss)(W, X), rtol=1e-6)


def test_repeated_names_are_prefixed_by_the_scope_or_numbered():
    clip = clip_gradient()

    def loss(w, x):
        norm = gf.tap(jnp.sum(x * w), "norm")
        with jax.named_scope("first"):
            y = clip(w * x)
        return jnp.sum(clip(clip(jnp.sin(y)))) + norm

    inspection = gf.inspect(loss, stats="rms")(W, X)
    inside = [name for name in inspection if inspection[name].site.source == "backward"]
    assert inside == ["first/norm", "norm.1", "norm.2"]
    with pytest.raises(ValueError, match=r"there is no site 'norm.9'. Did you mean .*norm.1"):
        gf.inspect(loss, sites="norm.9")(W, X)


def test_a_rule_that_no_gradient_reaches_and_functions_without_a_backward_pass():
    clip = clip_gradient()
    loss = lambda w, x: jnp.sum(w * x) + jax.lax.stop_gradient(jnp.sum(clip(w * x)))  # noqa: E731
    assert gf.inspect(loss)(W, X)["norm"].stats.count == 0
    assert "norm" not in gf.sites(loss)(W, X).names
    with pytest.raises(ValueError, match="there is no site 'norm'"):
        gf.capture(loss, keep="norm")(W, X)


@needs_logs
def test_what_rules_log_is_in_the_inspection():
    loss = chain(clip_gradient(tap=False, key="clip/norm"))
    inspection = jax.jit(gf.inspect(loss, stats="rms"))(W, X)
    np.testing.assert_allclose(inspection.logs["clip/norm"], norms_by_hand(W, X), rtol=1e-5)
    np.testing.assert_allclose(inspection.grads, jax.grad(loss)(W, X), rtol=1e-5)
    assert gf.inspect(chain(clip_gradient()), stats="rms")(W, X).logs == {}


@needs_logs
def test_a_rule_that_logs_and_names():
    loss = chain(clip_gradient(key="logged"))
    inspection = gf.inspect(loss, sites="norm", keep="norm", stats=())(W, X)
    np.testing.assert_allclose(inspection.logs["logged"], norms_by_hand(W, X), rtol=1e-5)
    np.testing.assert_allclose(inspection["norm"].value, norms_by_hand(W, X), rtol=1e-5)
    mean = gf.batch_mean(lambda w, x: chain(clip_gradient(tap=False, key="k"), 1)(w, x))
    logged = gf.inspect(mean, stats="rms")(W, jnp.stack([X, X])).logs["k"]
    np.testing.assert_allclose(logged.ravel(), np.full(2, norms_by_hand(W, X, 1)[0] / 2), rtol=1e-5)
