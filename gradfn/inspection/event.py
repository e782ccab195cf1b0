"""What is reported about NaNs and infinities: the first of each, and where it came from."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gradfn.inspection.causes import Operand
from gradfn.inspection.where import Loop, iteration_text

NAMED = 6
"""The number of gradients that the text of a report names at most; of more it names half of that."""


class Event(NamedTuple):
    """A NaN or an infinity, and where it came from.

    Attributes:
        kind: `nan` or `inf`.
        operation: name of the operation, such as `log`; `argument` if it was already in the input.
        within: the library function around the operation (`norm`, `softmax`), or empty.
        phase: `forward`, `backward`, or `recomputed` (forward again, for `jax.checkpoint`).
        scope: the `jax.named_scope` stack; the path of an argument.
        line: the user's source line, `file:line (function)`.
        iteration: the iterations of the loops around it, outermost first, counted from 0.
        loops: kinds and lengths of those loops.
        element: index of the first bad element, or None.
        operands: of the operation; empty if they were not recorded.
        cause: a sentence on the likely cause, or empty.
    """

    kind: str
    operation: str
    within: str = ""
    phase: str = "forward"
    scope: str = ""
    line: str = ""
    iteration: tuple[int, ...] = ()
    loops: tuple[Loop, ...] = ()
    element: tuple[int, ...] | None = None
    operands: tuple[Operand, ...] = ()
    cause: str = ""

    def __str__(self) -> str:
        within = f" (in {self.within})" if self.within else ""
        where = [f"{self.phase}, {self.operation}{within}"]
        where += [iteration_text(loop, i) for loop, i in zip(self.loops, self.iteration, strict=True)]
        where += [f"in scope {self.scope}"] if self.scope and self.operation != "argument" else []
        where += [f"element {list(self.element)}"] if self.element else []
        lines = [", ".join(where)]
        if self.operation == "argument":
            lines = [f"in the argument {self.scope}, before anything was computed"]
        lines += [f"at {self.line}"] * bool(self.line)
        lines += [self.cause] * bool(self.cause)
        lines += [f"operand {i}: {operand}" for i, operand in enumerate(self.operands)]
        return "\n    ".join(lines)


@dataclass(frozen=True)
class NanReport:
    """Where non-finite values came from. `print` shows it.

    Attributes:
        value: the function's value.
        nonfinite_grads: names of the leaves whose gradient is not finite.
        nan: the first NaN that was computed, was in the arguments, or is a constant that reached a result; or None.
        inf: the first infinity computed from finite values; without one, the first that is a constant or in the
            arguments (such as a mask of -inf); or None.
        note: why there was no search, or empty.
    """

    value: float
    nonfinite_grads: tuple[str, ...]
    nan: Event | None
    inf: Event | None
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether value and gradients are finite: any non-finite intermediate value was harmless."""
        return bool(np.isfinite(self.value)) and not self.nonfinite_grads

    def __str__(self) -> str:
        lines = [f"value {self.value:.6g}; gradients {self._bad_grads()}"]
        harmless = " (harmless: it reached neither the value nor a gradient)" if self.ok else ""
        for kind, event in (("NaN", self.nan), ("inf", self.inf)):
            if event is not None:
                lines.append(f"first {kind}{harmless}: {event}")
        if self.note:
            lines.append(self.note)
        elif not self.ok and self.nan is None and self.inf is None:
            lines.append(
                "no operation returned a non-finite value while they were inspected: the compiler fused them "
                "differently, and values are close to overflow"
            )
        return "\n".join(lines)

    def _bad_grads(self) -> str:
        names, n = self.nonfinite_grads, len(self.nonfinite_grads)
        if not n:
            return "finite"
        if n <= NAMED:
            return f"not finite: {', '.join(names)}"
        return f"not finite: {n} of them, {', '.join(names[: NAMED // 2])} and others"

    __repr__ = __str__
