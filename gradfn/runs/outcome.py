"""The expectations and the measurements of an experiment, as data; text is made from them where they are shown."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from gradfn.files import FileError, inside, read_json
from gradfn.runs.folder import RESULT, Number, disown, end, write_json
from gradfn.timings import so_far

State = Literal["reached", "missed", "open"]


@dataclass(frozen=True)
class Expectation:
    """Bounds on a number that an experiment measures; without bounds, a number that it only reports.

    Attributes:
        name: what the number is.
        at_least: the smallest value that meets the expectation.
        at_most: the largest.
        unit: of the number; "%" for a share in [0, 1], which is shown as a percentage.
        given: the options, as typed, for which it holds; "" for the defaults.

    >>> accuracy = Expectation("test accuracy", at_least=0.93, unit="%")
    >>> str(accuracy), accuracy.show(0.9639), accuracy.holds(0.9639)
    ('test accuracy at least 93 %', 'test accuracy 96.39 %', True)
    """

    name: str
    at_least: Number | None = None
    at_most: Number | None = None
    unit: str = ""
    given: str = ""

    def holds(self, value: float | None) -> bool:
        """Return whether a value lies within the bounds; NaN and None do not."""
        if value is None or math.isnan(value):
            return False
        low, high = self.at_least, self.at_most
        return (low is None or value >= low) and (high is None or value <= high)

    def show(self, value: float | None) -> str:
        """Return the name and a value as text."""
        return f"{self.name} {_number(value, self.unit)}"

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "at most": self.at_most}
        given = [
            f"{words} {_number(bound, self.unit)}" for words, bound in bounds.items() if bound is not None
        ]
        return f"{self.name} {' and '.join(given)}" if given else ""


@dataclass(frozen=True)
class Outcome:
    """What a run measured, and what was expected.

    Attributes:
        measured: numbers by name; None stands for NaN in JSON.
        expected: the expectations, in the order in which they are shown.
        promised: whether the expectations hold for the run's options; if not, they only format the numbers.

    >>> expected = [Expectation("test accuracy", at_least=0.93, unit="%")]
    >>> print(judge(expected, {"test accuracy": 0.5}))
    test accuracy 50 %. Expected test accuracy at least 93 %: NOT reached
    """

    measured: Mapping[str, Number | None] = dataclasses.field(default_factory=dict)
    expected: tuple[Expectation, ...] = ()
    promised: bool = True

    @property
    def state(self) -> State:
        """Whether all expectations were met; "open" where there are none."""
        bounded = [each for each in self.expected if str(each)]
        if not self.promised or not bounded:
            return "open"
        met = all(each.holds(self.measured.get(each.name)) for each in bounded)
        return "reached" if met else "missed"

    @property
    def reached(self) -> str:
        """The measured numbers as text."""
        shown = {each.name: each for each in self.expected}
        texts = [shown.get(name, Expectation(name)).show(value) for name, value in self.measured.items()]
        return "; ".join(texts)

    def __str__(self) -> str:
        if self.state == "open":
            return f"{self.reached} (no expectation for these options)"
        return (
            f"{self.reached}. Expected {listed(self.expected)}: "
            f"{'reached' if self.state == 'reached' else 'NOT reached'}"
        )


def judge(expected: Sequence[Expectation], measured: Mapping[str, float], promised: bool = True) -> Outcome:
    """Return the outcome of a run: its measurements as plain numbers, and the expectations."""
    return Outcome({name: float(value) for name, value in measured.items()}, tuple(expected), promised)


def listed(expected: Sequence[Expectation]) -> str:
    """Return expectations as text, grouped by options.

    >>> listed([Expectation("error", at_most=0.1), Expectation("error", at_most=0.2, given="--data mnist")])
    'error at most 0.1. With --data mnist: error at most 0.2'
    """
    parts = []
    for given in dict.fromkeys(each.given for each in expected):
        texts = "; ".join(str(each) for each in expected if each.given == given and str(each))
        parts.append(f"With {given}: {texts}" if given else texts)
    return ". ".join(parts)


def finish(folder: Path, outcome: Outcome, **measured: Any) -> None:
    """Write `result.json`, which marks a run as finished, and give up its folder.

    Args:
        folder: of the run.
        outcome: what was measured and expected.
        measured: whatever else the experiment measured, as JSON.
    """
    if seconds := so_far():
        measured["seconds"] = seconds
    write_json(folder / RESULT, {"outcome": dataclasses.asdict(outcome)} | measured)
    end(folder, "finished")
    disown(folder)


def read_result(folder: Path) -> dict[str, Any] | None:
    """Read the result of a run, its "outcome" as an `Outcome`; None where the run has not finished.

    Runs of earlier versions store a text named "verdict" instead of an outcome.

    Raises:
        FileError: the file leads out of the folder, or has another form.
    """
    file = inside(folder, RESULT)
    if not os.path.lexists(file):
        return None
    result = read_json(file, dict[str, Any])
    if not isinstance(verdict := result.get("verdict", ""), str):
        raise FileError(f"{file}: expected a string as the verdict, got {type(verdict).__name__}")
    if "outcome" in result:
        try:
            result["outcome"] = msgspec.convert(result["outcome"], Outcome)
        except msgspec.ValidationError as error:
            raise FileError(f"{file}: outcome: {error}") from error
    return result


def _number(value: float | None, unit: str) -> str:
    value = math.nan if value is None else value
    return f"{100 * value:.4g} %" if unit == "%" else f"{value:.4g} {unit}".rstrip()
