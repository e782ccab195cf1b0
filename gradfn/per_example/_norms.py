"""Gradients of single examples: all of them, their norms, and their mean with each clipped."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from gradfn.core.params import path_name
from gradfn.core.precision import norm, norm_of_norms, widen
from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable, array_table, extremes
from gradfn.jaxpr.program import show_objects
from gradfn.per_example.ghost import add_up, norms_of_each
from gradfn.per_example.plan import Plan, fall_back
from gradfn.per_example.strategies import FALLBACK
from gradfn.per_example.traced_loss import TracedLoss

# Examples that parameters without a rule are differentiated for at a time.
CHUNK = 16


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "aux", "norms", "total", "grads"],
    meta_fields=["methods"],
)
@dataclass(frozen=True, repr=False)
class ExampleNorms(ShowsTable):
    """Norms of the gradients of `B` single examples; a pytree of arrays. `print` shows it as a table.

    Attributes:
        values: `[B]`, the loss of each example.
        aux: the second thing that the loss returned, each of its arrays `[B, ...]`, or None.
        norms: in the tree of the parameters, the L2 norm of each example's gradient, `[B]` per leaf; None where a leaf
            has no gradient (integers, functions).
        total: `[B]`, the norm of each example's whole gradient.
        grads: the gradient of the mean loss, in the tree of the parameters.
        methods: `(path, method)` per leaf: how its norms were found (static).
    """

    values: Float[Array, " B"]
    aux: PyTree
    norms: PyTree[Float[Array, " B"]]
    total: Float[Array, " B"]
    grads: PyTree
    methods: tuple[tuple[str, str], ...]

    @property
    def fallback(self) -> tuple[str, ...]:
        """Paths of the leaves without a rule, for which `vmap(grad)` was used in a second backward pass."""
        return tuple(path for path, method in self.methods if method == FALLBACK)

    @property
    def mean_square(self) -> PyTree:
        """The mean of the examples' squared norms, a scalar. With `grads` it determines the gradient noise."""
        return jnp.mean(jnp.square(self.total))

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per leaf: its norms over the examples, and how they were found."""
        if jnp.ndim(self.total) > 1:
            return array_table("ExampleNorms, batched by vmap", self)
        out = TextTable(f"Gradient norms of {len(self.total)} examples")
        out.add_column("leaf", shorten=True)
        for column in ("mean", "smallest", "largest", "of the mean"):
            out.add_column(column)
        out.add_column("found by", drop=1)
        gradients, norms = jax.tree.leaves(self.grads), jax.tree.leaves(self.norms)
        found = [
            (path, of_each, norm(g), method)
            for (path, method), of_each, g in zip(self.methods, norms, gradients, strict=True)
        ]
        whole = norm_of_norms([of_mean[None] for _, _, of_mean, _ in found])[0]
        for path, of_each, of_mean, method in [*found, ("all", self.total, whole, "")]:
            numbers = (of_each.mean(), of_each.min(), of_each.max(), of_mean)
            out.add_row(path, *map(float, numbers), method, weight=float(of_each.mean()))
        return out.folded(rows, "norms.table(rows=None)")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["grads", "values", "aux", "total", "clipped"],
    meta_fields=["second_pass"],
)
@dataclass(frozen=True, repr=False)
class ClippedGrads(ShowsTable):
    """The mean of per-example gradients, each clipped first; a pytree of arrays. `print` shows it as a table.

    Attributes:
        grads: in the tree of the parameters; None where a leaf has no gradient.
        values: `[B]`, the loss of each example.
        aux: the second thing that the loss returned, each of its arrays `[B, ...]`, or None.
        total: `[B]`, the norm of each example's gradient before it was clipped.
        clipped: the fraction of examples whose gradient was clipped, a scalar in [0, 1].
        second_pass: paths of the leaves that required a second backward pass (static); empty if there was none.
    """

    grads: PyTree
    values: Float[Array, " B"]
    aux: PyTree
    total: Float[Array, " B"]
    clipped: Float[Array, ""]
    second_pass: tuple[str, ...] = ()

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per leaf: the norm of the mean of the clipped gradients."""
        if jnp.ndim(self.clipped):
            return array_table("ClippedGrads, batched by vmap", self)
        smallest, largest = extremes(self.total)
        caption = (
            f"{float(self.clipped):.1%} were clipped; norms before it from {smallest:.3g} to {largest:.3g}; "
            f"mean loss {float(self.values.mean()):.4g}"
        )
        out = TextTable(f"Mean of {len(self.total)} clipped gradients", caption)
        out.add_column("leaf", shorten=True)
        out.add_column("shape")
        out.add_column("norm")
        named = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(self.grads)]
        sizes = [norm(leaf) for _, leaf in named]
        for (name, leaf), size in zip(named, sizes, strict=True):
            out.add_row(name, leaf.shape, float(size), weight=float(size))
        out.add_row("all", None, float(norm_of_norms([size[None] for size in sizes])[0]), weight=math.inf)
        return out.folded(rows, "clipped.table(rows=None)")


def grads(loss: Callable, chunk: int | None = None) -> Callable[..., PyTree]:
    """Return a function that computes the gradient of every single example.

    It is `jax.vmap(jax.grad(loss))`, and takes memory of the size of the parameters for each example. If you only need
    norms, `gf.per_example.norms` computes them at about the cost of the batch's gradient.

    Args:
        loss: `(params, *example) -> scalar` or `(scalar, aux)`, of one example.
        chunk: the number of examples to differentiate at a time; None for all at once.

    Returns:
        `(params, *batch, key=None) -> grads`: in the tree of the parameters, arrays `[B, *shape]` of their dtypes, None
        where a leaf has no gradient. Each array of the batch has the examples along its first axis. A random `key`, for
        a loss with noise in it, is split: each example gets the key that it has in `gf.batch_mean`.

    Raises:
        ValueError: a batch whose arrays differ in their first axis, or without arrays; a chunk below 1.
        TypeError: a loss that does not return a floating scalar; no floating parameter.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> loss = lambda w, x, y: (w @ x - y) ** 2
    >>> gf.per_example.grads(loss)(jnp.ones(2), jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.zeros(2))  # 2 (w.x - y) x
    Array([[ 6., 12.],
           [42., 56.]], dtype=float32)
    """
    _check_chunk(chunk, "per_example.grads")

    @transform_of(loss, "grads")
    def grads_of(params: PyTree, /, *batch: PyTree, key: PyTree = None) -> PyTree:
        """Return the gradient of each example of the batch."""
        call = TracedLoss("per_example.grads", loss, params, batch, key)

        def grads_of_one(leaves: list[PyTree]) -> list[PyTree]:
            grads = jax.grad(lambda some: call.run(some, leaves)[0])(call.floating)
            # lax.map cannot join arrays of size 0.
            return [g for g in grads if g.size]

        if call.split is None:
            every = lax.map(grads_of_one, call.batch, batch_size=min(chunk or call.size, call.size))
        else:
            every = jax.vmap(grads_of_one)(call.batch)
        found = iter(every)
        shapes = [(call.size, *leaf.shape) for leaf in call.floating]
        pairs = zip(call.floating, shapes, strict=True)
        return call.tree([next(found) if x.size else jnp.zeros(shape, x.dtype) for x, shape in pairs])

    return grads_of


def norms(loss: Callable, chunk: int = CHUNK) -> Callable[..., ExampleNorms]:
    """Return a function that computes the norm of every single example's gradient, and the batch's gradient.

    One forward and one backward pass over the batch, at little more than the cost of its gradient: the norms are
    computed from the input of each product and the cotangent of its output (*ghost norms*), without forming any
    example's gradient (Goodfellow, *Efficient per-example gradient computations*, 2015; Li et al., *Large Language
    Models Can Be Strong Differentially Private Learners*, 2022, section 4, for sequences). The rules apply to the
    traced program of a single example, so any JAX function works: matrix products, convolutions, embeddings, tied
    weights, recurrence, stacked layers, `jax.checkpoint`. Biases, gains and other small parameters are differentiated
    directly. A parameter used in any other way falls back to `vmap(grad)` with respect to it alone, and the result
    reports it.

    Args:
        loss: `(params, *example) -> scalar` or `(scalar, aux)`, of one example. Examples cannot
            mix: a loss with batch normalization or a contrastive loss has no gradient of one example.
        chunk: the number of examples at a time for parameters that fall back.

    Returns:
        `(params, *batch, key=None) -> ExampleNorms`; fast inside `jit`. Each array of the batch has the examples along
        its first axis; `key` is as in `gf.per_example.grads`. The results can be differentiated, at the cost of
        `vmap(grad)`. Inside a `jax.shard_map` they are those of each device's own examples.

    Raises:
        ValueError: a batch whose arrays differ in their first axis, or without arrays; a chunk below 1.
        TypeError: a loss that does not return a floating scalar; no floating parameter.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.mlp([3, 8, 2])
    >>> params, x = net.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (5, 3))
    >>> norms_of = jax.jit(gf.per_example.norms(gf.classification_loss(net)))
    >>> norms = norms_of(params, (x, jnp.array([0, 1, 1, 0, 1])))
    >>> gf.shapes(norms.norms), norms.total.shape
    ({'W1': [5], 'W2': [5], 'b1': [5], 'b2': [5]}, (5,))
    >>> gf.shapes(norms.grads), norms.fallback
    ({'W1': [8, 3], 'W2': [2, 8], 'b1': [8], 'b2': [2]}, ())
    """
    _check_chunk(chunk, "per_example.norms")

    @transform_of(loss, "norms")
    def norms_of(params: PyTree, /, *batch: PyTree, key: PyTree = None) -> ExampleNorms:
        """Return the norm of the gradient of each example, and the gradient of the batch."""
        call = TracedLoss("per_example.norms", loss, params, batch, key)
        plan = Plan(call)
        methods = tuple(zip(call.names, [s.method for s in plan.strategies], strict=True))

        def in_one_pass(arrays: PyTree) -> ExampleNorms:
            return _norms(plan.of(arrays), chunk, methods)

        def one_by_one(arrays: PyTree) -> ExampleNorms:
            values, aux, grads, norms, total = _every_gradient(call.of(arrays))
            means = [add_up(g) / call.size for g in grads]
            return ExampleNorms(values, aux, call.tree(norms), total, call.like(means), methods)

        found = _differentiable(in_one_pass, one_by_one)(call.arrays)
        return dataclasses.replace(found, aux=show_objects(found.aux))

    return norms_of


def _norms(plan: Plan, chunk: int, methods: tuple[tuple[str, str], ...]) -> ExampleNorms:
    loss = plan.loss

    def total_loss(arguments: Any, tokens: PyTree) -> tuple[PyTree, PyTree]:
        values, rest = plan.losses(arguments, tokens, stop=True)
        return widen(values).sum(), (values, *rest)

    back = jax.grad(total_loss, argnums=(0, 1), has_aux=True)
    (grads, of_tokens), (values, aux, captures) = back(plan.arguments(plan.covered), plan.tokens())
    norms, found = plan.found(grads, of_tokens, captures)
    totals = plan.totals(grads) | {i: of.total for i, of in found.items() if of.total is not None}
    if plan.fallback:
        more, more_totals = fall_back(loss, plan.fallback, chunk)
        norms, totals = norms | more, totals | more_totals
    numbers = range(len(loss.floating))
    return ExampleNorms(
        values=values,
        aux=aux,
        norms=loss.tree([norms[i] for i in numbers]),
        total=norm_of_norms(list(norms.values())),
        grads=loss.like([totals[i] / loss.size for i in numbers]),
        methods=methods,
    )


def _every_gradient(call: TracedLoss) -> tuple[PyTree, PyTree, list[PyTree], list[PyTree], PyTree]:
    """Return the value, aux, gradients, their norms and the total norm of every example, by `vmap(grad)`."""

    def of_one(example: list[PyTree]) -> PyTree:
        return jax.value_and_grad(lambda some: call.run(some, example), has_aux=True)(call.floating)

    (values, aux), grads = jax.vmap(of_one)(call.batch)
    norms = norms_of_each(grads)
    return values, aux, grads, norms, norm_of_norms(norms)


def _differentiable(fast: Callable, plain: Callable) -> Callable:
    """Return `fast` with the derivatives of `plain`, which computes the same results.

    What `fast` computes in its backward pass has no derivatives.
    """
    run = jax.custom_jvp(fast)

    @run.defjvp
    def derivative(primals: PyTree, tangents: Any) -> PyTree:
        return run(*primals), jax.jvp(plain, primals, tangents)[1]

    return run


def clipped_grads(loss: Callable, max_norm: Any, chunk: int = CHUNK) -> Callable[..., ClippedGrads]:
    """Return a function that computes the mean of the examples' gradients, each clipped to a norm first.

    Differentially private training adds noise to it (Abadi et al., *Deep Learning with Differential Privacy*, 2016).
    It equals `optax.per_example_global_norm_clip` of all gradients, without forming them. One forward and one backward
    pass keep the input of each product and the cotangent of its output; the norms are computed from these
    (`gf.per_example.norms`), then the mean of the gradients weighted by `min(1, max_norm / norm)`: one more product per
    weight (*book-keeping*: Bu et al., *Differentially Private Optimization on Large Model at Small Cost*, 2023). Beside
    the values that a gradient's backward pass keeps, this takes memory for their cotangents.

    Some parameters would need much more: those of convolutions, of layers stacked in a scan, inside of
    `jax.checkpoint`, reshaped before their product, or without a rule, and any if examples or
    parameters are split over explicit mesh axes. If there are any, `second_pass` contains their paths, and a second
    backward pass computes the gradient of the weighted losses for all parameters (Li et al., *Large Language Models Can
    Be Strong Differentially Private Learners*, 2022, section 4). For the noise, use `optax.add_noise`.

    Args:
        loss: `(params, *example) -> scalar` or `(scalar, aux)`, of one example.
        max_norm: gradients with a larger norm are scaled down to it; above 0.
        chunk: as in `gf.per_example.norms`.

    Returns:
        `(params, *batch, key=None) -> ClippedGrads`; fast inside `jit`. `key` is as in `gf.per_example.grads`. An
        example whose gradient is not finite makes the mean NaN.

    Raises:
        ValueError: `max_norm` not above 0; and as `gf.per_example.norms`.
        TypeError: as `gf.per_example.norms`.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> loss = lambda w, x: w @ x
    >>> clip = gf.per_example.clipped_grads(loss, max_norm=1.0)
    >>> clip(jnp.ones(2), jnp.array([[3.0, 4.0], [0.5, 0.0]])).grads  # of [0.6, 0.8] and [0.5, 0]
    Array([0.55, 0.4 ], dtype=float32)
    >>> clip(jnp.ones(2), jnp.ones([5, 2])).second_pass
    ()
    """
    _check_chunk(chunk, "clipped_grads")
    if not isinstance(max_norm, jax.core.Tracer) and not float(max_norm) > 0:
        raise ValueError(f"clipped_grads: max_norm must be > 0, got {max_norm}")

    @transform_of(loss, "clipped_grads")
    def clipped(params: PyTree, /, *batch: PyTree, key: PyTree = None) -> ClippedGrads:
        """Return the mean of the clipped gradients of the examples of the batch."""
        call = TracedLoss("clipped_grads", loss, params, batch, key)
        plan = Plan(call)
        second_pass = tuple(call.names[i] for i in plan.not_kept)
        if not second_pass:
            plan = plan.keeping()

        def clip(arrays: PyTree, max_norm: Any) -> ClippedGrads:
            return _clipped(plan.of(arrays), max_norm, chunk, second_pass)

        def one_by_one(arrays: PyTree, max_norm: Any) -> ClippedGrads:
            values, aux, grads, _, total = _every_gradient(call.of(arrays))
            weights, share = _clipping(total, max_norm)
            means = [add_up(g, weights) / call.size for g in grads]
            return ClippedGrads(call.like(means), values, aux, total, share, second_pass)

        found = _differentiable(clip, one_by_one)(call.arrays, jnp.asarray(max_norm, float))
        return dataclasses.replace(found, aux=show_objects(found.aux))

    return clipped


def _clipped(plan: Plan, max_norm: Any, chunk: int, second_pass: tuple[str, ...]) -> ClippedGrads:
    loss = plan.loss
    # Gradients of narrow dtypes are weighted and added up in float32, apart from the pass.
    apart = plan.fallback if plan.is_narrow else []
    arguments = plan.arguments(i for i in range(len(loss.floating)) if i not in apart)

    def losses(arguments: Any, tokens: PyTree) -> tuple[PyTree, PyTree]:
        return plan.losses(arguments, tokens, stop=not second_pass)

    values, back, (aux, captures) = jax.vjp(losses, arguments, plan.tokens(), has_aux=True)
    grads, of_tokens = back(jnp.ones_like(values))
    norms, found = plan.found(grads, of_tokens, captures)
    if plan.fallback:
        norms |= fall_back(loss, plan.fallback, chunk)[0]
    total = norm_of_norms(list(norms.values()))
    weights, share = _clipping(total, max_norm)
    if second_pass:
        totals = plan.totals(back(_rounded_down(weights, values.dtype))[0])
        if apart:
            totals |= fall_back(loss, apart, chunk, weights)[1]
    else:
        totals = {i: of.weighted(weights) for i, of in found.items() if of.weighted is not None}
    means = [totals[i] / loss.size for i in range(len(loss.floating))]
    return ClippedGrads(loss.like(means), values, aux, total, share, second_pass)


def _clipping(total: jax.Array, max_norm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the factors that clip gradients of these norms, and the fraction that is clipped."""
    max_norm = max_norm.astype(total.dtype)
    return 1 / jnp.maximum(total / max_norm, 1), jnp.mean(total > max_norm)


def _rounded_down(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Cast positive numbers to a dtype that may be narrower, without increasing any of them."""
    cast = x.astype(dtype)
    return jnp.where(cast.astype(x.dtype) > x, jnp.nextafter(cast, jnp.zeros_like(cast)), cast)


def _check_chunk(chunk: int | None, what: str) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"{what}: chunk must be an integer >= 1, got {chunk}")
