"""Batches that the host makes: order, groups, epochs, ends, resuming, and the loaders of other libraries."""

import json
import re
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradfn as gf
from gradfn.train.loading import EachStep, EndedError, Groups, Loader, steps_per_group

X = np.arange(40, dtype=np.float32)


def loss(params, batch):
    """Each batch moves the parameter, so that the result depends on all batches and their order."""
    return jnp.square(params - batch.mean()).sum()


def fit(data, steps, **options):
    return gf.fit(loss, jnp.zeros([]), data, optax.sgd(0.1), steps, progress=False, **options)


def by_hand(batches):
    params = 0.0
    for batch in batches:
        params -= 0.2 * (params - float(np.mean(batch)))
    return params


def rows(step):
    return X[4 * step % 40 :][:4]


class Shuffled:
    """A loader that shuffles anew in each iteration, with one generator for all, as PyTorch's does."""

    def __init__(self):
        self.random = np.random.default_rng(3)

    def __len__(self):
        return 5

    def __iter__(self):
        order = self.random.permutation(40)
        return iter([X[order[i : i + 8]] for i in range(0, 40, 8)])


class Stateful:
    """A loader whose iterator has a state, as grain's have."""

    def __init__(self):
        self.reads = []

    def __iter__(self):
        return Counter(self.reads)


class Counter:
    def __init__(self, reads):
        self.at, self.reads = 0, reads

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        self.reads.append(self.at)
        return np.full([4], self.at, np.float32)

    def get_state(self):
        return json.dumps({"at": self.at}).encode()

    def set_state(self, state):
        self.at = json.loads(state)["at"]


def test_each_step_gets_its_batch_and_no_later_one_is_made():
    made = []
    data = gf.train.from_host(lambda step: made.append(step) or rows(step))
    fitted = fit(data, 70)
    assert float(fitted.params) == pytest.approx(by_hand([rows(step) for step in range(70)]), rel=1e-5)
    assert max(made) == 69


def test_the_next_group_is_made_while_the_caller_works():
    began, release = threading.Event(), threading.Event()

    def read(step):
        if step >= 2:
            began.set()
            assert release.wait(60)
        return np.float32([step])

    groups = Groups(EachStep(read), 2, np.float32([0]), 10)
    assert groups(0).tolist() == [[0], [1]]
    assert began.wait(60)  # before it is requested
    release.set()
    assert groups(1).tolist() == [[2], [3]]
    assert groups(4).tolist() == [[8], [9]]


def test_an_error_of_the_loader_is_the_users_own():
    def broken(step):
        if step == 40:
            raise RuntimeError("disk on fire")
        return rows(step)

    with pytest.raises(RuntimeError, match="disk on fire"):
        fit(gf.train.from_host(broken), 100)


def test_a_loader_may_write_all_batches_into_the_same_memory():
    memory = np.zeros([4], np.float32)

    def filled(value):
        memory[:] = value
        return memory

    expected = by_hand([np.float32([step % 6]) for step in range(14)])
    loader = gf.train.from_loader(lambda epoch: map(filled, range(6)))
    assert float(fit(loader, 14).params) == pytest.approx(expected, rel=1e-5)
    host = gf.train.from_host(lambda step: filled(step % 6))
    assert float(fit(host, 14).params) == pytest.approx(expected, rel=1e-5)


def test_an_iterable_is_iterated_over_again_in_each_epoch():
    batches = [X[i : i + 8] for i in range(0, 40, 8)]
    fitted = fit(gf.train.from_loader(batches), 13)
    assert float(fitted.params) == pytest.approx(by_hand([batches[step % 5] for step in range(13)]), rel=1e-5)
    assert [row["epoch"] for row in fitted.history] == [1.0, 2.0, 2.6]


def test_a_function_gets_the_number_of_the_epoch():
    def of_epoch(epoch):
        return iter([X[:4] + 100 * epoch, X[4:8] + 100 * epoch])

    expected = [next(iter([X[:4] + 100 * (s // 2), X[4:8] + 100 * (s // 2)][s % 2 :])) for s in range(9)]
    assert float(fit(gf.train.from_loader(of_epoch), 9).params) == pytest.approx(by_hand(expected), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [7, 70])
@pytest.mark.parametrize("make", [Shuffled, Stateful, lambda: lambda epoch: [X[:4] + epoch, X[:4] - epoch]])
def test_a_run_that_resumes_gets_the_batches_that_it_would_have_had(make, steps, tmp_path):
    whole = fit(gf.train.from_loader(make()), 90)
    fit(gf.train.from_loader(make()), steps, folder=tmp_path, eval_every=1)
    loader = make()
    resumed = fit(gf.train.from_loader(loader), 90, folder=tmp_path, resume=True, eval_every=1)
    assert resumed.params == whole.params
    if steps == 70 and isinstance(loader, Stateful):
        # The first two, to learn their shapes; then from the start of the group on.
        assert loader.reads[:3] == [1, 2, 65]


def test_a_loader_that_ends_stops_the_run_after_a_checkpoint(tmp_path):
    def once(epoch):
        return [X[i : i + 4] for i in range(0, 40, 4)] if epoch == 0 else []

    with pytest.raises(ValueError, match="the data ended after 10 batches, but steps is 25"):
        fit(gf.train.from_loader(once), 25, folder=tmp_path, eval_every=5)
    params = gf.train.load_params(tmp_path, jnp.zeros([]))
    assert float(params) == pytest.approx(by_hand(once(0)), rel=1e-5)
    assert float(fit(gf.train.from_loader(once), 10).params) == pytest.approx(by_hand(once(0)), rel=1e-5)


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        (iter([X]), "got an iterator \\(list_iterator\\)"),
        ([], "expected an iterable of batches, got an empty list"),
    ],
)
def test_what_is_no_loader_is_refused(batches, error):
    with pytest.raises(ValueError, match=error):
        gf.train.from_loader(batches)


@pytest.mark.parametrize(
    ("last", "error"),
    [
        (X[:3], r"step 1: array: expected \[4\] float32 .* got \[3\] float32\. Drop the last partial batch"),
        (X[:4].astype(int), r"expected \[4\] float32 .* got \[4\] int64"),
        ((X[:4],), "must be a tree like the first one"),
    ],
)
def test_batches_that_differ_are_refused(last, error):
    with pytest.raises(ValueError, match=error):
        fit(gf.train.from_loader([X[:4], last]), 4)


def test_slow_batches_are_made_few_at_a_time():
    assert steps_per_group(X, 1e-5) == 64
    assert steps_per_group(X, 0.11) == 4
    assert steps_per_group(X, 30.0) == 1
    assert steps_per_group(np.zeros([1 << 21]), 1e-5) == 1  # 16 MiB


def test_a_loader_returns_its_first_batches_again():
    loader = Loader([X[:1], X[1:2], X[2:3]])
    assert [batch.tolist() for batch in loader.first(2)] == [[0], [1]]
    assert [loader.read(step).tolist() for step in range(4)] == [[0], [1], [2], [0]]
    loader.go(2)
    assert loader.read(2).tolist() == [2]
    with pytest.raises(EndedError):
        Loader(lambda epoch: []).read(0)


def test_memory_maps_larger_than_memory(tmp_path):
    file = tmp_path / "tokens.bin"
    with file.open("wb") as out:
        out.truncate(1 << 40)  # a terabyte, of which the disk holds nothing
    tokens = np.memmap(file, np.uint16, "r")
    data = gf.train.from_host(gf.data.host_windows(tokens, 8, batch=4))
    fitted = gf.fit(
        lambda params, batch: jnp.square(params - batch[0].astype(jnp.float32).mean()),
        jnp.ones([]),
        data,
        optax.sgd(0.5),
        20,
        progress=False,
    )
    assert float(fitted.params) == 0.0


def test_loaders_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    examples = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(X))

    def make():
        generator = torch.Generator().manual_seed(0)
        return torch.utils.data.DataLoader(
            examples, batch_size=8, shuffle=True, drop_last=True, generator=generator
        )

    def pairs(params, batch):
        return loss(params, batch[0])

    def run(steps, **options):
        data = gf.train.from_loader(make())
        return gf.fit(pairs, jnp.zeros([]), data, optax.sgd(0.1), steps, progress=False, **options).params

    loader = make()
    expected = [batch[0].numpy() for _ in range(4) for batch in loader]
    assert float(run(20)) == pytest.approx(by_hand(expected), rel=1e-5)
    run(7, folder=tmp_path, eval_every=1)
    assert run(20, folder=tmp_path, resume=True, eval_every=1) == run(20)


def pipeline(grain):
    return grain.MapDataset.source(X).shuffle(seed=1).repeat().to_iter_dataset().batch(8)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_grain_in_several_processes_resumes_from_its_state(workers, tmp_path):
    grain = pytest.importorskip("grain")
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # grain's processes read its flags
    data = pipeline(grain)
    expected = [batch for batch, _ in zip(data, range(30), strict=False)]
    if workers:
        data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        expected = [batch for batch, _ in zip(data, range(30), strict=False)]
    assert float(fit(gf.train.from_loader(data), 30).params) == pytest.approx(by_hand(expected), rel=1e-5)
    fit(gf.train.from_loader(data), 11, folder=tmp_path, eval_every=1)
    resumed = fit(gf.train.from_loader(data), 30, folder=tmp_path, resume=True, eval_every=1)
    assert resumed.params == fit(gf.train.from_loader(data), 30).params


def test_a_dataset_of_grain_is_a_function_of_the_step():
    grain = pytest.importorskip("grain")
    data = grain.MapDataset.source(X).shuffle(seed=1).repeat().batch(8)
    fitted = fit(gf.train.from_host(lambda step: data[step]), 12)
    assert float(fitted.params) == pytest.approx(by_hand([data[step] for step in range(12)]), rel=1e-5)


PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BLOCKS = re.findall(r"^```(?:python|py)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torch", "datasets"])
def test_the_pages_loaders_of_other_libraries_work(library):
    """The other blocks are run with those of all pages."""
    pytest.importorskip(library)
    names = {}
    exec(BLOCKS[0], names)
    (block,) = [block for block in BLOCKS if f"{library} import" in block or f"from {library}" in block]
    exec(block, names)
    assert names["fitted"].history[-1]["loss"] < 2.4
