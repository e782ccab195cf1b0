"""A training step of GPT-2: gradfn, raw JAX, Flax NNX, `gf.fit`, and with the largest batch that fits."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from benchmarks.accelerator import common
from benchmarks.accelerator.common import Emit, Params, Shapes
from benchmarks.gpt_step import nnx_step

MFU_AIM = 0.5


def raw_loss(config: gf.GPTConfig, fused_attention: bool, params: Params, batch: Any) -> jax.Array:
    """Return GPT-2's loss of a batch, by hand: products in bfloat16; norms, softmax and loss in float32."""
    tokens, targets = batch
    half = jnp.dtype(config.compute)
    n, length = tokens.shape
    causal = jnp.tril(jnp.ones((length, length), bool))

    def linear(x: jax.Array, p: Params) -> jax.Array:
        return x @ p["W"].astype(half).T + p["b"].astype(half)

    def norm(x: jax.Array, p: Params) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_epsilon)
        return (x * p["gain"] + p["b"]).astype(half)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if fused_attention:
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(causal, scores * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores).astype(half), v)

    x = (params["embed"]["W"][tokens] + params["positions"]["W"][:length]).astype(half)  # [n, T, width]
    for i in range(config.n_layers):
        p = params["blocks"][str(i)]
        h = norm(x, p["attention_norm"])
        # [n, T, width] -> [n, T, heads, size]
        q, k, v = (
            linear(h, p["attention"][name]).reshape(n, length, config.n_heads, -1)
            for name in ("query", "key", "value")
        )
        x = x + linear(attention(q, k, v).reshape(x.shape), p["attention"]["out"])
        h = jax.nn.gelu(linear(norm(x, p["feed_norm"]), p["feed"]["up"]))
        x = x + linear(h, p["feed"]["down"])
    logits = norm(x, params["final_norm"]) @ params["embed"]["W"].astype(half).T  # [n, T, vocab]
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets).mean()


def gradfn_loss(config: gf.GPTConfig) -> Callable:
    return gf.batch_mean(gf.next_token_loss(gf.gpt(config)))


def contenders(config: gf.GPTConfig, batch: Any) -> dict[str, Callable[[], Any]]:
    """Return the makers of all contenders by name, which start from the same parameters."""

    def of(make: Callable, loss: Callable) -> Any:
        return make(loss, gf.gpt(config).init(jax.random.key(0)), common.adamw(), batch)

    def nnx() -> Any:
        step = nnx_step(config, gf.gpt(config).init(jax.random.key(0)), common.adamw(), batch)
        return None, step

    makers = {
        "gradfn": lambda: of(common.gradfn_step, gradfn_loss(config)),
        "raw JAX": lambda: of(common.raw_step, functools.partial(raw_loss, config, False)),
    }
    if jax.default_backend() == "gpu":
        makers["raw JAX, cuDNN attention"] = lambda: of(
            common.raw_step, functools.partial(raw_loss, config, True)
        )
    return makers | {"Flax NNX": nnx}


def gpt(shapes: Shapes, emit: Emit) -> None:
    """Compare a training step of gradfn with raw JAX and Flax NNX."""
    for batch_size in shapes.batches:
        batch = jax.device_put(common.text_of(shapes.config, batch_size))
        ready = common.all_ready(contenders(shapes.config, batch), emit)
        if "gradfn" in ready:
            break
    else:
        raise MemoryError(
            f"gpt: expected a batch that fits in memory, got out of memory at batch size {batch_size}"
        )
    for name, seconds, _ in common.raced(ready, shapes):
        _, first, peak = ready[name]
        figures = common.step_figures(shapes.config, batch_size, seconds)
        aim = {"aim": f"MFU >= {MFU_AIM:.0%}"} if name == "gradfn" else {}
        emit(name, **figures, **aim, peak_gb=peak, first_call_s=first, loss=float(ready[name].run()))


def largest(shapes: Shapes, emit: Emit) -> None:
    """Time gradfn's step with the largest batch that fits, found from what XLA plans for the first batch."""
    config, small = shapes.config, shapes.batches[-1]

    def made(batch_size: int) -> tuple[Any, Callable[[], jax.Array]]:
        batch = jax.device_put(common.text_of(config, batch_size))
        return contenders(config, batch)["gradfn"]()

    available = shapes.memory or (common.memory_counts() or {}).get("bytes_limit")
    if not available:
        emit("gradfn", skipped="the device does not say how much memory it has")
        return
    compiled, _ = made(small)
    batch_size = fitting_batch(compiled.memory_analysis(), small, available)
    del compiled, _
    batch_size, ready = first_that_fits(made, batch_size)
    ((_, seconds, _),) = common.raced({"gradfn": ready}, shapes)
    figures = common.step_figures(config, batch_size, seconds)
    emit("gradfn", **figures, peak_gb=ready.peak, first_call_s=ready.first)


def first_that_fits(make: Callable[[int], Any], batch_size: int) -> tuple[int, common.Ready]:
    """Return the first batch size that fits in memory, a tenth smaller with each try, and its contender."""
    while batch_size > 0:
        try:
            return batch_size, common.made_ready(functools.partial(make, batch_size))
        except Exception as error:
            if not common.out_of_memory(error):
                raise
            batch_size = batch_size * 9 // 10
    raise MemoryError("largest: expected a batch that fits in memory, not even one example does")


def fitting_batch(plan: Any, batch_size: int, available: int) -> int:
    """Return the largest batch size for which a step should fit: only temporaries grow with the batch.

    Args:
        plan: the `memory_analysis` of the step compiled for `batch_size`.
        batch_size: examples of a batch.
        available: bytes.
    """
    fixed = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return max(int((available - fixed) * batch_size // max(plan.temp_size_in_bytes, 1)), 1)


def fit(shapes: Shapes, emit: Emit) -> None:
    """Time the step as `gf.fit` takes it, from one row of metrics to the next."""
    config, batch_size = shapes.config, shapes.batches[0]
    each = shapes.steps * shapes.rounds
    times: list[float] = []

    def evaluate(params: Params) -> dict[str, float]:
        jax.block_until_ready(params)
        times.append(time.perf_counter())
        return {}

    data = common.text_of(config, 4 * batch_size)
    params = gf.gpt(config).init(jax.random.key(0))
    began = time.perf_counter()
    fitted = gf.fit(
        gradfn_loss(config),
        params,
        data,
        common.adamw(),
        4 * each,
        batch_size=batch_size,
        eval_every=each,
        evaluate=evaluate,
        progress=False,
    )
    # The first row waits for the compiler.
    seconds = float(np.median(np.diff(times))) / each
    counts = common.memory_counts()
    figures = common.step_figures(config, batch_size, seconds)
    peak = counts["peak_bytes_in_use"] / 1e9 if counts else None
    first = times[0] - began
    emit("gf.fit", **figures, peak_gb=peak, first_call_s=first, loss=float(fitted.history[-1]["loss"]))
