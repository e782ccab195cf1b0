"""`over="layer x position x head"`: which parts of which sites a method of `gf.circuits` varies, one at a time.

`layer` counts the selected sites, and the iterations of a site in a `lax.scan`. Every other word names an axis of the
value at each site. An axis that is not named is taken whole, and so are all sites together without `layer`.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradfn.inspection.flow import program_order
from gradfn.jaxpr import Site

LAYER = "layer"
# Of a value of one sequence: a stream [T, width], or heads [T, heads, size].
AXES: Mapping[str, int] = MappingProxyType({"position": 0, "head": 1})


class Layer(NamedTuple):
    """One site, in one iteration of the loops around it; `label` is its name, with the iteration: `mixed[3]`."""

    site: Site
    iteration: tuple[int, ...]
    label: str


@dataclass(frozen=True)
class Grid:
    """What the axes of a result stand for.

    Attributes:
        words: of `over`, in order; they name the axes of the result.
        layers: the sites and their iterations, in the order of computation.
        axes: by word without `layer`, the axis of the value, in the order of `over`.
        sizes: by the same words, how long that axis is.
    """

    words: tuple[str, ...]
    layers: tuple[Layer, ...]
    axes: dict[str, int]
    sizes: dict[str, int]

    @property
    def sites(self) -> list[Site]:
        """The sites, in the order of computation of their first iteration."""
        return list({layer.site.name: layer.site for layer in self.layers}.values())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return tuple(len(labels) for labels in self.labels)

    @property
    def labels(self) -> tuple[tuple[str, ...], ...]:
        """A label for every index of every axis of the result."""
        layers = tuple(layer.label for layer in self.layers)
        return tuple(
            layers if word == LAYER else tuple(map(str, range(self.sizes[word]))) for word in self.words
        )

    def mask(self, site: Site, index: Sequence[jax.Array]) -> jax.Array:
        """Return which elements of a site's value an index selects, booleans that broadcast to the value.

        Args:
            site: any of the sites.
            index: one integer per word without `layer`, in the order of `over`.
        """
        return one_hot(site.shape, dict(zip(self.axes.values(), index, strict=True)))

    def arrange(self, values: Mapping[str, jax.Array]) -> jax.Array:
        """Return values by site as one array with the axes of `over`, which must contain `layer`.

        Args:
            values: by the name of the site, `[*site.axes, *sizes]`: iterations in front, then the words without
                `layer` in the order of `over`.
        """
        rows = jnp.stack([values[layer.site.name][layer.iteration] for layer in self.layers])
        return jnp.moveaxis(rows, 0, self.words.index(LAYER))


def one_hot(shape: Sequence[int], index: Mapping[int, jax.Array | int]) -> jax.Array:
    """Return which elements of an array have an index, given by axis: booleans that broadcast to `shape`."""
    selected = jnp.ones([1] * len(shape), bool)
    for axis, at in index.items():
        along = [1] * len(shape)
        along[axis] = -1
        # [n] -> [1, n, 1]
        numbers = jnp.arange(shape[axis], dtype=jnp.int32)
        selected &= (numbers == jnp.asarray(at, jnp.int32)).reshape(along)
    return selected


def grid(sites: Sequence[Site], over: str, axes: Mapping[str, int] | None, what: str) -> Grid:
    """Return what `over` means for some sites.

    Args:
        sites: at least one.
        over: words joined by ` x `, such as `"layer x position x head"`.
        axes: by word, the axis of the value at each site; negative ones count from the end. None for `AXES`.
        what: the caller, for errors.

    Raises:
        ValueError: an empty or repeated word, a word without an axis, an axis that a value does not have, or sites
            that have it in different lengths.
    """
    axes = AXES if axes is None else axes
    words = tuple(word.strip() for word in over.split(" x "))
    if not all(words) or len(set(words)) < len(words):
        raise ValueError(
            f"{what}: over must be different words joined by ' x ', such as 'layer x position', got {over!r}"
        )
    own = [word for word in words if word != LAYER]
    for word in own:
        if word not in axes:
            raise ValueError(
                f"{what}: over has the word {word!r}, and axes does not say which axis of the values that is. "
                f"Pass axes={ {**axes, word: len(axes)} }, with the axis in the shape {list(sites[0].shape)} of "
                f"site {sites[0].name!r}; without axes, the words are layer, {', '.join(AXES)}."
            )
    of_site = {site.name: [_axis(site, word, axes[word], what) for word in own] for site in sites}
    first = sites[0]
    for site in sites:
        if of_site[site.name] != of_site[first.name]:
            raise ValueError(
                f"{what}: site {first.name!r} has the axes {', '.join(own)} at {of_site[first.name]}, site "
                f"{site.name!r} at {of_site[site.name]}, for axes={dict(axes)}. Count axes from the front, or select "
                "sites of one kind."
            )
    at = dict(zip(own, of_site[first.name], strict=True))
    if len(set(at.values())) < len(at):
        raise ValueError(f"{what}: two words of over={over!r} stand for the same axis, axes={dict(axes)}")
    for site in sites:
        for word, axis in at.items():
            if site.shape[axis] != first.shape[axis]:
                raise ValueError(
                    f"{what}: the axis {word!r} has {first.shape[axis]} entries at site {first.name!r} "
                    f"{list(first.shape)} and {site.shape[axis]} at site {site.name!r} {list(site.shape)}. Select "
                    "sites of one kind with sites=, or leave the word out of over."
                )
    layers = [
        Layer(site, iteration, site.name + "".join(f"[{i}]" for i in iteration))
        for site in sites
        for iteration in itertools.product(*map(range, site.axes))
    ]
    layers.sort(key=lambda layer: program_order(layer.site, layer.iteration))
    return Grid(words, tuple(layers), at, {word: first.shape[axis] for word, axis in at.items()})


def _axis(site: Site, word: str, axis: int, what: str) -> int:
    if not -len(site.shape) <= axis < len(site.shape):
        raise ValueError(
            f"{what}: {word!r} is axis {axis} of the values, and site {site.name!r} has shape {list(site.shape)}. "
            f"Pass axes={{{word!r}: ...}} with another axis, select other sites, or leave the word out of over."
        )
    return axis % len(site.shape)
