"""A GPT in the page of its run: to write with, to step backwards through, and to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradfn.pages.live import _gpt_numpy as forward
from gradfn.pages.live.arrays import as_json, encoded
from gradfn.pages.live.part import Live
from gradfn.runs.kept import Kept
from gradfn.runs.language_net import LanguageNet, too_large

TOLERANCE = 0.01  # of the loss, that rounded parameters may change
# In which parameters may be in the page: the first that is exact enough.
DTYPES = ("float16", "bfloat16", "float32")


def gpt(run: Kept, room: int) -> Live | str | None:
    """Return the GPT of a run: see `gradfn.pages.live.KINDS`."""
    net = run.language_net
    if net is None or isinstance(net, str):
        return net
    n = sum(array.size for array in net.params.values())
    content = as_json(described(net)) if 8 * n // 3 < room else ""
    if not content or len(content) > room:
        return too_large(n)
    of = net.architecture
    about = {
        "parameters": f"{n:,}",
        "blocks": of.n_layers,
        "heads": of.n_heads,
        "width": of.width,
        "context": of.context,
        "vocab": of.vocab,
        "step": net.step,
    }
    return Live("gpt", "GPT", about, content)


def described(net: LanguageNet, dtype: str | None = None) -> dict[str, Any]:
    """Return the network as JSON.

    Args:
        net: the network.
        dtype: of the parameters; by default the first of `DTYPES` that changes the loss by 1 % at most.
    """
    texts = sample_tokens(net)
    dtype = dtype or narrowest(net, texts)
    params = rounded(net.params, dtype)
    return {
        "config": net.architecture._asdict(),
        "tokenizer": net.tokenizer,
        "lines": net.lines,
        "quiet": net.quiet,
        "dtype": dtype,
        "params": {name: encoded(array, dtype) for name, array in net.params.items()},
        "samples": [forward.decode(net, tokens) for tokens in texts],
        "checkpoints": [{"step": net.step, "loss": loss(net, params, texts)}],
    }


def sample_tokens(net: LanguageNet) -> list[np.ndarray]:
    """Return the tokens of the texts that the page starts with: those of the run, or what the network writes."""
    found = [tokens for text in net.samples if len(tokens := forward.encode(net, text)) > 1]
    return found or forward.samples(net, net.params, forward.MAX_SAMPLE)


def narrowest(net: LanguageNet, texts: Sequence[np.ndarray]) -> str:
    """Return the first of `DTYPES` that keeps the loss of some texts within `TOLERANCE`."""
    true = loss(net, net.params, texts)
    for dtype in DTYPES[:-1]:
        if within(loss(net, rounded(net.params, dtype), texts), true):
            return dtype
    return DTYPES[-1]


def within(actual: float, true: float) -> bool:
    """Return whether a loss is the true one up to `TOLERANCE`, or where both are next to nothing."""
    return abs(actual - true) <= max(TOLERANCE * true, 1e-4)


def loss(net: LanguageNet, params: Mapping[str, np.ndarray], texts: Sequence[np.ndarray]) -> float:
    """Return the loss of some texts, in nats per token."""
    return forward.mean_loss(net.architecture, params, texts, net.quiet)


def rounded(params: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Return parameters as a page in that dtype has them, in float32."""
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    with np.errstate(over="ignore"):
        return {name: array.astype(kind).astype(np.float32) for name, array in params.items()}
