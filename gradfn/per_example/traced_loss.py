"""The loss of one example with a batch to call it on, traced once."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from gradfn.core.attention_form import differentiable_attention
from gradfn.core.devices import examples_spec
from gradfn.flatten import loss_of_example
from gradfn.jaxpr import trace
from gradfn.jaxpr.call import scalar_and_aux, value_and_aux, with_hint
from gradfn.jaxpr.program import hide_objects, is_array, leaf_name
from gradfn.jaxpr.varying import as_varying, varying_axes, zeros

REMEDY = "Per-example transforms take the loss of one example, or gf.batch_mean(loss)."
Arrays = tuple[list[PyTree], list[PyTree], list[PyTree], list[PyTree]]


class TracedLoss:
    """A loss of one example, its `floating` parameters and a `batch`, both flat."""

    def __init__(
        self, what: str, loss: Callable, params: PyTree, batch: tuple[PyTree, ...], key: PyTree = None
    ) -> None:
        self.size = _size(what, batch)
        if key is not None:
            loss, batch = _noisy(loss), (*batch, jax.random.split(key, self.size))
        batch = jax.tree.map(jnp.asarray, batch)
        # Inside a shard_map each device has its own examples, gradients and norms, also of replicated parameters.
        arrays = [leaf for leaf in jax.tree.leaves((params, batch)) if is_array(leaf)]
        self.varying = frozenset().union(*map(varying_axes, arrays))
        if self.varying:
            params = jax.tree.map(
                lambda x: as_varying(jnp.asarray(x), self.varying) if is_array(x) else x, params
            )
        of_one = with_hint(loss_of_example(loss), REMEDY)
        # Per-example norms can be differentiated again.
        with differentiable_attention():
            self.program = program = trace(of_one, params, *jax.tree.map(_example, batch))
        scalar_and_aux(program.rebuild(program.jaxpr.out_avals), what, "loss of one example", REMEDY)
        avals = program.jaxpr.in_avals
        # The indices of the floating parameters among the program's inputs.
        self.numbers = [
            i
            for i, aval in enumerate(avals)
            if program.owners[i] == 0 and jnp.issubdtype(aval.dtype, jnp.inexact)
        ]
        if not self.numbers:
            got = ", ".join(
                f"{name} {aval.dtype}{list(aval.shape)}"
                for name, owner, aval in zip(program.names, program.owners, avals, strict=True)
                if owner == 0
            )
            raise TypeError(f"{what}: there is no floating parameter, got {got or 'no arrays':.200}")
        self.names = [program.names[i] for i in self.numbers]
        self.floating = [jnp.asarray(program.inputs[i]) for i in self.numbers]
        self.batch = jax.tree.leaves(batch)
        # The mesh axes, if they are explicit, that examples are split over.
        split: tuple[PyTree, Any] = next(filter(any, map(examples_spec, self.batch)), (None, None))
        self.split, self.mesh = split
        self._n_params = sum(owner == 0 for owner in program.owners)

    @property
    def arrays(self) -> Arrays:
        """All arrays that results depend on: floating parameters, other inputs, the batch, closed-over constants."""
        inputs = self.program.inputs[: self._n_params]
        return self.floating, inputs, self.batch, list(self.program.jaxpr.consts)

    def of(self, arrays: Arrays) -> "TracedLoss":
        """Return the same loss with other arrays."""
        loss = copy.copy(self)
        loss.floating, inputs, loss.batch, consts = arrays
        jaxpr = ClosedJaxpr(self.program.jaxpr.jaxpr, consts)
        inputs = [*inputs, *self.program.inputs[self._n_params :]]
        loss.program = dataclasses.replace(self.program, inputs=inputs, jaxpr=jaxpr)
        return loss

    def like(self, values: Sequence[PyTree]) -> PyTree:
        """Return gradients in the tree of the parameters, in their dtypes."""
        return self.tree([g.astype(x.dtype) for g, x in zip(values, self.floating, strict=True)])

    def inputs(self, floating: Sequence[PyTree], example: Sequence[PyTree]) -> list[PyTree]:
        """Return the program's inputs."""
        inputs = [*self.program.inputs[: self._n_params], *example]
        for i, leaf in zip(self.numbers, floating, strict=True):
            inputs[i] = leaf
        return inputs

    def of_all(self, shape: Any, axes: tuple[int, ...] = ()) -> jax.Array:
        """Return zeros, for each example, like a shape with further axes in front; split as the examples are."""
        names = (self.split,) if isinstance(self.split, str) else self.split
        split = (names, *[None] * len(axes))
        return as_varying(zeros(shape, (self.size, *axes), split, self.mesh), self.varying)

    def spread(self, x: jax.Array) -> jax.Array:
        """Return an array with a leading axis of examples, split as these are."""
        if self.split is None:
            return x
        spec = PartitionSpec(self.split, *jax.typeof(x).sharding.spec[1:])
        return jax.sharding.reshard(x, NamedSharding(self.mesh, spec))

    def outputs(self, outs: Sequence[PyTree]) -> tuple[PyTree, PyTree]:
        """Return the value and aux of the program's outputs."""
        value, aux = value_and_aux(self.program.rebuild(outs))
        return value, hide_objects(aux)

    def run(self, floating: Sequence[PyTree], example: Sequence[PyTree]) -> tuple[PyTree, PyTree]:
        """Return one example's value and aux."""
        closed = self.program.jaxpr
        return self.outputs(jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *self.inputs(floating, example)))

    def tree(self, values: Sequence[PyTree]) -> PyTree:
        """Return one value per floating parameter in the tree of the parameters."""
        by_number = dict(zip(self.numbers, values, strict=True))
        return self.program.like_arguments([by_number.get(i) for i in range(len(self.program.inputs))])[0]


def _noisy(loss: Callable) -> Callable:
    """Return the loss of one example with its random key as the last argument."""
    of_one = loss_of_example(loss)
    return lambda params, *example: of_one(params, *example[:-1], key=example[-1])


def _example(x: PyTree) -> PyTree:
    """Return an array with the shape and dtype of one example, to trace with."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x[0]
    aval = jax.typeof(x)
    sharding = aval.sharding.update(spec=PartitionSpec(*aval.sharding.spec[1:]))
    one = jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype, sharding=sharding)
    return as_varying(zeros(one), varying_axes(x))


def _size(what: str, batch: tuple[PyTree, ...]) -> int:
    """Check the batch and return its number of examples."""
    leaves = [
        (leaf_name(path[1:], "") or f"argument {path[0].idx + 1}", leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]
    ]
    if not leaves:
        raise ValueError(f"{what}: expected a batch after the parameters, got no array")
    for name, leaf in leaves:
        if not is_array(leaf) or not jnp.shape(leaf):
            got = f"{jnp.result_type(leaf)}[]" if is_array(leaf) else type(leaf).__name__
            raise ValueError(
                f"{what}: {name}: expected an array with the examples along its first axis, got {got}. "
                "Close over what all examples share: lambda params, x: loss(params, x, it)"
            )
    first, size = leaves[0][0], leaves[0][1].shape[0]
    for name, leaf in leaves:
        if leaf.shape[0] != size:
            raise ValueError(
                f"{what}: {name}: expected {size} examples along the first axis, as {first} has, "
                f"got shape {list(leaf.shape)}"
            )
    if size == 0:
        raise ValueError(
            f"{what}: {first}: expected at least one example, got shape {list(leaves[0][1].shape)}"
        )
    return size
