"""The exact change of attention probabilities when queries or keys are patched: the first fix of AtP*."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.circuits._gradients import Values
from gradfn.circuits._model import Model
from gradfn.circuits._over import Grid
from gradfn.circuits._stream import saved
from gradfn.circuits._sweep import mapped
from gradfn.core.precision import widen
from gradfn.jaxpr import Site

# Patches whose probabilities are computed together.
TOGETHER = 16


class Attention(NamedTuple):
    """The sites of one attention layer."""

    queries: Site
    keys: Site
    probabilities: Site


def attention_of(model: Model, sites: Sequence[Site]) -> dict[str, Attention]:
    """Return, for those sites that are queries or keys, the sites of their attention layer.

    Raises:
        ValueError: such a layer has no site for its queries, keys or probabilities.
    """
    by_name = {site.name: site for site in model.sites}
    found = {}
    for site in sites:
        scope, slash, last = site.name.rpartition("/")
        if last not in ("queries", "keys"):
            continue
        names = [f"{scope}{slash}{role}" for role in Attention._fields]
        missing = [name for name in names if name not in by_name]
        if missing:
            raise ValueError(
                f"{model.what}: recomputing the attention of {site.name!r} needs the sites {', '.join(names)}, and "
                f"there is no {', '.join(missing)}. Name the value: gf.tap(x, 'probabilities')."
            )
        found[site.name] = Attention(*(by_name[name] for name in names))
    return found


def through_probabilities(
    model: Model,
    base: Sequence[PyTree],
    grid: Grid,
    layers: Mapping[str, Attention],
    start: Values,
    stop: Values,
    grads: Values,
) -> Values:
    """Return the scores of patches of queries, or of keys: the change of the probabilities, times their gradients.

    Args:
        model: the traced function.
        base: its inputs.
        grid: which patches.
        layers: the attention layers by the name of the site to patch: all queries, or all keys.
        start: values of the base run, also of the other sites of the layers.
        stop: values of the source run.
        grads: gradients at the probabilities, `[n, *axes, ...]`.

    Returns:
        By the name of the site, `[n, *axes, *sizes]`.
    """

    def one(index: jax.Array) -> Values:
        instead = {}
        for name, attention in layers.items():
            for site in (attention.queries, attention.keys):
                instead[site.name] = start[site.name]
            site = next(site for site in attention if site.name == name)
            # [...] -> [1, ..., with one axis per loop in front]
            mask = jnp.expand_dims(grid.mask(site, list(index)), tuple(range(len(site.axes))))
            instead[name] = jnp.where(mask, stop[name], start[name])
        # With queries and keys fixed, the probabilities of a layer depend on nothing else: all layers at once.
        keep = [attention.probabilities.name for attention in layers.values()]
        _, kept = model.run(base, dict.fromkeys(instead, saved), keep, instead)
        out = {}
        for name, attention in layers.items():
            site = attention.probabilities
            change = widen(kept[site.name]) - widen(start[site.name])
            product = change[None] * widen(grads[site.name])
            out[name] = jnp.sum(product, tuple(range(-len(site.shape), 0)))
        return out

    # [*sizes, n, *axes] -> [n, *axes, *sizes]
    scores = mapped(one, tuple(grid.sizes.values()), TOGETHER)
    n = len(grid.sizes)
    return {name: jnp.moveaxis(x, range(n), range(-n, 0)) for name, x in scores.items()}
