"""Products of a curvature matrix and a vector, without forming the matrix: Hessian, Gauss-Newton, empirical Fisher."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Key, PyTree

from gradfn.core.labels import check_range, counting
from gradfn.core.precision import widen
from gradfn.core.signature import keys_for, transform_of
from gradfn.curvature.directional import linear_matrix, linearized, slope, slope_by_gradient
from gradfn.flatten import flat_products, loss_of_example
from gradfn.jaxpr.call import Leaves, floating_leaves, scalar, tangents, with_hint
from gradfn.per_example.traced_loss import REMEDY

CHUNK = 16  # examples whose gradients are computed at a time, if there is no forward mode
Product = Callable[..., PyTree]  # (params, vector, *args) -> matrix times vector, a tree like the parameters


def product(product: Product) -> Product:
    """Declare that a function multiplies a vector by a symmetric matrix that depends on the parameters.

    `gf.curvature.hessian_eigs`, `gf.curvature.hessian_trace`, `gf.curvature.hessian_diagonal`,
    `gf.curvature.hessian_spectrum` and `gf.curvature.sharpness` accept such a function instead of a loss, and then
    describe its matrix. The functions that `gf.curvature.hvp`, `gf.curvature.ggn_vp` and `gf.curvature.fisher_vp`
    return are already declared.

    Args:
        product: `(params, vector, *args) -> tree`, linear in `vector`; vector and result have the structure and
            the shapes of `params`.

    Returns:
        The same function, which checks its vector first.

    Raises:
        ParameterError: at a call, a vector whose structure or shapes are not those of the parameters.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> damped = gf.curvature.product(lambda params, vector: jax.tree.map(lambda v: 3 * v, vector))
    >>> gf.curvature.hessian_eigs(damped, k=2)(jnp.ones(4)).values.round()
    Array([3., 3.], dtype=float32)
    """

    # The arguments of both are the same.
    @functools.wraps(product, updated=())
    def checked(params: PyTree, vector: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        leaves = floating_leaves(params, "product")
        vector = leaves.tree(tangents(leaves, vector, "product"))
        return product(params, vector, *args, **kwargs)

    checked.is_curvature_product = True  # type: ignore[attr-defined]
    return checked


def hvp(loss: Callable) -> Product:
    """Return a function that multiplies a vector by the Hessian of a loss, `H v`, without forming the matrix.

    Forward-mode over reverse-mode differentiation, at about the cost of two gradients. Pearlmutter, *Fast exact
    multiplication by the Hessian*, 1994. If a function inside has only a backward rule (`jax.custom_vjp`,
    `jax.experimental.ode.odeint`), reverse mode three times: the same product at a higher cost.

    Args:
        loss: any JAX function `(params, *args) -> scalar` or `(scalar, aux)`.

    Returns:
        `(params, vector, *args) -> tree`: vector and result have the structure, shapes and dtypes of `params`
        (None for leaves that are not floating arrays). Compile it: `jax.jit(gf.curvature.hvp(loss))`.

    Raises:
        ParameterError: a vector of another structure or shape; complex parameters.
        TypeError: a loss that is not a floating scalar, or no floating parameter; a `jax.custom_vjp` whose backward
            rule cannot be differentiated.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> gf.curvature.hvp(lambda w: w[0] ** 2 * w[1])(jnp.array([3.0, 5.0]), jnp.array([1.0, 0.0]))  # [10, 6; 6, 0] v
    Array([10.,  6.], dtype=float32)
    """
    flat_loss = flat_products(loss)

    @transform_of(loss, "hvp")
    def product(params: PyTree, vector: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Return the Hessian of the loss at `params` times `vector`: a tree like `params`."""
        leaves = floating_leaves(params, "hvp")
        v = tangents(leaves, vector, "hvp")
        call = scalar(flat_loss, (params, *args), kwargs, (0,), "hvp").call

        def value(values: list[jax.Array]) -> jax.Array:
            return call(values)[0]

        return leaves.tree(slope(jax.grad(value), _arrays(leaves.values), v, "hvp", value))

    product.is_curvature_product = True  # type: ignore[attr-defined]
    return product


def ggn_vp(outputs: Callable, loss: str | Callable = "softmax") -> Product:
    """Return a function that multiplies a vector by the generalized Gauss-Newton matrix, `J^T H J v`.

    J is the Jacobian of the outputs of a net with respect to its parameters, H the Hessian of the loss with respect
    to the outputs; the product is averaged over a batch. For a loss that is convex in the outputs the matrix has no
    negative eigenvalue: it is the Hessian without the curvature of the net. For softmax and squared error it is the
    Fisher information. It costs about 1.5 gradients, more for functions without forward mode (`jax.custom_vjp`).
    Schraudolph, *Fast curvature matrix-vector products*, 2002; Martens, *New insights on the natural gradient*,
    2020.

    Args:
        outputs: `(params, x) -> array` for one example, such as `net.apply`.
        loss: of one example, one of
            `"softmax"`, the cross-entropy of logits `[..., classes]` with integer labels `[...]`, averaged over
            the labels (`gf.classification_loss`, `gf.next_token_loss`). Negative labels of a sequence are padding
            and do not count; any other label outside [0, classes) gives NaN. H is used in closed form,
            `p * u - p (p . u)`;
            `"squared"`, the squared error averaged over the outputs (`gf.regression_loss`);
            a function `(outputs, y) -> scalar` that is convex in the outputs.

    Returns:
        `(params, vector, (x, y)) -> tree`; `x` and `y` have a leading batch axis, vector and result have the
        structure, shapes and dtypes of `params`. Compile it: `jax.jit(gf.curvature.ggn_vp(net.apply))`.

    Raises:
        ParameterError: a vector of another structure or shape; complex parameters.
        ValueError: an unknown loss, labels that do not fit the outputs or, outside `jit`, are not classes.
        TypeError: labels that are not integers, no floating parameter, complex outputs; a `jax.custom_vjp` whose
            backward rule cannot be differentiated.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.mlp([2, 3])
    >>> params = {"W1": jnp.zeros([3, 2]), "b1": jnp.zeros(3)}
    >>> vector = {"W1": jnp.zeros([3, 2]), "b1": jnp.array([1.0, 0.0, 0.0])}
    >>> product = gf.curvature.ggn_vp(net.apply)(params, vector, (jnp.ones([5, 2]), jnp.array([0, 1, 2, 0, 1])))
    >>> [round(float(value), 4) for value in product["b1"]]  # with p = 1/3 each: p v - p (p . v)
    [0.2222, -0.1111, -0.1111]
    """
    if isinstance(loss, str) and loss not in _HESSIANS:
        raise ValueError(
            f"ggn_vp: loss must be 'softmax', 'squared' or a function (outputs, y) -> scalar, got {loss!r}"
        )
    of_outputs = _HESSIANS[loss] if isinstance(loss, str) else functools.partial(_hessian_of, loss)

    @transform_of(outputs, "ggn_vp", own=2)
    def product(params: PyTree, vector: PyTree, batch: tuple[PyTree, ArrayLike]) -> PyTree:
        """Return the Gauss-Newton matrix at `params` times `vector`: a tree like `params`. `batch` is `(x, y)`."""
        x, y = batch

        def predictions(params: PyTree, x: PyTree) -> jax.Array:
            return jax.vmap(lambda x: outputs(params, x))(x)  # [batch, ...]

        def times_hessian(z: jax.Array, u: jax.Array) -> jax.Array:
            if loss == "softmax" and z.size > jnp.size(y):
                # z is [batch, classes] for labels, [batch, T, classes] for sequences of them
                check_range(y, z.size // max(jnp.size(y), 1), "ggn_vp", padding=z.ndim > 2 and _padded(z, y))
            return jax.vmap(of_outputs)(z, u, y) / len(z)

        return _gauss_newton(predictions, times_hessian, params, vector, x, "ggn_vp")

    product.is_curvature_product = True  # type: ignore[attr-defined]
    return product


def fisher_vp(loss: Callable) -> Product:
    """Return a function that multiplies a vector by the empirical Fisher matrix, `mean_n g_n (g_n . v)`.

    `g_n` is the gradient of example n: the matrix is the uncentered second moment of the gradients. It approximates
    the Fisher information only if the model fits the data: Kunstner et al., *Limitations of the empirical Fisher
    approximation*, 2019. It costs about 1.5 gradients. Per-example gradients are not formed, except for losses
    without forward mode (those that call a `jax.custom_vjp`).

    Args:
        loss: of ONE example, `(params, example) -> scalar` or `(scalar, aux)`; or its `gf.batch_mean`.

    Returns:
        `(params, vector, batch) -> tree`; arrays in `batch` have a leading batch axis, vector and result have
        the structure, shapes and dtypes of `params`. Compile it: `jax.jit(gf.curvature.fisher_vp(loss))`.

    Raises:
        ParameterError: a vector of another structure or shape; complex parameters.
        TypeError: a loss over a batch, or one that is not a floating scalar; no floating parameter.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> gf.curvature.fisher_vp(lambda w, x: w @ x)(jnp.zeros(2), jnp.ones(2), jnp.array([[1.0, 0.0], [0.0, 3.0]]))
    Array([0.5, 4.5], dtype=float32)
    """
    loss = with_hint(loss_of_example(loss), REMEDY)

    @transform_of(loss, "fisher_vp", own=2)
    def product(params: PyTree, vector: PyTree, batch: PyTree, /, **kwargs: PyTree) -> PyTree:
        """Return the empirical Fisher matrix at `params` times `vector`: a tree like `params`."""

        def one(params: PyTree, example: PyTree) -> jax.Array:
            call = scalar(loss, (params, example), kwargs, (0,), "fisher_vp").call
            return call(floating_leaves(params, "fisher_vp").values)[0]

        def losses(params: PyTree, batch: PyTree) -> jax.Array:
            return jax.vmap(lambda example: one(params, example))(batch)  # [batch]

        def by_gradients(fill: Callable, values: list[PyTree], v: list[PyTree]) -> jax.Array:
            def slope_of(example: PyTree) -> jax.Array:
                return slope_by_gradient(lambda values: one(fill(values), example), values, v)

            return jax.lax.map(slope_of, batch, batch_size=CHUNK)  # [batch]

        return _gauss_newton(
            losses, lambda z, u: u / len(z), params, vector, batch, "fisher_vp", by_gradients
        )

    product.is_curvature_product = True  # type: ignore[attr-defined]
    return product


def as_product(loss: Callable) -> Product:
    """Return a curvature product as it is, and the Hessian product of a loss."""
    return loss if _is_product(loss) else hvp(loss)


def keys_of(
    loss: Callable,
    params: PyTree,
    args: Sequence[PyTree],
    key: Key[Array, ""] | None,
    kwargs: Mapping[str, PyTree],
) -> tuple[Key[Array, ""], dict[str, PyTree]]:
    """Return a random key for a method, and the keywords for the loss or product that it is applied to."""
    first = (params, params) if _is_product(loss) else (params,)
    return keys_for(loss, (*first, *args), key, kwargs)


def _is_product(loss: Callable) -> bool:
    return getattr(loss, "is_curvature_product", False)


def flat_matrix(
    product: Callable, leaves: Leaves, args: Sequence[PyTree], kwargs: Mapping[str, PyTree]
) -> Callable[[jax.Array], jax.Array]:
    """Return a product at fixed parameters as a function of flat vectors `[P]`.

    Everything that does not depend on the vector (forward and backward pass of the loss) is computed once, here.
    """
    params = leaves.fill([jnp.asarray(value) for value in leaves.values])

    def times(vector: jax.Array) -> jax.Array:
        out = product(params, leaves.tree(leaves.split(vector)), *args, **kwargs)
        return leaves.flat(leaves.match(out))

    return linear_matrix(times, jnp.zeros([leaves.size], leaves.dtype))


def _gauss_newton(
    f: Callable,
    times_hessian: Callable,
    params: PyTree,
    vector: PyTree,
    x: PyTree,
    what: str,
    push: Callable | None = None,
) -> PyTree:
    """Return `J^T H J v` for the Jacobian J of `f(params, x)` by params.

    `times_hessian` computes `H J v` from the value of f and `J v`. `push`, `(fill, values, v) -> J v`, is used for
    functions without forward mode.
    """
    leaves = floating_leaves(params, what)
    v, values = tangents(leaves, vector, what), _arrays(leaves.values)
    flat = flat_products(f)
    without = None if push is None else functools.partial(push, leaves.fill, values)
    # One linearization serves both directions, so the forward pass runs once.
    at = linearized(lambda values: flat(leaves.fill(values), x), values, what, without)
    if jnp.iscomplexobj(at.value):
        raise TypeError(
            f"{what}: expected real outputs, got {at.value.dtype}; stack the real and imaginary parts"
        )
    u = times_hessian(at.value, at.push(v))
    return leaves.tree(at.pull(u.astype(at.value.dtype)))


def _softmax_hessian(z: jax.Array, u: jax.Array, labels: ArrayLike) -> jax.Array:
    """Return the Hessian of the cross-entropy by the logits of one example, times u."""
    p, weights = softmax_of(z, labels, "ggn_vp")
    along = widen(u).reshape(p.shape)
    hu = p * (along - (p * along).sum(-1, keepdims=True))
    return (weights * hu).reshape(z.shape)


def softmax_of(z: jax.Array, labels: ArrayLike, what: str) -> tuple[jax.Array, jax.Array]:
    """Return the probabilities `[..., classes]` of one example, and the weights `[..., 1]` of its labels.

    The weights sum to 1: they are 0 for padding, and NaN for unknown labels, as in the losses.
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"{what}: softmax needs integer labels, got {labels.dtype}; for others pass a function (logits, y)"
        )
    if not labels.size or z.size % labels.size:
        raise ValueError(
            f"{what}: softmax needs logits [..., classes] and labels [...], got {list(z.shape)} and "
            f"{list(labels.shape)} for one example"
        )
    p = jax.nn.softmax(widen(z).reshape(*labels.shape, -1))  # [..., classes]
    if p.shape[-1] < 2:
        raise ValueError(f"{what}: softmax needs >= 2 classes, got logits {list(z.shape)} for one example")
    labels = counting(labels)
    negative = (labels < 0)[..., None]
    padding = negative & _padded(z, labels)
    unknown = (labels >= p.shape[-1])[..., None] | (negative & ~padding)
    weights = jnp.where(unknown, jnp.nan, jnp.where(padding, 0, jnp.ones_like(p[..., :1])))
    return p, weights / jnp.maximum((~padding).sum(dtype=p.dtype), 1)


def _padded(z: jax.Array, labels: ArrayLike) -> bool:
    """Return whether labels are those of sequences, where negative ones are padding, not one per example."""
    return jnp.ndim(labels) > 0 and jnp.ndim(z) > 1 and z.shape[:-1] == jnp.shape(labels)


def _squared_hessian(z: jax.Array, u: jax.Array, y: ArrayLike) -> jax.Array:
    return 2 * u / z.size


def _hessian_of(loss: Callable, z: jax.Array, u: jax.Array, y: PyTree) -> jax.Array:
    return slope(lambda z: jax.grad(loss)(z, y), z, u, "ggn_vp", lambda z: loss(z, y))


_HESSIANS = {"softmax": _softmax_hessian, "squared": _squared_hessian}


def _arrays(values: list[ArrayLike]) -> list[jax.Array]:
    return [jnp.asarray(value) for value in values]
