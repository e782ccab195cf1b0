"""Does a map depend on what the network learned? The two randomization tests of Adebayo et al., 2018.

A method that explains a trained network must give a different map once the weights, or the labels that the network
was trained on, are random. An edge detector does not: its map looks like the digit, which is convincing, but
independent of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from string import ascii_letters

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.jaxpr import Program, parameter_uses, trace
from gradfn.jaxpr.call import floating_leaves, jit_arrays

ALIKE = 0.5  # maps with a rank correlation above this show much the same

Data = jax.Array | np.ndarray
Method = Callable[[PyTree, PyTree], jax.Array]  # (params, x) -> map, of one example


@dataclass(frozen=True, eq=False, repr=False)
class Randomized(ShowsTable):
    """How similar maps remain while what the network learned is randomized; `print` shows a table.

    Attributes:
        names: what is randomized, one row per step; what earlier rows name is random too.
        rank: `[rows]`, Spearman's rank correlation of the maps with those of the trained network, averaged over
            the examples: 1 is the same order of pixels, 0 an unrelated one.
        rank_abs: `[rows]`, the rank correlation of the magnitudes of the maps.
        maps: `[rows + 1, examples, ...]`, the maps; those of the trained network come first.
    """

    names: tuple[str, ...]
    rank: Float[np.ndarray, " rows"]
    rank_abs: Float[np.ndarray, " rows"]
    maps: Float[np.ndarray, " ..."]

    @property
    def passed(self) -> bool:
        """Whether the maps depend on what was learned: both correlations of the last row are below 0.5 in magnitude.

        The threshold 0.5 separates maps that show the same from maps that do not: the saliency maps of two networks
        that learned digits from different initial weights have a correlation of 0.8, after shuffling the labels of
        0.0. If a correlation is close to 0.5, compare the maps.
        """
        return bool(abs(self.rank[-1]) < ALIKE and abs(self.rank_abs[-1]) < ALIKE)

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return the correlations as a table, the last of them first to be kept; None for all rows."""
        verdict = "passed: the maps depend on what was learned"
        if not self.passed:
            verdict = "FAILED: the maps are much the same without what was learned"
        out = TextTable(caption=verdict)
        out.add_column("random", shorten=True)
        for header in ("rank correlation", "of magnitudes"):
            out.add_column(header, ".3f")
        for i, (name, signed, size) in enumerate(zip(self.names, self.rank, self.rank_abs, strict=True)):
            out.add_row(name, signed, size, weight=i)
        return out.folded(rows, "result.table(rows=None)")


def randomize_weights(
    method: Method, init: Callable[[jax.Array], PyTree], layers: Sequence[str | Sequence[str]] | None = None
) -> Callable[..., Randomized]:
    """Return a function that applies a method to a network whose layers are randomized one by one, last layer first.

    The cascading randomization of Adebayo et al., *Sanity Checks for Saliency Maps*, 2018.

    Args:
        method: `(params, x) -> map` of one example, such as `gf.attribution.saliency(net.apply, target=3)`.
        init: `key -> params`, random parameters, such as `net.init`.
        layers: names or globs of parameters (`"W2"`, `"conv1/*"`), or lists of them that are randomized together,
            in that order. By default the layers in reverse order of their use: a layer is the parameters of one
            dict (`conv1/W`, `conv1/b`), or those with the same number (`W1`, `b1`).

    Returns:
        `(params, x, *, key) -> Randomized`; x has a leading axis of examples, `key` draws the random weights.

    Raises:
        ValueError: a layer that is not a parameter, `layers` that omit some, `init` of another tree.

    >>> import jax, gradfn as gf
    >>> net = gf.mlp([8, 6, 3])
    >>> params, x = net.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), [4, 8])
    >>> test = gf.attribution.randomize_weights(lambda params, x: x**2, net.init)
    >>> print(test(params, x, key=jax.random.key(2)))
      random     rank correlation   of magnitudes
     ─────────────────────────────────────────────
      W2, b2                1.000           1.000
      + W1, b1              1.000           1.000
    FAILED: the maps are much the same without what was learned
    """

    @transform_of(method, "randomize_weights", own=2)
    def cascade(params: PyTree, x: PyTree, *, key: Key[Array, ""]) -> Randomized:
        """Return how similar the maps of the examples `x` remain while layer after layer is randomized."""
        leaves, fresh = (floating_leaves(tree, "randomize_weights") for tree in (params, init(key)))
        if list(map(jnp.shape, fresh.values)) != list(map(jnp.shape, leaves.values)):
            raise ValueError(
                "randomize_weights: expected parameters like params from init, got others in number or shape"
            )
        if layers is None:
            groups = _by_use(leaves.names, trace(method, params, jax.tree.map(lambda leaf: leaf[0], x)))
        else:
            groups = _named(leaves.names, layers)
        maps_of = jit_arrays(lambda params, x: jax.vmap(lambda one: method(params, one))(x))
        maps, random = [maps_of(params, x)], set[str]()
        for group in groups:
            random.update(group)
            pairs = zip(leaves.names, leaves.values, fresh.values, strict=True)
            maps.append(maps_of(leaves.fill([new if name in random else old for name, old, new in pairs]), x))
        labels = [("+ " if i else "") + ", ".join(group) for i, group in enumerate(groups)]
        return _compare(labels, maps)

    return cascade


def randomize_labels(
    method: Method, train: Callable[[tuple[Data, Data], jax.Array], PyTree]
) -> Callable[..., Randomized]:
    """Return a function that applies a method to two networks, one trained on the true labels, one on shuffled ones.

    The data randomization test of Adebayo et al., 2018. The images are the same for both networks, but shuffled
    labels can only be memorized.

    Nothing can be learned from inputs that are equal in all examples (the border of the MNIST images); if a map has
    the shape of the input, they are excluded from the comparison. With them, the magnitudes of the maps of any two
    networks would be similar on such data.

    Args:
        method: `(params, x) -> map` of one example.
        train: `((inputs, labels), key) -> params`; long enough to fit the shuffled labels too, and from the same
            initial weights for the same key.

    Returns:
        `((inputs, labels), x, *, key) -> Randomized` with one row; x has a leading axis of examples. `key` is used
        for training and for shuffling.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> def train(data, key):
    ...     inputs, labels = data
    ...     return jnp.linalg.lstsq(inputs, labels)[0]
    >>> inputs = jax.random.normal(jax.random.key(0), [50, 20])
    >>> data = inputs, inputs @ jnp.arange(20.0)
    >>> saliency = gf.attribution.saliency(lambda w, x: w @ x)
    >>> gf.attribution.randomize_labels(saliency, train)(data, inputs[:3], key=jax.random.key(1)).passed
    True
    """

    @transform_of(method, "randomize_labels", own=2)
    def both(data: tuple[Data, Data], x: PyTree, *, key: Key[Array, ""]) -> Randomized:
        """Return how similar the maps of the examples `x` are for true and for shuffled labels."""
        inputs, labels = data
        key_train, key_order = jax.random.split(key)
        order = np.asarray(jax.random.permutation(key_order, len(labels)))
        maps_of = jit_arrays(lambda params, x: jax.vmap(lambda one: method(params, one))(x))
        maps = [maps_of(train((inputs, y), key_train), x) for y in (labels, labels[order])]
        varies = np.ptp(np.asarray(inputs), 0) > 0
        return _compare(["labels"], maps, varies if varies.shape == maps[0].shape[1:] else None)

    return both


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Return Spearman's rank correlation of two arrays of one size: 1 is the same order, -1 the reverse.

    NaN if one of them is constant.

    >>> round(rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 400.0]), 6)
    1.0
    """
    # Slow to import.
    from scipy.stats import rankdata

    # Equal values share their mean rank.
    ranks = [rankdata(np.asarray(values).reshape(-1)) for values in (a, b)]
    ranks = [r - r.mean() for r in ranks]
    norms = [float(np.linalg.norm(r)) for r in ranks]
    return float(ranks[0] @ ranks[1]) / (norms[0] * norms[1]) if min(norms) > 0 else float("nan")


def _compare(names: Sequence[str], maps: Sequence[ArrayLike], where: np.ndarray | None = None) -> Randomized:
    """Compare the maps of each example with the first ones, everywhere or only where `where` is True."""
    arrays = [np.asarray(m) for m in maps]
    first, *others = arrays if where is None else [m[:, where] for m in arrays]

    def similarity(change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        pairs = [zip(change(first), change(other), strict=True) for other in others]
        return np.array([np.mean([rank_correlation(a, b) for a, b in zipped]) for zipped in pairs])

    return Randomized(tuple(names), similarity(np.asarray), similarity(np.abs), np.stack(arrays))


def _by_use(names: Sequence[str], program: Program) -> list[list[str]]:
    """Return the parameters layer by layer, in reverse order of their first use in the program."""
    first: dict[str, tuple[int, ...]] = {}
    for use in parameter_uses(program):
        for name in (program.names[leaf] for leaf in use.leaves):
            first[name] = min(first.get(name, use.path), use.path)
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: first.get(name, ())):
        folder, _, last = name.rpartition("/")
        groups.setdefault(folder or last.lstrip(ascii_letters + "_") or last, []).append(name)
    return [sorted(group) for group in groups.values()][::-1]


def _named(names: Sequence[str], layers: Sequence[str | Sequence[str]]) -> list[list[str]]:
    groups, left = [], list(names)
    for layer in layers:
        patterns = [layer] if isinstance(layer, str) else layer
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in names):
                raise ValueError(
                    f"randomize_weights: expected names of parameters ({', '.join(names):.500}), got {pattern!r}"
                )
        group = [name for name in left if any(fnmatch(name, pattern) for pattern in patterns)]
        left = [name for name in left if name not in group]
        groups.append(group)
    if left:
        raise ValueError(f"randomize_weights: layers must name every parameter; missing: {', '.join(left)}")
    return groups
