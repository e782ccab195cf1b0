"""Ghost norms: the norm of one example's gradient of a weight, from the weight's inputs and their cotangents.

Where a weight is multiplied by data, its gradient is a sum of outer products over positions,
`dV[s, k, n] = sum_f left[s, f, k] right[s, f, n]`: left comes from the forward pass, right is the cotangent.
Its squared norm is `sum_f,g (left_f . left_g) (right_f . right_g)`, which needs no memory of the size of the weight;
for one position it is `|left|^2 |right|^2` (Goodfellow, *Efficient per-example gradient computations*, 2015). Uses of
one weight in several equations, or in every iteration of a loop, are further positions. Looking up a row is a product
with a one-hot vector, represented by its index.

With many positions and few weights, the product itself is less work; and the sum of these products over the examples
is the gradient of the batch, which then costs only memory.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.extend.core import JaxprEqn
from jax.typing import DTypeLike
from jaxtyping import PyTree

from gradfn.core.devices import explicit_spec
from gradfn.core.precision import (
    divided,
    least_safe,
    magnitudes_squared,
    norm,
    scaled_norm,
    unit_of,
    wide,
    widen,
)
from gradfn.flatten.rows import spec_of
from gradfn.flatten.windows import columns_of
from gradfn.jaxpr.interpreter import stands_for
from gradfn.jaxpr.varying import as_varying, varying_axes

# A product may replace two Gram matrices. Reading or writing an element takes as long as TRAFFIC multiplications, and
# the product may be ROOM times as large as what the products around it keep anyway.
TRAFFIC, ROOM = 40, 2
# The products of all examples are made at once if they have at most CACHED elements, otherwise AT_ONCE at a time.
# CACHED was measured on two CPUs. It is not read from the machine, so that all machines compile the same program.
CACHED, AT_ONCE = 2**21, 2**17


class Rule(NamedTuple):
    """How the gradient of an equation's operand V follows from its other operand and its cotangent.

    `own`, `rows` and `columns` are the axes of V behind s, k and n. `left(inputs)` is `[s, f, k]` or, for rows that
    are looked up, integers `[s, f]` (-1 if out of range); `right(cotangent, left)` is `[s, f, n]`. `assemble` reshapes
    `[s, k, n]` to V's shape. `sizes` are those of s, f, k and n.
    """

    kind: str
    own: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    sizes: tuple[int, int, int, int]
    left: Callable[[Sequence[PyTree]], Any]
    right: Callable[[PyTree, PyTree], Any]
    assemble: Callable[[PyTree], Any]

    @property
    def looks_up(self) -> bool:
        """Whether `left` contains indices of rows. Its dtype does not show it, as data may be integers too."""
        return self.kind == "rows"


class Factors(NamedTuple):
    """Both sides of a sum of outer products, each `[s, f, size]`, and their sizes.

    A side whose `rows` is true contains integers `[s, f]` instead, which represent one-hot vectors.
    """

    sides: tuple[PyTree, PyTree]
    sizes: tuple[int, int]
    rows: tuple[bool, bool] = (False, False)


def rule_for(eqn: JaxprEqn, operand: int) -> Rule | None:
    """Return the rule for an operand's gradient; None if the gradient is not a sum of outer products."""
    # Axes that are split over devices in the type cannot be merged in all orders.
    if any(len(_shape(atom)) > 2 and any(spec_of(atom)) for atom in (*eqn.invars, *eqn.outvars)):
        return None
    if (only := stands_for(eqn)) is not None:
        return _rule_inside(eqn, only, operand)
    rules = {
        "dot_general": _dot,
        "conv_general_dilated": _conv,
        "gather": _gather,
        "dynamic_slice": _dynamic_slice,
    }
    make = rules.get(eqn.primitive.name)
    return make(eqn, operand) if make else None


def _rule_inside(eqn: JaxprEqn, only: JaxprEqn, operand: int) -> Rule | None:
    """Return the rule for an operand of a choice by platform, which stands for `only` with reshapes around it."""
    body: Any = eqn.params["branches"][-1].jaxpr
    V, at = body.invars[operand - 1], body.eqns.index(only)
    rule = rule_for(only, only.invars.index(V)) if V in only.invars else None
    if rule is None:
        return None
    before = body.replace(outvars=list(only.invars), eqns=body.eqns[:at])
    after = body.replace(invars=list(only.outvars), eqns=body.eqns[at + 1 :])
    y = jax.ShapeDtypeStruct(*(getattr(only.outvars[0].aval, name) for name in ("shape", "dtype")))
    return rule._replace(
        # The first operand is the number of the platform.
        left=lambda inputs: rule.left(jax.core.eval_jaxpr(before, (), *inputs[1:])),
        right=lambda g, left: rule.right(
            jax.linear_transpose(lambda y: jax.core.eval_jaxpr(after, (), y)[0], y)(g)[0], left
        ),
    )


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _dot(eqn: JaxprEqn, operand: int) -> Rule:
    (contracted, batched), other = eqn.params["dimension_numbers"], 1 - operand
    V, X = _shape(eqn.invars[operand]), _shape(eqn.invars[other])
    own, rows = tuple(batched[operand]), tuple(contracted[operand])
    columns = tuple(i for i in range(len(V)) if i not in own + rows)
    free = tuple(i for i in range(len(X)) if i not in (*batched[other], *contracted[other]))
    order = (*batched[other], *free, *contracted[other])
    s, k, n = (math.prod(V[i] for i in axes) for axes in (own, rows, columns))
    f = math.prod(X[i] for i in free)

    def left(inputs: Sequence[PyTree]) -> jax.Array:
        return _as_floats(inputs[other], eqn.invars[operand]).transpose(order).reshape(s, f, k)

    # The output is [own, lhs's free, rhs's free].
    def right(g: jax.Array, left: jax.Array) -> jax.Array:
        return g.reshape(s, n, f).swapaxes(1, 2) if operand == 0 else g.reshape(s, f, n)

    assemble = _assembler(V, own, rows, columns)
    return Rule("dense", own, rows, columns, (s, f, k, n), left, right, assemble)


def _as_floats(x: jax.Array, V: Any) -> jax.Array:
    """Return the factor of a weight as floats: it may be integers or booleans."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(wide(jnp.finfo(V.aval.dtype).dtype))


def _assembler(
    shape: tuple[int, ...], own: tuple[int, ...], rows: tuple[int, ...], columns: tuple[int, ...]
) -> Callable[[PyTree], PyTree]:
    order = (*own, *rows, *columns)
    back = tuple(order.index(i) for i in range(len(shape)))
    return lambda d: d.reshape([shape[i] for i in order]).transpose(back)


def _conv(eqn: JaxprEqn, operand: int) -> Rule | None:
    params = eqn.params
    if operand != 1 or params["batch_group_count"] != 1:
        return None
    V, spec, groups = _shape(eqn.invars[1]), params["dimension_numbers"], params["feature_group_count"]
    out, into, *spatial = spec.rhs_spec
    window = [V[i] for i in spatial]
    n_out, n_into = V[out], V[into]
    sizes = _shape(eqn.outvars[0])
    n_examples, n_positions = sizes[spec.out_spec[0]], math.prod(sizes[i] for i in spec.out_spec[2:])
    s, f, k, n = groups, n_examples * n_positions, n_into * math.prod(window), n_out // groups

    def columns(x: jax.Array) -> jax.Array:
        # Zeros between the inputs, if the convolution has a stride of less than 1.
        spread = [(0, 0, gap - 1) for gap in params["lhs_dilation"]]
        x = lax.pad(x, jnp.zeros((), x.dtype), [*spread, (0, 0, 0)]) if any(g for _, _, g in spread) else x
        return columns_of(x, window, params["window_strides"], params["padding"], params["rhs_dilation"])

    def left(inputs: Sequence[PyTree]) -> jax.Array:
        batch, channels, *space = spec.lhs_spec
        x = _as_floats(inputs[0], eqn.invars[1]).transpose(batch, *space, channels)  # [N, *space, C]
        # The form of `conv_as_product` for one example, which XLA then computes once.
        rows = columns(x[0])[None] if n_examples == 1 else jax.vmap(columns)(x)
        if groups == 1:
            return rows.reshape(s, f, k)
        rows = rows.reshape(n_examples, n_positions, math.prod(window), s, n_into)
        return rows.transpose(3, 0, 1, 2, 4).reshape(s, f, k)

    def right(g: jax.Array, left: jax.Array) -> jax.Array:
        g = g.transpose(spec.out_spec).reshape(n_examples, s, n, n_positions)
        return g.transpose(1, 0, 3, 2).reshape(s, f, n)

    def assemble(d: jax.Array) -> jax.Array:
        d = d.reshape(s, math.prod(window), n_into, n).transpose(0, 3, 2, 1)  # [s, n, in, window]
        ordered = d.reshape(n_out, n_into, *window)
        back = sorted(range(len(V)), key=lambda i: spec.rhs_spec[i])
        return ordered.transpose(back)

    return Rule("convolution", (), (*spatial, into), (out,), (s, f, k, n), left, right, assemble)


def _gather(eqn: JaxprEqn, operand: int) -> Rule | None:
    V, numbers, sizes = _shape(eqn.invars[0]), eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if (
        operand
        or len(numbers.start_index_map) != 1
        or numbers.collapsed_slice_dims != numbers.start_index_map
    ):
        return None
    (axis,) = numbers.start_index_map
    columns = tuple(i for i in range(len(V)) if i != axis)
    if numbers.operand_batching_dims or any(sizes[i] != V[i] for i in columns) or sizes[axis] != 1:
        return None
    rank = len(_shape(eqn.outvars[0]))
    positions = tuple(i for i in range(rank) if i not in numbers.offset_dims)
    f, n = math.prod(_shape(eqn.invars[1])[:-1]), math.prod(V[i] for i in columns)
    # Otherwise indices out of range are clipped.
    drop = "FILL" in str(eqn.params["mode"]).upper()

    def left(inputs: Sequence[PyTree]) -> jax.Array:
        ids = inputs[1].reshape(1, f).astype(jnp.int32)  # [..., 1] -> [s, f]
        inside = jnp.clip(ids, 0, V[axis] - 1)
        return jnp.where(ids == inside, ids, -1) if drop else inside

    def right(g: jax.Array, left: jax.Array) -> jax.Array:
        g = g.transpose((*positions, *numbers.offset_dims)).reshape(1, f, n)
        return jnp.where(left[..., None] >= 0, g, jnp.zeros_like(g))

    assemble = _assembler(V, (), (axis,), columns)
    return Rule("rows", (), (axis,), columns, (1, f, V[axis], n), left, right, assemble)


def _dynamic_slice(eqn: JaxprEqn, operand: int) -> Rule | None:
    V, sizes = _shape(eqn.invars[0]), eqn.params["slice_sizes"]
    partial = [i for i in range(len(V)) if sizes[i] != V[i]]
    if operand or len(partial) != 1 or sizes[partial[0]] != 1:
        return None
    (axis,) = partial
    columns = tuple(i for i in range(len(V)) if i != axis)
    n = math.prod(V[i] for i in columns)

    def left(inputs: Sequence[PyTree]) -> jax.Array:
        return jnp.clip(inputs[1 + axis], 0, V[axis] - 1).reshape(1, 1).astype(jnp.int32)

    def right(g: jax.Array, left: jax.Array) -> jax.Array:
        return g.reshape(1, 1, n)

    assemble = _assembler(V, (), (axis,), columns)
    return Rule("rows", (), (axis,), columns, (1, 1, V[axis], n), left, right, assemble)


def multiplies_out(rule: Rule) -> bool:
    """Tell whether an example's gradient is less work than its norm by Gram matrices and the batch's gradient.

    It is, with many positions and few weights. Its cost is that of writing and reading it.
    """
    _, f, k, n = rule.sizes
    return rule.kind != "rows" and is_less(f, k, n)


def is_less(f: int, k: int, n: int) -> bool:
    """Tell whether a product over `f` positions is less work than Gram matrices."""
    return f > 1 and TRAFFIC * k * n <= f * f * (k + n) and k * n <= ROOM * f * (k + n)


def how(rule: Rule) -> str:
    """Describe how the norm is found."""
    if rule.kind == "rows":
        return "rows"
    if rule.sizes[1] == 1:
        return f"{rule.kind}, |a||g|"
    return f"{rule.kind}, product" if multiplies_out(rule) else f"{rule.kind}, Gram"


def factors(rule: Rule, left: Any, g: PyTree, real: bool) -> Factors:
    """Return an example's gradient as a sum of outer products; `real` for a real parameter."""
    return of_real(Factors((left, rule.right(g, left)), rule.sizes[2:], (rule.looks_up, False)), real)


def of_real(of: Factors, real: bool) -> Factors:
    """Return the gradient of a real parameter, the real part of a sum of complex outer products."""
    a, b = of.sides
    if not real:
        return of
    # Re ab = Re a Re b - Im a Im b: twice as many positions.
    if jnp.iscomplexobj(a) and jnp.iscomplexobj(b):
        sides = jnp.concatenate([a.real, a.imag], 1), jnp.concatenate([b.real, -b.imag], 1)
        return of._replace(sides=sides)
    return of._replace(sides=(a.real, b.real))


def norm_of(uses: Sequence[Factors]) -> jax.Array:
    """Return the norm of a sum of sums of outer products, all of the same two sizes.

    It is the root of the plain squared norm. If that may overflow or underflow for any of the examples that this is
    mapped over, it is computed again from scaled factors.
    """

    def with_sides(sides: Any) -> list[Factors]:
        return [use._replace(sides=pair) for use, pair in zip(uses, sides, strict=True)]

    def plain(sides: Any) -> tuple[jax.Array, jax.Array]:
        return _squared_norm(with_sides(sides))

    def scaled(sides: Any) -> jax.Array:
        return _scaled_norm(with_sides(sides))

    @custom_vmap
    def norm_of_one(sides: Any) -> jax.Array:
        return safest([Measure(plain, scaled, sides)])[0]

    @norm_of_one.def_vmap
    def norms_of_all(n: int, batched: PyTree, sides: Any) -> tuple[jax.Array, bool]:
        axes = (jax.tree.map(lambda known: 0 if known else None, batched[0]),)
        return safest([Measure(jax.vmap(plain, axes), jax.vmap(scaled, axes), sides)])[0], True

    return norm_of_one([use.sides for use in uses])


class Measure(NamedTuple):
    """Two ways to norms: `plain(arrays) -> (squares, the least that is safe)` and `scaled(arrays) -> norms`."""

    plain: Callable[[PyTree], tuple[jax.Array, PyTree]]
    scaled: Callable[[PyTree], jax.Array]
    arrays: PyTree


def measure_each(factors_of: Callable[[PyTree], Sequence[Factors]], gathered: Any) -> Measure:
    """Return how to measure the norms of all examples' sums of outer products, made from what was gathered for each."""
    return Measure(
        jax.vmap(lambda one: _squared_norm(factors_of(one))),
        jax.vmap(lambda one: _scaled_norm(factors_of(one))),
        gathered,
    )


def measure_gradients(d: jax.Array) -> Measure:
    """Return how to measure the norms of all examples' gradients, `[n, ...]`."""
    size = math.prod(d.shape[1:])
    # Axes that are split over devices in the type cannot be merged.
    flat = d if explicit_spec(d) else d.reshape(d.shape[0], size)
    axes = tuple(range(1, flat.ndim))
    return Measure(
        lambda flat: (jnp.sum(magnitudes_squared(flat), axes), least_safe(wide(flat.dtype), size)),
        lambda flat: scaled_norm(flat, axes),
        flat,
    )


def safest(measures: Sequence[Measure]) -> list[jax.Array]:
    """Return norms of equal shapes, by the plain formula if all of them are safe, otherwise by the scaled one."""
    squares, safe = [], []
    for plain, _, arrays in measures:
        square, least = plain(arrays)
        squares.append(square)
        safe.append((square >= least) & (square < jnp.inf))
    return lax.cond(
        jnp.all(functools.reduce(jnp.logical_and, safe)) if safe else True,
        lambda all_arrays: [jnp.sqrt(square) for square in squares],
        lambda all_arrays: [of.scaled(arrays) for of, arrays in zip(measures, all_arrays, strict=True)],
        [of.arrays for of in measures],
    )


def _squared_norm(uses: Sequence[Factors]) -> tuple[jax.Array, jax.Array]:
    """Return the squared norm, and the least one at which the underflow of its terms is negligible."""
    n_positions = sum(use.sides[0].shape[1] for use in uses)
    k, n = uses[0].sizes
    dtype = _dtype(uses)
    real = jnp.finfo(dtype).dtype
    lost = least_safe(dtype, 1)
    if n_positions == 1 and len(uses) == 1:
        a, b = (_squares(*side, real) for side in zip(uses[0].sides, uses[0].rows, strict=True))
        largest = jnp.maximum(jnp.sum(a), jnp.sum(b))
        return jnp.sum(a * b), lost * a.size * max(k, n) * jnp.maximum(largest, 1)
    widths = [side.shape[-1] for use in uses for side in _floating(use)]
    if n_positions * sum(widths) / len(uses) > k * n:
        return _square_of(product(uses)), jnp.full((), lost * k * n, real)
    total, largest = jnp.zeros((), real), jnp.ones((), real)
    for i, one in enumerate(uses):
        for j, other in enumerate(uses[: i + 1]):
            left, right = (
                _gram(one.sides[k], other.sides[k], one.rows[k], other.rows[k], dtype) for k in (0, 1)
            )
            total += (1 if i == j else 2) * jnp.sum((left * right).real)
            if i == j:
                traces = [jnp.einsum("sff->", gram.real) for gram in (left, right)]
                largest = jnp.maximum(largest, jnp.maximum(*traces))
    return total, lost * n_positions**2 * max(k, n) * largest


def _scaled_norm(uses: Sequence[Factors]) -> jax.Array:
    """Return the norm, computed from factors with magnitudes of at most 1."""
    dtype = _dtype(uses)
    scaled: list[list[jax.Array]] = []
    for use in uses:
        a, b = (x if rows else x.astype(dtype) for x, rows in zip(use.sides, use.rows, strict=True))
        # The magnitude of each position moves to its other side.
        if not any(use.rows):
            units = unit_of(jnp.max(jnp.abs(a), -1, initial=0, keepdims=True))  # [s, f, 1]
            a, b = divided(a, units), b * units.astype(dtype)
        scaled.append([a, b])
    which = [use.rows.index(True) ^ 1 if any(use.rows) else 1 for use in uses]
    unit = unit_of(
        functools.reduce(
            jnp.maximum,
            [jnp.max(jnp.abs(sides[k]), initial=0) for sides, k in zip(scaled, which, strict=True)],
        )
    )
    for sides, k in zip(scaled, which, strict=True):
        sides[k] = divided(sides[k], unit)
    again = [use._replace(sides=(sides[0], sides[1])) for use, sides in zip(uses, scaled, strict=True)]
    return unit * jnp.sqrt(_squared_norm(again)[0])


def product(uses: Sequence[Factors]) -> jax.Array:
    """Return the sum itself, `[s, k, n]`."""
    dtype = _dtype(uses)
    return functools.reduce(jnp.add, [_product(use, dtype) for use in uses])


def _floating(use: Factors) -> list[jax.Array]:
    return [side for side, rows in zip(use.sides, use.rows, strict=True) if not rows]


def _dtype(uses: Sequence[Factors]) -> PyTree:
    return np.result_type(*[wide(side.dtype) for use in uses for side in _floating(use)])


def _squares(side: jax.Array, rows: bool, dtype: DTypeLike) -> jax.Array:
    return jnp.ones(side.shape, dtype) if rows else jnp.sum(magnitudes_squared(side).astype(dtype), -1)


def _square_of(d: jax.Array) -> jax.Array:
    flat = d.reshape(-1)
    return jnp.dot(flat, flat.conj(), precision=lax.Precision.HIGHEST).real


def _gram(a: jax.Array, b: jax.Array, a_rows: bool, b_rows: bool, dtype: DTypeLike) -> jax.Array:
    """Return all scalar products of positions, `[s, f, g]`."""
    if a_rows and b_rows:
        return (a[:, :, None] == b[:, None, :]).astype(dtype)
    if b_rows:
        return _gram(b, a, True, False, dtype).swapaxes(1, 2).conj()
    b = b.conj()
    # One-hot . b is a column of b.
    if a_rows:
        return jax.vmap(lambda ids, b: b.astype(dtype)[:, ids].T)(a, b)
    return _einsum("sfk,sgk->sfg", a, b, dtype)


def _product(use: Factors, dtype: DTypeLike) -> jax.Array:
    a, b = use.sides
    if any(use.rows):
        ids, other = (a, b) if use.rows[0] else (b, a)
        size = use.sizes[0 if use.rows[0] else 1]
        total = jax.vmap(lambda ids, x: jnp.zeros((size, x.shape[-1]), dtype).at[ids].add(x))(
            ids, other.astype(dtype)
        )
        return total if use.rows[0] else total.swapaxes(1, 2)
    return _einsum("sfk,sfn->skn", a, b, dtype)


def _einsum(formula: str, a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    if a.dtype != b.dtype:
        a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(formula, a, b, preferred_element_type=dtype)


def fold(rule: Rule, y: PyTree, V: Any, token: PyTree, left: Any) -> PyTree:
    """Return `y`; its backward pass computes V's gradient, and returns its norm as the token's gradient.

    Args:
        rule: of the equation that computes `y`, from V behind a `stop_gradient`.
        y: its output.
        V: the operand that it is computed from.
        token: a floating scalar, zero.
        left: `rule.left` of its inputs.

    Under `vmap` over examples with their own tokens, each example's product is made once.
    """
    return _fold(_Hashable(rule), y, V, token, left)


class _Hashable:
    """A rule compared by identity: tuples of functions compare slowly, and are never equal anyway."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fold(of: _Hashable, y: PyTree, V: Any, token: PyTree, left: Any) -> PyTree:
    return y


def _forward(of: _Hashable, y: PyTree, V: Any, token: PyTree, left: Any) -> tuple[PyTree, PyTree]:
    return y, (left, token, _empty_like(V))


def _empty_like(V: Any) -> jax.Array:
    """Return an array `[0, *V.shape]` that is batched under `vmap` where V is.

    In a branch of a `cond` that examples choose, each example has its own V, and its gradients must not be summed.
    """
    return V[None][:0]


def _backward(of: _Hashable, kept: Any, g: PyTree) -> tuple[PyTree, PyTree, PyTree, None]:
    left, token, like = kept
    rule = of.rule
    sides = rule.right(g, left), left
    columns_first = (*rule.own, *rule.columns, *rule.rows) == tuple(range(like.ndim - 1))  # [out, in]
    total, size = _products(*(sides if columns_first else sides[::-1]), jnp.zeros((), token.dtype), like)
    total = total.reshape(like.shape[1:]) if columns_first else rule.assemble(total)
    return g, total.astype(like.dtype), size, None


_fold.defvjp(_forward, _backward)


@custom_vmap
def _products(a: jax.Array, b: jax.Array, like: jax.Array, of: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `sum_f a[s, f, i] b[s, f, j]` and its norm; under `vmap` the former summed over examples.

    It is not summed if `of` is batched: see `_empty_like`.
    """
    d = _einsum("sfi,sfj->sij", a, b, like.dtype)
    return d, norm(d)


@_products.def_vmap
def _products_of_all(
    n: int, batched: PyTree, a: jax.Array, b: jax.Array, like: jax.Array, of: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[bool, bool]]:
    """Process some examples at a time, so that their products stay in the CPU's cache.

    Both sides enter the loop as matrices, as in the products around it: otherwise XLA would compute them twice.
    """
    a, b = (
        x if known else jnp.broadcast_to(x, (n, *x.shape)) for x, known in zip((a, b), batched, strict=False)
    )
    if batched[3]:
        each = _einsum("csfi,csfj->csij", a, b, like.dtype)
        return (each, jax.vmap(norm)(each)), (True, True)
    flat = [x.reshape(-1, x.shape[-1]) for x in (a, b)]  # [n * s * f, i]
    split = explicit_spec(a) is not None

    def of_some(start: PyTree, count: int) -> list[jax.Array]:
        left, right = (
            at(rows, start * (len(rows) // n), count * (len(rows) // n)).reshape(count, *x.shape[1:])
            for rows, x in zip(flat, (a, b), strict=True)
        )
        return [_einsum("csfi,csfj->csij", left, right, like.dtype)]

    (total,), (norms,) = in_cache(of_some, n, a.shape[1] * a.shape[3] * b.shape[3], split)
    return (total, norms), (False, True)


def averaged(rule: Rule, y: PyTree, V: Any, n: int, left: Any) -> PyTree:
    """Return `y`; its backward pass computes V's gradient, under `vmap` that of the mean over `n` examples.

    A sum over examples may overflow a narrow dtype when their mean does not: it is computed in float32 at least.

    Args:
        rule: of the equation that computes `y`, from V behind a `stop_gradient`.
        y: its output.
        V: the operand that it is computed from.
        n: the number of examples.
        left: `rule.left` of its inputs.
    """
    return _averaged(_Hashable(rule), n, y, V, left)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _averaged(of: _Hashable, n: int, y: PyTree, V: Any, left: Any) -> PyTree:
    return y


def _averaged_forward(of: _Hashable, n: int, y: PyTree, V: Any, left: Any) -> tuple[PyTree, PyTree]:
    return y, (left, _empty_like(V))


def _averaged_backward(of: _Hashable, n: int, kept: Any, g: PyTree) -> tuple[PyTree, PyTree, None]:
    left, like = kept
    rule = of.rule

    @custom_vmap
    def total(left: Any, g: PyTree, like: jax.Array) -> jax.Array:
        return product([factors(rule, left, g, False)])

    @total.def_vmap
    def total_of_all(
        size: int, batched: PyTree, left: Any, g: PyTree, like: jax.Array
    ) -> tuple[jax.Array, bool]:
        left, g = (
            x if known else jnp.broadcast_to(x, (size, *x.shape))
            for x, known in zip((left, g), batched, strict=False)
        )
        if batched[2]:
            return jax.vmap(lambda left, g: product([factors(rule, left, g, False)]))(left, g), True
        each = jax.vmap(lambda left, g: factors(rule, left, g, False).sides)(left, g)
        # Examples become positions: [examples, s, f, ...] -> [s, examples * f, ...]
        a, b = (x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in each)
        return product([Factors((a, b), rule.sizes[2:], (rule.looks_up, False))]), False

    return g, (rule.assemble(total(left, g, like)) / n).astype(like.dtype), None


_averaged.defvjp(_averaged_forward, _averaged_backward)


def at(x: jax.Array, start: PyTree, count: int) -> jax.Array:
    """Return some rows of an array."""
    return x if count == len(x) else lax.dynamic_slice_in_dim(x, start, count)


def fits_in_cache(n: int, size: int) -> bool:
    """Tell whether arrays of `size` elements for each of `n` examples are made at once."""
    return n * size <= CACHED


def in_cache(
    of_some: Callable[[PyTree, int], list[jax.Array]], n: int, size: int, split: bool = False
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Return what `in_chunks` returns of arrays of `size` elements per example, in chunks that fit in a CPU's cache.

    Programs for other platforms make all at once, and so does each device where examples are `split`.
    """

    def at_once() -> tuple[list[jax.Array], list[jax.Array]]:
        return in_chunks(of_some, n, n)

    if split or fits_in_cache(n, size):
        return at_once()
    few = max(1, AT_ONCE // size)
    return lax.platform_dependent(cpu=lambda: in_chunks(of_some, n, few), default=at_once)


def in_chunks(
    of_some: Callable[[PyTree, int], list[jax.Array]], n: int, chunk: int, split: bool = False
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Return the sums over `n` examples, and the norm `[n]` of each, of the arrays that a function returns.

    `of_some(start, count)` returns arrays `[count, ...]`; only those of one chunk are in memory at a time. Examples
    that are `split` over explicit mesh axes cannot be sliced: each device has all of its own in memory.
    """

    def made(start: PyTree, count: int) -> tuple[list[jax.Array], list[jax.Array]]:
        arrays = of_some(start, count)
        return [add_up(d) for d in arrays], norms_of_each(arrays)

    def step(start: PyTree, count: int, so_far: Any) -> PyTree:
        sums, norms = made(start, count)
        put = lax.dynamic_update_slice_in_dim
        return (
            [a + b for a, b in zip(so_far[0], sums, strict=True)],
            [put(a, b, start, 0) for a, b in zip(so_far[1], norms, strict=True)],
        )

    if chunk >= n or split:
        return made(0, n)
    sums, norms = jax.eval_shape(lambda: made(0, chunk))
    so_far = [_zeros(s, s.shape) for s in sums], [_zeros(s, (n,)) for s in norms]
    so_far = lax.fori_loop(0, n // chunk, lambda i, so_far: step(i * chunk, chunk, so_far), so_far)
    return step(n - n % chunk, n % chunk, so_far) if n % chunk else so_far


def _zeros(like: PyTree, shape: tuple[int, ...]) -> jax.Array:
    return as_varying(jnp.zeros(shape, like.dtype), varying_axes(like))


def norms_of_each(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Return the norm of each example in each array, `[n, ...] -> [n]`."""
    return safest([measure_gradients(d) for d in arrays])


def add_up(d: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Return the sum over the first axis, of weighted terms if weights are given, in float32 at least.

    It is computed as a product with the weights.
    """
    d = widen(d)
    if explicit_spec(d):
        return jnp.sum(d if weights is None else weighted(d, weights), 0)
    weights = jnp.ones(d.shape[0]) if weights is None else weights
    flat = d.reshape(d.shape[0], math.prod(d.shape[1:]))
    total = jnp.matmul(weights.astype(d.dtype)[None], flat, precision=lax.Precision.HIGHEST)
    return total.reshape(d.shape[1:])


def weighted(d: jax.Array, weights: jax.Array) -> jax.Array:
    """Return arrays `[B, ...]`, each times its weight, in float32 at least."""
    d = widen(d)
    return d * weights.astype(d.dtype).reshape(-1, *[1] * (d.ndim - 1))
