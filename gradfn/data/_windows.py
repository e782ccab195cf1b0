"""Windows of a text: the sequences that a language model is trained and evaluated on."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradfn.data._arrays import as_array
from gradfn.data._checks import integer
from gradfn.data.dataset import DataError
from gradfn.data.file_tokens import FileTokens

Batch = tuple[np.ndarray, np.ndarray]  # tokens and targets, [batch, length] int32 each
Tokens = np.ndarray | FileTokens
MOST = 2**31 - 1  # the largest int32, and the largest index on the device


def windows(tokens: Tokens, length: int, batch: int) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Return a function that samples windows of a text on the device: `data` for `gf.fit`.

    The tokens are stored on the device; for a text that is too large use `host_windows`.

    Args:
        tokens: `[N]` integers, N < 2**31.
        length: tokens per window (`block_size`).
        batch: windows per call.

    Returns:
        `key -> (tokens, targets)`, each `[batch, length]` int32; targets are the tokens shifted by one.

    Raises:
        DataError: a text with fewer than `length + 1` tokens, or too many to index on the device; tokens that are
            not integers `[N]`, or do not fit int32.

    >>> import jax, gradfn as gf
    >>> draw = gf.data.windows(np.arange(100), 3, batch=2)
    >>> tokens, targets = draw(jax.random.key(0))
    >>> tokens.shape, (targets - tokens).tolist()
    ((2, 3), [[1, 1, 1], [1, 1, 1]])
    """
    tokens, n_starts = _checked(tokens), _starts(tokens, length, batch)
    if len(tokens) > MOST:
        raise DataError(
            f"windows: expected at most {MOST:,} tokens, the limit of int32 indices on the device, got "
            f"{len(tokens):,}. Use gf.train.from_host(gf.data.host_windows(...))"
        )
    _check_int32(tokens)  # larger ones would wrap around silently
    if isinstance(tokens, jax.Array):
        on_device = tokens
    else:
        array = np.asarray(tokens)
        # jax supports the native byte order only.
        on_device = jnp.asarray(array.astype(array.dtype.newbyteorder("="), copy=False))

    def draw(tokens: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        starts = jax.random.randint(key, (batch,), 0, n_starts)
        rows = tokens[starts[:, None] + jnp.arange(length + 1)[None]].astype(jnp.int32)  # [batch, length + 1]
        return rows[:, :-1], rows[:, 1:]

    # A Partial is a pytree, so that `fit` can pass its arrays to the compiled program as arguments.
    return jax.tree_util.Partial(draw, on_device)


def host_windows(tokens: Tokens, length: int, batch: int, seed: int = 0) -> Callable[[int], Batch]:
    """Return a function that samples windows of a text on the host, for memory-mapped files.

    Args:
        tokens: `[N]` integers of any N, such as an `np.memmap`; only the windows are read.
        length: tokens per window (`block_size`).
        batch: windows per call.
        seed: of the samples.

    Returns:
        `step -> (tokens, targets)`, each `[batch, length]` int32, a pure function of the step:
        `gf.fit(loss, params, gf.train.from_host(gf.data.host_windows(...)), ...)`.

    Raises:
        DataError: a text with fewer than `length + 1` tokens, or tokens that are not integers `[N]`.

    >>> import gradfn as gf
    >>> tokens, targets = gf.data.host_windows(np.arange(100), 3, batch=2)(0)
    >>> (targets - tokens).tolist()
    [[1, 1, 1], [1, 1, 1]]
    """
    tokens, n_starts = _checked(tokens), _starts(tokens, length, batch)
    integer("seed", seed, 0, 2**32 - 1)

    def draw(step: int) -> Batch:
        starts = np.random.default_rng([seed, step]).integers(0, n_starts, batch)
        rows = _as_int32(np.stack([tokens[start : start + length + 1] for start in starts]))
        return rows[:, :-1], rows[:, 1:]  # [batch, length + 1] -> [batch, length]

    return draw


def fixed_windows(tokens: Tokens, length: int, most: int | None = None) -> Batch:
    """Return adjacent windows of a text for evaluation, the same ones each time.

    Args:
        tokens: `[N]` integers of any N; only the windows are read.
        length: tokens per window (`block_size`).
        most: the maximum number of windows, spread evenly over the text; None for all. The last partial window is
            dropped.

    Returns:
        `(tokens, targets)`, each `[windows, length]` int32.

    Raises:
        DataError: a text with fewer than `length + 1` tokens, or tokens that are not integers `[N]`.

    >>> import gradfn as gf
    >>> gf.data.fixed_windows(np.arange(8), 3)[0].tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    tokens = _checked(tokens)
    _starts(tokens, length, 1)
    n = (len(tokens) - 1) // length
    chosen = np.arange(n) if most is None or most >= n else np.arange(most) * n // most
    rows = np.empty([len(chosen), length + 1], np.int32)
    for row, i in zip(rows, chosen.tolist(), strict=True):
        row[:] = _as_int32(tokens[i * length : (i + 1) * length + 1])
    return rows[:, :-1], rows[:, 1:]  # [windows, length + 1] -> [windows, length]


def _checked(tokens: PyTree) -> PyTree:
    """Return tokens as an array of integers `[N]`; `FileTokens` are returned as they are."""
    if isinstance(tokens, FileTokens):
        return tokens
    tokens = as_array(tokens, "tokens")
    if tokens.ndim != 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise DataError(f"tokens must be integers of shape [N], got {tokens.dtype} {list(tokens.shape)}")
    return tokens


def _as_int32(tokens: PyTree) -> np.ndarray:
    _check_int32(tokens)
    return np.asarray(tokens).astype(np.int32)


def _check_int32(tokens: PyTree) -> None:
    if tokens.dtype.itemsize >= 4 and len(tokens) and int(tokens.max()) > MOST:
        raise DataError(f"tokens must fit int32, got {int(tokens.max()):,}. Renumber them")


def _starts(tokens: Tokens, length: int, batch: int) -> int:
    """Return the number of possible windows."""
    length, _ = integer("length", length, 1), integer("batch", batch, 1)
    if len(tokens) < length + 1:
        raise DataError(
            f"expected at least {length + 1:,} tokens for windows of {length:,} and their targets, got "
            f"{len(tokens):,}. Use a longer text or shorter windows"
        )
    return len(tokens) - length
