"""Recurrent language models."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.core.axes import with_axes
from gradfn.core.names import scope, tap
from gradfn.core.net import Net
from gradfn.core.params import Params
from gradfn.layers._dense import dense
from gradfn.layers._embed import embed
from gradfn.layers.recurrent import gru, lstm, recurrent_state, vanilla_rnn
from gradfn.nets._description import described
from gradfn.nets._generate import LanguageModel

_CELLS: dict[str, Callable[[int, int], Net]] = {"vanilla": vanilla_rnn, "gru": gru, "lstm": lstm}


def rnn(
    vocab: int,
    width: int,
    cell: Literal["vanilla", "gru", "lstm"] = "lstm",
    n_layers: int = 1,
) -> LanguageModel:
    """Return a recurrent language model: from a sequence of tokens, the logits of each next token.

    Mikolov et al., *Recurrent neural network based language model*, 2010. The states of each step are tapped as
    `h` (`layers/0/h`, ... with several layers), an LSTM's cells as `c`; statistics of their gradients show how far
    back in time gradients reach. For sequences of vectors instead of tokens see `gf.layers.lstm`.

    Args:
        vocab: the vocabulary size.
        width: features of embeddings and states.
        cell: `"vanilla"`, `"gru"` or `"lstm"`.
        n_layers: the number of recurrent layers.

    Returns:
        A net of one sequence of any length, from integers `[T]` to logits `[T, vocab_size]`, for `gf.generate` too.

    Raises:
        ValueError: an unknown cell.
        ParameterError: parameters of other shapes.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.rnn(27, 64, "gru")
    >>> net.apply(net.init(jax.random.key(0)), jnp.array([0, 5, 13])).shape
    (3, 27)
    """
    if cell not in _CELLS:
        near = difflib.get_close_matches(str(cell), _CELLS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"rnn: cell must be one of {', '.join(_CELLS)}; got {cell!r}.{hint}")
    embedding, head = embed(vocab, width), dense(width, vocab)
    layers = {str(i): _CELLS[cell](width, width) for i in range(n_layers)}
    spec = {
        "embed": embedding.spec,
        "layers": {i: layer.spec for i, layer in layers.items()},
        "head": with_axes(head.spec, "vocab", "embed"),
    }

    def start(params: Params) -> PyTree:
        return {i: recurrent_state(layer, params["head"]["W"].dtype) for i, layer in layers.items()}

    def read(params: Params, tokens: jax.Array, states: PyTree) -> tuple[jax.Array, PyTree]:
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 1:
            raise ValueError(f"rnn: expected one sequence of tokens [T], got shape {list(tokens.shape)}")
        with scope("embed"):
            x = tap(embedding.apply(params["embed"], tokens), "embedded")  # [T, width]
        ends = {}
        with scope("layers"):
            for i, layer in layers.items():
                with scope(i):
                    x, ends[i] = layer.apply(params["layers"][i], x, state=states[i])
        return x, ends

    def logits_of(params: Params, x: jax.Array) -> jax.Array:
        with scope("head"):
            return tap(head.apply(params["head"], x), "logits")

    def step(params: Params, tokens: jax.Array, states: PyTree) -> tuple[jax.Array, PyTree]:
        x, ends = read(params, tokens, states)
        return logits_of(params, x), ends

    def hidden(params: Params, tokens: jax.Array) -> jax.Array:
        return read(params, tokens, start(params))[0]

    def apply(params: Params, tokens: jax.Array) -> jax.Array:
        return logits_of(params, hidden(params, tokens))

    settings = {"vocab": vocab, "width": width, "cell": cell, "n_layers": n_layers}
    description = described("rnn", settings)
    return LanguageModel(spec, apply, start, step, None, hidden, logits_of, description=description)
