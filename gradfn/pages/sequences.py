"""Figures of networks that read sequences: attention and predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradfn.pages.figures import LINE_COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_TOKENS = 40  # more columns would be too narrow to read
# What a head may attend to at each position, by how many tokens back that is; None for the first token.
TARGETS = {
    "the token itself": 0,
    "the previous token": 1,
    "the token before the previous one": 2,
    "the token three back": 3,
    "the first token": None,
}
MAX_HEADS = 12  # that are compared in one figure
CLEAR = 0.4  # of a head's attention, from which on its target is named


class Pattern(NamedTuple):
    """What a head of attention attends to.

    Attributes:
        layer: the name of its layer.
        head: its number in the layer.
        target: the one of `TARGETS` that gets most.
        share: of its attention, in [0, 1], averaged over the positions.
    """

    layer: str
    head: int
    target: str
    share: float


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


def attention_patterns(probabilities: Mapping[str, Any]) -> list[Pattern]:
    """Return for each head of causal attention which of the `TARGETS` gets most of its attention, the clearest first.

    Positions before the fourth have too few tokens to choose from, and do not count unless there are no others.

    Args:
        probabilities: the weights of each layer by its name, `[N, heads, T, T]` for N sequences.

    >>> previous = np.eye(6, k=-1)[None, None]
    >>> attention_patterns({"block 0": previous})[0]
    Pattern(layer='block 0', head=0, target='the previous token', share=1.0)
    """
    found = []
    for layer, of_layer in probabilities.items():
        weights = np.asarray(of_layer, np.float64)
        rows = np.arange(min(4, weights.shape[2] - 1), weights.shape[2])
        for head in range(weights.shape[1]):
            shares = {}
            for name, back in TARGETS.items():
                columns = np.zeros_like(rows) if back is None else np.maximum(rows - back, 0)
                shares[name] = float(weights[:, head, rows, columns].mean())
            target = max(shares, key=lambda name: shares[name])
            found.append(Pattern(layer, head, target, shares[target]))
    return sorted(found, key=lambda pattern: -pattern.share)


def clearest_head(probabilities: Mapping[str, Any], tokens: Sequence[str]) -> Figure:
    """Draw the head whose attention has the clearest target, and how clear the targets of the others are.

    Args:
        probabilities: the weights of each layer by its name, `[N, heads, T, T]` for N sequences: the first one is
            drawn, all are measured.
        tokens: the text at the T positions of the first sequence.

    Returns:
        A figure with a map of that head and a bar per head; its title names the head, or says that none has a target.

    >>> weights = {"block 0": np.stack([np.eye(6, k=-1), np.tri(6) / 6])[None]}
    >>> print(clearest_head(weights, "abcdef").get_suptitle())
    A head for the previous token: block 0, head 0 gives it 100 % of its attention
    """
    patterns = attention_patterns(probabilities)
    best = patterns[0]
    figure = new_figure(11.6, 5.0)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    weights = np.asarray(probabilities[best.layer], np.float64)[0, best.head]
    # The square root keeps small weights visible.
    left.imshow(np.sqrt(weights), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    size = min(10.0, 230 / len(tokens))
    left.set_xticks(range(len(tokens)), map(visible, tokens), fontsize=size, family="monospace")
    left.set_yticks(range(len(tokens)), map(visible, tokens), fontsize=size, family="monospace")
    left.tick_params(length=0, pad=2)
    left.set_title(f"{best.layer}, head {best.head}: stronger color, more attention", fontsize=10)
    left.set_xlabel("token that is attended to")
    left.set_ylabel("token that attends")

    shown = patterns[:MAX_HEADS]
    clear = [pattern for pattern in patterns if pattern.share >= CLEAR]
    for row, pattern in enumerate(shown):
        color = LINE_COLORS[0] if pattern.share >= CLEAR else "0.6"
        right.barh(row, 100 * pattern.share, 0.62, color=color)
        text = f"{100 * pattern.share:.0f} % on {pattern.target}"
        right.text(100 * pattern.share + 1.5, row, text, va="center", fontsize=9)
    right.set_yticks(range(len(shown)), [f"{each.layer}, head {each.head}" for each in shown], fontsize=9)
    right.set_ylim(len(shown) - 0.4, -0.6)
    right.set_xlim(0, 100)
    right.set_xlabel("attention of a head to its favorite target (%)")
    right.spines[["top", "right"]].set_visible(False)
    right.tick_params(axis="y", length=0)
    more = (
        f"the {len(shown)} clearest of {len(patterns)} heads" if len(patterns) > len(shown) else "all heads"
    )
    right.set_title(more, fontsize=10)

    percent = f"{100 * best.share:.0f} %"
    if clear:
        title = (
            f"A head for {best.target}: {best.layer}, head {best.head} gives it {percent} of its attention"
        )
    else:
        title = (
            f"No head attends to one fixed target: the most is {percent}, of {best.layer}, head {best.head} "
            f"to {best.target}"
        )
    figure.suptitle(title)
    return figure


def token_probabilities(
    tokens: Sequence[str], targets: Sequence[int], probabilities: Any, vocabulary: Sequence[str]
) -> Figure:
    """Draw how probable a language model found each token of a text, and what it expected instead.

    Args:
        tokens: the T tokens that the model read; the first 40 are drawn.
        targets: the index in the vocabulary of the token that follows each.
        probabilities: `[T, vocab]`, the distribution of each next token.
        vocabulary: the text of each token.

    Returns:
        A figure with one bar per token that follows, blue where it was the most probable one; above the others stands
        the token that was, at the height of its probability.

    Raises:
        ValueError: there is not one target and one row of probabilities per token.

    >>> token_probabilities("ab", [1, 0], [[0.25, 0.75], [0.5, 0.5]], "ab").get_suptitle()
    'Its first guess is right for 2 of 2 tokens; the right token gets 61 % (geometric mean, 0.49 nats)'
    """
    p = np.asarray(probabilities, np.float64)
    if not len(tokens) == len(targets) == len(p) or p.ndim != 2:
        shapes = f"{len(tokens)} tokens, {len(targets)} targets, probabilities {list(p.shape)}"
        raise ValueError(
            f"token_probabilities: one target and one row of probabilities per token, got {shapes}"
        )
    actual = p[np.arange(len(p)), list(targets)]  # [T]
    n = min(len(tokens), MAX_TOKENS)
    figure = new_figure(max(0.27 * n + 1.6, 9.0), 3.9)
    panel = figure.subplots()
    right = actual >= p.max(1)  # [T]
    panel.bar(range(n), 100 * actual[:n], 0.78, color=[LINE_COLORS[0 if hit else 1] for hit in right[:n]])
    for i in np.flatnonzero(~right[:n]):
        token = visible(vocabulary[int(p[i].argmax())])
        height = max(100 * float(p[i].max()), 100 * actual[i] + 5)
        panel.text(
            float(i), height, token, ha="center", va="center", color="0.35", family="monospace", fontsize=10
        )
        panel.plot([i, i], [100 * actual[i], max(height - 4, 100 * actual[i])], color="0.8", linewidth=0.8)
    names = [visible(vocabulary[target]) for target in targets[:n]]
    panel.set_xticks(range(n), names, family="monospace")
    panel.tick_params(axis="x", length=0)
    panel.set_xlim(-0.8, n - 0.2)
    # All of the scale, unless the model is sure of nothing.
    panel.set_ylim(0, min(max(125 * float(p[:n].max()), 20.0), 104.0))
    panel.set_ylabel("probability (%)")
    panel.set_xlabel(f"the text, token by token, after {visible(tokens[0])!r}" if n else "")
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(
        "bars: probability of the token below, blue where it is the first guess; gray letters: the first guess if not",
        fontsize=10,
    )
    mean = math.exp(float(np.log(np.maximum(actual, 1e-12)).mean()))
    figure.suptitle(
        f"Its first guess is right for {right.sum()} of {len(p)} tokens; the right token gets {_share(mean)} % "
        f"(geometric mean, {-math.log(mean):.2f} nats)"
    )
    return figure


def visible(token: str) -> str:
    """Return a token as it is shown in a figure: white space as a visible symbol.

    >>> visible("a b\\n")
    'a␣b↵'
    """
    return token.replace(" ", "␣").replace("\n", "↵").replace("\t", "→")


def _share(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.005 else "<1"
