"""`patch(f, backward=...)`: gradients edited on their way, against formulas, finite differences and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

import gradfn as gf
from gradfn.circuits import Using
from gradfn.inspection import capture, inspect, patch, sites

X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
PARAMS = {"W": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4), "V": jnp.linspace(1.0, 2.0, 4)}


def f(params, x):
    a = checkpoint_name(jnp.tanh(x @ params["W"]), "a")
    return jnp.sum(jnp.sin(a @ params["V"]))


def by_hand(edit):
    """Gradients of `f` with an edited cotangent of `a`: [2, 4]."""
    a = jnp.tanh(X @ PARAMS["W"])
    outer = jnp.cos(a @ PARAMS["V"])
    cotangent = edit(jnp.outer(outer, PARAMS["V"]))
    return {"W": X.T @ (cotangent * (1 - a**2)), "V": outer @ a}, cotangent


def assert_close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


EDITS = {
    "scale": lambda g: 3 * g,
    "reverse": lambda g: -g,
    "clip": lambda g: g.clip(-0.1, 0.1),
    "stop": 0.0,
    "replace": jnp.arange(8.0).reshape(2, 4),
    "broadcast": jnp.arange(4.0),
    "integer": 2,
}


@pytest.mark.parametrize("kind", EDITS)
def test_each_kind_of_edit_gives_the_hand_derived_gradients(kind):
    edit = EDITS[kind]
    function = edit if callable(edit) else lambda g: jnp.broadcast_to(edit, g.shape)
    expected, cotangent = by_hand(function)
    patched = patch(f, backward={"a": edit})
    value, grads = jax.jit(jax.value_and_grad(patched))(PARAMS, X)
    assert_close(value, f(PARAMS, X))
    assert_close(grads, expected)
    inspection = inspect(patched, keep="a")(PARAMS, X)
    assert_close(inspection["a"].grad, cotangent)
    assert_close(inspection.grads, expected)
    assert list(inspection) == sites(f)(PARAMS, X).names


def test_a_reversed_gradient_is_that_of_the_negated_function():
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (PARAMS, X))
        # All paths from W go through a.
        grad = jax.grad(patch(f, backward={"a": lambda g: -2 * g}))(params, x)["W"]
        step = 1e-6
        for i, k in np.ndindex(3, 4):
            ends = [
                f(params | {"W": params["W"] + s * np.eye(12)[4 * i + k].reshape(3, 4)}, x)
                for s in (step, -step)
            ]
            np.testing.assert_allclose(
                grad[i, k], -2 * (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-9
            )


def test_the_same_as_hooks_on_tensors_of_pytorch():
    torch = pytest.importorskip("torch")
    net = gf.mlp([3, 4, 4, 2], activation="tanh")
    params = net.init(jax.random.key(0))
    leaves = {name: torch.tensor(np.array(leaf), requires_grad=True) for name, leaf in params.items()}
    x = torch.tensor(np.array(X))
    a1 = torch.tanh(x @ leaves["W1"].T + leaves["b1"])
    a1.register_hook(lambda g: g.clamp(-0.05, 0.05))
    z2 = a1 @ leaves["W2"].T + leaves["b2"]
    z2.register_hook(lambda g: -3 * g)
    out = torch.tanh(z2) @ leaves["W3"].T + leaves["b3"]
    (out**2).sum().backward()

    def loss(params, x):
        return jnp.sum(jax.vmap(net.apply, (None, 0))(params, x) ** 2)

    edits = {"a1": lambda g: g.clip(-0.05, 0.05), "z2": lambda g: -3 * g}
    ours = jax.grad(patch(loss, backward=edits))(params, X)
    for name, leaf in leaves.items():
        np.testing.assert_allclose(ours[name], leaf.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_several_edits_of_a_site_apply_in_order_after_those_of_its_value():
    def g(x):
        return jnp.sum(checkpoint_name(3 * x, "a") ** 2)

    edits = {"a": lambda a: 5 * a}, {"a": lambda g: g + 1, "*": lambda g: 2 * g}
    value, grad = jax.value_and_grad(patch(g, edits[0], backward=edits[1]))(jnp.array([1.0]))
    # a = 15; its cotangent 30 becomes 2 * (30 + 1), then meets the edit of the value and the 3.
    assert float(value) == 225.0
    np.testing.assert_allclose(grad, [2 * 31 * 5 * 3])


def loop(w, x):
    def step(c, _):
        return checkpoint_name(jnp.sin(c * w), "c"), None

    return jnp.sum(jax.lax.scan(step, x, None, length=3)[0])


def chain(w, x, edits):
    """The gradient of `loop` with respect to w by the chain rule, with each iteration's cotangent edited."""
    carry = [x]
    for _ in range(3):
        carry.append(np.sin(carry[-1] * w))
    g, total = np.ones_like(x), 0.0
    for before, edit in list(zip(carry[:-1], edits, strict=True))[::-1]:
        g = edit(g) * np.cos(before * w)
        total, g = total + np.sum(g * before), g * w
    return total


def test_in_a_scan_a_function_for_all_iterations_or_an_array_for_each():
    w, x = 1.3, np.array([0.3, 0.7])
    doubled = jax.grad(patch(loop, backward={"c": lambda g: 2 * g}))(w, x)
    np.testing.assert_allclose(doubled, chain(w, x, [lambda g: 2 * g] * 3), rtol=1e-5)
    each = np.arange(6.0).reshape(3, 2)
    replaced = jax.jit(jax.grad(patch(loop, backward={"c": each})))(w, x)
    expected = chain(w, x, [lambda _, row=row: row for row in each])
    np.testing.assert_allclose(replaced, expected, rtol=1e-5)
    inspection = inspect(patch(loop, backward={"c": each}), keep="c")(w, x)
    np.testing.assert_array_equal(inspection["c"].grad, each)


def test_under_vmap_remat_cond_and_a_second_differentiation():
    half = patch(f, backward={"a": lambda g: g / 2})
    expected = by_hand(lambda g: g / 2)[0]["W"]
    rows = jax.vmap(lambda x: jax.grad(half)(PARAMS, x[None])["W"])(X)
    assert_close(rows.sum(0), expected)
    remat = patch(jax.checkpoint(f), backward={"a": lambda g: g / 2})
    assert_close(jax.grad(remat)(PARAMS, X)["W"], expected)

    def either(params, x):
        return jax.lax.cond(jnp.sum(x) > 100, lambda: 0.0, lambda: f(params, x))

    assert_close(jax.grad(patch(either, backward={"a": lambda g: g / 2}))(PARAMS, X)["W"], expected)

    def cube(x):
        return checkpoint_name(x**3, "a")

    # The first derivative is 3 x^2 times the edited cotangent, 2.
    second = jax.grad(jax.grad(patch(cube, backward={"a": lambda g: 2 * g})))(2.0)
    np.testing.assert_allclose(second, 24.0)


def test_in_a_shard_map():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def sharded(params, x):
        local = jax.shard_map(
            lambda x: jax.lax.psum(f(params, x), "d"), mesh=mesh, in_specs=P("d"), out_specs=P()
        )
        return local(x)

    for edit in (lambda g: -g, jnp.ones(4)):
        function = edit if callable(edit) else jnp.ones_like
        grads = jax.jit(jax.grad(patch(sharded, backward={"a": edit})))(PARAMS, X)
        assert_close(grads, by_hand(function)[0])


def test_what_the_edit_closes_over_may_be_differentiated():
    def adversarial(params, x, strength):
        return patch(f, backward={"a": lambda g: -strength * g})(params, x)

    inspection = jax.jit(inspect(adversarial))(PARAMS, X, jnp.float32(3.0))
    assert_close(inspection.grads, by_hand(lambda g: -3 * g)[0])
    # The output does not depend on it ...
    assert float(inspection.input_grads[1]) == 0.0
    # ... but the gradient does.
    slope = jax.grad(lambda s: jnp.sum(jax.grad(adversarial)(PARAMS, X, s)["W"]))(3.0)
    np.testing.assert_allclose(slope, jnp.sum(by_hand(lambda g: -g)[0]["W"]), rtol=1e-5)


def test_an_edit_of_a_gradient_that_uses_a_value():
    guided = patch(f, backward={"a": Using("a", lambda g, a: jnp.where(a > 0, g, 0))})
    mask = jnp.tanh(X @ PARAMS["W"]) > 0
    assert_close(jax.grad(guided)(PARAMS, X), by_hand(lambda g: jnp.where(mask, g, 0))[0])


def test_half_precision_keeps_its_type():
    def g(x):
        return checkpoint_name(x.astype(jnp.bfloat16), "h").sum().astype(jnp.float32)

    grad = jax.grad(patch(g, backward={"h": lambda g: g.astype(jnp.float32) * 0.5}))(jnp.ones(2))
    np.testing.assert_array_equal(grad, [0.5, 0.5])


def test_forward_statistics_and_values_stay():
    captured = capture(patch(f, backward={"a": 0.0}), keep="a")(PARAMS, X)
    np.testing.assert_array_equal(captured["a"].value, jnp.tanh(X @ PARAMS["W"]))


def test_errors_say_where_there_is_no_gradient_and_what_fits():
    def g(x):
        i = checkpoint_name(jnp.argmax(x), "i")
        y = jax.lax.while_loop(lambda y: y < 10, lambda y: checkpoint_name(y * 2, "y"), x[0])
        return x[i] + y

    x = jnp.array([1.0, 2.0])
    with pytest.raises(ValueError, match=r"site 'i' .* has no gradient to edit: it is int32"):
        patch(g, backward={"i": 0.0})(x)
    with pytest.raises(ValueError, match=r"site 'y' .* has no gradient to edit: it is inside a while loop"):
        patch(g, backward={"y": 0.0})(x)
    with pytest.raises(ValueError, match=r"site 'a' has shape float32\[2, 4\], got \[2\]"):
        patch(f, backward={"a": lambda g: g.sum(1)})(PARAMS, X)
    with pytest.raises(
        TypeError, match="the gradient at site 'a' is float32, which cannot represent complex64"
    ):
        patch(f, backward={"a": lambda g: g.astype(jnp.complex64)})(PARAMS, X)
    with pytest.raises(ValueError, match="patch: there is no site 'b'"):
        patch(f, backward={"b": 0.0})(PARAMS, X)
    with pytest.raises(TypeError, match="patch: expected a dict of edits by the name of a site, got str"):
        patch(f, "a")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: patch(f, backward={"a": 0.0})(PARAMS, x), (X,), (X,))
