"""Data frames, lists and tensors are converted to the arrays that numpy makes of them, or raise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn.data._arrays import as_arrays, on_device

X = np.random.default_rng(0).normal(size=[12, 3]).astype(np.float32)
Y = np.arange(12) % 4


def shuffled_frame(pandas):
    """Return a frame and a series whose labels differ from their positions, as after a train_test_split."""
    index = np.random.default_rng(1).permutation(12) + 5
    return pandas.DataFrame(X, columns=["a", "b", "c"], index=index), pandas.Series(Y, index=index[::-1])


def test_rows_of_a_frame_are_taken_by_position():
    pandas = pytest.importorskip("pandas")
    x, y = shuffled_frame(pandas)
    for frames, arrays in zip(
        gf.data.batches((x, y), 4, epochs=2), gf.data.batches((X, Y), 4, epochs=2), strict=True
    ):
        np.testing.assert_array_equal(frames[0], arrays[0])
        np.testing.assert_array_equal(frames[1], arrays[1])
    sizes = {"validation": 2, "test": 4, "stratify": False}
    for frames, arrays in zip(gf.data.split(x, y, **sizes), gf.data.split(X, Y, **sizes), strict=True):
        np.testing.assert_array_equal(frames[0], arrays[0])
        np.testing.assert_array_equal(frames[1], arrays[1])
    host = gf.train.from_host(lambda step: (x, y))
    np.testing.assert_array_equal(host.order(0)[0][0], X)


def test_host_batches_may_contain_shared_scalars():
    host = gf.train.from_host(lambda step: {"x": X, "temperature": np.float32(step)})
    np.testing.assert_array_equal(host.order(0)["temperature"][:3], [0, 1, 2])


def test_fit_and_accuracy_of_a_frame_equal_those_of_its_array():
    pandas = pytest.importorskip("pandas")
    x, y = shuffled_frame(pandas)
    net = gf.mlp([3, 4])
    start, loss = net.init(jax.random.key(0)), gf.batch_mean(gf.classification_loss(net))
    options = {"batch_size": 4, "progress": False}
    of_frame = gf.fit(loss, start, (x, y), optax.sgd(0.1), 6, **options)
    of_array = gf.fit(loss, start, (X, Y), optax.sgd(0.1), 6, **options)
    np.testing.assert_array_equal(of_frame.params["W1"], of_array.params["W1"])
    assert gf.accuracy(net)(start, (x, y)) == gf.accuracy(net)(start, (jnp.asarray(X), jnp.asarray(Y)))


def test_columns_of_a_frame_are_converted():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"flag": [True, False], "n": pandas.array([1, 2], "Int64"), "x": [0.5, 1.5], "u": np.uint8([7, 8])}
    )
    np.testing.assert_array_equal(as_arrays(frame), [[1, 1, 0.5, 7], [0, 2, 1.5, 8]])
    assert as_arrays(frame["n"]).dtype == np.int64
    assert as_arrays(pandas.Series([True, False], dtype="boolean")).dtype == bool
    np.testing.assert_array_equal(as_arrays(pandas.Series(pandas.arrays.SparseArray([0, 0, 3]))), [0, 0, 3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda pd: pd.DataFrame({"n": [1, 2], "city": ["a", "b"]}),
            r"data\['city'\] must be numeric.*get_dummies",
        ),
        (lambda pd: pd.Series(["a", None], dtype=object), "data must be numeric, got dtype object"),
        (lambda pd: pd.Series(pd.array([1, None, 3], "Int64")), "data: 1 of 3 values are missing"),
        (
            lambda pd: pd.DataFrame({"k": pd.Categorical(["a", "b"])}),
            r"data\['k'\] is categorical.*cat\.codes",
        ),
        (lambda pd: pd.Series(pd.to_datetime(["2020-01-01"])), "data must be numeric, got dtype datetime"),
    ],
)
def test_columns_that_are_not_numeric_raise(make, message):
    with pytest.raises(ValueError, match=message):
        as_arrays(make(pytest.importorskip("pandas")))


def test_tensors_become_arrays():
    torch = pytest.importorskip("torch")
    x = torch.tensor(X, requires_grad=True)
    got = as_arrays({"x": x, "half": x.bfloat16(), "turned": x.T[:, ::3], "label": torch.tensor(Y)})
    np.testing.assert_array_equal(got["x"], X)
    assert got["half"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(got["half"], X.astype(jnp.bfloat16))
    np.testing.assert_array_equal(got["turned"], X.T[:, ::3])
    np.testing.assert_array_equal(got["label"], Y)
    np.testing.assert_array_equal(as_arrays(torch.tensor([1 + 2j]).conj()), [1 - 2j])
    with pytest.raises(ValueError, match=r"data is a sparse or quantized tensor. Pass .to_dense"):
        as_arrays(torch.eye(3).to_sparse())


def test_lists_become_arrays():
    x, y = as_arrays(([[1, 2], [3, 4]], [0, 1]))
    np.testing.assert_array_equal(x, [[1, 2], [3, 4]])
    np.testing.assert_array_equal(y, [0, 1])
    np.testing.assert_array_equal(as_arrays([[1.0, 2.0], [3.0, 4.0]]), [[1, 2], [3, 4]])
    images, labels = as_arrays((list(X), [np.int64(label) for label in Y]))
    np.testing.assert_array_equal(images, X)
    np.testing.assert_array_equal(labels, Y)
    np.testing.assert_array_equal(as_arrays((list(jnp.asarray(X)), Y))[0], X)
    batch = as_arrays([X, Y])  # the outermost list is a container, as usual in jax
    assert [part.shape for part in batch] == [(12, 3), (12,)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (([[1, 2], [3]], [0, 1]), r"data\[0\] is a list of rows of different lengths"),
        (
            ([np.zeros([2, 3]), np.zeros([2, 4])], [0, 1]),
            r"data\[0\] is a list of arrays of different shapes",
        ),
        ([np.zeros([28, 28])] * 1000, r"data is a list of 1,000 arrays \[28, 28\].*np\.stack"),
        ({"x": X, "y": 3}, r"data\['y'\] must be an array \[examples, ...\], got 3"),
        ((X, object()), r"data\[1\] must be an array \[examples, ...\], got object"),
        ((X, ["a", {}]), r"data\[1\] must be numeric, got Python objects"),
        (np.ma.masked_equal(Y, 0), "data: 3 of 12 values are masked"),
    ],
)
def test_errors_name_the_leaf_and_do_not_print_the_data(data, message):
    for make in (as_arrays, lambda data: gf.data.batches(data, 2)):
        with pytest.raises(ValueError, match=message) as error:
            make(data)
        assert len(str(error.value)) < 300


def test_messages_about_many_arrays_are_short():
    images = [(np.zeros([i % 2 + 2, 28]), i) for i in range(5000)]
    tree = {f"image{i}": np.zeros([i % 2 + 2, 28]) for i in range(5000)}
    net = gf.mlp([28, 2])
    for data in (images, tree):
        for call in (
            lambda data: gf.data.batches(data, 2),
            lambda data: gf.fit(gf.batch_mean(gf.classification_loss(net)), {}, data, optax.sgd(0.1), 1),
        ):
            with pytest.raises(ValueError, match="must") as error:
                call(data)
            assert len(str(error.value)) < 300


@pytest.mark.parametrize("text", [np.array(["a", "b"]), ["a", "b"], np.array([b"a", b"b"])])
def test_text_can_be_split_but_not_trained_on(text):
    (train, _), _, (test, _) = gf.data.split(text, np.arange(2), validation=0, test=1)
    assert sorted([*train, *test]) == sorted(np.asarray(text))
    with pytest.raises(ValueError, match="data must be numeric, got text"):
        on_device(np.asarray(text))


def test_integers_that_would_wrap_around_raise():
    assert on_device(np.array([2**31 - 1])).dtype == jnp.int32
    for wide in (np.array([0, 2**32 + 1]), np.array([2**31], np.uint64), [-(2**31) - 1]):
        if isinstance(wide, np.ndarray) and wide.dtype == np.uint64:
            np.testing.assert_array_equal(on_device(wide), 2**31)  # uint32 can represent it
            continue
        with pytest.raises(ValueError, match="integers must fit int32"):
            on_device(wide)


def test_no_message_prints_a_long_list():
    many = [np.zeros([28, 28])] * 5000
    ints = {f"p{i}": np.zeros(3, int) for i in range(5000)}
    calls = [
        lambda: gf.curvature.hvp(lambda params: 0.0)(ints, ints),
        lambda: gf.inspect(lambda params: [params["p0"]] * 5000)({"p0": jnp.zeros(2)}),
        lambda: gf.inspect(lambda params: params)(ints),
        lambda: gf.per_example.cosines({f"g{i}": jnp.zeros(i % 2 + 1) for i in range(500)}),
        lambda: gf.per_example.norms(lambda params, x: 0.0)(ints, jnp.ones(2)),
        lambda: gf.mlp([784, 2]).apply(ints, jnp.ones(784)),
        lambda: gf.mlp([784, 2]).apply([ints], jnp.ones(784)),
        lambda: gf.accuracy(gf.mlp([784, 2]))({}, many),
        lambda: gf.generate(gf.rnn(5, 4), {}, many, 1),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError)) as error:
            call()
        assert len(str(error.value)) < 600, str(error.value)[:900]
