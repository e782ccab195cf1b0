"""What a tracker shows of a row: its scalars by name, and the histograms of an inspection."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gradfn.layout import NOT_FINITE
from gradfn.train.rows import Row

# `(kind, row)`, see `fit`.
LogFunction = Callable[[str, Row], Any]
KINDS = ("metrics", "inspection", "noise", "spike", "figure")
# Of the statistics of a site, those that are curves in a tracker; a function of your own finds all of them in the row.
SHOWN = ("rms", "saturated", "dead")
FLAGS = ("vanishing", "exploding", "saturated", "dead", "non-finite")
# The most iterations of a loop with a curve each: layers in a scan, but not the time steps of a recurrent network.
ITERATIONS = 64


def row_scalars(kind: str, row: Row) -> dict[str, float]:
    """Return the scalars of a row by name, for a function that `gf.fit(..., log=)` calls.

    Args:
        kind: of the row: `"metrics"`, `"inspection"`, `"noise"`, `"spike"` or `"figure"`.
        row: as `fit` passes it.

    Returns:
        The scalars without the step: of a row of metrics all of them. Of an inspection, `activation_rms/<site>`,
        `activation_saturated/<site>`, `activation_dead/<site>`, `activation_gradient_rms/<site>`,
        `gradient_rms/<parameter>`, `update_ratio/<parameter>`, and `flags/<flag>`, the number of sites that have it. A
        value in a loop has one scalar for each iteration, `<site>[3]`, and one for all where there are more than 64.
        Of the noise scale `noise/<name>`, of a spike `spike/<name>`. None is left out, NaN is not.

    Raises:
        ValueError: an unknown kind.

    >>> import gradfn as gf
    >>> gf.train.row_scalars("metrics", {"step": 10, "loss": 0.5, "grad_norm": None})
    {'loss': 0.5}
    """
    if kind == "metrics":
        found = {name: value for name, value in row.items() if name not in ("step", NOT_FINITE)}
    elif kind == "noise":
        found = {f"noise/{name}": value for name, value in row.items() if name != "step"}
    elif kind == "spike":
        found = {f"spike/{name}": value for name, value in row["values"].items()}
    elif kind == "inspection":
        found = dict(_of_inspection(row))
    elif kind == "figure":
        found = {}
    else:
        raise ValueError(f"row_scalars: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}


def row_histograms(row: Row) -> dict[str, np.ndarray]:
    """Return the histograms of an inspection by name; none where `fit`'s `inspect_stats` has no `histogram`.

    Of each, the 48 counts of magnitudes between powers of two (see `histogram_edges`), of at most 1024 sampled
    elements: `activation_log2/<site>`, `activation_gradient_log2/<site>` and `gradient_log2/<parameter>`.

    >>> row_histograms({"step": 0, "sites": {}, "site_grads": {}, "grads": {"W": {"rms": 1.0, "histogram": [0, 3, 1]}}})
    {'gradient_log2/W': array([0., 3., 1.])}
    """
    groups = {"activation": "sites", "activation_gradient": "site_grads", "gradient": "grads"}
    found: dict[str, np.ndarray] = {}
    for group, part in groups.items():
        for name, stats in row[part].items():
            if "histogram" in stats:
                counts = np.asarray(stats["histogram"], np.float64)  # [*iterations, bins]
                axes = counts.shape[:-1]
                of_each = counts.reshape(-1, counts.shape[-1])
                if len(of_each) > ITERATIONS:
                    axes, of_each = (), of_each.sum(0, keepdims=True)
                labels = [f"{group}_log2/{name}{_label(index)}" for index in np.ndindex(axes)]
                found |= dict(zip(labels, of_each, strict=True))
    return found


def histogram_edges() -> np.ndarray:
    """Return the 49 bounds of the bins of a histogram, as binary logarithms.

    The first and the last bin include what lies beyond them, the first also zeros.
    """
    from gradfn.inspection.summaries import FIRST_EXPONENT, N_BINS

    return np.arange(FIRST_EXPONENT, FIRST_EXPONENT + N_BINS + 1, dtype=np.float64)


def _of_inspection(row: Row) -> Iterator[tuple[str, float]]:
    for group, part in {"activation": "sites", "activation_gradient": "site_grads"}.items():
        for name, stats in row[part].items():
            for stat in SHOWN if part == "sites" else SHOWN[:1]:
                if stat in stats:
                    yield from _iterations(f"{group}_{stat}/{name}", stats[stat], stats["count"], stat)
    for name, stats in row["grads"].items():
        yield f"gradient_rms/{name}", stats["rms"]
    for name, ratio in row.get("update_ratios", {}).items():
        yield f"update_ratio/{name}", ratio
    counts = Counter(flag for flags in row.get("flags", {}).values() for flag in flags)
    yield from ((f"flags/{flag}", counts[flag]) for flag in FLAGS if "flags" in row)


def _iterations(name: str, values: Any, counts: Any, stat: str) -> Iterator[tuple[str, float]]:
    """Yield a statistic of each iteration of the loops around a value in which it was computed, or of all of them."""
    each, n = np.asarray(values, np.float64), np.asarray(counts, np.float64)
    if each.size <= ITERATIONS:
        yield from (
            (f"{name}{_label(index)}", float(each[index])) for index in np.ndindex(each.shape) if n[index]
        )
    elif n.any():
        shares = n / n.sum()
        mean = np.sqrt((shares * np.square(each)).sum()) if stat == "rms" else (shares * each).sum()
        yield name, float(mean)


def _label(index: Sequence[int]) -> str:
    return "".join(f"[{i}]" for i in index)


def log_functions(log: LogFunction | Sequence[LogFunction] | None) -> tuple[LogFunction, ...]:
    """Return the functions in the `log` argument of `fit`.

    Raises:
        TypeError: one is not a function of two arguments.
    """
    if log is None:
        return ()
    if callable(log):
        functions: tuple[Any, ...] = (log,)
    elif isinstance(log, Sequence) and not isinstance(log, str):
        functions = tuple(log)
    else:
        raise TypeError(f"fit: log must be a function (kind, row) or several, got {log!r:.60}")
    for function in functions:
        _check_function(function)
    return functions


def _check_function(function: Any) -> None:
    name = getattr(function, "__name__", repr(function))
    if not callable(function):
        raise TypeError(f"fit: log must be a function (kind, row) or several, got {name:.60}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some functions written in C
        return
    try:
        signature.bind("metrics", {})
    except TypeError:
        hint = f". Call it: log={name}()" if name in ("wandb_log", "mlflow_log") else ""
        raise TypeError(f"fit: log must take (kind, row), got {name:.60}{signature}{hint}") from None
