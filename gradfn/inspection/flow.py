"""How the gradient flows through the sites: the table of `print(seen)`, its flags, and the dict for logs.

Thresholds, each with its reason:

- *vanishing*, *exploding*: the norm of a site's gradient is below 1e-3, above 1e3, of that at the last site
  before the loss. A thousandfold is what ten layers make that each halve or double it (2^10 = 1024). That
  gradients shrink or grow exponentially with depth is shown in Bengio, Simard and Frasconi (1994) and
  Pascanu, Mikolov and Bengio (2013). Norms, not root mean squares: He's initialisation keeps the norm from
  layer to layer whatever their widths.
- *saturated*: more than half of a sigmoid's or tanh's values have a slope below a tenth of the largest
  (Glorot and Bengio, 2010, look at the same: activations piled up at their bounds).
- *dead*: more than half of a relu's units are zero for every row of the batch (Lu et al., 2019, "Dying
  ReLU").
- *non-finite*: any NaN or infinity, forward or backward.
"""

import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from gradfn.display import TextTable
from gradfn.inspection.summaries import Stats
from gradfn.jaxpr import Site
from gradfn.jaxpr.program import leaf_name

if TYPE_CHECKING:
    from gradfn.inspection._inspect import Inspection

VANISHING, EXPLODING = 1e-3, 1e3
SATURATED_SHARE, DEAD_SHARE = 0.5, 0.5
ROWS_PER_LOOP = 8  # of a longer loop, that many iterations are shown, evenly spaced


class Row(NamedTuple):
    """One site, in one iteration of the loops around it."""

    site: Site
    turn: tuple[int, ...]  # which iteration
    stats: dict[str, float]
    grads: dict[str, float]
    norm: float  # of the gradient; nan where there is none
    factor: float  # that norm over the norm at the next row towards the loss
    flags: list[str]

    @property
    def label(self) -> str:
        """The site's name, with the iteration behind it: `h[3]`."""
        return self.site.name + "".join(f"[{i}]" for i in self.turn)


def _numbers(stats: Stats | None, index: tuple[int, ...], depth: int) -> dict[str, float]:
    """Return one iteration's statistics as numbers; of inspections stacked in front, the last."""
    if stats is None:
        return {}
    out = {}
    for name in ("count", "mean", "rms", "max", "zeros", "saturated", "dead", "nonfinite"):
        value = getattr(stats, name)
        if value is not None:
            array = np.asarray(value)
            array = array[(-1,) * (array.ndim - depth)]
            out[name] = float(array[index])
    if out["count"] == 0:  # never computed, or not reached by the gradient: nothing to tell
        return {"count": 0.0}
    return out


def rows(seen: "Inspection") -> list[Row]:
    """Return the rows of the table, from the inputs to the loss."""
    seen = jax.device_get(seen)
    entries = []
    for site in seen.sites:
        for index in itertools.product(*[range(n) for n in site.axes]):
            stats = _numbers(seen.stats[site.name], index, len(site.axes))
            grads = _numbers(seen.grad_stats.get(site.name), index, len(site.axes))
            reached = grads.get("count", 0) > 0 and "rms" in grads
            norm = grads["rms"] * math.sqrt(grads["count"]) if reached else math.nan
            entries.append((_order(site, index), site, index, stats, grads, norm))
    entries.sort(key=lambda entry: entry[0])
    out: list[Row] = []
    after, reference = math.nan, math.nan
    for _, site, index, stats, grads, norm in reversed(entries):
        comparable = math.isfinite(norm) and math.prod(site.shape) > 1
        if comparable and norm > 0 and math.isnan(reference):
            reference = norm
        factor = norm / after if after > 0 else math.nan
        out.append(Row(site, index, stats, grads, norm, factor, _flags(stats, grads, norm / reference)))
        if math.isfinite(norm):
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


def flags(seen: "Inspection") -> dict[str, list[str]]:
    """Return the flags by site name; those of a loop's iterations together."""
    out: dict[str, list[str]] = {}
    for row in rows(seen):
        for flag in row.flags:
            if flag not in out.setdefault(row.site.name, []):
                out[row.site.name].append(flag)
    return {name: found for name, found in out.items() if found}


def to_dict(seen: "Inspection") -> dict[str, Any]:
    """Return the inspection as plain numbers by name."""
    seen = jax.device_get(seen)
    # The order of computation: a dict that comes out of a compiled function is sorted.
    in_order = [site.name for site in seen.sites]
    out: dict[str, Any] = {
        "value": np.asarray(seen.value).tolist(),
        "inspected": np.asarray(seen.inspected).tolist(),
        "sites": {name: seen.stats[name].to_dict() for name in in_order if name in seen.stats},
        "site_grads": {name: seen.grad_stats[name].to_dict() for name in in_order if name in seen.grad_stats},
        "grads": {name: _of_array(g) for name, g in _leaves(seen.grads)},
        "param_order": list(seen.param_order),
    }
    if seen.update_ratios is not None:
        out["update_ratios"] = {name: np.asarray(r).tolist() for name, r in _leaves(seen.update_ratios)}
    if np.ndim(seen.value) == 0:
        out["flags"] = flags(seen)
    return out


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _of_array(x: Any) -> dict[str, Any]:
    x = np.asarray(x)
    sizes = np.abs(x.astype(np.complex128 if np.iscomplexobj(x) else np.float64))
    if not sizes.size:
        return {"rms": 0.0, "max": 0.0, "nonfinite": 0}
    bad, largest = int(np.sum(~np.isfinite(sizes))), float(np.max(sizes))
    unit = largest if 0 < largest < math.inf else 1.0
    return {"rms": unit * float(np.sqrt(np.mean((sizes / unit) ** 2))), "max": largest, "nonfinite": bad}


def text(seen: "Inspection") -> str:
    """Return the table of sites and the table of parameters as text."""
    return f"{table(seen)}\n{parameter_table(seen)}"


def table(seen: "Inspection") -> TextTable:
    """Return a row per site, from the inputs to the loss."""
    stacked = np.ndim(seen.value)
    value = float(np.asarray(seen.value)[(-1,) * stacked])
    title = f"value {value:.6g}" + f" (the last of {np.shape(seen.value)} inspections)" * bool(stacked)
    everything = rows(seen)
    shown = _shown(everything)
    left_out = f"; {len(everything) - len(shown)} more rows of longer loops" * (len(shown) < len(everything))
    caption = f"grad ×: the norm of the gradient here over that at the next site towards the loss{left_out}"
    out = TextTable(title=title, caption=caption)
    out.add_column("site", overflow="fold")
    out.add_column("shape")
    right = ("mean", "rms", "max", "zero", "sat/dead", "non-finite", "grad rms", "grad norm", "grad ×")
    for column in right:
        out.add_column(column, justify="right")
    out.add_column("flags")
    for row in shown:
        s, g = row.stats, row.grads
        out.add_row(
            row.label,
            str(list(row.site.shape)),
            *[_number(s.get(name)) for name in ("mean", "rms", "max")],
            _share(s.get("zeros")),
            _share(s.get("saturated", s.get("dead"))),
            _count(s.get("nonfinite"), g.get("nonfinite")),
            _number(g.get("rms") if g.get("count") else None),
            _number(row.norm),
            _number(row.factor),
            " ".join(row.flags),
        )
    return out


def _shown(all_rows: list[Row]) -> list[Row]:
    def near(index: int, length: int) -> bool:
        if length <= ROWS_PER_LOOP:
            return True
        return index in {round(k * (length - 1) / (ROWS_PER_LOOP - 1)) for k in range(ROWS_PER_LOOP)}

    return [
        r for r in all_rows if all(near(i, n) for i, n in zip(r.turn, r.site.axes, strict=True)) or r.flags
    ]


def parameter_table(seen: "Inspection") -> TextTable:
    """Return a row per parameter: its gradient's size, and the update's size over the parameter's."""
    out = TextTable(caption="update/weight: about 1e-3 is usual" if seen.update_ratios is not None else None)
    out.add_column("parameter", overflow="fold")
    for column in ("shape", "grad rms", "grad max", "non-finite"):
        out.add_column(column, justify="right")
    ratios = dict(_leaves(seen.update_ratios)) if seen.update_ratios is not None else {}
    if ratios:
        out.add_column("update/weight", justify="right")
    stacked = np.ndim(seen.value)
    for name, leaf in _leaves(seen.grads):
        g = np.asarray(leaf)[(-1,) * stacked]
        found = _of_array(g)
        cells = [_number(found["rms"]), _number(found["max"]), _count(found["nonfinite"])]
        if ratios:
            cells.append(_number(float(np.asarray(ratios[name])[(-1,) * stacked])) if name in ratios else "")
        out.add_row(name, str(list(g.shape)), *cells)
    return out


def _number(x: float | None) -> str:
    return "" if x is None or math.isnan(x) else f"{x:.3g}"


def _share(x: float | None) -> str:
    return "" if x is None or math.isnan(x) else f"{100 * x:.1f}%"


def _count(*counts: float | None) -> str:
    known = [c for c in counts if c is not None]
    return f"{sum(known):.0f}" if known else ""
