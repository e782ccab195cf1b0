"""Gradients of single examples: all of them, their norms, and their mean with each clipped."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gradfn.inspection.example_norms import FALLBACK, Call, Plan, fall_back, sum_of
from gradfn.text import TextTable
from gradfn.transform.ghost import add_up
from gradfn.transform.program import show_objects

CHUNK = 16  # examples that parameters without a rule are differentiated for at a time


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "aux", "norms", "total", "grads"],
    meta_fields=["methods"],
)
@dataclass(frozen=True)
class ExampleNorms:
    """Norms of the gradients of `B` single examples; a pytree of arrays. `print` shows it as a table.

    Attributes:
        values: `[B]`, the loss of each example.
        aux: the second thing that the loss returned, each of its arrays `[B, ...]`, or None.
        norms: in the tree of the parameters, the L2 norm of each example's gradient, `[B]` a leaf; None where a leaf
            has no gradient (integers, functions).
        total: `[B]`, the norm of each example's whole gradient.
        grads: the gradient of the mean loss, in the tree of the parameters.
        methods: `(path, method)` a leaf: how its norms were found (static).
    """

    values: Any
    aux: Any
    norms: Any
    total: Any
    grads: Any
    methods: tuple[tuple[str, str], ...]

    @property
    def fallback(self) -> tuple[str, ...]:
        """Paths of the leaves for which no rule was found: `vmap(grad)` was used, in a second backward pass."""
        return tuple(path for path, method in self.methods if method == FALLBACK)

    @property
    def mean_square(self) -> Any:
        """The mean of the examples' squared norms, a scalar: with `grads` all that a gradient's noise needs."""
        return jnp.mean(jnp.square(self.total))

    def table(self) -> TextTable:
        """Return it as a rich table: a row per leaf, its norms over the examples and how they were found."""
        out = TextTable(title=f"Gradient norms of {len(self.total)} examples")
        out.add_column("leaf", overflow="fold")
        for column in ("mean", "smallest", "largest", "of the mean"):
            out.add_column(column, justify="right")
        out.add_column("found by")
        gradients, norms = jax.tree.leaves(self.grads), jax.tree.leaves(self.norms)
        rows = [
            (path, norm, jnp.linalg.norm(g.reshape(-1).astype(norm.dtype)), method)
            for (path, method), norm, g in zip(self.methods, norms, gradients, strict=True)
        ]
        whole = jnp.sqrt(sum(jnp.square(of_mean) for _, _, of_mean, _ in rows))
        for path, norm, of_mean, method in [*rows, ("all", self.total, whole, "")]:
            numbers = (norm.mean(), norm.min(), norm.max(), of_mean)
            out.add_row(path, *[f"{float(x):.3g}" for x in numbers], method)
        return out

    def __str__(self) -> str:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self)):
            return f"ExampleNorms of {len(self.methods)} leaves, being traced: return it from jit to print it"
        return str(self.table())

    __repr__ = __str__


class ClippedGrads(NamedTuple):
    """The mean of gradients of which each was clipped first.

    Attributes:
        grads: in the tree of the parameters; None where a leaf has no gradient.
        values: `[B]`, the loss of each example.
        aux: the second thing that the loss returned, each of its arrays `[B, ...]`, or None.
        total: `[B]`, the norm of each example's gradient before it was clipped.
        clipped: the share of examples whose gradient was clipped, a scalar in [0, 1].
    """

    grads: Any
    values: Any
    aux: Any
    total: Any
    clipped: Any


def per_example_grads(loss: Callable, chunk: int | None = None) -> Callable[..., Any]:
    """Make a function that returns the gradient of every single example.

    It is `jax.vmap(jax.grad(loss))`, so takes memory of the size of the parameters for each example; if only their
    norms are wanted, `gf.per_example_norms` does it at the price of the batch's gradient.

    Args:
        loss: `(params, *example) -> scalar` or `(scalar, aux)`, of one example.
        chunk: how many examples to differentiate at a time; all at once unless told.

    Returns:
        `(params, *batch) -> grads`: in the tree of the parameters, arrays `[B, *shape]` of their dtypes, None where a
        leaf has no gradient. Each array of the batch has the examples along its first axis.

    Raises:
        ValueError: a batch whose arrays differ in their first axis, or without arrays; a chunk below 1.
        TypeError: a loss that is not a floating scalar; no floating parameter.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> loss = lambda w, x, y: (w @ x - y) ** 2
    >>> gf.per_example_grads(loss)(jnp.ones(2), jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.zeros(2))  # 2 (w.x - y) x
    Array([[ 6., 12.],
           [42., 56.]], dtype=float32)
    """
    _check_chunk(chunk, "per_example_grads")

    @functools.wraps(loss)
    def grads_of(params: Any, *batch: Any) -> Any:
        call = Call("per_example_grads", loss, params, batch)

        def grads_of_one(leaves: list[Any]) -> list[Any]:
            grads = jax.grad(lambda some: call.run(some, leaves)[0])(call.floating)
            return [g for g in grads if g.size]  # lax.map cannot join arrays of size 0

        found = iter(lax.map(grads_of_one, call.batch, batch_size=min(chunk or call.size, call.size)))
        shapes = [(call.size, *leaf.shape) for leaf in call.floating]
        pairs = zip(call.floating, shapes, strict=True)
        return call.tree([next(found) if x.size else jnp.zeros(shape, x.dtype) for x, shape in pairs])

    return grads_of


def per_example_norms(loss: Callable, chunk: int = CHUNK) -> Callable[..., ExampleNorms]:
    """Make a function that returns the norm of every single example's gradient, and the batch's gradient.

    One forward and one backward pass over the batch, at little more than the price of its gradient: the norms come
    from what went into each product and the gradient that came back to it, *ghost norms*, without any example's
    gradient ever being made (Goodfellow, *Efficient per-example gradient computations*, 2015; Li et al., *Large
    Language Models Can Be Strong Differentially Private Learners*, 2022, section 4, for sequences). The rules are
    looked up in the traced program of a single example, so any JAX function will do: matrix products, convolutions,
    embeddings, tied weights, recurrence, stacked layers, `jax.checkpoint`; biases, gains and other small parameters
    are differentiated directly. A parameter used otherwise falls back to `vmap(grad)` of it alone, and the result
    says so.

    Args:
        loss: `(params, *example) -> scalar` or `(scalar, aux)`, of one example. So examples cannot mix: there is no
            gradient of one example in a loss that, through batch normalisation or contrast, is of several.
        chunk: how many examples at a time parameters that fall back are differentiated for.

    Returns:
        `(params, *batch) -> ExampleNorms`, also inside `jit`, where it is fast. Each array of the batch has the
        examples along its first axis.

    Raises:
        ValueError: a batch whose arrays differ in their first axis, or without arrays; a chunk below 1.
        TypeError: a loss that is not a floating scalar; no floating parameter.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.mlp([3, 8, 2])
    >>> params, x = net.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (5, 3))
    >>> norms_of = jax.jit(gf.per_example_norms(gf.classification_loss(net)))
    >>> seen = norms_of(params, (x, jnp.array([0, 1, 1, 0, 1])))
    >>> gf.shapes(seen.norms), seen.total.shape
    ({'W1': [5], 'W2': [5], 'b1': [5], 'b2': [5]}, (5,))
    >>> gf.shapes(seen.grads), seen.fallback
    ({'W1': [8, 3], 'W2': [2, 8], 'b1': [8], 'b2': [2]}, ())
    """
    _check_chunk(chunk, "per_example_norms")

    @functools.wraps(loss)
    def norms_of(params: Any, *batch: Any) -> ExampleNorms:
        call = Call("per_example_norms", loss, params, batch)
        plan = Plan(call)
        tokens = plan.tokens()

        def total_loss(own: list[Any], shared: list[Any], tokens: Any) -> tuple[Any, Any]:
            values, rest = plan.losses(own, shared, tokens, plan.shared, stop=True)
            return values.sum(), (values, *rest)

        inputs = plan.own(), [call.floating[i] for i in plan.shared], tokens
        back = jax.grad(total_loss, argnums=(0, 1, 2), has_aux=True)
        (own, shared, of_tokens), (values, aux, captures) = back(*inputs)
        squares, made = plan.squares(own, of_tokens, captures)
        sums = dict(zip([*plan.direct, *plan.shared], [*map(add_up, own), *shared], strict=True)) | made
        if plan.fallback:
            more, more_sums = fall_back(call, plan.fallback, chunk)
            squares, sums = squares | more, sums | more_sums
        numbers = range(len(call.floating))
        return ExampleNorms(
            values=values,
            aux=show_objects(aux),
            norms=call.tree([jnp.sqrt(squares[i]) for i in numbers]),
            total=jnp.sqrt(sum_of(squares.values())),
            grads=call.tree([(sums[i] / call.size).astype(call.floating[i].dtype) for i in numbers]),
            methods=tuple((call.names[i], plan.methods[i]) for i in numbers),
        )

    return norms_of


def clipped_grads(loss: Callable, max_norm: Any, chunk: int = CHUNK) -> Callable[..., ClippedGrads]:
    """Make a function that returns the mean of the examples' gradients, each clipped to a norm first.

    It is what differentially private training adds noise to (Abadi et al., *Deep Learning with Differential Privacy*,
    2016), and what `optax.per_example_global_norm_clip` makes of all gradients, here without making them: the norms
    come from one backward pass (`gf.per_example_norms`), the mean of the clipped gradients is that of losses weighted
    by `min(1, max_norm / norm)`, a second one (Li et al., *Large Language Models Can Be Strong Differentially Private
    Learners*, 2022, section 4). The noise is optax's: `optax.add_noise`.

    Args:
        loss: `(params, *example) -> scalar` or `(scalar, aux)`, of one example.
        max_norm: the largest norm that a gradient keeps, a positive number.
        chunk: as in `gf.per_example_norms`.

    Returns:
        `(params, *batch) -> ClippedGrads`, also inside `jit`, where it is fast.

    Raises:
        ValueError: `max_norm` not positive; and as `gf.per_example_norms`.
        TypeError: as `gf.per_example_norms`.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> loss = lambda w, x: w @ x
    >>> clip = gf.clipped_grads(loss, max_norm=1.0)
    >>> clip(jnp.ones(2), jnp.array([[3.0, 4.0], [0.5, 0.0]])).grads  # of [0.6, 0.8] and [0.5, 0]
    Array([0.55, 0.4 ], dtype=float32)
    """
    _check_chunk(chunk, "clipped_grads")
    if not isinstance(max_norm, jax.core.Tracer) and not float(max_norm) > 0:
        raise ValueError(f"clipped_grads: max_norm is a positive number, came {max_norm}")

    @functools.wraps(loss)
    def clipped(params: Any, *batch: Any) -> ClippedGrads:
        call = Call("clipped_grads", loss, params, batch)
        plan = Plan(call)
        back_to = [*plan.shared, *plan.fallback]

        def losses(own: list[Any], some: list[Any], tokens: Any) -> tuple[Any, Any]:
            return plan.losses(own, some, tokens, back_to, stop=False)

        inputs = plan.own(), [call.floating[i] for i in back_to], plan.tokens()
        values, back, (aux, captures) = jax.vjp(losses, *inputs, has_aux=True)
        own, _, of_tokens = back(jnp.ones_like(values))
        squares, _ = plan.squares(own, of_tokens, captures)
        if plan.fallback:
            squares |= fall_back(call, plan.fallback, chunk)[0]
        total = jnp.sqrt(sum_of(squares.values()))
        weights = (1 / jnp.maximum(total / max_norm, 1)).astype(values.dtype)
        own, some, _ = back(weights)
        sums = dict(zip([*plan.direct, *back_to], [*map(add_up, own), *some], strict=True))
        means = [(sums[i] / call.size).astype(x.dtype) for i, x in enumerate(call.floating)]
        return ClippedGrads(call.tree(means), values, show_objects(aux), total, jnp.mean(total > max_norm))

    return clipped


def _check_chunk(chunk: int | None, what: str) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"{what}: chunk is 1 or more examples, came {chunk}")
