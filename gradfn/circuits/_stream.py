"""The residual stream of a traced function: its value after each layer, and the function of what lies behind it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import PyTree

from gradfn.circuits._model import Edit, Model, trace_model
from gradfn.jaxpr import Site, walk
from gradfn.jaxpr.interpreter import Path, bodies, operation, scan_split
from gradfn.jaxpr.reach import reaching
from gradfn.jaxpr.sites import Selection

# In gradfn's own networks: the names of the stream, and of what is added up to it.
STREAM, SUMMANDS = ("embedded", "residual"), ("embedded", "attention_out", "feed_out")
# A container in which each equation is evaluated once per iteration, as its site's axes say.
_ENTERED = {"jit", "remat", "scan", "custom"}


@dataclass(frozen=True)
class Stream:
    """A model and the sites that are its residual stream.

    Attributes:
        model: the traced function; its sites include those that the tail needs.
        names: of the sites of the stream.
        layers: each value of the stream in the order of computation: the name of its site, and which iteration of
            the loops around that it is.
        end: the name of the site whose value is that of the last layer.
        scales: the names of the values by which normalization behind the stream divides.
    """

    model: Model
    names: tuple[str, ...]
    layers: tuple[tuple[str, tuple[int, ...]], ...]
    end: str
    scales: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each layer: that of its site, with the iteration, such as `residual[3]`."""
        return labels(self.layers)

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of all values that describe one run: the stream, its end and the scales."""
        return (*dict.fromkeys([*self.names, self.end]), *self.scales)

    def tail(
        self,
        inputs: Sequence[PyTree],
        x: jax.Array,
        scales: Mapping[str, jax.Array] = {},
        keep: Sequence[str] = (),
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Return the function's output if the stream ends with `x`, and the values of some sites behind it.

        Normalization divides by `scales` if they are given. Without other nonlinearities the tail is then affine.
        """
        edits: dict[str, Edit] = {self.end: lambda old: x} | dict.fromkeys(scales, saved)
        return self.model.run(inputs, edits, keep, scales)


def saved(value: jax.Array, other: jax.Array) -> jax.Array:
    """The edit that replaces a value by its token."""
    return other


def find_stream(f: Callable, args: tuple, sites: Selection, what: str) -> Stream:
    """Trace a function and find the sites of its residual stream; None for those that gradfn's networks name.

    Args:
        f: the function.
        args: all its arguments, the parameters first.
        sites: of the stream.
        what: names the caller in errors.

    Raises:
        ValueError: there are no such sites, their shapes differ, or they are where values have no order.
    """
    wanted = named(*STREAM) if sites is None else sites
    model = trace_model(f, args, what, wanted)
    if not any(map(wanted, model.sites) if callable(wanted) else [True]):
        offered = [site.name for site in model.sites]
        first = f"{', '.join(offered[:8])}{', ...' * (len(offered) > 8)}"
        raise ValueError(
            f"{what}: the function has no site named residual. Name the sites of its residual stream by sites=[...], "
            f"out of {first}. gf.sites(f)(*args) lists all {len(offered)}."
        )
    chosen = select_entered(model, wanted)
    shapes = {site.shape for site in chosen}
    if len(shapes) > 1:
        each = ", ".join(f"{site.name} {list(site.shape)}" for site in chosen[:8])
        raise ValueError(
            f"{what}: the values of one residual stream have one shape, got {each}. Select the sites of the stream "
            "by sites=[...]."
        )
    in_order = layers_of(chosen)
    last = next(site for site in chosen if site.name == in_order[-1][0])
    end = _end(model, last)
    scales = _scales(model, end)
    model = replace(model, sites=(*model.sites, *([end] if end is not last else []), *scales))
    names = tuple(site.name for site in chosen)
    return Stream(model, names, in_order, end.name, tuple(site.name for site in scales))


def named(*names: str) -> Callable[[Site], bool]:
    """Return a selection of sites by the last part of their names, such as `residual`."""
    return lambda site: site.name.split("/")[-1] in names


def select_entered(model: Model, sites: Selection) -> list[Site]:
    """Return the selected sites; each must be computed once, or once per iteration of its loops.

    Raises:
        ValueError: a site in a branch of a `cond`, in a `shard_map` or in a `while`, or one that is not floating.
    """
    chosen = model.select(sites)
    equations = model.program.equations({site.path for site in chosen})
    for site in chosen:
        others = {frame.kind for frame in equations[site.path].frames} - _ENTERED
        if others:
            raise ValueError(
                f"{model.what}: site {site.name!r} is inside a {min(others)} ({site.line}), where it has no value in "
                "every run or several at once. Select a site outside of it."
            )
        if not jnp.issubdtype(site.dtype, jnp.floating):
            raise ValueError(f"{model.what}: site {site.name!r} must be floating, got {site.dtype}")
    return chosen


def layers_of(sites: Sequence[Site]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return every value of some sites in the order of computation: name of the site, index of the iteration."""

    def moment(site: Site, index: tuple[int, ...]) -> tuple[float, ...]:
        """Return the path with the iteration of each loop where the path enters the loop's body."""
        path = list(site.path)
        for depth, i in sorted(zip(site.loops, index, strict=True), reverse=True):
            path.insert(depth, i)
        # Behind what a container contains.
        return (*path, float("inf"))

    every = [(moment(site, index), site.name, index) for site in sites for index in np.ndindex(*site.axes)]
    return tuple((name, index) for _, name, index in sorted(every))


def labels(layers: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[str, ...]:
    """Return the name of each value of some sites, such as `residual[3]`."""
    return tuple(name + "".join(f"[{i}]" for i in index) for name, index in layers)


def stacked(layers: Sequence[tuple[str, tuple[int, ...]]], values: Mapping[str, jax.Array]) -> jax.Array:
    """Return the values of some sites as one array `[layer, ...]`, from those with iterations in front."""
    return jnp.stack([values[name][index] for name, index in layers])


def unstacked(
    layers: Sequence[tuple[str, tuple[int, ...]]], values: jax.Array, sites: Sequence[Site]
) -> dict[str, jax.Array]:
    """Return an array `[layer, ...]` by the name of the site, with iterations in front: the inverse of `stacked`."""
    own: dict[str, list[jax.Array]] = {}
    for (name, _), value in zip(layers, values, strict=True):
        own.setdefault(name, []).append(value)
    # [iterations, ...] -> [*axes, ...]
    return {
        site.name: jnp.stack(own[site.name]).reshape(site.axes + values.shape[1:])
        for site in sites
        if site.name in own
    }


def _end(model: Model, site: Site) -> Site:
    """Return the site outside of all loops that has the value of a site's last iteration.

    To replace the value there leaves the loop with nothing to do, so it is not computed again.

    Raises:
        ValueError: the loop does not return the site's value.
    """
    jaxprs = _bodies_around(model.program.jaxpr, site.path)
    path, index = site.path, site.index
    while site.loops and len(path) > site.loops[0]:
        jaxpr, container = jaxprs[len(path)], jaxprs[len(path) - 2].eqns[path[-3]]
        variable = jaxpr.eqns[path[-1]].outvars[index]
        outs = [k for k, out in enumerate(jaxpr.outvars) if out is variable]
        if operation(container) == "scan":
            n_carry = scan_split(container)[1]
            outs = [k for k in outs if k < n_carry and not container.params["reverse"]]
        if not outs:
            raise ValueError(
                f"{model.what}: the last value of the stream, at site {site.name!r}, is inside a loop that does not "
                f"return it ({site.line}). Add a site behind it to sites=[...], such as that of the loop's output."
            )
        path, index = path[:-2], outs[0]
    return (
        site
        if path == site.path
        else replace(site, name=f"(end of {site.name})", path=path, index=index, axes=(), loops=())
    )


def _bodies_around(closed: ClosedJaxpr, path: Path) -> dict[int, Any]:
    """Return the jaxpr that holds each equation along a path, by the length of the path to it."""
    jaxpr: Any = closed.jaxpr
    found = {1: jaxpr}
    for n in range(1, len(path), 2):
        jaxpr = bodies(jaxpr.eqns[path[n - 1]], enter_custom=True)[1][path[n]][0]
        found[n + 2] = jaxpr
    return found


def _scales(model: Model, end: Site) -> list[Site]:
    """Return sites for the roots behind a site: what normalization divides by, or multiplies with."""
    found: list[Site] = []
    for equation in walk(model.program.jaxpr):
        name, entered = operation(equation.eqn), {frame.kind for frame in equation.frames} <= _ENTERED
        behind = equation.path > end.path and equation.path[: len(end.path)] != end.path
        if not (behind and entered and (name in ("rsqrt", "sqrt") or _is_root(equation.eqn))):
            continue
        aval: Any = equation.eqn.outvars[0].aval
        found.append(
            replace(
                end,
                name=f"(scale {len(found)})",
                path=equation.path,
                index=0,
                shape=tuple(aval.shape),
                dtype=str(aval.dtype),
                axes=equation.axes,
                loops=tuple(len(frame.path) for frame in equation.frames if frame.length is not None),
            )
        )
    return found


def _is_root(eqn: Any) -> bool:
    """Tell whether an equation is `x ** 0.5` or `x ** -0.5`."""
    exponent = getattr(eqn.invars[1], "val", None) if operation(eqn) == "pow" else None
    return exponent is not None and abs(float(exponent)) == 0.5


def select_parts(stream: Stream, parts: Selection) -> list[Site]:
    """Return the sites of what layers write into the stream; None for those that gradfn's networks name.

    Raises:
        ValueError: there are no such sites, or one has another shape than the stream.
    """
    model = stream.model
    offered = [site for site in model.sites if not site.name.startswith("(")]
    if parts is None and not any(map(named(*SUMMANDS[1:]), offered)):
        raise ValueError(
            f"{model.what}: the function has no sites named attention_out and feed_out. Name what its layers add to "
            "the residual stream by parts=[...]. gf.sites(f)(*args) lists all sites."
        )
    chosen = select_entered(model, named(*SUMMANDS) if parts is None else parts)
    shape = next(site.shape for site in model.sites if site.name == stream.end)
    for site in chosen:
        if site.shape != shape:
            raise ValueError(
                f"{model.what}: site {site.name!r} cannot be added to the stream: expected shape {list(shape)}, got "
                f"{list(site.shape)}"
            )
    return chosen


def is_affine(f: Callable[[PyTree], PyTree], x: PyTree) -> bool:
    """Tell whether a function is affine, by its derivative: whether the program of that does not read `x`."""
    leaves, tree = jax.tree.flatten(x)

    def derivative(at: list[jax.Array], direction: list[jax.Array]) -> PyTree:
        return jax.jvp(lambda leaves: f(jax.tree.unflatten(tree, leaves)), (at,), (direction,))[1]

    closed = jax.make_jaxpr(derivative)(leaves, leaves)
    reach = reaching(closed, [True] * len(closed.jaxpr.outvars))
    own = set(closed.jaxpr.invars[: len(leaves)])
    read = {
        v
        for i, eqn in enumerate(closed.jaxpr.eqns)
        for v, needed in zip(eqn.invars, reach.operands.get((i,), [False] * len(eqn.invars)), strict=True)
        if needed and not isinstance(v, Literal)
    }
    return not own & (read | {v for v in closed.jaxpr.outvars if not isinstance(v, Literal)})
