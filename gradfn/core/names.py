"""Names for values and places: `tap` names a value, `scope` a part of a network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import source_info_util

# A tapped value's source line is the line that taps it.
source_info_util.register_exclusion(__file__)


def tap(x: jax.Array, name: str) -> jax.Array:
    """Name a value, so that inspection can show it.

    It is `jax.ad_checkpoint.checkpoint_name`: it computes nothing, and any function that uses that already
    has named values.

    Args:
        x: an array of any shape and dtype.
        name: what to call it, for instance `"a1"`.

    Returns:
        `x`, unchanged.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> gf.tap(jnp.array([1.0, 2.0]), "a1")
    Array([1., 2.], dtype=float32)
    """
    return checkpoint_name(x, name)


class ParameterError(ValueError):
    """A parameter or an input that does not fit: says where, what was expected and what came.

    `path` is the parameter's path, for instance `blocks/attention/W`.

    >>> import gradfn as gf
    >>> gf.ParameterError("W1", "expected [16, 784], came [784, 16]")
    ParameterError('W1: expected [16, 784], came [784, 16]')
    """

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message

    def under(self, name: str) -> ParameterError:
        """Return the same error as seen from the dict that holds `name`."""
        return ParameterError(f"{name}/{self.path}", self.message)


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Run a part of a network under its name: in the jaxpr's name stack and in the paths of errors."""
    with jax.named_scope(name):
        try:
            yield
        except ParameterError as error:
            raise error.under(name) from None
