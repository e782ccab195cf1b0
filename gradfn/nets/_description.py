"""Descriptions of networks: what they were made with, as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gradfn.layers._activations import name_of


def described(net: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the description of a network, see `gf.Net`; None where an activation is a function without a name.

    Args:
        net: the function of gradfn that made it, `"mlp"`.
        settings: its arguments, or the fields of its config.

    >>> import jax, gradfn as gf
    >>> described("mlp", {"sizes": (2, 1), "activation": jax.nn.relu, "output": None})
    {'net': 'mlp', 'settings': {'sizes': [2, 1], 'activation': 'relu', 'output': None}}
    >>> described("mlp", {"sizes": (2, 1), "activation": lambda x: 2 * x}) is None
    True
    """
    names = {name: name_of(value) for name, value in settings.items() if _is_function(value)}
    if None in names.values():
        return None
    return {"net": net, "settings": {name: _plain(value) for name, value in {**settings, **names}.items()}}


def _is_function(value: Any) -> bool:
    """Tell an activation from a dtype, which can be called, too."""
    return callable(value) and not (isinstance(value, type) or hasattr(value, "dtype"))


def _plain(value: Any) -> Any:
    """Return a setting as JSON: sequences as lists, dataclasses as dicts, dtypes by name."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (int, np.integer)):
        return int(value)
    return float(value) if isinstance(value, (float, np.floating)) else jnp.dtype(value).name
