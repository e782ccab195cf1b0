"""The interpreter rebuilds every container faithfully: same values, tokens in, captures out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from gradfn.jaxpr import interpret, probe, trace
from gradfn.jaxpr.interpreter import operation, params_of


def name_places(program):
    """Places of the `name` equations, by their name."""
    return {params_of(p.eqn)["name"]: p for p in program.equations().values() if operation(p.eqn) == "name"}


def look(f, *args):
    """Return (value, captures, gradients of args[0], raw cotangents) of a function's named values."""
    program = trace(f, *args)
    named = name_places(program)

    def visit(equation, evaluate, inputs, token):
        outs = evaluate(inputs)
        return [probe(lambda g, _: g, outs[0], token)], jax.lax.stop_gradient(outs[0])

    def run(first, tokens):
        rest = program.inputs[len(jax.tree.leaves(args[0])) :]
        outs, captures = interpret(program.jaxpr, visit, equations, [*jax.tree.leaves(first), *rest], tokens)
        return outs[0], captures

    equations = {p.path: p for p in named.values()}
    tokens = {
        p.path: jnp.zeros(p.axes + p.eqn.outvars[0].aval.shape, p.eqn.outvars[0].aval.dtype)
        for p in named.values()
    }
    (value, captures), (grads, cotangents) = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(
        args[0], tokens
    )
    by_name = {name: (captures[p.path], cotangents[p.path]) for name, p in named.items()}
    return value, by_name, grads


X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
W = jnp.linspace(0.1, 0.9, 9).reshape(3, 3)


def plain(w, x):
    return jnp.sum(checkpoint_name(jnp.tanh(x @ w), "h") ** 2)


def jitted(w, x):
    return jnp.sum(jax.jit(lambda w, x: checkpoint_name(jnp.tanh(x @ w), "h"))(w, x) ** 2)


def rematted(w, x):
    policy = jax.checkpoint_policies.save_only_these_names("h")
    return jnp.sum(
        jax.checkpoint(lambda w, x: checkpoint_name(jnp.tanh(x @ w), "h"), policy=policy)(w, x) ** 2
    )


def in_cond(w, x):
    def yes(w, x):
        return checkpoint_name(jnp.tanh(x @ w), "h")

    return jnp.sum(jax.lax.cond(x[0, 0] < 0, yes, lambda w, x: x, w, x) ** 2)


def vmapped(w, x):
    return jnp.sum(jax.vmap(lambda row: checkpoint_name(jnp.tanh(row @ w), "h"))(x) ** 2)


@pytest.mark.parametrize("f", [plain, jitted, rematted, in_cond, vmapped])
def test_values_and_cotangents_in_each_container(f):
    value, recorded, grads = jax.jit(lambda w, x: look(f, w, x))(W, X)
    h = jnp.tanh(X @ W)
    expected_value, expected_grads = jax.jit(jax.value_and_grad(f))(W, X)
    np.testing.assert_array_equal(value, expected_value)
    np.testing.assert_array_equal(grads, expected_grads)
    capture, cotangent = recorded["h"]
    np.testing.assert_allclose(capture, h, rtol=1e-6)
    np.testing.assert_allclose(cotangent, 2 * h, rtol=1e-6)


def test_nested_scans_stack_outermost_first():
    def f(w, x):
        def outer(c, w):
            def inner(c, _):
                c = checkpoint_name(jnp.sin(c * w), "h")
                return c, c.sum()

            return jax.lax.scan(inner, c, None, length=3)

        c, sums = jax.lax.scan(outer, x, w, reverse=True)
        return jnp.sum(c) + jnp.sum(sums)

    w = jnp.array([0.5, 1.5])
    value, recorded, grads = look(f, w, X)
    expected_value, expected_grads = jax.value_and_grad(f)(w, X)
    np.testing.assert_array_equal(value, expected_value)
    np.testing.assert_array_equal(grads, expected_grads)
    capture, cotangent = recorded["h"]
    assert capture.shape == cotangent.shape == (2, 3, 2, 3)
    # By hand: outer iteration 1 runs first (reverse), and the last value's cotangent is 1 (sum) + 1 (its own
    # sum).
    c, states = X, {}
    for i in (1, 0):
        for j in range(3):
            c = states[i, j] = jnp.sin(c * w[i])
    np.testing.assert_allclose(capture[0, 2], states[0, 2], rtol=1e-6)
    np.testing.assert_allclose(capture[1, 0], states[1, 0], rtol=1e-6)
    np.testing.assert_allclose(cotangent[0, 2], jnp.full((2, 3), 2.0))
    before_last = 1 + 2 * jnp.cos(states[0, 1] * w[0]) * w[0]
    np.testing.assert_allclose(cotangent[0, 1], before_last, rtol=1e-6)


def test_a_branch_that_did_not_run_captures_zeros():
    def f(w, x):
        def yes(w, x):
            return checkpoint_name(x @ w, "yes")

        def no(w, x):
            return checkpoint_name(x - 1, "no")

        return jnp.sum(jax.lax.cond(x[0, 0] > 0, yes, no, w, x))

    _, recorded, grads = look(f, W, X)
    np.testing.assert_array_equal(recorded["yes"][0], 0)
    np.testing.assert_array_equal(recorded["yes"][1], 0)
    np.testing.assert_array_equal(recorded["no"][0], X - 1)
    np.testing.assert_array_equal(recorded["no"][1], 1)
    np.testing.assert_array_equal(grads, 0)


def test_a_while_loop_captures_its_last_iteration_or_what_merge_says():
    def f(x):
        def step(state):
            i, x = state
            return i + 1, checkpoint_name(x * 2, "h")

        return jax.lax.while_loop(lambda s: s[0] < 3, step, (0, x))[1]

    program = trace(f, jnp.array(1.0))
    equations = {p.path: p for p in name_places(program).values()}
    assert all(p.in_while for p in equations.values())

    def visit(equation, evaluate, inputs, token):
        outs = evaluate(inputs)
        return outs, outs[0]

    outs, captures = interpret(program.jaxpr, visit, equations, program.inputs)
    assert float(outs[0]) == 8.0
    assert [float(c) for c in captures.values()] == [8.0]
    _, captures = interpret(program.jaxpr, visit, equations, program.inputs, merge=lambda old, new: old + new)
    assert [float(c) for c in captures.values()] == [2.0 + 4.0 + 8.0]


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_gives_captures_and_tokens_a_device_axis(check_vma):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    spec = PartitionSpec("d")

    def f(w, x):
        def local(w, x):
            h = checkpoint_name(jnp.sin(x * w), "h")
            return jax.lax.psum(jnp.sum(h**2), "d")

        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec(), check_vma=check_vma
        )
        return sharded(w, x)

    x, w = jnp.arange(16.0), jnp.array(0.3)
    value, recorded, grads = jax.jit(lambda w, x: look(f, w, x))(w, x)
    expected_value, expected_grads = jax.jit(jax.value_and_grad(f))(w, x)
    np.testing.assert_array_equal(value, expected_value)
    np.testing.assert_array_equal(grads, expected_grads)
    capture, cotangent = recorded["h"]
    np.testing.assert_allclose(capture, jnp.sin(x * w).reshape(8, 2), rtol=1e-6)
    np.testing.assert_allclose(cotangent, 2 * jnp.sin(x * w).reshape(8, 2), rtol=1e-6)


def test_inlined_jit_keeps_its_shardings():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    split = NamedSharding(mesh, PartitionSpec("d"))

    @jax.jit
    def f(x):
        inner = jax.jit(lambda x: checkpoint_name(x + 1, "h"), out_shardings=split)
        return inner(x)

    program = trace(f, jnp.arange(16.0))
    equations = {p.path: p for p in name_places(program).values()}
    run = jax.jit(lambda x: interpret(program.jaxpr, lambda p, e, i, t: (e(i), None), equations, [x])[0][0])
    assert run(jnp.arange(16.0)).sharding.is_equivalent_to(split, 1)


def test_a_jit_with_nothing_chosen_inside_is_left_alone():
    def f(w, x):
        return jax.jit(jnp.tanh)(checkpoint_name(x @ w, "h"))

    program = trace(f, W, X)
    equations = {p.path: p for p in name_places(program).values()}
    again = trace(
        lambda w, x: interpret(program.jaxpr, lambda p, e, i, t: (e(i), None), equations, [w, x])[0], W, X
    )
    assert [e.primitive.name for e in again.jaxpr.jaxpr.eqns] == [
        e.primitive.name for e in program.jaxpr.jaxpr.eqns
    ]


def test_remat_keeps_its_policy():
    def f(policy):
        def inner(w, x):
            return jnp.sum(jnp.sin(checkpoint_name(jnp.sin(x @ w), "h")))

        return jax.checkpoint(inner, policy=policy)

    def saved(run):
        residuals = jax.eval_shape(lambda w: jax.vjp(lambda w: run(w), w)[1], W)
        return sorted(leaf.shape for leaf in jax.tree.leaves(residuals))

    for policy in (
        jax.checkpoint_policies.save_only_these_names("h"),
        jax.checkpoint_policies.nothing_saveable,
    ):
        program = trace(f(policy), W, X)
        equations = {p.path: p for p in name_places(program).values()}

        def through(w, program=program, equations=equations):
            return interpret(program.jaxpr, lambda p, e, i, t: (e(i), None), equations, [w, X])[0][0]

        assert saved(through) == saved(lambda w, policy=policy: f(policy)(w, X))


def test_each_use_of_a_variable_can_be_given_its_own_value():
    program = trace(lambda x: x * x, jnp.array(3.0))
    equations = program.equations()
    outs, _ = interpret(
        program.jaxpr, lambda p, evaluate, i, t: (evaluate([i[0], i[1] + 1]), None), equations, program.inputs
    )
    assert float(outs[0]) == 12.0


def test_outputs_that_are_inputs_or_constants_or_empty():
    def f(x, y):
        return x, 3.0, checkpoint_name(y[:0], "none"), y

    program = trace(f, jnp.array(1.0), jnp.arange(4.0))
    equations = program.equations()
    outs, _ = interpret(program.jaxpr, lambda p, e, i, t: (e(i), None), equations, program.inputs)
    jax.tree.map(np.testing.assert_array_equal, program.rebuild(outs), f(jnp.array(1.0), jnp.arange(4.0)))


def test_typed_keys_and_effects_pass_through(capfd):
    def f(key, x):
        jax.debug.print("sum {}", jnp.sum(x))

        def body(carry, key):
            return carry + checkpoint_name(jax.random.normal(key, carry.shape), "noise"), None

        return jnp.sum(jax.lax.scan(body, x, jax.random.split(key, 3))[0])

    key = jax.random.key(0)
    program = trace(f, key, X)
    equations = {p.path: p for p in name_places(program).values()}
    outs, captures = interpret(
        program.jaxpr, lambda p, e, i, t: ((o := e(i)), o[0]), equations, program.inputs
    )
    jax.effects_barrier()
    assert capfd.readouterr().out.count("sum") == 1
    np.testing.assert_allclose(outs[0], f(key, X), rtol=1e-6)
    (noise,) = captures.values()
    np.testing.assert_allclose(noise[1], jax.random.normal(jax.random.split(key, 3)[1], X.shape), rtol=1e-6)


def test_custom_derivatives_are_one_equation_unless_entered():
    @jax.custom_vjp
    def f(x):
        return checkpoint_name(jnp.sin(x), "inside")

    f.defvjp(lambda x: (f(x), None), lambda _, g: (7.0 * g,))
    program = trace(lambda x: f(x) * 2, jnp.array(1.0))
    assert "inside" not in name_places(program)
    outside = program.equations()

    def run(x):
        return interpret(program.jaxpr, lambda p, e, i, t: (e(i), None), outside, [x])[0][0]

    assert float(jax.grad(run)(1.0)) == 14.0
    entered = {
        path: e for path, e in program.equations(enter_custom=True).items() if operation(e.eqn) == "name"
    }
    _, captures = interpret(program.jaxpr, lambda p, e, i, t: ((o := e(i)), o[0]), entered, program.inputs)
    np.testing.assert_allclose(next(iter(captures.values())), jnp.sin(1.0), rtol=1e-6)
