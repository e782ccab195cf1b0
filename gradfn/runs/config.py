"""The options of a run: a dataclass with one field per option, and checks of their values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Protocol, TypeVar

T = TypeVar("T")

# The options that do not determine what a run computes: where it is stored, and how this process computes it.
PROCESS = ("timings", "distributed", "coordinator", "processes", "process", "mesh", "shard")
ELSEWHERE = ("folder", "resume", *PROCESS)


class RunConfig(Protocol):
    """A dataclass of options, among them the folder of the run and whether to resume one."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def folder(self) -> str | None:
        """The run's folder; None for a new one, or, with `resume`, for the latest."""

    @property
    def resume(self) -> bool:
        """Whether to resume a run."""


def options(config: RunConfig) -> dict[str, Any]:
    """Return the options that determine what a run computes: not its folder, or how this process computes it."""
    found = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in found.items() if name not in ELSEWHERE}


def option(
    default: T,
    text: str,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
) -> T:
    """Return a field of a dataclass of options, for which `check` checks the bounds.

    Args:
        default: its default.
        text: its meaning, for the help and for the page of a run.
        at_least: the smallest value; for a tuple, of each item.
        at_most: the largest.
        above: what the value must exceed.
    """
    bounds = {"at_least": at_least, "at_most": at_most, "above": above}
    return dataclasses.field(default=default, metadata={"text": text, "bounds": bounds})


def check(config: Any) -> None:
    """Raise a ValueError that names the first option out of its bounds; None is not checked.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Config:
    ...     hidden: int = option(16, "hidden nodes", at_least=1)
    >>> check(Config(hidden=0))
    Traceback (most recent call last):
    ValueError: hidden must be an integer >= 1, got 0
    """
    for field in dataclasses.fields(config):
        value, bounds = getattr(config, field.name), field.metadata.get("bounds", {})
        for each in value if isinstance(value, tuple) else (value,):
            _check(field.name, each, **bounds)


def within(low: int, high: int | None, **numbers: int | None) -> None:
    """Raise a ValueError that names the first option outside of `low` to `high`; None means unbounded, or not checked.

    >>> within(1, None, epochs=3, hidden=0)
    Traceback (most recent call last):
    ValueError: hidden must be an integer >= 1, got 0
    """
    for name, number in numbers.items():
        _check(name, number, low, high)


def _check(
    name: str,
    value: Any,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
) -> None:
    if value is None or at_least is at_most is above is None:
        return
    low = -math.inf if at_least is None else at_least
    high = math.inf if at_most is None else at_most
    if low <= value <= high and math.isfinite(value) and (above is None or value > above):
        return
    bounds = f">= {at_least}" if at_most is None else f"from {at_least} to {at_most}"
    kind = "an integer" if isinstance(value, int) else "a finite number"
    raise ValueError(f"{name} must be {kind} {bounds if above is None else f'> {above}'}, got {value}")
