"""Checks of integer arguments, and the import of a library that only some data sets need."""

import importlib
import operator

from jaxtyping import PyTree


def integer(name: str, value: int, low: int, high: int | None = None) -> int:
    """Return `value` as an int from `low` to `high`, or raise an error that names the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})") from None
    if number < low or (high is not None and number > high):
        bounds = f">= {low:,}" if high is None else f"from {low:,} to {high:,}"
        raise ValueError(f"{name} must be an integer {bounds}, got {number:,}")
    return number


def sklearn(module: str) -> PyTree:
    """Import `sklearn.<module>` when it is first needed: it is slow to import, and optional."""
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError("this needs scikit-learn: pip install 'gradfn[run]' (or scikit-learn)") from error
