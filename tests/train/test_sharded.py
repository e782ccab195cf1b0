"""Training on eight devices: the numbers are those of one device, and each device holds its part of the state."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gradfn as gf
from gradfn.train import chunk
from gradfn.train.source import source_of
from gradfn.train.split import follow

module = sys.modules["gradfn.train._fit"]
STEPS = 4
KEY = jax.random.key(0)
# eps: where a gradient is nearly zero, Adam's update is nothing but its rounding error.
ADAM = optax.adam(0.01, eps=1e-3)
LAYOUTS = {"data": (8, 1), "fsdp": (8, 1), "tensor": (1, 8), "both": (4, 2)}

GPT = gf.GPTConfig(vocab=16, context=8, n_layers=2, n_heads=2, width=16)


def mesh_of(layout, types=AxisType.Auto):
    return jax.make_mesh(LAYOUTS[layout], ("data", "model"), axis_types=(types, types))


def split(params, layout, mesh=None):
    """Put parameters on a mesh: the first axis that divides over `model`, the last one that does over `data`."""
    mesh = mesh or mesh_of(layout)
    axes = {"data": (), "fsdp": ("data",), "tensor": ("model",), "both": ("model", "data")}[layout]

    def one(leaf):
        spec = [None] * leaf.ndim
        for axis in axes:
            order = range(leaf.ndim) if axis == "model" else reversed(range(leaf.ndim))
            fits = [i for i in order if spec[i] is None and leaf.shape[i] % mesh.shape[axis] == 0]
            if fits and leaf.ndim > 1:
                spec[fits[0]] = axis
        return jax.device_put(leaf, NamedSharding(mesh, P(*spec)))

    return jax.tree.map(one, params)


def spec_of(leaf):
    """Return a leaf's spec without the Nones at its end."""
    spec = list(leaf.sharding.spec)
    while spec and spec[-1] is None:
        spec.pop()
    return tuple(spec)


def close(one, other, atol=2e-5):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=atol)


def mlp():
    net = gf.mlp([8, 16, 8])
    x = jax.random.normal(KEY, [48, 8])
    return gf.batch_mean(gf.classification_loss(net)), net.init(KEY), (x, jnp.argmax(x, 1).astype(jnp.int32))


def cnn():
    net = gf.cnn((8, 8, 1), (8,), (16,), 8)
    x = jax.random.normal(KEY, [48, 8, 8, 1])
    return gf.batch_mean(gf.classification_loss(net)), net.init(KEY), (x, jnp.arange(48, dtype=jnp.int32) % 8)


def gpt(scan=False):
    net = gf.gpt(dataclasses.replace(GPT, scan=scan))
    tokens = jax.random.randint(KEY, [48, 9], 0, 16)
    return gf.batch_mean(gf.next_token_loss(net)), net.init(KEY), (tokens[:, :-1], tokens[:, 1:])


def scanned_gpt():
    return gpt(scan=True)


def equinox_model():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 8, 16, 2, key=KEY)

    def loss(model, batch):
        x, y = batch
        return jnp.square(jax.vmap(model)(x) - y).mean()

    x = jax.random.normal(KEY, [48, 8])
    return loss, model, (x, jnp.tanh(x))


def nnx_model():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(8, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.last = nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.norm(self.first(x))))

    def loss(model, batch):
        x, y = batch
        return jnp.square(model(x) - y).mean()

    x = jax.random.normal(KEY, [48, 8])
    return loss, Model(nnx.Rngs(0)), (x, jnp.tanh(x))


def split_model(model, layout):
    """Put the trained arrays of a model of any kind on a mesh."""
    if "flax.nnx" in sys.modules and isinstance(model, sys.modules["flax.nnx"].Module):
        nnx = sys.modules["flax.nnx"]
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        return nnx.merge(graph, split(params, layout), rest)
    floats = lambda leaf: hasattr(leaf, "dtype")  # noqa: E731
    chosen = jax.tree.map(lambda leaf: leaf if floats(leaf) else None, model)
    placed = split(chosen, layout)
    return jax.tree.map(
        lambda new, old: old if new is None else new, placed, model, is_leaf=lambda leaf: leaf is None
    )


def train(loss, params, data, steps=STEPS, optimizer=ADAM, **options):
    options = {"batch_size": 16, "progress": False, "eval_every": 2} | options
    return gf.fit(loss, params, data, optimizer, steps, **options)


ALL = [mlp, cnn, gpt, scanned_gpt, equinox_model, nnx_model]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "model", [pytest.param(one, marks=() if one is mlp else pytest.mark.slow) for one in ALL]
)
def test_the_numbers_are_those_of_one_device(model, layout, monkeypatch):
    loss, params, data = model()
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        alone = train(loss, params, data)
        placed = split_model(params, layout)
        # With the memory of the state reused, and steps guarded, as for a large state.
        monkeypatch.setattr(chunk, "DONATED", 0)
        shared = train(loss, placed, data)
    close(shared.state.params, alone.state.params)
    close(shared.state.opt_state, alone.state.opt_state)
    if alone.model_state is not None:
        close(shared.model_state, alone.model_state)
    assert [row["loss"] for row in shared.history] == pytest.approx(
        [row["loss"] for row in alone.history], rel=1e-5
    )
    # Everything lies where it came from, and Adam's moments with it.
    state, before = shared.state, gf.train_state(placed, ADAM, KEY)
    adam = state.opt_state[0]
    for i, was in enumerate(jax.tree.leaves(before.params)):
        now = [jax.tree.leaves(tree)[i] for tree in (state.params, adam.mu, adam.nu)]
        assert {spec_of(leaf) for leaf in now} == {spec_of(was)}
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(state))
    if layout != "data":
        assert any(spec_of(leaf) for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("layout", ["fsdp", "both"])
def test_a_step_of_your_own_is_the_same(layout):
    loss, params, (x, y) = mlp()
    step = gf.train_step(loss, ADAM)
    alone, shared = gf.train_state(params, ADAM, KEY), gf.train_state(split(params, layout), ADAM, KEY)
    for i in range(3):
        batch = x[16 * i : 16 * i + 16], y[16 * i : 16 * i + 16]
        alone, one = step(alone, batch)
        shared, other = step(shared, batch)
    close(shared.params, alone.params)
    assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
    assert [spec_of(leaf) for leaf in jax.tree.leaves(shared.params)] == [
        spec_of(leaf) for leaf in jax.tree.leaves(split(params, layout))
    ]
    # Each device computes its share of the batch with whole parameters: they are gathered, the batch is not.
    ahead = step.lower(shared, batch).compile()
    close(ahead(shared, batch)[0].params, step(shared, batch)[0].params)
    text = ahead.as_text()
    assert "all-gather" in text
    assert "f32[16,16]" not in text.replace("f32[16,16]{1,0} parameter", "")


@pytest.mark.parametrize("donated", [False, True])
def test_a_mesh_with_explicit_axes_is_the_callers_again(donated, monkeypatch):
    if donated:
        monkeypatch.setattr(chunk, "DONATED", 0)
    loss, params, data = mlp()
    mesh = mesh_of("both", AxisType.Explicit)
    placed = split(params, "both", mesh)
    visited = []
    with jax.set_mesh(mesh):
        shared = train(loss, placed, data, evaluate=lambda params: visited.append(params) or {})
    close(shared.params, train(loss, params, data).params)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves((shared.params, visited[-1])))
    given = train(loss, params, data, mesh=mesh)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(given.params))


def test_memory_per_device_falls_with_the_number_of_devices():
    loss, params, data = mlp()
    sizes = {}
    for n in (1, 2, 8):
        mesh = Mesh(np.array(jax.devices()[:n]).reshape(n, 1), ("data", "model"))
        state = train(loss, split(params, "fsdp", mesh), data, steps=2).state
        arrays = jax.tree.leaves((state.params, state.opt_state))
        sizes[n] = sum(leaf.addressable_shards[0].data.nbytes for leaf in arrays if leaf.ndim > 1)
    assert sizes[1] == 2 * sizes[2] == 8 * sizes[8]


def test_a_large_state_is_donated(monkeypatch):
    """Its memory is reused from chunk to chunk; the caller's arrays are not."""
    loss, params, data = mlp()
    monkeypatch.setattr(chunk, "DONATED", 0)
    placed, before = split(params, "both"), jax.tree.map(np.array, params)
    states, chunks = [], module.chunks

    def watched(*args):
        run = chunks(*args)

        def advance(state, *rest):
            states.append(state)
            return run.advance(state, *rest)

        return run._replace(advance=advance)

    monkeypatch.setattr(module, "chunks", watched)
    for given in (params, placed):
        states.clear()
        fitted = train(loss, given, data)
        assert len(states) > 1
        assert all(leaf.is_deleted() for state in states for leaf in jax.tree.leaves(state))
        close(given, before, atol=0)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(fitted.state))


OPTIMIZERS = {
    "masked": optax.masked(ADAM, lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.scale(-0.01)),
    "multi": optax.multi_transform(
        {"adam": ADAM, "sgd": optax.sgd(0.1, 0.9)},
        lambda params: {name: "adam" if name.startswith("W") else "sgd" for name in params},
    ),
    "lbfgs": optax.lbfgs(memory_size=3),
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=8),
    "free": optax.contrib.schedule_free_adamw(0.01, eps=1e-3),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS])
@pytest.mark.filterwarnings("default")
def test_any_optimizer(name, monkeypatch):
    loss, params, data = mlp()
    monkeypatch.setattr(chunk, "DONATED", 0)
    optimizer = OPTIMIZERS[name]
    alone = train(loss, params, data, optimizer=optimizer)
    shared = train(loss, split(params, "both"), data, optimizer=optimizer)
    close(shared.params, alone.params, atol=1e-4)
    tall = [leaf for leaf in jax.tree.leaves(shared.state.opt_state) if leaf.shape[-2:] == (16, 8)]
    assert all(spec_of(leaf)[-2:] == ("model", "data") for leaf in tall)
    assert bool(tall) == (name != "adafactor")


def test_state_that_belongs_to_no_parameter_is_on_every_device():
    mesh = mesh_of("both")
    params = {"a": {"W": jnp.ones([4, 8])}, "W": jnp.ones(3)}
    shardings = {"a": {"W": NamedSharding(mesh, P("data", "model"))}, "W": NamedSharding(mesh, P())}
    tree = {
        "mu": {"a": {"W": jnp.ones([4, 8])}},
        "nu": {"a": {"W": jnp.ones([5, 4, 8])}},
        "W": jnp.ones([4, 8]),
    }
    found = jax.tree.map(lambda sharding: tuple(sharding.spec), follow(tree, params, shardings))
    assert found == {
        "mu": {"a": {"W": ("data", "model")}},
        "nu": {"a": {"W": (None, "data", "model")}},
        "W": (),
    }


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("inspects", [False, True])
def test_a_step_that_is_not_finite_is_reported(when, inspects, monkeypatch, tmp_path):
    """Also where the state before the chunk is gone; the last good checkpoint can be read."""
    _, params, (x, y) = mlp()
    example = gf.classification_loss(gf.mlp([8, 16, 8]))

    def loss(params, batch):
        value = jax.vmap(lambda one: example(params, one))(batch).mean()
        with jax.named_scope("broken"):
            return value + jnp.log(jnp.min(batch[0]) + 100.0) * 0.01

    rows = gf.data.epoch_order(48, 16, 0, 0)[when]
    x = x.at[rows[0], 0].set(-1000.0)
    errors = []
    for donated in (1 << 24, 0):
        monkeypatch.setattr(chunk, "DONATED", donated)
        with pytest.raises(FloatingPointError) as raised:
            train(
                loss,
                split(params, "both"),
                (x, y),
                6,
                folder=tmp_path,
                checkpoint_seconds=0,
                eval_every=6,  # the second chunk has more than one step
                inspect_every=2 if inspects else None,
            )
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"step {when}: the loss became nan")
    assert "broken" in errors[0]


@jax.custom_vjp
def fragile(x, bad):
    """Return x, whose gradient is NaN where `bad` is 1."""
    return x


fragile.defvjp(lambda x, bad: (x, bad), lambda bad, g: (jnp.where(bad > 0, jnp.nan, g), jnp.zeros_like(bad)))


@pytest.mark.filterwarnings("default")
def test_an_optimizer_may_mend_its_gradients(monkeypatch):
    """Where a state is donated, a chunk ends before a step whose gradient is NaN, takes it, and continues."""
    mean, params, (x, y) = mlp()
    bad = jnp.zeros(48).at[gf.data.epoch_order(48, 16, 0, 0)[2][0]].set(1.0)
    optimizer = optax.chain(optax.zero_nans(), ADAM)
    counts = []

    def loss(params, batch):
        x, y, bad = batch
        return mean({**params, "b1": fragile(params["b1"], bad.max())}, (x, y))

    def counted(*args):
        counts.append(0)
        return finished(*args)

    finished = module.finished
    monkeypatch.setattr(module, "finished", counted)
    runs = []
    for donated in (1 << 24, 0):
        monkeypatch.setattr(chunk, "DONATED", donated)
        runs.append(train(loss, params, (x, y, bad), 6, optimizer=optimizer, eval_every=6))
    assert len(counts) >= 1
    close(runs[1].params, runs[0].params, atol=1e-6)
    assert runs[1].history[-1]["loss"] == pytest.approx(runs[0].history[-1]["loss"], rel=1e-6)
    with pytest.raises(FloatingPointError, match="step 2: a gradient or an update is not finite"):
        train(loss, params, (x, y, bad), 6, eval_every=6)


def test_an_update_that_is_not_finite_is_reported(monkeypatch):
    """From finite gradients: nothing is left to repeat the steps from, so the error names where it must have been."""
    loss, params, data = mlp()

    def update(updates, count, params=None):
        broken = {**updates, "W2": jnp.where(count == 2, jnp.inf, updates["W2"])}
        return broken, count + 1

    optimizer = optax.chain(optax.sgd(0.1), optax.GradientTransformation(lambda params: jnp.int32(0), update))
    monkeypatch.setattr(chunk, "DONATED", 0)
    message = r"a step from 1 to \d: an update is not finite, though the gradients are; in .*W2"
    with pytest.raises(FloatingPointError, match=message):
        train(loss, params, data, 6, optimizer=optimizer, eval_every=6)


@pytest.mark.parametrize("donated", [pytest.param(1 << 24, marks=pytest.mark.slow), 0])
def test_everything_that_fit_records_is_the_same(donated, monkeypatch, tmp_path):
    """Inspections, the noise scale, evaluations, kept parameters, and a run that is interrupted and resumed."""
    monkeypatch.setattr(chunk, "DONATED", donated)
    loss, params, data = mlp()
    options = {"inspect_every": 2, "noise_every": 3, "keep_every": 2, "checkpoint_seconds": 0}

    def evaluate(params):
        return {"size": sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))}

    alone = train(loss, params, data, 6, evaluate=evaluate, folder=tmp_path / "alone", **options)
    placed = split(params, "both")
    shared = train(loss, placed, data, 6, evaluate=evaluate, folder=tmp_path / "shared", **options)
    for name in ("history", "inspections", "noise"):
        rows = getattr(alone, name), getattr(shared, name)
        for one, other in zip(*rows, strict=True):
            assert_rows_are_close(one, other)
    kept = [gf.train.kept(tmp_path / name, like=params) for name in ("alone", "shared")]
    assert list(kept[0]) == list(kept[1]) == [2, 4, 6]
    close(kept[1][4], kept[0][4])

    calls = []

    def interrupted(params):
        calls.append(0)
        if len(calls) == 2:
            raise InterruptedError
        return evaluate(params)

    with pytest.raises(InterruptedError):
        train(loss, placed, data, 6, evaluate=interrupted, folder=tmp_path / "again", **options)
    again = train(loss, placed, data, 6, evaluate=evaluate, folder=tmp_path / "again", resume=True, **options)
    jax.tree.map(np.testing.assert_array_equal, again.params, shared.params)
    assert [spec_of(leaf) for leaf in jax.tree.leaves(again.params)] == [
        spec_of(leaf) for leaf in jax.tree.leaves(shared.params)
    ]


def assert_rows_are_close(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one.keys() - {"seconds", "examples_per_second"}:
            assert_rows_are_close(one[name], other[name])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_rows_are_close(a, b)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
    else:
        assert one == other


@pytest.mark.parametrize("kind", ["host", "function", "split"])
def test_data_of_every_kind_are_shared(kind):
    loss, params, (x, y) = mlp()
    x, y = np.asarray(x), np.asarray(y)
    if kind == "host":
        data = gf.train.from_host(lambda step: (x[:16] + step, y[:16]))
    elif kind == "function":
        data = lambda key: (jax.random.normal(key, [16, 8]), jnp.arange(16) % 8)  # noqa: E731
    else:
        mesh = mesh_of("fsdp")
        data = jax.device_put((x, y), NamedSharding(mesh, P("data")))
    alone = train(loss, params, (x, y) if kind == "split" else data)
    close(train(loss, split(params, "fsdp"), data).params, alone.params)


def test_data_on_the_host_go_to_their_devices_at_once():
    """Each device gets what it needs from the host: nothing is copied to the first one before."""
    _, _, data = mlp()
    data, mesh = jax.tree.map(np.asarray, data), mesh_of("fsdp")
    source = source_of(data, 16, 0)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((source.arrays, source.order(0))))
    placed = source.placed(mesh, "data")
    assert all(len(leaf.devices()) == 8 for leaf in jax.tree.leaves((placed.arrays, placed.order(0))))
    batches = gf.train.from_host(lambda step: jax.tree.map(lambda leaf: leaf[:16], data))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batches.order(0)))
    order = batches.placed(mesh, "data").order(0)
    assert all(spec_of(leaf) == (None, "data") for leaf in jax.tree.leaves(order))


ONE_AXIS = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (lambda params: split(params, "fsdp"), {"batch_size": 12},
         r"the batch size must be a multiple of 8, the size of the mesh's axis data, got 12. The next one is 16"),
        (lambda params: params, {"mesh": Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "model"))},
         r"batches are split over the mesh's axis 'data', but Mesh\(x=4, model=2\) has no axis of that name. "
         r"Make the mesh with one, such as jax.make_mesh\(\(4, 2\), \('data', 'model'\)\)"),
        (lambda params: jax.device_put(params, NamedSharding(ONE_AXIS, P("model"))), {},
         r"Mesh\(model=8\) has no axis of that name. .*jax.make_mesh\(\(1, 8\), \('data', 'model'\)\)"),
        (lambda params: {**split(params, "both"), "W2": split(params, "fsdp")["W2"]}, {},
         r"the arrays must be on one mesh, but W1 is on Mesh\(data=4, model=2\) and W2 is on "
         r"Mesh\(data=8, model=1\)"),
        (lambda params: split(params, "both"), {"mesh": mesh_of("fsdp")},
         r"the parameters are on Mesh\(data=4, model=2\), but mesh= is Mesh\(data=8, model=1\). Leave mesh= out"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_nothing_is_lost(params, options, message, tmp_path):
    loss, start, data = mlp()
    train(loss, start, data, folder=tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(ValueError, match=message):
        train(loss, params(start), data, folder=tmp_path, **options)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_an_only_axis_may_have_any_name():
    loss, params, data = mlp()
    mesh = jax.make_mesh((8,), ("devices",))
    close(train(loss, params, data, mesh=mesh).params, train(loss, params, data).params)
