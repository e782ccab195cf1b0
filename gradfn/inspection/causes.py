"""Why an operation returned a NaN or an infinity: a sentence for each common cause."""

# ruff: noqa: SIM905 (lists of words are easier to read as words)

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import PyTree


class Operand(NamedTuple):
    """An operand of an operation, in numbers.

    Attributes:
        dtype: such as `float32`.
        shape: of the array.
        low: smallest finite value (of complex arrays: magnitude); NaN if there is none.
        high: largest finite value.
        zeros: number of elements that are exactly zero.
        nans: number of NaNs.
        infs: number of +inf.
        minus_infs: number of -inf.
        at: the value at the first bad element, if the operation is elementwise.
    """

    dtype: str
    shape: tuple[int, ...]
    low: float
    high: float
    zeros: int
    nans: int
    infs: int
    minus_infs: int
    at: float | None = None

    def may(self, what: str) -> bool:
        """Tell whether the bad element (any element, if it is not known) is of a kind."""
        x = self.at
        if what == "zero":
            return self.zeros > 0 if x is None else x == 0
        if what == "nan":
            return self.nans > 0 if x is None else math.isnan(x)
        if what == "inf":
            return self.infs + self.minus_infs > 0 if x is None else math.isinf(x)
        return self.low < 0 if x is None else x < 0  # negative

    def __str__(self) -> str:
        parts = [f"{self.dtype}{list(self.shape)}"]
        if not math.isnan(self.low):
            parts.append(
                f"from {self.low:.6g} to {self.high:.6g}" if self.low != self.high else f"{self.low:.6g}"
            )
        counts = {"zeros": self.zeros, "NaN": self.nans, "inf": self.infs, "-inf": self.minus_infs}
        parts += [f"{n} {name}" for name, n in counts.items() if n]
        return ", ".join(parts) + ("" if self.at is None or not self.shape else f"; here {self.at:.6g}")


# Elementwise: output element i depends on element i of each operand, or on a scalar.
ELEMENTWISE = frozenset(
    "abs acos acosh add add_any asin asinh atan atan2 atanh cbrt convert_element_type copy cos cosh digamma "
    "div erf erf_inv erfc exp exp2 expm1 integer_pow lgamma log log1p logistic max min mul neg nextafter "
    "one_minus_square pow reduce_precision rem rsqrt select_n sign sin sinh sqrt square sub tan tanh".split()
)
_SUMS = {"reduce_sum", "cumsum", "reduce_window_sum", "scatter-add", "scatter_add", "psum"}
_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general"}
_MATRICES = {"cholesky", "custom_linear_solve", "lu", "triangular_solve"}
_DOMAINS = {
    "acos": "[-1, 1]",
    "acosh": "[1, inf)",
    "asin": "[-1, 1]",
    "atanh": "(-1, 1)",
    "erf_inv": "(-1, 1)",
    "log1p": "(-1, inf)",
}


def explain(operation: str, kind: str, operands: tuple[Operand, ...], dtype: str, slope_of: str = "") -> str:
    """Return a sentence on the likely cause; empty if it is not known.

    Args:
        operation: a primitive's name.
        kind: of the result, `nan` or `inf`.
        operands: of the operation; empty if they were not recorded.
        dtype: of the result.
        slope_of: the function whose derivative the operation computes, if that is known.
    """
    if any(o.may("nan") for o in operands):
        return "an operand is NaN: a constant in the program"
    rule = _NAN if kind == "nan" else _INF
    if slope_of == "sqrt" and operation == "div":
        return (
            "division by 0: the slope of sqrt at 0 is infinite. "
            "Keep its operand above 0: jnp.sqrt(x + 1e-12), or two wheres around it"
        )
    sentence = rule.get(operation)
    if sentence is not None:
        return sentence(operands, dtype)
    if kind == "inf":
        return "an operand was already infinite" if any(o.may("inf") for o in operands) else ""
    if operation in _MATRICES:
        return "a singular matrix, or for cholesky one that is not positive definite"
    if operation in _DOMAINS:
        return f"an operand outside the domain of {operation}, {_DOMAINS[operation]}"
    return ""


def _largest(dtype: str) -> str:
    return f", {float(jnp.finfo(dtype).max):.3g}" if jnp.issubdtype(dtype, jnp.inexact) else ""


def _overflow(operands: tuple[Operand, ...], dtype: str) -> str:
    if any(o.may("inf") for o in operands):
        return "an operand was already infinite"
    return f"overflow: the result is larger than the largest {dtype}{_largest(dtype)}"


def _exp_inf(operands: tuple[Operand, ...], dtype: str) -> str:
    if any(o.may("inf") for o in operands):
        return "an operand was already infinite"
    limit = math.log(float(jnp.finfo(dtype).max))
    top = (
        f", got {operands[0].at if operands[0].at is not None else operands[0].high:.6g}" if operands else ""
    )
    return f"overflow of exp: in {dtype} its operand must be at most {limit:.4g}{top}"


def _div_inf(operands: tuple[Operand, ...], dtype: str) -> str:
    if not operands or operands[-1].may("zero"):
        return "division by 0"
    return _overflow(operands, dtype)


def _div_nan(operands: tuple[Operand, ...], dtype: str) -> str:
    if operands and operands[-1].may("inf"):
        return "inf / inf"
    return "0 / 0" if not operands or operands[-1].may("zero") else ""


def _sub_nan(operands: tuple[Operand, ...], dtype: str) -> str:
    return (
        "inf - inf. In a softmax: a row that is masked with -inf everywhere has a maximum of -inf; "
        "let each row keep one entry, or mask with a large finite number"
    )


def _sqrt_nan(operands: tuple[Operand, ...], dtype: str) -> str:
    return "the square root of a negative number"


def _log_nan(operands: tuple[Operand, ...], dtype: str) -> str:
    return "the logarithm of a negative number"


def _log_inf(operands: tuple[Operand, ...], dtype: str) -> str:
    if operands and not operands[0].may("zero"):
        return "an operand was already infinite"
    return (
        "log of 0 is -inf. Keep its operand above 0: jnp.log(jnp.maximum(x, 1e-12)), or work with log_softmax"
    )


def _pow_inf(operands: tuple[Operand, ...], dtype: str) -> str:
    if operands and operands[0].may("zero"):
        return "0 to a negative power (the slope of x**p at 0 is infinite for p below 1)"
    return _overflow(operands, dtype)


def _pow_nan(operands: tuple[Operand, ...], dtype: str) -> str:
    return "a negative number to a non-integer power" if operands and operands[0].may("negative") else ""


def _cast_inf(operands: tuple[Operand, ...], dtype: str) -> str:
    return _overflow(operands, dtype)


def _always(sentence: str) -> PyTree:
    return lambda operands, dtype: sentence


_NAN = {
    "div": _div_nan,
    "mul": _always("0 × inf"),
    "sub": _sub_nan,
    "add": _always("inf - inf"),
    "add_any": _always("inf - inf"),
    "sqrt": _sqrt_nan,
    "rsqrt": _sqrt_nan,
    "log": _log_nan,
    "pow": _pow_nan,
    "sin": _always("the sine of an infinity"),
    "cos": _always("the cosine of an infinity"),
    "rem": _always("the remainder of a division by 0, or of an infinity"),
    **dict.fromkeys(_SUMS, _always("inf - inf inside a sum")),
    **dict.fromkeys(_PRODUCTS, _always("0 × inf, or inf - inf, inside a sum of products")),
}
_INF = {
    "div": _div_inf,
    "rsqrt": _always("1 / sqrt(0)"),
    "log": _log_inf,
    "log1p": _always("log1p of -1 is -inf"),
    "pow": _pow_inf,
    "integer_pow": _pow_inf,
    "convert_element_type": _cast_inf,
    **dict.fromkeys(("exp", "exp2", "expm1", "sinh", "cosh"), _exp_inf),
    **dict.fromkeys(("mul", "add", "sub", "add_any", "square", *_SUMS, *_PRODUCTS), _overflow),
}
