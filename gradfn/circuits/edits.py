"""The usual edits of values inside a model, for `gf.patch`.

An edit is a function of the value at a site: `zero`, or what `steer(vector)` returns. `interchange` needs two inputs,
and returns a function like `gf.patch` does.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gradfn.circuits._model import always_computed, trace_model
from gradfn.inspection._patch import Using
from gradfn.jaxpr.sites import Selection

Edit = Callable[[jax.Array], jax.Array]


def zero(value: jax.Array) -> jax.Array:
    """Return zeros, to ablate a value.

    Args:
        value: of any shape and dtype.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> net = gf.mlp([4, 3, 2])
        >>> ablated = gf.patch(net.apply, {"a1": gf.circuits.zero})
        >>> ablated(net.init(jax.random.key(0)), jnp.ones(4))
        Array([0., 0.], dtype=float32)
    """
    return jnp.zeros_like(value)


def mean_ablate(mean: jax.typing.ArrayLike | None = None, *, axis: int = 0) -> Edit:
    """Return an edit that replaces a value by its mean.

    The mean keeps what all inputs share, which zero does not (Wang et al., *Interpretability in the Wild*, 2023).

    Args:
        mean: the mean over a data set, which broadcasts to the value's shape; None for the mean of this run's value
            over `axis`.
        axis: the axis over the batch.

    Example:
        >>> import jax.numpy as jnp, gradfn as gf
        >>> gf.circuits.mean_ablate()(jnp.array([[1.0, 2.0], [3.0, 6.0]]))
        Array([[2., 4.],
               [2., 4.]], dtype=float32)
    """

    def edit(value: jax.Array) -> jax.Array:
        new = jnp.mean(value, axis, keepdims=True) if mean is None else jnp.asarray(mean)
        return jnp.broadcast_to(new, value.shape).astype(value.dtype)

    return edit


def resample(key: jax.Array, *, axis: int = 0) -> Edit:
    """Return an edit that gives each example of a batch the value of another one: resample ablation.

    Every example receives a value that the model does compute for some input (Chan et al., *Causal Scrubbing*, 2022).
    The examples are rotated by one place in a random order, so none keeps its own value. The same key moves them alike
    at every site.

    Args:
        key: a random key.
        axis: the axis over the batch, which has at least 2 examples.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> moved = gf.circuits.resample(jax.random.key(0))(jnp.arange(4))
        >>> sorted(moved.tolist()), bool(jnp.any(moved == jnp.arange(4)))
        ([0, 1, 2, 3], False)
    """

    def edit(value: jax.Array) -> jax.Array:
        if value.ndim <= axis or value.shape[axis] < 2:
            raise ValueError(
                f"resample: axis {axis} must hold a batch of at least 2 examples, got a value of shape "
                f"{list(value.shape)}. Patch a function of a batch."
            )
        order = jax.random.permutation(key, value.shape[axis])
        source = jnp.zeros_like(order).at[order].set(jnp.roll(order, 1))
        return jnp.take(value, source, axis)

    return edit


def steer(vector: Float[Array, " d"], scale: jax.typing.ArrayLike = 1.0) -> Edit:
    """Return an edit that adds a vector to a value: activation addition.

    Turner et al., *Steering Language Models With Activation Engineering*, 2023.

    Args:
        vector: `[d]`, or any shape that broadcasts to the value's.
        scale: a factor of the vector.

    Example:
        >>> import jax.numpy as jnp, gradfn as gf
        >>> gf.circuits.steer(jnp.array([1.0, 0.0]), 3.0)(jnp.ones((2, 2)))
        Array([[4., 1.],
               [4., 1.]], dtype=float32)
    """

    def edit(value: jax.Array) -> jax.Array:
        added = jnp.asarray(scale).astype(value.dtype) * jnp.asarray(vector).astype(value.dtype)
        return value + jnp.broadcast_to(added, value.shape)

    return edit


def project_off(directions: Float[Array, "k d"] | Float[Array, " d"]) -> Edit:
    """Return an edit that removes from a value its component along one or several directions.

    The directions need not be orthogonal, normalized or independent: what they span is removed. The result is linear
    in the value (Arditi et al., *Refusal in Language Models Is Mediated by a Single Direction*, 2024).

    Args:
        directions: `[d]` or `[k, d]`, where `d` is the value's last axis.

    Example:
        >>> import jax.numpy as jnp, gradfn as gf
        >>> gf.circuits.project_off(jnp.array([2.0, 0.0, 0.0]))(jnp.array([5.0, 6.0, 7.0]))
        Array([0., 6., 7.], dtype=float32)
    """
    return lambda value: value - _onto(value, directions, "project_off")


def _onto(value: jax.Array, directions: jax.Array, what: str) -> jax.Array:
    """Return the orthogonal projection of vectors, in the last axis, onto the span of directions `[k, d]`."""
    rows = jnp.atleast_2d(jnp.asarray(directions))
    if rows.ndim != 2 or value.ndim == 0 or rows.shape[1] != value.shape[-1]:
        raise ValueError(
            f"{what}: directions must have shape [k, d] or [d], with d the last axis of the value "
            f"{list(value.shape)}, got {list(jnp.shape(directions))}"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{what}: the value must be real and floating, got {value.dtype}")
    # In at least float32: half precision has no pseudoinverse.
    rows = rows.astype(value.dtype if jnp.finfo(value.dtype).bits >= 32 else jnp.float32)
    # The pseudoinverse has a derivative also where singular values are equal, as those of orthonormal rows are.
    return ((value.astype(rows.dtype) @ jnp.linalg.pinv(rows)) @ rows).astype(value.dtype)


def at(index: Any, edit: Edit | jax.typing.ArrayLike) -> Edit:
    """Return an edit that applies another one to part of a value: one head, or one position.

    Args:
        index: what stands in `value[index]`; of several axes, a tuple: `(slice(None), 3)` is head 3 of a value
            `[T, heads, size]`.
        edit: a function of `value[index]`, or its replacement.

    Example:
        >>> import jax.numpy as jnp, gradfn as gf
        >>> gf.circuits.at((slice(None), 1), gf.circuits.zero)(jnp.ones((2, 3)))
        Array([[1., 0., 1.],
               [1., 0., 1.]], dtype=float32)
    """

    def edited(value: jax.Array) -> jax.Array:
        part = value[index]
        new = edit(part) if callable(edit) else jnp.asarray(edit)
        return value.at[index].set(jnp.broadcast_to(new, part.shape).astype(value.dtype))

    return edited


def swap(function: Callable[[jax.Array], jax.Array], of: str) -> Using:
    """Return an edit that replaces the output of a module by that of another function of the module's input.

    This is how a transcoder replaces a feed-forward layer (Dunefsky et al., *Transcoders Find
    Interpretable LLM Feature Circuits*, 2024). The module that was there is not computed any more once the patched
    function is compiled.

    Args:
        function: of the value at the site `of`; it returns the value at the edited site.
        of: the name of the site that is the module's input. In a scan, both sites must be in its body.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> net = gf.mlp([4, 3, 3, 2])
        >>> params, x = net.init(jax.random.key(0)), jnp.ones(4)
        >>> skipped = gf.patch(net.apply, {"a2": gf.circuits.swap(lambda a1: a1, of="a1")})
        >>> a1 = gf.capture(net.apply, keep="a1")(params, x)["a1"].value
        >>> bool(jnp.allclose(skipped(params, x), params["W3"] @ a1 + params["b3"]))
        True
    """
    return Using(of, lambda _, value: function(value))


def splice(
    encode: Callable[[jax.Array], jax.Array],
    decode: Callable[[jax.Array], jax.Array],
    edit: Edit | None = None,
    *,
    error_term: bool = False,
) -> Edit:
    """Return an edit that replaces a value by its reconstruction from a sparse autoencoder.

    Name the features with `gf.tap` in `encode`, and they are a site of the patched function, with a gradient.

    Args:
        encode: features of the value.
        decode: the value of features.
        edit: an edit of the features; None leaves them as they are.
        error_term: add the reconstruction error of the unedited features, a constant for the gradient. Then the
            model computes what it did before, but for the edit, and gradients flow through the features alone (Marks
            et al., *Sparse Feature Circuits*, 2024, section 2).

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> W = jax.random.normal(jax.random.key(0), (4, 8))
        >>> splice = gf.circuits.splice(lambda x: gf.tap(jax.nn.relu(x @ W), "features"), lambda z: z @ W.T)
        >>> net = gf.mlp([3, 4, 2])
        >>> spliced = gf.patch(net.apply, {"a1": splice})
        >>> gf.capture(spliced, keep="features")(net.init(jax.random.key(0)), jnp.ones(3))["features"].value.shape
        (8,)
    """

    def spliced(value: jax.Array) -> jax.Array:
        features = encode(value)
        new = decode(features if edit is None else edit(features))
        return new + jax.lax.stop_gradient(value - decode(features)) if error_term else new

    return spliced


def interchange(
    f: Callable, sites: Selection, source: tuple[PyTree, ...], *, directions: jax.Array | None = None
) -> Callable:
    """Return a function that computes `f` with the values at some sites taken from its run on another input.

    An interchange intervention (Geiger et al., *Causal Abstractions of Neural Networks*, 2021). The result works in
    `jit`, `vmap` and `grad`, also with respect to the source and the directions.

    Args:
        f: any JAX function; its first argument counts as the parameters.
        sites: whose values to take from the source: names or globs of `gf.sites(f)(*args)`, or a function of a site.
        source: all arguments of the run that the values come from, parameters first, in the shapes of the others.
        directions: `[k, d]`, where `d` is the last axis of each value: only the component in their span is taken from
            the source. Trained by gradient descent, they are distributed alignment search (Geiger et al., *Finding
            Alignments Between Interpretable Causal Variables and Distributed Neural Representations*, 2023).

    Returns:
        A function with the signature of `f`.

    Raises:
        TypeError: the source is not a tuple.
        ValueError: a site that the function does not have, one inside a while loop or a branch of `lax.cond`, or a
            source of other shapes.

    Example:
        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> net = gf.mlp([4, 3, 2])
        >>> params = net.init(jax.random.key(0))
        >>> moved = gf.circuits.interchange(net.apply, "a1", (params, jnp.ones(4)))
        >>> bool(jnp.allclose(moved(params, jnp.zeros(4)), net.apply(params, jnp.ones(4))))
        True
    """
    if not isinstance(source, tuple):
        raise TypeError(
            "interchange: expected source to be a tuple of all arguments, such as (params, tokens), got "
            f"{type(source).__name__}"
        )

    @functools.wraps(f)
    def interchanged(*args: PyTree, **kwargs: PyTree) -> PyTree:
        model = trace_model(functools.partial(f, **kwargs), args, "interchange", sites)
        names = [site.name for site in always_computed(model, sites)]
        _, values = model.run(model.inputs(source, "source"), keep=names)

        def moved(value: jax.Array, other: jax.Array) -> jax.Array:
            return other if directions is None else value + _onto(other - value, directions, "interchange")

        output, _ = model.run(model.program.inputs, dict.fromkeys(names, moved), tokens=values)
        return output

    return interchanged
