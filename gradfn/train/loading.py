"""Batches that the host makes: in groups, each of which is made in a thread while the device works on the one before.

A `Reader` makes single batches: a pure function of the step, or a `Loader`, which iterates over a data loader and
remembers where it is. `Groups` stacks the batches of several steps, which go to the device together.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol, TypedDict

import jax
import numpy as np
from jaxtyping import PyTree

from gradfn.core.params import named_leaves
from gradfn.data._arrays import as_arrays, checked

# How many steps, bytes and seconds of batches are made at a time at most.
HOST_STEPS, HOST_BYTES, HOST_SECONDS = 64, 1 << 24, 0.5
# A data set that repeats without end may say that it has this many batches, or more.
FINITE = 1 << 40


class Position(TypedDict):
    """Where a reader is before a step, as a checkpoint holds it.

    Attributes:
        group: steps per group.
        step: the step whose batch comes next.
        epoch: how often the loader was iterated over before.
        offset: how many batches of this epoch were read.
        state: the loader's own state; None where JSON cannot hold it.
    """

    group: int
    step: int
    epoch: int
    offset: int
    state: dict[str, Any] | None


class Reader(Protocol):
    """Makes the batches of steps, one after the other."""

    def go(self, step: int) -> None:
        """Make the batch of this step the next one."""

    def read(self, step: int) -> PyTree:
        """Return the batch of a step, the next one; raise `EndedError` where there is none."""

    def position(self, group: int) -> Position | None:
        """Return where the reader is; None where a step's number says all."""


Batches = Iterable[PyTree] | Callable[[int], Iterable[PyTree]]


class EndedError(Exception):
    """The data have no batch for this step."""


class EachStep:
    """Reads from a pure function of the step."""

    def __init__(self, batch: Callable[[int], PyTree]) -> None:
        self.read = batch

    def go(self, step: int) -> None:
        """Do nothing: any step may be the next one."""

    def position(self, group: int) -> None:
        """Return None: the step's number says all."""


class Loader:
    """Reads from an iterable of batches, again and again; see `gf.train.from_loader`.

    Args:
        batches: the iterable, or a function of the epoch's number that returns one.
        resumes: whether to store the loader's own state.
    """

    def __init__(self, batches: Batches, resumes: bool = True) -> None:
        self._batches, self._resumes = batches, resumes
        self._iterator: Iterator[PyTree] | None = None
        self._step = self._epoch = self._offset = 0
        self._returned: list[PyTree] = []
        self._known: Position | None = None

    @property
    def length(self) -> int | None:
        """The number of batches in an epoch; None if it is not known, or not finite."""
        try:
            length = len(self._batches)  # type: ignore[arg-type]
        except TypeError:
            return None
        return length if length < FINITE else None

    def first(self, n: int) -> list[PyTree]:
        """Return the first batches, which are read again."""
        found: list[PyTree] = []
        while len(found) < n:
            try:
                found.append(copied(as_arrays(self.read(len(found)), "batch", scalars=True)))
            except EndedError:
                break
        self._returned, self._step = found[::-1], 0
        return found

    def known(self, position: Position | None) -> Loader:
        """Return the loader, which can start from a position that a checkpoint holds."""
        self._known = position
        return self

    def go(self, step: int) -> None:
        """Read on up to a step, or, if that saves reading, start at a known position before it."""
        at = self._known
        direct = at is not None and (at["state"] is not None or callable(self._batches))
        if at is not None and direct and self._step < at["step"] <= step:
            self._restart(at)
        elif step < self._step:
            self._restart(Position(group=0, step=0, epoch=0, offset=0, state=None))
        while self._step < step:
            self.read(self._step)

    def read(self, step: int) -> PyTree:
        """Return the next batch; where an epoch ends, the first one of another."""
        if self._returned:
            self._step += 1
            return self._returned.pop()
        if self._iterator is None:
            self._iterator = self._iterate()
        try:
            batch = next(self._iterator)
        except StopIteration:
            if not self._offset:
                raise EndedError from None
            self._epoch, self._offset, self._iterator = self._epoch + 1, 0, None
            return self.read(step)
        self._step, self._offset = self._step + 1, self._offset + 1
        return _as_tuple(batch)

    def position(self, group: int) -> Position:
        """Return where the loader is."""
        if self._returned:  # the loader itself is further on
            return Position(group=group, step=self._step, epoch=0, offset=self._step, state=None)
        return Position(
            group=group, step=self._step, epoch=self._epoch, offset=self._offset, state=self._state()
        )

    def _restart(self, at: Position) -> None:
        self._step, self._epoch, self._offset = at["step"], at["epoch"], at["offset"]
        self._returned.clear()
        state = _decoded(at["state"])
        self._iterator = self._iterate()
        if state is None:  # it is read again
            for _ in range(at["offset"]):
                next(self._iterator, None)
        else:
            self._iterator.set_state(state)  # type: ignore[attr-defined]

    def _iterate(self) -> Iterator[PyTree]:
        return iter(self._batches(self._epoch) if callable(self._batches) else self._batches)

    def _state(self) -> dict[str, Any] | None:
        """Return the iterator's own state, as grain's iterators have one, if JSON can hold it."""
        if not self._resumes:
            return None
        if self._iterator is None:
            self._iterator = self._iterate()
        has_state = hasattr(self._iterator, "get_state") and hasattr(self._iterator, "set_state")
        return _encoded(self._iterator.get_state()) if has_state else None  # type: ignore[attr-defined]


def copied(batch: PyTree) -> PyTree:
    """Return a batch that stays as it is where its reader writes the next one into the same memory."""
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, batch)


def _as_tuple(batch: PyTree) -> PyTree:
    """Return a list of tensors, which PyTorch's loaders make of examples that are tuples, as a tuple."""
    tensors = isinstance(batch, list) and all(type(part).__module__ == "torch" for part in batch)
    return tuple(batch) if tensors else batch


def _encoded(state: Any) -> dict[str, Any] | None:
    """Return a loader's state as JSON; None if it cannot be that."""
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode()}
    try:
        same = json.loads(json.dumps(state)) == state
    except (TypeError, ValueError):
        return None
    return {"json": state} if same else None


def _decoded(state: dict[str, Any] | None) -> Any:
    if state is None:
        return None
    return base64.b64decode(state["base64"]) if "base64" in state else state["json"]


class Group(NamedTuple):
    """The batches of some steps.

    Attributes:
        batches: `[n, batch, ...]`; where the data ended before, the first one of the run is in the rest.
        position: of the reader before the first of them.
        end: the number of steps that there are batches for; None if there is no end.
    """

    batches: PyTree
    position: Position | None
    end: int | None


class Groups:
    """The groups of batches of a run, by number.

    Args:
        reader: makes the batches.
        n: batches per group.
        like: the first batch: those of all steps have its structure, shapes and dtypes.
        steps: of the run: no later batch is made.
    """

    def __init__(self, reader: Reader, n: int, like: PyTree, steps: int) -> None:
        self._reader, self._n, self._like, self._steps = reader, n, like, steps
        self._made: dict[int, Future[Group]] = {}
        self.end: int | None = None

    def __call__(self, group: int) -> PyTree:
        """Return a group's batches, and start to make the next one."""
        if self.end is not None and group * self._n >= self.end:
            group = (self.end - 1) // self._n  # no step uses them
        if group not in self._made:
            for running in self._made.values():
                running.exception()  # wait: a reader makes one batch at a time
            self._made.clear()
            self._start(group)
        found = self._made[group].result()
        self.end = found.end
        if group + 1 not in self._made and (group + 1) * self._n < min(self._steps, found.end or self._steps):
            self._start(group + 1)
        self._made = {number: made for number, made in self._made.items() if number >= group - 1}
        return found.batches

    def position(self, step: int) -> Position | None:
        """Return the last known position of the reader that is not after a step."""
        made = [each for number, each in self._made.items() if number * self._n <= step and each.done()]
        return made[-1].result().position if made else None

    def _start(self, number: int) -> None:
        made: Future[Group] = Future()

        def run() -> None:
            try:
                made.set_result(self._make(number))
            except BaseException as error:  # it is raised where the group is needed
                made.set_exception(error)

        # A daemon: a loader that hangs must not keep the process from ending.
        threading.Thread(target=run, name="gradfn batches", daemon=True).start()
        self._made[number] = made

    def _make(self, number: int) -> Group:
        start, read = number * self._n, 0
        # A batch is copied before the next one is read: a reader may write all of them into the same memory.
        batches = jax.tree.map(lambda leaf: np.stack([leaf] * self._n), self._like)
        end = position = None
        try:
            self._reader.go(start)
            position = self._reader.position(self._n)
            for step in range(start, min(start + self._n, self._steps)):
                batch = as_arrays(self._reader.read(step), "batch", scalars=True)
                check_form(batch, self._like, step)
                for rows, row in zip(jax.tree.leaves(batches), jax.tree.leaves(batch), strict=True):
                    rows[read] = row
                read += 1
        except EndedError:
            end = start + read
        return Group(checked(batches, "batch"), position, end)


def check_form(batch: PyTree, like: PyTree, step: int) -> None:
    """Check that a batch has the structure, shapes and dtypes of the first one.

    Raises:
        ValueError: it does not; the message names the array.
    """
    actual: Any = jax.tree.structure(batch)
    expected: Any = jax.tree.structure(like)
    if actual != expected:
        raise ValueError(
            f"fit: the batch of step {step:,} must be a tree like the first one, {expected}, got {actual}"
        )
    for (name, leaf), first in zip(named_leaves(batch), jax.tree.leaves(like), strict=True):
        if leaf.shape != first.shape or leaf.dtype != first.dtype:
            hint = "Drop the last partial batch of an epoch (drop_last=True, drop_remainder=True)"
            raise ValueError(
                f"fit: the batch of step {step:,}: {name or 'array'}: expected {list(first.shape)} {first.dtype} as "
                f"in the first batch, got {list(leaf.shape)} {leaf.dtype}. {hint}"
            )


def steps_per_group(batch: PyTree, seconds: float) -> int:
    """Return how many batches to make at a time, from the first one and the time that one takes."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    most = min(HOST_BYTES // max(size, 1), HOST_SECONDS // max(seconds, 1e-6))
    return max(1, min(HOST_STEPS, int(most)))
