"""Gradients against central differences: right ones pass, a wrong rule is named."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import gradfn as gf
from gradfn.inspection import check_grads


def wrong(factor):
    """An exponential whose rule is off by a factor."""

    @jax.custom_vjp
    def f(x):
        return jnp.exp(x)

    f.defvjp(lambda x: (jnp.exp(x), jnp.exp(x)), lambda y, g: (factor * y * g,))
    return f


def loss(p, x, exp=jnp.exp):
    h = exp(jnp.sin(p["layers"][0]["W"] @ x))
    return jnp.sum(jnp.tanh(p["layers"][1]["W"] * h + p["b"]))


P = {
    "layers": [{"W": jnp.linspace(-1, 1, 6).reshape(2, 3)}, {"W": jnp.array([0.5, -1.5])}],
    "b": jnp.zeros(2),
}
X = jnp.array([0.3, -0.2, 0.9])


def test_right_gradients_pass_in_float64():
    checked = check_grads(loss)(P, X)
    assert checked
    assert checked.precision == "float64"
    assert [leaf.name for leaf in checked.leaves] == ["b", "layers/0/W", "layers/1/W", "x"]
    assert all(leaf.error < 1e-7 for leaf in checked.leaves)
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("factor", [2.0, 1.0001, 0.0, -1.0, float("nan")])
def test_a_wrong_rule_names_the_leaves_behind_it(factor):
    checked = check_grads(lambda p, x: loss(p, x, wrong(factor)), argnums=0)(P, X)
    assert not checked
    assert checked.off == ["layers/0/W"]
    text = str(checked)
    assert "incorrect: layers/0/W" in text
    assert text.count("INCORRECT") == 1
    if factor != factor:
        assert "nan_origin" in text
    else:
        leaf = next(leaf for leaf in checked.leaves if not leaf.ok)
        assert leaf.gradient == pytest.approx(factor * leaf.difference, rel=1e-6)


def test_integers_keys_aux_and_closed_over_float32():
    constant = jnp.array([1.0, 2.0, 3.0])

    def f(p, ids, key, flag):
        noise = jax.random.normal(key, (3,))
        return jnp.sum(p["w"][ids] * constant * noise) * p["n"], {"flag": flag}

    p = {"w": jnp.arange(4.0), "n": 3, "f": jnp.sin}
    checked = check_grads(f)(p, jnp.array([2, 0, 2]), jax.random.key(0), True)
    assert checked.ok
    assert [leaf.name for leaf in checked.leaves] == ["w"]


def test_a_kink_is_no_error():
    checked = check_grads(lambda p, x: jnp.sum(jax.nn.relu(p["W"] @ x)))({"W": jnp.zeros((2, 3))}, X)
    of_W = checked.leaves[0]
    assert of_W.ok
    assert "kink" in of_W.note


def test_a_gradient_that_is_zero_but_for_rounding():
    def f(p):  # a softmax does not notice a shift
        return 1e3 * jnp.sum(jax.nn.log_softmax(X + p["shift"])[:2])

    assert check_grads(f)({"shift": jnp.array(2.0)}).ok


def test_numbers_of_any_size():
    def f(p):
        return (
            jnp.sum(jnp.log(p["small"])) + jnp.sum(jnp.sin(p["large"] / 1e6)) + jnp.sum(jnp.tanh(p["tiny"]))
        )

    checked = check_grads(f)(
        {"small": jnp.full(3, 1e-6), "large": jnp.full(3, 1e6), "tiny": jnp.full(3, 1e-9)}
    )
    assert checked.ok
    assert not any(leaf.note for leaf in checked.leaves)


def test_what_is_cast_down_is_checked_at_its_own_precision():
    def f(p, exp=jnp.exp):
        return jnp.sum(exp(p["w"].astype(jnp.float32)))  # HERE

    checked = check_grads(f)({"w": X})
    assert checked.ok
    assert checked.precision.startswith("float32, at ")
    assert "test_check.py" in checked.precision
    assert check_grads(lambda p: f(p, wrong(1.5)))({"w": X}).off == ["w"]


@pytest.mark.slow
def test_what_cannot_be_traced_in_float64_is_checked_in_float32():
    def f(w, x):
        start = jnp.zeros(3, jnp.float32)
        return jnp.sum(jax.lax.scan(lambda c, w: (c + jnp.sin(w * x), None), start, w)[0])

    checked = check_grads(f)(jnp.array([0.5, 1.5]), X)
    assert checked.ok
    assert "float64 gives: scan" in checked.precision


@pytest.mark.slow
def test_trees_of_many_leaves_are_checked_as_one_until_that_is_off():
    params = {f"w{i}": jnp.array([0.1 * i, 1.0]) for i in range(70)}

    def f(p, exp):
        return sum(jnp.sum(exp(w) if name == "w13" else jnp.sin(w)) for name, w in p.items())

    checked = check_grads(lambda p: f(p, jnp.exp))(params)
    assert checked.ok
    assert [leaf.name for leaf in checked.leaves] == ["all leaves"]
    checked = check_grads(lambda p: f(p, wrong(1.5)))(params)
    assert checked.off == ["w13"]
    assert len(checked.leaves) == 70


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "gelu"])
def test_nets(activation):
    net = gf.mlp([20, 30, 30, 5], activation)
    batch = (jax.random.normal(jax.random.key(1), [8, 20]), jnp.arange(8) % 5)
    checked = check_grads(gf.batch_mean(gf.classification_loss(net)))(net.init(jax.random.key(0)), batch)
    assert checked.ok, checked
    assert len(checked.leaves) == 7


@pytest.mark.slow
def test_complex_leaves():
    def f(z):
        return jnp.sum(jnp.abs(jnp.exp(1j * z) * z) ** 2)

    assert check_grads(f)(jnp.array([0.5 + 1.0j, -0.3j])).ok


def test_errors():
    with pytest.raises(TypeError, match="check_grads: the function must return a floating scalar"):
        check_grads(jnp.sin)(X)
    with pytest.raises(TypeError, match="no floating array"):
        check_grads(lambda n: 1.0)(jnp.arange(3))
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda x: check_grads(jnp.sum)(x).ok)(X)


@jax.custom_vjp
def halved(x):
    return x**2


halved.defvjp(lambda x: (x**2, x), lambda x, g: (x * g,))


@jax.custom_vjp
def looped(x):
    return jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] * x), (0, jnp.ones_like(x)))[1]


looped.defvjp(lambda x: (looped(x), x), lambda x, g: (2 * x * g,))


def stopped(params, x):
    target = jax.lax.stop_gradient(params["v"])  # this one
    return jnp.sum(jax.nn.softmax(params["w"] * x) ** 2) + jnp.sum(target * params["w"] * looped(x))


def stopped_in_a_scan(params, x):
    def step(carry, _):
        return carry * jax.lax.stop_gradient(params["v"]), None  # this one

    return jnp.sum(jax.jit(lambda: jax.lax.scan(step, params["w"], None, length=2)[0])() * x)


def own_rule(params, x):
    return jnp.sum(halved(params["v"])) + jnp.sum(jax.nn.softmax(params["w"]) * x)  # this one


def rounded(params, x):
    return jnp.sum(jnp.round(params["v"] * 1e7)) + jnp.sum(params["w"] * x)  # this one


CUT = {
    stopped: "stop_gradient, at ",
    stopped_in_a_scan: "stop_gradient, at ",
    own_rule: "the rule of custom_vjp halved is not its derivative, at ",
    rounded: "the gradient of round is zero, at ",
}


@pytest.mark.parametrize("f", CUT, ids=lambda f: f.__name__)
def test_a_gradient_that_is_off_names_what_cuts_it(f):
    params = {"v": jnp.array([1.5, 2.5, 0.7]), "w": jnp.array([1.0, -0.4, 2.0])}
    checked = check_grads(f)(params, jnp.array([0.3, 1.1, 0.8]))
    assert checked.off == ["v"]
    (leaf,) = [leaf for leaf in checked.leaves if not leaf.ok]
    lines = Path(__file__).read_text().splitlines()
    line = next(
        n for n, text in enumerate(lines, 1) if "# this one" in text and n >= f.__code__.co_firstlineno
    )
    assert leaf.note.startswith(CUT[f])
    assert f"test_check.py:{line}" in leaf.note
    assert leaf.note.count(" at ") == 1
