"""The options of a run: what a dataclass of them must have, and checks of their values."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol


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
    """Return the options that determine what a run computes: all but its folder and whether it is resumed."""
    found = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in found.items() if name not in ("folder", "resume")}


def within(low: int, high: int | None, **numbers: int | None) -> None:
    """Raise a ValueError that names the first option outside of `low` to `high`.

    Args:
        low: the smallest value.
        high: the largest; None for no limit.
        numbers: options by name; one that is None is not checked.

    >>> from gradfn.runs import within
    >>> within(1, None, epochs=3, hidden=0)
    Traceback (most recent call last):
    ValueError: hidden must be an integer >= 1, got 0
    """
    for name, number in numbers.items():
        if number is not None and (number < low or (high is not None and number > high)):
            bounds = f">= {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{name} must be an integer {bounds}, got {number}")


def positive(**numbers: float) -> None:
    """Raise a ValueError that names the first option that is not a finite number > 0.

    >>> from gradfn.runs import positive
    >>> positive(rate=0.1, clip=0.0)
    Traceback (most recent call last):
    ValueError: clip must be a finite number > 0, got 0.0
    """
    for name, number in numbers.items():
        if not 0 < number < float("inf"):
            raise ValueError(f"{name} must be a finite number > 0, got {number}")


def not_negative(**numbers: float) -> None:
    """Raise a ValueError that names the first option that is not a finite number >= 0."""
    for name, number in numbers.items():
        if not 0 <= number < float("inf"):
            raise ValueError(f"{name} must be a finite number >= 0, got {number}")
