"""`gf.check_grads`: the gradient against central differences."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradfn.core.signature import transform_of
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.inspection._backprop import active_equations
from gradfn.inspection.suspects import suspects
from gradfn.jaxpr import trace
from gradfn.jaxpr.call import Scalar, scalar
from gradfn.jaxpr.program import by_position, traced_leaves

# In a tree with more leaves, single leaves are only checked if all of them together are incorrect.
PER_LEAF = 64
# Relative, in float64.
TOLERANCE = 1e-5
# The error of a function's value that is allowed for, in units in the last place.
NOISE = 100


class LeafCheck(NamedTuple):
    """The gradient of one leaf compared with differences, in the direction in which they differ most.

    Attributes:
        name: the leaf, such as `W1`; `all leaves` for a tree of many.
        shape: its shape.
        gradient: slope in that direction, from the gradient.
        difference: slope in that direction, from central differences.
        error: their difference, over the larger of `difference` and the gradient's norm.
        ok: whether the error is within the tolerance, or below what rounding can resolve.
        note: a kink, a gradient too small to check, a value that is not finite; if the gradient is incorrect, the
            `stop_gradient`, `custom_jvp` or `custom_vjp` that causes it, if one does, with its line.
    """

    name: str
    shape: tuple[int, ...]
    gradient: float
    difference: float
    error: float
    ok: bool
    note: str = ""


@dataclass(frozen=True, repr=False)
class GradCheck(ShowsTable):
    """A gradient compared with central differences. `print` shows it; it is true if every gradient is correct.

    Attributes:
        leaves: a `LeafCheck` per leaf.
        tolerance: on the relative error.
        precision: the lowest precision of the differentiated values, with the reason if it is not float64.
    """

    leaves: tuple[LeafCheck, ...]
    tolerance: float
    precision: str

    @property
    def ok(self) -> bool:
        """Whether every gradient is correct."""
        return all(leaf.ok for leaf in self.leaves)

    @property
    def off(self) -> list[str]:
        """Names of the leaves whose gradient is incorrect."""
        return [leaf.name for leaf in self.leaves if not leaf.ok]

    def __bool__(self) -> bool:
        return self.ok

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per leaf, those with the largest error at most."""
        verdict = "every gradient is correct" if self.ok else f"incorrect: {', '.join(self.off)}"
        out = TextTable(
            title=f"{verdict} (to {self.tolerance:.1g}, in {self.precision})",
            caption="slopes in the random direction where they differ most",
        )
        out.add_column("leaf", shorten=True)
        out.add_column("shape", drop=2)
        out.add_column("gradient", ".8g", drop=1)
        out.add_column("differences", ".8g", drop=1)
        out.add_column("relative error", ".2g")
        out.add_column("result")
        for leaf in self.leaves:
            mark = ("ok" if leaf.ok else "INCORRECT") + (f": {leaf.note}" if leaf.note else "")
            numbers = (leaf.gradient, leaf.difference, leaf.error)
            out.add_row(leaf.name, leaf.shape, *numbers, mark, weight=leaf.error if leaf.ok else math.inf)
        return out.folded(rows, "check.table(rows=None)")


def check_grads(
    f: Callable,
    argnums: int | Sequence[int] | None = None,
    *,
    directions: int = 2,
    tolerance: float | None = None,
    seed: int = 0,
) -> Callable[..., GradCheck]:
    """Compare the gradient of a function with central differences, leaf by leaf, in float64.

    The function is traced with float64 inputs, whatever the default precision. If it casts to a lower precision
    itself, or cannot be traced in float64, steps and tolerance are those of that precision. In each direction the best
    of up to three step sizes counts, about the cube root of the precision times the leaf's size (Press et al.,
    *Numerical Recipes*, 3rd edition, section 5.7), so that neither rounding nor the kink of a nearby relu raises a
    false alarm.

    Args:
        f: any JAX function `(*args) -> scalar` or `-> (scalar, aux)`.
        argnums: which positional arguments to check; all by default. Leaves that are not floating are skipped.
        directions: random directions per leaf, in each of which that leaf alone changes. In trees of more than 64
            leaves all change together, and each leaf alone only if that shows an error.
        tolerance: on the relative error; 1e-5 in float64 by default.
        seed: of the random directions.

    Returns:
        A function of the same arguments that returns a `GradCheck`, which is true if all gradients are correct:
        `assert gf.check_grads(f)(x)`.

    Raises:
        TypeError: a function that does not return a floating scalar; no floating array; a call inside `jit`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gradfn.inspection import check_grads
        >>> @jax.custom_vjp
        ... def square(x):
        ...     return x**2
        >>> square.defvjp(lambda x: (x**2, x), lambda x, g: (x * g,))  # forgot the 2
        >>> def f(params):
        ...     return jnp.sum(square(params["a"])) + jnp.sum(params["b"] ** 2)
        >>> checked = check_grads(f)({"a": jnp.ones(3), "b": jnp.ones(2)})
        >>> checked.ok, checked.off
        (False, ['a'])
    """

    def prepared(args: PyTree, kwargs: PyTree, numbers: Sequence[int]) -> tuple[Scalar, tuple[str, str]]:
        of = scalar(f, args, kwargs, numbers, "check_grads")
        try:
            return of, _lowest_precision(of)
        except (TypeError, ValueError, IndexError):
            fewer = scalar(f, args, kwargs, numbers, "check_grads", singles=False)
            if fewer.leaves.numbers == of.leaves.numbers:
                raise
            return fewer, _lowest_precision(fewer)

    @transform_of(f, "check_grads", own=0)
    def check(*args: PyTree, **kwargs: PyTree) -> GradCheck:
        """Return how the gradients compare with central differences."""
        args, kwargs = by_position(f, args, kwargs) if not args else (args, kwargs)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            raise TypeError("check_grads: call it outside jit: it depends on values")
        numbers = range(len(args)) if argnums is None else np.atleast_1d(argnums).tolist()
        try:
            with _float64():
                wide_args, wide_kwargs = _widened((args, kwargs))
                of, precision = prepared(wide_args, wide_kwargs, numbers)
                return _check(of, precision, directions, tolerance, seed)
        # Such as a scan whose carry is declared as float32.
        except TypeError as error:
            reason = str(error).splitlines()[0]
        of, precision = prepared(args, kwargs, numbers)
        return _check(of, precision, directions, tolerance, seed, f"; float64 gives: {reason}")

    return check


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    # What f closes over stays float32, and may be combined with float64.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def _widened(tree: PyTree) -> PyTree:
    """Return the same arguments with their floating arrays in float64."""

    def widened(leaf: PyTree, traced: bool) -> PyTree:
        if not traced or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            return leaf
        # Functions can branch on single numbers: these stay as they are.
        if isinstance(leaf, (float, np.floating)):
            return np.float64(leaf) if isinstance(leaf, np.floating) else leaf
        complex_ = jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating)
        return jnp.asarray(np.asarray(leaf), jnp.complex128 if complex_ else jnp.float64)

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, map(widened, leaves, traced_leaves(tree)))


def _lowest_precision(of: Scalar) -> tuple[str, str]:
    """Return the lowest precision of all values that depend on the leaves, and the line of that value."""
    program = trace(of.value, of.leaves.values)
    found = [(str(aval.dtype), "an argument") for aval in program.jaxpr.in_avals]
    for equation in active_equations(program, of.names):
        found += [(dtype, equation.line) for _, _, dtype in equation.results]
    return max(found, key=lambda pair: float(jnp.finfo(pair[0]).eps))


def _check(
    of: Scalar,
    precision: tuple[str, str],
    directions: int,
    tolerance: float | None,
    seed: int,
    reason: str = "",
) -> GradCheck:
    eps = float(jnp.finfo(precision[0]).eps)
    if tolerance is None:
        tolerance = max(TOLERANCE, 10 * eps ** (2 / 3))
    value_of = jax.jit(of.value)
    gradients = jax.jit(jax.grad(of.value))(of.leaves.values)
    gradients = [np.asarray(g, _wide(g)) for g in gradients]
    leaves = [np.asarray(leaf, _wide(leaf)) for leaf in of.leaves.values]
    dtypes = [jnp.result_type(leaf) for leaf in of.leaves.values]
    here = float(value_of(of.leaves.values))
    rng = np.random.default_rng(seed)

    def slopes(along: dict[int, np.ndarray], step: float) -> _Slopes:
        def at(step: float) -> float:
            changed = [x + step * along[i] if i in along else x for i, x in enumerate(leaves)]
            return float(value_of([jnp.asarray(x, d) for x, d in zip(changed, dtypes, strict=True)]))

        ahead, behind = at(step), at(-step)
        noise = NOISE * eps * max(map(abs, (ahead, here, behind))) / (2 * step)
        return _Slopes((here - behind) / step, (ahead - here) / step, noise)

    def compared(which: Sequence[int]) -> LeafCheck:
        sizes = {i: _size(leaves[i]) for i in which}
        norm = math.hypot(*[sizes[i] * float(np.linalg.norm(gradients[i].ravel())) for i in which])
        # Relative to the leaf's size; finer, for a kink nearby; and coarse, for values near zero.
        steps = [eps ** (1 / 3) * s for s in (1.0, 1 / 30, 1 / max(sizes.values()))]
        in_directions, tangents = [], []
        for _ in range(directions):
            along = {i: sizes[i] * _normal(rng, leaves[i]) for i in which}
            slope = sum(float(np.sum(np.real(gradients[i] * v))) for i, v in along.items())
            tries: list[LeafCheck] = []
            for step in steps:
                tries.append(_compare(slope, slopes(along, step), norm, tolerance))
                if tries[-1].ok and not tries[-1].note:
                    break
            in_directions.append(min(tries, key=lambda t: (not t.ok, bool(t.note), t.error)))
            tangents.append(along)
        number = max(range(directions), key=lambda n: (not in_directions[n].ok, in_directions[n].error))
        worst, along = in_directions[number], tangents[number]
        if len(which) > 1:
            return worst._replace(name="all leaves")

        def is_right(gradient: np.ndarray) -> bool:
            apart = abs(float(np.sum(np.real(gradient * along[which[0]]))) - worst.difference)
            return apart <= 10 * tolerance * abs(worst.difference)

        if not worst.ok and not worst.note:
            worst = worst._replace(note=suspects(of, which[0], is_right))
        return worst._replace(name=of.names[which[0]], shape=leaves[which[0]].shape)

    every = [i for i, x in enumerate(leaves) if x.size]
    rows = [compared(every)] if len(every) > PER_LEAF else []
    if not rows or not rows[0].ok:
        rows = [compared([i]) for i in every]
    text = precision[0] + (f", at {precision[1]}{reason}" if precision[0] != "float64" else "")
    return GradCheck(tuple(rows), tolerance, text)


class _Slopes(NamedTuple):
    """A function's slopes in a direction by differences, on both sides, and the error from rounding."""

    behind: float
    ahead: float
    noise: float


def _compare(slope: float, by_differences: _Slopes, norm: float, tolerance: float) -> LeafCheck:
    behind, ahead, noise = by_differences
    central = (behind + ahead) / 2
    apart, size = abs(slope - central), max(abs(central), norm)
    error = apart / size if size else 0.0
    ok, note = error <= tolerance, ""
    if not math.isfinite(slope) or not math.isfinite(central):
        ok, error, note = False, math.inf, "not finite: gf.nan_origin shows where it came from"
    elif not ok and apart <= noise:
        ok, note = True, "too small to check: below the rounding error"
    elif not ok and min(behind, ahead) - noise <= slope <= max(behind, ahead) + noise:
        ok, note = True, "a kink: the slope is between those on its two sides"
    return LeafCheck("", (), slope, central, error, ok, note)


def _wide(x: PyTree) -> PyTree:
    return np.complex128 if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating) else np.float64


def _size(x: np.ndarray) -> float:
    """Return the root mean square of a leaf's elements; 1 if they are all zero."""
    return float(np.sqrt(np.mean(np.abs(x) ** 2))) or 1.0


def _normal(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    v = rng.standard_normal(x.shape)
    return v + 1j * rng.standard_normal(x.shape) if np.iscomplexobj(x) else np.asarray(v)
