"""A function traced once, to be run with other inputs and with values at its sites edited."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.inspection.observe import trace_sites
from gradfn.jaxpr import Equation, Program, Site, interpret, select
from gradfn.jaxpr.interpreter import Evaluate, Path
from gradfn.jaxpr.program import traced_leaves
from gradfn.jaxpr.sites import Selection
from gradfn.jaxpr.varying import as_varying, varying_axes

# What becomes of a value, and the token for one iteration if there are tokens.
Edit = Callable[..., PyTree]


@dataclass(frozen=True)
class Model:
    """A traced function and its sites.

    What lies before an edited site and is used nowhere else is not computed, once the run is compiled.
    """

    program: Program
    sites: tuple[Site, ...]
    what: str

    def select(self, wanted: Selection) -> list[Site]:
        """Return the sites selected by name, glob or predicate, in the order of computation.

        Raises:
            ValueError: nothing is selected (similar names are listed), or the site is inside a while loop.
        """
        chosen = select(self.sites, wanted, self.what)
        if not chosen:
            raise ValueError(f"{self.what}: no site is selected. gf.sites(f)(*args) lists all.")
        for site in chosen:
            if self._equations[site.path].in_while:
                raise ValueError(
                    f"{self.what}: site {site.name!r} is inside a while loop ({site.line}), where each iteration "
                    "overwrites the value of the one before. Write the loop as jax.lax.scan."
                )
        return chosen

    @functools.cached_property
    def _equations(self) -> dict[Path, Equation]:
        return self.program.equations({site.path for site in self.sites})

    def inputs(self, args: Sequence[PyTree], name: str) -> list[PyTree]:
        """Return other arguments of the function as flat inputs; `name` is theirs, for errors.

        Raises:
            ValueError: they differ from the traced ones in structure, shapes, dtypes or configuration.
        """
        leaves, tree = jax.tree.flatten((tuple(args), {}))
        if tree != self.program.in_tree:
            raise ValueError(
                f"{self.what}: {name} has another structure than the arguments before, {tree} instead of "
                f"{self.program.in_tree}"
            )
        if traced_leaves((tuple(args), {})) != list(self.program.is_array) or self.program.fixed_data:
            raise ValueError(
                f"{self.what}: {name} has other arguments that are not arrays, or the function needs their values "
                "while it is traced. Pass jax arrays."
            )
        arrays = [leaf for leaf, is_array in zip(leaves, self.program.is_array, strict=True) if is_array]
        for path, old, new in zip(self.program.names, self.program.inputs, arrays, strict=True):
            expected, actual = (f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in (old, new))
            if expected != actual:
                raise ValueError(
                    f"{self.what}: {path}: expected {expected}, as in the arguments before, got {actual} in {name}. "
                    "Both must have the same shape: pad the shorter one, or compare inputs of equal length."
                )
        return arrays

    def run(
        self,
        inputs: Sequence[PyTree],
        edits: Mapping[str, Edit] | None = None,
        keep: Collection[str] = (),
        tokens: Mapping[str, PyTree] | None = None,
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Run the function once.

        Args:
            inputs: the program's, flat.
            edits: by the name of a site, what becomes of its value: `edit(value)`, or `edit(value, token)` for a site
                with a token.
            keep: the names of the sites whose values to return, as computed, before the site's own edit.
            tokens: by the name of a site, a tree of arrays with the site's `axes` (iterations) in front.

        Returns:
            The function's output, and the kept values by name, with the site's `axes` in front.
        """
        edits, tokens = edits or {}, tokens or {}
        by_name = {site.name: site for site in self.sites}
        at: dict[Path, list[Site]] = {}
        for name in {**dict.fromkeys(edits), **dict.fromkeys(keep)}:
            at.setdefault(by_name[name].path, []).append(by_name[name])

        def visit(
            equation: Equation, evaluate: Evaluate, inputs: Sequence[PyTree], token: Mapping[str, PyTree]
        ) -> tuple[list[PyTree], dict[str, PyTree]]:
            outs = evaluate(inputs)
            kept = {site.name: outs[site.index] for site in at[equation.path] if site.name in keep}
            for site in at[equation.path]:
                if site.name in edits:
                    old = outs[site.index]
                    own = (token[site.name],) if site.name in token else ()
                    outs[site.index] = self._fitted(site, edits[site.name](old, *own), old)
            return outs, kept

        by_path = {
            path: {site.name: tokens[site.name] for site in group if site.name in tokens}
            for path, group in at.items()
        }
        equations = {path: self._equations[path] for path in at}
        outs, kept = interpret(self.program.jaxpr, visit, equations, inputs, by_path)
        values = {name: value for group in kept.values() for name, value in group.items()}
        return self.program.rebuild(outs), values

    def _fitted(self, site: Site, value: PyTree, old: jax.Array) -> jax.Array:
        value = jnp.asarray(value)
        if value.shape != old.shape:
            raise ValueError(
                f"{self.what}: site {site.name!r} has shape {site.dtype}{list(old.shape)}, got {list(value.shape)}"
            )
        return as_varying(value.astype(old.dtype), varying_axes(old))


def trace_model(f: Callable, args: Any, what: str, sites: Selection = None) -> Model:
    """Trace a function of `args`, a tuple of all its arguments with the parameters first; `what` is the caller.

    `sites` are those that will be used: the probabilities of long attention are computed only if they are among
    them.

    Raises:
        TypeError: `args` is not a tuple.
        ValueError: a site that the function does not have; the message lists similar names.
    """
    if not isinstance(args, tuple):
        raise TypeError(
            f"{what}: expected the arguments of the function as a tuple, such as (params, tokens), got "
            f"{type(args).__name__}"
        )
    traced = trace_sites(f, args, {}, sites, what)
    select(traced.sites, sites, what)
    return Model(traced.program, tuple(traced.sites), what)


def always_computed(model: Model, wanted: Selection) -> list[Site]:
    """Return the sites selected, all of which each run computes.

    Raises:
        ValueError: nothing is selected, or a site is inside a while loop or a branch of a cond.
    """
    chosen = model.select(wanted)
    equations = model.program.equations({site.path for site in chosen})
    for site in chosen:
        if any(frame.kind == "cond" for frame in equations[site.path].frames):
            raise ValueError(
                f"{model.what}: site {site.name!r} is inside a branch of a lax.cond ({site.line}), which one run may "
                "take and the other not. Patch what the cond returns, or write it as jnp.where."
            )
    return chosen


def scalar_metric(metric: Callable, output: PyTree, what: str) -> jax.Array:
    """Return `metric(output)`, a real floating scalar.

    Raises:
        TypeError: it is not one.
    """
    value = metric(output)
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{what}: metric must return one floating number, got {dtype}{list(shape)}. Choose an entry or average, "
            "such as lambda logits: logits[-1, 5] - logits[-1, 3]."
        )
    return jnp.asarray(value)
