"""`gf.circuits.patch_sweep`: activation patching, exactly, at every layer, position and head."""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from gradfn.circuits._model import Model, always_computed, scalar_metric, trace_model
from gradfn.circuits._over import LAYER, Grid, grid, one_hot
from gradfn.display import ROWS, ShowsTable, TextTable
from gradfn.jaxpr import Site
from gradfn.jaxpr.call import jit_arrays
from gradfn.jaxpr.hoist import hoisted
from gradfn.jaxpr.sites import Selection

# Into which run the other one's values are put.
Into = Literal["corrupt", "clean"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["metric", "clean", "corrupt"],
    meta_fields=["words", "labels", "into", "title"],
)
@dataclass(frozen=True, repr=False)
class PatchSweep(ShowsTable):
    """The metric of every patched run; a pytree of arrays. `print` shows a table of the largest effects.

    Attributes:
        metric: of each patched run, with the axes of `over`.
        clean: the metric of the clean run.
        corrupt: the metric of the corrupted run.
        words: the words of `over`, which name the axes of `metric` (static).
        labels: for each axis of `metric`, what its entries are (static): names of sites, indices.
        into: the run that was patched, `"corrupt"` or `"clean"` (static).
        title: what was patched (static).
    """

    metric: Float[Array, "..."]
    clean: Float[Array, ""]
    corrupt: Float[Array, ""]
    words: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    into: Into
    title: str

    @property
    def normalized(self) -> Float[Array, "..."]:
        """The metric on a scale where the corrupted run is 0 and the clean run is 1, as in Wang et al. (2023).

        Not finite where both runs have the same metric.
        """
        low, high = (self._like_metric(x) for x in (self.corrupt, self.clean))
        return (jnp.asarray(self.metric) - low) / (high - low)

    @property
    def effect(self) -> Float[Array, "..."]:
        """The metric minus that of the run that was patched, without a patch."""
        return self.metric - self._like_metric(self.corrupt if self.into == "corrupt" else self.clean)

    def _like_metric(self, x: jax.Array) -> jax.Array:
        # Under vmap, the axes of the batch are in front.
        return jnp.reshape(x, (*jnp.shape(x), *[1] * len(self.words)))

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table of the patches with the largest effects, at most that many; None for all.

        Results of several pairs (from `vmap`) are averaged.
        """
        batch = tuple(range(jnp.ndim(self.metric) - len(self.words)))
        mean: PatchSweep = jax.tree.map(lambda x: np.mean(np.asarray(x), axis=batch), self)
        metric, effect, share = (np.asarray(x) for x in (mean.metric, mean.effect, mean.normalized))
        sizes = np.where(np.isfinite(effect), np.abs(effect), np.inf).ravel()
        order = np.argsort(-sizes, kind="stable")[:rows]
        lines = [f"clean {mean.clean:.4g}, corrupt {mean.corrupt:.4g}; normalized: 0 = corrupt, 1 = clean"]
        if batch:
            lines.append(f"averaged over {math.prod(jnp.shape(self.clean)):,} pairs")
        if len(order) < len(sizes):
            hidden = len(sizes) - len(order)
            lines.append(f"{hidden:,} of {len(sizes):,} rows are not shown: .table(rows=None) lists them")
        out = TextTable(self.title, "\n".join(lines))
        for word in self.words:
            out.add_column(word, shorten=word == LAYER)
        out.add_column("metric", ".4g")
        out.add_column("effect", "+.3g")
        out.add_column("normalized", ".3f")
        for i in order:
            at = np.unravel_index(i, metric.shape)
            names = [labels[k] for labels, k in zip(self.labels, at, strict=True)]
            out.add_row(*names, float(metric[at]), float(effect[at]), float(share[at]), weight=sizes[i])
        return out


def patch_sweep(
    f: Callable,
    clean: tuple,
    corrupt: tuple,
    metric: Callable[[Any], jax.Array],
    *,
    over: str = "layer x position",
    sites: Selection = None,
    axes: Mapping[str, int] | None = None,
    into: Into = "corrupt",
    batch_size: int = 32,
) -> PatchSweep:
    """Patch every layer, position and head in turn, and return the metric of every patched run.

    Each entry is exact: the run on `corrupt` in which one part of one value is replaced by that of the run on `clean`.
    All runs are one compiled program. Runs that patch the same site are batched, and what they have in common is
    computed once: the layers before it. For one pair of inputs; for a batch of pairs use `jax.vmap` and average:

        sweeps = jax.vmap(lambda a, b: gf.circuits.patch_sweep(f, (params, a), (params, b), metric))(A, B)
        mean = jax.tree.map(lambda x: x.mean(0), sweeps)

    Each call compiles. For many calls, compile once: `jax.jit(lambda a, b: gf.circuits.patch_sweep(...))`.

    Vig et al., *Investigating Gender Bias in Language Models Using Causal Mediation Analysis*, 2020; Meng et al.,
    *Locating and Editing Factual Associations in GPT*, 2022; Heimersheim and Nanda, *How to use and interpret
    activation patching*, 2024 (`into="corrupt"` is what they call denoising, `into="clean"` noising).

    Args:
        f: any JAX function; its first argument counts as the parameters.
        clean: all arguments of `f`, as a tuple: `(params, tokens)`.
        corrupt: the same, with the same shapes and dtypes.
        metric: from the output of `f` to a floating scalar.
        over: what to patch one at a time, words joined by ` x `, which are the axes of the result in this order.
            `layer` are the sites in the order of computation and the iterations of each in a scan; without it, all
            sites are patched together. Another word is an axis of the values. An axis without a word is patched whole.
        sites: which values to patch: names or globs of `gf.sites(f)(*clean)`, or a function of a site. None for those
            of `gf.gpt`: `*mixed`, the output of each attention head, with `head` in `over`; else `*residual`, the
            stream after each block.
        axes: by word, which axis of the values it is. None for `{"position": 0, "head": 1}`; for a model that takes a
            batch, `{"position": 1, "head": 2}`.
        into: which run is patched with values of the other one.
        batch_size: how many runs to compute at a time. More take more memory.

    Returns:
        A `PatchSweep`; its `metric` has the axes of `over`.

    Raises:
        ValueError: an unknown site (similar names are listed), one inside a while loop or a branch of a `cond`, a word
            that does not fit the sites, or inputs that differ in structure, shape or dtype.
        TypeError: inputs that are not tuples, or a metric that is not a floating scalar.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> net = gf.gpt(gf.GPTConfig(vocab=11, context=8, n_layers=2, n_heads=2, width=8))
        >>> params = net.init(jax.random.key(0))
        >>> clean, corrupt = jnp.array([3, 1, 4, 1]), jnp.array([2, 1, 4, 1])
        >>> sweep = gf.circuits.patch_sweep(
        ...     net.apply, (params, clean), (params, corrupt), lambda logits: logits[-1, 3] - logits[-1, 2]
        ... )
        >>> sweep.metric.shape, sweep.labels[0]
        ((2, 4), ('blocks/0/residual', 'blocks/1/residual'))
        >>> abs(float(sweep.normalized[-1, -1]) - 1) < 1e-4   # the last value decides alone
        True
    """
    what = "patch_sweep"
    check_into(into, what)
    check_size(batch_size, what)
    if sites is None:
        sites = "*mixed" if "head" in over.split(" x ") else "*residual"

    def run(clean: tuple, corrupt: tuple) -> PatchSweep:
        model = trace_model(f, clean, what, sites)
        of = grid(always_computed(model, sites), over, axes, what)
        pair = model.program.inputs, model.inputs(corrupt, "corrupt")
        source, target = pair if into == "corrupt" else pair[::-1]
        output, values = model.run(source, keep=[site.name for site in of.sites])
        of_source = scalar_metric(metric, output, what)
        of_target = scalar_metric(metric, model.run(target)[0], what)

        def patched(group: list[Site]) -> jax.Array:
            """Return the metrics of all patches of some sites together, `[*iterations, *sizes]`."""
            loops = group[0].axes if LAYER in of.words else ()

            def one(index: jax.Array) -> jax.Array:
                iteration, part = index[: len(loops)], index[len(loops) :]
                changes = {s.name: (selected(s, of, iteration, part), values[s.name]) for s in group}
                return scalar_metric(metric, run_changed(model, target, changes)[0], what)

            return mapped(one, (*loops, *of.sizes.values()), batch_size)

        if LAYER in of.words:
            result = of.arrange({site.name: patched([site]) for site in of.sites})
        else:
            result = patched(of.sites)
        of_clean, of_corrupt = (of_source, of_target) if into == "corrupt" else (of_target, of_source)
        title = f"Effect of patching {over}, into the {'corrupted' if into == 'corrupt' else 'clean'} run"
        return PatchSweep(result, of_clean, of_corrupt, of.words, of.labels, into, title)

    return jit_arrays(run)(clean, corrupt)


def check_into(into: str, what: str) -> None:
    """Raise a ValueError unless `into` names one of the two runs."""
    if into not in ("corrupt", "clean"):
        raise ValueError(f'{what}: into must be "corrupt" or "clean", got {into!r}')


def check_size(batch_size: int, what: str) -> None:
    """Raise a ValueError unless that many runs can be computed at a time."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"{what}: batch_size must be an integer >= 1, got {batch_size!r}")


def selected(site: Site, of: Grid, iteration: jax.Array, index: jax.Array) -> jax.Array:
    """Return which elements of a site's values in all iterations an index selects: booleans `[*site.axes, ...]`.

    Args:
        site: one of the grid's.
        of: what the index means.
        iteration: one integer per loop around the site; empty for all iterations.
        index: one integer per word without `layer`.
    """
    of_loops = jnp.broadcast_to(one_hot(site.axes, dict(enumerate(iteration))), site.axes)
    of_value = of.mask(site, list(index))
    # [*axes] and [...] -> [*axes, 1, ...] and [1, ..., *]
    of_loops = jnp.expand_dims(of_loops, range(len(site.axes), len(site.axes) + len(site.shape)))
    return of_loops & jnp.expand_dims(of_value, range(len(site.axes)))


def run_changed(
    model: Model,
    inputs: Sequence[PyTree],
    changes: Mapping[str, tuple[jax.Array, jax.Array]],
    keep: Collection[str] = (),
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Run a model with parts of the values at some sites replaced.

    Args:
        model: the model.
        inputs: its inputs, flat.
        changes: by the name of the site, which elements to replace (booleans that broadcast to a value) and the new
            values, both with the iterations of the loops around the site in front.
        keep: as for `Model.run`.
    """

    def edit(old: jax.Array, change: tuple[jax.Array, jax.Array]) -> jax.Array:
        where, new = change
        return jnp.where(where, new, old)

    return model.run(inputs, dict.fromkeys(changes, edit), keep, changes)


def mapped(f: Callable, sizes: tuple[int, ...], batch_size: int) -> PyTree:
    """Return `f` of every index into an array of shape `sizes`, its results in that shape.

    What does not depend on the index is computed once. The rest is batched, `batch_size` indices at a time.
    """
    # Of jax's default integer type, as `jnp.arange`: with 64 bits enabled, that is not int32.
    indices = jnp.asarray(np.array(list(np.ndindex(*sizes)), int).reshape(math.prod(sizes), len(sizes)))
    run, n = jax.vmap(hoisted(f, indices[0])), len(indices)
    if n <= batch_size:
        out = run(indices)
    else:
        # Batches of equal size, so that one program serves them all; the last one is filled up with the first index.
        n_batches = math.ceil(n / batch_size)
        size = math.ceil(n / n_batches)
        filled = jnp.concatenate([indices, jnp.zeros((n_batches * size - n, len(sizes)), indices.dtype)])
        # [n_batches * size, k] -> [n_batches, size, k]
        out = lax.map(run, filled.reshape(n_batches, size, len(sizes)))
        # [n_batches, size, ...] -> [n, ...]
        out = jax.tree.map(lambda x: x.reshape(n_batches * size, *x.shape[2:])[:n], out)
    return jax.tree.map(lambda x: x.reshape(*sizes, *x.shape[1:]), out)
