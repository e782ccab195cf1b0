"""Does a map show what the network learned? The two randomisation tests of Adebayo et al., 2018.

A method that explains a trained network must give another map once its weights, or the labels that it learned
from, are random. An edge detector does not: its map looks like the digit, which looks convincing, and says
nothing of the network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from string import ascii_letters
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.inspection.leaves import floating_leaves
from gradfn.inspection.scalar import jit_arrays
from gradfn.jaxpr import Program, parameter_uses, trace

ALIKE = 0.5  # maps whose ranks correlate more than this show much the same

Method = Callable[[Any, Any], jax.Array]  # (params, x) -> map, of one example


@dataclass(frozen=True, eq=False, repr=False)
class Randomized(ShowsTable):
    """How alike maps stay while what the network learned is taken away; `print` shows it as a table.

    Attributes:
        names: what is random, a row each; the rows before are random with it.
        rank: `[rows]`, Spearman's rank correlation of the maps with those of the trained network, the mean
            over the examples: 1 is the same order of pixels, 0 another altogether.
        rank_abs: `[rows]`, the same of the maps' magnitudes.
        maps: `[rows + 1, examples, ...]`, the maps; those of the trained network are first.
    """

    names: tuple[str, ...]
    rank: np.ndarray
    rank_abs: np.ndarray
    maps: np.ndarray

    @property
    def passed(self) -> bool:
        """Whether the maps rest on what was learned: at the end, neither correlation is 0.5 or more in magnitude.

        0.5 is a line drawn between maps that show the same and maps that do not: saliency of two networks that
        learned digits from other first weights correlates by 0.8, after shuffled labels by 0.0. Where it is close,
        look at the maps.
        """
        return bool(abs(self.rank[-1]) < ALIKE and abs(self.rank_abs[-1]) < ALIKE)

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return the correlations as a table, the last of them first to be kept; None for all rows."""
        verdict = "passed: the maps rest on what was learned"
        if not self.passed:
            verdict = "FAILED: without what was learned the maps are much the same"
        out = TextTable(caption=verdict)
        out.add_column("random", shorten=True)
        for header in ("rank correlation", "of magnitudes"):
            out.add_column(header, ".3f")
        for i, (name, signed, size) in enumerate(zip(self.names, self.rank, self.rank_abs, strict=True)):
            out.add_row(name, signed, size, weight=i)
        return out.folded(rows, "result.table(rows=None)")


def randomize_weights(
    method: Method, init: Callable[[jax.Array], Any], layers: Sequence[str | Sequence[str]] | None = None
) -> Callable[..., Randomized]:
    """Run a method on a network whose layers become random one after the other, from the top down.

    The cascading randomisation of Adebayo et al., *Sanity Checks for Saliency Maps*, 2018.

    Args:
        method: `(params, x) -> map` of one example, such as `gf.attribution.saliency(net.apply, target=3)`.
        init: `key -> params`, random ones, such as `net.init`.
        layers: names or globs of parameters (`"W2"`, `"conv1/*"`), or lists of those for what goes together, in
            the order in which they become random. Where None, one layer after the other from the last that
            the network uses to the first: a layer is a dict's parameters (`conv1/W`, `conv1/b`), or those of
            one number (`W1`, `b1`).

    Returns:
        `(params, x, key) -> Randomized`; x has a leading axis of examples.

    Raises:
        ValueError: a layer that is no parameter, `layers` that leave some out, `init` of another tree.

    Example:
        >>> import jax, gradfn as gf
        >>> net = gf.mlp([8, 6, 3])
        >>> params, x = net.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), [4, 8])
        >>> seen = gf.attribution.randomize_weights(lambda params, x: x**2, net.init)(params, x, jax.random.key(2))
        >>> print(seen)
          random     rank correlation   of magnitudes
         ─────────────────────────────────────────────
          W2, b2                1.000           1.000
          + W1, b1              1.000           1.000
        FAILED: without what was learned the maps are much the same
    """

    def cascade(params: Any, x: Any, key: jax.Array) -> Randomized:
        leaves, fresh = (floating_leaves(tree, "randomize_weights") for tree in (params, init(key)))
        if list(map(jnp.shape, fresh.values)) != list(map(jnp.shape, leaves.values)):
            raise ValueError("randomize_weights: init gives parameters of another shape than those to test")
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


def randomize_labels(method: Method, train: Callable[[Any, jax.Array], Any]) -> Callable[..., Randomized]:
    """Run a method on a network that learned from shuffled labels, and on one that learned from the true ones.

    The data randomisation test of Adebayo et al., 2018. What there is to see in the images is the same for
    both networks, but one can only know it by heart.

    Inputs that are the same in all examples (the rim of MNIST's images) teach nothing under any labels; where a
    map has the shape of the input they are left out of the comparison. They would make any two networks' maps of
    such data alike, by their magnitudes.

    Args:
        method: `(params, x) -> map` of one example.
        train: `((inputs, labels), key) -> params`; long enough to fit the shuffled labels, too, and from the
            same first weights for the same key.

    Returns:
        `((inputs, labels), x, key) -> Randomized` with one row; x has a leading axis of examples.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> def train(data, key):
        ...     inputs, labels = data
        ...     return jnp.linalg.lstsq(inputs, labels)[0]
        >>> inputs = jax.random.normal(jax.random.key(0), [50, 20])
        >>> data = inputs, inputs @ jnp.arange(20.0)
        >>> saliency = gf.attribution.saliency(lambda w, x: w @ x)
        >>> seen = gf.attribution.randomize_labels(saliency, train)(data, inputs[:3], jax.random.key(1))
        >>> seen.passed
        True
    """

    def both(data: Any, x: Any, key: jax.Array) -> Randomized:
        inputs, labels = data
        key_train, key_order = jax.random.split(key)
        order = np.asarray(jax.random.permutation(key_order, len(labels)))
        maps_of = jit_arrays(lambda params, x: jax.vmap(lambda one: method(params, one))(x))
        maps = [maps_of(train((inputs, y), key_train), x) for y in (labels, labels[order])]
        varies = np.ptp(np.asarray(inputs), 0) > 0
        return _compare(["labels"], maps, varies if varies.shape == maps[0].shape[1:] else None)

    return both


def rank_correlation(a: Any, b: Any) -> float:
    """Return Spearman's rank correlation of two arrays of one size: 1 is the same order, -1 the reverse.

    Nan where one of them is constant.

    >>> round(rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 400.0]), 6)
    1.0
    """
    from scipy.stats import rankdata  # slow to import

    ranks = [
        rankdata(np.asarray(values).reshape(-1)) for values in (a, b)
    ]  # equal values share their mean rank
    ranks = [r - r.mean() for r in ranks]
    norms = [float(np.linalg.norm(r)) for r in ranks]
    return float(ranks[0] @ ranks[1]) / (norms[0] * norms[1]) if min(norms) > 0 else float("nan")


def _compare(names: Sequence[str], maps: Sequence[Any], where: np.ndarray | None = None) -> Randomized:
    """Compare the maps of each example with the first ones, everywhere or only where `where` is True."""
    maps = [np.asarray(m) for m in maps]
    first, *others = maps if where is None else [m[:, where] for m in maps]

    def alike(change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        pairs = [zip(change(first), change(other), strict=True) for other in others]
        return np.array([np.mean([rank_correlation(a, b) for a, b in zipped]) for zipped in pairs])

    return Randomized(tuple(names), alike(np.asarray), alike(np.abs), np.stack(maps))


def _by_use(names: Sequence[str], program: Program) -> list[list[str]]:
    """Return the parameters layer by layer, the layer that the program uses last first."""
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
                    f"randomize_weights: no parameter {pattern!r}; there are {', '.join(names):.500}"
                )
        group = [name for name in left if any(fnmatch(name, pattern) for pattern in patterns)]
        left = [name for name in left if name not in group]
        groups.append(group)
    if left:
        raise ValueError(f"randomize_weights: layers leave out {', '.join(left)}: name them, too")
    return groups
