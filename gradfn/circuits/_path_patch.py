"""`gf.circuits.path_patch`: the effect of one part of a model on others through the paths between them alone."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.circuits._model import Model, always_computed, scalar_metric, trace_model
from gradfn.circuits._over import LAYER, grid
from gradfn.circuits._sweep import (
    Into,
    PatchSweep,
    check_into,
    check_size,
    mapped,
    run_changed,
    selected,
)
from gradfn.jaxpr import Site
from gradfn.jaxpr.call import jit_arrays
from gradfn.jaxpr.sites import Selection

# What each layer adds to the residual stream of gf.gpt: attention heads before their output matrix, and the MLP.
FROZEN = ("*mixed", "*feed_out")

Receivers = Selection | Mapping[str, Mapping[str, int]]


class Receiver(NamedTuple):
    """A site at which paths end, and which elements of its values: booleans `[*site.axes, ...]`."""

    site: Site
    where: jax.Array


def path_patch(
    f: Callable,
    clean: tuple,
    corrupt: tuple,
    metric: Callable[[Any], jax.Array],
    *,
    receivers: Receivers,
    sender: Selection = "*mixed",
    over: str = "layer x head",
    axes: Mapping[str, int] | None = None,
    frozen: Selection = None,
    into: Into = "corrupt",
    batch_size: int = 32,
) -> PatchSweep:
    """Patch the paths from each sender to some receivers, and return the metric of every patched run.

    With `x` the corrupted input and `x'` the clean one, and `do(v := a)` for a run in which the value `v` is replaced:

        r = R( x; do(sender := sender(x'), F := F(x)) )      the receivers R, if the sender alone changes
        metric( f(x; do(R := r)) )                           the output, if R alone changes

    `F` are the frozen sites, without the part that is the sender: what lies between sender and receivers keeps its
    value of the corrupted run, so a change of the sender reaches the receivers only through what is not frozen. By
    default all heads and MLPs are frozen, which leaves the residual stream and the norms: the direct path. With
    `frozen="*mixed"` paths through MLPs count too, as in Wang et al. Behind the receivers nothing is frozen. A sender
    behind the receivers has no effect on them.

    Wang et al., *Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small*, 2023
    (section 3.1, appendix B); Goldowsky-Dill et al., *Localizing Model Behavior with Path Patching*, 2023.

    Args:
        f: any JAX function; its first argument counts as the parameters.
        clean: all arguments of `f`, as a tuple: `(params, tokens)`.
        corrupt: the same, with the same shapes and dtypes.
        metric: from the output of `f` to a floating scalar.
        receivers: the sites at which the paths end, all together: names or globs; or a dict from these to the part of
            the value, such as `{"blocks/1/attention/queries": {"head": 3}}`. `layer` is the iteration of a site in a
            scan. `"logits"` gives the direct effect on the output.
        sender: the sites at which they start, one part at a time.
        over: which parts, as in `patch_sweep`.
        axes: by word, which axis of the values it is, for senders and receivers; see `patch_sweep`.
        frozen: which sites keep their value of the run that is patched. None for `*mixed` and `*feed_out`, where the
            function has them.
        into: which run is patched with values of the other one.
        batch_size: how many runs to compute at a time. More take more memory.

    Returns:
        A `PatchSweep` of the senders; its `metric` has the axes of `over`.

    Raises:
        ValueError: an unknown site (similar names are listed), one inside a while loop or a branch of a `cond`, a word
            or an index that does not fit the sites, no site to freeze, or inputs that differ in structure, shape or
            dtype.
        TypeError: inputs that are not tuples, or a metric that is not a floating scalar.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> net = gf.gpt(gf.GPTConfig(vocab=11, context=8, n_layers=2, n_heads=2, width=8))
        >>> params = net.init(jax.random.key(0))
        >>> clean, corrupt = jnp.array([3, 1, 4, 1]), jnp.array([2, 1, 4, 1])
        >>> paths = gf.circuits.path_patch(
        ...     net.apply,
        ...     (params, clean),
        ...     (params, corrupt),
        ...     lambda logits: logits[-1, 3] - logits[-1, 2],
        ...     receivers={"blocks/1/attention/keys": {"head": 0}},
        ... )
        >>> paths.metric.shape, bool(jnp.any(paths.effect[0] != 0)), bool(jnp.all(abs(paths.effect[1]) < 1e-6))
        ((2, 2), True, True)
    """
    what = "path_patch"
    check_into(into, what)
    check_size(batch_size, what)

    def run(clean: tuple, corrupt: tuple) -> PatchSweep:
        model = trace_model(f, clean, what)
        of = grid(always_computed(model, sender), over, axes, what)
        ends = _receivers(model, receivers, axes)
        kept = _frozen(model, frozen)
        pair = model.program.inputs, model.inputs(corrupt, "corrupt")
        source, target = pair if into == "corrupt" else pair[::-1]
        output, values = model.run(source, keep=[site.name for site in of.sites])
        of_source = scalar_metric(metric, output, what)
        output, base = model.run(target, keep=[site.name for site in kept])
        of_target = scalar_metric(metric, output, what)
        freeze = {
            site.name: (jnp.ones([*site.axes, *[1] * len(site.shape)], bool), base[site.name])
            for site in kept
        }

        def received(group: list[Site]) -> dict[str, jax.Array]:
            """Return what the receivers get from each part of some senders, `[*iterations, *sizes, ...]`."""
            loops = group[0].axes if LAYER in of.words else ()

            def one(index: jax.Array) -> dict[str, jax.Array]:
                changes = dict(freeze)
                for site in group:
                    where = selected(site, of, index[: len(loops)], index[len(loops) :])
                    new = values[site.name]
                    if site.name in base:
                        where, new = freeze[site.name][0], jnp.where(where, new, base[site.name])
                    changes[site.name] = where, new
                return run_changed(model, target, changes, [end.site.name for end in ends])[1]

            return mapped(one, (*loops, *of.sizes.values()), batch_size)

        if LAYER in of.words:
            by_sender = {site.name: received([site]) for site in of.sites}
            recorded = {
                end.site.name: of.arrange({name: values[end.site.name] for name, values in by_sender.items()})
                for end in ends
            }
        else:
            recorded = received(of.sites)

        def patched(index: jax.Array) -> jax.Array:
            changes = {end.site.name: (end.where, recorded[end.site.name][tuple(index)]) for end in ends}
            return scalar_metric(metric, run_changed(model, target, changes)[0], what)

        result = mapped(patched, of.shape, batch_size)
        of_clean, of_corrupt = (of_source, of_target) if into == "corrupt" else (of_target, of_source)
        title = (
            f"Effect of the paths from {_names(of.sites)} to {_names([end.site for end in ends], receivers)}"
        )
        return PatchSweep(result, of_clean, of_corrupt, of.words, of.labels, into, title)

    return jit_arrays(run)(clean, corrupt)


def _frozen(model: Model, frozen: Selection) -> list[Site]:
    if frozen is not None:
        return always_computed(model, frozen)
    names = [site.name for site in model.sites]
    known = [pattern for pattern in FROZEN if fnmatch.filter(names, pattern)]
    if not known:
        raise ValueError(
            f"{model.what}: the function has no sites {' or '.join(FROZEN)}. Pass frozen=, the names of what each "
            "layer adds to the residual stream; gf.sites(f)(*args) lists all names."
        )
    return always_computed(model, known)


def _receivers(model: Model, receivers: Receivers, axes: Mapping[str, int] | None) -> list[Receiver]:
    parts: list[tuple[Selection, Mapping[str, int]]] = (
        list(receivers.items()) if isinstance(receivers, Mapping) else [(receivers, {})]
    )
    ends: dict[str, Receiver] = {}
    for wanted, part in parts:
        for site in always_computed(model, wanted):
            if site.name in ends:
                raise ValueError(f"{model.what}: receivers names site {site.name!r} twice")
            ends[site.name] = Receiver(site, _part(model, site, part, axes))
    return list(ends.values())


def _part(model: Model, site: Site, part: Mapping[str, int], axes: Mapping[str, int] | None) -> jax.Array:
    """Return which elements of a site's values a part such as `{"layer": 1, "head": 3}` is."""
    words = [word for word in part if word != LAYER]
    of = grid([site], " x ".join(words) or LAYER, axes, model.what)
    sizes = dict(of.sizes)
    if LAYER in part:
        if len(site.axes) != 1:
            raise ValueError(
                f"{model.what}: 'layer' selects an iteration, and the receiver {site.name!r} is inside "
                f"{len(site.axes)} loops. Leave it out, or select the layer by the name of the site."
            )
        sizes[LAYER] = site.axes[0]
    for word, at in part.items():
        if not 0 <= at < sizes[word]:
            raise ValueError(
                f"{model.what}: receiver {site.name!r} has {word} 0 to {sizes[word] - 1}, got {at}"
            )
    iteration = jnp.asarray([part[LAYER]] if LAYER in part else [], jnp.int32)
    return selected(site, of, iteration, jnp.asarray([part[word] for word in words], jnp.int32))


def _names(sites: Sequence[Site], parts: PyTree = None) -> str:
    """Return the names of some sites for a title, and which part of them."""
    named = [site.name for site in sites]
    shown = ", ".join(named[:2]) + (f" and {len(named) - 2} more" if len(named) > 2 else "")
    every = {tuple(part.items()) for part in parts.values()} if isinstance(parts, Mapping) else set()
    return shown + "".join(f" {word} {at}" for word, at in next(iter(every))) if len(every) == 1 else shown
