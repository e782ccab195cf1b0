"""Loss spikes: they are found, examined at the parameters that they happened at, and do not depend on the chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn.train.bands import Bands, Spike
from gradfn.train.spikes import moments

N, BAD, BATCH, STEPS = 640, 333, 8, 120


def regression(bad=300.0):
    """A small regression one of whose examples has a target far from all others."""
    net = gf.mlp([4, 8, 1], activation="tanh")
    x = jax.random.normal(jax.random.key(0), [N, 4])
    y = np.array(jnp.sin(x.sum(1, keepdims=True)))
    y[BAD] = bad
    return gf.batch_mean(gf.regression_loss(net)), net.init(jax.random.key(1)), (np.array(x), y)


def fit(watch="spike", *, optimizer=None, steps=STEPS, bad=300.0, **options):
    loss, params, data = regression(bad)
    options = {"batch_size": BATCH, "progress": False} | options
    return gf.fit(loss, params, data, optimizer or optax.adam(1e-3), steps, inspect_when=watch, **options)


def steps_with(example):
    rows = np.concatenate([gf.data.epoch_order(N, BATCH, 0, epoch) for epoch in range(2)])[:STEPS]
    return [int(step) for step in np.flatnonzero((rows == example).any(1))]


@pytest.fixture(scope="module")
def fitted():
    return fit()


def test_every_step_with_the_bad_example_is_found_and_names_it(fitted):
    expected = [step for step in steps_with(BAD) if step >= Spike().after]
    assert [row["step"] for row in fitted.spikes] == expected
    for row in fitted.spikes:
        assert set(row["left"]) == {"loss", "grad_norm"}
        most = row["examples"]["largest"][0]
        assert most["index"] == BAD
        assert most["share"] > 0.99
        assert f"example {BAD} has" in row["text"]
        assert row["values"]["loss"] > row["edges"]["loss"]


def test_a_spike_is_examined_at_the_parameters_before_its_step(fitted):
    loss, params, data = regression()
    first = fitted.spikes[0]
    step = gf.train_step(loss, optax.adam(1e-3))
    state = gf.train_state(params, optax.adam(1e-3), jax.random.key(0))
    order = np.concatenate([gf.data.epoch_order(N, BATCH, 0, epoch) for epoch in range(2)])
    batches = [tuple(jnp.asarray(part[rows]) for part in data) for rows in order[: first["step"] + 1]]
    for batch in batches[:-1]:
        state, _ = step(state, batch)
    batch = batches[-1]
    grads = jax.vmap(jax.grad(loss.example), (None, 0))(state.params, batch)
    norms = jnp.sqrt(sum(jnp.square(g).reshape(BATCH, -1).sum(1) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(first["examples"]["norms"], norms, rtol=1e-4)
    value, grads = jax.value_and_grad(loss)(state.params, batch)
    assert first["inspection"]["value"] == pytest.approx(float(value), rel=1e-4)
    norms = {name: float(jnp.linalg.norm(g)) for name, g in grads.items()}
    for parameter in first["parameters"]:
        assert parameter["grad_norm"] == pytest.approx(norms[parameter["name"]], rel=1e-4)
    mu = state.opt_state[0].mu["W1"]
    assert first["moments"]["mu"]["W1"] == pytest.approx(float(jnp.sqrt(jnp.mean(mu**2))), rel=1e-4)


def test_watching_changes_no_bit_of_the_training(fitted):
    plain = fit(None)
    jax.tree.map(np.testing.assert_array_equal, plain.params, fitted.params)
    assert list(plain.spikes) == []


def test_chunks_of_other_lengths_find_the_same(fitted, monkeypatch):
    monkeypatch.setattr("gradfn.train._fit.CAPACITY", 7)
    assert [dict(row) for row in fit().spikes] == [dict(row) for row in fitted.spikes]


def test_a_run_that_resumes_finds_the_same(fitted, tmp_path):
    fit(steps=70, folder=tmp_path, resume=True)
    resumed = fit(folder=tmp_path, resume=True)
    assert [dict(row) for row in resumed.spikes] == [dict(row) for row in fitted.spikes]
    again = fit(folder=tmp_path, resume=True)
    assert len(again.spikes) == len(fitted.spikes)


def test_a_quiet_run_has_no_spikes():
    assert list(fit(bad=0.5).spikes) == []


def test_spikes_before_a_failure_are_recorded(tmp_path):
    def loss(params, batch):
        # From step 80 on, the loss explodes; at step 90 it is not finite.
        t = params["t"]
        value = jnp.mean((params["w"][None] - batch) ** 2) + jnp.where(t > 79.5, 1e3, 0.0)
        return jnp.where(t > 89.5, jnp.nan, value) + 0 * t

    count = optax.GradientTransformation(
        lambda params: None, lambda g, s, p: ({"t": jnp.ones([]), "w": -0.01 * g["w"]}, s)
    )
    data = np.random.default_rng(0).normal(size=(64, 1)).astype("float32")
    with pytest.raises(FloatingPointError, match="step 90"):
        gf.fit(
            loss,
            {"t": jnp.zeros([]), "w": jnp.zeros(1)},
            data,
            count,
            100,
            inspect_when="spike",
            folder=tmp_path,
            progress=False,
        )
    rows = (tmp_path / "spikes.jsonl").read_text().splitlines()
    assert len(rows) == 1
    assert '"step": 80' in rows[0]


def test_moments_of_the_optimizer_can_be_watched():
    row = fit(Spike(watch=("mu", "nu", "update_norm"))).spikes[0]
    assert {"mu", "nu"} <= set(row["left"])
    assert row["values"]["nu"] > row["edges"]["nu"]
    momentum = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.01, momentum=0.9))
    assert fit(Spike(watch="trace"), optimizer=momentum, steps=5).spikes == []
    params = {"W": jnp.ones((2, 2)), "b": jnp.ones(2)}
    assert list(moments(momentum.init(params), params)) == ["trace"]


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        ("spikes", 'inspect_when must be "spike", a gf.train.Spike or None'),
        (Spike(watch=("nu", "norm")), r"cannot watch 'norm'; there are loss, grad_norm, update_norm, mu, nu"),
    ],
)
def test_what_cannot_be_watched_is_refused(watch, message):
    with pytest.raises(ValueError, match=message):
        fit(watch)


def test_an_invalid_band_is_refused():
    with pytest.raises(ValueError, match="deviations must be positive, got 0"):
        Spike(deviations=0)


def test_a_loss_that_is_not_a_mean_has_no_norms_of_examples():
    loss, params, data = regression()
    whole = lambda params, batch: loss(params, batch)  # noqa: E731
    found = gf.fit(
        whole, params, data, optax.adam(1e-3), 90, batch_size=BATCH, inspect_when="spike", progress=False
    )
    assert found.spikes[0]["examples"] is None
    assert found.spikes[0]["inspection"]["sites"]


def learned(bands, values, step=0, spike=None):
    spike = spike or Spike()
    return bands.learn(np.array(values)[:, None], np.array([False]), step, spike)


def test_a_band_is_the_running_mean_and_deviation():
    spike, known = Spike(deviations=3, half_life=1e9, after=20), Bands()
    values = np.random.default_rng(0).normal(5.0, 2.0, size=40)
    learned(known, values, 0, spike)
    # With an endless half-life, these are the mean and the deviation of all.
    assert known.means[0] == pytest.approx(values.mean())
    assert known.variances[0] == pytest.approx(values.var())
    above, edges, since = learned(known, [values.mean() + 10 * values.std(), values.mean()], 40, spike)
    assert above[0, 0] == pytest.approx(10)
    assert edges[0, 0] == pytest.approx(values.mean() + 3 * values.std())
    # It learned as if the value had been at the edge.
    assert edges[1, 0] > edges[0, 0]
    assert since[:, 0].tolist() == [40, -1]


def test_learning_at_once_equals_learning_step_by_step():
    values = np.exp(np.random.default_rng(1).normal(size=400))
    values[[150, 151, 300]] = 1e3
    together, single = Bands(), Bands()
    at_once = learned(together, values)
    each = [learned(single, [value], step) for step, value in enumerate(values)]
    for whole, parts in zip(at_once, zip(*each)):
        np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-9)
    assert set(np.flatnonzero(at_once.since[:, 0] >= 0)) >= {150, 151, 300}
    assert at_once.since[151, 0] == 150
    # The recursion by hand, in the part where no value is outside.
    rate = 1 - 0.5 ** (1 / Spike().half_life)
    before, after = Bands(), Bands()
    learned(before, values[:100])
    learned(after, values[:101])
    delta = values[100] - before.means[0]
    assert after.means[0] == pytest.approx(before.means[0] + rate * delta)
    assert after.variances[0] == pytest.approx((1 - rate) * (before.variances[0] + rate * delta**2))
