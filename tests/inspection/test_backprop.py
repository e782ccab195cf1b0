"""The backward pass step by step, and the same by the chain rule written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import gradfn as gf
from gradfn.inspection import backprop, chain_rule

W = jnp.array([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]])
X = jnp.array([1.0, -2.0, 0.5])


def loss(p, x):
    h = jnp.tanh(p["W"] @ x)
    return jnp.sum(h * h * p["scale"])


def test_every_step_of_a_small_function_by_hand():
    p = {"W": W, "scale": jnp.array([2.0, 3.0])}
    backward = backprop(loss, keep=True)(p, X)
    assert float(backward.value) == pytest.approx(float(loss(p, X)))
    assert [s.operation for s in backward] == ["reduce_sum", "mul", "mul", "tanh", "dot_general"]
    ones, scaled, squared, tanh, dot = backward
    z = W @ X
    h = jnp.tanh(z)
    dh = 2 * h * p["scale"]
    dz = dh * (1 - h**2)
    np.testing.assert_allclose(ones.incoming[0].value, 1.0)
    assert [c.name for c in scaled.outgoing] == ["", "scale"]
    np.testing.assert_allclose(scaled.outgoing[1].value, h * h, rtol=1e-6)
    # Both uses of h have a cotangent of their own; what comes in at tanh is their sum.
    np.testing.assert_allclose([c.value for c in squared.outgoing], [dh / 2, dh / 2], rtol=1e-6)
    np.testing.assert_allclose(tanh.incoming[0].value, dh, rtol=1e-6)
    np.testing.assert_allclose(tanh.outgoing[0].value, dz, rtol=1e-5)  # 1 - h² cancels
    assert {c.name: c.shape for c in dot.outgoing} == {"W": (2, 3), "x": (3,)}
    by_name = {c.name: c for c in dot.outgoing}
    np.testing.assert_allclose(by_name["W"].value, jax.grad(loss)(p, X)["W"], rtol=1e-6)
    np.testing.assert_allclose(by_name["x"].value, W.T @ dz, rtol=1e-5)
    assert by_name["x"].norm == pytest.approx(float(jnp.linalg.norm(W.T @ dz)))
    assert tanh.factor == pytest.approx(float(jnp.linalg.norm(dz) / jnp.linalg.norm(dh)))
    assert dot.factor == pytest.approx(by_name["x"].norm / float(jnp.linalg.norm(dz)))  # W does not count
    lines = [int(s.line.split(":")[1].split(" ")[0]) for s in backward]
    first = loss.__code__.co_firstlineno
    assert lines == [first + 2, first + 2, first + 2, first + 1, first + 1]


def test_sorted_and_printed():
    backward = backprop(loss)({"W": W, "scale": jnp.ones(2)}, X)
    factors = [s.factor for s in backward.sorted()]
    assert factors == sorted(s.factor for s in backward)
    assert len(backward) == len(backward.steps) == 5
    assert backward[0].incoming[0].value is None
    text = str(backward)
    assert text == str(backward.steps)
    assert "test_backprop.py" in text
    assert list(backward.to_dataframe()["gradient of"]) == ["", "scale", "", "", "W, x"]
    assert text.index("reduce_sum") < text.index("tanh")


def test_long_tables_keep_what_changes_the_gradient_and_put_iterations_together(monkeypatch):
    def f(w, x):
        def layer(h, _):
            return jnp.sin(jnp.sin(h * w)) + 0.1, None

        return jnp.sum(jax.lax.scan(layer, x, None, length=40)[0])

    backward = backprop(f)(jnp.float32(0.9), jnp.ones(3))
    assert len(backward.table(rows=None).rows) == len(backward) == 161
    folded = backward.table().to_dataframe().set_index("operation")
    assert list(folded.index) == ["reduce_sum", "add[0:40]", "sin[0:40]", "sin[0:40]", "mul[0:40]"]
    first_sin = [s for s in backward if s.operation == "sin"][::2]
    shown = folded.loc["sin[0:40]"].iloc[0]
    np.testing.assert_allclose(shown["×"], np.exp(np.mean(np.log([s.factor for s in first_sin]))), rtol=1e-6)
    assert shown["norm in"] == first_sin[0].incoming[0].norm
    assert shown["norm out"] == first_sin[-1].outgoing[0].norm
    few = backward.table(rows=3)
    assert "add[0:40]" not in str(few)  # it leaves the gradient as it is
    assert "2 of 5 rows are not shown: steps.table(rows=None) lists them" in " ".join(str(few).split())
    for width in (60, 80, 120, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        assert max(map(len, str(backward).splitlines())) <= width


def test_steps_of_a_scan_carry_their_iteration():
    def f(w, x):
        def layer(x, w):
            with jax.named_scope("layer"):
                return checkpoint_name(jnp.sin(w * x), "h"), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, w)[0])

    w = jnp.array([0.5, 1.5, 2.5])
    steps = backprop(f, keep=True)(w, X).steps
    inside = [(s.operation, s.iteration) for s in steps if s.iteration]
    assert inside == [(name, (i,)) for i in (2, 1, 0) for name in ("name h", "sin", "mul")]
    assert all(s.scope == "layer" for s in steps if s.iteration)
    of_w = [c.value for s in steps if s.operation == "mul" for c in s.outgoing if c.name == "w"]
    np.testing.assert_allclose(of_w[::-1], jax.grad(f)(w, X), rtol=1e-5)


@pytest.mark.slow
def test_nested_scans_jit_cond_and_vmap():
    def f(w, x):
        def outer(x, row):
            def inner(x, w):
                return jax.jit(lambda w, x: jnp.cos(w * x))(w, x), None

            return jax.lax.scan(inner, x, row)[0], None

        y = jax.lax.scan(outer, x, w)[0]
        y = jax.lax.cond(y[0] < 5, lambda y: 2 * y, lambda y: jnp.exp(y), y)
        return jnp.mean(jax.vmap(lambda y: y**3)(y))

    w = jnp.linspace(0.5, 1.5, 6).reshape(2, 3)
    backward = backprop(f, keep=True)(w, X)
    operations = {s.operation for s in backward}
    assert "exp" not in operations  # the branch that did not run
    assert {"integer_pow", "mul", "cos"} <= operations
    turns = [s.iteration for s in backward if s.operation == "cos"]
    assert turns == [(i, j) for i in (1, 0) for j in (2, 1, 0)]
    of_w = [c.value for s in backward for c in s.outgoing if c.name == "w"]
    np.testing.assert_allclose(np.array(of_w[::-1]).reshape(2, 3), jax.grad(f)(w, X), rtol=1e-5)


def test_custom_derivatives_are_one_step():
    @jax.custom_vjp
    def halved(x):
        return jnp.exp(jnp.sin(x))

    halved.defvjp(lambda x: (halved(x), None), lambda _, g: (0.5 * g,))
    steps = backprop(lambda x: jnp.sum(jax.nn.relu(halved(x))))(X).steps
    assert [s.operation for s in steps] == ["reduce_sum", "custom_jvp relu", "custom_vjp halved"]
    assert steps[-1].factor == 0.5


@pytest.mark.slow
def test_what_has_no_influence_and_what_reaches_no_loss_is_left_out():
    def f(p, x, ids, key):
        noise = jnp.sin(jax.random.normal(key, x.shape))
        unused = jnp.exp(p["w"])
        dead = jax.lax.stop_gradient(jnp.cos(p["w"]))
        return jnp.sum(p["w"][ids] * noise * dead * jnp.sign(x)), {"unused": unused}

    p = {"w": X, "n": 3, "f": jnp.tanh}
    backward = backprop(f)(p, X, jnp.array([2, 0, 1]), jax.random.key(0))
    operations = [s.operation for s in backward]
    assert not {"exp", "cos", "sin"} & set(operations)
    assert "gather" in operations
    sign = next(s for s in backward if s.operation == "sign")
    assert sign.outgoing == ()
    assert sign.factor == 0.0
    assert backward.aux["unused"].shape == (3,)


def test_inside_jit_and_small_gradients():
    @jax.jit
    def both(x):
        backward = backprop(lambda x: jnp.sum(1e-25 * jnp.sin(x)))(x)
        assert "being traced" in str(backward)
        return backward

    backward = both(X)
    norm = next(s for s in backward if s.operation == "sin").incoming[0].norm
    assert norm == pytest.approx(1e-25 * 3**0.5, rel=1e-5)  # its square is 0 in float32


def test_errors():
    with pytest.raises(TypeError, match="backprop: the function must return a floating scalar"):
        backprop(jnp.sin)(X)
    with pytest.raises(TypeError, match="no floating array"):
        backprop(lambda n: 1.0)(jnp.arange(3))


# ---- the chain rule by hand


def network(sizes, cost):
    output = None if cost == "cross_entropy" else "sigmoid"
    net = gf.mlp(sizes, output=output)
    rng = np.random.default_rng(0)
    params = {n: jnp.array(rng.normal(size=w.shape) / w.shape[-1] ** 0.5) for n, w in net.spec.items()}
    x = jnp.array(rng.normal(size=sizes[0]))
    make = gf.classification_loss if cost == "cross_entropy" else gf.quadratic_loss
    return make(net), params, x


@pytest.mark.parametrize("cost", ["cross_entropy", "quadratic"])
@pytest.mark.parametrize("sizes", [pytest.param([7, 3], marks=pytest.mark.slow), [16, 8, 6, 4]])
def test_chain_rule_agrees_with_jax(sizes, cost, x64):
    loss, params, x = network(sizes, cost)
    by_hand = jax.jit(lambda p, x: chain_rule(cost)(p, x, 2))(params, x)
    value, grads = jax.jit(jax.value_and_grad(loss))(params, (x, 2))
    np.testing.assert_allclose(by_hand.value, value, rtol=1e-12)
    assert set(by_hand.grads) == set(grads)
    for name, grad in grads.items():
        np.testing.assert_allclose(by_hand.grads[name], grad, rtol=1e-6, atol=1e-15, err_msg=name)


@pytest.mark.slow
def test_chain_rule_on_the_digit_network_of_the_note(x64):
    loss, params, x = network([784, 16, 10], "cross_entropy")
    grads = jax.jit(jax.grad(loss))(params, (x, 7))
    by_hand = jax.jit(chain_rule())(params, x.reshape(784, 1), 7).grads
    for name, grad in grads.items():
        assert float(jnp.linalg.norm(by_hand[name] - grad) / jnp.linalg.norm(grad)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("cost", ["cross_entropy", "quadratic"])
def test_the_steps_of_backprop_are_the_deltas_of_the_chain_rule(cost, x64):
    loss, params, x = network([6, 5, 4, 3], cost)
    by_hand = jax.jit(lambda p, x: chain_rule(cost)(p, x, 1))(params, x)
    steps = {s.operation: s for s in backprop(loss, keep=True)(params, (x, 1))}
    for l in (1, 2, 3):  # noqa: E741
        incoming = steps[f"name z{l}"].incoming[0]
        np.testing.assert_allclose(incoming.value, by_hand.deltas[l], rtol=1e-10)
        assert incoming.norm == pytest.approx(float(jnp.linalg.norm(by_hand.deltas[l])))


def test_chain_rule_errors():
    params = {"W1": jnp.ones((2, 3)), "b1": jnp.ones(2)}
    with pytest.raises(ValueError, match="cost must be 'cross_entropy' or 'quadratic', got 'hinge'"):
        chain_rule("hinge")
    with pytest.raises(gf.ParameterError, match="W1, b1, W2, b2"):
        chain_rule()({"W1": params["W1"]}, X, 1)


@pytest.mark.slow
def test_chain_rule_of_a_batch_and_of_vector_targets():
    net = gf.mlp([4, 3, 3])
    params, x = net.init(jax.random.key(0)), jnp.ones([4])
    by_vector = jax.jit(chain_rule())(params, x, jnp.array([0.0, 1.0, 0.0]))
    np.testing.assert_allclose(
        jax.jit(chain_rule())(params, x, 1).grads["W1"], by_vector.grads["W1"], rtol=1e-6
    )
    soft = jnp.array([0.5, 0.5, 1.0])  # targets need not sum to 1
    expected = jax.jit(jax.grad(lambda p: -jnp.sum(soft * jax.nn.log_softmax(net.apply(p, x)))))(params)
    by_hand = jax.jit(chain_rule())(params, x, soft)
    np.testing.assert_allclose(by_hand.grads["W1"], expected["W1"], rtol=1e-4, atol=1e-7)
    many = jax.jit(jax.vmap(lambda x, y: chain_rule()(params, x, y)))(jnp.ones([5, 4]), jnp.arange(5) % 3)
    assert many.grads["W1"].shape == (5, 3, 4)
