"""A picture of a program, as SVG: its sites folded by module, what flows between them, and how much gradient.

Rows follow the computation from top to bottom. An edge carries a value; its width is the norm of that value's gradient.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from typing import Any

import numpy as np

from gradfn.inspection.summaries import Stats
from gradfn.jaxpr import Program, Site
from gradfn.jaxpr.costs import Costs
from gradfn.jaxpr.dataflow import Dataflow, loop_split
from gradfn.jaxpr.interpreter import Path, bodies

# More nodes than that are folded, unless the caller decides.
MOST_NODES = 44
NODE, HEIGHT, GAP, BETWEEN = 256, 26, 16, 14
LEFT, MARGIN = 100, 16
# The width of the legend.
LEGEND = 500
THIN, THICK = 1.2, 9.0
INPUT, RESULT = -1, -2
# No name of a site starts like that.
_START, _END = "\0data", "\0result"

_STYLE = """
text { fill: #1d2733; font: 13px Helvetica, Arial, sans-serif }
.cost, .legend, .group { fill: #51606f; font-size: 11px }
.node { fill: #fff; stroke: #8a99a8 } .end { fill: #eef4fb; stroke: #5b8fc9 } .box { fill: #f4f6f8; stroke: #d5dbe1 }
path { fill: none; stroke: #3f7cc4; stroke-opacity: 0.75 } .plain { stroke: #9aa7b4 } .bad { stroke: #d0342c }
.back { stroke-dasharray: 5 4 }
"""


@dataclass
class _Node:
    """Some sites that are drawn as one box."""

    name: str
    sites: list[int] = field(default_factory=list)
    row: int = 0
    x: float = 0.0
    y: float = 0.0
    box: str = ""


class _Flow(Dataflow[frozenset[int]]):
    """Finds, for each value, the sites it is computed from directly; the records are edges between sites."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        self.at = {(site.path, site.index): k for k, site in enumerate(sites)}
        # What the last iteration of each loop returns, by its path and the index of the operand.
        self.last: dict[tuple[Path, int], frozenset[int]] = {}

    def constant(self, value: object) -> frozenset[int]:
        return frozenset()

    def join(self, values: Sequence[frozenset[int]]) -> frozenset[int]:
        return frozenset().union(*values)

    def equation(self, path: Path, eqn: Any, operands: list[frozenset[int]]) -> list[frozenset[int]]:
        return [self.join(operands)] * len(eqn.outvars)

    def out_of_iteration(self, path: Path, operand: int, role: str, value: frozenset[int]) -> frozenset[int]:
        self.last[path, operand] = value
        return value

    def bind(self, path: Path, k: int, var: object, value: frozenset[int], eqn: Any | None) -> frozenset[int]:
        if eqn is None:
            return value
        # A scan returns what its last iteration does, not what it starts with.
        if bodies(eqn)[0] == "scan" and eqn.params["length"]:
            value = self.last[path, k + loop_split("scan", eqn)[1]]
        site = self.at.get((path, k))
        if site is None:
            return value
        self.records += [(source, site) for source in value]
        return frozenset([site])


def edges(program: Program, sites: Sequence[Site]) -> list[tuple[int, int]]:
    """Return the pairs of sites of which the second is computed from the first, with no other site between.

    `INPUT` stands for the arguments after the first, `RESULT` for what the function returns.
    """
    flow = _Flow(sites)
    inputs = [frozenset([INPUT] if owner else []) for owner in program.owners]
    outs = flow.run(program.jaxpr, inputs)
    return sorted({*flow.records, *((source, RESULT) for source in flow.join(outs))})


def _module(site: Site) -> list[str]:
    """Return the path of the module that computes a site."""
    # The path of a parameter says more than the classes that Equinox names scopes after.
    inside = site.source == "parameter" or f"{site.name}/".startswith(f"{site.scope}/") or not site.scope
    parts = (site.name if inside else f"{site.scope}/{site.name}").split("/")
    return parts if site.source == "scope" else parts[:-1]


def _folded(sites: Sequence[Site], depth: int) -> dict[int, str]:
    """Return the node of each site: the first `depth` parts of its module, or itself where there are fewer."""
    modules = [_module(site) for site in sites]
    return {
        k: "/".join(module[:depth]) if len(module) >= depth else _full_name(site, module)
        for k, (site, module) in enumerate(zip(sites, modules, strict=True))
    }


def _full_name(site: Site, module: Sequence[str]) -> str:
    return "/".join(module) if site.source == "scope" else "/".join([*module, site.name.split("/")[-1]])


def svg(
    program: Program,
    sites: Sequence[Site],
    costs: Costs,
    gradients: Mapping[str, Stats] | None,
    depth: int | None = None,
) -> str:
    """Return the picture of a program.

    Args:
        program: the program.
        sites: its sites.
        costs: its costs.
        gradients: statistics of the gradients by the name of the site; None draws all edges alike.
        depth: how many parts of a module's path are shown; what is below is folded into one node. None shows as much
            as fits.
    """
    nodes, carried = _graph(program, sites, depth)
    order = {name: i for i, name in enumerate(nodes)}
    _place(nodes, [(a, b) for a, b in carried if order[a] < order[b]])
    widths = _Widths([_norm(site, gradients or {}) for site in sites])
    every = nodes.values()
    parts = [
        *_boxes(nodes, sites),
        *(_edge(every, nodes[a], nodes[b], *widths.of(sources)) for (a, b), sources in carried.items()),
        *(_box_of(node, sites, costs) for node in every),
    ]
    right = max(max(node.x for node in every) + NODE + LEFT, LEGEND)
    bottom = max(node.y for node in every) + HEIGHT + MARGIN
    legend = [*totals(costs).split("; "), *widths.legend()]
    parts += [_line(text, bottom + 16 * i) for i, text in enumerate(legend)]
    height = bottom + 16 * len(legend)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right:.0f} {height:.0f}" width="{right:.0f}" '
        f'height="{height:.0f}"><style>{_STYLE}</style>'
        f'<rect width="{right:.0f}" height="{height:.0f}" fill="#fff"/>{"".join(parts)}</svg>'
    )


def _graph(
    program: Program, sites: Sequence[Site], depth: int | None
) -> tuple[dict[str, _Node], dict[tuple[str, str], set[int]]]:
    """Return the nodes by name, in the order of computation, and the sites whose values each edge carries."""
    deepest = max((len(_module(site)) + 1 for site in sites), default=1)
    folded = _folded(sites, depth or deepest)
    while depth is None and deepest > 1 and len(set(folded.values())) > MOST_NODES:
        deepest -= 1
        folded = _folded(sites, deepest)
    nodes = {name: _Node(name) for name in [_START, *dict.fromkeys(folded.values()), _END]}
    for k, name in folded.items():
        nodes[name].sites.append(k)
    folded |= {INPUT: _START, RESULT: _END}
    carried: dict[tuple[str, str], set[int]] = {}
    for source, target in edges(program, sites):
        if folded[source] != folded[target]:
            carried.setdefault((folded[source], folded[target]), set()).add(source)
    if not any(source == _START for source, _ in carried):
        del nodes[_START]
    return nodes, carried


def _norm(site: Site, gradients: Mapping[str, Stats]) -> float | None:
    """Return the norm of a site's gradient, averaged over the iterations of loops; None where there is none."""
    stats = gradients.get(site.name)
    if stats is None or stats.rms is None:
        return None
    return float(np.mean(np.asarray(stats.rms, np.float64) * np.sqrt(np.asarray(stats.count, np.float64))))


class _Widths:
    """How wide edges are: on a logarithmic scale of at least one decade and at most four."""

    def __init__(self, norms: Sequence[float | None]) -> None:
        self.norms = norms
        known = [norm for norm in norms if norm and math.isfinite(norm)]
        self.largest = max(known, default=0.0)
        self.smallest = max(min(*known, self.largest / 10), self.largest / 1e4) if known else 0.0

    def of(self, sources: Iterable[int]) -> tuple[float, str]:
        """Return the width and the class of an edge that carries the values of some sites."""
        norms = [norm for k in sources if k >= 0 and (norm := self.norms[k]) is not None]
        if not all(math.isfinite(norm) for norm in norms):
            return THICK / 2, "bad"
        norm = max(norms, default=0.0)
        if norm == 0:
            return THIN, "plain"
        share = math.log10(norm / self.smallest) / math.log10(self.largest / self.smallest)
        return THIN + (THICK - THIN) * max(share, 0.0), "flow"

    def legend(self) -> list[str]:
        """Return lines that explain the widths."""
        if all(norm is None for norm in self.norms):
            return []
        return [
            f"edges: norm of the gradient at the value, {self.smallest:.1e} (thin) to {self.largest:.1e} (thick), "
            "log scale",
            "gray: no gradient, or not inspected; red: NaN or infinite",
        ]


def _place(nodes: Mapping[str, _Node], forward: Sequence[tuple[str, str]]) -> None:
    """Give each node a row below those that it is computed from, a place in it, and the box that it is in."""
    into: dict[str, list[str]] = {}
    for source, target in forward:
        into.setdefault(target, []).append(source)
    for name, node in nodes.items():
        node.row = max((nodes[source].row + 1 for source in into.get(name, [])), default=0)
    ordered = sorted(nodes.values(), key=lambda node: node.row)
    for group, run in groupby(ordered, key=lambda node: node.name.rpartition("/")[0]):
        members = list(run)
        for node in members if len(members) > 1 else ():
            node.box = group
    widest = max(len(list(row)) for _, row in groupby(ordered, key=lambda node: node.row))
    y, before = float(MARGIN), ""
    for _, run in groupby(ordered, key=lambda node: node.row):
        row = list(run)
        # Room for the name of a box, and for the end of the one before.
        y += 24 if row[0].box and row[0].box != before else 10 if row[0].box != before else 0
        before = row[-1].box
        free = (widest - len(row)) * (NODE + GAP) / 2
        for i, node in enumerate(row):
            node.x, node.y = LEFT + free + i * (NODE + GAP), y
        y += HEIGHT + BETWEEN


def _boxes(nodes: Mapping[str, _Node], sites: Sequence[Site]) -> list[str]:
    """Return a box around each run of nodes of one module, with its name and the number of its iterations."""
    ordered = sorted(nodes.values(), key=lambda node: node.row)
    out = []
    for group, run in groupby(ordered, key=lambda node: node.box):
        members = list(run)
        if not group:
            continue
        x, y = min(node.x for node in members) - 74, min(node.y for node in members) - 20
        right = max(node.x for node in members) + NODE + 10
        bottom = max(node.y for node in members) + HEIGHT + 8
        axes = {sites[k].axes for node in members for k in node.sites}
        times = "".join(f" × {n}" for n in axes.pop()) if len(axes) == 1 else ""
        out.append(
            f'<rect class="box" x="{x:.1f}" y="{y:.1f}" width="{right - x:.1f}" height="{bottom - y:.1f}" rx="8"/>'
            f'<text class="group" x="{x + 8:.1f}" y="{y + 14:.1f}">{escape(group + times)}</text>'
        )
    return out


def _edge(nodes: Iterable[_Node], source: _Node, target: _Node, width: float, kind: str) -> str:
    """Return a line to a node below, an arc around the nodes between, or a dashed one to the next iteration."""
    span = target.row - source.row
    if span == 1 or (span > 1 and abs(source.x - target.x) > NODE / 2):
        (x, y), (end, bottom) = (source.x + NODE / 2, source.y + HEIGHT), (target.x + NODE / 2, target.y)
        middle = (y + bottom) / 2
        path = f"M{x:.1f} {y:.1f}C{x:.1f} {middle:.1f} {end:.1f} {middle:.1f} {end:.1f} {bottom:.1f}"
        return f'<path class="{kind}" stroke-width="{width:.1f}" d="{path}"/>'
    rows = range(min(source.row, target.row), max(source.row, target.row) + 1)
    between = [node.x for node in nodes if node.row in rows]
    room = min(18 + 7 * abs(span), LEFT - 20)
    # The next iteration is reached on the right.
    side, x = (NODE, max(between) + NODE + room) if span <= 0 else (0, min(between) - room)
    y, end = source.y + HEIGHT / 2, target.y + HEIGHT / 2
    path = (
        f"M{source.x + side:.1f} {y:.1f}C{x:.1f} {y:.1f} {x:.1f} {y:.1f} {x:.1f} {(y + end) / 2:.1f}"
        f"S{x:.1f} {end:.1f} {target.x + side:.1f} {end:.1f}"
    )
    return f'<path class="{kind}{" back" if span <= 0 else ""}" stroke-width="{width:.1f}" d="{path}"/>'


def _box_of(node: _Node, sites: Sequence[Site], costs: Costs) -> str:
    """Return a node: its name, and what it costs."""
    ends = {_START: "data", _END: "result"}
    name = ends.get(node.name) or (node.name.rpartition("/")[2] if node.box else node.name)
    of = [sites[k].name for k in node.sites] or ([""] if node.name == _END else [])
    flops, saved = (sum(cost.get(site, 0) for site in of) for cost in (costs.flops, costs.saved))
    cost = " · ".join([*([si(flops, "FLOP")] if flops else []), *([si(saved, "B")] if saved else [])])
    kind = "end" if node.name in ends else "node"
    title = f"<title>{escape(', '.join(of[:20]))}</title>" if node.sites else ""
    # Letters are about 7 units wide, those of the costs 6. The end of a name says most.
    room = int((NODE - 24 - 6 * len(cost)) / 7)
    shown = name if len(name) <= room else f"…{name[1 - room :]}"
    return (
        f'<g>{title}<rect class="{kind}" x="{node.x:.1f}" y="{node.y:.1f}" width="{NODE}" height="{HEIGHT}" rx="5"/>'
        f'<text x="{node.x + 8:.1f}" y="{node.y + 17:.1f}">{escape(shown)}</text>'
        f'<text class="cost" text-anchor="end" x="{node.x + NODE - 8:.1f}" y="{node.y + 17:.1f}">{cost}</text></g>'
    )


def _line(text: str, y: float) -> str:
    return f'<text class="legend" x="{MARGIN}" y="{y:.1f}">{escape(text)}</text>'


def totals(costs: Costs) -> str:
    """Return a line with the costs of a whole program."""
    text = f"forward pass: {si(sum(costs.flops.values()), 'FLOP')}"
    if not costs.saved:
        return text
    inputs = costs.saved.get("inputs", 0)
    return (
        f"{text}; saved for the backward pass: {si(sum(costs.saved.values()) - inputs, 'B')}, "
        f"and {si(inputs, 'B')} of parameters and data"
    )


def si(n: float, unit: str) -> str:
    """Return a quantity with three digits and a prefix: `1.05 MFLOP`."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if n < 999.5 or prefix == "P":
            return f"{n:.3g} {prefix}{unit}"
        n /= 1000
    raise AssertionError
