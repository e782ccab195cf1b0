"""Gradients of a metric at sites, from which attribution patching estimates what a patch would do."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.circuits._model import Model, scalar_metric
from gradfn.jaxpr import Site

# By the name of a site, an array of the value's shape with the site's `axes` in front.
Values = dict[str, jax.Array]


def check_differentiable(sites: Sequence[Site], what: str) -> None:
    """Raise where a site has no gradient, or none that counts; `what` is the caller.

    Raises:
        ValueError: a site of integers or complex numbers, or one that no output depends on.
    """
    for site in sites:
        if not jnp.issubdtype(site.dtype, jnp.floating):
            raise ValueError(
                f"{what}: site {site.name!r} has dtype {site.dtype}; only real floating values have a gradient to "
                "attribute with. Select a floating value after it, such as the embedding of the tokens."
            )
        if site.reaches == "nothing":
            raise ValueError(
                f"{what}: no output of the function depends on site {site.name!r} ({site.line}). Use what gf.tap "
                "returns: x = gf.tap(x, ...)."
            )


def gradients(
    model: Model,
    inputs: Sequence[PyTree],
    metric: Callable,
    sites: Sequence[Site],
    instead: Mapping[str, jax.Array] = {},
    where: Mapping[str, jax.Array] = {},
    drop: Mapping[str, jax.Array] = {},
) -> tuple[jax.Array, Values, Values]:
    """Return the metric, and the values of some sites with the gradients of the metric with respect to them.

    Args:
        model: the traced function.
        inputs: its inputs.
        metric: of its output.
        sites: with real floating values.
        instead: values to use at some sites (of these or others), with the `axes` in front.
        where: booleans `site.axes`: the iterations for which to use them; without an entry, in all of them.
        drop: by site, booleans `site.axes`: whether to stop the gradient at the value in that iteration. The gradient
            with respect to the value itself is then 0 too.

    Returns:
        The metric, the values and the gradients.
    """
    names = list(dict.fromkeys([*instead, *drop, *(site.name for site in sites)]))

    def edit(value: jax.Array, token: Mapping[str, jax.Array]) -> jax.Array:
        if "instead" in token:
            value = (
                jnp.where(token["where"], token["instead"], value) if "where" in token else token["instead"]
            )
        if "added" in token:
            value = value + token["added"]
        if "drop" in token:
            value = jnp.where(token["drop"], jax.lax.stop_gradient(value), value)
        return value

    def run(added: Mapping[str, jax.Array]) -> tuple[jax.Array, Values]:
        by_kind = {"instead": instead, "where": where, "added": added, "drop": drop}
        tokens = {name: {kind: of[name] for kind, of in by_kind.items() if name in of} for name in names}
        out, kept = model.run(inputs, dict.fromkeys(names, edit), added, tokens)
        return scalar_metric(metric, out, model.what), kept

    zeros = {site.name: jnp.zeros(site.axes + site.shape, site.dtype) for site in sites}
    (value, kept), grads = jax.value_and_grad(run, has_aux=True)(zeros)
    for name in set(instead) & set(kept):
        whole = name not in where
        # [*axes] -> [*axes, 1, ...]
        mask = (
            True
            if whole
            else where[name].reshape(where[name].shape + (1,) * (kept[name].ndim - where[name].ndim))
        )
        kept[name] = jnp.where(mask, instead[name], kept[name])
    return value, kept, grads
