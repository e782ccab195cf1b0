"""The names of activations in `config.json`, and ours."""

from __future__ import annotations

from collections.abc import Mapping

# By their names; where two are the same, the first is written.
ACTIVATIONS: Mapping[str, str] = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
}


def activation_name(family: str, feed: str) -> str:
    """Return their name of an activation of ours."""
    for theirs, ours in ACTIVATIONS.items():
        if ours == feed:
            return theirs
    raise ValueError(f"{family} has no feed {feed!r}")
