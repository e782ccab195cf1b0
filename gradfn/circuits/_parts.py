"""A transformer as a graph of parts that read from, and write to, one residual stream."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradfn.circuits._model import Model
from gradfn.jaxpr import Site

READS = ("queries", "keys", "values")
_ROLES = (*READS, "mixed", "attention_out", "residual_mid", "feed_out", "residual")
# What a model of attention layers alone does not have.
_OF_MLPS = {"residual_mid", "feed_out"}


class Role(NamedTuple):
    """The sites of one kind of value, such as `mixed`, in all layers: one per layer, or one in a loop over them."""

    sites: tuple[Site, ...]

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return sum(site.axes[0] if site.axes else 1 for site in self.sites)

    @property
    def names(self) -> list[str]:
        """The names of the sites."""
        return [site.name for site in self.sites]

    def stacked(self, values: Mapping[str, jax.Array]) -> jax.Array:
        """Return the values of the sites, as `Model.run` keeps them, as one array `[layers, ...]`."""
        return jnp.concatenate(
            [values[site.name] if site.axes else values[site.name][None] for site in self.sites]
        )

    def split(self, stacked: jax.Array) -> dict[str, jax.Array]:
        """Return an array `[layers, ...]` as tokens for `Model.run`, by name."""
        parts, start = {}, 0
        for site in self.sites:
            n = site.axes[0] if site.axes else 1
            part = stacked[start : start + n]
            parts[site.name] = part if site.axes else part[0]
            start += n
        return parts


class Parts(NamedTuple):
    """Where the parts of a transformer read and write.

    Layer i reads `queries`, `keys` and `values` from the stream before it, writes `attention_out`, and, if it has an
    MLP, reads its input from `residual_mid` and writes `feed_out`.

    Attributes:
        model: the traced function.
        embedded: the stream before the first layer.
        roles: the other sites by kind.
        head: the axis of heads in `queries`, `keys`, `values` and `mixed`.
    """

    model: Model
    embedded: Site
    roles: dict[str, Role]
    head: int

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return self.roles["mixed"].n_layers

    @property
    def has_mlps(self) -> bool:
        """Whether each layer has an MLP behind its attention."""
        return "feed_out" in self.roles

    def n_heads(self, role: str) -> int:
        """Return the number of heads of `queries`, `keys`, `values` or `mixed`."""
        return self.roles[role].sites[0].shape[self.head]

    def one_head(self, role: str, values: jax.Array) -> jax.Array:
        """Return `[layers, ...]` as `[heads, layers, ...]`: each with zeros but for one head."""
        n = self.n_heads(role)
        shape = [1] * values.ndim
        shape[self.head + 1] = n
        # [heads, heads] -> [heads, 1, ..., heads, ..., 1]
        mask = jnp.eye(n, dtype=bool).reshape(n, *shape)
        return jnp.where(mask, values[None], jnp.zeros((), values.dtype))


def parts_of(model: Model, head: int) -> Parts:
    """Find the parts of a transformer by the names that gradfn's own blocks give to them.

    Raises:
        ValueError: a name is missing, or the layers are not alike.
    """
    by_role: dict[str, list[Site]] = {role: [] for role in ("embedded", *_ROLES)}
    for site in model.sites:
        # `x.1` is the second of two values with one name.
        last = site.name.rpartition("/")[2]
        if last in by_role:
            by_role[last].append(site)
    missing = [role for role, sites in by_role.items() if not sites]
    if set(missing) == _OF_MLPS:
        by_role = {role: sites for role, sites in by_role.items() if sites}
    elif missing:
        raise ValueError(
            f"{model.what}: the function has no site named {', '.join(map(repr, missing))}. Edges are between the "
            f"parts of a residual network, with sites named embedded, {', '.join(_ROLES)}, as in gf.gpt with blocks "
            "that add attention, then an MLP (or attention alone). In another model name these values: "
            "x = gf.tap(x, 'embedded')."
        )
    if len(by_role["embedded"]) > 1 or any(len(site.axes) > 1 for role in by_role.values() for site in role):
        raise ValueError(
            f"{model.what}: expected one 'embedded' and layers one after the other, or in one loop; got "
            f"{', '.join(site.name for role in by_role.values() for site in role):.300}"
        )
    # Those in a while loop, where values are overwritten, are refused by `select`.
    model.select([site.name for sites in by_role.values() for site in sites])
    roles = {role: Role(tuple(by_role[role])) for role in _ROLES if role in by_role}
    for role, of_role in roles.items():
        shapes = {(site.shape, site.dtype) for site in of_role.sites}
        if len(shapes) > 1 or of_role.n_layers != roles["mixed"].n_layers:
            raise ValueError(
                f"{model.what}: expected one {role!r} of one shape per layer, got "
                f"{', '.join(f'{site.name} {list(site.axes + site.shape)}' for site in of_role.sites):.300}"
            )
    return Parts(model, by_role["embedded"][0], roles, head)


def labels(parts: Parts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the senders and of the receivers, layer by layer.

    Senders are `embedded`, heads `a0.h1` (layer 0, head 1) and MLPs `m0`; receivers `a0.h1.q`, `a0.h1.k`, `a0.h1.v`,
    `m0` and `final`, the stream after the last layer.
    """
    senders, receivers = ["embedded"], []
    for layer in range(parts.n_layers):
        for role in READS:
            receivers += [f"a{layer}.h{head}.{role[0]}" for head in range(parts.n_heads(role))]
        senders += [f"a{layer}.h{head}" for head in range(parts.n_heads("mixed"))]
        if parts.has_mlps:
            senders.append(f"m{layer}")
            receivers.append(f"m{layer}")
    return tuple(senders), (*receivers, "final")


def precedes(sender: str, receiver: str) -> bool:
    """Tell whether a receiver reads what a sender writes.

    >>> precedes("a0.h1", "m0"), precedes("m0", "a0.h1.q"), precedes("embedded", "final")
    (True, False, True)
    """
    return _depth(sender) < _depth(receiver)


def _depth(label: str) -> tuple[float, bool]:
    if label in ("embedded", "final"):
        return (-1.0 if label == "embedded" else float("inf")), False
    return float(label[1:].partition(".")[0]), label[0] == "m"
