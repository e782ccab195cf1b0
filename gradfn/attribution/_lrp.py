"""Layer-wise relevance propagation, by modified gradients of any traced function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from gradfn.attribution._lrp_rules import CAUSES, Layers, Rules, fuse_biases, rules_of
from gradfn.attribution._modified import explained
from gradfn.attribution._score import Target, score
from gradfn.core.precision import wide, widen
from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable, array_table, extremes
from gradfn.jaxpr.call import jit_arrays

_RULES = ("epsilon", "gamma", "z+")


class Absorbed(NamedTuple):
    """What of a score `gf.attribution.lrp` does not distribute, by cause.

    Attributes:
        constants: the share of biases and of other constants in sums.
        stabilizer: what `epsilon` takes, and the values of functions at 0, such as `sigmoid(0)`.
        softmax: what the first-order expansion of each softmax leaves out.
        other_paths: the share of data that the input, or the site, does not pass through.
    """

    constants: Float[Array, ""]
    stabilizer: Float[Array, ""]
    softmax: Float[Array, ""]
    other_paths: Float[Array, ""]


class _Relevance(NamedTuple):
    attributions: Float[Array, " ..."]
    score: Float[Array, ""]
    gap: Float[Array, ""]
    absorbed: Absorbed


class Relevance(ShowsTable, _Relevance):
    """The result of `gf.attribution.lrp`. `print` shows a table.

    Attributes:
        attributions: of the shape of the input or site, in units of the score.
        score: scalar, f(x).
        gap: scalar, the score minus the sum of the attributions.
        absorbed: the gap by cause; its parts sum to the gap up to rounding, which checks every rule that was applied.
            (In loops, the values of a site are computed from one another: there they do not.)
    """

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table of the score, of the sum and range of the attributions, and of what was absorbed."""
        if jnp.ndim(self.score):
            return array_table("Relevance, batched by vmap", self)
        parts = ", ".join(f"{cause} {float(value):.3g}" for cause, value in self.absorbed._asdict().items())
        out = TextTable("Relevance", f"absorbed: {parts}")
        for header in ("score", "sum of relevance", "gap"):
            out.add_column(header, ".4g")
        for header in ("attributions", "smallest", "largest"):
            out.add_column(header)
        scores = float(self.score), float(widen(self.attributions).sum()), float(self.gap)
        out.add_row(*scores, self.attributions.shape, *extremes(self.attributions))
        return out


def lrp(
    f: Callable,
    target: Target = None,
    at: str | None = None,
    *,
    rule: Literal["epsilon", "gamma", "z+"] = "epsilon",
    epsilon: float = 1e-6,
    gamma: float = 0.25,
) -> Callable[..., Relevance]:
    """Return a function that distributes a score over the input, or over a site: layer-wise relevance propagation.

    Bach et al., *On Pixel-Wise Explanations by Layer-Wise Relevance Propagation*, 2015; for transformers the rules of
    Achtibat et al., *AttnLRP*, 2024. Each equation of the traced function passes the relevance of its result on to its
    operands:

    - A product with weights and its bias: in proportion to the terms of the sum (`rule`).
    - A sum, such as a residual connection: in proportion.
    - A product of two values that both depend on the data: half to each.
    - A function of one number, such as an activation: all to that number.
    - A norm, or a mask: the value that is divided by it gets all.
    - A maximum: the largest element gets all.
    - A softmax: its first-order Taylor expansion, the ordinary gradient.

    Args:
        f: as for `gf.attribution.saliency`.
        target: as for `gf.attribution.saliency`.
        at: as for `gf.attribution.saliency`; for a language model, the site of the embeddings.
        rule: for products with weights: `"epsilon"`, all terms alike; `"gamma"`, terms of the sign of the output are
            weighted by `1 + gamma` (Montavon et al., *Layer-Wise Relevance Propagation: An Overview*, 2019, section
            10.2.3); `"z+"`, positive terms alone.
        epsilon: added to the magnitude of each sum of products that relevance is divided by; it dampens small ones.
        gamma: of the rule of that name.

    Returns:
        `(params, x, *rest) -> Relevance`, compiled.

    Raises:
        ValueError: an operation that has no rule (its line is named), a while loop, an unknown rule, a negative
            epsilon or gamma; and as for `gf.attribution.saliency`.
        TypeError: as for `gf.attribution.saliency`.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> def f(params, x):
    ...     return jnp.maximum(params["W"] @ x + params["b"], 0.0)
    >>> params = {"W": jnp.array([[2.0, -1.0]]), "b": jnp.array([0.5])}
    >>> result = gf.attribution.lrp(f, target=0)(params, jnp.array([1.0, 1.0]))
    >>> result.attributions.round(3), round(float(result.absorbed.constants), 3)
    (Array([ 2., -1.], dtype=float32), 0.5)
    """
    if rule not in _RULES:
        raise ValueError(f"lrp: rule must be one of {', '.join(_RULES)}; got {rule!r}")
    for name, value in (("epsilon", epsilon), ("gamma", gamma)):
        if not value >= 0:
            raise ValueError(f"lrp: {name} must be >= 0, got {value}")
    scored, layers = score(f, target, "lrp"), Layers(rule, epsilon, gamma)

    @jit_arrays
    def compiled(params: PyTree, x: ArrayLike, rest: tuple[PyTree, ...]) -> Relevance:
        call = explained(scored, at, params, x, rest, "lrp")
        found = rules_of(call.steps, "lrp")
        ends = fuse_biases(found, call)

        def value(delta: jax.Array, tokens: PyTree) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            result, at_source = call.run(delta, Rules(found, layers, ends, tokens), found)
            return result, (result, at_source)

        tokens = {cause: jnp.zeros((), wide(call.zero.dtype)) for cause in CAUSES}
        differentiate = jax.grad(value, argnums=(0, 1), has_aux=True)
        (gradient, absorbed), (result, at_source) = differentiate(call.zero, tokens)
        # A masked score is infinite, but nothing arrives at it.
        relevance = jnp.where(gradient == 0, 0, gradient * at_source)
        return Relevance(relevance, result, widen(result) - widen(relevance).sum(), Absorbed(**absorbed))

    @transform_of(f, "lrp", own=2)
    def distribute(params: PyTree, x: ArrayLike, /, *rest: PyTree) -> Relevance:
        """Return the relevance of each element of `x`, or of the value at the site."""
        return compiled(params, x, rest)

    return distribute
