"""Gradients of single examples as pairs: the input of each product with a parameter, and the cotangent of its output.

`sums_over` runs over a batch in chunks of examples. For each chunk it traces the loss once, records the inputs in the
forward pass, and pulls back one cotangent of the outputs after the other: the gradient of the loss itself (empirical
Fisher), each column of a root of the loss's Hessian with respect to the outputs (Gauss-Newton), or random combinations
of the columns. What is made of the pairs is the caller's: factors, or sums of squares in some basis.

The gradient of a parameter is `sum_u sum_f first_u[s, f, k] second_u[s, f, n]`, over its uses u and their positions f.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key, PyTree

from gradfn.core.precision import wide, widen
from gradfn.curvature._blocks import Layout
from gradfn.curvature._output_hessian import root_of, times_root
from gradfn.per_example.plan import Plan
from gradfn.per_example.strategies import Paired, Strategy, Use, is_grouped, leaf_axes, swaps
from gradfn.per_example.traced_loss import TracedLoss


class Source(NamedTuple):
    """What gradients are made of.

    Attributes:
        what: names the caller in errors.
        function: the loss of one example `(params, example)`; or its outputs `(params, x)`, if there is a `loss`.
        loss: `"softmax"`, `"squared"`, a function `(outputs, y) -> scalar`, or None.
        samples: the number of random combinations of the columns of the root; all columns if None.
        batch_size: the number of examples at a time.
    """

    what: str
    function: Callable
    loss: str | Callable | None
    samples: int | None
    batch_size: int

    def traced(self, params: PyTree, batch: PyTree) -> TracedLoss:
        """Return the function of one example, traced; outputs are its aux."""
        if self.loss is None:
            return TracedLoss(self.what, self.function, params, (batch,))

        def outputs(params: PyTree, x: PyTree) -> tuple[jax.Array, jax.Array]:
            z = self.function(params, x)
            if not hasattr(z, "dtype") or not jnp.issubdtype(z.dtype, jnp.floating):
                got = getattr(z, "dtype", type(z).__name__)
                raise TypeError(f"{self.what}: expected one floating array as the outputs, got {got}")
            return jnp.sum(widen(z)), z

        return TracedLoss(self.what, outputs, params, (batch[0],))


class UseOf(NamedTuple):
    """What is known of a use of a parameter before any data.

    Attributes:
        looks_up: whether the first and the second side are indices `[s, f]` of rows.
        input: which side is the input of the products, 0 or 1; the other one is the cotangent.
    """

    looks_up: tuple[bool, bool]
    input: int


class Parameter(NamedTuple):
    """What is known of a parameter before any data; `uses` is empty if whole gradients are recorded.

    Attributes:
        shape: of the parameter.
        dtype: of its block, float32 at least.
        uses: one per use.
        layout: how it is seen as `[s, k, n]`; None without uses.
        kinds: the kinds of its uses, in words.
        unused: whether the loss does not use it.
    """

    shape: tuple[int, ...]
    dtype: PyTree
    uses: tuple[UseOf, ...]
    layout: Layout | None
    kinds: str
    unused: bool


# Of one parameter, for all examples of a chunk: both sides per use, or a list of the whole gradients `[B, *shape]`.
Recorded = list[Any]


class Chunk(NamedTuple):
    """A chunk of examples after its forward pass.

    Attributes:
        parameters: one per floating parameter.
        inputs: for each parameter, the input side of each use: `[B, s, f, size]`, or indices `[B, s, f]`.
    """

    parameters: list[Parameter]
    inputs: list[Recorded]


# Returns sums that do not depend on cotangents, and a function from the cotangents' sides to sums that do.
Measure = Callable[[Chunk], tuple[PyTree, Callable[[list[Recorded]], PyTree]]]


def sums_over(
    source: Source, params: PyTree, batch: PyTree, key: Key[Array, ""] | None, measure: Measure
) -> tuple[PyTree, PyTree]:
    """Return sums over the examples, and over the examples and cotangents, of what is measured of each chunk.

    Args:
        source: of the gradients.
        params: the parameters.
        batch: all examples; `(x, y)` if the source has outputs and a loss.
        key: draws the samples.
        measure: `chunk -> (sums, recorded -> sums)`; `recorded` contains, like `Chunk.inputs`, the other sides, or
            the whole gradients.
    """
    size = source.traced(params, batch).size  # also checks the batch
    keys = jax.random.split(jax.random.key(0) if key is None else key, size)

    def of_chunk(chunk: PyTree) -> tuple[PyTree, PyTree]:
        examples, chunk_keys = chunk
        return _of_chunk(source, params, examples, chunk_keys, measure)

    return in_parts(of_chunk, (jax.tree.map(jnp.asarray, batch), keys), size, source.batch_size)


def in_parts(of_part: Callable[[PyTree], PyTree], arrays: PyTree, n: int, size: int) -> PyTree:
    """Return the sum of what a function returns of parts, with at most `size` of the arrays' `n` rows each."""
    size = min(size, n)
    count, rest = divmod(n, size)
    cut = jax.tree.map(lambda x: x[: count * size].reshape(count, size, *x.shape[1:]), arrays)
    if count == 1:
        total = of_part(jax.tree.map(lambda x: x[0], cut))
    else:
        like = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], cut))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        add = lambda total, part: (jax.tree.map(jnp.add, total, of_part(part)), None)  # noqa: E731
        total, _ = lax.scan(add, zeros, cut)
    if rest:
        last = of_part(jax.tree.map(lambda x: x[count * size :], arrays))
        total = jax.tree.map(jnp.add, total, last)
    return total


def _of_chunk(
    source: Source, params: PyTree, batch: PyTree, keys: jax.Array, measure: Measure
) -> tuple[PyTree, PyTree]:
    call = source.traced(params, batch)
    plan = Plan(call).pairing()
    parameters = described(plan)
    whole = [i for i, s in enumerate(plan.strategies) if s.copies]

    def outputs(arguments: dict[int, jax.Array], tokens: PyTree) -> tuple[jax.Array, PyTree]:
        values, (aux, captures) = plan.losses(arguments, tokens, stop=True)
        return (values if source.loss is None else aux), captures

    tokens = plan.tokens()
    out, back, captures = jax.vjp(outputs, plan.arguments(whole), tokens, has_aux=True)

    def sides(of_tokens: PyTree) -> list[list[tuple[PyTree, PyTree]]]:
        return [
            s.sides([(of_tokens[path], captures[path]) for path in s.uses]) if isinstance(s, Paired) else []
            for s in plan.strategies
        ]

    inputs = [
        [pair[use.input] for pair, use in zip(pairs, parameter.uses, strict=True)]
        for pairs, parameter in zip(sides(tokens), parameters, strict=True)
    ]
    once, each = measure(Chunk(parameters, inputs))

    def of_cotangent(u: jax.Array) -> PyTree:
        grads, of_tokens = back(u.astype(out.dtype))
        recorded = [
            [grads[i]]
            if i in grads
            else [widen(pair[1 - use.input]) for pair, use in zip(pairs, parameter.uses, strict=True)]
            for i, (pairs, parameter) in enumerate(zip(sides(of_tokens), parameters, strict=True))
        ]
        return each(recorded)

    loss = source.loss
    if loss is None:
        return once, of_cotangent(jnp.ones_like(out))
    root = jax.vmap(root_of(loss, source.what))(out, batch[1])
    dtype = wide(out.dtype)

    def of_column(k: jax.Array) -> PyTree:
        if source.samples is None:
            e = jax.nn.one_hot(k, math.prod(out.shape[1:]), dtype=dtype).reshape(out.shape[1:])
            u = jax.vmap(lambda root: times_root(loss, root, e))(root)
        else:
            e = jax.vmap(lambda key: jax.random.rademacher(jax.random.fold_in(key, k), out.shape[1:], dtype))(
                keys
            )
            u = jax.vmap(functools.partial(times_root, loss))(root, e) / math.sqrt(source.samples)
        return of_cotangent(u)

    n = source.samples or math.prod(out.shape[1:])
    return once, in_parts(lambda k: of_column(k[0]), jnp.arange(n), n, 1)


def described(plan: Plan) -> list[Parameter]:
    """Return what is known of each parameter of a plan."""
    return [_described(s, x) for s, x in zip(plan.strategies, plan.loss.floating, strict=True)]


def _described(strategy: Strategy, x: jax.Array) -> Parameter:
    shape, dtype = x.shape, wide(x.dtype)
    if not isinstance(strategy, Paired):
        return Parameter(shape, dtype, (), None, "", unused=type(strategy) is Strategy)
    uses = list(strategy.uses.values())
    kinds = ", ".join(dict.fromkeys(use.rule.kind for use in uses))
    kinds = kinds if len(uses) == 1 else f"{len(uses)} uses: {kinds}"
    return Parameter(shape, dtype, tuple(map(_use_of, uses)), _layout(uses[0], shape), kinds, unused=False)


def _use_of(use: Use) -> UseOf:
    looks_up = (False, use.rule.looks_up) if swaps(use) else (use.rule.looks_up, False)
    return UseOf(looks_up, int(swaps(use)))


def _layout(use: Use, shape: tuple[int, ...]) -> Layout:
    """Return the order of the parameter's elements in which both sides of a use are recorded."""
    groups, _, k, n = use.rule.sizes
    k, n = (n, k) if swaps(use) else (k, n)
    sizes = (math.prod(shape) // (k * n), k, n)
    if is_grouped(use):
        axes: Any = use.view.axes
        loops: Any = [along for _, along in use.view.loops]
        (out,) = [axes[i] for i in use.rule.columns]
        # The output's axis is split: [..., out, ...] -> [..., groups, out / groups, ...]
        split = (*shape[:out], groups, shape[out] // groups, *shape[out + 1 :])
        at = lambda axis: axis + (axis > out)  # noqa: E731
        rows = sorted(at(axes[i]) for i in use.rule.rows if axes[i] is not None)
        sides = [[out + 1], rows] if swaps(use) else [rows, [out + 1]]
        order = (*map(at, loops), out, *sides[0], *sides[1])
        rest = tuple(i for i in range(len(split)) if i not in order)  # of size 1
        return Layout(shape, split, (*rest, *order), sizes)
    own, *sides = (sorted(axis for axis in side if axis is not None) for side in leaf_axes(use) or ())
    first, second = sorted(sides)
    order = (*own, *first, *second)
    rest = tuple(i for i in range(len(shape)) if i not in order)  # of size 1
    return Layout(shape, shape, (*rest, *order), sizes)
