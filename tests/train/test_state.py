"""Models with state, and models that contain more than arrays: what is trained, carried, and constant."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf

# Other libraries promote ranks and dtypes, and warn.
pytestmark = pytest.mark.filterwarnings("default")

X = np.random.default_rng(0).normal(1.0, 2.0, [16, 3]).astype("float32")
Y = X.sum(1, keepdims=True)
STEPS = 7


@pytest.fixture(autouse=True)
def their_promotion():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def train(loss, params, optimizer=None, steps=STEPS, data=(X, Y), **options):
    options = {"batch_size": 8, "eval_every": 2, "progress": False, "checkpoint_seconds": 0} | options
    return gf.fit(loss, params, data, optimizer or optax.sgd(0.01), steps, **options)


def batches(steps=STEPS):
    """The batches that `fit` makes of X and Y."""
    for step in range(steps):
        rows = gf.data.epoch_order(16, 8, 0, step // 2)[step % 2]
        yield X[rows], Y[rows]


def plain(leaf):
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def assert_close(one, other):
    close = lambda a, b: np.testing.assert_allclose(plain(a), plain(b), rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, one, other)


def assert_same(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(plain(a), plain(b)), one, other)


class InterruptionError(Exception):
    pass


def resumed(tmp_path, run):
    """A run that is interrupted after four steps, and resumed."""

    def interrupt(*args, calls=[]):  # noqa: B006
        calls.append(0)
        if len(calls) == 3:
            raise InterruptionError
        return {}

    with pytest.raises(InterruptionError):
        run(folder=tmp_path, evaluate=interrupt)
    return run(folder=tmp_path, resume=True)


# A11. State of other frameworks


def nnx_model(momentum=0.9, dropout=0.2, seed=0):
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, momentum=momentum, rngs=rngs)
            self.drop = nnx.Dropout(dropout, rngs=rngs)
            self.last = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))

    return Model(nnx.Rngs(seed))


def nnx_loss(model, batch):
    return jnp.square(model(batch[0]) - batch[1]).mean()


def by_nnx(model, optimizer):
    """The same training by Flax's own optimizer and gradient."""
    from flax import nnx

    trainer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    for batch in batches():
        trainer.update(model, nnx.grad(nnx_loss)(model, batch))
    return model


def variables(model):
    from flax import nnx

    return nnx.to_pure_dict(nnx.state(model))


@pytest.mark.slow
def test_a11_an_nnx_module_trains_as_flax_trains_it():
    model = nnx_model()
    before = variables(model)
    classes = []

    def evaluate(model):
        model.eval()  # of a copy
        classes.append(type(model).__name__)
        return {"validation_loss": nnx_loss(model, (X, Y))}

    optimizer = optax.sgd(0.01, momentum=0.9)
    fitted = train(nnx_loss, model, optimizer, evaluate=evaluate, inspect_every=3)
    expected = by_nnx(nnx_model(), optimizer)
    assert type(fitted.params) is type(model)
    assert_close(variables(fitted.params), variables(expected))
    assert float(jnp.abs(fitted.params.norm.mean[...]).min()) > 0.01
    assert int(fitted.params.drop.rngs.count[...]) == STEPS
    assert classes == ["Model"] * 4
    assert_same(variables(model), before)
    assert {"norm/scale", "first/kernel"} <= set(fitted.inspections[0]["grads"])
    assert "norm/mean" not in fitted.inspections[0]["grads"]


@pytest.mark.slow
def test_a11_weight_decay_leaves_statistics_alone_and_eval_mode_keeps_them():
    model = nnx_model()
    model.norm.var[...] = jnp.full(4, 3.0)
    model.eval()
    fitted = train(nnx_loss, model, optax.adamw(0.05, weight_decay=0.5))
    np.testing.assert_array_equal(fitted.params.norm.var[...], np.full(4, 3.0))
    np.testing.assert_array_equal(fitted.params.norm.mean[...], np.zeros(4))
    assert not np.array_equal(fitted.params.norm.scale[...], model.norm.scale[...])


def test_a11_train_step_carries_an_nnx_module():
    optimizer = optax.sgd(0.01)
    step = gf.train_step(nnx_loss, optimizer)
    state = gf.train_state(nnx_model(), optimizer, jax.random.key(0))
    for batch in batches():
        state, metrics = step(state, batch)
    assert set(metrics) == {"loss"}
    assert_close(variables(state.model), variables(by_nnx(nnx_model(), optimizer)))


@pytest.mark.slow
def test_a11_an_nnx_run_resumes_bit_for_bit_and_is_kept_whole(tmp_path):
    def run(**options):
        return train(nnx_loss, nnx_model(), optax.adam(0.01), **options)

    whole = run(folder=tmp_path / "whole", keep_every=4)
    assert_same(variables(resumed(tmp_path / "part", run).params), variables(whole.params))
    kept = gf.train.kept(tmp_path / "whole", like=nnx_model(seed=1))
    assert list(kept) == [4, STEPS]
    assert_same(variables(kept[STEPS]), variables(whole.params))


@pytest.mark.slow
def test_a11_linen_batch_stats():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(x))
            return nn.Dense(1)(nn.relu(x))

    net = Net()
    start = net.init(jax.random.key(0), X, train=False)

    def loss(params, batch, state):
        x, y = batch
        predictions, state = net.apply({"params": params, **state}, x, train=True, mutable=["batch_stats"])
        return jnp.square(predictions - y).mean(), {"state": state, "size": jnp.abs(predictions).mean()}

    def evaluate(params, state):
        predictions = net.apply({"params": params, **state}, X, train=False)
        return {"validation_loss": jnp.square(predictions - Y).mean()}

    params, stats = start["params"], {"batch_stats": start["batch_stats"]}
    fitted = train(loss, params, state=stats, evaluate=evaluate, inspect_every=4)
    for batch in batches():
        grads, aux = jax.grad(loss, has_aux=True)(params, batch, stats)
        params, stats = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), aux["state"]
    assert_close(fitted.params, params)
    assert_close(fitted.model_state, stats)
    np.testing.assert_allclose(
        fitted.history[-1]["validation_loss"], evaluate(params, stats)["validation_loss"], 1e-4
    )
    assert "size" in fitted.history[0]
    with pytest.raises(TypeError, match="batch_stats must not be trained"):
        train(lambda v, batch: 0.0, {"encoder": start})


@pytest.mark.slow
def test_a11_equinox_state(tmp_path):
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        last: eqx.nn.Linear

        def __init__(self, key):
            self.first = eqx.nn.Linear(3, 4, key=key)
            self.norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
            self.last = eqx.nn.Linear(4, 1, key=key)

        def __call__(self, x, state):
            x, state = self.norm(self.first(x), state)
            return self.last(jax.nn.relu(x)), state

    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))

    def loss(model, batch, state):
        x, y = batch
        predictions, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
            x, state
        )
        return jnp.square(predictions - y).mean(), {"state": state}

    def run(**options):
        return train(loss, model, optax.sgd(0.01), state=state, **options)

    fitted = run()
    expected, carried = model, state
    for batch in batches():
        grads, aux = eqx.filter_grad(loss, has_aux=True)(expected, batch, carried)
        expected, carried = (
            eqx.apply_updates(expected, jax.tree.map(lambda g: -0.01 * g, grads)),
            aux["state"],
        )
    assert isinstance(fitted.params, Net)
    assert_close(eqx.filter(fitted.params, eqx.is_array), eqx.filter(expected, eqx.is_array))
    assert_close(jax.tree.leaves(fitted.model_state), jax.tree.leaves(carried))
    assert any(np.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(fitted.model_state))
    again = resumed(tmp_path, run)
    assert_same(jax.tree.leaves(again.state), jax.tree.leaves(fitted.state))
    with pytest.raises(TypeError, match=r"holds its initial state.*make_with_state"):
        train(lambda model, batch: 0.0, Net(jax.random.key(0)))


def counting(params, batch, state):
    new = {"steps": state["steps"] + 1, "mean": 0.5 * state["mean"] + 0.5 * batch[0].mean(0)}
    return jnp.square(batch[0] @ params["w"] - batch[1][:, 0]).mean(), {"state": new}


W = {"w": jnp.zeros(3)}
STATE = {"steps": jnp.array(0), "mean": jnp.zeros(3)}


def test_a11_any_state_is_carried_kept_and_sharded(tmp_path):
    fitted = train(counting, W, state=STATE, folder=tmp_path, keep_every=4)
    mean = np.zeros(3)
    for x, _ in batches():
        mean = 0.5 * mean + 0.5 * x.mean(0)
    assert int(fitted.model_state["steps"]) == STEPS
    np.testing.assert_allclose(fitted.model_state["mean"], mean, rtol=1e-5)
    params, state = gf.train.kept(tmp_path, like=W, state=STATE)[STEPS]
    assert_same((params, state), (fitted.params, fitted.model_state))
    shared = train(counting, W, state=STATE, mesh=jax.make_mesh((8,), ("data",)))
    assert_close(shared.model_state, fitted.model_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda new: {}, "must return .*state"),
        (lambda new: {"state": {"steps": new["steps"]}}, "changed the structure of state"),
        (lambda new: {"state": {**new, "mean": new["mean"].sum()}}, r"the state mean: expected float32\[3\], got"),
        (lambda new: {"state": {**new, "steps": new["steps"] * 1.0}}, r"the state steps: expected int32\[\], got"),
    ],
)  # fmt: skip
def test_a11_a_loss_that_loses_its_state_is_refused(change, message):
    def loss(params, batch, state):
        value, aux = counting(params, batch, state)
        return value, change(aux["state"])

    with pytest.raises(TypeError, match=message):
        train(loss, W, state=STATE)


def test_a11_a_missing_or_unused_state_is_refused():
    with pytest.raises(TypeError, match="the loss takes state: pass the initial one"):
        train(counting, W)
    with pytest.raises(TypeError, match=r"the loss must be \(params, batch, state\)"):
        train(lambda params, batch: params["w"].sum(), W, state=STATE)
    with pytest.raises(TypeError, match="carries its own state"):
        train(nnx_loss, nnx_model(), state=STATE)


def test_a11_an_nnx_state_with_statistics_in_it_is_refused():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx_model()
    graphdef, state = nnx.split(model)
    with pytest.raises(
        TypeError, match=r"drop/rngs/count.* must not be trained.*nnx.split\(model, nnx.Param"
    ):
        train(lambda state, batch: nnx_loss(nnx.merge(graphdef, state), batch), state)
    # The two lines that the message suggests.
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, batch, state):
        model = nnx.merge(graphdef, params, state, copy=True)
        return nnx_loss(model, batch), {"state": nnx.split(model, nnx.Param, ...)[2]}

    optimizer = optax.sgd(0.01)
    fitted = train(loss, params, optimizer, state=rest)
    trained = nnx.merge(graphdef, fitted.params, fitted.model_state)
    assert_close(variables(trained), variables(by_nnx(nnx_model(), optimizer)))


def test_a11_tools_refuse_a_module_that_the_loss_changes_and_take_its_state_as_aux():
    nnx = pytest.importorskip("flax.nnx")
    model, batch = nnx_model(dropout=0.0), (X, Y)
    for tool in (gf.inspect, gf.sites, gf.nan_guard, gf.nan_origin):
        with pytest.raises(
            TypeError, match=r"changes the NNX module \(norm/mean.*return its new rest as aux"
        ):
            tool(nnx_loss)(model, batch)
    with pytest.raises(TypeError, match="changes the NNX module"):
        jax.jit(gf.inspect(nnx_loss))(model, batch)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, batch):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return nnx_loss(model, batch), nnx.split(model, nnx.Param, ...)[2]

    inspection = gf.inspect(loss, input_grads=False)(params, rest, batch)
    _, expected = loss(params, rest, batch)
    assert_close(inspection.aux, expected)
    model.eval()
    inspection = gf.inspect(nnx_loss, input_grads=False)(model, batch)
    assert_close(inspection.grads.first.kernel[...], nnx.grad(nnx_loss)(model, batch)["first"]["kernel"][...])


# A15. Models that contain more than arrays, and batches without leading axes


@pytest.mark.slow
def test_a15_an_equinox_model_is_trained_whole(tmp_path):
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        mlp: eqx.nn.MLP
        drop: eqx.nn.Dropout
        table: jax.Array  # of integers
        gain: float
        key: jax.Array

        def __call__(self, x):
            assert self.gain == 2.0  # a Python number, on which code branches
            return self.gain * self.drop(self.mlp(x[self.table]), inference=True)

    mlp = eqx.nn.MLP(3, 1, 4, depth=2, activation=jax.nn.tanh, key=jax.random.key(0))
    net = Net(mlp, eqx.nn.Dropout(0.3), jnp.array([2, 0, 1]), 2.0, jax.random.key(3))

    def loss(net, batch):
        return jnp.square(jax.vmap(net)(batch[0]) - batch[1]).mean()

    def run(**options):
        return train(loss, net, optax.adamw(0.01), inspect_every=3, **options)

    fitted = run()
    optimizer, expected = optax.adamw(0.01), net
    state = optimizer.init(eqx.filter(net, eqx.is_inexact_array))
    for batch in batches():
        grads = eqx.filter_grad(loss)(expected, batch)
        updates, state = optimizer.update(grads, state, eqx.filter(expected, eqx.is_inexact_array))
        expected = eqx.apply_updates(expected, updates)
    assert isinstance(fitted.params, Net)
    assert (fitted.params.gain, fitted.params.drop.p, fitted.params.mlp.activation) == (
        2.0,
        0.3,
        net.mlp.activation,
    )
    inexact = lambda tree: eqx.filter(tree, eqx.is_inexact_array)  # noqa: E731
    assert_close(inexact(fitted.params), inexact(expected))
    np.testing.assert_array_equal(fitted.params.table, [2, 0, 1])
    step = gf.train_step(loss, optimizer)
    stepped = gf.train_state(net, optimizer, jax.random.key(0))
    for batch in batches():
        stepped, _ = step(stepped, batch)
    assert_close(inexact(stepped.model), inexact(expected))
    assert_same(inexact(resumed(tmp_path / "part", run).params), inexact(fitted.params))


def test_a15_a_step_of_a_model_with_functions_runs_in_a_scan():
    model = {
        "W": jnp.ones([3]),
        "squash": jnp.tanh,
        "power": 2,
        "name": "net",
        "mask": np.array([True, False, True]),
    }

    def loss(model, x):
        return jnp.mean(model["squash"](x * model["mask"]) @ model["W"]) ** model["power"]

    step = gf.train_step(loss, optax.sgd(0.1))
    state = gf.train_state(model, optax.sgd(0.1), jax.random.key(0))
    state, _ = jax.lax.scan(step, state, jnp.asarray(X.reshape(4, 4, 3)))
    W = model["W"]
    for x in X.reshape(4, 4, 3):
        W = W - 0.1 * jax.grad(lambda W, x=x: loss({**model, "W": W}, x))(W)
    np.testing.assert_allclose(state.model["W"], W, rtol=1e-5)
    assert state.model["squash"] is jnp.tanh
    assert (state.model["power"], state.model["name"]) == (2, "net")


def test_a15_nothing_to_train_is_refused():
    for params in ({}, {"n": jnp.arange(3)}, {"f": jnp.tanh}):
        with pytest.raises(TypeError, match="no floating array in the parameters to train"):
            train(lambda params, batch: 0.0, params)


@pytest.mark.parametrize("mesh", [None, (8,)])
def test_a15_a_batch_may_start_with_a_scalar_or_a_key(mesh):
    def batch(key):
        return {"a": jnp.float32(0.5), "b": key, "x": jax.random.normal(key, [8, 3])}

    def loss(params, batch):
        return jnp.square((batch["x"] @ params["w"]).mean() + batch["a"] * jax.random.uniform(batch["b"]))

    mesh = None if mesh is None else jax.make_mesh(mesh, ("data",))
    fitted = train(loss, W, data=batch, steps=3, mesh=mesh)
    assert fitted.history[-1]["examples_per_second"] > 0
    alone = train(
        lambda params, k: jnp.square(params["w"]).sum() * jax.random.uniform(k), W, data=lambda key: key
    )
    assert alone.history[-1]["step"] == STEPS


def test_a15_complex_parameters_descend():
    target = jnp.array([1 + 2j, -3j])
    fitted = train(lambda z, batch: jnp.square(jnp.abs(z - target)).sum(), jnp.zeros(2, "complex64"),
                   optax.sgd(0.25), steps=60)  # fmt: skip
    np.testing.assert_allclose(fitted.params, target, atol=1e-4)
