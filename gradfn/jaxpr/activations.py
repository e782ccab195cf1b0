"""Recognize activation functions by what they compute.

jax and the frameworks write an activation function as a dozen equations and name few of them. So each value has a
`Sample`: its values at a few points, as a function of the value that it was computed from (its root). An equation on
sampled values is evaluated in NumPy at those points, and the result is compared with every known activation
function. However a `gelu` is written, its values are those of a `gelu`.

The points are a small array of the root's rank, so that reductions along an axis can be evaluated too, as in a
softmax. A masked softmax has the mask as a second root.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr
from jax.typing import DTypeLike
from jaxtyping import PyTree

from gradfn.jaxpr.dataflow import Dataflow
from gradfn.jaxpr.interpreter import Path, bodies, operation

# The number of points at which a root of rank 0 is sampled; each further axis longer than 1 doubles it.
POINTS = 16
LARGEST = 9.0
MAX_RANK = 6


class Sample(NamedTuple):
    """A value at some points, as a function of its `root`; `values` is None for the root itself.

    `values` is `[points, ...]`, with an axis of size 1 or 2 for each of the value's axes: 1 where it is constant along
    the axis. `mask` is the boolean value, if any, that selected between operands. A constant has neither root nor
    mask. `anchor` is the root's site, if it has one.
    """

    root: Hashable = None
    mask: Hashable = None
    values: np.ndarray | None = None
    anchor: Any = None


def fresh(key: Hashable, aval: Any, anchor: Any = None) -> Sample | None:
    """Return the sample of an unknown value: it is a root or, if it is boolean, a mask."""
    shape = getattr(aval, "shape", None)
    if shape is None or len(shape) > MAX_RANK or 0 in shape:
        return None
    sort = _sort(aval.dtype)
    if sort == "bool":
        return Sample(mask=key)
    return Sample(root=key, anchor=anchor) if sort == "floating" else None


def constant(value: PyTree) -> Sample | None:
    """Return the sample of a known number; None for an array or a traced number."""
    if isinstance(value, jax.core.Tracer) or np.ndim(value) != 0:
        return None
    sort = _sort(value.dtype if hasattr(value, "dtype") else np.result_type(value))
    return Sample(values=np.asarray(value, np.float64).reshape(1)) if sort else None


@functools.cache
def _sort(dtype: DTypeLike) -> str:
    sorts = {"floating": jnp.floating, "bool": jnp.bool_, "integer": jnp.integer}
    return next((name for name, sort in sorts.items() if jnp.issubdtype(dtype, sort)), "")


def is_constant(sample: Sample | None) -> bool:
    """Tell whether a sample is that of a known number."""
    return sample is not None and sample.root is None and sample.mask is None


def is_zero(sample: Sample | None) -> bool:
    """Tell whether a sample is that of the number 0."""
    return is_constant(sample) and not np.any(sample.values)  # type: ignore[union-attr]


def simulate(eqn: Any, operands: Sequence[Sample | None]) -> Sample | None:
    """Return the sample of an equation's output; None where it is not a function of one root."""
    if len(eqn.outvars) != 1 or any(sample is None for sample in operands):
        return None
    known = [sample for sample in operands if sample is not None]
    roots = {s.root for s in known} - {None}
    masks = {s.mask for s in known} - {None}
    if len(roots) > 1 or len(masks) > 1:
        return None
    _, inner = bodies(eqn, enter_custom=True)
    rule = _RULES.get(operation(eqn))
    if rule is None or inner:
        return None
    arrays = [_array(s, atom.aval) for s, atom in zip(known, eqn.invars, strict=True)]
    values = rule(eqn, arrays)
    if values is None:
        return None
    anchor = next((s.anchor for s in known if s.root is not None), None)
    return Sample(next(iter(roots), None), next(iter(masks), None), values, anchor)


class _Simulation(Dataflow[Sample | None]):
    """Computes the samples of the values inside a function."""

    enter_custom = True

    def constant(self, value: PyTree) -> Sample | None:
        return constant(value)

    def enters(self, path: Path, kind: str, eqn: Any, operands: list[Sample | None]) -> bool:
        return kind in ("jit", "custom")

    def equation(self, path: Path, eqn: Any, operands: list[Sample | None]) -> list[Sample | None]:
        return [simulate(eqn, operands)] * len(eqn.outvars)


def simulate_body(
    jaxpr: Jaxpr, consts: Sequence[PyTree], operands: Sequence[Sample | None]
) -> list[Sample | None]:
    """Return the samples of the outputs of a function, given those of its inputs."""
    return _Simulation().body(jaxpr, list(map(constant, consts)), operands)


def recognize(sample: Sample | None, aval: Any) -> str:
    """Return the activation function whose values a sample has, else an empty string."""
    if sample is None or sample.values is None or sample.root is None:
        return ""
    shape = _sampled_shape(aval.shape)
    if _sort(aval.dtype) != "floating" or sample.values.shape != shape:
        return ""
    kinds, table = _masked(shape) if sample.mask is not None else _known(shape)
    values = sample.values.reshape(-1)
    # Constants of a half-precision function are rounded.
    relative = _tolerance(aval.dtype)
    # Comparing one point first spares nearly all of the others.
    for k in np.flatnonzero(_are_close(values[0], table[:, 0], relative)):
        if np.all(_are_close(values, table[k], relative)):
            return kinds[k]
    return "" if sample.mask is not None else _family(values, shape, relative)


def _are_close(a: np.ndarray, b: np.ndarray, relative: float) -> np.ndarray:
    return (np.abs(a - b) <= relative * (np.abs(b) + 0.1)) | (a == b)


@functools.cache
def _tolerance(dtype: DTypeLike) -> float:
    return max(1e-4, 2 * float(jnp.finfo(dtype).eps))


def _sampled_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return (POINTS, *[min(n, 2) for n in shape])


@functools.cache
def _points(shape: tuple[int, ...]) -> np.ndarray:
    """Return the points where a root is sampled: from -9 to 9, with both signs along every axis."""
    n = math.prod(shape)
    # Without 0.
    x = np.linspace(-LARGEST, LARGEST, n) + 0.01 * np.sin(np.arange(n))
    return np.random.default_rng(0).permutation(x).reshape(shape)


@functools.cache
def _mask(shape: tuple[int, ...]) -> np.ndarray:
    """Return a mask that keeps at least one entry along every axis."""
    index = np.indices(shape)
    return ~(np.all(index[1:] == np.reshape([n - 1 for n in shape[1:]], (-1, *[1] * len(shape))), axis=0)) | (
        index[0] % 2 == 0
    )


def _array(sample: Sample, aval: Any) -> np.ndarray:
    if sample.values is not None:
        return sample.values
    shape = _sampled_shape(aval.shape)
    return _points(shape) if sample.root is not None else _mask(shape)


def _softmax(x: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    e = np.exp(x - np.max(x, axis, keepdims=True))
    return e / np.sum(e, axis, keepdims=True)


def _erf(x: np.ndarray) -> np.ndarray:
    return np.reshape([math.erf(v) for v in np.ravel(x)], np.shape(x))


def _erfc(x: np.ndarray) -> np.ndarray:
    return np.reshape([math.erfc(v) for v in np.ravel(x)], np.shape(x))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _expm1(x: np.ndarray) -> np.ndarray:
    return np.expm1(np.minimum(x, 0))


_FUNCTIONS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], ...]] = {
    "relu": (lambda x: np.maximum(x, 0),),
    "relu6": (lambda x: np.clip(x, 0, 6),),
    "sigmoid": (_sigmoid,),
    "tanh": (np.tanh,),
    "gelu": (
        lambda x: x * 0.5 * _erfc(-x / math.sqrt(2)),
        lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "quick_gelu": (lambda x: x * _sigmoid(1.702 * x),),
    "silu": (lambda x: x * _sigmoid(x),),
    "elu": (lambda x: np.where(x > 0, x, _expm1(x)),),
    "selu": (lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * _expm1(x)),),
    "softplus": (lambda x: np.logaddexp(x, 0),),
    "log_sigmoid": (lambda x: -np.logaddexp(-x, 0),),
    "soft_sign": (lambda x: x / (1 + np.abs(x)),),
    "hard_tanh": (lambda x: np.clip(x, -1, 1),),
    "hard_sigmoid": (lambda x: np.clip(x + 3, 0, 6) / 6,),
    "hard_silu": (lambda x: x * np.clip(x + 3, 0, 6) / 6,),
    "mish": (lambda x: x * np.tanh(np.logaddexp(x, 0)),),
    "squareplus": (lambda x: (x + np.sqrt(x**2 + 4)) / 2,),
}
# jit and custom_jvp call these by their names. The last two depend on a number that is not looked for.
NAMES = {*_FUNCTIONS, "leaky_relu", "softmax", "log_softmax", "celu"}
WITH_A_SETTING = {"celu", "squareplus"}


Table = tuple[list[str], np.ndarray]


@functools.cache
def _known(shape: tuple[int, ...]) -> Table:
    x = _points(shape)
    with np.errstate(all="ignore"):
        pointwise = [(kind, f(x).reshape(-1)) for kind, several in _FUNCTIONS.items() for f in several]
        return _table([*pointwise, *_softmaxes(x)], x.size)


@functools.cache
def _masked(shape: tuple[int, ...]) -> Table:
    x = _points(shape)
    with np.errstate(all="ignore"):
        return _table(_softmaxes(np.where(_mask(shape), x, -np.inf)), x.size)


def _table(rows: list[tuple[str, np.ndarray]], n: int) -> Table:
    return [kind for kind, _ in rows], np.array([values for _, values in rows]).reshape(-1, n)


def _softmaxes(x: np.ndarray) -> list[tuple[str, np.ndarray]]:
    axes = [axis for axis in range(1, x.ndim) if x.shape[axis] > 1]
    over: list[int | tuple[int, ...]] = [*axes, tuple(axes)] if len(axes) > 1 else [*axes]
    probabilities = [_softmax(x, axis).reshape(-1) for axis in over]
    return [
        *[("softmax", p) for p in probabilities],
        *[("log_softmax", np.log(p)) for p in probabilities],
    ]


def _family(values: np.ndarray, shape: tuple[int, ...], relative: float) -> str:
    """Recognize the functions with a slope or scale on the negative side, of any size."""
    x, negative, k = _sides(shape)
    if not abs(values[k] - x[k]) <= relative * x[k]:
        return ""
    if not np.all(_are_close(values[~negative], x[~negative], relative)):
        return ""
    for kind, curve in (("leaky_relu", x[negative]), ("elu", np.expm1(x[negative]))):
        scales = values[negative] / curve
        if scales[0] > 0 and np.all(_are_close(scales, scales[:1], relative)):
            return "" if kind == "leaky_relu" and scales[0] >= 1 else kind
    return ""


@functools.cache
def _sides(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the points, which of them are negative, and the index of a positive one."""
    x = _points(shape).reshape(-1)
    return x, x < 0, int(np.argmax(x))


Rule = Callable[[PyTree, list[np.ndarray]], np.ndarray | None]


def _pointwise(function: Callable[..., np.ndarray]) -> Rule:
    def rule(eqn: Any, arrays: list[np.ndarray]) -> np.ndarray | None:
        rank = len(eqn.outvars[0].aval.shape)
        # A number combines with arrays of any rank.
        return function(*[a.reshape(-1, *[1] * rank) if a.ndim == 1 else a for a in arrays])

    return rule


def _select(which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    return np.where(which, *cases[::-1]) if len(cases) == 2 else np.choose(which.astype(int), cases)


def _converted(eqn: Any, arrays: list[np.ndarray]) -> np.ndarray | None:
    return arrays[0].astype(np.float64) if _sort(eqn.outvars[0].aval.dtype) == "floating" else None


def _reduced(function: Callable[..., np.ndarray], counts: bool) -> Rule:
    def rule(eqn: Any, arrays: list[np.ndarray]) -> np.ndarray | None:
        shape, axes = eqn.invars[0].aval.shape, eqn.params["axes"]
        if counts and any(arrays[0].shape[a + 1] == 1 < shape[a] for a in axes):
            return None
        return function(arrays[0], axis=tuple(a + 1 for a in axes))

    return rule


def _broadcast(eqn: Any, arrays: list[np.ndarray]) -> np.ndarray | None:
    shape = [1] * len(eqn.params["shape"])
    for axis, n in zip(eqn.params["broadcast_dimensions"], arrays[0].shape[1:], strict=True):
        shape[axis] = n
    return arrays[0].reshape(-1, *shape)


def _reshaped(eqn: Any, arrays: list[np.ndarray]) -> np.ndarray | None:
    """Add and remove axes of size 1; other reshapes are not followed."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if [n for n in before if n != 1] != [n for n in after if n != 1]:
        return None
    sizes = iter([s for s, n in zip(arrays[0].shape[1:], before, strict=True) if n != 1])
    return arrays[0].reshape(-1, *[next(sizes) if n != 1 else 1 for n in after])


def _transposed(eqn: Any, arrays: list[np.ndarray]) -> np.ndarray | None:
    return arrays[0].transpose(0, *[axis + 1 for axis in eqn.params["permutation"]])


def _same(eqn: Any, arrays: list[np.ndarray]) -> np.ndarray | None:
    return arrays[0]


_POINTWISE: dict[str, Callable] = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "max": np.maximum,
    "min": np.minimum,
    "abs": np.abs,
    "sign": np.sign,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "tanh": np.tanh,
    "logistic": _sigmoid,
    "erf": _erf,
    "erfc": _erfc,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "square": np.square,
    "pow": np.power,
    "select_n": _select,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "is_finite": np.isfinite,
}
_RULES: dict[str, Rule] = {
    **{name: _pointwise(function) for name, function in _POINTWISE.items()},
    "integer_pow": lambda eqn, arrays: arrays[0] ** float(eqn.params["y"]),
    "convert_element_type": _converted,
    "reduce_max": _reduced(np.max, counts=False),
    "reduce_min": _reduced(np.min, counts=False),
    "reduce_sum": _reduced(np.sum, counts=True),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshaped,
    "squeeze": _reshaped,
    "expand_dims": _reshaped,
    "transpose": _transposed,
    "stop_gradient": _same,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "reduce_precision": _same,
    "sharding_constraint": _same,
}
