import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.flatten import flat_products
from gradfn.jaxpr import walk

pytestmark = pytest.mark.optimized


def ranks(f, *args):
    """Return the ranks of the operands of all products without batch axes."""
    equations = walk(jax.make_jaxpr(f)(*args))
    eqns = [p.eqn for p in equations if p.eqn.primitive.name == "dot_general"]
    return [tuple(a.aval.ndim for a in e.invars) for e in eqns if not any(e.params["dimension_numbers"][1])]


def deep(params, x):
    def block(x, W):
        return jax.checkpoint(lambda x: jnp.tanh(gf.tap(gf.layers.affine(W, None, x), "z")))(x), None

    return jax.lax.scan(block, x, params)[0]


@pytest.mark.slow
def test_vmapped_code_and_its_gradient_multiply_matrices_inside_scan_and_remat():
    W, x = jax.random.normal(jax.random.key(0), [3, 4, 4]), jax.random.normal(jax.random.key(1), [6, 5, 4])

    def loss(W):
        return jnp.square(jax.vmap(lambda x: deep(W, x))(x)).mean()

    slow, flat = jax.grad(loss), jax.grad(flat_products(loss))
    assert max(map(max, ranks(slow, W))) == 3
    assert set(ranks(flat, W)) == {(2, 2)}
    np.testing.assert_allclose(jax.jit(flat)(W), jax.jit(slow)(W), rtol=1e-5)
    v = jnp.ones_like(W)
    hvps = [jax.jit(lambda W, g=g: jax.jvp(g, (W,), (v,))[1])(W) for g in (flat, slow)]
    np.testing.assert_allclose(*hvps, rtol=1e-4)


def test_contractions_of_several_axes_and_from_either_side():
    rng = np.random.default_rng(0)
    x, W, V = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((7, 5, 2, 3), (2, 3, 4), (4, 2, 3)))
    for f in (
        lambda x: jnp.tensordot(x, W, 2),  # [7, 5, (2, 3)] x [(2, 3), 4]
        lambda x: jnp.tensordot(V, x, ((1, 2), (2, 3))),  # [4, (2, 3)] x [7, 5, (2, 3)]
    ):
        assert set(ranks(flat_products(f), x)) == {(2, 2)}
        np.testing.assert_allclose(jax.jit(flat_products(f))(x), f(x), rtol=1e-5)


def test_products_that_are_no_matrix_product_by_reshapes_stay():
    x, y = jnp.ones([2, 3, 4]), jnp.ones([2, 3])
    for f, args in (
        (lambda x: jnp.einsum("bti,bsi->bts", x, x), (x,)),  # with a batch axis
        (lambda x, y: jnp.einsum("btc,ot->boc", x, y), (x, y.T @ y)),  # contracts the middle
        (lambda x: jnp.tensordot(x, x, 3), (x,)),  # nothing free
    ):
        np.testing.assert_array_equal(jax.jit(flat_products(f))(*args), f(*args))


def test_a_batch_of_examples_reaches_the_flat_form_by_itself():
    net = gf.layers.dense(3, 2)
    params, x = net.init(jax.random.key(0)), jnp.ones([6, 5, 3])
    loss = gf.batch_mean(lambda params, x: jnp.square(net.apply(params, x)).sum())
    assert set(ranks(jax.grad(loss), params, x)) == {(2, 2)}
    lines = {p.line for p in walk(jax.make_jaxpr(loss)(params, x)) if p.eqn.primitive.name == "dot_general"}
    # The user's own line, not that of the rewriting.
    assert "test_products.py" in lines.pop()
    np.testing.assert_allclose(loss(params, x), jax.jit(loss)(params, x), rtol=1e-6)


def test_training_flattens_any_loss_over_a_batch_once():
    import optax

    def loss(W, x):
        return jnp.square(jnp.einsum("bti,oi->bto", x, W)).mean()

    W, x = jnp.ones([2, 3]), jnp.ones([6, 5, 3])
    step = gf.train_step(loss, optax.sgd(0.1))
    assert set(ranks(step, gf.train_state(W, optax.sgd(0.1), jax.random.key(0)), x)) == {(2, 2)}
    assert flat_products(flat := flat_products(loss)) is flat


def test_concrete_arguments_run_as_they_are():
    def loss(scale, x):
        return x.sum() if float(scale) > 1 else x.mean()

    assert flat_products(loss)(2.0, jnp.ones(3)) == 3
