"""What the sections share: sizes, rows, memory, and compiled steps."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import gradfn as gf
from benchmarks import harness
from gradfn.train.peak import peak_rate

RATE, BETAS, DECAY = 3e-4, (0.9, 0.95), 0.1

Row = dict[str, Any]
Emit = Callable[..., None]  # (name, **figures)
Params = dict[str, Any]


class Shapes(NamedTuple):
    """The sizes of all benchmarks."""

    config: gf.GPTConfig
    batches: tuple[int, ...]  # the first that fits in memory is used
    rounds: int
    steps: int  # in one call
    images: int
    compile: bool  # whether PyTorch compiles
    lengths: tuple[int, ...]  # of the sequences in `attention`
    heads: tuple[int, int]  # in `attention`: their number and size
    small: gf.GPTConfig  # the character GPT
    small_batches: tuple[int, int]  # of the MLP and of the character GPT
    memory: int | None  # bytes that `largest` may use; None for what the device has


# 50,304 is GPT-2's vocabulary size rounded up to a multiple of 128, as in nanoGPT.
FULL = Shapes(
    config=gf.GPTConfig(vocab=50_304, compute="bfloat16"),
    batches=(16, 8, 4, 2),
    rounds=5,
    steps=4,
    images=50_000,
    compile=True,
    lengths=(1_024, 4_096, 16_384),
    heads=(12, 64),
    small=gf.GPTConfig(vocab=65, context=64, n_layers=4, n_heads=4, width=128, bias=False, feed="gelu_exact"),
    small_batches=(128, 64),
    memory=None,
)
REDUCED = Shapes(
    config=gf.GPTConfig(vocab=128, context=16, n_layers=1, n_heads=2, width=16, compute="bfloat16"),
    batches=(2,),
    rounds=2,
    steps=1,
    images=640,
    compile=False,
    lengths=(128, 512),
    heads=(2, 8),
    small=gf.GPTConfig(vocab=65, context=16, n_layers=1, n_heads=2, width=16, bias=False, feed="gelu_exact"),
    small_batches=(8, 2),
    memory=1_500_000,
)


def device_kind() -> str:
    """Return the name of the measured device; in PyTorch's process only PyTorch can see it."""
    return os.environ.get("BENCHMARK_DEVICE_KIND") or jax.devices()[0].device_kind


def step_figures(config: gf.GPTConfig, batch_size: int, seconds: float) -> Row:
    """Return throughput and MFU of a step."""
    tokens = batch_size * config.context
    figures = {"batch": batch_size, "ms": 1e3 * seconds, "tokens_per_s": tokens / seconds}
    peak = peak_rate(device_kind())
    if peak:
        n = gf.count(gf.gpt(config).spec)
        flops = 6 * n + 12 * config.n_layers * config.context * config.width  # per token
        figures["mfu"] = flops * tokens / seconds / peak
    return figures


def text_of(config: gf.GPTConfig, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random tokens and targets `[batch, T]`."""
    tokens = np.random.default_rng(0).integers(0, config.vocab, (batch, config.context + 1), np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def decayed(params: Params) -> Any:
    """Return which parameters decay: those with two axes, as in nanoGPT."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def adamw() -> optax.GradientTransformation:
    return optax.adamw(RATE, *BETAS, weight_decay=DECAY, mask=decayed)


# Steps -------------------------------------------------------------------------------------------------------------


class Ready(NamedTuple):
    """A contender that has been compiled and has run once."""

    run: Callable[[], Any]
    first: float  # seconds of making it and of its first call
    peak: float | None  # GB


def gradfn_step(
    loss: Callable, params: Params, optimizer: optax.GradientTransformation, batch: Any
) -> tuple[Any, Callable[[], jax.Array]]:
    """Return the compiled `gf.train_step`, and a function that takes a step and returns the loss."""
    step = gf.train_step(loss, optimizer)
    now = [gf.train_state(params, optimizer, jax.random.key(0))]
    compiled = step.lower(now[0], batch).compile()

    def run() -> jax.Array:
        now[0], metrics = compiled(now[0], batch)
        return metrics["loss"]

    return compiled, run


def raw_step(
    loss: Callable, params: Params, optimizer: optax.GradientTransformation, batch: Any
) -> tuple[Any, Callable[[], jax.Array]]:
    """Return the compiled step by hand, and a function that takes a step and returns the loss."""

    @jax.jit
    def step(params: Params, state: Any, batch: Any) -> tuple[Params, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    now = [(params, optimizer.init(params))]
    compiled = step.lower(*now[0], batch).compile()

    def run() -> jax.Array:
        *state, value = compiled(*now[0], batch)
        now[0] = tuple(state)
        return value

    return compiled, run


def made_ready(make: Callable[[], tuple[Any, Callable[[], Any]]]) -> Ready:
    """Make a contender and run it once.

    Args:
        make: returns the compiled program, None where there is none, and a function that runs it.
    """
    before, began = memory_counts(), time.perf_counter()
    compiled, run = make()
    jax.block_until_ready(run())
    first, after = time.perf_counter() - began, memory_counts()
    if before and after and after["peak_bytes_in_use"] > before["peak_bytes_in_use"]:
        peak: float | None = (after["peak_bytes_in_use"] - before["bytes_in_use"]) / 1e9
    else:
        peak = None if compiled is None else planned_gb(compiled)
    return Ready(run, first, peak)


def memory_counts() -> dict[str, int] | None:
    """Return what the device has counted of its memory; None where it does not count."""
    return jax.devices()[0].memory_stats()


def planned_gb(compiled: Any) -> float | None:
    """Return the memory that XLA plans for a compiled program with its arguments and results, in GB."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return (total - plan.alias_size_in_bytes) / 1e9


def all_ready(makers: dict[str, Callable[[], tuple[Any, Callable[[], Any]]]], emit: Emit) -> dict[str, Ready]:
    """Make contenders ready; one that fails is reported as skipped, unless it is out of memory."""
    ready = {}
    for name, make in makers.items():
        try:
            ready[name] = made_ready(make)
        except Exception as error:
            if not out_of_memory(error):
                emit(name, skipped=first_line(error))
    return ready


def stepping(run: Callable[[], Any], n: int) -> harness.Contender:
    """Return the contender that runs `n` times and waits for the last result."""

    def steps() -> float:
        out = None
        for _ in range(n):
            out = run()
        jax.block_until_ready(out)
        return n

    return steps


def raced(ready: dict[str, Ready], shapes: Shapes) -> Iterator[tuple[str, float, list[float]]]:
    """Yield of each contender its name, its median seconds, and those of each round."""
    timings = harness.race(
        {name: stepping(one.run, shapes.steps) for name, one in ready.items()}, shapes.rounds
    )
    for name, timing in timings.items():
        yield name, float(np.median(timing.wall)), timing.wall


def out_of_memory(error: BaseException) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)


def first_line(error: BaseException) -> str:
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}" if str(error) else repr(error)
    )
