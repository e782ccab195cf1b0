"""How the gradient flows through the sites: the table of an inspection, its flags, and the dict for logs.

The thresholds of the flags and their reasons:

- *vanishing*, *exploding*: the norm of a site's gradient is below 1e-3, or above 1e3, times that at the last
  site before the loss. Ten layers that each halve or double it reach that (2^10 = 1024). Gradients shrink or
  grow exponentially with depth: Bengio, Simard and Frasconi (1994), Pascanu, Mikolov and Bengio (2013). It is
  the norm and not the root mean square because He initialization preserves the norm across layers of any width.
- *saturated*: more than half of a sigmoid's or tanh's values have a slope below a tenth of the largest
  (Glorot and Bengio, 2010, study the same quantity: activations close to their bounds).
- *dead*: more than half of a relu's units are zero for every row of the batch (Lu et al., 2019, "Dying
  ReLU").
- *non-finite*: any NaN or infinity, forward or backward.
"""

import itertools
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from gradfn.display import ROWS, TextTable
from gradfn.inspection._sites import number_note
from gradfn.inspection.summaries import Stats
from gradfn.jaxpr import Site
from gradfn.jaxpr.program import leaf_name

if TYPE_CHECKING:
    from gradfn.inspection._inspect import Inspection
    from gradfn.inspection.observe import ByName

VANISHING, EXPLODING = 1e-3, 1e3
SATURATED_SHARE, DEAD_SHARE = 0.5, 0.5


class Row(NamedTuple):
    """One site, in one iteration of the loops around it."""

    site: Site
    label: str
    """The site's name, with the iteration behind it: `h[3]`."""
    iteration: tuple[int, ...]
    stats: dict[str, float]
    grads: dict[str, float]
    norm: float | None
    """The norm of the gradient, None where there is none."""
    factor: float | None
    """That norm over the norm at the next row toward the loss."""
    flags: list[str]


def _numbers(stats: Stats | None, index: tuple[int, ...], depth: int) -> dict[str, float]:
    """Return one iteration's statistics as Python floats; of stacked inspections, the last one's."""
    if stats is None:
        return {}
    out = {}
    for name in ("count", "mean", "rms", "max", "zeros", "saturated", "dead", "nonfinite"):
        value = getattr(stats, name)
        if value is not None:
            array = np.asarray(value)
            array = array[(-1,) * (array.ndim - depth)]
            out[name] = float(array[index])
    if out["count"] == 0:
        # Never computed, or no gradient reaches it.
        return {"count": 0.0}
    return out


def rows_of(inspection: "ByName") -> list[Row]:
    """Return the rows of the table, from the inputs to the loss."""
    inspection = jax.device_get(inspection)
    entries = []
    for site in inspection.sites:
        for index in itertools.product(*[range(n) for n in site.axes]):
            stats = _numbers(inspection.stats[site.name], index, len(site.axes))
            grads = _numbers(inspection.grad_stats.get(site.name), index, len(site.axes))
            reached = grads.get("count", 0) > 0 and "rms" in grads
            norm = grads["rms"] * math.sqrt(grads["count"]) if reached else None
            entries.append((_order(site, index), site, index, stats, grads, norm))
    entries.sort(key=lambda entry: entry[0])
    out: list[Row] = []
    after: float | None = None
    reference: float | None = None
    for _, site, index, stats, grads, norm in reversed(entries):
        finite = norm is not None and math.isfinite(norm)
        if finite and norm and reference is None and math.prod(site.shape) > 1:
            reference = norm
        factor = norm / after if norm is not None and after else None
        relative = norm / reference if norm is not None and reference else math.nan
        label = site.name + "".join(f"[{i}]" for i in index)
        out.append(Row(site, label, index, stats, grads, norm, factor, _flags(stats, grads, relative)))
        if finite:
            after = norm
    return out[::-1]


def _order(site: Site, index: tuple[int, ...]) -> tuple[float, ...]:
    """Sort by program order, iteration after iteration: the sites of one iteration stay together."""
    key: list[float] = []
    turns = dict(zip(site.loops, index, strict=True))
    for depth, number in enumerate(site.path, start=1):
        key.append(number)
        if depth in turns:
            key.append(turns[depth])
    return (*key, math.inf)


def _flags(stats: dict[str, float], grads: dict[str, float], ratio: float) -> list[str]:
    found = []
    if ratio < VANISHING:
        found.append("vanishing")
    if ratio > EXPLODING:
        found.append("exploding")
    if stats.get("saturated", 0) > SATURATED_SHARE:
        found.append("saturated")
    if stats.get("dead", 0) > DEAD_SHARE:
        found.append("dead")
    if stats.get("nonfinite", 0) > 0 or grads.get("nonfinite", 0) > 0:
        found.append("non-finite")
    return found


def flags(inspection: "Inspection") -> dict[str, list[str]]:
    """Return the flags by site name; those of a loop's iterations together."""
    out: dict[str, list[str]] = {}
    for row in rows_of(inspection):
        for flag in row.flags:
            if flag not in out.setdefault(row.site.name, []):
                out[row.site.name].append(flag)
    return {name: found for name, found in out.items() if found}


def to_dict(inspection: "Inspection") -> dict[str, Any]:
    """Return the inspection as plain numbers by name."""
    inspection = jax.device_get(inspection)
    # A dict that a compiled function returns is sorted; this is the order of computation.
    in_order = [site.name for site in inspection.sites]
    out: dict[str, Any] = {
        "value": np.asarray(inspection.value).tolist(),
        "sites": {name: inspection.stats[name].to_dict() for name in in_order if name in inspection.stats},
        "site_grads": {
            name: inspection.grad_stats[name].to_dict() for name in in_order if name in inspection.grad_stats
        },
        "grads": {name: _of_array(g) for name, g in _leaves(inspection.grads)},
        "param_order": list(inspection.param_order),
    }
    if inspection.update_ratios is not None:
        out["update_ratios"] = {name: np.asarray(r).tolist() for name, r in _leaves(inspection.update_ratios)}
    if np.ndim(inspection.value) == 0:
        out["flags"] = flags(inspection)
    return out


def _leaves(tree: PyTree) -> list[tuple[str, PyTree]]:
    return [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _of_array(x: PyTree) -> dict[str, Any]:
    x = np.asarray(x)
    sizes = np.abs(x.astype(np.complex128 if np.iscomplexobj(x) else np.float64))
    if not sizes.size:
        return {"rms": 0.0, "max": 0.0, "nonfinite": 0}
    bad, largest = int(np.sum(~np.isfinite(sizes))), float(np.max(sizes))
    unit = largest if 0 < largest < math.inf else 1.0
    return {"rms": unit * float(np.sqrt(np.mean((sizes / unit) ** 2))), "max": largest, "nonfinite": bad}


def table(inspection: "ByName", rows: int | None, rest: str) -> TextTable:
    """Return one row per site and iteration, from the inputs to the loss.

    Where that is more than `rows`, all iterations of a site share one row, and the rows that stay are those with
    flags, then those where the gradient's norm changes most. `rest` is the call that returns all rows.
    """
    title = ""
    if hasattr(inspection, "value"):
        stacked = np.shape(inspection.value)
        title = f"value {float(np.asarray(inspection.value)[(-1,) * len(stacked)]):.6g}"
        title += f" (the last of {stacked} inspections)" if stacked else ""
    caption = []
    if inspection.grad_stats:
        caption.append("grad ×: the norm of the gradient here over that at the next site toward the loss")
    shown = rows_of(inspection)
    if rows is not None and len(shown) > rows and any(row.iteration for row in shown):
        shown = _one_row_per_site(shown)
        caption.append(
            "[0:N]: N iterations in one row; there, grad × is the first iteration's norm over the last's"
        )
    caption += number_note(inspection.sites)
    out = TextTable(title, "\n".join(caption))
    out.add_column("site", shorten=True)
    out.add_column("shape", drop=3)
    out.add_column("mean", drop=7)
    out.add_column("rms", drop=1)
    out.add_column("max", drop=8)
    out.add_column("zero", ".1%", drop=4)
    out.add_column("sat/dead", ".1%", drop=2)
    out.add_column("non-finite", ",.0f", drop=5)
    out.add_column("grad rms", drop=6)
    out.add_column("grad norm")
    out.add_column("grad ×")
    out.add_column("flags")
    for row in shown:
        s, g = row.stats, row.grads
        nonfinite = [count for count in (s.get("nonfinite"), g.get("nonfinite")) if count is not None]
        change = abs(math.log(row.factor)) if row.factor and row.factor > 0 else 0
        out.add_row(
            row.label,
            row.site.shape,
            *[s.get(name) for name in ("mean", "rms", "max", "zeros")],
            s.get("saturated", s.get("dead")),
            sum(nonfinite) if nonfinite else None,
            g.get("rms") if g.get("count") else None,
            row.norm,
            row.factor,
            " ".join(row.flags),
            weight=math.inf if row.flags else change,
        )
    return out.folded(rows, rest)


def _one_row_per_site(all_rows: list[Row]) -> list[Row]:
    """Return the rows with all iterations of a site in one, where its first iteration was."""
    groups: dict[str, list[Row]] = {}
    for row in all_rows:
        groups.setdefault(row.site.name, []).append(row)
    return [_summary(group) if len(group) > 1 else group[0] for group in groups.values()]


def _summary(group: list[Row]) -> Row:
    """Return one row for all iterations of a site: sums of counts, largest maxima, means weighted by counts."""
    norms = [row.norm for row in group if row.norm is not None]
    flags = Counter(flag for row in group for flag in row.flags)
    return Row(
        site=group[0].site,
        iteration=(),
        stats=_over_iterations([row.stats for row in group]),
        grads=_over_iterations([row.grads for row in group]),
        norm=math.hypot(*norms) if norms else None,
        factor=norms[0] / norms[-1] if norms and norms[-1] else None,
        flags=[f"{flag} ({count}/{len(group)})" for flag, count in flags.items()],
        label=group[0].site.name + "".join(f"[0:{n}]" for n in group[0].site.axes),
    )


def _over_iterations(of_each: list[dict[str, float]]) -> dict[str, float]:
    computed = [stats for stats in of_each if stats.get("count")]
    total = sum(stats["count"] for stats in computed)
    out = {"count": total}
    for name in dict.fromkeys(name for stats in computed for name in stats if name != "count"):
        values = [stats[name] for stats in computed]
        shares = [stats["count"] / total for stats in computed]
        if name == "rms":
            out[name] = math.hypot(*[v * math.sqrt(share) for v, share in zip(values, shares, strict=True)])
        elif name == "max":
            out[name] = max(values)
        elif name == "nonfinite":
            out[name] = sum(values)
        else:
            out[name] = sum(v * share for v, share in zip(values, shares, strict=True))
    return out


def parameter_table(inspection: "Inspection", rows: int | None = ROWS) -> TextTable:
    """Return one row per parameter: its gradient's size, and the update's size over the parameter's.

    Of more than `rows`, those that are not finite stay, then those with the largest gradients.
    """
    ratios = dict(_leaves(inspection.update_ratios)) if inspection.update_ratios is not None else {}
    out = TextTable(caption="update/weight: about 1e-3 is usual" if ratios else "")
    out.add_column("parameter", shorten=True)
    out.add_column("shape", drop=2)
    out.add_column("grad rms")
    out.add_column("grad max", drop=1)
    out.add_column("non-finite")
    if ratios:
        out.add_column("update/weight")
    stacked = np.ndim(inspection.value)
    for name, leaf in _leaves(inspection.grads):
        g = np.asarray(leaf)[(-1,) * stacked]
        found = _of_array(g)
        cells = [found["rms"], found["max"], found["nonfinite"]]
        if ratios:
            cells.append(float(np.asarray(ratios[name])[(-1,) * stacked]) if name in ratios else None)
        weight = math.inf if found["nonfinite"] else found["rms"] * math.sqrt(g.size)
        out.add_row(name, g.shape, *cells, weight=weight)
    return out.folded(rows, "inspection.parameter_table(rows=None)")
