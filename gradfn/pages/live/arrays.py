"""Arrays as JSON, for `assets/core/arrays.js` to decode."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
from numpy.typing import DTypeLike


def encoded(array: np.ndarray, dtype: DTypeLike | None = None) -> dict[str, Any]:
    """Return an array as JSON: `shape`, `dtype` and `data`, base64 of its little-endian bytes.

    Args:
        array: of any shape.
        dtype: what to convert it to: float32, float16, bfloat16, int32, int8 or uint8; by default its own.

    >>> import numpy as np
    >>> encoded(np.array([[1.0, -2.0]]), "float16")
    {'dtype': 'float16', 'shape': [1, 2], 'data': 'ADwAwA=='}
    """
    converted = np.asarray(array).astype(array.dtype if dtype is None else dtype)
    bytes_ = converted.astype(converted.dtype.newbyteorder("<")).tobytes()
    return {
        "dtype": converted.dtype.name,
        "shape": list(converted.shape),
        "data": base64.b64encode(bytes_).decode(),
    }


def as_json(content: dict[str, Any]) -> str:
    """Return JSON that may stand inside of a script element."""
    return json.dumps(content).replace("<", "\\u003c")
