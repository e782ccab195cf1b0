"""Steps of small networks, which a device cannot fill: the MLP 784-256-256-10, a character GPT, and 784-16-10."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import gradfn as gf
from benchmarks import fit_mnist, gpt_step, harness
from benchmarks.accelerator import common
from benchmarks.accelerator.common import Emit, Params, Shapes

SIZES = (784, 256, 256, 10)


def small(shapes: Shapes, emit: Emit) -> None:
    """Compare steps of small networks, gradfn's and by hand, and an epoch of the digit network."""
    for name, (makers, examples, tokens) in {
        "784-256-256-10": mlp_contenders(shapes.small_batches[0]),
        "character GPT": gpt_contenders(shapes.small, shapes.small_batches[1]),
    }.items():
        ready = common.all_ready(makers, emit)
        for contender, seconds, _ in common.raced(ready, shapes):
            run, first, peak = ready[contender]
            rate = {"tokens_per_s": tokens / seconds} if tokens else {"examples_per_s": examples / seconds}
            figures = {"batch": examples, "ms": 1e3 * seconds} | rate
            emit(f"{name}: {contender}", **figures, peak_gb=peak, first_call_s=first, loss=float(run()))
    digits(shapes, emit)


Contenders = tuple[dict[str, Callable[[], Any]], int, int]  # makers, examples and tokens of a batch


def mlp_contenders(examples: int) -> Contenders:
    """Return the contenders of the MLP with Adam."""
    rng = np.random.default_rng(0)
    x, y = rng.random((examples, SIZES[0]), np.float32), rng.integers(0, SIZES[-1], examples, np.int32)
    net, batch, optimizer = gf.mlp(SIZES), jax.device_put((x, y)), optax.adam(common.RATE)
    loss = gf.batch_mean(gf.classification_loss(net))

    def start() -> Params:
        return net.init(jax.random.key(0))

    return (
        {
            "gradfn": lambda: common.gradfn_step(loss, start(), optimizer, batch),
            "raw JAX": lambda: common.raw_step(mlp_loss, start(), optimizer, batch),
        },
        examples,
        0,
    )


def mlp_loss(params: Params, batch: Any) -> jax.Array:
    """Return the MLP's loss of a batch, by hand."""
    x, y = batch
    for i in range(1, len(SIZES)):
        x = x @ params[f"W{i}"].T + params[f"b{i}"]  # [batch, n]
        x = jax.nn.sigmoid(x) if i < len(SIZES) - 1 else x
    return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()


def gpt_contenders(config: gf.GPTConfig, examples: int) -> Contenders:
    """Return the contenders of the character GPT with AdamW, as in `benchmarks.gpt_step`."""
    task = gpt_step.task_of(config, examples)
    batch = jax.device_put((task.tokens, task.targets))
    loss = gf.batch_mean(gf.next_token_loss(gf.gpt(config)))

    def by_hand(params: Params, batch: Any) -> jax.Array:
        return gpt_step.raw_loss(params, *batch, heads=config.n_heads, flat=True, scan=False)

    optimizer = gpt_step.adamw()
    return (
        {
            "gradfn": lambda: common.gradfn_step(loss, task.start, optimizer, batch),
            "raw JAX": lambda: common.raw_step(
                by_hand, gpt_step.raw_params(task, scan=False), optimizer, batch
            ),
            "Flax NNX": lambda: (None, gpt_step.nnx_step(config, task.start, optimizer, batch)),
        },
        examples,
        examples * config.context,
    )


def digits(shapes: Shapes, emit: Emit) -> None:
    """Compare an epoch of the digit network."""
    x, y = fit_mnist.load(None)
    task = fit_mnist.starting_task(x[: shapes.images], y[: shapes.images])
    ready, _ = fit_mnist.trainers(task, ["gf.fit", "plain scan", fit_mnist.BASELINE, "jitted call per step"])
    contenders = {name: fit_mnist.counted(trainer.epoch, task.examples) for name, trainer in ready.items()}
    timings = harness.race(contenders, shapes.rounds, warmup=1)
    for name, timing in timings.items():
        emit(
            f"784-16-10: {name}", examples_per_s=1 / float(np.median(timing.wall)), first_call_s=timing.first
        )
