"""`gf.nan_guard`: value and gradients, and a record that tells where a NaN or an infinity came from.

The search does not belong to the step, which it would make several times as long to compile. The step keeps the
inputs of a failure on the host, and the search runs when the report is read (`kept`). Where that is impossible, the
search is compiled into the step behind a `lax.cond`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from gradfn.core.signature import transform_of
from gradfn.inspection.event import NanReport
from gradfn.inspection.kept import NOTHING, Call, Kept, Ticket, can_keep, ticket
from gradfn.inspection.origin import report_of, traced
from gradfn.inspection.search import Found, Spot, nonfinite, search, spots_of
from gradfn.jaxpr.call import scalar
from gradfn.jaxpr.program import params_first
from gradfn.jaxpr.varying import any_device, zeros


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "nonfinite_grads", "search"],
    meta_fields=["leaf_names"],
)
@dataclass(frozen=True)
class NanRecord:
    """The record of `gf.nan_guard` inside `jit`, a few numbers; `report()` or `print` describes them.

    Stacked by a `lax.scan` over steps, it reports on the first step that was not finite. So do `keys`,
    `nonfinite_inputs`, `spots` and `input_names`, which need the search.

    Attributes:
        value: the loss.
        nonfinite_grads: `[leaves]` booleans.
        search: a ticket for the inputs of the step, which are searched when the report is read, or what a search
            within the program found.
        leaf_names: names of the differentiated leaves (static).
    """

    value: Float[Array, ""]
    nonfinite_grads: Bool[Array, " leaves"]
    search: Ticket | Found
    leaf_names: tuple[str, ...]

    @property
    def ok(self) -> PyTree:
        """Whether value and gradients are finite, a boolean array (one per step where steps are stacked)."""
        return jnp.isfinite(self.value) & ~jnp.any(self.nonfinite_grads, axis=-1)

    def report(self) -> NanReport:
        """Return the report, that of the first step that was not finite if steps are stacked. Not inside `jit`."""
        first = self._first()
        if isinstance(first.search, Found):
            return report_of(first.value, first.nonfinite_grads, first.leaf_names, first.search, {})
        known = report_of(first.value, first.nonfinite_grads, first.leaf_names, NOTHING, {})
        found, _ = first.search.search()
        return replace(found, value=known.value, nonfinite_grads=known.nonfinite_grads)

    @property
    def keys(self) -> PyTree:
        """`[3, levels]` int32: the keys of the first NaN, infinity and computed infinity; -1 for none."""
        return self._found().keys

    @property
    def nonfinite_inputs(self) -> PyTree:
        """`[inputs, 2]` booleans: has a NaN, has an infinity."""
        return self._found().nonfinite_inputs

    @property
    def spots(self) -> tuple[Spot, ...]:
        """The equations."""
        return self._found().spots

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs."""
        return self._found().input_names

    def _found(self) -> Found:
        if isinstance(self.search, Found):
            return self.search
        if self._is_traced():
            raise TypeError(
                "NanRecord: what needs the search is known outside of jit only: return the record from it"
            )
        return self._first().search.search()[1]  # type: ignore[union-attr]

    def _first(self) -> "NanRecord":
        """Return the record on the host, that of the first step that was not finite if steps are stacked."""
        host = jax.device_get(self)
        if not np.ndim(host.value):
            return host
        # The first False; without one, the first step.
        step = np.unravel_index(np.argmin(self.ok), np.shape(host.value))
        return jax.tree.map(lambda x: x[step], host)

    def _is_traced(self) -> bool:
        return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self))

    def __str__(self) -> str:
        if self._is_traced():
            return "NanRecord, being traced: return it from jit to print it"
        return str(self.report())

    __repr__ = __str__


def nan_guard(f: Callable) -> Callable[..., tuple[PyTree, PyTree, NanRecord]]:
    """Return a function that computes value and gradients like `jax.value_and_grad`, and where a NaN came from.

    For use inside a compiled training step. While value and gradients are finite, it costs only that test. If they are
    not, the inputs of the step are copied to the host, and `report()` runs the step again, equation by equation
    (`gf.nan_origin`). A guarded function keeps the inputs of its first three failures and of the latest, each as
    large as parameters and batch, until their report is read.

    In a `jax.shard_map`, in `jax.export`, and on several devices or processes, the search is compiled into the step
    instead, which then takes three to five times as long to compile.

    Args:
        f: any JAX function `(params, *args) -> scalar` or `-> (scalar, aux)`.

    Returns:
        `(params, *args) -> (value, grads, record)`: value is `(scalar, aux)` if the function returns that; grads has
        the tree of the parameters (None for leaves that are not floating); the record is a `NanRecord`: print it, or
        call its `report()`, outside `jit`, in the same process.

    Raises:
        TypeError: a function that does not return a floating scalar.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gradfn.inspection import nan_guard
        >>> step = jax.jit(nan_guard(lambda w, x: jnp.sum(jnp.log(w * x))))
        >>> value, grads, record = step(jnp.ones(2), jnp.array([1.0, 0.0]))
        >>> record.report().inf.operation
        'log'
        >>> bool(step(jnp.ones(2), jnp.array([1.0, 2.0]))[2].ok)
        True
    """
    kept = Kept()

    @transform_of(f, "nan_guard", own=0)
    def guarded(*args: PyTree, **kwargs: PyTree) -> tuple[PyTree, PyTree, NanRecord]:
        """Return the value, the gradients, and a record of the first NaN and the first infinity."""
        args, kwargs = params_first(f, args, kwargs, "nan_guard")
        of = scalar(f, args, kwargs, (0,), "nan_guard")
        (value, aux), grads = jax.value_and_grad(of.call, has_aux=True)(of.leaves.values)
        call = Call(f, args, kwargs)
        found: Ticket | Found
        if can_keep(call):
            bad_grads = ~_are_finite(grads)
            found = ticket(kept, call, ~jnp.isfinite(value) | jnp.any(bad_grads))
        else:
            bad_grads, found = _searched_if_bad(f, args, kwargs, value, grads)
        record = NanRecord(value, bad_grads, found, of.names)
        return (value if aux is None else (value, aux)), of.leaves.tree(grads)[0], record

    return guarded


# Arrays of this many elements are reduced to one row before they are stacked with others.
_LARGE = 1 << 14


def _are_finite(arrays: Sequence[jax.Array]) -> jax.Array:
    """Return which arrays are finite, `[arrays]` booleans.

    Rows of one length are tested together: XLA compiles three kernels for each reduction, which for a network of many
    leaves would take a third of the time that compiling its gradient takes.
    """
    rows = [_row(x) for x in arrays]
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((row.size, row.dtype), []).append(i)
    flags = [
        jnp.all(jnp.isfinite(jnp.stack([rows[i] for i in group])), axis=1)  # [group, n] -> [group]
        for group in groups.values()
    ]
    order = np.argsort([i for group in groups.values() for i in group])
    return jnp.concatenate(flags)[order]


def _row(x: jax.Array) -> jax.Array:
    """Return a vector that is finite if an array is: 0 times an infinity is NaN, and zeros do not overflow."""
    if x.size < _LARGE:
        return x.reshape(-1)
    x = x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1)  # [..., n] -> [rows, n]
    # On CPUs a product reads a matrix faster than a sum; with two rows it is a call of a library, where XLA compiles a
    # kernel for each product of one row. Accelerators may round what is close to overflow to infinity.
    if jax.default_backend() == "cpu" and x.dtype in (jnp.float32, jnp.float64):
        return (jnp.zeros([2, len(x)], x.dtype) @ x)[0]  # [2, rows] @ [rows, n] -> [n]
    return jnp.sum(x * 0, axis=0)


def _searched_if_bad(
    f: Callable,
    args: Sequence[PyTree],
    kwargs: Mapping[str, Any],
    value: jax.Array,
    grads: Sequence[jax.Array],
) -> tuple[jax.Array, Found]:
    """Return which gradients are not finite, and what a search within the program found."""
    program = traced(f, 0, args, kwargs, "nan_guard")
    spots = spots_of(program)

    def searched(inputs: Sequence[PyTree]) -> Found:
        return search(program, inputs, spots)[0]

    nothing = zeros(jax.eval_shape(searched, program.inputs))
    nothing = replace(nothing, keys=nothing.keys - 1)
    bad_grads = nonfinite(grads)
    bad = any_device(~jnp.isfinite(value) | jnp.any(bad_grads))
    return bad_grads, lax.cond(bad, searched, lambda _: nothing, program.inputs)
