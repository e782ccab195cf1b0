"""Parameters at earlier steps of training, small enough for a page.

Each checkpoint is the difference to the one after it, from the end of training backwards, in multiples of a step that
is a fraction of the difference's root mean square in each row. The multiples are coded by their frequency (Huffman,
*A method for the construction of minimum-redundancy codes*, 1952). The difference is taken to the decoded parameters,
so that errors do not add up.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradfn.pages.live.arrays import encoded

Params = Mapping[str, np.ndarray]
# Of the root mean square of a row, from the smallest file to the most exact.
FRACTIONS = (1.2, 0.95, 0.7, 0.4, 0.15, 0.03)
LARGEST = 127  # multiple of a step


class Coded(NamedTuple):
    """A checkpoint as JSON, and the parameters that the page makes of it."""

    content: dict[str, Any]
    params: dict[str, np.ndarray]


def chosen(steps: Sequence[int], n: int) -> list[int]:
    """Return at most `n` of some steps, the first and the last among them, closer to each other at the start.

    >>> chosen(range(0, 1700, 100), 5)
    [0, 100, 300, 700, 1600]
    >>> chosen([10, 20], 5)
    [10, 20]
    """
    if len(steps) <= n:
        return list(steps)
    spread = np.geomspace(1, len(steps), n) - 1
    at = np.maximum(np.rint(spread).astype(int), np.arange(n))
    return [steps[i] for i in np.minimum(at, len(steps) - n + np.arange(n)).tolist()]


def coded(params: Params, following: Params, is_exact: Callable[[Params], bool]) -> Coded | None:
    """Return a checkpoint in as few bytes as an exact one takes; None where it is not exact even in float16.

    Args:
        params: of the checkpoint.
        following: those of the checkpoint after it, as the page has them.
        is_exact: whether decoded parameters are exact enough.
    """
    best, middle = None, len(FRACTIONS) // 2
    # From the middle to coarser steps while they are exact, or to finer ones until one is.
    for fraction in reversed(FRACTIONS[:middle]):
        made = _quantized(params, following, fraction)
        if not is_exact(made[2]):
            break
        best = made
    for fraction in FRACTIONS[middle:] if best is None else ():
        made = _quantized(params, following, fraction)
        if is_exact(made[2]):
            best = made
            break
    if best is None:
        with np.errstate(over="ignore"):
            whole = {name: params[name].astype(np.float16) for name in following}
        halves = {name: array.astype(np.float32) for name, array in whole.items()}
        arrays = {name: encoded(array) for name, array in whole.items()}
        return Coded({"whole": arrays}, halves) if is_exact(halves) else None
    multiples, scales, decoded = best
    lengths, bits = pack(multiples + 128)
    return Coded({"lengths": encoded(lengths), "bits": encoded(bits), "scales": encoded(scales)}, decoded)


def _quantized(
    params: Params, following: Params, fraction: float
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Return the multiples [n], the size of a step of each row, and the parameters that they make."""
    import ml_dtypes

    multiples, scales, made = [], [], {}
    for name, after in following.items():
        rows = (params[name] - after).reshape(-1, after.shape[-1])
        # Differences that overflow are not exact enough.
        with np.errstate(all="ignore"):
            size = np.sqrt(np.square(rows).mean(1, keepdims=True))
            # A step that is large enough for the largest difference.
            step = np.maximum(fraction * size, np.abs(rows).max(1, keepdims=True) / LARGEST)
            scale = step.astype(ml_dtypes.bfloat16)
            wide = scale.astype(np.float32)
            k = np.divide(rows, wide, out=np.zeros_like(rows), where=wide > 0)
            k = np.nan_to_num(np.rint(k)).clip(-LARGEST, LARGEST)
            made[name] = after + (k * wide).reshape(after.shape)
        multiples.append(k.astype(np.int16).ravel())
        scales.append(scale.ravel())
    return np.concatenate(multiples), np.concatenate(scales), made


def pack(symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the length of the code of each of 256 symbols, and symbols in these codes, one after another.

    Codes are canonical: those of one length are consecutive numbers in the order of the symbols. They start with their
    highest bit, in the highest bit of a byte.

    >>> lengths, bits = pack(np.array([7, 7, 7, 9]))
    >>> lengths[[7, 9]], bits
    (array([1, 1], dtype=uint8), array([16], dtype=uint8))
    """
    lengths = _code_lengths(np.bincount(symbols, minlength=256))
    codes, code, last = np.zeros(256, np.int64), 0, 0
    for symbol in sorted(np.flatnonzero(lengths), key=lambda symbol: (lengths[symbol], symbol)):
        code <<= int(lengths[symbol]) - last
        codes[symbol], last = code, int(lengths[symbol])
        code += 1
    own = lengths[symbols].astype(np.int64)
    ends = own.cumsum()
    # The bit at each place: of the code that is there, shifted by the bits that follow in it.
    shifts = np.repeat(ends, own) - np.arange(ends[-1]) - 1
    return lengths, np.packbits((np.repeat(codes[symbols], own) >> shifts) & 1)


def _code_lengths(counts: np.ndarray) -> np.ndarray:
    """Return the lengths of Huffman's codes for symbols of these counts; 0 for those that do not occur."""
    heap: list[tuple[int, int, tuple[int, ...]]] = [
        (int(count), symbol, (symbol,)) for symbol, count in enumerate(counts) if count
    ]
    lengths = np.zeros(len(counts), np.uint8)
    lengths[heap[0][1]] = 1  # where it is the only one
    heapq.heapify(heap)
    for i in range(len(heap) - 1):
        (a, _, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        if i == 0:
            lengths[:] = 0
        lengths[list(left + right)] += 1
        heapq.heappush(heap, (a + b, len(counts) + i, left + right))
    return lengths
