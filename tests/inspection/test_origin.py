"""The first NaN and the first infinity: the right operation, line, pass and iteration, in every container."""

import inspect as source
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import gradfn as gf
from gradfn.inspection.causes import Operand, explain
from gradfn.inspection.guard import nan_guard
from gradfn.inspection.origin import nan_origin


def at(event, f, text):
    """Whether an event's line is the one of `f` that has `text` in it."""
    lines, first = source.getsourcelines(f)
    number = next(first + i for i, line in enumerate(lines) if text in line)
    return f"{__file__}:{number} " in event.line


def root_of_sum(p, x):
    with jax.named_scope("head"):
        h = jnp.tanh(x @ p["W"])
        scale = jnp.sqrt(jnp.sum(jnp.square(h)))
    return 1.0 + scale


def test_sqrt_at_zero_through_a_norm():
    found = nan_origin(root_of_sum)({"W": jnp.zeros((3, 2))}, jnp.ones((4, 3)))
    assert not found.ok
    assert found.value == 1.0
    assert found.nonfinite_grads == ("W",)
    assert (found.nan.phase, found.nan.operation, found.nan.cause) == ("backward", "mul", "0 × inf")
    assert "head" in found.nan.scope
    assert at(found.nan, root_of_sum, "jnp.square(h)")
    assert at(found.inf, root_of_sum, "jnp.sqrt")
    assert (found.inf.phase, found.inf.operation) == ("forward", "div")
    assert "slope of sqrt" in found.inf.cause
    assert found.inf.operands[1].zeros == 1


def of_library(x):
    return jnp.linalg.norm(x)  # HERE


def test_inside_a_library_function_the_line_is_the_call():
    found = nan_origin(of_library)(jnp.zeros(3))
    assert at(found.nan, of_library, "HERE")
    assert found.nan.within == "norm"
    assert found.nan.element == (0,)
    assert [o.at for o in found.nan.operands] == [0.0, math.inf]


def log_likelihood(p, x):
    probability = jax.nn.relu(x @ p["W"])
    return -jnp.mean(jnp.log(probability))


def test_log_of_zero():
    x = jnp.ones((4, 3))
    found = nan_origin(log_likelihood)({"W": jnp.array([[1.0, -1.0]] * 3)}, x)
    assert found.value == math.inf
    assert found.nan is None
    assert (found.inf.operation, found.inf.phase, found.inf.element) == ("log", "forward", (0, 1))
    assert at(found.inf, log_likelihood, "jnp.log")
    assert "log of 0" in found.inf.cause
    assert found.inf.operands == (Operand("float32", (4, 2), 0.0, 3.0, 4, 0, 0, 0, 0.0),)


def grows(w, x):
    def step(carry, w):
        with jax.named_scope("cell"):
            carry = jnp.exp(carry * w)
        return carry, None

    return jnp.sum(jax.lax.scan(step, x, w)[0])


def test_overflow_in_one_iteration_of_a_scan():
    w = jnp.full(12, 0.1).at[7].set(200.0)
    found = nan_origin(grows)(w, jnp.ones(2))
    assert (found.inf.operation, found.inf.iteration, found.inf.phase) == ("exp", (7,), "forward")
    assert at(found.inf, grows, "jnp.exp")
    assert found.inf.scope == "cell"
    assert "at most 88.72" in found.inf.cause
    assert found.inf.operands[0].at == pytest.approx(200 * math.exp(0.1 * math.exp(0.1 * 1.1309)), rel=0.1)
    assert "scan iteration 7 (of 0 to 11)" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_one_bad_element_of_a_large_array(bad):
    # The maximum of a large array loses NaNs on CPUs.
    def f(w, x):
        return jnp.sum(jnp.sin(w * 3.0) * x) * 0.0

    w = jnp.ones((48, 128)).at[40, 100].set(bad)
    find = nan_origin(f)
    found = find(w, jnp.ones((48, 128)))
    assert not found.ok
    assert found.nan.operation == ("argument" if bad != bad else "sin")
    assert find(jnp.full((48, 128), 1e38), jnp.zeros((48, 128))).inf is None  # though they add up to more
    _, _, record = jax.jit(nan_guard(f))(w, jnp.ones((48, 128)))
    assert not bool(record.ok)
    assert record.report().nan.operation == found.nan.operation
    _, _, record = jax.jit(nan_guard(lambda x: jnp.sum(jnp.where(x > 0, jnp.sqrt(x), 0.0))))(
        w.at[40, 100].set(0.0)
    )
    assert record.nonfinite_grads.tolist() == [True]  # the NaN is in the gradient alone


def roots(w, x):
    def step(carry, w):
        return carry + jnp.sqrt(w), None

    return jnp.sum(jax.lax.scan(step, x, w)[0])


@pytest.mark.slow
def test_the_backward_pass_of_a_scan_runs_from_its_end():
    w = jnp.ones(9).at[jnp.array([2, 5])].set(0.0)
    found = nan_origin(roots)(w, jnp.zeros(()))
    assert found.nan is None
    assert found.inf.operation == "div"
    # jax computes the slope ahead, in the forward pass, which meets iteration 2 first.
    assert (found.inf.phase, found.inf.iteration) == ("forward", (2,))

    # The root of w * w: the NaN, 0 * inf, is made in the backward pass, which meets iteration 5 first.
    def f(w, x):
        return jnp.sum(jax.lax.scan(lambda c, w: (c + jnp.sqrt(w * w), None), x, w)[0])

    found = nan_origin(f)(w, jnp.zeros(()))
    assert (found.nan.phase, found.nan.iteration) == ("backward", (5,))


def attention(p, x, diagonal=0):
    q = x @ p["W"]
    scores = q @ q.T
    mask = jnp.tril(jnp.ones(scores.shape, bool), diagonal)
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    return jnp.sum(jnp.square(weights @ x))


def test_a_healthy_mask_of_infinities_is_no_fault():
    found = nan_origin(attention)({"W": jnp.eye(3)}, jnp.ones((4, 3)))
    assert found.ok
    assert found.nan is None
    assert at(found.inf, attention, "-jnp.inf")
    assert "mask" in found.inf.cause
    assert "harmless" in str(found)


@pytest.mark.slow
def test_a_row_that_is_masked_everywhere():
    found = nan_origin(lambda p, x: attention(p, x, -1))({"W": jnp.eye(3)}, jnp.ones((4, 3)))
    assert not found.ok
    assert (found.nan.operation, found.nan.phase) == ("sub", "forward")
    assert at(found.nan, attention, "softmax")
    assert "masked" in found.nan.cause


@pytest.mark.slow
def test_a_computed_infinity_is_not_a_mask():
    def f(p, x):
        a = attention(p, x)
        return a + jnp.exp(100.0 * a)

    found = nan_origin(f)({"W": jnp.eye(3)}, jnp.ones((4, 3)))
    assert found.inf.operation == "exp"


def slow(f):
    return pytest.param(f, marks=pytest.mark.slow)


def in_jit(x):
    return jax.jit(lambda x: jnp.log(x) * 2)(x)


def in_remat(x):
    return jax.checkpoint(lambda x: jnp.sin(jnp.log(x)))(x)


def in_cond(x):
    return jax.lax.cond(x[0] > 5, lambda x: x, lambda x: jnp.log(x), x)


def in_vmap(x):
    return jax.vmap(jnp.log)(x)


def in_custom_jvp(x):
    @jax.custom_jvp
    def safe(x):
        return jnp.log(x)

    safe.defjvp(lambda primals, tangents: (safe(*primals), tangents[0]))
    return safe(x)


def in_custom_vjp(x):
    @jax.custom_vjp
    def safe(x):
        return jnp.log(x)

    safe.defvjp(lambda x: (safe(x), None), lambda _, g: (g,))
    return safe(x)


@pytest.mark.parametrize(
    "f", [in_jit, in_cond, slow(in_remat), slow(in_vmap), slow(in_custom_jvp), slow(in_custom_vjp)]
)
def test_log_of_a_negative_number_in_each_container(f):
    x = jnp.array([1.0, 2.0, -3.0])
    find = nan_origin(lambda x: jnp.sum(f(x)))
    found = find(x)
    assert (found.nan.operation, found.nan.phase, found.nan.element) == ("log", "forward", (2,))
    assert at(found.nan, f, "jnp.log")
    assert found.nan.cause == "the logarithm of a negative number"
    assert find(jnp.ones(3)).nan is None


def test_a_wrong_backward_rule_is_found_at_its_call():
    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    def backward(x, g):
        return (g / (x - x),)

    f.defvjp(lambda x: (jnp.sin(x), x), backward)

    def loss(x):
        return f(2.0 * x) * 0.0  # HERE

    found = nan_origin(loss)(1.0)
    assert (found.nan.phase, found.nan.operation, found.nan.cause) == ("backward", "div", "0 / 0")
    assert at(found.nan, loss, "HERE")  # jax gives the operations of a backward rule the line of the call


def test_a_run_of_a_while_loop_is_counted():
    def f(x):
        def step(state):
            i, y = state
            z = jnp.log(y)  # 5, 4, 3, 2, 1, 0, -1
            return i + 1, y - 1.0 + 0.0 * jnp.where(y > -1, 0.0, z)

        y = jax.lax.while_loop(lambda s: s[0] < 9, step, (0, jax.lax.stop_gradient(x)))[1]
        return x * y

    found = nan_origin(f)(5.0)
    assert (found.nan.operation, found.nan.iteration, found.nan.phase) == ("log", (6,), "forward")
    assert (found.inf.operation, found.inf.iteration) == ("log", (5,))
    assert found.nan.operands[0].at == -1.0
    assert "run 6 in a while loop" in str(found)


@pytest.mark.slow
def test_what_comes_first_in_a_while_loop_goes_by_its_runs():
    def f(x):
        def step(state):
            i, y = state
            early = jnp.sqrt(5.0 - y)  # fails in run 6
            late = jnp.log(2.0 - y)  # fails in run 3
            return i + 1, y + 1.0 + 0.0 * jnp.minimum(0.0, jnp.nan_to_num(early + late))

        return x * jax.lax.while_loop(lambda s: s[0] < 9, step, (0, jnp.zeros(())))[1]

    found = nan_origin(f)(1.0)
    assert (found.nan.operation, found.nan.iteration) == ("log", (3,))


@pytest.mark.slow
def test_nested_scans_give_both_iterations():
    def f(w):
        def outer(c, row):
            def inner(c, w):
                return c + jnp.log(w), None

            return jax.lax.scan(inner, c, row)[0], None

        return jax.lax.scan(outer, 0.0, w)[0]

    w = jnp.ones((4, 5)).at[2, 3].set(-1.0).at[3, 0].set(-1.0)
    found = nan_origin(f)(w)
    assert found.nan.iteration == (2, 3)
    assert found.nan.operands[0].low == -1.0


@pytest.mark.slow
def test_a_layer_under_scan_and_remat():
    def f(p, x):
        def layer(x, w):
            return jnp.sqrt(x * w), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, p["w"])[0])

    found = nan_origin(f)({"w": jnp.ones(5).at[3].set(-1.0)}, jnp.ones(2))
    assert (found.nan.operation, found.nan.iteration, found.nan.phase) == ("sqrt", (3,), "forward")


def test_what_was_in_the_arguments():
    found = nan_origin(lambda p, x: jnp.sum(p["W"] @ x))({"W": jnp.ones((2, 2))}, jnp.array([1.0, jnp.nan]))
    assert (found.nan.operation, found.nan.scope) == ("argument", "x of argument 1")
    constant = jnp.array([1.0, jnp.nan])
    assert "closes over" in nan_origin(lambda x: jnp.sum(x * constant))(1.0).nan.scope


@pytest.mark.slow
def test_a_nan_written_in_the_program_counts_where_it_gets_through():
    def f(x):
        y = x / jnp.std(x)  # has a NaN, for the case of no elements
        return jnp.sum(jnp.where(x > 1, y, jnp.nan))  # HERE

    find = nan_origin(f)
    found = find(jnp.array([0.0, 2.0]))
    assert at(found.nan, f, "HERE")
    assert (found.nan.operation, found.nan.element) == ("select_n", (0,))
    assert "a constant in the program" in found.nan.cause
    assert find(jnp.array([3.0, 2.0])).nan is None
    assert at(find(jnp.array([2.0, 2.0])).inf, f, "jnp.std")


@pytest.mark.slow
def test_an_index_out_of_bounds_fills_in_nan():
    def f(p, ids):
        return jnp.sum(jnp.take(p, ids, axis=0))

    found = nan_origin(f)(jnp.ones((3, 2)), jnp.array([0, 7]))
    assert not found.ok
    assert at(found.nan, f, "jnp.take")


@pytest.mark.slow
def test_aux_argnums_integers_and_keys():
    def f(p, batch, key):
        x, label = batch
        noise = jax.random.normal(key, x.shape)
        return jnp.sum(jnp.sqrt(jnp.square(x)) * p["w"] * noise) / label.astype(x.dtype), {"norm": jnp.sum(x)}

    args = ({"w": jnp.ones(3), "n": 3}, (jnp.zeros(3), jnp.array(1)), jax.random.key(0))
    assert nan_origin(f)(*args).ok
    found = nan_origin(f, argnums=(0, 1))(*args)
    assert found.nonfinite_grads == ("batch/0",)
    assert nan_origin(lambda p, batch, key: f(p, batch, key))(args[0], args[1], key=args[2]).ok


@pytest.mark.slow
def test_overflow_of_small_floats():
    def f(x):
        return jnp.sum(jnp.square(x * x).astype(jnp.float32))

    found = nan_origin(f)(jnp.full(3, 100.0, jnp.float16))
    assert (found.inf.operation, found.inf.operands[0].high) in [("square", 1e4), ("integer_pow", 1e4)]
    assert "6.55e+04" in found.inf.cause
    assert nan_origin(f)(jnp.full(3, 100.0, jnp.bfloat16)).inf is None


def test_float64(x64):
    found = nan_origin(lambda x: jnp.exp(x))(jnp.array(800.0))
    assert "at most 709.8" in found.inf.cause
    assert nan_origin(lambda x: jnp.exp(x))(jnp.array(700.0)).inf is None


@pytest.mark.slow
def test_on_several_devices():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))

    def f(w, x):
        local = jax.shard_map(
            lambda x: jnp.log(x),
            mesh=mesh,
            in_specs=PartitionSpec("d"),
            out_specs=PartitionSpec("d"),
        )
        return jnp.sum(w * local(x))

    x = jnp.ones(16).at[11].set(-1.0)
    found = nan_origin(f)(2.0, x)
    assert (found.nan.operation, found.nan.iteration) == ("log", (5,))
    assert "device 5" in str(found)
    _, _, record = jax.jit(nan_guard(f))(2.0, x)
    assert record.report().nan.iteration == (5,)


def test_errors():
    with pytest.raises(
        TypeError, match=r"nan_origin: the function must return a floating scalar.*float32\[3\]"
    ):
        nan_origin(lambda x: x)(jnp.ones(3))
    with pytest.raises(TypeError, match=r"no floating array.*int32\[3\]"):
        nan_origin(lambda x: 1.0)(jnp.arange(3))
    with pytest.raises(TypeError, match=r"use gf\.nan_guard"):
        jax.jit(lambda x: nan_origin(jnp.sum)(x).value)(jnp.ones(3))


# ---- the lazy form


def test_guard_gives_what_value_and_grad_gives():
    def f(p, x):
        return jnp.mean(jnp.tanh(x @ p["W"]) ** 2), jnp.sum(x)

    p, x = {"W": jnp.linspace(-1, 1, 6).reshape(3, 2)}, jnp.linspace(-1, 1, 12).reshape(4, 3)
    value, grads, record = jax.jit(nan_guard(f))(p, x)
    expected_value, expected_grads = jax.jit(jax.value_and_grad(f, has_aux=True))(p, x)
    jax.tree.map(np.testing.assert_array_equal, (value, grads), (expected_value, expected_grads))
    assert bool(record.ok)
    assert record.report().nan is None


@pytest.mark.slow
def test_guard_says_where():
    x = jnp.ones((4, 3))
    step = jax.jit(nan_guard(log_likelihood))
    _, _, record = step({"W": jnp.array([[1.0, -1.0]] * 3)}, x)
    assert not bool(record.ok)
    assert at(record.report().inf, log_likelihood, "jnp.log")
    assert "log of 0" in record.report().inf.cause
    assert "first inf" in str(record)
    eager = nan_origin(grows)
    w = jnp.full(12, 0.1).at[7].set(200.0)
    _, _, record = jax.jit(nan_guard(grows))(w, jnp.ones(2))
    assert record.report().inf._replace(operands=(), element=None, cause="") == eager(
        w, jnp.ones(2)
    ).inf._replace(operands=(), element=None, cause="")


@pytest.mark.slow
def test_guard_in_a_training_loop_reports_the_first_bad_step():
    optimizer = optax.sgd(1.0)

    def loss(w, x):
        return jnp.sqrt(w - x)

    @jax.jit
    def train(w, xs):
        def step(carry, x):
            w, state = carry
            _, grads, record = nan_guard(loss)(w, x)
            updates, state = optimizer.update(grads, state, w)
            return (optax.apply_updates(w, updates), state), record

        return jax.lax.scan(step, (w, optimizer.init(w)), xs)[1]

    records = train(jnp.array(3.0), jnp.array([0.0, 0.0, 5.0, 0.0]))
    assert records.ok.tolist() == [True, True, False, False]
    report = records.report()
    assert (report.nan.operation, report.nan.cause) == ("sqrt", "the square root of a negative number")
    assert at(report.nan, loss, "jnp.sqrt")


def test_guard_leaves_what_is_no_parameter_alone():
    params = {"w": jnp.ones(2), "n": 3, "f": jnp.tanh}
    _, grads, _ = nan_guard(lambda p, x: jnp.sum(p["f"](p["w"] * x)))(params, 2.0)
    assert grads["n"] is None
    assert grads["w"].shape == (2,)


@pytest.mark.parametrize(
    ("operation", "kind", "operands", "expected"),
    [
        ("div", "nan", [0.0, 0.0], "0 / 0"),
        ("div", "nan", [math.inf, math.inf], "inf / inf"),
        ("div", "inf", [1.0, 0.0], "division by 0"),
        ("div", "inf", [1e30, 1e-30], "overflow"),
        ("mul", "inf", [1e30, 1e30], "overflow"),
        ("mul", "inf", [math.inf, 1.0], "already infinite"),
        ("exp", "inf", [100.0], "at most 88.72"),
        ("log", "inf", [0.0], "log of 0"),
        ("log1p", "nan", [-2.0], ""),
        ("pow", "inf", [0.0, -0.5], "0 to a negative power"),
        ("pow", "nan", [-1.0, 0.5], "non-integer power"),
        ("sqrt", "nan", [-1.0], "negative"),
        ("acos", "nan", [2.0], r"[-1, 1]"),
        ("unheard_of", "nan", [1.0], ""),
    ],
)
def test_causes(operation, kind, operands, expected):
    known = tuple(Operand("float32", (), x, x, int(x == 0), 0, int(math.isinf(x)), 0, x) for x in operands)
    assert expected in explain(operation, kind, known, "float32")


def test_a_batch_is_reported_by_example_and_time():
    def loss(W, x):
        return jnp.log(jnp.einsum("ti,oi->to", x, W)).mean()

    x = jnp.ones([4, 5, 3]).at[2, 3].set(-1.0)
    batched = gf.batch_mean(loss)  # which runs on [batch * time, features]
    found = nan_origin(batched)(jnp.ones([2, 3]), x)
    assert (found.nan.operation, found.nan.element) == ("log", (2, 3, 0))
    assert "float32[4, 5, 2]" in str(found)
    value, _, record = jax.jit(nan_guard(batched))(jnp.ones([2, 3]), x)
    assert jnp.isnan(value)
    assert record.report().nan.operation == "log"
    value, grads, record = jax.jit(nan_guard(batched))(jnp.ones([2, 3]), jnp.abs(x))
    assert record.ok
    np.testing.assert_allclose(grads, jax.grad(batched)(jnp.ones([2, 3]), jnp.abs(x)), rtol=1e-6)


def test_the_text_names_a_few_of_many_gradients():
    params = {f"w{i}": jnp.zeros(2) for i in range(9)}
    report = nan_origin(lambda params: sum(jnp.sum(jnp.sqrt(-1 - w)) for w in params.values()))(params)
    assert len(report.nonfinite_grads) == 9
    assert str(report).startswith("value nan; gradients not finite: 9 of them, w0, w1, w2 and others\n")
