"""What each value of a score is to a backward rule: a constant, a factor, or data through which relevance flows.

*Data* depend on an argument other than the parameters. A *factor* does too, but only scales the data that it is
multiplied with: a norm, `rsqrt(variance + epsilon)`, a mask. A *constant* depends on parameters alone, or was declared
constant with `stop_gradient`. A constant that is one *number* is part of the function around it (`1 + tanh(u)` is one
function of u); an array of parameters in a sum is a bias.

*Live* values are those that depend on the value to explain, by differentiable operations: rules apply to these alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn
from jaxtyping import PyTree

from gradfn.jaxpr import Program, Site
from gradfn.jaxpr.dataflow import Dataflow, Role
from gradfn.jaxpr.interpreter import Equation, Path, operation
from gradfn.jaxpr.reach import reaching

Kind = Literal["constant", "factor", "data"]
_ORDER: tuple[Kind, ...] = ("constant", "factor", "data")
_Origin = tuple[Path, int]

# Linear in all of their operands together; each element of the output is a sum of elements of the operands, or none.
MOVES = {
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "dynamic_slice",
    "dynamic_update_slice", "expand_dims", "gather", "name", "neg", "optimization_barrier", "pad", "reduce_precision",
    "reshape", "rev", "scatter", "scatter-add", "select_n", "sharding_constraint", "slice", "sort", "split", "squeeze",
    "top_k", "transpose",
}  # fmt: skip
SUMS = {"add", "sub", "add_any", "reduce_sum", "cumsum", "reduce_window_sum"}
PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general"}
# The largest, or smallest, operand or element gets all of the relevance.
EXTREMES = {
    "max",
    "min",
    "clamp",
    "reduce_max",
    "reduce_min",
    "reduce_window_max",
    "reduce_window_min",
    "cummax",
    "cummin",
}
# Functions of one number; a further operand of a power is a constant.
POINTWISE = {
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "cbrt", "ceil", "cos", "cosh", "digamma", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "integer_pow", "lgamma", "log", "log1p", "logistic", "pow",
    "round", "rsqrt", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh",
}  # fmt: skip
_ROOTS = {"sqrt", "rsqrt", "pow"}
_ELEMENTWISE = POINTWISE | {"add", "sub", "mul", "div", "max", "min", "clamp", "select_n", "neg", "add_any"}


class Value(NamedTuple):
    """What is known of a value.

    Attributes:
        kind: see the module.
        live: whether it depends on the value to explain.
        number: whether it is a constant made of one number.
        zero: whether that number is 0.
        reduced: whether it is made of sums of data, such as a variance.
        exponentials: the `exp` equations whose output it is, up to a mask.
        partition: the `exp` equations whose outputs it is the sum of.
        shifted: whether the logarithm of such a sum is one of its terms, as in log probabilities.
        positive: of a boolean, the value that it says is positive, and whether it says so by being true.
        origin: where it was computed, unchanged by calls.
    """

    kind: Kind = "constant"
    live: bool = False
    number: bool = False
    zero: bool = False
    reduced: bool = False
    exponentials: frozenset[Path] = frozenset()
    partition: frozenset[Path] = frozenset()
    shifted: bool = False
    positive: tuple[_Origin, bool] | None = None
    origin: _Origin | None = None

    @property
    def constant(self) -> bool:
        return self.kind == "constant"


class Step(NamedTuple):
    """An equation with a live result: the equation, its operation and what is known of its operands.

    `softmax` marks the exponentials of a softmax, and what divides by their sum or takes its logarithm.
    """

    equation: Equation
    name: str
    operands: tuple[Value, ...]
    softmax: bool

    @property
    def live(self) -> list[int]:
        """The indices of the live operands."""
        return [k for k, value in enumerate(self.operands) if value.live]

    @property
    def floating(self) -> list[int]:
        """The indices of the floating operands."""
        return [k for k, atom in enumerate(self.equation.eqn.invars) if _is_floating(atom)]

    @property
    def relu_of(self) -> int | None:
        """The operand that the equation is the ReLU of, or None: `max(x, 0)`, `where(x > 0, x, 0)`, `x * (x > 0)`."""
        for k in self.live:
            others = [value for i, value in enumerate(self.operands) if i != k]
            if self.name == "max" and all(value.zero for value in others):
                return k
            # The cases of a select are in the order false, true.
            selects = self.name == "select_n" and len(others) == 2 and others[1].zero
            if selects and others[0].positive == (self.operands[k].origin, k == 2):
                return k
            if self.name == "mul" and others[0].positive == (self.operands[k].origin, True):
                return k
        return None


def live_steps(program: Program, source: int | Site, what: str) -> dict[Path, Step]:
    """Return the equations by path that the program's output depends on and that depend on the source.

    Args:
        program: of a scalar; its first argument are parameters.
        source: the index of an input, or a site.
        what: the caller, for errors.

    Raises:
        ValueError: a while loop between the two, or an output that does not depend on the source.
    """
    analysis = _Roles(source if isinstance(source, Site) else None)
    inputs = [
        Value() if owner == 0 else Value("data", live=i == source) for i, owner in enumerate(program.owners)
    ]
    (out,) = analysis.run(program.jaxpr, inputs)
    equations = program.equations(enter_custom=True)
    needed = reaching(program.jaxpr, [True]).outputs
    steps: dict[Path, Step] = {}
    for path, operands, live in analysis.records:
        equation = equations[path]
        name = operation(equation.eqn)
        # What is inside a function with a custom derivative is needed if the function is.
        outer = next((frame.path for frame in equation.frames if frame.kind == "custom"), path)
        if not live or outer not in needed:
            continue
        if name == "while" or equation.in_while:
            raise ValueError(
                f"{what}: no gradient passes through the while loop at {equation.line}. Use jax.lax.scan, or "
                "a fori_loop with fixed bounds"
            )
        divides = name == "div" and operands[1].partition
        if divides and operands[0].exponentials != operands[1].partition:
            raise ValueError(
                f"{what}: no rule for a division by a sum of exponentials that are not its numerator, at "
                f"{equation.line}. Normalize the probabilities first: jax.nn.softmax"
            )
        softmax = bool(divides or (name == "log" and operands[0].partition))
        steps[path] = Step(equation, name, operands, softmax or path in analysis.softmaxes)
    if not out.live:
        raise ValueError(f"{what}: the score is not computed from the input by differentiable operations")
    return steps


class _Roles(Dataflow[Value]):
    """Finds what every value is; the records are `(path, operands, whether an output is live)`."""

    enter_custom = True

    def __init__(self, site: Site | None) -> None:
        super().__init__()
        self.site = site
        self.softmaxes: set[Path] = set()

    def constant(self, value: PyTree) -> Value:
        number = np.ndim(value) == 0 and not isinstance(value, jax.core.Tracer)
        return Value(number=number, zero=number and value == 0)

    def join(self, values: Sequence[Value]) -> Value:
        first = values[0]
        return Value(
            kind=max((v.kind for v in values), key=_ORDER.index),
            live=any(v.live for v in values),
            number=all(v.number for v in values) and all(v.zero == first.zero for v in values),
            zero=all(v.zero for v in values),
            reduced=all(v.reduced for v in values),
            exponentials=frozenset().union(*[v.exponentials for v in values]),
            partition=frozenset().union(*[v.partition for v in values]),
            shifted=any(v.shifted for v in values),
        )

    def bind(self, path: Path, k: int, var: Any, value: Value, eqn: JaxprEqn | None) -> Value:
        if eqn is not None and self.site is not None and (path, k) == (self.site.path, self.site.index):
            value = value._replace(kind="data", live=True)
        if not _is_floating(var):
            value = value._replace(live=False)
        return value if value.origin is not None else value._replace(origin=(path, k))

    def choose(self, path: Path, index: Value, values: Sequence[Value]) -> Value:
        out = self.join(values)
        return out if index.constant else out._replace(kind="data", number=False, zero=False)

    def into_loop(self, path: Path, operand: int, role: Role, value: Value) -> Value:
        return value._replace(origin=None, positive=None)

    def out_of_iteration(self, path: Path, operand: int, role: Role, value: Value) -> Value:
        return value._replace(origin=None, positive=None)

    def equation(self, path: Path, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
        name = operation(eqn)
        live = any(v.live for v in operands) and name != "stop_gradient"
        self.records.append((path, tuple(operands), live and any(map(_is_floating, eqn.outvars))))
        pairs = zip(eqn.invars, operands, strict=True)
        made = [v for atom, v in pairs if not v.constant and _is_floating(atom)]
        if all(v.constant for v in operands) or name == "stop_gradient":
            number = bool(operands) and all(v.number for v in operands)
            zero = number and name in MOVES and all(v.zero for v in operands)
            return [Value(number=number, zero=zero)] * len(eqn.outvars)
        value = Value(_kind(name, eqn, operands, made), live=live, positive=_positive(name, operands))
        if name == "exp":
            value = value._replace(exponentials=frozenset([path]))
        # A mask is a factor.
        elif name in MOVES or name == "mul":
            value = value._replace(exponentials=_only(v.exponentials for v in made if v.kind == "data"))
        if name in MOVES or name in ("abs", "add", "max"):
            value = value._replace(partition=_only(v.partition for v in made))
        elif name == "reduce_sum" and made:
            value = value._replace(partition=made[0].exponentials)
        takes_logarithm = name == "log" and bool(operands[0].partition)
        if takes_logarithm or (name == "div" and operands[1].partition):
            self.softmaxes |= operands[-1].partition
        shifted = takes_logarithm or (name in MOVES | SUMS and any(v.shifted for v in made))
        if name == "exp" and operands[0].shifted:
            self.softmaxes.add(path)
        summed = name == "reduce_sum" or (name == "dot_general" and len(made) == 2)
        kept = name in MOVES | _ELEMENTWISE and bool(made) and all(v.reduced for v in made)
        return [value._replace(reduced=summed or kept, shifted=shifted)] * len(eqn.outvars)


def _kind(name: str, eqn: JaxprEqn, operands: Sequence[Value], made: Sequence[Value]) -> Kind:
    if not _is_floating(eqn.outvars[0]):
        return "data"
    # A mask, a count, or random bits as numbers.
    if name == "convert_element_type" and not _is_floating(eqn.invars[0]):
        return "factor"
    if name in _ROOTS and operands[0].reduced:
        return "factor"
    scales = name in MOVES | _ELEMENTWISE or name == "reduce_sum"
    return "factor" if scales and made and all(v.kind == "factor" for v in made) else "data"


def _is_floating(atom: Any) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.inexact)


def _only(several: Any) -> frozenset[Path]:
    """Return the set that all share, or an empty one."""
    distinct = set(several)
    return distinct.pop() if len(distinct) == 1 else frozenset()


def _positive(name: str, operands: Sequence[Value]) -> tuple[_Origin, bool] | None:
    if name in MOVES and len(operands) == 1:
        return operands[0].positive
    if name in ("gt", "ge", "lt", "le"):
        (a, b), greater = operands, name in ("gt", "ge")
        for value, other, says in ((a, b, greater), (b, a, not greater)):
            if other.zero and value.origin is not None:
                return value.origin, says
    return None
