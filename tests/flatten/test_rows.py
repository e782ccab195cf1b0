"""What lies between products is computed in rows, and is what it was."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import gradfn as gf
from gradfn.flatten import flat_products
from gradfn.jaxpr import find_sites, trace, walk
from gradfn.jaxpr.interpreter import operation

BATCH, TIME, WIDTH = 3, 5, 4
TOKENS = np.arange(BATCH * TIME).reshape(BATCH, TIME) * 5 % 7

GPT = {"vocab": 7, "context": TIME, "n_layers": 2, "n_heads": 2, "width": WIDTH}
LLAMA = {**GPT, "positions": "rope", "norm": "rms", "feed": "swiglu", "n_kv_heads": 1, "bias": False}
NETS = {
    "gpt": gf.gpt(gf.GPTConfig(**GPT)),
    "gpt, exact": gf.gpt(gf.GPTConfig(**GPT, feed="gelu_exact", bias=False)),
    "llama, scanned": gf.gpt(gf.GPTConfig(**LLAMA, scan=True)),
    "llama, computed again": gf.gpt(gf.GPTConfig(**LLAMA, remat=True)),
    "lstm": gf.rnn(7, WIDTH, "lstm", 1),
}


def meant(loss):
    return lambda params, batch: jax.vmap(loss, (None, 0))(params, batch).mean()


def loss_of(name):
    loss = gf.next_token_loss(NETS[name])
    return loss, NETS[name].init(jax.random.key(0)), (jnp.asarray(TOKENS), jnp.asarray(TOKENS[:, ::-1]))


def operations(f, *args, enter_custom=False):
    """Return (name, shape of the result) of every operation that computes something."""
    eqns = [equation.eqn for equation in walk(jax.make_jaxpr(f)(*args), enter_custom)]
    idle = ("name", "reshape", "broadcast_in_dim", "jit", "remat2", "checkpoint", "transpose")
    return [(e.primitive.name, e.outvars[0].aval.shape) for e in eqns if operation(e) not in idle]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_loss_and_gradients_stay_the_same_and_in_their_dtype(name, x64):
    loss, params, batch = loss_of(name)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)  # Python's floats are float64 by now
    plain = jax.jit(jax.value_and_grad(meant(loss)))(params, batch)
    in_rows = jax.jit(jax.value_and_grad(flat_products(meant(loss))))(params, batch)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(in_rows), jax.tree.leaves(plain), strict=True
    ):
        assert ours.dtype == theirs.dtype == jnp.float32, path
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6, err_msg=str(path))


def test_norms_activations_and_sums_of_a_gpt_run_in_rows():
    loss, params, batch = loss_of("gpt, exact")
    deep = {name for name, shape in operations(meant(loss), params, batch) if shape[:2] == (BATCH, TIME)}
    assert {"erf", "rsqrt", "reduce_sum", "add"} <= deep
    left = {
        name
        for name, shape in operations(flat_products(meant(loss)), params, batch)
        if shape[:2] == (BATCH, TIME) and shape[2:] in [(WIDTH,), (4 * WIDTH,), (1,)]
    }
    assert left <= {"gather", "dot_general"}  # what is looked up; what heads mix has four axes


def test_named_values_keep_their_shapes():
    loss, params, batch = loss_of("gpt")

    def shapes(f):
        return {
            site.name: site.shape for site in find_sites(trace(f, params, batch)) if site.source == "name"
        }

    program = trace(jax.jit(flat_products(meant(loss))), params, batch)
    rewritten = {site.name: site.shape for site in find_sites(program) if site.source == "name"}
    assert rewritten == shapes(meant(loss))
    assert rewritten["logits"] == (BATCH, TIME, 7)


def test_inspection_shows_a_loss_as_it_was_written_and_runs_it_in_rows():
    net = gf.serial(a=gf.layers.dense(3, 4), squash=jnp.tanh, b=gf.layers.dense(4, 2))
    params, x = net.init(jax.random.key(0)), jnp.sin(jnp.arange(BATCH * TIME * 3.0)).reshape(BATCH, TIME, 3)
    loss = gf.batch_mean(lambda params, x: jnp.square(net.apply(params, x)).mean())

    @functools.wraps(loss)
    def twice(params, x):
        return 2.0 * loss(params, x)

    plain, grads = jax.value_and_grad(loss)(params, x)
    for f, factor in ((loss, 1.0), (twice, 2.0), (jax.jit(loss), 1.0)):
        inspection = gf.inspect(f, keep=None)(params, x)
        assert {name: value.shape[:2] for name, value in inspection.values.items()} == dict.fromkeys(
            ("a/W", "a", "squash", "b/W", "b"), (BATCH, TIME)
        )
        np.testing.assert_allclose(inspection.value, factor * plain, rtol=1e-6)
        for ours, theirs in zip(jax.tree.leaves(inspection.grads), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(ours, factor * theirs, rtol=1e-5, atol=1e-7)
    products = [
        e for e in operations(gf.inspect(twice), params, x, enter_custom=True) if e[0] == "dot_general"
    ]
    assert {len(shape) for _, shape in products} == {2}
    assert gf.sites(loss)(params, x)[0].shape == (BATCH, TIME, 4)
    # Again, after all that.
    assert ("dot_general", (BATCH * TIME, 4)) in operations(jax.grad(loss), params, x)


def test_a_function_that_is_jitted_inside_is_entered():
    W, x = jnp.ones([WIDTH, WIDTH]), jnp.ones([BATCH, TIME, WIDTH])

    def f(x):
        return jax.nn.silu(x @ W).sum()

    assert ("logistic", (BATCH * TIME, WIDTH)) in operations(flat_products(f), x)
    np.testing.assert_allclose(jax.jit(flat_products(f))(x), f(x), rtol=1e-6)


W = jnp.linspace(-1.0, 1.0, WIDTH * WIDTH).reshape(WIDTH, WIDTH)
BETWEEN = {
    "a gain": lambda h: h * jnp.arange(4.0).reshape(1, 1, 4),
    "a mean over features": lambda h: h - h.mean(-1, keepdims=True),
    "a softmax": lambda h: jax.nn.softmax(h),
    "one vector for each time": lambda h: h + jnp.arange(h.shape[1] * 4.0).reshape(1, -1, 4),
    "one vector for each example": lambda h: h + jnp.arange(h.shape[0] * 4.0).reshape(-1, 1, 4),
    "a choice": lambda h: jnp.where(h > 0, h, -1.0),
    "the place of the largest": lambda h: h * (h.argmax(-1, keepdims=True) == 1).astype(h.dtype),
    "a sum over time, which no row has": lambda h: h - h.sum(1, keepdims=True),
    "a sum of everything": lambda h: h / (1 + jnp.sum(h * h)),
    "a clip, a power and a cast": lambda h: jnp.clip(h, -1, 1).astype(jnp.bfloat16).astype(jnp.float32) ** 3,
    "time turned round": lambda h: h + h[:, ::-1],
    "features and time exchanged": lambda h: (h + 1.0).swapaxes(1, 2).cumsum(1).swapaxes(1, 2),
}


@pytest.mark.parametrize("batch", [BATCH, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1))])
@pytest.mark.parametrize("what", BETWEEN)
def test_whatever_stands_between_two_products(what, batch):
    x = jnp.sin(jnp.arange(batch * TIME * 4.0)).reshape(batch, TIME, 4)

    def f(x):
        return BETWEEN[what](x @ W) @ W

    def total(f):
        return jax.grad(lambda x: jnp.square(f(x)).sum())

    for plain in (f, total(f)):
        rewritten = flat_products(f) if plain is f else total(flat_products(f))
        np.testing.assert_allclose(jax.jit(rewritten)(x), jax.jit(plain)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [("d",), (None, "d")], ids=["batch", "time"])
def test_values_whose_types_say_how_they_are_sharded(spec):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))

    def f(w, x):
        return jnp.square(jnp.tanh(x @ w)).mean()

    with jax.set_mesh(mesh):
        w = jax.device_put(W, PartitionSpec())
        x = jax.device_put(jnp.ones([8, 16, WIDTH]), PartitionSpec(*spec))
        ours, theirs = (jax.jit(jax.grad(g))(w, x) for g in (flat_products(f), f))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
