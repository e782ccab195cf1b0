"""Compute once what a function does not need its arguments for."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal
from jaxtyping import PyTree

from gradfn.jaxpr.interpreter import evaluate


def hoisted(f: Callable, *args: PyTree) -> Callable:
    """Return the same function with everything that does not depend on its arguments already computed.

    `vmap` leaves such operations unbatched anyway, but a loop around the function would repeat them in each iteration.

    Args:
        f: any function of arrays, which may close over others.
        args: arguments, of which only shapes and dtypes count.

    >>> import jax, jax.numpy as jnp
    >>> from gradfn.jaxpr.hoist import hoisted
    >>> x = jnp.ones(3)
    >>> f = hoisted(lambda i: jnp.sin(x)[i] + 1, 0)
    >>> "sin" in str(jax.make_jaxpr(f)(0))
    False
    """
    closed, out = jax.make_jaxpr(f, return_shape=True)(*args)
    jaxpr = closed.jaxpr
    known: dict[Any, PyTree] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    rest = []
    for eqn in jaxpr.eqns:
        if eqn.effects or not all(isinstance(v, Literal) or v in known for v in eqn.invars):
            rest.append(eqn)
        else:
            inputs = [v.val if isinstance(v, Literal) else known[v] for v in eqn.invars]
            known.update(zip(eqn.outvars, evaluate(eqn, inputs), strict=True))
    needed = {v for eqn in rest for v in eqn.invars if not isinstance(v, Literal)}
    needed.update(v for v in jaxpr.outvars if not isinstance(v, Literal))
    consts = {v: known[v] for v in known if v in needed}
    tail = jaxpr.replace(eqns=rest, constvars=list(consts))

    def run(*args: PyTree) -> PyTree:
        outs = jax.core.eval_jaxpr(tail, list(consts.values()), *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(out), outs)

    return run
