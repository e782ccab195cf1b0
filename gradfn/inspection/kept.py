"""The inputs of steps that were not finite, kept on the host until their report is read.

The step itself only tests whether its value and gradients are finite. If they are not, a callback copies its inputs
to the host (`Kept.take`) and returns a *ticket*, two integers: which guard keeps the inputs, and the number of the
failure. The search runs when the report is read.
"""

from __future__ import annotations

import functools
import secrets
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int, PyTree

from gradfn.core.devices import on_several_devices
from gradfn.inspection.event import NanReport
from gradfn.inspection.origin import origin_of
from gradfn.inspection.search import Found
from gradfn.jaxpr import trace_without_probabilities
from gradfn.jaxpr.varying import manual_axes

# The number of failures whose inputs a guard keeps: the first ones, and the latest.
MOST = 4
NO_TICKET = np.array([-1, -1], np.int32)
NOTHING = Found(np.full([3, 1], -1, np.int32), np.zeros([0, 2], bool), (), ())  # type: ignore[arg-type]


class Kept:
    """The failures of one guarded function. Threads may add some at the same time.

    All are equal to each other: records of two guarded functions may be the results of two branches.
    """

    def __init__(self) -> None:
        self.id = secrets.randbits(31)
        self.failures: dict[int, Failure] = {}
        self.count = 0
        self.lock = threading.Lock()
        _GUARDS[self.id] = self

    def take(self, call: Call, bad: PyTree, *values: PyTree) -> np.ndarray:
        """Copy the inputs of a call if it failed; return the ticket for them."""
        if not bad:
            return NO_TICKET
        failure = Failure(call, [np.array(value) for value in values])
        with self.lock:
            if len(self.failures) == MOST:
                read = [n for n, failure in self.failures.items() if failure.result is not None]
                del self.failures[read[0] if read else max(self.failures)]
            self.failures[self.count] = failure
            self.count += 1
            return np.array([self.id, self.count - 1], np.int32)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kept)

    def __hash__(self) -> int:
        return hash(Kept)

    def __reduce__(self) -> tuple[Callable, tuple[int]]:
        return _guard, (self.id,)


_GUARDS: weakref.WeakValueDictionary[int, Kept] = weakref.WeakValueDictionary()


def _guard(id: int) -> Kept:
    """Return the guard of an id, a new one if it belongs to another process: the ticket then says so."""
    return _GUARDS.get(id) or Kept()


class Failure:
    """A call that failed; its inputs are given up once they have been searched."""

    def __init__(self, call: Call, values: list[np.ndarray]) -> None:
        self.call, self.values = call, values
        self.result: tuple[NanReport, Found] | None = None
        self.lock = threading.Lock()

    def search(self) -> tuple[NanReport, Found]:
        """Return the report and what was found; the search runs once."""
        with self.lock:
            if self.result is None:
                self.result = self.call.search(self.values)
                self.values = []
            return self.result


@functools.partial(jax.tree_util.register_dataclass, data_fields=["number"], meta_fields=["kept"])
@dataclass(frozen=True)
class Ticket:
    """Stands for what a search will find.

    Attributes:
        number: `[2]` int32: the id of the guard, the number of the failure; -1 where the step was finite.
        kept: of the guard (static).
    """

    number: Int[Array, 2]
    kept: Kept

    def search(self) -> tuple[NanReport, Found]:
        """Return the report and what was found; a note in the report says why there was no search."""
        guard, n = (int(i) for i in np.asarray(self.number))
        nothing = NanReport(np.nan, (), None, None)
        if n < 0:
            return nothing, NOTHING
        kept = _GUARDS.get(guard)
        if kept is not None and (failure := kept.failures.get(n)) is not None:
            return failure.search()
        if kept is None:
            note = "its inputs are not known: the record is from another process, or its guarded function is gone"
        else:
            note = f"its inputs were not kept: of {kept.count} failures those of the first {MOST - 1} and of the latest"
        return replace(nothing, note=f"{note}. gf.nan_origin finds the origin, given the inputs"), NOTHING


# Stands for a value that is known only when the step runs.
_SENT = object()


class Call:
    """A traced call of a function, which is repeated when the values of its arguments are known.

    Attributes:
        sent: those values that only the step knows; what the function closes over is among them.
    """

    def __init__(self, f: Callable, args: Sequence[PyTree], kwargs: Mapping[str, Any]) -> None:
        program = trace_without_probabilities(f, *args, **kwargs)
        leaves, self.structure = jax.tree.flatten((args, kwargs))
        values = [*leaves, *program.jaxpr.consts]
        # Outside of jit, arrays may be donated before the report is read.
        kind = jax.core.Tracer if any(isinstance(x, jax.core.Tracer) for x in values) else jax.Array
        self.f, self.jaxpr, self.is_array = f, program.jaxpr.jaxpr, program.is_array
        self.sent = [x for x in values if isinstance(x, kind)]
        self.known = [_SENT if isinstance(x, kind) else x for x in values]
        self.key_impls = [jax.random.key_impl(x) if _is_key(x) else None for x in self.sent]
        self.x64 = jnp.result_type(float) == jnp.float64

    def search(self, sent: Sequence[np.ndarray]) -> tuple[NanReport, Found]:
        """Search the call for the first NaN and the first infinity, given what was sent."""
        with jax.enable_x64(self.x64):
            rest = iter(
                x if impl is None else jax.random.wrap_key_data(x, impl=impl)
                for x, impl in zip(map(jnp.asarray, sent), self.key_impls, strict=True)
            )
            values = [next(rest) if x is _SENT else x for x in self.known]
            n = len(self.is_array)
            args, kwargs = jax.tree.unflatten(self.structure, values[:n])

            @functools.wraps(self.f)
            def again(*args: PyTree, **kwargs: PyTree) -> jax.Array:
                leaves = zip(jax.tree.leaves((args, kwargs)), self.is_array, strict=True)
                arrays = [leaf for leaf, is_array in leaves if is_array]
                return jax.core.eval_jaxpr(self.jaxpr, values[n:], *arrays)[0]

            return origin_of(again, 0, args, kwargs)


def can_keep(call: Call) -> bool:
    """Tell whether the inputs of a call can be sent to the host from where it is traced.

    Not from inside a `jax.shard_map`, whose devices have a part each, from several devices or processes, nor from a
    program that is exported.
    """
    return not (
        manual_axes()
        or any(map(on_several_devices, call.sent))
        or jax.process_count() > 1
        or jax.default_backend() not in ("cpu", "gpu", "tpu")
        or _is_exported()
        or not all(map(_can_be_sent, call.sent))
    )


def _is_exported() -> bool:
    """Tell whether `jax.export` is tracing, which refuses callbacks. jax has no function that tells."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("jax._src.export"):
            return True
        frame = frame.f_back
    return False


def _is_key(x: PyTree) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _can_be_sent(x: PyTree) -> bool:
    # A mutable array (jax.new_ref) cannot.
    if hasattr(jax.typeof(x), "inner_aval") or (
        jnp.issubdtype(x.dtype, jax.dtypes.extended) and not _is_key(x)
    ):
        return False
    # Nor can two elements that share a byte.
    return not any(x.dtype.name.startswith(narrow) for narrow in ("int2", "int4", "uint2", "uint4", "float4"))


def ticket(kept: Kept, call: Call, bad: Bool[Array, ""]) -> Ticket:
    """Return a ticket; if the call failed, its inputs are copied to the host."""
    raw = [jax.random.key_data(x) if _is_key(x) else x for x in call.sent]
    if not isinstance(bad, jax.core.Tracer):
        return Ticket(jnp.asarray(kept.take(call, bad, *raw)), kept)

    def send(bad: jax.Array, values: Sequence[PyTree]) -> jax.Array:
        shape = jax.ShapeDtypeStruct((2,), jnp.int32)
        take = functools.partial(kept.take, call)
        return jax.pure_callback(take, shape, bad, *values, vmap_method="sequential")

    return Ticket(_if_bad(send)(bad, raw), kept)


def _if_bad(send: Callable) -> Callable:
    """Return `(bad, values) -> tickets` that calls `send`, of the same arguments, where anything is bad.

    `bad` is a boolean `[...]`, or a batch of them: under `vmap` a `cond` would become a selection, and call `send`
    always. The numbers have no derivative, so they may be differentiated.
    """

    @custom_vmap
    def under_vmap(bad: jax.Array, values: Sequence[PyTree]) -> jax.Array:
        none = lambda bad, values: jnp.full([*bad.shape, 2], NO_TICKET)  # noqa: E731
        return lax.cond(jnp.any(bad), send, none, bad, values)

    @under_vmap.def_vmap
    def batch(n: int, batched: Any, bad: jax.Array, values: Sequence[PyTree]) -> tuple[jax.Array, bool]:
        bad = bad if batched[0] else jnp.broadcast_to(bad, [n, *bad.shape])

        def send_rows(bad: jax.Array, values: Sequence[PyTree]) -> jax.Array:
            def send_row(row: PyTree) -> jax.Array:
                bad, rows = row[0], iter(row[1])
                return send(
                    bad, [next(rows) if is_row else x for x, is_row in zip(values, batched[1], strict=True)]
                )

            return lax.map(
                send_row, (bad, [x for x, is_row in zip(values, batched[1], strict=True) if is_row])
            )

        return _if_bad(send_rows)(bad, values), True

    numbers = jax.custom_jvp(under_vmap)

    @numbers.defjvp
    def no_derivative(primals: PyTree, tangents: PyTree) -> tuple[jax.Array, np.ndarray]:
        out = numbers(*primals)
        return out, np.zeros(out.shape, jax.dtypes.float0)

    return numbers
