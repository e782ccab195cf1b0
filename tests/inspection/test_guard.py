"""`nan_guard` keeps the inputs of a failure on the host, and searches them when the report is read."""

import functools
import gc
import pickle
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import gradfn as gf
from gradfn.inspection import guard, kept
from gradfn.inspection.search import Found

GOOD, BAD = jnp.array([1.0, 2.0]), jnp.array([-1.0, 2.0])
W = jnp.ones(2)


def loss(w, x):
    return jnp.sum(jnp.log(w * x))


def callbacks(program):
    return program.as_text().count("callback")


def failures(record):
    return record.search.kept.failures


def test_the_search_is_not_part_of_the_step():
    def kernels(n_layers):
        net = gf.mlp([8] * (n_layers + 1))
        mean, batch = gf.batch_mean(gf.regression_loss(net)), (jnp.ones([5, 8]), jnp.ones([5, 8]))
        params = net.init(jax.random.key(0))
        lowered = [jax.jit(f).lower(params, batch) for f in (jax.value_and_grad(mean), gf.nan_guard(mean))]
        assert [callbacks(each) > 0 for each in lowered] == [False, True]
        return [each.compile().as_text().count(" fusion(") for each in lowered]

    few, many = kernels(3), kernels(12)
    # Leaves of one shape share the kernels of the test.
    assert many[1] - many[0] <= few[1] - few[0] + 9


SHAPES = [(), (3,), (0, 2), (7, 5), (200, 100), (4, 50, 100), (3,), (20000,), (100, 200), (40, 500)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_which_arrays_are_finite(bad):
    largest = [np.full(shape, np.finfo(np.float32).max, np.float32) for shape in SHAPES]
    are_finite = jax.jit(guard._are_finite)
    assert np.all(are_finite(largest))
    assert np.all(are_finite([-x for x in largest]))
    for i, x in enumerate(largest):
        for place in {0, x.size // 2, x.size - 1} if x.size else ():
            other = x.copy()
            other.flat[place] = bad
            flags = are_finite([*largest[:i], other, *largest[i + 1 :]])
            assert np.flatnonzero(~flags).tolist() == [i]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "complex64"])
def test_whether_an_array_of_another_dtype_is_finite(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.full([200, 100], 6e4, dtype)
        arrays = [x, x.at[150, 3].set(jnp.inf), x[0], x[0].at[1].set(jnp.nan), jnp.ones(100, jnp.float32)]
        assert jax.jit(guard._are_finite)(arrays).tolist() == [True, False, True, False, True]


def test_on_accelerators_a_sum_tests_what_a_product_tests_on_cpus(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x = jnp.full([200, 100], jnp.finfo(jnp.float32).max)
    assert guard._are_finite([x, x.at[150, 3].set(jnp.inf)]).tolist() == [True, False]


def looped(x):
    def step(carry, x):
        return carry, gf.nan_guard(loss)(W, x)[2]

    return lax.scan(step, 0, x)[1]


TRANSFORMS = {
    "eager": lambda x: gf.nan_guard(loss)(W, x)[2],
    "jit": jax.jit(lambda x: gf.nan_guard(loss)(W, x)[2]),
    "closed over": jax.jit(lambda x: gf.nan_guard(lambda w: loss(w, x))(W)[2]),
    "scan": lambda x: looped(x[None]),
    "fori": jax.jit(
        lambda x: lax.fori_loop(
            0, 1, lambda i, old: gf.nan_guard(loss)(W, x)[2], gf.nan_guard(loss)(W, jnp.abs(x))[2]
        )
    ),
    "cond": jax.jit(
        lambda x: lax.cond(
            x[0] < 5, lambda: gf.nan_guard(loss)(W, x)[2], lambda: gf.nan_guard(loss)(W, -x)[2]
        )
    ),
    "vmap": jax.jit(
        lambda x: jax.vmap(lambda x: gf.nan_guard(loss)(W, x)[2])(jnp.stack([jnp.abs(x), x, jnp.abs(x)]))
    ),
    "vmap of vmap": jax.jit(
        lambda x: jax.vmap(lambda w: jax.vmap(lambda x: gf.nan_guard(loss)(w, x)[2])(jnp.stack([x, x])))(
            jnp.stack([W, 2 * W])
        )
    ),
    "checkpoint": jax.jit(jax.checkpoint(lambda x: gf.nan_guard(loss)(W, x)[2])),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_failure_is_kept_and_a_healthy_step_calls_nothing(name, monkeypatch):
    calls = []
    take = kept.Kept.take

    def counted(self, call, bad, *values):
        calls.append(bool(bad))
        return take(self, call, bad, *values)

    monkeypatch.setattr(kept.Kept, "take", counted)
    record = TRANSFORMS[name](GOOD)
    jax.block_until_ready(record)
    assert name == "eager" or not calls
    assert np.all(record.ok)
    assert record.report().nan is None
    record = TRANSFORMS[name](BAD)
    assert not np.all(record.ok)
    assert any(calls)
    report = record.report()
    assert (report.nan.operation, report.nan.element) == ("log", (0,))
    assert report.nan.operands[0].at == -1
    # What reads like an array needs the search.
    assert record.keys.shape[0] == 3
    assert record.input_names


def test_the_guard_may_be_differentiated():
    def of_grads(w, x):
        return jnp.sum(gf.nan_guard(loss)(w, x)[1] ** 2)

    expected = jax.grad(lambda w, x: jnp.sum(jax.grad(loss)(w, x) ** 2))(W, GOOD)
    np.testing.assert_allclose(jax.jit(jax.grad(of_grads))(W, GOOD), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(jax.checkpoint(of_grads))(W, GOOD), expected, rtol=1e-6)

    @jax.jit
    def with_record(w, x):
        f = lambda w: gf.nan_guard(loss)(w, x)[1:]  # noqa: E731
        (grads, record), _ = jax.jvp(f, (w,), (w,))
        return grads, record

    assert with_record(W, BAD)[1].report().nan.operation == "log"


def test_donated_parameters_are_kept():
    guarded = gf.nan_guard(lambda w, x: jnp.sum(jnp.sqrt(w * x)))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(w, x):
        _, grads, record = guarded(w, x)
        return w - grads, record

    w = jnp.full(2000, 4.0)
    w, record = step(w, jnp.full(2000, -1.0))
    report = record.report()
    assert (report.nan.operation, report.nan.operands[0].at) == ("sqrt", -4.0)


def test_keys_and_integers_are_kept():
    def noisy(w, n, key):
        return jnp.sum(jnp.log(w * n.astype(jnp.float32))) + jnp.sum(jax.random.normal(key, w.shape))

    for key in (jax.random.key(1), jax.random.key(1, impl="rbg"), jax.random.PRNGKey(1)):
        _, _, record = jax.jit(gf.nan_guard(noisy))(W, jnp.array([-1, 3]), key)
        assert record.report().nan.operation == "log"


def test_the_report_is_of_the_step_and_not_of_later_values():
    def scaled(w, x):
        return jnp.sum(jnp.log(w * x * sign))

    sign = -1.0
    _, _, record = jax.jit(gf.nan_guard(scaled))(W, GOOD)
    sign = 1.0
    assert record.report().nan.operation == "log"


def test_the_first_failures_and_the_latest_are_kept():
    step = jax.jit(gf.nan_guard(loss))
    records = [step(W, i * BAD)[2] for i in range(1, 9)]
    assert [record.report().note == "" for record in records] == [True] * 3 + [False] * 4 + [True]
    assert records[7].report().nan.operands[0].at == -8
    note = records[5].report().note
    assert "of 8 failures those of the first 3 and of the latest" in note
    assert note in str(records[5].report())
    assert records[5].report().nonfinite_grads == ()
    # Reports that were read make room.
    later = [step(W, i * BAD)[2] for i in range(9, 12)]
    assert [record.report().nan.operands[0].at for record in later] == [-9, -10, -11]
    assert len(failures(records[0])) == kept.MOST
    assert all(not failure.values for failure in failures(records[0]).values())


def test_two_failures_in_one_chunk():
    xs = jnp.stack([GOOD, 3 * BAD, GOOD, 5 * BAD])
    records = jax.jit(looped)(xs)
    assert records.ok.tolist() == [True, False, True, False]
    assert records.report().nan.operands[0].at == -3
    assert jax.tree.map(lambda x: x[3], records).report().nan.operands[0].at == -5


def test_thousands_of_steps_keep_nothing_else():
    step = jax.jit(gf.nan_guard(loss))
    for _ in range(200):
        record = step(W, BAD)[2]
    for _ in range(200):
        step(W, GOOD)
    assert len(failures(record)) == kept.MOST
    before = len(kept._GUARDS)
    del record, step
    jax.clear_caches()
    gc.collect()
    assert len(kept._GUARDS) < before


def test_a_record_that_was_copied_still_finds_its_inputs():
    _, _, record = jax.jit(gf.nan_guard(loss))(W, BAD)
    for copy in (
        jax.device_get(record),
        pickle.loads(pickle.dumps(record)),
        jax.tree.map(jnp.asarray, record),
    ):
        assert copy.report().nan.operation == "log"


def test_a_record_of_another_process_says_so():
    _, _, record = jax.jit(gf.nan_guard(loss))(W, BAD)
    number = jnp.array([record.search.number[0] ^ 1, 0])
    other = guard.NanRecord(
        record.value, record.nonfinite_grads, kept.Ticket(number, kept.Kept()), record.leaf_names
    )
    report = other.report()
    assert not report.ok
    assert "from another process" in report.note
    assert "gf.nan_origin" in str(report)
    assert report.nan is report.inf is None


def test_threads_keep_their_own_failures():
    step, found = jax.jit(gf.nan_guard(loss)), {}

    def work(i):
        found[i] = step(W, i * BAD)[2]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {i: record.report().nan.operands[0].at for i, record in found.items()} == {1: -1, 2: -2, 3: -3}


def test_what_needs_the_search_is_not_known_inside_jit():
    with pytest.raises(TypeError, match="return the record from it"):
        jax.jit(lambda x: gf.nan_guard(loss)(W, x)[2].keys)(GOOD)


def test_an_exported_program_searches_itself():
    exported = jax.export.export(jax.jit(gf.nan_guard(loss)))(W, BAD)
    _, _, record = exported.call(W, BAD)
    assert isinstance(record.search, Found)
    assert record.report().nan.operation == "log"


def test_a_narrow_integer_is_searched_within_the_program():
    def f(w, n):
        return jnp.sum(jnp.log(w * n.astype(jnp.float32)))

    _, _, record = jax.jit(gf.nan_guard(f))(W, jnp.array([-1, 3], jnp.int4))
    assert isinstance(record.search, Found)
    assert record.report().nan.operation == "log"


def test_the_persistent_cache_of_compiled_programs(tmp_path):
    keep = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in keep}
    try:
        jax.config.update(keep[0], str(tmp_path))
        jax.config.update(keep[1], 0)
        for _ in range(2):
            jax.clear_caches()
            _, _, record = jax.jit(gf.nan_guard(loss))(W, BAD)
            assert record.report().nan.operation == "log"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
