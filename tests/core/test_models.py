"""Models of other frameworks as they are: what is counted, listed and called."""

import inspect

import jax
import jax.numpy as jnp
import pytest

import gradfn as gf

# Other libraries promote ranks and dtypes, and warn, as they please.
pytestmark = pytest.mark.filterwarnings("default")
X = jax.random.normal(jax.random.key(1), (6, 4))


@pytest.fixture(autouse=True)
def their_promotion():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def equinox_net():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm

        def __init__(self, key):
            self.first = eqx.nn.Linear(4, 8, key=key)
            self.norm = eqx.nn.BatchNorm(8, "batch", mode="batch")

    return Net, eqx


def nnx_net():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(nnx.relu(self.norm(self.first(x))))

    net = Net(nnx.Rngs(0))
    net.eval()
    return net


def linen_net():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(8)(x)))

    return Net(), Net().init(jax.random.key(0), X)


def test_state_is_listed_apart_and_not_counted():
    Net, eqx = equinox_net()
    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    trained = 4 * 8 + 8 + 8 + 8
    for tree in (model, (model, state), Net(jax.random.key(0)), nnx_net(), linen_net()[1]):
        assert gf.count(tree) == trained
        assert f"32 weights + 24 biases = {trained} parameters" in str(gf.table(tree))
    for tree, kind, n in (
        ((model, state), "State", 17),
        (nnx_net(), "BatchStat", 18),
        (linen_net()[1], "batch_stats", 16),
    ):
        text = " ".join(str(gf.table(tree)).split())
        assert f"state, which is not counted: {n} values" in text
        assert kind in text
    rows = str(gf.table(nnx_net()))
    assert "first/kernel " in rows
    assert "/value" not in rows
    assert gf.count(state) == 0


def test_a_variable_that_modules_of_nnx_share_is_counted_once():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(5, 3, rngs=rngs)
            self.head = nnx.Linear(3, 5, rngs=rngs)
            self.again = self.head
            self.tied = self.embed.embedding

    assert gf.count(Net(nnx.Rngs(0))) == 5 * 3 + 3 * 5 + 5
    assert "30 weights + 5 biases = 35 parameters" in str(gf.table(Net(nnx.Rngs(0))))


def test_only_parameters_of_nnx_are_differentiated():
    net = nnx_net()
    inspection = jax.jit(gf.inspect(lambda net, x: jnp.square(net(x)).mean()))(net, X)
    assert sorted(inspection.param_order) == ["first/bias", "first/kernel", "norm/bias", "norm/scale"]
    assert not [name for name in inspection.stats if name in ("norm/mean", "norm/var")]
    nnx = pytest.importorskip("flax.nnx")
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)

    def of_one(params, x):
        return jnp.square(nnx.merge(graphdef, params, rest, copy=True)(x[None])).sum()

    expected = gf.per_example.norms(of_one)(params, X).total
    norms = gf.per_example.norms(lambda net, x: jnp.square(net(x[None])).sum())(net, X).total
    assert jnp.allclose(norms, expected, rtol=1e-4)


def test_a_model_is_a_function_with_names_of_its_own():
    eqx = pytest.importorskip("equinox")
    mlp = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    names = ["layers/0/weight", "layers/0/bias", "layers/0/bias:relu", "layers/1/weight", "layers/1/bias"]
    sites = gf.sites(mlp)
    assert sites(X[0]).names == names
    assert [*inspect.signature(sites).parameters] == ["x", "key"]
    captured = gf.capture(mlp, keep="layers/0/bias:relu")(X[0])
    assert captured["layers/0/bias:relu"].value.shape == (8,)
    assert jnp.allclose(captured.output, mlp(X[0]), atol=1e-6)
    tangent = gf.capture(mlp, along=(jnp.ones(4),))(X[0]).output_tangent
    assert jnp.allclose(tangent, jax.jvp(mlp, (X[0],), (jnp.ones(4),))[1], atol=1e-5)
    assert jnp.allclose(gf.patch(mlp, {"layers/0/bias:relu": 0.0})(X[0]), mlp.layers[1].bias, atol=1e-6)
    assert gf.sites(nnx_net())(X).names[:2] == ["first/kernel", "first/bias"]
    net = gf.mlp([4, 2])
    assert gf.sites(net)(net.init(jax.random.key(0)), X[0]).names == ["W1", "z1"]


def test_modules_without_their_parameters_say_what_to_pass():
    module, variables = linen_net()
    assert gf.count(module.bind(variables)) == gf.count(variables)
    with pytest.raises(TypeError, match=r"Pass the variables: gf.count\(module.init\(key, x\)\)"):
        gf.count(module)
    by_module = gf.sites(module)(variables, X).names
    assert (
        by_module == gf.sites(module.apply)(variables, X).names == gf.sites(module.bind(variables))(X).names
    )
    hk = pytest.importorskip("haiku")
    transformed = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 2])(x)))
    params = transformed.init(jax.random.key(0), X)
    assert gf.count(params) == 4 * 8 + 8 + 8 * 2 + 2
    assert gf.sites(transformed)(params, X).names == gf.sites(transformed.apply)(params, X).names
    with pytest.raises(TypeError, match=r"Pass them: gf.table\(transformed.init\(key, x\)\)"):
        gf.table(transformed)


def test_shapes_leave_functions_as_they_are():
    eqx = pytest.importorskip("equinox")
    assert gf.shapes(eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))).layers[0].weight == [8, 4]
