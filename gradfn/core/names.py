"""Names: `tap` names a value, `scope` names a part of a network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import source_info_util

# A tapped value's source line is the line that taps it.
source_info_util.register_exclusion(__file__)


def tap(x: jax.Array, name: str) -> jax.Array:
    """Name a value so that inspection can show it.

    An alias of `jax.ad_checkpoint.checkpoint_name`: it computes nothing, and functions that already use
    `checkpoint_name` need no change.

    Args:
        x: an array of any shape and dtype.
        name: the value's name, for instance `"a1"`.

    Returns:
        `x`, unchanged.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> gf.tap(jnp.array([1.0, 2.0]), "a1")
    Array([1., 2.], dtype=float32)
    """
    return checkpoint_name(x, name)


class ParameterError(ValueError):
    """A parameter or an input that does not match what the network declares.

    The message names the parameter, what was expected and the actual value. `path` is the parameter's path, for
    instance `blocks/attention/W`.

    >>> import gradfn as gf
    >>> gf.ParameterError("W1", "expected shape [16, 784], got [784, 16]")
    ParameterError('W1: expected shape [16, 784], got [784, 16]')
    """

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message

    def under(self, name: str) -> ParameterError:
        """Return the same error with `name/` in front of its path."""
        return ParameterError(f"{name}/{self.path}", self.message)


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Run the block under a name, which shows in the jaxpr's name stack and in the paths of errors."""
    with jax.named_scope(name):
        try:
            yield
        except ParameterError as error:
            raise error.under(name) from None
