"""Figures of networks that read sequences: attention, predictions, and how far back the gradient reaches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradfn.pages.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TOKENS = 40  # more columns would be too narrow to read


def attention_maps(
    probabilities: Mapping[str, Any], tokens: Sequence[str], queries: Sequence[str] | None = None
) -> Figure:
    """Draw how much each position of a sequence attends to each other one, one panel per head.

    Args:
        probabilities: the weights of each layer by its name, `[heads, T, S]`; each row sums to 1.
        tokens: the text at the S positions that are attended to.
        queries: the text at the T positions that attend; the same as `tokens` by default.

    Returns:
        A figure with one row of panels per layer, all on one color scale from 0 to 1.

    Raises:
        ValueError: a shape of weights does not match the tokens and queries.

    >>> from gradfn.pages.sequences import attention_maps
    >>> figure = attention_maps({"block 0": np.full([2, 3, 3], 1 / 3)}, "abc")
    >>> [panel.get_title() for panel in figure.axes][:2]
    ['block 0, head 0', 'block 0, head 1']
    >>> print(figure.get_suptitle())
    block 0, head 0 attends most sharply: 33 % of its attention is on one position
    (the row's position attends to the column's)
    """
    queries = tokens if queries is None else queries
    layers = {name: np.asarray(weights, np.float64) for name, weights in probabilities.items()}
    for name, weights in layers.items():
        if weights.ndim != 3 or weights.shape[1:] != (len(queries), len(tokens)):
            expected = f"[heads, {len(queries)}, {len(tokens)}]"
            raise ValueError(f"attention_maps: {name}: expected {expected}, got {list(weights.shape)}")
    n_columns = max(len(weights) for weights in layers.values())
    cell = min(max(0.125 * max(len(tokens), len(queries)), 2.0), 4.5)  # inches
    figure = new_figure(cell * n_columns + 1.2, (cell + 0.35) * len(layers) + 0.8, "compressed")
    panels = figure.subplots(len(layers), n_columns, squeeze=False)
    # In points, so that the labels fit side by side.
    size = min(9.0, 52 * cell / max(len(tokens), len(queries)))
    for row, (name, weights) in zip(panels, layers.items(), strict=True):
        for head, panel in enumerate(row):
            if head >= len(weights):
                panel.set_axis_off()
                continue
            # The square root keeps small weights visible.
            image = panel.imshow(
                np.sqrt(weights[head]), cmap="Blues", vmin=0, vmax=1, interpolation="nearest"
            )
            panel.set_title(f"{name}, head {head}", fontsize=9)
            panel.set_xticks(range(len(tokens)), map(visible, tokens), fontsize=size, family="monospace")
            panel.set_yticks(range(len(queries)), map(visible, queries), fontsize=size, family="monospace")
            panel.tick_params(length=0, pad=1)
    bar = figure.colorbar(
        image, ax=panels.ravel().tolist(), label="share of the attention", aspect=40, pad=0.02
    )
    shares = [0, 0.01, 0.1, 0.25, 0.5, 1]
    bar.set_ticks([math.sqrt(share) for share in shares], labels=[f"{100 * share:.0f} %" for share in shares])
    sharp = {
        (name, head): float(one.max(-1).mean())
        for name, weights in layers.items()
        for head, one in enumerate(weights)
    }
    name, head = max(sharp, key=lambda which: sharp[which])
    share = f"{100 * sharp[name, head]:.0f} %"
    finding = f"{name}, head {head} attends most sharply: {share} of its attention is on one position"
    figure.suptitle(f"{finding}\n(the row's position attends to the column's)")
    return figure


def token_probabilities(
    tokens: Sequence[str],
    targets: Sequence[int],
    probabilities: Any,
    vocabulary: Sequence[str],
    n_best: int = 5,
) -> Figure:
    """Draw what a language model expects after each token: the likeliest ones, and the one that follows.

    Args:
        tokens: the T tokens that the model read; the first 40 are drawn.
        targets: the index in the vocabulary of the token that follows each.
        probabilities: `[T, vocab]`, the distribution of each next token.
        vocabulary: the text of each token.
        n_best: how many of the likeliest to draw.

    Returns:
        A figure with one column per token; the target has a frame, and its probability is at the bottom.

    Raises:
        ValueError: there is not one target and one row of probabilities per token.

    >>> from gradfn.pages.sequences import token_probabilities
    >>> token_probabilities("ab", [1, 0], [[0.25, 0.75], [0.5, 0.5]], "ab", n_best=2).get_suptitle()
    'Of 2 tokens, 100 % were the likeliest or second; the targets had a probability of 61 % (geometric mean)'
    """
    p = np.asarray(probabilities, np.float64)
    if not len(tokens) == len(targets) == len(p) or p.ndim != 2:
        shapes = f"{len(tokens)} tokens, {len(targets)} targets, probabilities {list(p.shape)}"
        raise ValueError(
            f"token_probabilities: one target and one row of probabilities per token, got {shapes}"
        )
    actual = p[np.arange(len(p)), list(targets)]  # [T]
    rank = (p > actual[:, None]).sum(1)
    n = min(len(tokens), MAX_TOKENS)
    n_best = min(n_best, p.shape[1])
    best = np.argsort(-p[:n], axis=1, kind="stable")[:, :n_best]  # [n, n_best]
    shares = np.take_along_axis(p[:n], best, 1).T  # [n_best, n]
    figure = new_figure(max(0.36 * n + 1.6, 9.5), 0.4 * n_best + 2.2)
    panel = figure.subplots()
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(*shares.shape):
        color = "white" if shares[row, column] > 0.5 else "black"
        text = visible(vocabulary[int(best[column, row])])
        panel.text(column, row, text, ha="center", va="center", color=color, family="monospace")
        if best[column, row] == targets[column]:
            box = panel.add_patch(_rectangle((column - 0.46, row - 0.44), 0.92, 0.88))
            box.set(fill=False, edgecolor="#d55e00", linewidth=2)
    panel.set_xticks(range(n), [visible(token) for token in tokens[:n]], family="monospace")
    panel.set_yticks(range(n_best), [f"{i + 1}." for i in range(n_best)])
    panel.xaxis.tick_top()
    panel.tick_params(length=0)
    panel.set_title("tokens that the model read", fontsize=10)
    panel.set_ylabel("most probable next tokens")
    below = panel.secondary_xaxis("bottom")
    actual_text = [visible(vocabulary[target]) for target in targets[:n]]
    labels = [f"{text}\n{_share(share)}" for text, share in zip(actual_text, actual, strict=False)]
    below.set_xticks(range(n), labels, fontsize=8, family="monospace")
    below.tick_params(length=0)
    below.set_xlabel("the target and its probability in % (framed above where it is among the likeliest)")
    figure.colorbar(image, ax=panel, label="probability", pad=0.01)
    mean = math.exp(float(np.log(np.maximum(actual, 1e-12)).mean()))
    figure.suptitle(
        f"Of {len(p)} tokens, {100 * (rank < 2).mean():.0f} % were the likeliest or second; "
        f"the targets had a probability of {100 * mean:.0f} % (geometric mean)"
    )
    return figure


def visible(token: str) -> str:
    """Return a token as it is shown in a figure: white space as a visible symbol.

    >>> visible("a b\\n")
    'a␣b↵'
    """
    return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "→")


def _rectangle(corner: tuple[float, float], width: float, height: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height)


def _share(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.005 else "<1"
