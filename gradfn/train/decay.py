"""Which parameters decay: arrays of rank 2 and more, but not biases, norms, and vectors of stacked layers."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.core.params import Param, path_name
from gradfn.display import TextTable

# Names of vectors in gradfn, Flax, Equinox, Haiku and PyTorch, regardless of their number of axes.
_VECTOR = re.compile(r"(b|bias|biases)(_\w*)?|bn|beta|gamma|gain|scale|offset|shift", re.IGNORECASE)
_NORM = re.compile(r".*norms?|ln(_\w+)?", re.IGNORECASE)  # a normalization layer


class _Leaf(NamedTuple):
    path: tuple[PyTree, ...]
    value: PyTree
    vector: bool  # by its name, or as a parameter of a norm
    stacked: int  # how many of its leading axes are axes of layers


def weight_decay_mask(params: PyTree) -> PyTree:
    """Return which parameters weight decay applies to: floating arrays of rank 2 and more.

    Embeddings are such arrays and decay, as in nanoGPT. Biases and the parameters of norms do not decay, whatever
    their rank: they are recognized by their name (`b`, `bias`, `scale`, `gain`, ...) or by that of their layer
    (`LayerNorm_0`, `ln_1`). The rank does not include axes of stacked layers (`gf.repeat`, `nn.scan`): a spec declares
    them; among arrays they are the leading sizes that all arrays of a layer share, if one of its biases has them too.
    `gf.train.weight_decay_table` shows the result.

    Args:
        params: a tree of arrays, or a spec.

    Returns:
        The same tree of booleans: a `mask` for optax.

    >>> weight_decay_mask({"norm": {"gain": jnp.ones([24, 8])}, "kernel": jnp.ones([8, 8]), "bias": jnp.ones(8)})
    {'bias': False, 'kernel': True, 'norm': {'gain': False}}
    """
    leaves = _leaves(params)
    return jax.tree.unflatten(jax.tree.structure(params), [_decays(leaf) for leaf in leaves])


def weight_decay_table(params: PyTree) -> TextTable:
    """Return a table of which parameters decay and why: see `gf.train.weight_decay_mask`.

    Args:
        params: a tree of arrays, or a spec.

    >>> import gradfn as gf
    >>> print(gf.train.weight_decay_table({"W": jnp.ones([2, 3]), "b": jnp.ones(2)}))
      path   shape    decays   because
     ───────────────────────────────────────
      W      [2, 3]   yes      rank 2
      b      [2]      no       bias or norm
    """
    table = TextTable()
    for header in ("path", "shape", "decays", "because"):
        table.add_column(header)
    for leaf in _leaves(params):
        rank = f"rank {len(leaf.value.shape) - leaf.stacked}"
        rank += " in stacked layers" if leaf.stacked else ""
        because = "bias or norm" if leaf.vector else rank if _floating(leaf.value) else "not floating"
        name, shape = path_name(leaf.path), str(list(leaf.value.shape))
        table.add_row(name, shape, "yes" if _decays(leaf) else "no", because)
    return table


def stacked_axes(params: PyTree) -> list[tuple[int, bool]]:
    """Return for each array how many of its leading axes are axes of layers, and whether it is a vector beside them.

    >>> stacked_axes({"W": jnp.ones([24, 8, 8]), "b": jnp.ones([24, 8])})
    [(1, False), (1, True)]
    """
    return [(leaf.stacked, leaf.vector) for leaf in _leaves(params)]


def _leaves(params: PyTree) -> list[_Leaf]:
    other = jax.ShapeDtypeStruct((), jnp.int32)  # stands for a Python number or a function
    pairs = [
        (path, leaf if hasattr(leaf, "shape") else other)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    vectors = [_is_vector(path) for path, _ in pairs]
    stacked = [0] * len(pairs)
    # From the whole tree to single layers: arrays below one node that share leading sizes are one stack.
    prefixes = sorted({path[:i] for path, _ in pairs for i in range(len(path))}, key=len)
    for prefix in prefixes:
        below = [i for i, (path, _) in enumerate(pairs) if path[: len(prefix)] == prefix]
        n = _stack_of([pairs[i][1].shape for i in below], [vectors[i] for i in below])
        for i in below:
            stacked[i] = max(stacked[i], n)
    for i, (_, leaf) in enumerate(pairs):
        if isinstance(leaf, Param):
            stacked[i] = (leaf.axes or ()).count("layers")
    return [
        _Leaf(path, leaf, vector, n) for (path, leaf), vector, n in zip(pairs, vectors, stacked, strict=True)
    ]


def _stack_of(shapes: list[tuple[int, ...]], vectors: list[bool]) -> int:
    """Return how many leading axes of some arrays are axes of layers: those that a vector has beside its own."""
    ranks = [
        sum(size != 1 for size in shape) for shape, vector in zip(shapes, vectors, strict=True) if vector
    ]
    n = min(ranks, default=1) - 1  # [n, 1, 1] is a vector too
    return n if n > 0 and len({shape[:n] for shape in shapes}) == 1 else 0


def _is_vector(path: tuple[PyTree, ...]) -> bool:
    names = [part.rstrip("0123456789").rstrip("_") for part in path_name(path).split("/")]
    skipped = ("", "value", "raw_value")  # list indices, the variables of NNX
    names = [name for name in names if name not in skipped]
    return bool(names and _VECTOR.fullmatch(names[-1])) or bool(len(names) > 1 and _NORM.fullmatch(names[-2]))


def _decays(leaf: _Leaf) -> bool:
    return not leaf.vector and _floating(leaf.value) and len(leaf.value.shape) - leaf.stacked >= 2


def _floating(value: PyTree) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.inexact))
