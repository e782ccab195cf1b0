"""What `gf.inspect` and `gf.capture` share: what to record at which site, and access to it by name."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from gradfn.core.attention_form import LONG
from gradfn.inspection.rule_sites import RuleSite, rule_sites
from gradfn.inspection.summaries import STATS, Stats, summarize
from gradfn.jaxpr import (
    Program,
    Site,
    find_sites_and_order,
    select,
    trace_as_written,
    trace_without_probabilities,
)
from gradfn.jaxpr.interpreter import Path
from gradfn.jaxpr.sites import Selection, unknown_site
from gradfn.jaxpr.twins import same_gradients, same_values


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stats", "grad_stats", "tangent_stats", "kept_value", "kept_grad", "kept_tangent"],
    meta_fields=["site"],
)
@dataclass(frozen=True)
class Observation:
    """What was recorded at one site; a pytree of arrays.

    Attributes:
        site: which site it is (static).
        stats: statistics of the value.
        grad_stats: statistics of the gradient of the loss with respect to the value; None where there is none.
        tangent_stats: statistics of the value's derivative along a direction; None where there is none.
        kept_value: the value if it was kept, else None; `value` raises instead.
        kept_grad: the gradient if it was kept, else None; `grad` raises instead.
        kept_tangent: the derivative if it was kept, else None; `tangent` raises instead.
    """

    site: Site
    stats: Stats
    grad_stats: Stats | None
    tangent_stats: Stats | None
    kept_value: jax.Array | None
    kept_grad: jax.Array | None
    kept_tangent: jax.Array | None

    @property
    def value(self) -> jax.Array:
        """The value itself.

        Raises:
            AttributeError: it was not kept.
        """
        if self.kept_value is None:
            raise AttributeError(
                f"the value of site {self.site.name!r} was not kept: pass keep={self.site.name!r}"
            )
        return self.kept_value

    @property
    def grad(self) -> jax.Array:
        """The gradient of the loss with respect to the value.

        Raises:
            AttributeError: it was not kept, or there is none.
        """
        if self.grad_stats is None:
            raise AttributeError(f"site {self.site.name!r} has no gradient here")
        if self.kept_grad is None:
            raise AttributeError(
                f"the gradient of site {self.site.name!r} was not kept: pass keep={self.site.name!r}"
            )
        return self.kept_grad

    @property
    def tangent(self) -> jax.Array:
        """The derivative of the value along the direction given as `along`.

        Raises:
            AttributeError: it was not kept, or there is none.
        """
        if self.tangent_stats is None:
            raise AttributeError(
                f"site {self.site.name!r} has no tangent here: pass gf.capture(..., along=) a direction"
            )
        if self.kept_tangent is None:
            raise AttributeError(
                f"the tangent of site {self.site.name!r} was not kept: pass keep={self.site.name!r}"
            )
        return self.kept_tangent


class ByName:
    """Access to what was recorded by the name of its site: `inspection["a1"]`."""

    sites: tuple[Site, ...]
    stats: Mapping[str, Stats]
    grad_stats: Mapping[str, Stats]
    values: Mapping[str, jax.Array]
    value_grads: Mapping[str, jax.Array]
    tangent_stats: Mapping[str, Stats] = MappingProxyType({})
    tangents: Mapping[str, jax.Array] = MappingProxyType({})

    def __getitem__(self, name: str) -> Observation:
        """Return what was recorded at a site.

        Raises:
            KeyError: there is no such site; the message lists similar names.
        """
        for site in self.sites:
            if site.name == name:
                stats = self.stats[name], self.grad_stats.get(name), self.tangent_stats.get(name)
                kept = self.values.get(name), self.value_grads.get(name), self.tangents.get(name)
                return Observation(site, *stats, *kept)
        raise KeyError(unknown_site(name, [site.name for site in self.sites], type(self).__name__.lower()))

    def __contains__(self, name: object) -> bool:
        return any(site.name == name for site in self.sites)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in the order of computation."""
        return iter([site.name for site in self.sites])


class Wanted(NamedTuple):
    """The sites to record, which of them raw as well, and the names of the statistics.

    `same_values` and `same_gradients` name the site that has the same statistics, for sites that need not be recorded
    themselves. `rules` are the sites inside backward rules, some of which may be wanted.
    """

    sites: list[Site]
    raw: frozenset[str]
    stats: tuple[str, ...]
    same_values: Mapping[str, str]
    same_gradients: Mapping[str, str]
    rules: Mapping[str, RuleSite] = MappingProxyType({})

    def by_path(self) -> dict[Path, list[Site]]:
        """Return the sites by the equation that they are results of, those in a rule by the call of its function."""
        out: dict[Path, list[Site]] = {}
        for site in self.sites:
            out.setdefault(site.path, []).append(site)
        return out

    def of(self, site: Site, x: jax.Array, kind: str = "") -> dict[str, Any]:
        """Return what is recorded of a site's value or gradient; `kind` is as in `summarize`."""
        return {"stats": summarize(x, self.stats, kind, site.units)} | (
            {"raw": x} if site.name in self.raw else {}
        )

    def by_name(
        self, recorded: Mapping[Path, Mapping[str, Any]], same: Mapping[str, str]
    ) -> tuple[dict[str, Stats], dict[str, jax.Array]]:
        """Return what was recorded at each equation as statistics and raw values by the site's name.

        `same` is `same_values` or `same_gradients`.
        """
        every = {name: record for group in recorded.values() for name, record in group.items()}
        own = {site.name: same.get(site.name, site.name) for site in self.sites}
        stats = {name: every[source]["stats"] for name, source in own.items() if source in every}
        return stats, {name: every[name]["raw"] for name in own if "raw" in every.get(name, ())}


class Traced(NamedTuple):
    """A program, its sites, and the order in which it first uses its parameters."""

    program: Program
    sites: list[Site]
    order: tuple[str, ...]


def trace_sites(
    f: Callable, args: Sequence[PyTree], kwargs: Mapping[str, Any], sites: Selection, what: str = "sites"
) -> Traced:
    """Trace a function as written, without the probabilities of long attention unless they are selected.

    Raises:
        ValueError: a site that the function does not have; the message lists similar names.
    """
    return _trace(f, args, kwargs, sites, what, lambda program, found: {})[0]


def trace_sites_and_rules(
    f: Callable, args: Sequence[PyTree], kwargs: Mapping[str, Any], sites: Selection
) -> tuple[Traced, Mapping[str, RuleSite]]:
    """Do the same as `trace_sites`; the last sites are those inside backward rules, also returned by name."""
    return _trace(f, args, kwargs, sites, "sites", rule_sites)


def _trace(
    f: Callable,
    args: Sequence[PyTree],
    kwargs: Mapping[str, Any],
    sites: Selection,
    what: str,
    find_rules: Callable[[Program, list[Site]], Mapping[str, RuleSite]],
) -> tuple[Traced, Mapping[str, RuleSite]]:
    def traced(program: Program) -> tuple[Traced, Mapping[str, RuleSite]]:
        found, order = find_sites_and_order(program)
        rules = find_rules(program, found)
        return Traced(program, [*found, *(rule.site for rule in rules.values())], order), rules

    as_written = traced(trace_as_written(f, *args, **kwargs))
    offered = as_written[0].sites
    long = set(filter(_is_long_attention, offered))
    if not long or not long.isdisjoint(select(offered, sites, what)):
        return as_written
    return traced(trace_without_probabilities(f, *args, **kwargs))


def _is_long_attention(site: Site) -> bool:
    is_named = "probabilities" in site.name.rpartition("/")[2].split(".")
    return is_named and site.source == "name" and min(site.shape[-2:], default=0) >= LONG


def wanted(
    traced: Traced,
    sites: Selection,
    keep: Selection,
    stats: tuple[str, ...],
    rules: Mapping[str, RuleSite] = MappingProxyType({}),
) -> Wanted:
    """Choose among the sites of a program, of which `rules` are inside backward rules.

    Raises:
        ValueError: a site that the program does not have; the message lists similar names.
    """
    chosen = select(traced.sites, sites)
    raw = frozenset(site.name for site in select(chosen, keep, "keep"))
    forward = [site for site in chosen if site.name not in rules]
    values, gradients = same_values(traced.program, forward), same_gradients(traced.program, forward)
    same = [{name: twin for name, twin in twins.items() if name not in raw} for twins in (values, gradients)]
    return Wanted(chosen, raw, stats, same[0], same[1], rules)


def checked_stats(stats: Sequence[str], what: str) -> tuple[str, ...]:
    """Return the names of statistics in their usual order; `what` is the caller, for errors.

    Raises:
        ValueError: an unknown statistic.
    """
    stats = (stats,) if isinstance(stats, str) else tuple(stats)
    for name in stats:
        if name not in STATS:
            raise ValueError(f"{what}: there is no statistic {name!r}; there are {', '.join(STATS)}")
    return tuple(name for name in STATS if name in stats)
