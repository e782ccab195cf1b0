"""The transformer block, and stacks of blocks: unrolled, or as one `lax.scan`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from gradfn.core.attention_form import LONG
from gradfn.core.names import scope, tap
from gradfn.core.net import Net, fold, repeat
from gradfn.core.params import Param, Params, Spec
from gradfn.layers._dropout import dropout

Run = Callable  # (params, x, key, cache, start, local=True) -> (y, cache)
# The loop over so few stacked blocks is unrolled when it is compiled, which takes no longer than to compile the loop.
# Long sequences keep the loop: jax would keep the `[T, T]` mask of each unrolled block for the backward pass.
UNROLLED = 4


def block(
    attention: Net, feed: Net, norms: Mapping[str, Net], rate: float, parallel: bool = False
) -> tuple[Spec, Run]:
    """Return a pre-norm block: attention, then a feed-forward layer, each added to the residual stream.

    The stream is tapped as `residual_mid` and `residual`, the two summands as `attention_out` and `feed_out`.

    Args:
        attention: `[T, width] -> [T, width]`, as `gf.layers.attention`.
        feed: `[T, width] -> [T, width]`.
        norms: `attention_norm` and `feed_norm`, of what the two layers read; and `attention_out_norm` and
            `feed_out_norm`, of what they add to the stream, or neither.
        rate: the fraction of their outputs that training drops.
        parallel: both layers read the stream as it enters the block, and there is no `residual_mid` (Wang and
            Komatsuzaki, *GPT-J-6B*, 2021).

    Returns:
        The spec, and `(params, x, key, cache, start, local=True) -> (y, cache)`; key and cache may be None; `local`
        is that of `gf.layers.attention`.
    """
    drop = dropout(rate)

    def apply(name: str, net: Net, params: Params, x: jax.Array, **options: PyTree) -> PyTree:
        with scope(name):
            return net.apply(params[name], x, **options)

    def added(name: str, params: Params, y: jax.Array, key: Any) -> jax.Array:
        if f"{name}_norm" in norms:
            y = apply(f"{name}_norm", norms[f"{name}_norm"], params, y)
        return tap(drop.apply({}, y, key=key), name)

    def run(
        params: Params, x: jax.Array, key: Any, cache: PyTree, start: PyTree, local: PyTree = True
    ) -> tuple[jax.Array, PyTree]:
        options = {} if local is True else {"local": local}
        normed = apply("attention_norm", norms["attention_norm"], params, x)
        if cache is None:
            y = apply("attention", attention, params, normed, **options)
        else:
            y, cache = apply("attention", attention, params, normed, cache=cache, start=start, **options)
        attended = x + added("attention_out", params, y, fold(key, 0))
        if not parallel:
            x = attended = tap(attended, "residual_mid")
        y = apply("feed", feed, params, apply("feed_norm", norms["feed_norm"], params, x))
        return tap(attended + added("feed_out", params, y, fold(key, 1)), "residual"), cache

    order = ("attention_norm", "attention", "attention_out_norm", "feed_norm", "feed", "feed_out_norm")
    parts = {"attention": attention, "feed": feed, **norms}
    return {name: parts[name].spec for name in order if name in parts}, run


def stack_of(
    spec: Spec, run: Run, n: int, scan: bool, remat: bool, local: Sequence[bool] | None = None
) -> tuple[Spec, Run]:
    """Return `n` blocks in sequence.

    Args:
        spec: of one block.
        run: of one block.
        n: the number of blocks.
        scan: stack the parameters to arrays `[n, ...]` under one `lax.scan`, whose compile time does not grow with
            depth. Otherwise blocks `"0"`, `"1"`, ... have their own arrays, and more than `UNROLLED` of them run
            faster than the loop.
        remat: recompute the insides of a block in the backward pass instead of storing them.
        local: for each block, whether its attention is local (`gf.layers.attention`); None for all.

    Returns:
        The spec, and `(params, x, key, cache, start) -> (y, cache)`; the caches form a tree with the parameters'
        structure.
    """
    kinds = [True] * n if local is None else list(local)

    # In a compiled loop the backward pass cannot be merged with the forward pass, and remat needs no barriers.
    # Saving only matrix products takes a third less time on CPUs than stacking every value of a block. Those with
    # batch axes are the `[heads, T, T]` of attention: it takes no longer to compute them again.
    def in_loop(run: Run) -> Run:
        policy = None if remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(run, prevent_cse=False, policy=policy)

    def straight(run: Run) -> Run:
        return jax.checkpoint(run, prevent_cse=not scan) if remat else run

    # What is the same for all blocks is known when they are traced.
    of_kind: dict[bool, Run] = {True: run, False: functools.partial(run, local=False)}
    mixed = len(set(kinds)) > 1
    one = run if mixed else of_kind[kinds[0]]
    loop, unrolled_loop = in_loop(one), straight(one)
    each = {kind: straight(of_kind[kind]) for kind in of_kind}

    def keys_of(key: Any) -> PyTree:
        return None if key is None else jax.random.split(key, n)

    def scanned(
        params: Params, x: jax.Array, key: Any, cache: PyTree, start: PyTree
    ) -> tuple[jax.Array, PyTree]:
        looped = remat or n > UNROLLED or len(x) >= LONG
        of_one = loop if looped else unrolled_loop

        def step(x: jax.Array, xs: Any) -> tuple[jax.Array, PyTree]:
            block_params, block_key, block_cache, *kind = xs
            return of_one(block_params, x, block_key, block_cache, start, *kind)

        of_blocks = (params, keys_of(key), cache, *([jnp.array(kinds)] if mixed else []))
        return jax.lax.scan(step, x, of_blocks, length=n, unroll=not looped)

    def unrolled(
        params: Params, x: jax.Array, key: Any, cache: PyTree, start: PyTree
    ) -> tuple[jax.Array, PyTree]:
        keys, caches = keys_of(key), {}
        for i, kind in enumerate(kinds):
            block_key = None if keys is None else keys[i]
            block_cache = None if cache is None else cache[str(i)]
            with scope(str(i)):
                x, caches[str(i)] = each[kind](params[str(i)], x, block_key, block_cache, start)
        return x, None if cache is None else caches

    if scan:
        return repeat(Net(spec, run), n).spec, scanned
    return {str(i): spec for i in range(n)}, unrolled


def stack_blocks(params: Params) -> Params:
    """Convert parameters of unrolled blocks to parameters of blocks under `lax.scan`.

    Args:
        params: of a net with `scan=False`, or a tree of the same structure (gradients, optimizer moments).

    Returns:
        The same tree with `blocks` stacked: arrays `[n, ...]`.

    >>> import jax, gradfn as gf
    >>> config = gf.GPTConfig(vocab=65, context=8, n_layers=3, n_heads=2, width=4)
    >>> params = gf.gpt(config).init(jax.random.key(0))
    >>> gf.stack_blocks(params)["blocks"]["feed"]["up"]["W"].shape
    (3, 16, 4)
    """
    blocks = params["blocks"]
    in_order = [blocks[str(i)] for i in range(len(blocks))]
    return params | {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *in_order)}


def unstack_blocks(params: Params) -> Params:
    """Convert parameters of blocks under `lax.scan` to those of unrolled blocks: the inverse of `gf.stack_blocks`.

    >>> import jax, gradfn as gf
    >>> config = gf.GPTConfig(vocab=65, context=8, n_layers=3, n_heads=2, width=4, scan=True)
    >>> params = gf.gpt(config).init(jax.random.key(0))
    >>> gf.unstack_blocks(params)["blocks"]["2"]["feed"]["up"]["W"].shape
    (16, 4)
    """
    blocks = params["blocks"]
    n = len(jax.tree.leaves(blocks)[0])
    unstacked = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(n)}
    return params | {"blocks": unstacked}


def cast(params: PyTree, dtype: DTypeLike | None) -> PyTree:
    """Return parameters, or images, cast to the dtype that a net computes in; None leaves them as they are."""
    return params if dtype is None else jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), params)


def gpt2_init(spec: Spec, n_layers: int) -> Spec:
    """Return a spec whose matrices are initialized as in GPT-2: normal with standard deviation 0.02.

    For those that write into the residual stream (`out`, `down`) it is divided by sqrt(2 n_layers), so that the
    stream does not grow with depth (Radford et al., *Language Models are Unsupervised Multitask Learners*,
    2019, section 2.3).
    """
    std_into_stream = 0.02 / (2 * n_layers) ** 0.5

    def draw(path: Any, param: Param) -> Param:
        if param.init is not None or param.ndim < 2:
            return param
        std = std_into_stream if path[-2].key in ("out", "down") else 0.02
        return replace(param, init=jax.nn.initializers.normal(std))

    return jax.tree_util.tree_map_with_path(draw, spec)
