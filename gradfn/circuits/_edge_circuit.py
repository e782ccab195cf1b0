"""A transformer run in which only some edges between its parts are intact."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gradfn.circuits._model import Model, scalar_metric
from gradfn.circuits._parts import READS, Parts, labels
from gradfn.circuits._stream import saved


def edge_circuit(
    parts: Parts, clean: Sequence[PyTree], corrupt: Sequence[PyTree], metric: Callable
) -> Callable[[jax.Array], jax.Array]:
    """Return the metric as a function of which edges are intact, booleans `[senders, receivers]`.

    A receiver reads, through its intact edges, what the senders write in this run; through the others what they write
    in the corrupt run. The embedding is that of the clean run.

    Raises:
        ValueError: the layers are in a loop, in which no part can be run alone.
    """
    model, roles = parts.model, parts.roles
    looped = [site.name for role in roles.values() for site in role.sites if site.axes]
    if looped:
        raise ValueError(
            f"{model.what}: the layers are in a lax.scan ({looped[0]}), and keeping some edges needs each on its own. "
            "Use the unrolled network: gf.gpt with scan=False, and gf.unstack_blocks(params)."
        )
    names = {role: sites.names for role, sites in roles.items()}
    streams = [parts.embedded.name, *names["residual"]]
    keep = [
        *streams,
        *(name for role in ("mixed", "residual_mid", "feed_out") for name in names.get(role, ())),
    ]
    _, old = model.run(corrupt, keep=keep)
    _, new = model.run(clean, keep=streams[:1])
    column = {name: i for i, name in enumerate(labels(parts)[1])}

    def only(edit: str, keep: Sequence[str]) -> Callable[[jax.Array], list[jax.Array]]:
        """Return the values of some sites as a function of the value at another."""
        return lambda value: _values(model, corrupt, {edit: value}, keep)

    def run(intact: jax.Array) -> jax.Array:
        # The difference to what each sender writes in the corrupt run, in the order of `labels`.
        changes = [new[streams[0]] - old[streams[0]]]

        def read(stream: str, readers: Sequence[str]) -> jax.Array:
            """Return what each receiver reads: `[readers, ..., features]`."""
            weights = intact[: len(changes), jnp.array([column[name] for name in readers])]
            stacked = jnp.stack(changes)
            # [senders, readers] and [senders, ..., features] -> [readers, ..., features]
            return old[stream][None] + jnp.einsum("sr,s...->r...", weights.astype(stacked.dtype), stacked)

        for layer in range(parts.n_layers):
            given = {}
            for role in READS:
                site, n = names[role][layer], parts.n_heads(role)
                inputs = read(streams[layer], [f"a{layer}.h{head}.{role[0]}" for head in range(n)])
                (values,) = jax.vmap(only(streams[layer], [site]))(inputs)
                # Of each head what its own reader computes: [heads, ..., heads, size] -> [..., heads, size]
                given[site] = jnp.stack(
                    [jnp.take(values[head], head, parts.head) for head in range(n)], parts.head
                )
            mixed = names["mixed"][layer]
            (value,) = _values(model, corrupt, given, [mixed])
            project = only(mixed, [names["attention_out"][layer]])
            _, along = jax.linearize(lambda x, project=project: project(x)[0], old[mixed])
            change = parts.one_head("mixed", (value - old[mixed])[None])[:, 0]
            changes += list(jax.vmap(along)(change))
            if parts.has_mlps:
                middle, feed = names["residual_mid"][layer], names["feed_out"][layer]
                (value,) = only(middle, [feed])(read(middle, [f"m{layer}"])[0])
                changes.append(value - old[feed])
        final = read(streams[-1], ["final"])[0]
        output, _ = model.run(corrupt, {streams[-1]: lambda _: final})
        return scalar_metric(metric, output, model.what)

    return run


def _values(
    model: Model, inputs: Sequence[PyTree], given: dict[str, jax.Array], keep: Sequence[str]
) -> list[jax.Array]:
    """Return the values of some sites while those of others are given."""
    _, kept = model.run(inputs, dict.fromkeys(given, saved), keep, given)
    return [kept[name] for name in keep]
