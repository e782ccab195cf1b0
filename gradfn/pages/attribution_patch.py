"""Figures of attribution patching: estimates against exact effects, the largest edges, faithfulness of circuits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from gradfn.circuits import EdgeAttribution, Faithfulness, NodeAttribution, PatchSweep
from gradfn.pages.charts import short
from gradfn.pages.figures import LINE_COLORS, LINE_STYLES, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UP, DOWN = "#b2182b", "#2166ac"  # red and blue, as in the figures of weights
MAX_ROWS = 60


def attribution_picture(scores: NodeAttribution, sweep: PatchSweep, title: str = "") -> Figure:
    """Draw estimated effects, the exact ones, and one against the other.

    Args:
        scores: of one pair of inputs.
        sweep: of the same parts.
        title: above the picture; by default their rank correlation.

    Returns:
        A figure with two maps on one color scale (the last word of `over` from left to right, the others from top to
        bottom, 60 rows at most), and a panel with one dot per part.

    Raises:
        ValueError: the sweep is of other parts.

    >>> import jax.numpy as jnp
    >>> effects, own = jnp.array([[1.0, 3.0], [2.0, 0.0]]), (("layer", "head"), (("a", "b"), ("0", "1")))
    >>> scores = NodeAttribution(effects + 0.1, jnp.ones(()), jnp.zeros(()), *own, ("a", "b"), (), "corrupt", "atp")
    >>> sweep = PatchSweep(effects, jnp.ones(()), jnp.zeros(()), *own, "corrupt", "")
    >>> attribution_picture(scores, sweep).get_suptitle()
    'Rank correlation of estimated and exact effects of 4 patches: 1.00'
    """
    rank = scores.compare(sweep)
    maps = [np.asarray(x, np.float64) for x in (scores.scores, sweep.effect)]
    columns = scores.labels[-1]
    named = [
        [_named(word, label) for label in of] for word, of in zip(scores.words, scores.labels, strict=True)
    ]
    rows = [", ".join(each) for each in itertools.product(*named[:-1])]
    shown = [x.reshape(-1, len(columns))[:MAX_ROWS] for x in maps]  # [..., columns] -> [rows, columns]
    n_rows = len(shown[0])
    limit = max(float(np.abs(x).max()) for x in shown) or 1.0
    figure = new_figure(min(2.2 * max(0.34 * len(columns), 2.0), 9.0) + 5.0, max(0.24 * n_rows + 1.6, 3.6))
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    for panel, x, name in zip(panels, shown, ("estimated", "exact"), strict=False):
        image = panel.imshow(
            x, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        panel.set_title(name)
        step = max(1, len(columns) // 12)
        panel.set_xticks(range(0, len(columns), step), [short(_last(c), 12) for c in columns[::step]])
        panel.set_xlabel(scores.words[-1])
        panel.tick_params(length=0)
    panels[0].set_yticks(range(n_rows), [short(row, 24) for row in rows[:n_rows]])
    panels[1].set_yticks([])
    figure.colorbar(image, ax=list(panels[:2]), label="change of the metric", pad=0.02)
    estimated, exact = (x.ravel() for x in maps)
    panels[2].axline((0, 0), slope=1, color="0.7", linewidth=1, label="equal")
    panels[2].axhline(0, color="0.9", linewidth=1, zorder=0)
    panels[2].axvline(0, color="0.9", linewidth=1, zorder=0)
    panels[2].plot(exact, estimated, "o", color=LINE_COLORS[0], alpha=0.6, markersize=4, clip_on=False)
    ends = min(estimated.min(), exact.min()), max(estimated.max(), exact.max())
    room = 0.05 * (ends[1] - ends[0]) or 1.0
    panels[2].set(xlim=(ends[0] - room, ends[1] + room), ylim=(ends[0] - room, ends[1] + room), box_aspect=1)
    panels[2].set_xlabel("exact effect")
    panels[2].set_ylabel("estimated effect")
    panels[2].spines[["top", "right"]].set_visible(False)
    panels[2].legend(frameon=False)
    found = f"Rank correlation of estimated and exact effects of {exact.size:,} patches: {rank:.2f}"
    figure.suptitle(title or found)
    return figure


def edges_picture(edges: EdgeAttribution, n: int = 20, title: str = "") -> Figure:
    """Draw the largest edges of a transformer as a graph, from the embedding at the bottom to the output at the top.

    Args:
        edges: of one pair of inputs.
        n: how many edges to draw.
        title: above the picture; by default the largest edge.

    Returns:
        A figure with one box per part that has such an edge. Red edges raise the metric, blue ones lower it, as wide as
        their score is large; `q`, `k` and `v` say what a head reads.

    >>> import jax.numpy as jnp
    >>> names = ("embedded", "a0.h0", "m0"), ("a0.h0.q", "a0.h0.k", "a0.h0.v", "m0", "final")
    >>> scores = jnp.array([[0.0, 1, 2, 3, 4], [0, 0, 0, -7, 5], [0, 0, 0, 0, 6]])
    >>> edges_picture(EdgeAttribution(scores, *jnp.zeros(3), *names, "corrupt")).get_suptitle()
    'The 8 largest of 8 edges; the largest is -7, from a0.h0 to m0'
    """
    top = edges.top(n)
    largest = top[0]
    n_heads = 1 + max((int(name.partition("h")[2]) for name in edges.senders if "h" in name), default=0)
    used = dict.fromkeys(name for edge in top for name in (edge.sender, _part(edge.receiver)))
    at = {name: _position(name, n_heads, edges) for name in used}
    height = max(y for _, y in at.values()) + 1
    figure = new_figure(max(1.15 * (n_heads + 1) + 1.5, 5.0), max(0.62 * height + 1.0, 4.0))
    panel = figure.subplots()
    panel.set_axis_off()
    for layer in range(0, sum(name[0] == "m" for name in edges.senders), 2):
        panel.axhspan(2.4 * layer + 0.55, 2.4 * layer + 2.95, color="0.96", zorder=0)
    for edge in reversed(top):
        (x0, y0), (x1, y1) = at[edge.sender], at[_part(edge.receiver)]
        share = abs(edge.score) / abs(largest.score or 1.0)
        kind = edge.receiver.rpartition(".")[2] if edge.receiver.count(".") == 2 else ""
        x1 += {"q": -0.25, "v": 0.25}.get(kind, 0.0)
        # What the head reads stands between the arrow and the box.
        y1 -= 0.42 if kind else 0.2
        if kind:
            panel.text(x1, y1 + 0.01, kind, fontsize=8, color="0.3", ha="center", va="bottom")
        # An arc, so that edges along one column do not lie on one another.
        bend = 0.0 if y1 - y0 < 1.5 else 0.12 + 0.02 * (y1 - y0)
        style = f"arc3,rad={bend:.2f}"
        arrow = {"arrowstyle": "-|>", "connectionstyle": style, "shrinkA": 0, "shrinkB": 0}
        look = {
            "color": UP if edge.score > 0 else DOWN,
            "linewidth": 0.6 + 4.4 * share,
            "alpha": 0.35 + 0.6 * share,
        }
        panel.annotate("", (x1, y1), (x0, y0 + 0.2), arrowprops=arrow | look)
    for name, (x, y) in at.items():
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "0.4"}
        panel.text(x, y, name, ha="center", va="center", bbox=box, fontsize=9)
    xs = [x for x, _ in at.values()]
    panel.set_xlim(min(xs) - 0.8, max(xs) + 0.8)
    panel.set_ylim(-0.6, height - 0.4)
    legend = "red raises the metric, blue lowers it; q, k, v: what the head reads"
    panel.text(0.5, 0.0, legend, transform=panel.transAxes, ha="center", va="top", fontsize=8, color="0.4")
    found = f"The {len(top)} largest of {len(edges.edges):,} edges; the largest is {largest.score:.3g}, "
    figure.suptitle(title or f"{found}from {largest.sender} to {largest.receiver}")
    return figure


def faithfulness_picture(curves: Mapping[str, Faithfulness], title: str = "") -> Figure:
    """Draw how much of the metric circuits recover by the share of parts that are intact.

    Args:
        curves: by name, such as the method that scored the parts.
        title: above the picture; by default which curve has the largest area below it.

    Returns:
        A figure with one line per curve; of several pairs of inputs (from `vmap`) the mean.

    >>> import jax.numpy as jnp
    >>> curve = Faithfulness(jnp.array([0.0, 0.95, 1.0]), jnp.ones(()), jnp.zeros(()), (0, 2, 8), 8, "nodes")
    >>> faithfulness_picture({"atp": curve}).get_suptitle()
    'atp recovers 95 % of the metric with 2 of 8 nodes intact; area 0.85'
    """
    areas = {name: float(np.mean(np.asarray(curve.area))) for name, curve in curves.items()}
    name = max(areas, key=lambda each: areas[each])
    figure = new_figure(6.4, 4.2)
    panel = figure.subplots()
    for y, text in ((0.0, "corrupt"), (1.0, "clean")):
        panel.axhline(y, color="0.75", linewidth=1, zorder=0)
        panel.text(1.0, y, f" {text}", color="0.4", va="center", transform=panel.get_yaxis_transform())
    for (each, curve), color, style in zip(
        curves.items(), itertools.cycle(LINE_COLORS), itertools.cycle(LINE_STYLES), strict=False
    ):
        shares = 100 * np.array(curve.counts) / curve.total
        label = f"{each} (area {areas[each]:.2f})"
        panel.plot(shares, _mean(curve), style, color=color, marker="o", markersize=4, label=label)
    best = curves[name]
    panel.set_xlim(0, 100)
    panel.set_xlabel(f"{best.kind} intact (% of {best.total:,})")
    panel.set_ylabel("share of the metric recovered")
    panel.grid(color="0.93")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    values = _mean(best)
    # From there on the curve stays up.
    enough = next(i for i in range(len(values)) if np.all(values[i:] >= min(0.9, values[-1])))
    found = f"{name} recovers {100 * values[enough]:.0f} % of the metric with {best.counts[enough]:,} of"
    figure.suptitle(title or f"{found} {best.total:,} {best.kind} intact; area {areas[name]:.2f}")
    return figure


def _mean(curve: Faithfulness) -> np.ndarray:
    values = np.asarray(curve.normalized, np.float64)
    return values.mean(tuple(range(values.ndim - 1)))


def _named(word: str, label: str) -> str:
    return _last(label) if word == "layer" else f"{word} {label}"


def _last(label: str) -> str:
    """Return what tells a layer apart: `blocks/0/attention/mixed` is `mixed 0`, as `mixed[0]` in a loop."""
    *folders, last = label.split("/")
    return " ".join([last.replace("[", " ").replace("]", ""), *(part for part in folders if part.isdigit())])


def _part(receiver: str) -> str:
    """Return the box of a receiver: that of the head which reads, or of the MLP."""
    return receiver.rpartition(".")[0] if receiver.count(".") == 2 else receiver


def _position(name: str, n_heads: int, edges: EdgeAttribution) -> tuple[float, float]:
    """Return where the box of a part is: layers upward, heads from left to right, the MLP to their right and above."""
    last = sum(1 for sender in edges.senders if sender[0] == "m")
    middle = n_heads / 2
    if name == "embedded":
        return middle, 0.0
    if name == "final":
        return middle, 2.4 * last + 1.2
    layer = int(name[1:].partition(".")[0])
    if name[0] == "m":
        return float(n_heads), 2.4 * layer + 2.4
    return float(name.partition("h")[2]), 2.4 * layer + 1.2
