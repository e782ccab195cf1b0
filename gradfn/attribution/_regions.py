"""`gf.attribution.regions`: what a region of the input is worth to each node, and what is answered from it alone."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradfn.attribution._score import PART, floating
from gradfn.core.params import path_name


class Regions(NamedTuple):
    """What `gf.attribution.regions` returns; the regions are in the order of the masks.

    Attributes:
        sums: `[regions, nodes]`, the weighted sum W x of each node of the first layer, over the region alone.
        total: `[nodes]`, the weighted sum over all inputs: of regions that do not overlap and leave nothing
            out, the sum of `sums`.
        answers: `[regions, ...]`, what the function answers when the weights outside the region are zero.
        without: `[regions, ...]`, what it answers when those inside it are.
        answer: what it answers with all its weights.
    """

    sums: jax.Array
    total: jax.Array
    answers: Any
    without: Any
    answer: Any


def grid_regions(shape: Sequence[int], rows: int, columns: int | None = None) -> np.ndarray:
    """Return masks that cut an image into a grid of regions, row after row.

    Args:
        shape: height and width of the image, in pixels.
        rows: of the grid.
        columns: of the grid; as many as rows where None.

    Returns:
        bool `[rows * columns, height, width]`; each pixel is in one region. Where the image cannot be cut
        evenly, regions differ by a pixel.

    Raises:
        ValueError: less than one row or column, or more than pixels.

    >>> from gradfn.attribution._regions import grid_regions
    >>> masks = grid_regions((28, 28), 4)
    >>> masks.shape, int(masks[0].sum())
    ((16, 28, 28), 49)
    """
    height, width = shape
    columns = rows if columns is None else columns
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise ValueError(
            f"grid_regions: a grid of {rows} x {columns} regions on an image of {height} x {width} pixels"
        )
    row, column = np.arange(height) * rows // height, np.arange(width) * columns // width
    number = row[:, None] * columns + column[None]  # [height, width]
    return number == np.arange(rows * columns)[:, None, None]


def regions(f: Callable, masks: Any, weights: str = "W1") -> Callable[..., Regions]:
    """Make the weighted sums over regions of the input, and the answers that rest on one region.

    A node's weighted sum is a sum over all inputs, so it is a sum over regions. With the weights outside a
    region set to zero the node looks at the region alone; the higher its sum there, the more of its pattern
    is in the region. Biases stay as they are. As the first layer is linear in the input, this is the same as
    setting the input to zero there, which for ink on paper is to cover it with paper.

    Args:
        f: `(params, x) -> anything`, of one example, such as `net.apply`.
        masks: bool, a region each: `[regions, ...]` with as many elements each as x has; they may overlap.
            `gf.attribution.grid_regions` makes some.
        weights: the path in `params` of the matrix `[nodes, inputs]` that meets x, such as `hidden/W`.

    Returns:
        `(params, x) -> Regions`.

    Raises:
        ValueError: an unknown path (those of fitting shape are listed), masks that do not fit the input, or
            a matrix that does not.

    Example:
        >>> import jax.numpy as jnp, gradfn as gf
        >>> net = gf.mlp([4, 1])
        >>> params = {"W1": jnp.array([[1.0, 2.0, 3.0, 4.0]]), "b1": jnp.array([0.5])}
        >>> seen = gf.attribution.regions(net.apply, [[True, True, False, False], [False, False, True, True]])(
        ...     params, jnp.ones(4))
        >>> seen.sums[:, 0], seen.total, seen.answers[:, 0]
        (Array([3., 7.], dtype=float32), Array([10.], dtype=float32), Array([3.5, 7.5], dtype=float32))
    """
    masks = np.asarray(masks)
    if masks.dtype != bool or masks.ndim < 2:
        raise ValueError(f"regions: masks are bool and [regions, ...], came {masks.dtype}{list(masks.shape)}")
    masks = masks.reshape(len(masks), -1)  # [regions, inputs]

    @functools.wraps(f)
    def looked(params: Any, x: Any) -> Regions:
        x = floating(x, "regions")
        W = _matrix(params, weights, x.size)
        if masks.shape[1] != x.size:
            raise ValueError(f"regions: masks of {masks.shape[1]} inputs each, but x has {x.size}")

        def answer(mask: jax.Array) -> Any:
            return f(_with(params, weights, jnp.where(mask[None], W, jnp.zeros_like(W))), x)

        inside, size = jnp.asarray(masks), min(len(masks), PART)
        return Regions(
            sums=jnp.where(inside, x.reshape(1, -1).astype(W.dtype), 0)
            @ W.T,  # [regions, inputs] [inputs, nodes]
            total=W @ x.reshape(-1).astype(W.dtype),
            answers=jax.lax.map(answer, inside, batch_size=size),
            without=jax.lax.map(answer, ~inside, batch_size=size),
            answer=f(params, x),
        )

    return looked


def _matrix(params: Any, name: str, n_inputs: int) -> jax.Array:
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    fitting = [n for n, leaf in leaves.items() if leaf.ndim == 2 and leaf.shape[1] == n_inputs]
    if name not in fitting:
        came = f"is {list(leaves[name].shape)}" if name in leaves else "is not there"
        listed = ", ".join(fitting) or "no other fits"
        raise ValueError(
            f"regions: weights {name!r}: expected [nodes, {n_inputs}], and it {came}. See: {listed}"
        )
    return jnp.asarray(leaves[name])


def _with(params: Any, name: str, value: jax.Array) -> Any:
    replace = lambda path, leaf: value if path_name(path) == name else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(replace, params)
