"""What every run of a language model measures during training and draws at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import gradfn as gf
from gradfn.pages.figures import History, curves
from gradfn.pages.sequences import MAX_TOKENS, clearest_head, token_probabilities
from gradfn.train import is_first
from gradfn.train.restore import keep

if TYPE_CHECKING:
    from matplotlib.figure import Figure


ATTENTION_TOKENS = 24  # with more, the labels would not fit
ATTENTION_SEQUENCES = 20  # over which a head's attention is averaged


def keep_start(folder: Path, net: gf.Net, seed: int) -> None:
    """Keep the parameters that a run started with beside those that `gf.fit` kept, for the page of the run."""
    if is_first():
        keep(folder, 0, net.init(jax.random.key(seed)))


def loss_per_token(loss: Any, batch: tuple[Any, Any]) -> Callable[[Any], jax.Array]:
    """Return a function that measures parameters on fixed sequences: the mean over all tokens that count.

    Args:
        loss: of one sequence, such as `gf.next_token_loss(net)` has.
        batch: tokens and targets, `[N, T]` each; negative targets do not count.

    Returns:
        `params -> scalar`, in nats per token.

    >>> net = gf.Net({"z": gf.Param([2])}, lambda params, tokens: jnp.tile(params["z"], [len(tokens), 1]))
    >>> batch = np.zeros([3, 4], int), np.array([[0, 0, 0, 0], [1, -1, -1, -1], [1, -1, -1, -1]])
    >>> loss_per_token(gf.next_token_loss(net), batch)({"z": jnp.zeros(2)})
    Array(0.6931472, dtype=float32)
    """
    tokens, targets = map(jnp.asarray, batch)

    @jax.jit
    def measure(params: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        of_one = lambda example: loss(params, example)  # noqa: E731
        # A part at a time: the attention of all sequences at once would fill the memory.
        losses = jax.lax.map(of_one, (tokens, targets), batch_size=64)  # [N]
        counts = (targets >= 0).sum(-1).astype(losses.dtype)
        return (losses * counts).sum() / counts.sum()

    return lambda params: measure(params, tokens, targets)


def language_figures(
    net: gf.Net,
    loss: Any,
    params: Any,
    history: History,
    examples: tuple[Any, Any],
    tokenizer: gf.data.Tokenizer,
    ends: Mapping[str, float] = {},
    harder: str = "",
) -> dict[str, Figure]:
    """Draw what a language model has learned: its curves, its predictions for a text, and its attention.

    Args:
        net: from tokens `[T]` to logits `[T, vocab]`.
        loss: of one sequence.
        params: its parameters.
        history: from `gf.fit`.
        examples: tokens and targets of some sequences, `[N, T]` each; as many are drawn as 40 tokens make.
        tokenizer: of the tokens.
        ends: what the curves' title reports instead of the history's last row, see `curves`.
        harder: what makes training harder than evaluation, see `curves`.

    Returns:
        The figures curves, probabilities, and attention where the network has any, by name.
    """
    tokens, targets = map(np.asarray, examples)
    vocabulary = tokenizer.vocabulary()
    read, actual, probabilities = expectations(net, params, tokens, targets)
    # The longest first: it is drawn.
    n_counted = (targets[:ATTENTION_SEQUENCES] >= 0).sum(1)
    n = min(int(n_counted.max()), ATTENTION_TOKENS)
    order = np.argsort(-n_counted, kind="stable")[: int((n_counted >= n).sum())]
    examples_shown = tokens[order, :n], targets[order, :n]
    figures = {
        "curves": curves(history, "nats per token", ends, harder),
        "probabilities": token_probabilities(
            [vocabulary[token] for token in read], actual, probabilities, vocabulary
        ),
    }
    weights = attention_of(loss, params, examples_shown)
    if weights:
        figures["attention"] = clearest_head(weights, [vocabulary[token] for token in examples_shown[0][0]])
    return figures


def expectations(
    net: gf.Net, params: Any, tokens: np.ndarray, targets: np.ndarray
) -> tuple[list[int], list[int], np.ndarray]:
    """Return the predictions of a net for the first sequences, up to 40 tokens.

    Args:
        net: from tokens `[T]` to logits `[T, vocab]`.
        params: its parameters.
        tokens: `[N, T]`.
        targets: `[N, T]`; negative ones do not count.

    Returns:
        The tokens that were read one after the other, what came after each, and `[n, vocab]` probabilities.
    """
    counted = targets >= 0
    n = int(np.searchsorted(counted.sum(1).cumsum(), MAX_TOKENS)) + 1
    logits = jax.jit(jax.vmap(net.apply, (None, 0)))(params, jnp.asarray(tokens[:n]))
    probabilities = np.asarray(jax.nn.softmax(logits))  # [n, T, vocab]
    of_all = (tokens[:n][counted[:n]], targets[:n][counted[:n]], probabilities[counted[:n]])
    read, actual, p = (part[:MAX_TOKENS] for part in of_all)
    return read.tolist(), actual.tolist(), p


def attention_of(loss: Any, params: Any, examples: Any) -> dict[str, np.ndarray]:
    """Return the attention weights of each block for some examples, as `gf.capture` sees them.

    Args:
        loss: of one example, over a net of unrolled blocks.
        params: its parameters.
        examples: what the loss takes, with a leading axis of n examples.

    Returns:
        `{"block 0": [n, heads, T, S], ...}`, in the order of computation; empty where nothing attends.
    """
    first = jax.tree.map(lambda part: part[0], examples)
    names = [name for name in gf.sites(loss)(params, first).names if name.split("/")[-1] == "probabilities"]
    if not names:
        return {}
    capture = jax.jit(jax.vmap(gf.capture(loss, sites=names, keep=names, stats=["mean"]), (None, 0)))
    captured = capture(params, jax.tree.map(jnp.asarray, examples))
    return {f"block {i}": np.asarray(captured[name].value) for i, name in enumerate(names)}
