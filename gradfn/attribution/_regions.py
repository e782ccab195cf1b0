"""`gf.attribution.regions`: what a region of the input contributes to each node, and the output from it alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from gradfn.attribution._score import PART, floating
from gradfn.core.params import path_name
from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable, array_table


class _Regions(NamedTuple):
    sums: Float[Array, "regions nodes"]
    total: Float[Array, " nodes"]
    outputs: PyTree
    without: PyTree
    output: PyTree


class Regions(ShowsTable, _Regions):
    """The result of `gf.attribution.regions`, in the order of the masks. `print` shows a table.

    Attributes:
        sums: `[regions, nodes]`, the weighted sum W x of each node of the first layer, over one region alone.
        total: `[nodes]`, the weighted sum over all inputs. If the regions partition the input, it is the sum of
            `sums`.
        outputs: `[regions, ...]`, the output with the weights outside the region set to zero.
        without: `[regions, ...]`, the output with the weights inside the region set to zero.
        output: the output with all weights.
    """

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per array: its shape and range."""
        count, nodes = self.sums.shape[-2:]
        return array_table(f"{count} regions, {nodes} nodes", self).folded(rows, "result.table(rows=None)")


def grid_regions(
    shape: Sequence[int], rows: int, columns: int | None = None
) -> Bool[np.ndarray, "regions height width"]:
    """Return masks that divide an image into a grid of regions, row after row.

    Args:
        shape: height and width of the image, in pixels.
        rows: of the grid.
        columns: of the grid; equal to `rows` if None.

    Returns:
        bool `[rows * columns, height, width]`; each pixel is in one region. If the image does not divide evenly,
        the sides of regions differ by one pixel.

    Raises:
        ValueError: fewer than one row or column, or more than pixels.

    >>> import gradfn as gf
    >>> masks = gf.attribution.grid_regions((28, 28), 4)
    >>> masks.shape, int(masks[0].sum())
    ((16, 28, 28), 49)
    """
    height, width = shape
    columns = rows if columns is None else columns
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise ValueError(
            f"grid_regions: expected 1 to {height} rows and 1 to {width} columns for an image of {height} x {width} "
            f"pixels, got {rows} and {columns}"
        )
    row, column = np.arange(height) * rows // height, np.arange(width) * columns // width
    index = row[:, None] * columns + column[None]  # [height, width]
    return index == np.arange(rows * columns)[:, None, None]


def regions(f: Callable, masks: ArrayLike, weights: str = "W1") -> Callable[..., Regions]:
    """Return a function that computes the weighted sums over regions of the input, and the output from each alone.

    The weighted sum of a node is a sum over all inputs, so it is a sum over regions. With the weights outside a
    region set to zero, the node sees that region alone: the higher its sum there, the more of its pattern is in
    the region. Biases stay as they are. As the first layer is linear in the input, this is the same as setting the
    input outside the region to zero, the background value of the digits.

    Args:
        f: `(params, x) -> output`, of one example, such as `net.apply`.
        masks: bool `[regions, ...]`, one mask of the size of x per region; they may overlap.
            `gf.attribution.grid_regions` makes a grid.
        weights: the path in `params` of the matrix `[nodes, inputs]` that x is multiplied by, such as `hidden/W`.

    Returns:
        `(params, x) -> Regions`.

    Raises:
        ValueError: an unknown path (those of suitable shape are listed), or masks or a matrix that do not fit the
            input.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> net = gf.mlp([4, 1])
    >>> params = {"W1": jnp.array([[1.0, 2.0, 3.0, 4.0]]), "b1": jnp.array([0.5])}
    >>> halves = jnp.array([[True, True, False, False], [False, False, True, True]])
    >>> result = gf.attribution.regions(net.apply, halves)(params, jnp.ones(4))
    >>> result.sums[:, 0], result.total, result.outputs[:, 0]
    (Array([3., 7.], dtype=float32), Array([10.], dtype=float32), Array([3.5, 7.5], dtype=float32))
    """
    masks = np.asarray(masks)
    if masks.dtype != bool or masks.ndim < 2:
        raise ValueError(f"regions: expected masks bool[regions, ...], got {masks.dtype}{list(masks.shape)}")
    masks = masks.reshape(len(masks), -1)  # [regions, inputs]

    @transform_of(f, "regions", own=2)
    def by_region(params: PyTree, x: ArrayLike, /) -> Regions:
        """Return the weighted sums over each region of `x`, and the outputs from it and without it."""
        x = floating(x, "regions")
        W = _matrix(params, weights, x.size)
        if masks.shape[1] != x.size:
            raise ValueError(f"regions: expected masks of the size of x, {x.size}, got {masks.shape[1]}")

        def output(mask: jax.Array) -> PyTree:
            return f(_with(params, weights, jnp.where(mask[None], W, jnp.zeros_like(W))), x)

        inside, size = jnp.asarray(masks), min(len(masks), PART)
        flat = x.reshape(-1).astype(W.dtype)  # [inputs]
        return Regions(
            sums=jnp.where(inside, flat, 0) @ W.T,  # [regions, inputs] [inputs, nodes]
            total=W @ flat,
            outputs=jax.lax.map(output, inside, batch_size=size),
            without=jax.lax.map(output, ~inside, batch_size=size),
            output=f(params, x),
        )

    return by_region


def _matrix(params: PyTree, name: str, n_inputs: int) -> jax.Array:
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    fitting = [n for n, leaf in leaves.items() if leaf.ndim == 2 and leaf.shape[1] == n_inputs]
    if name not in fitting:
        actual = list(leaves[name].shape) if name in leaves else "no such parameter"
        hint = f"Parameters of that shape: {', '.join(fitting)}" if fitting else "No parameter has that shape"
        raise ValueError(
            f"regions: weights {name!r}: expected shape [nodes, {n_inputs}], got {actual}. {hint}"
        )
    return jnp.asarray(leaves[name])


def _with(params: PyTree, name: str, value: jax.Array) -> PyTree:
    replace = lambda path, leaf: value if path_name(path) == name else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(replace, params)
