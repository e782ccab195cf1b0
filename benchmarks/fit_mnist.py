"""The speed of `gf.fit` for 784-16-10 on MNIST, compared with the same training by hand and in other frameworks.

    python -m benchmarks.fit_mnist --data FOLDER

All contenders do the same work: 50,000 float32 images, already on the device, reshuffled for each epoch, batch size
32, sigmoid hidden nodes, softmax cross-entropy, plain SGD, from the same initial parameters. One call is one epoch.
At the end the training accuracy of each is printed, as evidence that it did train.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from benchmarks import harness
from benchmarks.paused import paused

SIZES = (784, 16, 10)
BATCH, RATE = 32, 0.1
BASELINE = "best hand-written scan"
Params = dict[str, Any]  # W1 [16, 784], b1 [16], W2 [10, 16], b2 [10]


class Task(NamedTuple):
    """The data and the initial parameters."""

    x: jax.Array  # [N, 784] float32, on the device, one copy for all: its position in memory affects speed
    y: jax.Array  # [N] int32
    start: Params

    def orders(self) -> Iterator[np.ndarray]:
        """Yield for each epoch the indices of each step's examples: int32 [steps, batch], the same for all."""
        for epoch in itertools.count():
            yield gf.data.epoch_order(len(self.y), BATCH, seed=0, epoch=epoch)

    @property
    def examples(self) -> int:
        """The number of examples in the full batches of an epoch."""
        return len(self.y) // BATCH * BATCH


class Trainer(NamedTuple):
    """One implementation of training."""

    epoch: Callable[[], Any]  # trains for one epoch and waits for its end
    params: Callable[[], Params]  # the current parameters


def gradfn_fit(task: Task) -> Trainer:
    """Train with gf.fit and its defaults.

    It runs in its own thread and waits in `evaluate`, at the end of each epoch. So an epoch is timed with everything
    that `fit` does around it, and tracing and compilation are in the first call only.
    """
    now = [task.start]
    loss = gf.batch_mean(gf.classification_loss(gf.mlp(SIZES)))
    forever = 10**6 * task.examples // BATCH

    def train(pause: Callable[[Params], None]) -> None:
        def evaluate(params: Params) -> dict[str, Any]:
            pause(params)
            return {}

        gf.fit(
            loss,
            task.start,
            (task.x, task.y),
            optax.sgd(RATE),
            forever,
            batch_size=BATCH,
            evaluate=evaluate,
            progress=False,
        )

    proceed = paused(train)

    def epoch() -> None:
        now[0] = proceed()

    return Trainer(epoch, lambda: now[0])


def best_scan(task: Task) -> Trainer:
    """Train with the fastest code that we could write by hand for this task on XLA:CPU."""

    def rows(x: jax.Array, index: jax.Array) -> jax.Array:
        # Copy four rows per iteration: x[index] is a gather, which XLA:CPU splits over its threads at a loss.
        def put(i: jax.Array, images: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_slice_in_dim(x, index[i], 1)  # [1, 784]
            return jax.lax.dynamic_update_slice_in_dim(images, row, i, 0)

        return jax.lax.fori_loop(0, BATCH, put, jnp.zeros([BATCH, x.shape[1]], x.dtype), unroll=4)

    def loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        hidden = jax.nn.sigmoid(images @ params["W1"].T + params["b1"])  # [batch, 16]
        logits = hidden @ params["W2"].T + params["b2"]  # [batch, 10]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def train(params: Params, x: jax.Array, y: jax.Array, order: jax.Array) -> Params:
        def step(params: Params, index: jax.Array) -> tuple[Params, None]:
            grads = jax.grad(loss)(params, rows(x, index), y[index])
            return jax.tree.map(lambda p, g: p - RATE * g, params, grads), None

        return jax.lax.scan(step, params, order)[0]

    orders = task.orders()
    now, order = [task.start], [next(orders)]

    def epoch() -> None:
        now[0] = train(now[0], task.x, task.y, order[0])
        order[0] = next(orders)  # shuffled while the device is at work
        jax.block_until_ready(now[0])

    return Trainer(epoch, lambda: now[0])


def plain_loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the loss in its most obvious form, with matrices [in, out]."""
    hidden = jax.nn.sigmoid(images @ params["W1"] + params["b1"])  # [batch, 16]
    logits = hidden @ params["W2"] + params["b2"]  # [batch, 10]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def plain_step(params: Params, images: jax.Array, labels: jax.Array) -> Params:
    """Return the parameters after one step of SGD."""
    grads = jax.grad(plain_loss)(params, images, labels)
    return jax.tree.map(lambda p, g: p - RATE * g, params, grads)


def transposed(params: Params) -> Params:
    """Transpose matrices [out, in] to [in, out], and back."""
    return {name: leaf.T for name, leaf in params.items()}


def plain_scan(task: Task) -> Trainer:
    """Train with an epoch compiled as one scan, without further tuning."""

    @jax.jit
    def train(params: Params, x: jax.Array, y: jax.Array, order: jax.Array) -> Params:
        return jax.lax.scan(lambda params, i: (plain_step(params, x[i], y[i]), None), params, order)[0]

    orders, now = task.orders(), [transposed(task.start)]

    def epoch() -> None:
        now[0] = jax.block_until_ready(train(now[0], task.x, task.y, next(orders)))

    return Trainer(epoch, lambda: transposed(now[0]))


def call_per_step(task: Task) -> Trainer:
    """Train with the plain step compiled and called from a Python loop.

    Here and in the frameworks below numpy gathers the batch: at this size that is faster than a gather in the step.
    """
    step = jax.jit(plain_step)
    x, y = np.asarray(task.x), np.asarray(task.y)
    orders, now = task.orders(), [transposed(task.start)]

    def epoch() -> None:
        for index in next(orders):
            now[0] = step(now[0], x[index], y[index])
        jax.block_until_ready(now[0])

    return Trainer(epoch, lambda: transposed(now[0]))


def pytorch(task: Task) -> Trainer:
    """Train with PyTorch, eager, on one thread: two are slower at this size."""
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(*SIZES[:2]), nn.Sigmoid(), nn.Linear(*SIZES[1:]))
    names = ("W1", "b1", "W2", "b2")
    with torch.no_grad():
        for name, leaf in zip(names, model.parameters(), strict=True):
            leaf.copy_(torch.from_numpy(np.array(task.start[name])))
    x, y = torch.from_numpy(np.array(task.x)), torch.from_numpy(np.array(task.y, np.int64))
    orders = task.orders()
    loss, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=RATE)

    def epoch() -> None:
        torch.set_num_threads(1)
        for index in torch.from_numpy(next(orders)):
            optimizer.zero_grad()
            loss(model(x.index_select(0, index)), y.index_select(0, index)).backward()
            optimizer.step()

    def params() -> Params:
        return {name: leaf.detach().numpy() for name, leaf in zip(names, model.parameters(), strict=True)}

    return Trainer(epoch, params)


def equinox(task: Task) -> Trainer:
    """Train with Equinox, with a jitted call per step, as in its documentation."""
    import equinox as eqx

    key = jax.random.key(0)
    model = eqx.nn.MLP(SIZES[0], SIZES[2], SIZES[1], depth=1, activation=jax.nn.sigmoid, key=key)

    def leaves(model: Any) -> list[jax.Array]:
        return [leaf for layer in model.layers for leaf in (layer.weight, layer.bias)]

    names = ("W1", "b1", "W2", "b2")
    model = eqx.tree_at(leaves, model, [task.start[name] for name in names])
    optimizer = optax.sgd(RATE)

    @eqx.filter_jit
    def step(model: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        def loss(model: Any) -> jax.Array:
            logits = jax.vmap(model)(images)  # [batch, 10]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(eqx.filter_grad(loss)(model), state)
        return eqx.apply_updates(model, updates), state

    x, y = np.asarray(task.x), np.asarray(task.y)
    orders, now = task.orders(), [(model, optimizer.init(eqx.filter(model, eqx.is_array)))]

    def epoch() -> None:
        for index in next(orders):
            now[0] = step(*now[0], x[index], y[index])
        jax.block_until_ready(leaves(now[0][0]))

    return Trainer(epoch, lambda: dict(zip(names, leaves(now[0][0]), strict=True)))


def flax_nnx(task: Task) -> Trainer:
    """Train with Flax NNX, with a jitted call per step, as in its documentation."""
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.hidden = nnx.Linear(*SIZES[:2], rngs=nnx.Rngs(0))
            self.last = nnx.Linear(*SIZES[1:], rngs=nnx.Rngs(1))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.last(jax.nn.sigmoid(self.hidden(x)))

    model = Model()
    variables = {
        "W1": model.hidden.kernel,
        "b1": model.hidden.bias,
        "W2": model.last.kernel,
        "b2": model.last.bias,
    }
    for name, leaf in transposed(task.start).items():  # kernels are [in, out]
        variables[name][...] = leaf
    optimizer = nnx.Optimizer(model, optax.sgd(RATE), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, images: jax.Array, labels: jax.Array) -> None:
        def loss(model: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    x, y, orders = np.asarray(task.x), np.asarray(task.y), task.orders()

    def params() -> Params:
        return transposed({name: variable[...] for name, variable in variables.items()})

    def epoch() -> None:
        for index in next(orders):
            step(model, optimizer, x[index], y[index])
        jax.block_until_ready(params())

    return Trainer(epoch, params)


TRAINERS = {
    "gf.fit": gradfn_fit,
    BASELINE: best_scan,
    "plain scan": plain_scan,
    "jitted call per step": call_per_step,
    "PyTorch": pytorch,
    "Equinox": equinox,
    "Flax NNX": flax_nnx,
}


def load(folder: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return MNIST's 50,000 training images and labels, or noise of the same shape if no folder is given."""
    folder = folder or os.environ.get("GRADFN_MNIST")
    if folder:
        return gf.data.mnist(folder).train
    print("no MNIST folder (--data FOLDER or GRADFN_MNIST): noise of the same shape instead")
    rng = np.random.default_rng(0)
    x = rng.random((50_000, SIZES[0]), np.float32)
    return x, (x @ rng.standard_normal((SIZES[0], SIZES[2]), np.float32)).argmax(1).astype(np.int32)


def starting_task(x: np.ndarray, y: np.ndarray) -> Task:
    """Return the task, with initial parameters of gradfn."""
    return Task(jnp.asarray(x), jnp.asarray(y), gf.mlp(SIZES).init(jax.random.key(0)))


def trainers(task: Task, names: Iterable[str]) -> tuple[dict[str, Trainer], dict[str, str]]:
    """Return the trainers whose packages are installed, and why others are skipped."""
    return harness.available(lambda name: TRAINERS[name](task), names)


def counted(epoch: Callable[[], Any], examples: int) -> harness.Contender:
    """Return the contender that trains for an epoch and returns the number of examples."""

    def run() -> float:
        epoch()
        return examples

    return run


def main() -> None:
    parser = harness.arguments(__doc__.partition("\n")[0], rounds=15)
    parser.add_argument(
        "--data", metavar="FOLDER", help="the folder with MNIST's four files (default: GRADFN_MNIST)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=TRAINERS, help="compare only these with the best hand-written scan"
    )
    options = parser.parse_args()
    task = starting_task(*load(options.data))
    names = [name for name in TRAINERS if not options.only or name in (*options.only, BASELINE)]
    ready, skipped = trainers(task, names)
    if not (options.data or os.environ.get("GRADFN_MNIST")):
        skipped["MNIST"] = (
            "no folder (--data or GRADFN_MNIST); noise of the same shape, which takes the same time"
        )
    contenders = {name: counted(trainer.epoch, task.examples) for name, trainer in ready.items()}
    timings = harness.race(contenders, options.rounds)
    harness.report(
        "Training 784-16-10 on MNIST, batch 32, SGD",
        timings,
        BASELINE,
        "examples",
        aims={"gf.fit": 1 / 0.985} if "gf.fit" in ready else {},
        skipped=skipped,
        packages=(*harness.PACKAGES, "torch", "equinox", "flax"),
        json_file=options.json,
    )
    accuracy = jax.jit(gf.accuracy(gf.mlp(SIZES)))
    right = {name: float(accuracy(trainer.params(), (task.x, task.y))) for name, trainer in ready.items()}
    print("training accuracy:", ", ".join(f"{name} {share:.2%}" for name, share in right.items()))


if __name__ == "__main__":
    main()
