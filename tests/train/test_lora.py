"""LoRA: adapters on any tree, their gradients by hand, training with frozen weights that stay arguments."""

import importlib
import inspect
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors

import gradfn as gf
from gradfn.train.held import held

NET = gf.mlp([6, 5, 4])
LOSS = gf.batch_mean(gf.classification_loss(NET))
DATA = np.random.default_rng(0).normal(size=[8, 6]).astype("float32"), np.arange(8) % 4


def random_like(tree, seed=1):
    """Return random arrays, also for the zeros of lora_B."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([jax.random.normal(k, x.shape, x.dtype) / 4 for k, x in zip(keys, leaves)])


def value(loss, params):
    return jax.jit(lambda params: loss(params, DATA))(params)


def assert_close(one, other, **options):
    options = {"rtol": 1e-5, "atol": 1e-6} | options
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **options), one, other)


def test_gradients_are_those_of_the_formula():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 5)
        W, x, y = (
            jax.random.normal(k, s, jnp.float64) for k, s in zip(keys, ([5, 4], [7, 4], [7, 5]), strict=False)
        )
        lora = gf.train.lora({"W": W}, 2, where="W", alpha=3.0)
        adapters = random_like(lora.adapters)
        assert adapters["W"]["lora_A"].dtype == jnp.float64
        loss = lambda params, batch: jnp.square(batch[0] @ params["W"].T - batch[1]).sum()  # noqa: E731
        grads = jax.grad(lora.loss(loss))(adapters, (x, y))["W"]
        A, B = adapters["W"]["lora_A"], adapters["W"]["lora_B"]
        G = 2 * (x @ (W + 1.5 * B @ A).T - y).T @ x  # of the merged matrix
        assert_close(grads["lora_B"], 1.5 * G @ A.T, rtol=1e-12)
        assert_close(grads["lora_A"], 1.5 * B.T @ G, rtol=1e-12)
        step = 1e-5 * random_like(adapters, 2)["W"]["lora_A"]
        moved = [{"W": {"lora_A": A + s * step, "lora_B": B}} for s in (1, -1)]
        slope = (lora.loss(loss)(moved[0], (x, y)) - lora.loss(loss)(moved[1], (x, y))) / 2
        assert_close(slope, jnp.vdot(grads["lora_A"], step), rtol=1e-6)


def test_merged_parameters_give_the_loss_of_the_adapters():
    params = NET.init(jax.random.key(0))
    lora = gf.train.lora(params, 2, where=["W1", "*2"], alpha=4)
    assert gf.shapes(lora.adapters["W1"]) == {"lora_A": [2, 6], "lora_B": [5, 2]}
    assert "b2" not in lora.adapters
    # B is zero: training starts from the model.
    assert_close(value(lora.loss(LOSS), lora.adapters), value(LOSS, params))
    adapters = random_like(lora.adapters)
    merged = lora.merge(adapters)
    assert_close(value(lora.loss(LOSS), adapters), value(LOSS, merged))
    assert merged["b1"] is params["b1"]
    # The adapters of the sum are those that it was made of, up to the choice of factors.
    again = lora.split(merged)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    assert_close(lora.merge(again), merged, atol=1e-5)


def test_stacked_layers_have_adapters_of_their_own():
    each = [{"W": jax.random.normal(jax.random.key(i), [4, 6]), "b": jnp.zeros(4)} for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    lora = gf.train.lora({"blocks": stacked}, 2, where="*", alpha=3)
    assert gf.shapes(lora.adapters["blocks"]["W"]) == {"lora_A": [3, 2, 6], "lora_B": [3, 4, 2]}
    A = lora.adapters["blocks"]["W"]["lora_A"]
    assert not np.array_equal(A[0], A[1])
    adapters = random_like(lora.adapters)
    merged = lora.merge(adapters)
    one = gf.train.lora(each[1], 2, where="W", alpha=3)
    of_one = jax.tree.map(lambda leaf: leaf[1], adapters["blocks"])
    assert_close(one.merge(of_one)["W"], merged["blocks"]["W"][1])
    assert_close(lora.merge(lora.split(merged)), merged, atol=1e-5)


def test_a_is_on_the_side_of_the_inputs():
    kernels = {
        "dense": {"kernel": jnp.ones([3, 5])},  # [in, out]
        "query": {"kernel": jnp.ones([8, 2, 4]), "bias": jnp.ones([2, 4])},  # of Flax's attention
        "out": {"kernel": jnp.ones([2, 4, 8]), "bias": jnp.ones(8)},
        "conv": {"kernel": jnp.ones([3, 3, 2, 6]), "bias": jnp.ones(6)},
        "theirs": {"weight": jnp.ones([6, 2, 3, 3]), "bias": jnp.ones([6, 1, 1])},  # Equinox's convolution
        "mlp/~/linear_0": {"w": jnp.ones([3, 5])},  # Haiku
        "plain": {"W": jnp.ones([5, 3])},
    }
    lora = gf.train.lora(kernels, 1, where="*", key=jax.random.key(3))
    sizes = {
        "dense": (3, 5),
        "query": (8, 8),
        "out": (8, 8),
        "conv": (18, 6),
        "theirs": (18, 6),
        "plain": (3, 5),
    }
    for name, (n_in, n_out) in sizes.items():
        (adapter,) = lora.adapters[name].values()
        assert gf.shapes(adapter) == {"lora_A": [1, n_in], "lora_B": [n_out, 1]}, name
        assert np.abs(adapter["lora_A"]).max() <= n_in**-0.5
        assert adapter["lora_A"].std() > 0
        assert not adapter["lora_B"].any()
    assert gf.shapes(lora.adapters["mlp"]["~"]["linear_0"]["w"]) == {"lora_A": [1, 3], "lora_B": [5, 1]}
    adapters = random_like(lora.adapters)
    merged = lora.merge(adapters)
    change = lambda name: jnp.einsum(  # noqa: E731
        "or,ri->io", adapters[name]["kernel"]["lora_B"], adapters[name]["kernel"]["lora_A"]
    )
    assert_close(merged["query"]["kernel"], 1 + change("query").reshape(8, 2, 4))
    assert_close(merged["out"]["kernel"], 1 + change("out").reshape(2, 4, 8))
    assert_close(lora.merge(lora.split(merged)), merged, atol=1e-5)
    turned = gf.train.lora(kernels, 1, where="plain/W", layout="in_out")
    assert gf.shapes(turned.adapters["plain"]["W"]) == {"lora_A": [1, 5], "lora_B": [3, 1]}


def test_what_cannot_be_adapted_is_refused_by_name():
    params = {
        "conv": {"W": jnp.ones([4, 3, 5, 5])},
        "dense": {"W": jnp.ones([4, 3]), "b": jnp.ones(4)},
        "wave": jnp.ones([4, 4], complex),
    }
    refused = {
        "conv/W": r"lora: conv/W \[4, 3, 5, 5\] float32 is not a matrix, and no bias beside it",
        "dense/b": "chooses no matrix, only dense/b",
        "dense/w": "no parameter has the path 'dense/w'. Did you mean dense/b, dense/W",
        "wave": "wave is complex64, expected a floating matrix",
    }
    for where, message in refused.items():
        with pytest.raises((ValueError, TypeError), match=message):
            gf.train.lora(params, 1, where=where)
    for rank in (0, 3):
        with pytest.raises(ValueError, match=rf"dense/W: rank must be in \[1, 3\), .* got {rank}"):
            gf.train.lora(params, rank, where="dense/*")
    with pytest.raises(ValueError, match="layout must be"):
        gf.train.lora(params, 1, where="dense/W", layout="oi")
    lora = gf.train.lora(params, 1, where=lambda name: name.startswith("dense"))
    with pytest.raises(gf.ParameterError, match="dense/W/lora_A: expected"):
        lora.merge({"dense": {"W": {"lora_A": jnp.ones([2, 3]), "lora_B": jnp.ones([4, 2])}}})
    full_rank = params | {"dense": params["dense"] | {"W": jnp.ones([4, 3]) + jnp.eye(4, 3)}}
    with pytest.raises(ValueError, match="dense/W: rank 1 leaves out"):
        lora.split(full_rank)
    with pytest.raises(ValueError, match="dense/b has changed, but has no adapter"):
        lora.split(params | {"dense": params["dense"] | {"b": jnp.zeros(4)}})


@pytest.mark.slow
def test_fit_trains_and_saves_the_adapters_alone(tmp_path):
    params = NET.init(jax.random.key(0))
    lora = gf.train.lora(params, 2, where="W*")
    options = {"batch_size": 4, "eval_every": 4, "progress": False, "folder": tmp_path}
    args = lora.adapters, DATA, optax.adam(0.05)
    fitted = gf.fit(lora.loss(LOSS), *args, 8, inspect_every=4, noise_every=4, **options)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    assert "W1/lora_B" in str(fitted.inspections[0])
    assert len(fitted.noise) == 2
    saved = gf.train.load_params(tmp_path, lora.adapters)
    assert_close(saved, fitted.params, rtol=0, atol=0)
    with safetensors.safe_open(tmp_path / "checkpoint.safetensors", "numpy") as file:
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    weights = sum(size for name, size in sizes.items() if "lora" in name)
    assert weights == 3 * gf.count(lora.adapters)  # and the two moments of Adam
    assert not [name for name in sizes if "W1" in name and "lora" not in name]
    # The same by hand.
    state = gf.train_state(lora.adapters, optax.adam(0.05), jax.random.key(0))
    step = gf.train_step(lora.loss(LOSS), optax.adam(0.05))
    for i in range(8):
        rows = gf.data.epoch_order(8, 4, 0, i // 2)[i % 2]
        state, _ = step(state, jax.tree.map(lambda part, rows=rows: part[rows], DATA))
    assert_close(state.params, fitted.params, rtol=1e-4, atol=1e-5)
    # A run on other frozen weights is another run.
    other = gf.train.lora(jax.tree.map(lambda leaf: leaf * 1.1, params), 2, where="W*")
    with pytest.raises(gf.CheckpointError, match="loss: it computes something different"):
        gf.fit(other.loss(LOSS), *args, 16, resume=True, **options)


def test_frozen_weights_are_arguments_and_are_not_differentiated():
    net = gf.mlp([300, 200, 10])
    params = net.init(jax.random.key(0))
    lora = gf.train.lora(params, 2, where="W2")
    loss = lora.loss(gf.batch_mean(gf.classification_loss(net)))
    batch = jnp.ones([4, 300]), jnp.zeros(4, int)
    state = gf.train_state(lora.adapters, optax.sgd(0.1), jax.random.key(0))
    text = gf.train_step(loss, optax.sgd(0.1)).lower(state, batch).as_text()
    # W1 alone is 480,000 hexadecimal digits where it is a constant.
    assert len(text) < 30_000
    assert "tensor<200x300xf32>" in text
    # One product forward with W1, none backward: neither its gradient nor that of the input is computed.
    arrays, of = held(loss)
    grad = lambda arrays, adapters: jax.grad(of(arrays))(adapters, batch)  # noqa: E731
    program = str(jax.make_jaxpr(grad)(arrays, lora.adapters))
    assert "f32[200,300] = dot_general" not in program
    assert "f32[4,300] = dot_general" not in program
    jitted = jax.jit(lambda loss, adapters: gf.inspect(gf.batch_mean(loss))(adapters, batch))
    assert len(jitted.lower(loss.example, lora.adapters).as_text()) < 200_000


@pytest.mark.parametrize("adapted", [False, True])
def test_a_step_compiled_ahead_takes_what_the_step_takes(adapted):
    lora = gf.train.lora(NET.init(jax.random.key(0)), 2, where="W1")
    loss, params = (lora.loss(LOSS), lora.adapters) if adapted else (LOSS, NET.init(jax.random.key(0)))
    state = gf.train_state(params, optax.sgd(0.1), jax.random.key(0))
    step = gf.train_step(loss, optax.sgd(0.1))
    chex.assert_trees_all_equal(step.lower(state, DATA).compile()(state, DATA), step(state, DATA))


def test_gradients_of_adapters_are_inspected_by_name():
    lora = gf.train.lora({"net": NET.init(jax.random.key(0))}, 2, where="net/W1")
    loss = lora.loss(gf.batch_mean(lambda params, example: LOSS.example(params["net"], example)))
    adapters = random_like(lora.adapters)
    inspection = jax.jit(gf.inspect(loss))(adapters, DATA)
    assert "net/W1/lora_A" in str(inspection)
    assert_close(inspection.grads, jax.jit(jax.grad(loss))(adapters, DATA), atol=1e-5)
    norms = jax.jit(gf.per_example.norms(loss.example))(adapters, DATA)
    each = jax.jit(jax.vmap(jax.grad(loss.example), (None, 0)))(adapters, DATA)
    squares = sum(np.square(leaf).reshape(8, -1).sum(1) for leaf in jax.tree.leaves(each))
    assert_close(norms.total, np.sqrt(squares), rtol=1e-3)


def test_narrow_weights_are_rounded_once():
    params = {"W": jnp.ones([4, 4], jnp.bfloat16)}
    lora = gf.train.lora(params, 1, where="W")
    assert lora.adapters["W"]["lora_A"].dtype == jnp.float32
    small, large = (
        {"W": {"lora_A": jnp.ones([1, 4]), "lora_B": jnp.full([4, 1], size)}} for size in (0.003, 0.01)
    )
    # Neighbors of 1 are 1/128 apart.
    assert lora.merge(small)["W"].dtype == jnp.bfloat16
    assert (lora.merge(small)["W"] == 1).all()
    assert (lora.merge(large)["W"] == 1 + 2**-7).all()
    loss = lambda params, x: (params["W"].astype(jnp.float32) @ x).sum()  # noqa: E731
    assert lora.loss(loss)(small, jnp.ones(4)) == loss(lora.merge(small), jnp.ones(4)) == 16
    # The gradient passes the rounding, so that small changes add up.
    assert_close(jax.grad(lora.loss(loss))(small, jnp.ones(4))["W"]["lora_B"], jnp.full([4, 1], 4.0))


@pytest.mark.slow
def test_the_wrapped_loss_keeps_its_kind_and_arguments():
    lora = gf.train.lora(NET.init(jax.random.key(0)), 2, where="W1")
    options = {"batch_size": 4, "progress": False}
    with pytest.raises(TypeError, match=r"takes the loss of a batch, got gf.classification_loss\(net\)"):
        gf.fit(lora.loss(LOSS.example), lora.adapters, DATA, optax.sgd(0.1), 1, **options)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\)"):
        gf.fit(lora.loss(LOSS), lora.adapters, (DATA[0], np.full(8, 7)), optax.sgd(0.1), 1, **options)

    def noisy(params, example, *, key):
        return LOSS.example(params, (example[0] + jax.random.normal(key, [6]), example[1])), {"one": 1.0}

    wrapped = lora.loss(gf.batch_mean(noisy))
    assert str(inspect.signature(wrapped)) == "(params, example, *, key)"
    fitted = gf.fit(wrapped, lora.adapters, DATA, optax.sgd(0.1), 2, **options)
    assert fitted.history[-1]["one"] == 1


X = np.random.default_rng(0).normal(size=[16, 3]).astype("float32")
Y = X.sum(1, keepdims=True)


def equinox_model():
    eqx = importlib.import_module("equinox")
    model = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))

    def loss(model, batch):
        return jnp.square(jax.vmap(model)(batch[0]).sum(1, keepdims=True) - batch[1]).mean()

    return model, loss, "*weight"


def nnx_model():
    nnx = importlib.import_module("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
            self.last = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.norm(self.first(x)))).sum(1, keepdims=True)

    return Net(nnx.Rngs(0)), (lambda net, batch: jnp.square(net(batch[0]) - batch[1]).mean()), "*kernel"


def linen_model():
    nn = importlib.import_module("flax.linen")
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(8), lambda x: x.sum(1, keepdims=True)])
    params = model.init(jax.random.key(0), X)
    return params, (lambda params, batch: jnp.square(model.apply(params, batch[0]) - batch[1]).mean()), "*"


def haiku_model():
    hk = importlib.import_module("haiku")
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 2])(x).sum(1, keepdims=True)))
    params = model.init(jax.random.key(0), X)
    return params, (lambda params, batch: jnp.square(model.apply(params, batch[0]) - batch[1]).mean()), "*/w"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("make", [equinox_model, nnx_model, linen_model, haiku_model])
def test_models_of_other_frameworks(make):
    pytest.importorskip({"equinox_model": "equinox", "haiku_model": "haiku"}.get(make.__name__, "flax"))
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        model, loss, where = make()
        lora = gf.train.lora(model, 1, where=where)
        before = jax.tree.leaves(model)
        options = {} if lora.state is None else {"state": lora.state}
        fitted = gf.fit(
            lora.loss(loss),
            lora.adapters,
            (X, Y),
            optax.adam(0.05),
            40,
            batch_size=16,
            progress=False,
            **options,
        )
        assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
        merged = lora.merge(fitted.params, fitted.model_state)
        assert type(merged) is type(model)
        for old, new in zip(before, jax.tree.leaves(model), strict=True):
            assert old is new
        shown = loss(merged, (X, Y))
        assert shown < 0.9 * loss(model, (X, Y))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_peft_computes_the_same():
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Sigmoid(), torch.nn.Linear(5, 4))
    params = {
        f"{name}{i}": getattr(model[k], full).detach().numpy().copy()
        for i, k in ((1, 0), (2, 2))
        for name, full in (("W", "weight"), ("b", "bias"))
    }
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    A, B = theirs.base_model.model[0].lora_A.default.weight, theirs.base_model.model[0].lora_B.default.weight
    assert not B.any()
    torch.nn.init.normal_(B)
    x, labels = map(torch.tensor, DATA)
    torch.nn.functional.cross_entropy(theirs(x), labels).backward()
    lora = gf.train.lora(jax.tree.map(jnp.asarray, params), 2, where="W1", alpha=3)
    # The same distribution at the start.
    assert gf.shapes(lora.adapters["W1"]) == {"lora_A": list(A.shape), "lora_B": list(B.shape)}
    adapters = {"W1": {"lora_A": jnp.asarray(A.detach().numpy()), "lora_B": jnp.asarray(B.detach().numpy())}}
    grads = jax.grad(lora.loss(LOSS))(adapters, DATA)["W1"]
    assert_close(grads["lora_A"], A.grad.numpy(), atol=1e-6)
    assert_close(grads["lora_B"], B.grad.numpy(), atol=1e-6)
    merged = theirs.merge_and_unload()
    assert_close(lora.merge(adapters)["W1"], merged[0].weight.detach().numpy())
