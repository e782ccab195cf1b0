"""Arguments of the wrong kind: one error each that says what to type; nets and models count as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf

NET = gf.mlp([3, 2])
X, Y = np.ones([8, 3], np.float32), np.zeros(8, int)


def fit(data=(X, Y), optimizer=None, **options):
    start = NET.init(jax.random.key(0))
    return gf.fit(
        gf.batch_mean(gf.classification_loss(NET)),
        start,
        data,
        optimizer or optax.sgd(0.1),
        2,
        batch_size=4,
        **options,
    )


@pytest.mark.parametrize(
    ("optimizer", "remedy"),
    [
        (0.1, r"got 0.1. Pass optax.adam\(0.1\)"),
        (1, r"optax.adam\(1\)"),
        ("adam", "got adam. Pass optax.adam"),
    ],
)
def test_a_number_or_a_name_as_optimizer(optimizer, remedy):
    with pytest.raises(TypeError, match=rf"optimizer must be an optax optimizer, got .*{remedy[4:]}"):
        fit(optimizer=optimizer)


def test_an_optimizer_that_was_not_made():
    with pytest.raises(TypeError, match=r"got adam. Pass optax.adam\(1e-3\)"):
        fit(optimizer=optax.adam)


@pytest.mark.parametrize("kind", ["generator", "zip", "map", "set", "DataLoader"])
def test_an_iterable_of_batches_as_data(kind):
    class DataLoader:
        def __iter__(self):
            return iter([(X, Y)])

        def __len__(self):
            return 1

    made = {
        "generator": lambda: ((X, Y) for _ in range(3)),
        "zip": lambda: zip([X], [Y], strict=True),
        "map": lambda: map(jnp.asarray, [X]),
        "set": lambda: {1.0, 2.0},
        "DataLoader": DataLoader,
    }
    with pytest.raises(TypeError, match=rf"got a {kind}, .*Pass gf.train.from_loader"):
        fit(made[kind]())


def test_a_loader_of_torch_as_data():
    torch = pytest.importorskip("torch")
    examples = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    with pytest.raises(TypeError, match="got a DataLoader"):
        fit(torch.utils.data.DataLoader(examples, batch_size=4))


@pytest.mark.parametrize("seed", [0, np.int64(7), jnp.int32(7), 0.5, None])
def test_a_seed_is_no_key(seed):
    with pytest.raises(TypeError, match=r"init: expected a key, got .*Pass jax.random.key\(0\)"):
        NET.init(seed)


def test_every_kind_of_key_initializes():
    for key in (jax.random.key(0), jax.random.PRNGKey(0), jax.random.key(0, impl="rbg")):
        assert jax.jit(NET.init)(key)["W1"].shape == NET.init(key)["W1"].shape == (2, 3)
    assert jax.vmap(NET.init)(jax.random.split(jax.random.key(0), 3))["W1"].shape == (3, 2, 3)


def test_a_net_is_counted_and_tabled_as_its_spec():
    assert gf.count(NET) == gf.count(NET.spec) == 8
    assert str(gf.table(NET)) == str(gf.table(NET.spec))
    assert gf.shapes(NET) == gf.shapes(NET.spec)


def test_a_model_of_equinox_is_counted_by_its_arrays():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))  # an activation function among its leaves
    assert gf.count(model) == 3 * 4 + 4 + 4 * 2 + 2
    assert "20 weights + 6 biases = 26 parameters" in str(gf.table(model))
    conv = eqx.nn.Conv2d(1, 6, 3, key=jax.random.key(0))  # its bias is [6, 1, 1]
    assert "54 weights + 6 biases = 60 parameters" in str(gf.table(conv))
    assert gf.count(eqx.nn.Sequential([eqx.nn.Linear(3, 2, key=jax.random.key(0)), eqx.nn.Dropout(0.5)])) == 8


@pytest.mark.parametrize("what", [5, "W1", [1.0, 2.0], jax.nn.relu])
def test_what_has_no_parameters_is_not_counted_as_nothing(what):
    for function in (gf.count, gf.table):
        with pytest.raises(
            TypeError, match=f"{function.__name__}: expected parameters, a spec, a net or a model, got"
        ):
            function(what)
    assert gf.count({}) == 0
