"""Figures of lenses: what each layer believes, and what each part of a model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from gradfn.circuits import BackwardLens, DirectEffects, LogitLens
from gradfn.pages.figures import LINE_COLORS, new_figure
from gradfn.pages.sequences import MAX_TOKENS, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BARS = 40


def lens_picture(
    lens: LogitLens, tokens: Sequence[str], targets: Sequence[int], vocabulary: Sequence[str], title: str = ""
) -> Figure:
    """Draw what each layer expects at each position: its most probable token, and the target's probability.

    Args:
        lens: of one sequence, with logits `[layer, T, vocab]`.
        tokens: the T tokens that the model read; the first 40 are drawn.
        targets: the index in the vocabulary of the token that follows each; none where it is negative.
        vocabulary: the text of each token.
        title: above the picture; by default how the layers' cross-entropy changes.

    Returns:
        A figure with one row per layer, the last one at the top, and one column per position. A token is bold
        where it is the target.

    Raises:
        ValueError: there is not one token and one target per position.

    >>> lens = LogitLens(jnp.log(jnp.array([[[0.5, 0.5]], [[0.25, 0.75]]])), ("embedded", "residual"), 3)
    >>> lens_picture(lens, "a", [1], "ab").get_suptitle()
    'Cross-entropy of the next token by layer: from 0.69 nats (embedded) to 0.29 (residual)'
    """
    _check("lens_picture", lens.logits, tokens, targets)
    n = min(len(tokens), MAX_TOKENS)
    followed = jnp.asarray(targets)
    losses = np.asarray(lens.cross_entropy(followed))
    found = np.exp(np.asarray(lens.log_probability(followed)))[:, :n]
    shares = np.where(np.asarray(targets[:n]) >= 0, found, np.nan)
    best = np.asarray(lens.top()[:, :n, 0])
    figure = _token_map(
        shares, 1.0, best, lens.layers, tokens, targets, vocabulary, "probability of the\ntoken that follows"
    )
    finding = f"from {losses[0]:.2f} nats ({lens.layers[0]}) to {losses[-1]:.2f} ({lens.layers[-1]})"
    figure.suptitle(title or f"Cross-entropy of the next token by layer: {finding}")
    return figure


def backward_lens_picture(
    lens: BackwardLens,
    tokens: Sequence[str],
    targets: Sequence[int],
    vocabulary: Sequence[str],
    title: str = "",
) -> Figure:
    """Draw what a step of gradient descent writes at each position: the token it promotes, and how strongly.

    Args:
        lens: of the loss of one sequence, with logits `[part, T, vocab]`.
        tokens: the T tokens that the model read; the first 40 are drawn.
        targets: the index in the vocabulary of the token that follows each; none where it is negative.
        vocabulary: the text of each token.
        title: above the picture; by default how often the last part promotes the target.

    Returns:
        A figure with one row per part, the last one at the top, and one column per position. A token is bold where it
        is the target.

    Raises:
        ValueError: there is not one token and one target per position.

    >>> logits = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> lens = BackwardLens(jnp.zeros([]), logits, jnp.ones([2, 1]), ("embedded", "feed_out"))
    >>> backward_lens_picture(lens, "a", [1], "ab").get_suptitle()
    'Gradient descent writes the token that follows: feed_out at 100 % of positions, embedded at 0 %'
    """
    _check("backward_lens_picture", lens.logits, tokens, targets)
    promoted = np.asarray(lens.promoted()[..., 0])
    counted = np.asarray(targets) >= 0
    shares = (promoted == np.asarray(targets)[None])[:, counted].mean(1)
    n = min(len(tokens), MAX_TOKENS)
    norms = np.asarray(lens.norms)[:, :n]
    # A few large gradients would make the others pale.
    limit = float(np.quantile(norms, 0.98)) or 1.0
    figure = _token_map(
        norms, limit, promoted[:, :n], lens.parts, tokens, targets, vocabulary, "norm of the gradient"
    )
    finding = f"{lens.parts[-1]} at {100 * shares[-1]:.0f} % of positions, {lens.parts[0]} at {100 * shares[0]:.0f} %"
    figure.suptitle(title or f"Gradient descent writes the token that follows: {finding}")
    return figure


def _check(what: str, logits: jax.Array, tokens: Sequence[str], targets: Sequence[int]) -> None:
    if logits.ndim != 3 or not len(tokens) == len(targets) == logits.shape[1]:
        raise ValueError(
            f"{what}: expected one token and one target per position, got {len(tokens)} tokens and {len(targets)} "
            f"targets for logits {list(logits.shape)}"
        )


def _token_map(
    values: np.ndarray,
    limit: float,
    best: np.ndarray,
    names: Sequence[str],
    tokens: Sequence[str],
    targets: Sequence[int],
    vocabulary: Sequence[str],
    label: str,
) -> Figure:
    """Draw a heat map of `values`, with the tokens `best` in it; both are `[layer, T]`. What is right is bold."""
    n_layers, n = values.shape
    figure = new_figure(max(0.34 * n + 3.2, 8.0), 0.36 * n_layers + 1.7)
    panel = figure.subplots()
    image = panel.imshow(values, cmap="Blues", aspect="auto", origin="lower", vmin=0, vmax=limit)
    for row, column in np.ndindex(n_layers, n):
        right, dark = best[row, column] == targets[column], values[row, column] > 0.5 * limit
        panel.text(
            column,
            row,
            visible(vocabulary[int(best[row, column])]),
            ha="center",
            va="center",
            color="white" if dark else "black" if right else "0.45",
            weight="bold" if right else "normal",
            family="monospace",
        )
    panel.set_xticks(range(n), [visible(token) for token in tokens[:n]], family="monospace")
    panel.set_yticks(range(n_layers), [f"{i}  {name}" for i, name in enumerate(names)])
    panel.set_xlabel("tokens that the model read (bold in a cell: the token that follows)")
    above = panel.secondary_xaxis("top")
    actual = ["" if target < 0 else visible(vocabulary[target]) for target in targets[:n]]
    above.set_xticks(range(n), actual, family="monospace", weight="bold")
    above.set_xlabel("the token that follows")
    for axis in (panel, above):
        axis.tick_params(length=0)
    figure.colorbar(image, ax=panel, label=label, pad=0.01)
    return figure


def direct_effects_picture(effects: DirectEffects, metric: str, title: str = "") -> Figure:
    """Draw what each part of a model adds to a metric, as bars in the order of computation.

    Args:
        effects: of one input.
        metric: what it measures: `"logit of 'a'"`.
        title: above the picture; by default which part has the largest effect.

    Returns:
        A figure with one bar per part or head, the first one at the top, and the sum at the bottom. Of more than 40,
        the smallest share a bar.

    >>> none, parts, heads = jnp.zeros([]), jnp.array([1.0, 2.0]), jnp.array([[-1.0, 3.0]])
    >>> names = ("a", "b"), (1,)
    >>> effects = DirectEffects(parts.sum(), none, parts, heads, none[None], none, none, none, *names)
    >>> print(direct_effects_picture(effects, "the logit").get_suptitle())
    the logit is 3;
    the largest direct effect is +3, of b, head 1
    """
    # What rounding leaves of the rest, and biases that the model does not have, are not drawn.
    tiny = 1e-5 * max(abs(effect) for _, effect in effects.rows())
    rows = [(name, effect) for name, effect in effects.rows() if abs(effect) > tiny]
    name, largest = max(rows, key=lambda row: abs(row[1]))
    order = sorted(range(len(rows)), key=lambda i: -abs(rows[i][1]))
    shown = [rows[i] for i in sorted(order[:MAX_BARS])]
    if len(rows) > MAX_BARS:
        shown.append((f"{len(rows) - MAX_BARS} others", sum(rows[i][1] for i in order[MAX_BARS:])))
    figure = new_figure(7.6, 0.22 * len(shown) + 1.5)
    panel = figure.subplots()
    values = np.array([effect for _, effect in shown] + [float(effects.value)])
    colors = ["#b2182b" if value > 0 else "#2166ac" for value in values[:-1]] + [LINE_COLORS[2]]
    panel.barh(range(len(values)), values, color=colors, height=0.75)
    room = 0.012 * float(np.ptp(np.append(values, 0)))
    for i, value in enumerate(values):
        panel.text(
            value + (room if value >= 0 else -room),
            i,
            f"{value:+.2f}",
            va="center",
            ha="left" if value >= 0 else "right",
            fontsize=7,
        )
    panel.set_yticks(range(len(values)), [*(each for each, _ in shown), "sum"], fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.12, y=0.01)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.axhline(len(shown) - 0.5, color="0.5", linewidth=0.8)
    panel.set_xlabel("direct effect (red raises it, blue lowers it)")
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.tick_params(axis="y", length=0)
    default = (
        f"{metric} is {float(effects.value):.3g};\nthe largest direct effect is {largest:+.3g}, of {name}"
    )
    figure.suptitle(title or default, fontsize=11)
    return figure
