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
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from gradfn.display import ROWS, TextTable
from gradfn.inspection._sites import number_note
from gradfn.inspection.summaries import Stats, summarize
from gradfn.jaxpr import Site
from gradfn.jaxpr.program import leaf_name

if TYPE_CHECKING:
    from gradfn.inspection._inspect import Inspection
    from gradfn.inspection.observe import ByName

VANISHING, EXPLODING = 1e-3, 1e3
# The statistics of the gradients of parameters in a log.
OF_GRADIENT = ("rms", "max", "nonfinite")
SATURATED_SHARE, DEAD_SHARE = 0.5, 0.5


class Row(NamedTuple):
    """One site, in one iteration of the loops around it."""

    site: Site
    label: str
    """The site's name, with the iteration behind it: `h[3]`."""
    iteration: tuple[int, ...]
    stats: dict[str, float]
    grads: dict[str, float]
    tangents: dict[str, float]
    norm: float | None
    """The norm of the gradient, None where there is none."""
    factor: float | None
    """That norm over the norm at the next row toward the loss."""
    flags: list[str]


class _Entry(NamedTuple):
    """One site, in one iteration of the loops around it, of `n` inspections."""

    site: Site
    iteration: tuple[int, ...]
    stats: dict[str, np.ndarray]
    """Each `[n]`."""
    grads: dict[str, np.ndarray]
    tangents: dict[str, np.ndarray]
    reached: np.ndarray
    """Whether a gradient reaches it, `[n]`."""
    norm: np.ndarray
    """The norm of that gradient, `[n]`."""


def _entries(
    sites: Iterable[Site],
    n: int,
    stats: Mapping[str, Stats],
    grad_stats: Mapping[str, Stats],
    tangent_stats: Mapping[str, Stats] = MappingProxyType({}),
) -> list[_Entry]:
    """Return the entries of `n` stacked inspections, from the inputs to the loss; all arrays are `[n, ...]`."""
    out = []
    for site in sites:
        every = stats[site.name], grad_stats.get(site.name), tangent_stats.get(site.name)
        columns = [_columns(one) for one in every]
        for index in itertools.product(*[range(k) for k in site.axes]):
            at: tuple[Any, ...] = (slice(None), *index)
            of_value, of_grad, of_tangent = (
                {name: column[at] for name, column in of.items()} for of in columns
            )
            count, rms = of_grad.get("count", np.zeros(n)), of_grad.get("rms")
            reached = (count > 0) & (rms is not None)
            norm = np.zeros(n) if rms is None else rms * np.sqrt(count)
            out.append(_Entry(site, index, of_value, of_grad, of_tangent, reached, norm))
    return sorted(out, key=lambda entry: program_order(entry.site, entry.iteration))


def _columns(stats: Stats | None) -> dict[str, np.ndarray]:
    """Return the statistics by name, `[n, *axes]` each; zeros where a value was never computed."""
    if stats is None:
        return {}
    values = np.asarray(stats.values, np.float64)
    computed = values[..., stats.names.index("count"), None] != 0
    values = np.where(computed, values, 0.0)
    return {name: values[..., i] for i, name in enumerate(stats.names)}


def _flags(entries: list[_Entry], n: int) -> list[dict[str, np.ndarray]]:
    """Return, for each entry, in which of the `n` inspections it has which flag."""
    reference = np.zeros(n)
    for entry in reversed(entries):
        if math.prod(entry.site.shape) > 1:
            first = entry.reached & np.isfinite(entry.norm) & (entry.norm != 0) & (reference == 0)
            reference = np.where(first, entry.norm, reference)
    out = []
    for _, _, stats, grads, _, reached, norm in entries:
        with np.errstate(invalid="ignore", over="ignore"):
            relative = np.divide(norm, reference, out=np.full(n, np.nan), where=reached & (reference != 0))
        none = np.zeros(n)
        out.append(
            {
                "vanishing": relative < VANISHING,
                "exploding": relative > EXPLODING,
                "saturated": stats.get("saturated", none) > SATURATED_SHARE,
                "dead": stats.get("dead", none) > DEAD_SHARE,
                "non-finite": (stats.get("nonfinite", none) > 0) | (grads.get("nonfinite", none) > 0),
            }
        )
    return out


def rows_of(inspection: "ByName") -> list[Row]:
    """Return the rows of the table, from the inputs to the loss; of stacked inspections, those of the last one."""
    inspection = jax.device_get(inspection)
    entries = _entries(inspection.sites, 1, **_last(inspection))
    out: list[Row] = []
    after: float | None = None
    for entry, flags in reversed(list(zip(entries, _flags(entries, 1), strict=True))):
        site, index = entry.site, entry.iteration
        norm = float(entry.norm[0]) if entry.reached[0] else None
        factor = norm / after if norm is not None and after else None
        label = site.name + "".join(f"[{i}]" for i in index)
        found = [name for name, at in flags.items() if at[0]]
        stats, grads, tangents = map(_numbers, (entry.stats, entry.grads, entry.tangents))
        out.append(Row(site, label, index, stats, grads, tangents, norm, factor, found))
        if norm is not None and math.isfinite(norm):
            after = norm
    return out[::-1]


def _last(inspection: "ByName") -> dict[str, dict[str, Stats]]:
    """Return statistics of the last of stacked inspections, or of the only one, with an axis of length 1 in front."""
    depths = {site.name: len(site.axes) for site in inspection.sites}

    def last(name: str, stats: Stats) -> Stats:
        values = np.asarray(stats.values)
        return replace(stats, values=values[(-1,) * (values.ndim - 1 - depths[name])][None])

    every = {name: getattr(inspection, name) for name in ("stats", "grad_stats", "tangent_stats")}
    return {which: {name: last(name, one) for name, one in found.items()} for which, found in every.items()}


def _stacked_axes(captured: "ByName") -> tuple[int, ...]:
    """Return the axes that `vmap` or `scan` around a capture put in front."""
    for site in captured.sites:
        return np.shape(captured.stats[site.name].values)[: -1 - len(site.axes)]
    return ()


def _numbers(stats: dict[str, np.ndarray]) -> dict[str, float]:
    """Return one inspection's statistics as Python floats, but for those of a value that was never computed."""
    out = {name: float(column[0]) for name, column in stats.items()}
    return out if out.get("count") else dict.fromkeys(out.keys() & {"count"}, 0.0)


def program_order(site: Site, index: tuple[int, ...]) -> tuple[float, ...]:
    """Sort by program order, iteration after iteration: the sites of one iteration stay together."""
    key: list[float] = []
    turns = dict(zip(site.loops, index, strict=True))
    for depth, number in enumerate(site.path, start=1):
        key.append(number)
        if depth in turns:
            key.append(turns[depth])
    return (*key, math.inf)


def flags(inspection: "Inspection") -> dict[str, list[str]]:
    """Return the flags by site name; those of a loop's iterations together."""
    inspection = jax.device_get(inspection)
    last = _last(inspection)
    return _flags_by_name(inspection.sites, 1, last["stats"], last["grad_stats"])[0]


def _flags_by_name(
    sites: Iterable[Site], n: int, stats: Mapping[str, Stats], grad_stats: Mapping[str, Stats]
) -> list[dict[str, list[str]]]:
    entries = _entries(sites, n, stats, grad_stats)
    out: list[dict[str, list[str]]] = [{} for _ in range(n)]
    for entry, flags in zip(entries, _flags(entries, n), strict=True):
        for flag, at in flags.items():
            for k in np.flatnonzero(at):
                found = out[k].setdefault(entry.site.name, [])
                if flag not in found:
                    found.append(flag)
    return out


def to_dict(inspection: "Inspection") -> dict[str, Any]:
    """Return the inspection as plain numbers by name."""
    return to_dicts(jax.tree.map(lambda x: np.asarray(x)[None], jax.device_get(inspection)))[0]


def to_dicts(inspections: "Inspection") -> list[dict[str, Any]]:
    """Return stacked inspections, `[n, ...]` each array, as `n` dicts of plain numbers by name."""
    n = len(inspections.value)
    # A dict that a compiled function returns is sorted; this is the order of computation.
    in_order = [site.name for site in inspections.sites]
    stats, grad_stats = inspections.stats, inspections.grad_stats
    columns: dict[str, list] = {
        "value": inspections.value.tolist(),
        "sites": _rows({name: _of_stats(stats[name]) for name in in_order if name in stats}, n),
        "site_grads": _rows(
            {name: _of_stats(grad_stats[name]) for name in in_order if name in grad_stats}, n
        ),
        "grads": _rows({name: _of_gradients(g) for name, g in _leaves(inspections.grads)}, n),
        "param_order": [list(inspections.param_order) for _ in range(n)],
    }
    if inspections.update_ratios is not None:
        ratios = {name: np.asarray(r).tolist() for name, r in _leaves(inspections.update_ratios)}
        columns["update_ratios"] = _rows(ratios, n)
    if np.ndim(inspections.value) == 1:
        columns["flags"] = _flags_by_name(inspections.sites, n, stats, grad_stats)
    return _rows(columns, n)


def _rows(columns: dict[str, list], n: int) -> list[dict[str, Any]]:
    """Return `n` dicts, given the `n` values of each name."""
    # A log may have a row for every step of training: `zip` makes it several times faster than a loop does.
    each = zip(*columns.values(), strict=True) if columns else [()] * n
    return [dict(zip(columns, values, strict=True)) for values in each]


def _of_stats(stats: Stats) -> list[dict[str, Any]]:
    columns = stats.to_dict()
    return _rows(columns, len(columns["count"]))


def summarized(inspection: "Inspection") -> "Inspection":
    """Return what `to_dict` needs of an inspection: statistics of the gradients instead of the gradients."""
    histogram = any(stats.histogram is not None for stats in inspection.stats.values())
    of_gradient = (*OF_GRADIENT, "histogram") if histogram else OF_GRADIENT
    grads = jax.tree.map(lambda grad: summarize(grad, of_gradient), inspection.grads)
    return replace(inspection, aux=None, grads=grads, input_grads=(), values={}, value_grads={}, logs={})


def _leaves(tree: PyTree) -> list[tuple[str, PyTree]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, Stats))
    return [(leaf_name(path), leaf) for path, leaf in leaves]


def _of_gradients(grads: np.ndarray | Stats) -> list[dict[str, Any]]:
    """Return statistics of `n` gradients, `[n, ...]`, or those that were taken of them already."""
    if not isinstance(grads, Stats):
        return [_of_array(grad) for grad in grads]
    found = grads.to_dict()
    columns = {name: found[name] for name in (*OF_GRADIENT, "histogram") if name in found}
    columns["nonfinite"] = list(map(int, found["nonfinite"]))
    return _rows(columns, len(found["rms"]))


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
    elif stacked := _stacked_axes(inspection):
        title = f"the last of {stacked} captures"
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
    out.add_column("tangent rms")
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
            row.tangents.get("rms") if row.tangents.get("count") else None,
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
        tangents=_over_iterations([row.tangents for row in group]),
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
