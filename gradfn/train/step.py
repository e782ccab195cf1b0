"""One step of training, as a pure function of the state and a batch."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, PyTree

from gradfn.core.net import takes_key
from gradfn.core.params import named_leaves
from gradfn.flatten import Loss, loss_of_example
from gradfn.jaxpr.call import value_and_aux
from gradfn.jaxpr.varying import zeros
from gradfn.train.gathering import gather_where_used
from gradfn.train.held import held
from gradfn.train.memory import keep_blocks_of_steps
from gradfn.train.model import Graph, Rest, batch_loss, carry, strong, take_apart
from gradfn.train.placing import automatic, automatic_axes, mesh_context, mesh_of, place
from gradfn.train.split import Split, follow, split_of


class TrainState(NamedTuple):
    """Everything that training carries from step to step, as one pytree of arrays.

    Attributes:
        params: the trained arrays in the model's tree, None elsewhere; the model itself if all of it is trained.
        opt_state: the state of the optimizer.
        step: int32 scalar, the number of steps taken.
        key: a typed random key; each step folds its number into it.
        model_state: what the loss returns as `aux["state"]`; of an NNX module, everything that is not a Param.
        rest: the part of the model that is neither trained nor carried (static).
    """

    params: PyTree
    opt_state: PyTree
    step: Int[Array, ""]
    key: Key[Array, ""]
    model_state: PyTree = None
    rest: Rest | Graph | None = None

    @property
    def model(self) -> PyTree:
        """The model, of the type that was given, with the arrays of this state."""
        return self.params if self.rest is None else self.rest.model(self.params, self.model_state)


class Change(NamedTuple):
    """What a step changed the parameters by, in their tree.

    Attributes:
        grads: of the loss, before the optimizer clips or averages them.
        updates: what was added to the parameters.
    """

    grads: PyTree
    updates: PyTree


def train_state(
    params: PyTree, optimizer: optax.GradientTransformation, key: jax.Array, state: PyTree = None
) -> TrainState:
    """Return the state that training starts from.

    Args:
        params: any pytree: its floating arrays are trained, the rest is configuration, so an Equinox model works.
            Of a Flax NNX module the `nnx.Param`s are trained and its other variables are carried.
        optimizer: from optax.
        key: from `jax.random.key`; for losses with noise in them.
        state: a pytree of arrays that the loss changes at each step, such as Linen's `batch_stats` and Equinox's
            `State`: see `gf.fit`.

    Parameters on a mesh keep their shardings; the optimizer's state is split like them, all else is on every device.
    The axes of the mesh become Auto.

    Raises:
        TypeError: nothing in `params` can be trained, or it holds state that must not be.
        ValueError: the arrays lie on two meshes.

    >>> import jax, jax.numpy as jnp, optax, gradfn as gf
    >>> gf.train_state({"w": jnp.ones(3)}, optax.sgd(0.1), jax.random.key(0)).step
    Array(0, dtype=int32)
    """
    return placed_state(params, optimizer, key, state, mesh_of)


def placed_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    state: PyTree,
    choose: Callable[[PyTree], Mesh | None],
) -> TrainState:
    """Return the state that training starts from, on a mesh: see `train_state`.

    Args:
        params: as in `train_state`, and so are `optimizer`, `key` and `state`.
        choose: from the arrays of the model, by name, to the mesh; None leaves all where they are.
    """
    params, rest, carried = take_apart(params)
    if state is not None and carried is not None:
        raise TypeError("an NNX module carries its own state; state= must be None, or split the module")
    model_state = carried if state is None else jax.tree.map(strong, state)
    step: Any = np.int32(0)
    mesh = choose({"params": params, "state": model_state, "rest": rest})

    def init(params: PyTree) -> PyTree:
        return jax.tree.map(_number, optimizer.init(params))

    if mesh is None:
        return TrainState(params, init(params), jnp.asarray(step), key, model_state, rest)
    mesh = automatic(mesh)
    params, rest, model_state, step, key = place((params, rest, model_state, step, key), mesh)
    with mesh_context(mesh):
        shardings = follow(
            jax.eval_shape(init, params), params, jax.tree.map(lambda leaf: leaf.sharding, params)
        )
        opt_state = jax.jit(init, out_shardings=shardings)(params)
    return TrainState(params, opt_state, step, key, model_state, rest)


def train_step(
    loss: Loss, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, PyTree], tuple[TrainState, dict[str, jax.Array]]]:
    """Return a compiled function that takes one step, for training loops of your own.

    Args:
        loss: of a batch, `(params, batch) -> scalar` or `(scalar, aux)`, with `key=` where it has noise in it and
            `state=` where the state was made with one. For a loss of one example pass `gf.batch_mean(loss)`.
        optimizer: from optax. It gets `value`, `grad` and `value_fn` too, which `optax.lbfgs` and
            `optax.contrib.reduce_on_plateau` need.

    Returns:
        `(state, batch) -> (state, metrics)`; `metrics` holds `loss` and the scalars of aux. With a state on a mesh it
        splits the batch over the mesh's axis `data`, and gathers parameters that are split over it where they are
        computed with; except inside a `jax.jit` of yours, where it cannot see where the state lies.

    Raises:
        ValueError: a scalar of aux has the name `loss`, or two have the same; a batch that does not divide by the
            mesh's axis.
        TypeError: a loss of one example; the loss does not return the state that it takes, or changes its structure.

    >>> import jax, jax.numpy as jnp, optax, gradfn as gf
    >>> step = gf.train_step(lambda params, batch: jnp.square(params["w"] - batch).mean(), optax.sgd(0.5))
    >>> state = gf.train_state({"w": jnp.zeros([])}, optax.sgd(0.5), jax.random.key(0))
    >>> state, metrics = step(state, jnp.array([1.0, 3.0]))
    >>> print(state.params["w"], metrics["loss"])
    2.0 5.0
    """
    keep_blocks_of_steps()
    own, loss_of = held(loss)
    compiled = jax.jit(
        lambda arrays, state, batch, split: one_step(loss_of(arrays), optimizer, split)(state, batch)[:2],
        static_argnums=3,
    )

    def arguments(state: TrainState, batch: PyTree) -> tuple[PyTree, TrainState, PyTree, Split | None]:
        split = split_of(state.params)
        if split is None:
            return own, state, batch, None
        return *automatic_axes((own, state, batch), split.mesh), split

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
        *args, split = arguments(state, batch)
        with contextlib.nullcontext() if split is None else mesh_context(split.mesh):
            return compiled(*args, split)

    def lower(state: TrainState, batch: PyTree) -> _Stage:
        return _Stage(compiled.lower(*arguments(state, batch)), lambda *args: arguments(*args)[:-1])

    setattr(step, "lower", lower)  # noqa: B010 (as functions that jax.jit returns have it)
    return step


class _Stage:
    """A `jax.stages` object of a step that takes what the step takes, without the arrays that its loss holds."""

    def __init__(self, stage: Any, arguments: Callable[[TrainState, PyTree], tuple]):
        self._stage, self._arguments = stage, arguments

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def compile(self, *args: Any, **kwargs: Any) -> _Stage:
        return _Stage(self._stage.compile(*args, **kwargs), self._arguments)

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
        return self._stage(*self._arguments(state, batch))


def one_step(
    loss: Loss, optimizer: optax.GradientTransformation, split: Split | None, guard: bool = False
) -> Callable[[TrainState, PyTree], tuple[TrainState, dict[str, jax.Array], Change]]:
    """Return the function that takes one step: see `train_step` and `apply_gradients`.

    Args:
        loss: of a batch.
        optimizer: from optax.
        split: how the step is split over a mesh; None if it is not.
        guard: return the state as it is where the loss or a gradient is not finite, or the sum of a gradient's
            squares. Under `lax.cond`, so that a step may still write the new state over the old one.
    """

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, jax.Array], Change]:
        keywords = step_keywords(loss, state)
        f = batch_loss(loss, state.rest)
        if split is not None:
            batch = split.share(batch)
        pair = gather_where_used(lambda *args: value_and_aux(f(*args, **keywords)), split)
        (value, aux), grads = jax.value_and_grad(pair, has_aux=True)(state.params, batch)
        value_fn = lambda params: pair(params, batch)[0]  # noqa: E731

        return apply_gradients(optimizer, state, value, aux, grads, value_fn, split, guard)

    return step


def squares_are_finite(grads: PyTree) -> jax.Array:
    """Return whether the sum of each array's squares is finite, which is cheaper than to ask that of each element."""
    floats = [leaf for leaf in jax.tree.leaves(grads) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    sums = [jnp.sum(jnp.square(jnp.abs(leaf)), dtype=jnp.float32) for leaf in floats]
    return jnp.isfinite(jnp.array(sums)).all()


def apply_gradients(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    value: jax.Array,
    aux: Any,
    grads: PyTree,
    value_fn: Callable[[PyTree], jax.Array],
    split: Split | None = None,
    guard: bool = False,
) -> tuple[TrainState, dict[str, jax.Array], Change]:
    """Take a step, given the loss and its gradients.

    Args:
        optimizer: from optax.
        state: before the step.
        value: the loss on the step's batch.
        aux: what the loss returned beside it.
        grads: the gradients, in the tree of `state.params`.
        value_fn: from parameters to the loss on the step's batch.
        split: how the step is split over a mesh; None if it is not.
        guard: as in `one_step`.

    Returns:
        The state after the step, the step's metrics, and its gradients and updates.
    """

    def taken() -> tuple[TrainState, dict[str, jax.Array], Change]:
        return _applied(optimizer, state, value, aux, grads, value_fn, split)

    def kept() -> tuple[TrainState, dict[str, jax.Array], Change]:
        metrics = {"loss": value, **scalars(carry(state.model_state, aux)[1])}
        return state, metrics, zeros(jax.eval_shape(taken)[2])

    if not guard:
        return taken()
    return jax.lax.cond(jnp.isfinite(value) & squares_are_finite(grads), taken, kept)


def _applied(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    value: jax.Array,
    aux: Any,
    grads: PyTree,
    value_fn: Callable[[PyTree], jax.Array],
    split: Split | None,
) -> tuple[TrainState, dict[str, jax.Array], Change]:
    model_state, aux = carry(state.model_state, aux)
    # The gradient that jax gives of a complex number is the conjugate of the direction of steepest ascent.
    grads = jax.tree.map(jnp.conj, grads)
    if split is not None:
        grads = split.scatter(grads)
    # optax mixes integers and floats, whatever promotion the user chose.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optax.with_extra_args_support(optimizer).update(
            grads, state.opt_state, state.params, value=value, grad=grads, value_fn=value_fn
        )
        params = optax.apply_updates(state.params, updates)
    _check_types(state.opt_state, opt_state)
    if split is not None:
        params, opt_state = split.stay(params, opt_state)
    after = TrainState(params, opt_state, state.step + 1, state.key, model_state, state.rest)
    return after, {"loss": value, **scalars(aux)}, Change(grads, updates)


def step_keywords(loss: Loss, state: TrainState) -> dict[str, Any]:
    """Return the keyword arguments of the loss in the next step.

    Raises:
        TypeError: the loss takes a state and there is none, or the other way round.
    """
    parameter = inspect.signature(loss).parameters.get("state")
    given = state.model_state is not None
    if given and parameter is None and not isinstance(state.rest, Graph):
        raise TypeError(
            'with state, the loss must be (params, batch, state) -> (scalar, {"state": new_state})'
        )
    if not given and parameter is not None and parameter.default is parameter.empty:
        raise TypeError(
            "the loss takes state: pass the initial one, fit(..., state=...) or train_state(..., state=...)"
        )
    keywords = {"state": state.model_state} if given else {}
    return keywords | ({"key": step_key(state)} if takes_key(loss) else {})


def of_example(loss: Loss, state: TrainState) -> tuple[Callable, jax.Array | None]:
    """Return the loss of one example in the next step, and that step's key if it takes one."""
    of_one = loss_of_example(loss) if state.rest is None else state.rest.loss(loss_of_example(loss))
    return of_one, step_key(state) if takes_key(of_one) else None


def step_key(state: TrainState) -> jax.Array:
    """Return the key of the next step."""
    return jax.random.fold_in(state.key, state.step)


def scalars(aux: PyTree) -> dict[str, jax.Array]:
    """Return the scalars in a tree by their paths.

    Raises:
        ValueError: two have the same path, or one is called `loss`.
    """
    named = {name: jnp.asarray(leaf) for name, leaf in named_leaves(aux)}
    found = {name: leaf for name, leaf in named.items() if leaf.ndim == 0}
    if "loss" in found:
        raise ValueError("aux: loss is the name of the loss itself. Rename the scalar in aux")
    return found


def _number(leaf: PyTree) -> jax.Array:
    try:
        return strong(leaf)
    except TypeError:
        message = f"the optimizer's state must be numbers and arrays, got {type(leaf).__name__}"
        raise TypeError(message) from None


def _check_types(before: Any, after: Any) -> None:
    """Raise a TypeError where an optimizer's state changes its dtypes or shapes from step to step."""
    was: PyTree = jax.tree.structure(before)
    now: Any = jax.tree.structure(after)
    if was != now:
        raise TypeError("the optimizer changes the structure of its state from step to step")
    for (name, old), new in zip(named_leaves(before), jax.tree.leaves(after), strict=True):
        expected, actual = (f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for leaf in (old, new))
        if expected != actual:
            raise TypeError(
                f"the optimizer's state {name or 'opt_state'} is {expected} before a step and {actual} after"
            )
