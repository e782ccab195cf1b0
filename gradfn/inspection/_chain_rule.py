"""The chain rule written out by hand for a network of sigmoid layers: the four equations of backpropagation.

Nielsen, *Neural Networks and Deep Learning* (2015), chapter 2; in his notation, a^l = σ(z^l) and
z^l = W^l a^(l-1) + b^l for l = 1, ..., L:

    BP1   δ^L = ∂C/∂a^L ⊙ σ'(z^L)                the error of the last layer
    BP2   δ^l = ((W^(l+1))^T δ^(l+1)) ⊙ σ'(z^l)  the error goes one layer back
    BP3   ∂C/∂b^l = δ^l                          a bias's gradient is its node's error
    BP4   ∂C/∂W^l = δ^l (a^(l-1))^T              a weight's: the error after it times the activation before it
"""

# ruff: noqa: E741 (l counts the layers, as in the book)

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gradfn.core.names import ParameterError
from gradfn.core.precision import norm
from gradfn.display import ROWS, ShowsTable, TextTable


class _ChainRule(NamedTuple):
    value: Float[Array, ""]
    z: dict[int, jax.Array]
    a: dict[int, jax.Array]
    deltas: dict[int, jax.Array]
    grads: dict[str, jax.Array]


class ChainRule(ShowsTable, _ChainRule):
    """The result of the chain rule for one example. `print` shows a table; layers count from 1, as in `W1`.

    Attributes:
        value: the cost C.
        z: weighted sums, `z[l]` is `[n_l]`.
        a: activations, `a[l]` is `[n_l]`; `a[0]` is the input.
        deltas: errors ∂C/∂z, `deltas[l]` is `[n_l]`.
        grads: gradients in the tree of the parameters: `W1`, `b1`, ...
    """

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per layer: the norms of its values, errors and gradients."""
        out = TextTable(f"C = {float(self.value.mean()):.6g}", "Norms, layer by layer.")
        out.add_column("layer")
        for header in ("z", "a", "δ", "∂C/∂W", "∂C/∂b"):
            out.add_column(header)
        for l in sorted(self.deltas):
            arrays = (self.z[l], self.a[l], self.deltas[l], self.grads[f"W{l}"], self.grads[f"b{l}"])
            out.add_row(l, *[float(norm(array)) for array in arrays])
        return out.folded(rows, "result.table(rows=None)")


def chain_rule(cost: Literal["cross_entropy", "quadratic"] = "cross_entropy") -> Callable[..., ChainRule]:
    """Return a function that computes the gradients of a sigmoid network by the chain rule, written out by hand.

    It does not use automatic differentiation: `jax.grad` and `gf.backprop` are checked against it, and it is the
    code to read to see what they do. Use `jax.vmap` for a batch.

    Args:
        cost: `cross_entropy`: the last layer is a softmax and C = -Σ y log a, as in
            `gf.classification_loss(gf.mlp(sizes))`; or `quadratic`: the last layer is a sigmoid and
            C = ½ Σ (a - y)², as in `gf.quadratic_loss(gf.mlp(sizes, output="sigmoid"))`.

    Returns:
        `(params, x, y) -> ChainRule`, for one example. `params` are `W1` `[n1, n0]`, `b1` `[n1]`, `W2` `[n2, n1]`,
        ..., as in `gf.mlp(sizes)`; `x` is the input, `[n0]` or a column `[n0, 1]`; `y` is an integer label, or a
        vector of targets `[n_L]`.

    Raises:
        ValueError: an unknown cost.
        ParameterError: parameters other than `W1, b1, ..., WL, bL`.
        TypeError: complex parameters or inputs; the equations are those of real numbers.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.mlp([784, 16, 10])
    >>> params, image = net.init(jax.random.key(0)), jax.random.uniform(jax.random.key(1), [784])
    >>> by_hand = gf.chain_rule()(params, image, 3).grads
    >>> by_jax = jax.grad(gf.classification_loss(net))(params, (image, 3))
    >>> jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-4, atol=1e-6), by_hand, by_jax))
    True
    """
    if cost not in ("cross_entropy", "quadratic"):
        raise ValueError(f"chain_rule: cost must be 'cross_entropy' or 'quadratic', got {cost!r}")

    def chain_rule(params: Mapping[str, jax.Array], x: jax.Array, y: ArrayLike) -> ChainRule:
        """Return the gradients of the network for the input `x` and the label or targets `y`."""
        L = _layers(params)
        for name, array in (*params.items(), ("x", x)):
            if jnp.iscomplexobj(array):
                raise TypeError(f"chain_rule: expected real numbers, got {jnp.result_type(array)} for {name}")
        return _gradients(params, x, jnp.asarray(y), L, cost)

    return chain_rule


def _gradients(params: Mapping[str, jax.Array], x: jax.Array, y: jax.Array, L: int, cost: str) -> ChainRule:
    W = {l: params[f"W{l}"] for l in range(1, L + 1)}
    b = {l: params[f"b{l}"] for l in range(1, L + 1)}

    # Forward: weighted sums and activations, layer by layer.
    a = {0: jnp.reshape(x, -1)}  # [n, 1] -> [n]
    z = {}
    for l in range(1, L + 1):
        z[l] = W[l] @ a[l - 1] + b[l]
        a[l] = _sigmoid(z[l])
    target = y.reshape(-1).astype(z[L].dtype)
    if jnp.issubdtype(y.dtype, jnp.integer) and y.ndim == 0:
        target = (jnp.arange(z[L].size) == y).astype(z[L].dtype)  # the vector with a 1 at the label

    # BP1: the error of the last layer.
    if cost == "cross_entropy":
        log_a = z[L] - jax.nn.logsumexp(z[L])
        a[L] = jnp.exp(log_a)
        value = -jnp.sum(target * log_a)
        delta = {L: a[L] * jnp.sum(target) - target}  # softmax and cross-entropy together leave a - y
    else:
        value = 0.5 * jnp.sum((a[L] - target) ** 2)
        delta = {L: (a[L] - target) * _slope(a[L])}
    # BP2: the error goes back, layer by layer.
    for l in range(L - 1, 0, -1):
        delta[l] = (W[l + 1].T @ delta[l + 1]) * _slope(a[l])
    grads = {}
    for l in range(1, L + 1):
        grads[f"b{l}"] = delta[l]  # BP3
        grads[f"W{l}"] = jnp.outer(delta[l], a[l - 1])  # BP4: [n_l, n_(l-1)]
    return ChainRule(value, z, a, delta, grads)


def _sigmoid(z: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp(-z))


def _slope(a: jax.Array) -> jax.Array:
    """Return σ'(z), given a = σ(z)."""
    return a * (1 - a)


def _layers(params: Mapping[str, jax.Array]) -> int:
    L = len(params) // 2
    expected = {f"{kind}{l}" for kind in "Wb" for l in range(1, L + 1)}
    if L == 0 or set(params) != expected:
        raise ParameterError(
            "parameters",
            f"expected W1, b1, W2, b2, ... and nothing else, got {', '.join(map(str, params)):.200}",
        )
    return L
