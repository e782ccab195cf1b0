"""Results that cannot be differentiated: an error at differentiation instead of a plausible number."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def refuse_derivatives(results: Any, message: str) -> Any:
    """Return results as they are; a gradient that reaches one of them raises TypeError with the message.

    Results that no gradient flows back to, such as the aux of a loss, may be there while something else is
    differentiated. In forward mode every output has a tangent, so jax raises there.

    Args:
        results: any tree; leaves that are not floating arrays are left alone.
        message: what cannot be differentiated, and what to do instead.

    >>> import jax, jax.numpy as jnp
    >>> from gradfn.transform.refuse import refuse_derivatives
    >>> f = lambda x: refuse_derivatives(x * x, "f: differentiate g instead")
    >>> value, slope = jax.value_and_grad(lambda x: (3 * x, f(x)), has_aux=True)(2.0)
    >>> try:
    ...     jax.grad(f)(2.0)
    ... except TypeError as error:
    ...     print(error)
    f: differentiate g instead
    """

    def guard(leaf: Any) -> Any:
        return _refuse(message, leaf) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else leaf

    return jax.tree.map(guard, results)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _refuse(message: str, x: Any) -> Any:
    return x


def _forward(message: str, x: Any) -> tuple[Any, None]:
    return x, None


def _backward(message: str, residual: None, g: Any) -> tuple[Any]:
    raise TypeError(message)


_refuse.defvjp(_forward, _backward)
