"""A GPT in the page of its run: to write with, to step backwards through, and to change."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradfn.pages.live import _gpt_numpy as forward
from gradfn.pages.live._gpt_checkpoints import Params, chosen, coded
from gradfn.pages.live.arrays import as_json, encoded
from gradfn.pages.live.part import Live
from gradfn.runs.kept import Kept
from gradfn.runs.language_net import LanguageNet, load_params, too_large

TOLERANCE = 0.01  # of the loss, that rounded parameters may change
MOST = 8  # earlier checkpoints
NEWEST = -1  # stands for the newest checkpoint's step
# Bytes per parameter that an earlier checkpoint takes, as base64, with the coarsest differences.
SMALLEST = 0.29
MAX_SAMPLES = 8
MARGIN = 10_000  # bytes for what the page says about the network
# In which parameters may be in the page: the first that is exact enough.
DTYPES = ("float16", "bfloat16", "float32")


def gpt(run: Kept, room: int) -> Live | str | None:
    """Return the GPT of a run: see `gradfn.pages.live.KINDS`."""
    net = run.language_net
    if net is None or isinstance(net, str):
        return net
    n = sum(array.size for array in net.params.values())
    made = described(net, room=room) if 8 * n // 3 < room else None
    content = as_json(made) if made else ""
    if not made or len(content) > room:
        return too_large(n)
    of, n_shown = net.architecture, len(made["checkpoints"]) - 1
    about = {
        "parameters": f"{n:,}",
        "blocks": of.n_layers,
        "heads": of.n_heads,
        "width": of.width,
        "context": of.context,
        "vocab": of.vocab,
        "step": net.step,
        "dtype": made["dtype"],
        # Earlier checkpoints that the page shows, and those that the run has kept.
        "shown": n_shown,
        "kept": len(earlier(net)),
    }
    return Live("gpt", "GPT", about, content)


def described(net: LanguageNet, dtype: str | None = None, room: int | None = None) -> dict[str, Any]:
    """Return the network as JSON.

    Args:
        net: the network.
        dtype: of the parameters; by default the first of `DTYPES` that changes the loss by 1 % at most.
        room: bytes that all may take: earlier checkpoints are left out until they fit; None for no limit.
    """
    texts = sample_tokens(net)
    dtype = dtype or narrowest(net, texts)
    params = rounded(net.params, dtype)
    content = {
        "config": net.architecture._asdict(),
        "tokenizer": net.tokenizer,
        "lines": net.lines,
        "quiet": net.quiet,
        "dtype": dtype,
        "params": {name: encoded(array, dtype) for name, array in net.params.items()},
        "samples": [forward.decode(net, tokens) for tokens in texts],
        "checkpoints": [],
    }
    left = None if room is None else room - len(as_json(content)) - MARGIN
    known = loss(net, params, texts)
    last = {"step": net.step, "loss": known if math.isfinite(known) else None}
    return content | {"checkpoints": [*checkpoints(net, params, texts, left), last]}


def earlier(net: LanguageNet) -> list[int]:
    """Return the steps of the parameters that a run kept before its newest checkpoint."""
    return sorted(step for step in net.kept if step < net.step)


def checkpoints(
    net: LanguageNet, params: Params, texts: Sequence[np.ndarray], room: int | None
) -> list[dict[str, Any]]:
    """Return as many earlier checkpoints as fit, `MOST` at most, closer to each other at the start of training.

    Args:
        net: the network.
        params: of the newest checkpoint, as the page has them.
        texts: whose loss each keeps, up to `TOLERANCE`.
        room: bytes for all of them; None for no limit.
    """
    steps, n = earlier(net), MOST
    if room is not None:
        n = min(n, int(room / (SMALLEST * sum(array.size for array in params.values()))))
    while n and steps:
        found: list[dict[str, Any]] = []
        following, left = dict(params), room
        for step in reversed(chosen([*steps, NEWEST], n + 1)[:-1]):
            exact = load_params(net.kept[step], net.architecture)
            true = loss(net, exact, texts)
            made = coded(exact, following, functools.partial(_is_exact, net, texts, true))
            if made is None:
                continue
            following = made.params
            found.insert(0, {"step": step, "loss": true, "arrays": made.content})
            left = None if left is None else left - len(as_json(found[0]))
            if left is not None and left < 0:
                break
        if left is None or left >= 0:
            return found
        size = len(as_json({"checkpoints": found})) / len(found)
        n = min(n - 1, len(steps) - 1, int((room or 0) / size))
    return []


def sample_tokens(net: LanguageNet) -> list[np.ndarray]:
    """Return the tokens of the texts that the page starts with: those of the run, or what the network writes."""
    found = [tokens for text in net.samples[:MAX_SAMPLES] if len(tokens := forward.encode(net, text)) > 1]
    return found or forward.samples(net, net.params, forward.MAX_SAMPLE)


def narrowest(net: LanguageNet, texts: Sequence[np.ndarray]) -> str:
    """Return the first of `DTYPES` that keeps the loss of some texts within `TOLERANCE`."""
    true = loss(net, net.params, texts)
    for dtype in DTYPES[:-1]:
        if within(loss(net, rounded(net.params, dtype), texts), true):
            return dtype
    return DTYPES[-1]


def _is_exact(net: LanguageNet, texts: Sequence[np.ndarray], true: float, params: Params) -> bool:
    return within(loss(net, params, texts), true)


def within(actual: float, true: float) -> bool:
    """Return whether a loss is the true one up to `TOLERANCE`, or where both are next to nothing."""
    return abs(actual - true) <= max(TOLERANCE * true, 1e-6)


def loss(net: LanguageNet, params: Params, texts: Sequence[np.ndarray]) -> float:
    """Return the loss of some texts, in nats per token."""
    return forward.mean_loss(net.architecture, params, texts, net.quiet)


def rounded(params: Params, dtype: str) -> dict[str, np.ndarray]:
    """Return parameters as a page in that dtype has them, in float32."""
    import ml_dtypes

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    with np.errstate(over="ignore"):
        return {name: array.astype(kind).astype(np.float32) for name, array in params.items()}
