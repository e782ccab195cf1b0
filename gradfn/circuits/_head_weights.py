"""What the weights of attention heads say without an input: composition scores, and singular values of OV and QK."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gradfn.core.params import Params, named_leaves
from gradfn.display import ROWS, ShowsTable, TextTable


class HeadWeights(NamedTuple):
    """The matrices of all heads, in the notation of Elhage et al. (2021): a head reads `x`, `[width]`.

    Attributes:
        query: `[layer, head, size, width]`.
        key: `[layer, head, size, width]`.
        value: `[layer, head, size, width]`.
        out: `[layer, head, width, size]`.
    """

    query: Float[Array, "layer head size width"]
    key: Float[Array, "layer head size width"]
    value: Float[Array, "layer head size width"]
    out: Float[Array, "layer head width size"]


def head_weights(params: Params, n_heads: int) -> HeadWeights:
    """Return the matrices of each attention head of a net of gradfn.

    Of other models, make a `HeadWeights` of the arrays.

    Args:
        params: of `gf.gpt`, `gf.vit`, or any net whose blocks have an `attention` with `query`, `key`, `value` and
            `out`, with blocks unrolled or stacked. If a block has an `attention_norm`, its gain is multiplied
            into the matrices that read its output. Biases, and the rotations of RoPE, are left out.
        n_heads: query heads; heads of keys and values that several share are repeated.

    Returns:
        One array per matrix, of all layers and heads.

    Raises:
        ValueError: no attention is in the parameters, layers differ in shape, `n_heads` does not fit, or a norm is
            between the matrices (of queries and keys, or of the output of attention).

    Example:
        >>> import jax, gradfn as gf
        >>> net = gf.gpt(gf.GPTConfig(vocab=9, context=8, n_layers=3, n_heads=2, width=8))
        >>> gf.circuits.head_weights(net.init(jax.random.key(0)), n_heads=2).out.shape
        (3, 2, 8, 4)
    """
    blocks = _blocks_with_attention(params)
    if not blocks:
        names = ", ".join(name for name, _ in named_leaves(params)[:6])
        raise ValueError(
            f"head_weights: expected blocks with attention/query, key, value and out, got {names}, .... Make a "
            "gf.circuits.HeadWeights of your arrays."
        )
    layers = [layer for block in blocks for layer in _of_block(block, n_heads)]
    shapes = {tuple(matrix.shape for matrix in layer) for layer in layers}
    if len(shapes) > 1:
        raise ValueError(f"head_weights: layers differ in shape: {sorted(shapes)}")
    return HeadWeights(*(jnp.concatenate(matrices) for matrices in zip(*layers, strict=True)))


def _blocks_with_attention(params: PyTree) -> list[Mapping]:
    if not isinstance(params, Mapping):
        return []
    if {"query", "key", "value", "out"} <= set(params.get("attention", ())):
        return [params]
    numbered = sorted(
        params, key=lambda name: (not str(name).isdigit(), int(name) if str(name).isdigit() else 0)
    )
    return [block for name in numbered for block in _blocks_with_attention(params[name])]


def _of_block(block: Mapping, n_heads: int) -> list[HeadWeights]:
    """Return the matrices of a block with leading axes `[layer, head]`; stacked blocks are several layers."""
    attention = block["attention"]
    for name in ("query_norm", "key_norm"):
        if name in attention:
            raise ValueError(
                f"head_weights: attention/{name} normalizes what a head compares, so that no matrix does. Make a "
                "gf.circuits.HeadWeights of your arrays."
            )
    if "attention_out_norm" in block:
        raise ValueError(
            "head_weights: attention_out_norm normalizes what the heads write together, so that no matrix of one head "
            "says what it writes. Make a gf.circuits.HeadWeights of your arrays."
        )
    norm = block.get("attention_norm", {})
    gain = 1 + norm["gain_offset"] if "gain_offset" in norm else norm.get("gain")
    out = attention["out"]["W"]  # [width, heads * size], or [layer, width, heads * size]
    size = out.shape[-1] // n_heads
    if out.shape[-1] % n_heads:
        raise ValueError(f"head_weights: n_heads must divide {out.shape[-1]}, got {n_heads}")

    def reading(name: str) -> jax.Array:
        W = attention[name]["W"]
        if W.shape[-2] % size or n_heads % (W.shape[-2] // size):
            raise ValueError(
                f"head_weights: attention/{name}/W {list(W.shape)} does not consist of heads of size {size}, as "
                f"{n_heads} heads of attention/out/W {list(out.shape)} have"
            )
        if gain is not None:
            W = W * gain[..., None, :]
        # [..., kv_heads * size, width] -> [layer, kv_heads, size, width]
        W = W.reshape(-1, W.shape[-2] // size, size, W.shape[-1])
        return jnp.repeat(W, n_heads // W.shape[1], axis=1)

    # [..., width, heads * size] -> [layer, width, heads, size] -> [layer, heads, width, size]
    writing = out.reshape(-1, out.shape[-2], n_heads, size).swapaxes(1, 2)
    return [HeadWeights(reading("query"), reading("key"), reading("value"), writing)]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["query", "key", "value"], meta_fields=[])
@dataclass(frozen=True, repr=False)
class Composition(ShowsTable):
    """How much of what each head writes each later head reads; a pytree of arrays `[layer, head, layer, head]`.

    The first two axes are the head that writes, the last two the one that reads; 0 unless that is in a later layer.

    Attributes:
        query: as its query.
        key: as its key.
        value: as its value.
    """

    query: Float[Array, "layer head layer head"]
    key: Float[Array, "layer head layer head"]
    value: Float[Array, "layer head layer head"]

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per pair of heads; of many, those with the largest scores."""
        n_layers, n_heads = self.query.shape[:2]
        out = TextTable(caption="how much of what the first head writes the second one reads")
        for header in ("writes", "reads", "as query", "as key", "as value"):
            out.add_column(header)
        for i in range(n_layers):
            for h in range(n_heads):
                for j in range(i + 1, n_layers):
                    for k in range(n_heads):
                        scores = [float(s[i, h, j, k]) for s in (self.query, self.key, self.value)]
                        out.add_row(f"{i}.{h}", f"{j}.{k}", *scores, weight=max(scores))
        return out.folded(rows, "composition.table(rows=None)")


def composition(weights: HeadWeights) -> Composition:
    """Return the composition scores of all pairs of heads.

    For a head that writes with `OV = out value`, and one that reads with `QK = query^T key`, the score of query
    composition is `|QK^T OV| / (|QK| |OV|)` in Frobenius norms, of key composition `|QK OV| / (|QK| |OV|)`, and of
    value composition `|OV' OV| / (|OV'| |OV|)`. Random matrices have about `1 / sqrt(width)`, so compare with that.
    Elhage et al., *A Mathematical Framework for Transformer Circuits*, 2021.

    Args:
        weights: of all heads: `gf.circuits.head_weights`.

    Returns:
        `Composition`, scores in [0, 1].

    Example:
        >>> import jax, gradfn as gf
        >>> net = gf.gpt(gf.GPTConfig(vocab=9, context=8, n_layers=2, n_heads=2, width=8))
        >>> scores = gf.circuits.composition(gf.circuits.head_weights(net.init(jax.random.key(0)), n_heads=2))
        >>> scores.key.shape
        (2, 2, 2, 2)
    """
    of_query, of_key, of_value, of_out = _factors(weights)
    writes = _norms(of_out @ of_value.mT)

    def scores(reads: jax.Array, left: jax.Array, size: jax.Array) -> jax.Array:
        # What is written, [width, size], as it is read: [layer, head, layer', head', size', size].
        read = jnp.einsum("jktw,ihws->ihjkts", reads, weights.out)
        product = left[None, None] @ read @ of_value.mT[:, :, None, None]
        later = jnp.tri(len(size), k=-1, dtype=bool).T[:, None, :, None]  # [layer, 1, layer', 1]
        return jnp.where(later, _norms(product) / (writes[:, :, None, None] * size[None, None]), 0)

    matches = _norms(of_query @ of_key.mT)
    return Composition(
        query=scores(weights.query, of_key, matches),
        key=scores(weights.key, of_query, matches),
        value=scores(weights.value, of_out, writes),
    )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ov", "qk"], meta_fields=[])
@dataclass(frozen=True, repr=False)
class SingularValues(ShowsTable):
    """The singular values of the circuits of each head, from the largest; a pytree of arrays.

    Attributes:
        ov: `[layer, head, size]`, of `out value`: what the head writes for what it attends to.
        qk: `[layer, head, size]`, of `query^T key`: to what it attends.
    """

    ov: Float[Array, "layer head size"]
    qk: Float[Array, "layer head size"]

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per head; of many heads, those with the largest values."""
        out = TextTable(
            caption="rank: (sum of squares)^2 / sum of fourth powers, the number of directions that count"
        )
        for header in ("head", "largest of OV", "rank of OV", "largest of QK", "rank of QK"):
            out.add_column(header)
        for i in range(self.ov.shape[0]):
            for h in range(self.ov.shape[1]):
                cells = [
                    x for values in (self.ov[i, h], self.qk[i, h]) for x in (float(values[0]), _rank(values))
                ]
                out.add_row(f"{i}.{h}", *cells, weight=max(cells[0], cells[2]))
        return out.folded(rows, "values.table(rows=None)")


def singular_values(weights: HeadWeights) -> SingularValues:
    """Return the singular values of each head's OV and QK circuits.

    Elhage et al., *A Mathematical Framework for Transformer Circuits*, 2021. The matrices `[width, width]` are never
    formed: they have the singular values of products of triangular factors `[size, size]`.

    Args:
        weights: of all heads: `gf.circuits.head_weights`.

    Example:
        >>> import jax, gradfn as gf
        >>> net = gf.gpt(gf.GPTConfig(vocab=9, context=8, n_layers=2, n_heads=2, width=8))
        >>> gf.circuits.singular_values(gf.circuits.head_weights(net.init(jax.random.key(0)), n_heads=2)).ov.shape
        (2, 2, 4)
    """
    of_query, of_key, of_value, of_out = _factors(weights)
    return SingularValues(
        ov=jnp.linalg.svd(of_out @ of_value.mT, compute_uv=False),
        qk=jnp.linalg.svd(of_query @ of_key.mT, compute_uv=False),
    )


def _factors(weights: HeadWeights) -> tuple[jax.Array, ...]:
    """Return R of `M = Q R`, for M the transposes of the matrices that read, and the one that writes.

    `A^T B` and `R_A R_B^T` have the same singular values, because each Q has orthonormal columns.
    """
    tall = (weights.query.mT, weights.key.mT, weights.value.mT, weights.out)  # [layer, head, width, size]
    return tuple(jnp.linalg.qr(matrix, mode="r") for matrix in tall)


def _norms(matrices: jax.Array) -> jax.Array:
    return jnp.linalg.norm(matrices, axis=(-2, -1))


def _rank(values: jax.Array) -> float:
    squares = jnp.square(values / values[0])
    return float(jnp.square(squares.sum()) / jnp.square(squares).sum())
