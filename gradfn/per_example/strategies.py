"""How the norms of one parameter's gradients are found: one strategy per parameter.

A strategy defines what the pass over the batch differentiates with respect to (`argument`), what the pass records at
the equations that use the parameter (`probed`), and what follows from it: norms `[B]` and the sum of the gradients
(`found`, `total`).
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from gradfn.core.precision import norm_of_norms, wide, widen
from gradfn.jaxpr import Equation, probe
from gradfn.jaxpr.interpreter import Path
from gradfn.jaxpr.views import Meeting, View
from gradfn.per_example.ghost import (
    Factors,
    Measure,
    Rule,
    add_up,
    at,
    factors,
    fits_in_cache,
    fold,
    how,
    in_cache,
    is_less,
    measure_each,
    measure_gradients,
    multiplies_out,
    norm_of,
    of_real,
    product,
    rule_for,
    weighted,
)

# Elements. Every example gets its own copy of a smaller leaf, however the leaf is used.
SMALL = 1024
FALLBACK = "vmap(grad), in chunks"


class Use(NamedTuple):
    """An equation where a rule gives the gradient of a parameter, one of its operands."""

    equation: Equation
    operand: int
    rule: Rule
    view: View

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the operand."""
        atom: Any = self.equation.eqn.invars[self.operand]
        return tuple(atom.aval.shape)


class Found(NamedTuple):
    """Norms `[B]` of one parameter's gradients, or how to measure them, and their sum if it was computed.

    `weighted` returns the sum of the gradients times weights `[B]`, if they were kept or can be formed again.
    """

    norms: jax.Array | Measure
    total: jax.Array | None = None
    weighted: Callable[[jax.Array], jax.Array] | None = None


# What the pass recorded at each use: the gradient of its token, and its capture.
Recorded = Mapping[Path, tuple[PyTree, PyTree]]


@dataclass(frozen=True)
class Strategy:
    """The strategy for a parameter that the loss does not use, and the defaults of the others.

    Attributes:
        parameter: its index among the floating parameters.
        real: whether it is real; it may be used as a complex number all the same.
        uses: its uses, by the path of the equation.
    """

    parameter: int
    real: bool
    uses: Mapping[Path, Use] = field(default_factory=dict)

    # Whether every example has its own copy.
    copies = False
    # Whether `found` computes the sum of the gradients, so that the pass need not.
    makes_total = False

    @property
    def method(self) -> str:
        """How the norms are found, in words."""
        return "unused"

    @property
    def averages(self) -> bool:
        """Whether the pass computes the mean of the gradients: a sum may overflow a narrow dtype."""
        return any(use.view.narrow for use in self.uses.values())

    def argument(self, x: jax.Array, n: int) -> jax.Array:
        """Return what the pass over `n` examples differentiates with respect to."""
        return x

    def token(self, use: Use) -> jax.ShapeDtypeStruct:
        """Return the shape and dtype of a use's token, for one example."""
        return _output_of(use)

    def probed(self, use: Use, y: PyTree, V: Any, token: PyTree, left: Any) -> tuple[PyTree, PyTree]:
        """Return the output of a use with a probe on it, and its capture."""
        return probe(lambda g, _: g, y, token), left

    def is_folded(self, use: Use, V: Any) -> bool:
        """Tell whether the probe computes the gradient itself."""
        return False

    def found(self, x: jax.Array, grad: jax.Array, recorded: Recorded, n: int) -> Found:
        """Return the norms, after the pass."""
        return Found(jnp.zeros(n, real_dtype(x.dtype)), weighted=lambda weights: jnp.zeros_like(x))

    def total(self, grad: jax.Array, n: int) -> jax.Array:
        """Return the sum of the gradients, given what the pass computed."""
        return widen(grad) * n if self.averages else grad


class _Direct(Strategy):
    """A parameter smaller than the values around it: every example gets its own copy, and its own gradient."""

    copies = True

    @property
    def method(self) -> str:
        return "direct"

    def argument(self, x: jax.Array, n: int) -> jax.Array:
        return jnp.broadcast_to(x, (n, *x.shape))

    def found(self, x: jax.Array, grad: jax.Array, recorded: Recorded, n: int) -> Found:
        return Found(measure_gradients(grad), weighted=functools.partial(add_up, grad))

    def total(self, grad: jax.Array, n: int) -> jax.Array:
        return add_up(grad)


class FallBack(Strategy):
    """No rule applies: `vmap(grad)` with respect to the parameter, in a separate pass."""

    @property
    def method(self) -> str:
        """How the norms are found, in words."""
        return FALLBACK


class _InPlace(Strategy):
    """Each use contributes to its own part of the gradient, so its norm is computed in the backward pass."""

    @property
    def method(self) -> str:
        rules = [use.rule for use in self.uses.values()]
        return how(rules[0]) if len(rules) == 1 else f"{len(rules)} parts: {_kinds(rules)}"

    def token(self, use: Use) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), real_dtype(_output_of(use).dtype))

    def is_folded(self, use: Use, V: Any) -> bool:
        return not self.averages and multiplies_out(use.rule) and not jnp.iscomplexobj(V)

    def probed(self, use: Use, y: PyTree, V: Any, token: PyTree, left: Any) -> tuple[PyTree, PyTree]:
        if self.is_folded(use, V):
            return fold(use.rule, y, V, token, left), None

        def norm(g: PyTree, left: Any) -> jax.Array:
            return norm_of([factors(use.rule, left, g, self.real)]).astype(real_dtype(g.dtype))

        return probe(norm, y, token, left), None

    def found(self, x: jax.Array, grad: jax.Array, recorded: Recorded, n: int) -> Found:
        # The norm of the parts, and of the layers of a scan.
        return Found(norm_of_norms([recorded[path][0] for path in self.uses]))


class _Gathered(Strategy):
    """Several uses, or one in a loop, contribute to the gradient: its norm is computed once all of them are known."""

    @property
    def method(self) -> str:
        rules = [use.rule for use in self.uses.values()]
        if len(rules) > 1:
            return f"{len(rules)} uses: {_kinds(rules)}"
        (use,) = self.uses.values()
        return f"{rules[0].kind}, in a loop" if shared_axes(use) else how(rules[0])

    def found(self, x: jax.Array, grad: jax.Array, recorded: Recorded, n: int) -> Found:
        return Found(measure_each(self.factors, [recorded[path] for path in self.uses]))

    def factors(self, gathered: Sequence[tuple[PyTree, PyTree]], batched: bool = False) -> list[Factors]:
        """Return one example's gradient, or the sum over a batch of them, as a sum of outer products."""
        aligned = len(self.uses) > 1 or self.makes_total
        pairs = zip(self.uses.values(), gathered, strict=True)
        return [_positions(use, g, left, self.real, aligned, batched) for use, (g, left) in pairs]


class _Multiplied(_Gathered):
    """Like `_Gathered`, where an example's gradient is less work than its norm: it is computed, and summed."""

    makes_total = True

    def found(self, x: jax.Array, grad: jax.Array, recorded: Recorded, n: int) -> Found:
        gathered = [recorded[path] for path in self.uses]

        def products(start: PyTree, count: int) -> list[jax.Array]:
            some = jax.tree.map(lambda a: at(a, start, count), gathered)
            return [jax.vmap(lambda one: product(self.factors(one)))(some)]

        (total,), (norms,) = in_cache(products, n, x.size)
        return Found(norms, self._as_leaf(x, total))

    def _as_leaf(self, x: jax.Array, total: jax.Array) -> jax.Array:
        """Return a sum of products, `[s, k, n]` in the parameter's order, in its shape."""
        axes = leaf_axes(next(iter(self.uses.values())))
        assert axes is not None
        own, *sides = (sorted(axis for axis in side if axis is not None) for side in axes)
        order = [*own, *sorted(sides)[0], *sorted(sides)[1]]
        total = total.reshape([x.shape[axis] for axis in order])
        return total.transpose(sorted(range(len(order)), key=lambda k: order[k])).reshape(x.shape)


class _Kept(_Multiplied):
    """The factors of all examples are kept, until the norms are known and the weights that follow from them."""

    def found(self, x: jax.Array, grad: jax.Array, recorded: Recorded, n: int) -> Found:
        gathered = [recorded[path] for path in self.uses]
        if _multiply(list(self.uses.values())) and fits_in_cache(n, x.size):
            products = jax.vmap(lambda one: product(self.factors(one)))(gathered)
            return Found(
                measure_gradients(products),
                weighted=lambda weights: self._as_leaf(x, add_up(products, weights)),
            )

        def total(weights: jax.Array) -> jax.Array:
            pairs = zip(self.uses.values(), gathered, strict=True)
            scaled = [_weighted(use, g, left, weights) for use, (g, left) in pairs]
            return self._as_leaf(x, product(self.factors(scaled, batched=True)))

        return Found(measure_each(self.factors, gathered), weighted=total)


class Paired(_Multiplied):
    """Both sides of all products are recorded, in the parameter's order, and nothing is computed from them here."""

    def sides(self, gathered: Sequence[tuple[PyTree, PyTree]]) -> list[tuple[PyTree, PyTree]]:
        """Return both sides of each use's products for all examples, `[B, s, f, size]` or indices `[B, s, f]`."""
        return jax.vmap(lambda one: [found.sides for found in self.factors(one)])(gathered)


def pairing(strategy: Strategy) -> Strategy:
    """Return the strategy that records pairs of inputs and cotangents; every example gets a copy if it cannot."""
    parameter, real, uses = strategy.parameter, strategy.real, strategy.uses
    if uses and all(map(_can_be_paired, uses.values())) and len({*map(_sizes, uses.values())}) == 1:
        return Paired(parameter, real, uses)
    return strategy if type(strategy) is Strategy else _Direct(parameter, real)


def _can_be_paired(use: Use) -> bool:
    """Tell whether the products are real, and the parameter's axes on either side of them are known."""
    is_complex = jnp.issubdtype(_output_of(use).dtype, jnp.complexfloating)
    return not is_complex and (leaf_axes(use) is not None or is_grouped(use))


def is_grouped(use: Use) -> bool:
    """Tell whether a use is a convolution in groups, of a kernel that is at most transposed or stacked."""
    view, loops = use.view, [along for _, along in use.view.loops]
    known = view.axes is not None and not view.part and None not in loops and len(loops) < 2
    return known and use.rule.kind == "convolution" and use.rule.sizes[0] > 1


def _sizes(use: Use) -> tuple[int, int]:
    k, n = use.rule.sizes[2:]
    return (n, k) if swaps(use) else (k, n)


def keeping(strategy: Strategy) -> Strategy | None:
    """Return the strategy that knows sums of weighted gradients once the norms are known; None if there is none."""
    if isinstance(strategy, FallBack) or not all(map(_can_be_kept, strategy.uses.values())):
        return None
    return _Kept(strategy.parameter, strategy.real, strategy.uses) if strategy.uses else strategy


def _can_be_kept(use: Use) -> bool:
    """Tell whether both sides of a use's products can be kept, in about the memory of the values around them.

    They are not where the user has saved memory, by `jax.checkpoint` or by a scan over stacked layers, nor for
    convolutions, where a position is a window and windows overlap.
    """
    saved = use.view.loops or any(frame.kind == "remat" for frame in use.equation.frames)
    return not saved and use.rule.kind != "convolution" and leaf_axes(use) is not None


def strategy_for(
    parameter: int, x: jax.Array, meetings: Sequence[Meeting], equations: Mapping[Path, Equation]
) -> Strategy:
    """Return the strategy for a parameter that meets data at some equations."""
    real = not jnp.iscomplexobj(x)
    if not meetings:
        return Strategy(parameter, real)
    uses = _ruled(meetings, equations)
    if uses:
        return _kind(list(uses.values()))(parameter, real, uses)
    return (_Direct if _is_small(x.size, meetings, equations) else FallBack)(parameter, real)


def _ruled(meetings: Sequence[Meeting], equations: Mapping[Path, Equation]) -> dict[Path, Use]:
    """Return the uses of a parameter if rules cover all of them, else none."""
    uses: dict[Path, Use] = {}
    for meeting in meetings:
        if meeting.view is None or meeting.path not in equations:
            return {}
        rule = rule_for(equations[meeting.path].eqn, meeting.operand)
        if rule is None or meeting.path in uses:
            return {}
        uses[meeting.path] = Use(equations[meeting.path], meeting.operand, rule, meeting.view)
    if len(uses) == 1 or _are_apart(list(uses.values())):
        return uses
    axes = [leaf_axes(use) for use in uses.values()]
    known = {(a[0], frozenset(a[1:])) for a in axes if a}
    return uses if None not in axes and len(known) == 1 else {}


def _are_apart(uses: Sequence[Use]) -> bool:
    """Tell whether no two uses, nor two iterations of a loop, contribute to the same elements of a gradient."""
    pairs = itertools.combinations(uses, 2)
    return all(a.view.is_apart_from(b.view) for a, b in pairs) and not any(map(shared_axes, uses))


def _kind(uses: Sequence[Use]) -> type[Strategy]:
    # Both sides of a single position are small: they are gathered, so that one test covers all such norms.
    waits = len(uses) == 1 and uses[0].rule.sizes[1] == 1 and not uses[0].equation.axes
    if _are_apart(uses) and not waits:
        return _InPlace
    if any(leaf_axes(use) is None for use in uses):
        return _Gathered
    return _Multiplied if _multiply(uses) else _Gathered


def _multiply(uses: Sequence[Use]) -> bool:
    """Tell whether an example's gradient is less work than its norm by Gram matrices."""
    positions = sum(
        use.rule.sizes[1] * math.prod(use.equation.axes[k] for k in shared_axes(use)) for use in uses
    )
    return is_less(positions, *uses[0].rule.sizes[2:])


def _is_small(size: int, meetings: Sequence[Meeting], equations: Mapping[Path, Equation]) -> bool:
    """Tell whether a copy of a parameter per example takes no more memory than the values it is used for."""
    if size <= SMALL:
        return True
    around = 0
    for meeting in meetings:
        if not meeting.path:
            return False
        equation = equations[meeting.path]
        outvars: Any = equation.eqn.outvars
        out = sum(math.prod(var.aval.shape) for var in outvars)
        atom: Any = (
            equation.eqn.invars[meeting.operand] if meeting.operand < len(equation.eqn.invars) else None
        )
        if atom is not None and math.prod(atom.aval.shape) > out:
            return False
        around += out * math.prod(equation.axes)
    return size <= around


def _kinds(rules: Sequence[Rule]) -> str:
    return ", ".join(dict.fromkeys(rule.kind for rule in rules))


def _output_of(use: Use) -> jax.ShapeDtypeStruct:
    aval: Any = use.equation.eqn.outvars[0].aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=aval.sharding)


def real_dtype(dtype: DTypeLike) -> PyTree:
    """Return the dtype of norms."""
    return jnp.finfo(wide(dtype)).dtype


def shared_axes(use: Use) -> list[int]:
    """Return which leading axes of an equation are of loops that use the same elements in every iteration."""
    own = {path for path, _ in use.view.loops}
    stacked = [frame for frame in use.equation.frames if frame.length is not None]
    return [k for k, frame in enumerate(stacked) if frame.path not in own]


# Of a parameter: axes kept apart, rows, columns.
_Axes = tuple[frozenset[int | None], ...]


def leaf_axes(use: Use) -> _Axes | None:
    """Return the parameter's axes that a use keeps apart, and those on either side of its products."""
    rule, axes, loops = use.rule, use.view.axes, [along for _, along in use.view.loops]
    if axes is None or use.view.part or None in loops or (rule.kind == "convolution" and rule.sizes[0] > 1):
        return None
    apart = [*loops, *[axes[i] for i in rule.own]]
    sides = [[axes[i] for i in side] for side in (rule.rows, rule.columns)]
    return tuple(frozenset(side) - {None} for side in (apart, *sides))


def _weighted(use: Use, g: jax.Array, left: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return both sides of all examples' products, the narrower one times the weights `[B]`."""
    _, _, k, n = use.rule.sizes
    if use.rule.looks_up or n <= k:
        return weighted(g, weights), left
    return g, weighted(left, weights)


def _positions(
    use: Use, g: jax.Array, left: jax.Array, real: bool, aligned: bool, batched: bool = False
) -> Factors:
    """Return what a use contributes to a gradient, with all its iterations as positions of one sum.

    Where other uses contribute too (`aligned`), the elements are in the parameter's order. If it is `batched`, the
    first axis is one of examples, which are further positions.
    """
    rule, axes_around = use.rule, use.equation.axes
    again, n = shared_axes(use), len(axes_around)
    if batched:
        # In an iteration of a loop, the values of all examples lie side by side in memory.
        g, left = (jnp.moveaxis(x, 0, n) for x in (g, left))
        again, n = [*again, n], n + 1
    right_of = rule.right
    for _ in range(n):
        right_of = jax.vmap(right_of)
    own = [k for k in range(n) if k not in again]

    def arranged(x: jax.Array) -> jax.Array:
        # [*axes, s, f, ...] -> [own * s, again * f, ...]
        sizes = x.shape[n + 2 :]
        x = x.transpose(*own, n, *again, n + 1, *range(n + 2, x.ndim))
        return x.reshape(math.prod(x.shape[: len(own) + 1]), -1, *sizes)

    sides = [arranged(left), arranged(right_of(g, left))]
    found = Factors((sides[0], sides[1]), rule.sizes[2:], (rule.looks_up, False))
    if not aligned:
        return of_real(found, real)
    axes = use.view.axes or ()
    ours = [(along, axes_around[k]) for k, (_, along) in zip(own, use.view.loops, strict=True)]
    ours += [(axes[i], use.shape[i]) for i in rule.own]
    out = []
    for side, of_side in zip(sides, (rule.rows, rule.columns), strict=True):
        side = _in_order(side, 0, ours)
        if side.ndim == 3:
            side = _in_order(side, 2, [(axes[i], use.shape[i]) for i in of_side])
        out.append(side)
    k, m = rule.sizes[2:]
    found = found._replace(sides=(out[0], out[1]))
    if swaps(use):
        found = Factors((out[1], out[0]), (m, k), (False, rule.looks_up))
    return of_real(found, real)


def swaps(use: Use) -> bool:
    """Tell whether the columns of a use's products come first in the parameter's order."""
    axes = use.view.axes or ()
    rows, columns = (sorted({axes[i] or 0 for i in side}) for side in (use.rule.rows, use.rule.columns))
    return rows > columns


def _in_order(x: jax.Array, axis: int, parts: Sequence[tuple[int | None, int]]) -> jax.Array:
    """Reorder an axis made of several of the parameter's axes as these are ordered; `parts` are (axis, size)."""
    parts = [part for part in parts if part[0] is not None]
    order = sorted(range(len(parts)), key=lambda i: parts[i][0] or 0)
    if order == list(range(len(parts))):
        return x
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    x = x.reshape(*before, *[size for _, size in parts], *after)
    x = jnp.moveaxis(x, [axis + i for i in order], [axis + i for i in range(len(order))])
    return x.reshape(*before, -1, *after)
