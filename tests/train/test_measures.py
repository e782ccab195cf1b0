"""What a row says about its last step, against a plain loop; and the trace of some steps."""

import gzip
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn.train.log import Log
from gradfn.train.measures import learning_rate, norm, scale_by_schedule
from gradfn.train.peak import step_flops

module = sys.modules["gradfn.train._fit"]
DATA = jax.random.normal(jax.random.key(0), [24, 3])
START = {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.25)}
NORMS = ("grad_norm", "update_norm")


def loss(params, batch):
    return jnp.square(batch @ params["w"] + params["b"]).mean()


def train(steps=10, optimizer=None, **options):
    options = {"batch_size": 4, "eval_every": 3, "progress": False} | options
    return gf.fit(loss, START, DATA, optimizer or optax.sgd(0.1, momentum=0.9), steps, **options)


def measures(rows, *names):
    return [[row.get(name) for name in names or NORMS] for row in rows]


def by_hand(steps, optimizer):
    """Return the norms of gradient and update of each step, in numpy, of the same training as a plain loop."""
    params, state, norms = START, optimizer.init(START), []
    for step in range(steps):
        index = gf.data.epoch_order(24, 4, 0, step // 6)[step % 6]
        grads = jax.grad(loss)(params, DATA[index])
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norms.append(
            [
                np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree)))
                for tree in (grads, updates)
            ]
        )
    return norms


@pytest.mark.parametrize("inspect_every", [None, 5])
def test_norms_are_those_of_the_last_step_of_a_row(inspect_every):
    """Step 10, counted from 0, is inspected, and the last of a row."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    rows = train(11, optimizer, inspect_every=inspect_every).history
    assert [row["step"] for row in rows] == [3, 6, 9, 11]
    expected = by_hand(11, optimizer)
    np.testing.assert_allclose(measures(rows), [expected[row["step"] - 1] for row in rows], rtol=1e-5)


@pytest.mark.parametrize("chunk_seconds", [1e-9, 1e9])
def test_norms_do_not_depend_on_how_steps_are_grouped(monkeypatch, chunk_seconds):
    expected = measures(train(24, eval_every=8).history)
    monkeypatch.setattr(module, "CHUNK_SECONDS", chunk_seconds)
    assert measures(train(24, eval_every=8).history) == expected


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["DATA_PARALLEL", "FSDP_TENSOR_PARALLEL"])
def test_norms_on_many_devices_are_those_of_one(monkeypatch, rules):
    """With a donated state, as large ones are."""
    net = gf.mlp([8, 16, 4])
    of_net = gf.batch_mean(gf.regression_loss(net))
    x = jax.random.normal(jax.random.key(2), [24, 8])
    mesh = jax.make_mesh((4, 2), ("data", "model"))

    def rows(params):
        data = (x, x[:, :4])
        options = {"batch_size": 8, "eval_every": 2, "progress": False}
        return gf.fit(of_net, params, data, optax.adam(0.1), 6, **options).history

    expected = rows(net.init(jax.random.key(1)))
    monkeypatch.setattr("gradfn.train.chunk.DONATED", 0)
    placed = gf.train.shardings(net, mesh, getattr(gf.train, rules))
    found = rows(net.init(jax.random.key(1), shardings=placed))
    np.testing.assert_allclose(measures(found), measures(expected), rtol=1e-4)


def test_a_resumed_run_has_the_same_norms_and_rates(tmp_path):
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(0.1, 0.0, 12))
    names = (*NORMS, "learning_rate")
    whole = measures(train(12, optimizer, eval_every=2).history, *names)
    calls = iter(range(100))

    def interrupt(params):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return {}

    options = {"folder": tmp_path, "eval_every": 2, "checkpoint_seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        train(12, optimizer, evaluate=interrupt, **options)
    assert measures(train(12, optimizer, resume=True, **options).history, *names) == whole


def test_the_rate_is_that_of_the_last_update():
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    injected = optax.chain(
        optax.clip(1.0), optax.inject_hyperparams(optax.sgd)(learning_rate=schedule, momentum=0.9)
    )
    warm = gf.train.adamw_warmup_cosine(10, rate=0.1, warmup=2)
    rates = optax.warmup_cosine_decay_schedule(0.1 / 3, 0.1, 2, 10, 1e-4)
    for optimizer, expected in ((injected, schedule), (warm, rates)):
        rows = train(10, optimizer, eval_every=1).history
        found = [row["learning_rate"] for row in rows]
        np.testing.assert_allclose(found, [expected(step) for step in range(10)], rtol=1e-5)


def test_the_rate_of_accumulated_batches_is_that_of_the_last_update():
    optimizer = gf.train.adamw_warmup_cosine(5, rate=0.1, warmup=2, accumulate=2)
    rates = optax.warmup_cosine_decay_schedule(0.1 / 3, 0.1, 2, 5, 1e-4)
    found = [row["learning_rate"] for row in train(6, optimizer, eval_every=1).history]
    np.testing.assert_allclose(found, [rates(i) for i in (0, 0, 0, 1, 1, 2)], rtol=1e-5)


def test_a_rate_that_the_state_does_not_have_is_left_out():
    assert all("learning_rate" not in row for row in train(4).history)
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    several = optax.multi_transform({"w": injected, "b": injected}, {"w": "w", "b": "b"})
    assert learning_rate(several.init(START)) is None
    named = {"learning_rate": jnp.ones([])}  # a parameter of this name is not one
    assert learning_rate(optax.sgd(0.1, momentum=0.9).init(named)) is None


def test_the_schedule_that_tells_its_rate_scales_like_that_of_optax():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.3, 2, 10, 1e-4)
    ours, theirs = scale_by_schedule(schedule), optax.scale_by_learning_rate(schedule)
    state, other = ours.init(START), theirs.init(START)
    for step in range(5):
        with jax.numpy_dtype_promotion("standard"):
            found, state = ours.update(START, state)
            expected, other = theirs.update(START, other)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert state.learning_rate == schedule(step)


def test_the_composed_optimizer_is_that_of_optax():
    rates = optax.warmup_cosine_decay_schedule(0.1 / 3, 0.1, 2, 10, 1e-4)
    params = {"W": jnp.ones([2, 2]), "b": jnp.ones(2)}
    grads = {"W": jnp.array([[1.0, -2.0], [3.0, 0.1]]), "b": jnp.array([0.3, 0.0])}
    decays = {"W": True, "b": False}
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rates, 0.9, 0.99, weight_decay=0.1, mask=decays)
    )
    ours = gf.train.adamw_warmup_cosine(10, rate=0.1, warmup=2)
    state, other = ours.init(params), theirs.init(params)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for _ in range(4):
            found, state = ours.update(grads, state, params)
            expected, other = theirs.update(grads, other, params)
            jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_norm_neither_overflows_nor_underflows(scale):
    x, y = np.random.default_rng(0).standard_normal([2, 50])
    tree = {
        "x": jnp.asarray(scale * x, jnp.float32),
        "y": jnp.asarray(scale * y, jnp.float32),
        "n": jnp.zeros(0),
    }
    expected = scale * np.sqrt(np.square(x).sum() + np.square(y).sum())
    np.testing.assert_allclose(norm(tree), expected, rtol=1e-6)


def test_a_norm_of_narrow_and_complex_numbers_is_summed_in_float32():
    many = jnp.ones(5_000, jnp.bfloat16)  # a sum in bfloat16 stops at 256
    assert norm(many).dtype == jnp.float32
    np.testing.assert_allclose(norm({"a": many, "b": jnp.array([3.0 + 4.0j])}), np.sqrt(5_025), rtol=1e-6)
    assert np.isnan(norm({"a": many, "b": jnp.array(jnp.nan)}))


@pytest.mark.parametrize("name", ["grad_norm", "update_norm", "learning_rate", "mfu"])
def test_a_metric_may_not_take_the_name_of_a_measure(name):
    with pytest.raises(ValueError, match=f"evaluate returned {name}, which a row of metrics has already"):
        train(2, evaluate=lambda params: {name: 1.0})


def test_mfu_where_the_peak_is_known(monkeypatch):
    assert "mfu" not in train(3).history[0]
    net = gf.mlp([3, 8, 1])
    of_net = gf.batch_mean(gf.regression_loss(net))
    params, batch = net.init(jax.random.key(0)), (DATA[:4], DATA[:4, :1])
    monkeypatch.setattr("gradfn.train.peak.peak_rate", lambda kind: 1e9)
    data = DATA, DATA[:, :1]
    row = gf.fit(of_net, params, data, optax.sgd(0.1), 3, batch_size=4, progress=False).history[0]
    flops = step_flops(of_net, params, batch)
    assert flops == 6 * 4 * (3 * 8 + 8 * 1)
    assert row["mfu"] == pytest.approx(flops * row["examples_per_second"] / 4 / 1e9)


def test_a_line_has_the_measures_in_short(capsys):
    train(3, gf.train.adamw_warmup_cosine(3, rate=0.1, warmup=1), progress=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 3/3 loss ")
    assert "grad_norm" not in line
    for word in (" gradient ", " update ", " rate 0."):
        assert word in line


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (160, [" accuracy 0.5", " another_metric 1.25", "examples/s", " gradient "]),
        (80, [" accuracy 0.5"]),
        (50, []),
    ],
)
def test_a_bar_is_one_line_and_has_them_where_there_is_room(monkeypatch, capsys, columns, shown):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    train(6, progress=True, evaluate=lambda params: {"accuracy": 0.5, "another_metric": 1.25})
    text = capsys.readouterr().out
    assert "step 6 loss " in text
    words = [" accuracy 0.5", " another_metric 1.25", "examples/s", " gradient "]
    # The width of the rate varies, so at 80 columns there may be room for it or not.
    assert [word for word in words if word in text and (columns != 80 or "/s" not in word)] == shown
    assert "left" in text
    # A bar that is wrapped goes back up by a line for each redraw.
    assert "\x1b[1A" not in text
    lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    assert max(map(len, lines)) <= columns


def test_forced_colors_draw_no_bar_into_a_pipe(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    train(3, progress=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 3/3 loss ")


def test_measures_have_no_curves_on_a_page(tmp_path):
    from gradfn.runs.rows import metrics

    found = metrics([train(6).history])
    assert list(found.curves) == ["loss"]
    assert found.last["grad_norm"] > 0


# A trace of some steps ---------------------------------------------------------------------------------------------


def traces(folder):
    return sorted((folder / "profile" / "plugins" / "profile").glob("*/*"))


def test_a_trace_of_some_steps_opens(tmp_path, monkeypatch):
    """Perfetto reads the JSON, TensorBoard's profiler the protocol buffer; chunks end at the window's ends."""
    monkeypatch.setattr(module, "CHUNK_SECONDS", 1e9)
    ends = []
    advance = Log.advance
    monkeypatch.setattr(
        Log, "advance", lambda log, step, *rest: (ends.append(step), advance(log, step, *rest))
    )
    train(30, eval_every=30, folder=tmp_path, profile_steps=(11, 14))
    # The first step, epochs of six steps, and the window.
    assert sorted(set(ends)) == [1, 6, 11, 12, 14, 18, 24, 30]
    protocol, content = traces(tmp_path)[::-1]
    assert protocol.name.endswith(".xplane.pb")
    assert protocol.stat().st_size > 0
    assert content.name.endswith(".trace.json.gz")
    events = json.loads(gzip.decompress(content.read_bytes()))["traceEvents"]
    assert len(events) > 10


def test_a_new_run_removes_the_trace_of_an_earlier_one(tmp_path):
    train(3, folder=tmp_path, profile_steps=(0, 3))
    assert traces(tmp_path)
    train(3, folder=tmp_path)
    assert not traces(tmp_path)


def test_a_trace_ends_when_training_fails(tmp_path):
    def fail(params):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(6, folder=tmp_path, profile_steps=(1, 6), evaluate=fail)
    assert traces(tmp_path)
    jax.profiler.start_trace(str(tmp_path / "another"))  # raises where one is still running
    jax.profiler.stop_trace()


@pytest.mark.parametrize("window", [(3, 3), (-1, 3), (2, 31), (5,), 5, (1.0, 2.0), (True, 2), "ab"], ids=str)
def test_a_window_that_is_not_in_the_run_is_refused(tmp_path, window):
    with pytest.raises(ValueError, match=r"profile_steps must be two steps, .* got"):
        train(30, folder=tmp_path / "new", profile_steps=window)
    assert not (tmp_path / "new").exists()


def test_a_trace_needs_a_folder():
    with pytest.raises(ValueError, match="profile_steps needs a folder"):
        train(30, profile_steps=(10, 20))
