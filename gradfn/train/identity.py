"""The identity of a run, as text in its checkpoint: its data, its loss, and its initial parameters.

A run that resumes must be the run that stopped; otherwise the result of one would be taken for that of the other. What
is compared:

- *data*: shape, dtype and a hash of each array's bytes (of evenly spaced rows, at most 16 MiB). Of data made by a
  function: its program, and the arrays in it. Of data made on the host: the first batch.
- *loss*: the program that it traces to, and the arrays in that; so a loss may be moved and renamed, but not changed.
  How arrays are split over devices is not compared: a run may be resumed on others.
- *start*: a few values of each parameter, to three digits, since CPUs of different kinds round differently.

Programs depend on the version of JAX and on the platform, and are compared only where both are the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, TypedDict

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import PyTree

from gradfn.core.attention_form import requested
from gradfn.core.params import named_leaves
from gradfn.flatten import Loss
from gradfn.jaxpr.program import as_written
from gradfn.train.checkpoint import Number
from gradfn.train.model import batch_loss
from gradfn.train.processes import gathered
from gradfn.train.source import Source
from gradfn.train.step import TrainState, step_keywords

# The most bytes of an array that are hashed.
HASHED = 1 << 24
# How many values of each parameter are stored.
SAMPLES = 4
# The tolerance, relative to the largest of them.
CLOSE = 1e-3


class Programs(TypedDict):
    """Hashes of the programs of a run, and the version of JAX that traced them."""

    jax: str
    batch: str
    loss: str


class Identity(TypedDict):
    """The identity of a run; data and parameters by path."""

    data: dict[str, str]
    start: dict[str, Sequence[Number]]
    programs: Programs


def identity(state: TrainState, source: Source, loss: Loss) -> Identity:
    """Return the identity of a run that starts from a state."""
    order = source.sample
    row, key = np.int32(0), jax.random.key(0)
    batch = jax.eval_shape(source.batch, source.arrays, order, row, key)
    return {
        "data": {name or "data": content(leaf) for name, leaf in named_leaves(source.content)},
        "start": {name or "params": samples(leaf) for name, leaf in named_leaves(state.params)},
        "programs": {
            "jax": f"{jax.__version__} on {jax.default_backend()}",
            "batch": program(source.batch, source.arrays, order, row, key),
            "loss": program(batch_loss(loss, state.rest), state.params, batch, **step_keywords(loss, state)),
        },
    }


def difference(was: Identity, now: Identity) -> str | None:
    """Return a description of the first difference between two runs; None if there is none."""
    for name in dict.fromkeys((*was["data"], *now["data"])):
        before, after = was["data"].get(name, "nothing"), now["data"].get(name, "nothing")
        if before != after:
            return f"data: expected {name} {before}, got {after}"
    for name, values in now["start"].items():
        expected = was["start"].get(name, [])
        # JSON has no NaN and no infinities: they are stored as text.
        old, new = (np.array([float(value) for value in some]) for some in (expected, values))
        margin = CLOSE * np.max(np.abs(old[np.isfinite(old)]), initial=0)
        if old.shape != new.shape or not np.allclose(old, new, rtol=0, atol=margin, equal_nan=True):
            return f"params: expected {name} to start from {expected}, got {values}"
    programs, others = was["programs"], now["programs"]
    if programs["jax"] == others["jax"] and programs["batch"] != others["batch"]:
        return "data: batches are computed differently than when the run started"
    if programs["jax"] == others["jax"] and programs["loss"] != others["loss"]:
        return "loss: it computes something different than when the run started"
    return None


def content(array: PyTree) -> str:
    """Return an array's dtype, shape and a hash of its bytes, of evenly spaced rows if it is large.

    >>> content(np.arange(6).reshape(2, 3))
    'int64[2, 3] 5f7424ae9fade42d'
    """
    array = gathered(array) if hasattr(array, "dtype") else np.asarray(array)  # a Python number, in a Partial
    kind = f"{array.dtype}{list(array.shape)}"
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.nbytes > HASHED and array.ndim:
        n = max(1, array.shape[0] * HASHED // array.nbytes)
        array = array[np.linspace(0, array.shape[0] - 1, n).astype(np.int64)]
    data = np.ascontiguousarray(np.asarray(array)).tobytes()
    return f"{kind} {hashlib.blake2b(data, digest_size=8).hexdigest()}"


def samples(array: PyTree) -> list[float]:
    """Return a few values of an array, evenly spaced.

    >>> samples(np.arange(6.0).reshape(2, 3))
    [0.0, 1.0, 3.0, 5.0]
    """
    flat = np.asarray(gathered(array)).reshape(-1)  # [size]
    values = flat[np.linspace(0, flat.size - 1, min(flat.size, SAMPLES)).astype(np.int64)]
    parts = (values.real, values.imag) if np.iscomplexobj(values) else (values,)
    return [float(f"{value:.6g}") for part in parts for value in part.astype(np.float64)]


def program(f: Callable, *args: PyTree, **kwargs: PyTree) -> str:
    """Return a hash of a function's program: its equations, and the arrays that it closes over."""
    # The same on every device.
    with as_written(True), requested("plain"):
        traced = jax.make_jaxpr(f)(*args, **kwargs)
    lines = hashlib.blake2b(digest_size=8)
    for line in _lines(traced):
        lines.update(line.encode())
    return lines.hexdigest()


def _lines(traced: ClosedJaxpr | Jaxpr) -> Iterator[str]:
    """Yield a line per constant, equation and result, with variables numbered, without names and source lines."""
    jaxpr, consts = (traced.jaxpr, traced.consts) if isinstance(traced, ClosedJaxpr) else (traced, ())
    numbers: dict[PyTree, int] = {}

    def text(atom: Any) -> str:
        if isinstance(atom, Literal):
            return f"{np.asarray(atom.val).tolist()}:{_kind(atom)}"
        return f"{numbers.setdefault(atom, len(numbers))}:{_kind(atom)}"

    yield from map(content, consts)
    yield " ".join(map(text, (*jaxpr.constvars, *jaxpr.invars)))
    for eqn in jaxpr.eqns:
        params = eqn.params | {name: None for name in ("sharding", "out_sharding") if name in eqn.params}
        settings = {name: value for name, value in params.items() if name != "name" and _plain(value)}
        inputs, outputs = (" ".join(map(text, atoms)) for atoms in (eqn.invars, eqn.outvars))
        yield f"{eqn.primitive.name} {sorted(settings.items())} {inputs} = {outputs}"
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(inner, (ClosedJaxpr, Jaxpr)):
                    yield from _lines(inner)
    yield " ".join(map(text, jaxpr.outvars))


def _kind(atom: Any) -> str:
    """Return the dtype and shape of a variable, such as `float32[16,8]`, without axes of a mesh, `[16@data,8]`."""
    return re.sub(r"@[^,\]]*", "", atom.aval.str_short())


def _plain(value: PyTree) -> bool:
    """Return whether the text of a parameter is the same in every process: no functions, no addresses, no sets."""
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, np.dtype, Enum))
