"""The abstract interpreter: an analysis of dependence, against the zeros of Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gradfn.jaxpr import trace
from gradfn.jaxpr.dataflow import Dataflow


class Dependence(Dataflow[frozenset]):
    """A value is known by the inputs that it may depend on; the records are the paths of all multiplications."""

    enter_custom = True

    def constant(self, value):
        return frozenset()

    def join(self, values):
        return frozenset().union(*values)

    def equation(self, path, eqn, operands):
        if eqn.primitive.name == "mul":
            self.records.append(path)
        return [self.join(operands)] * len(eqn.outvars)


def rotated(a, b, c, d):
    """After two iterations of (a, b, c) -> (b, c, a d) each carry depends on another."""
    (x, y, z), stacked = lax.scan(lambda h, _: ((h[1], h[2], h[0] * d), h[0]), (a, b, c), None, length=2)
    return x, y, z, stacked.sum()


def looped(a, b, c, d):
    x, y, _ = lax.while_loop(lambda h: h[2] < 3, lambda h: (h[0] + h[1], h[1] * c, h[2] + 1), (a, b, 0))
    return x, y, d, 0.0 * a


def branched(a, b, c, d):
    x, y = lax.cond(True, lambda a, b: (a, 1.0), lambda a, b: (a * b, b), a, b)
    return x, y, c * d, a


def called(a, b, c, d):
    @jax.custom_jvp
    def product(a, b):
        return a * b

    product.defjvps(lambda da, _, a, b: da * b, lambda db, _, a, b: a * db)
    x, y = jax.jit(lambda a, b: (b, product(a, b)))(a, b)
    return x, y, jax.checkpoint(jnp.sin)(c), d


ALL = {
    rotated: [{0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}],
    looped: [{0, 1, 2}, {1, 2}, {3}, {0}],
    branched: [{0, 1}, {1}, {2, 3}, {0}],
    called: [{1}, {0, 1}, {2}, {3}],
}


@pytest.mark.parametrize("f", ALL, ids=lambda f: f.__name__)
def test_dependence_goes_through_every_container_and_covers_the_jacobian(f):
    inputs = (1.5, 2.5, 3.5, 4.5)
    analysis = Dependence()
    outs = analysis.run(trace(f, *inputs).jaxpr, [frozenset([i]) for i in range(4)])
    assert [set(out) for out in outs] == ALL[f]
    jacobian = np.array(jax.jacfwd(f, argnums=(0, 1, 2, 3))(*inputs))  # [outputs, inputs]
    for out, row in zip(outs, jacobian, strict=True):
        assert set(np.flatnonzero(row)) <= set(out)


def test_a_loop_records_its_fixpoint_once():
    analysis = Dependence()
    program = trace(rotated, 1.0, 2.0, 3.0, 4.0)
    analysis.run(program.jaxpr, [frozenset([i]) for i in range(4)])
    multiplications = [p for p, e in program.equations().items() if e.eqn.primitive.name == "mul"]
    assert analysis.records == multiplications
    assert len(multiplications) == 1


def test_hooks_see_containers_left_closed_variables_and_loops():
    class Hooked(Dependence):
        def enters(self, path, kind, eqn, operands):
            self.records.append(kind)
            return kind == "scan"

        def into_loop(self, path, operand, role, value):
            self.records.append((operand, role))
            return value

        def grew(self, path, operand, old, new):
            self.records.append((operand, set(old), set(new)))

    def f(a, xs):
        return lax.scan(lambda h, x: (h + x, jax.jit(jnp.sin)(h)), a, xs)

    analysis = Hooked()
    analysis.run(trace(f, 1.0, jnp.ones(3)).jaxpr, [frozenset("a"), frozenset("x")])
    assert analysis.records == ["scan", (0, "carry"), (1, "slice"), (0, {"a"}, {"a", "x"}), "jit"]
