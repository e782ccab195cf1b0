"""The cost of inspection, norms and curvature relative to the plain gradient, and of attention by its length."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import gradfn as gf
from benchmarks import harness
from benchmarks.accelerator import common
from benchmarks.accelerator.common import Emit, Shapes

FIVE = ("mean", "rms", "max", "zeros", "nonfinite")


def overhead(shapes: Shapes, emit: Emit) -> None:
    """Compare inspection, the guard and norms with the plain gradient.

    Long attention has no probabilities unless they are inspected: see `beyond`.
    """
    loss = gf.next_token_loss(gf.gpt(shapes.config))
    mean = gf.batch_mean(loss)
    ways = {
        "inspect, five statistics": (
            gf.inspect(mean, sites=but_probabilities, stats=FIVE, input_grads=False),
            1.10,
        ),
        "nan_guard": (gf.nan_guard(mean), 1.03),
        "per-example norms": (gf.per_example.norms(loss), 1.15),
    }
    over_gradient(mean, ways, shapes, emit)


def but_probabilities(site: Any) -> bool:
    return "probabilities" not in site.name


def beyond(shapes: Shapes, emit: Emit) -> None:
    """Compare what needs plain attention or second derivatives with the plain gradient."""
    mean = gf.batch_mean(gf.next_token_loss(gf.gpt(shapes.config)))
    product = gf.curvature.hvp(mean)
    ways = {
        "inspect, with probabilities": (gf.inspect(mean, stats=FIVE, input_grads=False), None),
        "Hessian-vector product": (lambda params, batch: product(params, params, batch), None),
    }
    over_gradient(mean, ways, shapes, emit)


def over_gradient(
    mean: Callable, ways: dict[str, tuple[Callable, float | None]], shapes: Shapes, emit: Emit
) -> None:
    """Report the time of each way relative to the gradient's, one at a time to save memory.

    Args:
        mean: the loss of a batch.
        ways: functions `(params, batch)` and the ratio that is aimed at, by name.
        shapes: the sizes.
        emit: writes a row.
    """
    params = gf.gpt(shapes.config).init(jax.random.key(0))

    def ready(f: Callable, batch: Any) -> common.Ready:
        def make() -> tuple[Any, Callable[[], Any]]:
            compiled = jax.jit(lambda params, batch: f(params, batch)).lower(params, batch).compile()
            return compiled, lambda: compiled(params, batch)

        return common.made_ready(make)

    plains: dict[int, common.Ready] = {}
    for name, (way, aim) in ways.items():
        for batch_size in shapes.batches:
            batch = jax.device_put(common.text_of(shapes.config, batch_size))
            try:
                if batch_size not in plains:
                    plain = plains[batch_size] = ready(jax.value_and_grad(mean), batch)
                    emit("gradient", batch=batch_size, peak_gb=plain.peak, first_call_s=plain.first)
                one = ready(way, batch)
                raced = {n: wall for n, _, wall in common.raced({"": plains[batch_size], name: one}, shapes)}
            except Exception as error:
                if common.out_of_memory(error):
                    continue
                emit(name, skipped=common.first_line(error))
                break
            low, ratio, high = harness.quartiles(harness.divided(raced[name], raced[""]))
            figures = {"ms": 1e3 * harness.quartiles(raced[name])[1], "over_gradient": ratio}
            figures |= {"quartiles": [low, high]} | ({} if aim is None else {"aim": f"<= {aim:.2f}"})
            emit(name, batch=batch_size, **figures, peak_gb=one.peak, first_call_s=one.first)
            break
        else:
            emit(name, skipped=f"no batch size of {shapes.batches} fits in memory")


# Attention ---------------------------------------------------------------------------------------------------------


def attention(shapes: Shapes, emit: Emit) -> None:
    """Compare the value and gradients of causal attention, gradfn's and plain, by the sequence's length."""
    heads, size = shapes.heads
    for length in shapes.lengths:
        batch_size = shapes.lengths[-1] // length  # as many tokens for each length
        keys = jax.random.split(jax.random.key(0), 3)
        shape = (batch_size, length, heads, size)
        inputs = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
        makers = {
            f"T = {length:,}: {name}": lambda f=f, inputs=inputs: attention_ready(f, inputs)
            for name, f in attentions().items()
        }
        ready = common.all_ready(makers, emit)
        for name in makers.keys() - ready.keys():
            emit(name, skipped="out of memory")
        for name, seconds, _ in common.raced(ready, shapes):
            _, first, peak = ready[name]
            emit(name, batch=batch_size, ms=1e3 * seconds, peak_gb=peak, first_call_s=first)


def attentions() -> dict[str, Callable]:
    """Return functions of queries, keys and values `[batch, T, heads, size]` by name."""
    return {"gradfn": gradfn_attention, "gradfn, in blocks": in_blocks, "plain": plain_attention}


def gradfn_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Return attention as gradfn computes it on this device: on a GPU by cuDNN."""
    return jax.vmap(functools.partial(gf.layers.attend, causal=True))(query, key, value)


def in_blocks(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    with gf.layers.attention_form("blocks"):
        return gradfn_attention(query, key, value)


def plain_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Return attention with its `[batch, heads, T, T]` scores, in float32 as in gradfn."""
    length, size = query.shape[1], query.shape[-1]
    scores = jnp.einsum("bthd,bshd->bhts", query * size**-0.5, key, preferred_element_type=jnp.float32)
    causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
    scores = jnp.where(causal, scores, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, -1).astype(value.dtype), value)


def attention_ready(f: Callable, inputs: list[jax.Array]) -> tuple[Any, Callable[[], Any]]:
    """Return the compiled value and gradients, and a function that computes them."""

    def scalar(*inputs: jax.Array) -> jax.Array:
        return f(*inputs).astype(jnp.float32).sum()

    compiled = jax.jit(jax.value_and_grad(scalar, (0, 1, 2))).lower(*inputs).compile()
    return compiled, lambda: compiled(*inputs)
