"""LoRA: a matrix stays as it is, and the product of two thin ones that is added to it is trained.

Of a matrix W `[out, in]`, the model computes with `W + scale B A`, where A is `[rank, in]` and B `[out, rank]`. With G
the gradient of the sum, those of the adapters are `scale G A^T` for B and `scale B^T G` for A: what `jax.grad` computes
of the merged parameters, so that any function of a tree can be adapted, whatever it does with its matrices.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradfn.core.params import Param, Params, Spec, check, describe, init
from gradfn.core.precision import wide
from gradfn.display import ROWS, ShowsTable, TextTable, reading_order
from gradfn.flatten import BatchMean, Loss
from gradfn.jaxpr.call import value_and_aux
from gradfn.train.decay import stacked_axes
from gradfn.train.model import Graph, Rest, take_apart
from gradfn.train.paths import Where, matching, names_of
from gradfn.train.placing import mesh_of, place

Layout = Literal["out_in", "in_out"]

# Names of matrices [in, out]: Flax's and Haiku's. Those of gradfn, Equinox and PyTorch are [out, in].
_IN_OUT = re.compile(r"kernel|w")
# A merged matrix whose change is not of this rank, to this fraction of its norm, is not split.
SPLIT = 1e-3


@dataclass(frozen=True)
class Matrix:
    """How an array is a matrix: after its axes of layers, axes of inputs and axes of outputs.

    Attributes:
        stacked: its leading axes that are axes of layers.
        layout: whether the axes of outputs come first or last.
        n_out: how many axes of outputs there are.
    """

    stacked: int
    layout: Layout
    n_out: int

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the numbers of outputs and of inputs of an array of this shape."""
        axes = shape[self.stacked :]
        first = self.n_out if self.layout == "out_in" else len(axes) - self.n_out
        sizes = math.prod(axes[:first]), math.prod(axes[first:])
        return sizes if self.layout == "out_in" else sizes[::-1]

    def change(self, adapter: Mapping[str, jax.Array], shape: tuple[int, ...]) -> jax.Array:
        """Return B A in the shape of the array."""
        A, B = adapter["lora_A"], adapter["lora_B"]  # [..., rank, in], [..., out, rank]
        if self.layout == "out_in":
            return (B @ A).reshape(shape)  # [..., out, in]
        return (A.mT @ B.mT).reshape(shape)  # [..., in, out]

    def factors(self, change: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Return A and B whose product is the change, and how much of the change's norm is missing in it."""
        n_out, n_in = self.sizes(change.shape)
        front = change.shape[: self.stacked]
        matrix = (
            change.reshape(*front, n_out, n_in)
            if self.layout == "out_in"
            else change.reshape(*front, n_in, n_out).mT
        )
        U, s, Vt = np.linalg.svd(matrix, full_matrices=False)
        root = np.sqrt(s[..., :rank])
        norm = np.sqrt(np.square(s).sum())
        missing = float(np.sqrt(np.square(s[..., rank:]).sum()) / norm) if norm else 0.0
        return root[..., None] * Vt[..., :rank, :], U[..., :rank] * root[..., None, :], missing


@dataclass(frozen=True, repr=False, eq=False)
class Lora(ShowsTable):
    """Parameters that are kept, and the adapters of their matrices, which are trained. `print` shows a table.

    Attributes:
        params: the parameters that the adapters were made for, with the type that was given.
        adapters: nested dicts with `lora_A` `[rank, in]` and `lora_B` `[out, rank]` for each adapted matrix, under
            its path; with the leading axes of stacked layers. In float32 at least.
        rank: of each change, at most.
        scale: the factor of the change, alpha / rank.
        state: of a Flax NNX module its variables that are not `nnx.Param`s, for `gf.fit(..., state=lora.state)`;
            None if there are none.
    """

    params: PyTree
    adapters: PyTree
    rank: int
    scale: float
    state: PyTree
    _spec: Spec
    _matrices: Mapping[str, Matrix]

    def merge(self, adapters: PyTree = None, state: PyTree = None) -> PyTree:
        """Return parameters with the changes added to their matrices.

        A sum is computed in the dtype of the adapters and rounded to that of the matrix. The loss computes with the
        same rounded sum, so merged parameters give its value.

        Args:
            adapters: trained ones, `fitted.params`; by default those of this object, which change nothing.
            state: of an NNX module: the other variables, by default the initial ones.

        Returns:
            Parameters of the type of `params`. Arrays that are not adapted are shared with them.

        Raises:
            ParameterError: adapters of other parameters, or of another rank; it names the path.

        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> lora = gf.train.lora({"W": jnp.zeros([2, 3])}, 1, where="W")
        >>> lora.merge({"W": {"lora_A": jnp.ones([1, 3]), "lora_B": jnp.array([[1.0], [2.0]])}})["W"].tolist()
        [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]
        """
        adapters = self.adapters if adapters is None else adapters
        check(self._spec, adapters)
        frozen, rest, carried = take_apart(self.params)
        merged = self._merged(frozen, adapters)
        return merged if rest is None else rest.model(merged, carried if state is None else state)

    def split(self, params: PyTree) -> PyTree:
        """Return the adapters that make `params` of the parameters of this object: the inverse of `merge`.

        Factors are not unique. Those that are returned have equal norms, by the singular value decomposition of the
        change (Eckart and Young, *The Approximation of One Matrix by Another of Lower Rank*, 1936).

        Args:
            params: merged parameters, or parameters trained otherwise.

        Raises:
            ValueError: a change of a higher rank, or of an array that is not adapted; it names the path.

        >>> import jax, jax.numpy as jnp, gradfn as gf
        >>> lora = gf.train.lora({"W": jnp.zeros([2, 3])}, 1, where="W")
        >>> params = {"W": jnp.outer(jnp.array([1.0, 2.0]), jnp.ones(3))}
        >>> print(abs(lora.merge(lora.split(params))["W"] - params["W"]).max() < 1e-5)
        True
        """
        before, after = take_apart(self.params)[0], take_apart(params)[0]
        expected: PyTree = jax.tree.structure(before)
        if expected != jax.tree.structure(after):
            raise ValueError("split: expected parameters in the structure of those that lora(...) was given")
        adapters: dict[str, Any] = {}
        for name, old, new in zip(
            names_of(before), jax.tree.leaves(before), jax.tree.leaves(after), strict=True
        ):
            if old.shape != new.shape:
                raise ValueError(f"split: {name}: expected shape {list(old.shape)}, got {list(new.shape)}")
            if name not in self._matrices:
                if not np.array_equal(old, new, equal_nan=True):
                    raise ValueError(f"split: {name} has changed, but has no adapter. Add it to where=")
                continue
            change = np.asarray(new, np.float64) - np.asarray(old, np.float64)
            A, B, missing = self._matrices[name].factors(change / self.scale, self.rank)
            if missing > SPLIT:
                raise ValueError(
                    f"split: {name}: rank {self.rank} leaves out {missing:.2g} of the norm of its change. Raise rank, "
                    "or merge into parameters of a wider dtype"
                )
            dtype = wide(old.dtype)
            _put(adapters, name, {"lora_A": jnp.asarray(A, dtype), "lora_B": jnp.asarray(B, dtype)})
        return adapters

    def loss(self, loss: Loss) -> Loss:
        """Return a loss as a function of the adapters: `gf.fit(lora.loss(loss), lora.adapters, ...)`.

        Args:
            loss: a function of parameters, of one example or of a batch; of a `gf.batch_mean` the result is one, too.

        Returns:
            `(adapters, ...) -> ...`. It is a `jax.tree_util.Partial` that holds the frozen parameters, so that
            `gf.fit` and `gf.train_step` pass them to their programs as arguments, and `jax.jit` does if it is an
            argument of the function that is compiled. With a `state`, the loss takes `state=` as well.
        """
        frozen, rest, carried = take_apart(self.params)
        if isinstance(loss, BatchMean) and not isinstance(rest, Graph):
            return BatchMean(self.loss(loss.example))

        def of_adapters(
            frozen: PyTree, rest: Rest | Graph | None, adapters: PyTree, *args: PyTree, **keywords: PyTree
        ) -> PyTree:
            check(self._spec, adapters)
            params = self._merged(frozen, adapters)
            if rest is None:
                return loss(params, *args, **keywords)
            if isinstance(rest, Rest) or self.state is not None:
                return rest.loss(loss)(params, *args, **keywords)
            value, aux = value_and_aux(rest.loss(loss)(params, *args, state=carried, **keywords))
            aux = {name: each for name, each in aux.items() if name != "state"}
            return (value, aux) if aux else value

        functools.update_wrapper(of_adapters, loss, updated=())
        vars(of_adapters)["__signature__"] = _signature(loss, takes_state=self.state is not None)
        return jax.tree_util.Partial(of_adapters, frozen, rest)

    def table(self, rows: int | None = ROWS) -> TextTable:
        """Return a table with one row per adapted matrix, at most that many; None for all."""
        total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(take_apart(self.params)[0]))
        trained = sum(leaf.size for leaf in jax.tree.leaves(self.adapters))
        title = f"Lora: rank {self.rank}, scale {self.scale:g}"
        out = TextTable(title, f"{trained:,} of {total + trained:,} parameters are trained")
        for header, drop in (("matrix", 0), ("shape", 0), ("lora_A", 1), ("lora_B", 1), ("trained", 0)):
            out.add_column(header, drop=drop, shorten=header == "matrix")
        shapes = dict(_leaves(take_apart(self.params)[0]))
        for name in sorted(self._matrices, key=reading_order):
            adapter = _get(self.adapters, name)
            A, B = adapter["lora_A"], adapter["lora_B"]
            out.add_row(
                name, list(shapes[name].shape), list(A.shape), list(B.shape), A.size + B.size, weight=A.size
            )
        return out.folded(rows, "lora.table(rows=None)")

    def _merged(self, frozen: PyTree, adapters: PyTree) -> PyTree:
        """Return the trained part of a model with the changes added."""

        def add(name: str, leaf: jax.Array) -> jax.Array:
            if name not in self._matrices:
                return leaf
            change = self.scale * self._matrices[name].change(_get(adapters, name), leaf.shape)
            return (leaf.astype(change.dtype) + change).astype(leaf.dtype)

        return jax.tree.unflatten(jax.tree.structure(frozen), [add(*each) for each in _leaves(frozen)])


def lora(
    params: Params,
    rank: int,
    *,
    where: Where,
    alpha: float | None = None,
    layout: Layout | None = None,
    key: jax.Array | None = None,
) -> Lora:
    """Make low-rank adapters for the matrices of a model, which stay as they are.

    Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021. The model computes with `W + alpha / rank
    B A`. B starts at zero, so that training starts from the model; A is drawn as in the authors' code, uniform in
    +-1/sqrt(in).

    Args:
        params: any tree with floating arrays, an Equinox model or a Flax NNX module.
        rank: of the changes; less than the smaller side of each matrix.
        where: paths, as `gf.table` shows them: a path (`blocks/0/attention/query/W`), a glob (`*attention*`), several
            of them, or a predicate of the path. Biases, gains and other vectors among them are left out.
        alpha: the factor of the change times the rank; by default the rank, so that the factor is 1.
        layout: of the matrices: `"out_in"` as in gradfn, Equinox and PyTorch, `"in_out"` as in Flax and Haiku. By
            default `"in_out"` for arrays called `kernel` or `w`. It decides which side A is on.
        key: from `jax.random.key`, for A; that of each matrix also depends on its path. By default the key of seed 0.

    Stacked layers (`gf.repeat`, `GPTConfig(scan=True)`) get adapters with the same leading axes. An array with more
    axes than a matrix, such as a convolution's kernel or Flax's attention, is adapted as a matrix where its layer's
    bias tells the axes of outputs.

    Returns:
        A `Lora`: `gf.fit(lora.loss(loss), lora.adapters, ...)` trains and saves the adapters alone, `lora.merge(
        fitted.params)` returns the parameters of the new model.

    Raises:
        ValueError: paths that match nothing, or no matrix; a rank that is too large; an array with more axes whose
            sides are not known. It names the path.
        TypeError: a complex matrix.

    >>> import jax, gradfn as gf
    >>> params = gf.mlp([784, 16, 10]).init(jax.random.key(0))
    >>> print(gf.train.lora(params, 2, where="*"))
    Lora: rank 2, scale 1
      matrix   shape       lora_A     lora_B    trained
     ───────────────────────────────────────────────────
      W1       [16, 784]   [2, 784]   [16, 2]     1,600
      W2       [10, 16]    [2, 16]    [10, 2]        52
    1,652 of 14,382 parameters are trained
    """
    if layout not in (None, "out_in", "in_out"):
        raise ValueError(f"lora: layout must be 'out_in', 'in_out' or None, got {layout!r}")
    frozen, _, carried = take_apart(params)
    named = _leaves(frozen)
    chosen = matching([name for name, _ in named], where, "lora")
    found = _matrices(frozen, chosen, layout)
    if not found:
        raise ValueError(
            f"lora: where={where!r:.100} chooses no matrix, only {', '.join(sorted(chosen)):.200}"
        )
    shapes = dict(named)
    spec: Spec = {}
    for name, matrix in found.items():
        _put(spec, name, _adapter(name, shapes[name], matrix, rank))
    adapters = init(spec, jax.random.key(0) if key is None else key)
    mesh = mesh_of(frozen)
    adapters = adapters if mesh is None else place(adapters, mesh)
    state = carried if jax.tree.leaves(carried) else None
    return Lora(params, adapters, rank, (rank if alpha is None else alpha) / rank, state, spec, found)


def _adapter(name: str, leaf: PyTree, matrix: Matrix, rank: int) -> Spec:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f"lora: {name} is {leaf.dtype}, expected a floating matrix. Leave it out of where=")
    n_out, n_in = matrix.sizes(leaf.shape)
    if not 1 <= rank < min(n_out, n_in):
        raise ValueError(
            f"lora: {name}: rank must be in [1, {min(n_out, n_in)}), less than both sides of {n_out} x {n_in}, got "
            f"{rank}. Leave it out of where= or lower rank"
        )
    front, dtype = leaf.shape[: matrix.stacked], wide(leaf.dtype)

    def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1, 1) / math.sqrt(n_in)

    return {
        "lora_A": Param((*front, rank, n_in), uniform, dtype),
        "lora_B": Param((*front, n_out, rank), jax.nn.initializers.zeros, dtype),
    }


def _matrices(frozen: PyTree, chosen: set[str], layout: Layout | None) -> dict[str, Matrix]:
    """Return how each chosen array is a matrix, without those that are vectors.

    Raises:
        ValueError: that is not known of an array.
    """
    named = dict(_leaves(frozen))
    found = {}
    for (name, leaf), (stacked, vector) in zip(named.items(), stacked_axes(frozen), strict=True):
        if name not in chosen or vector or leaf.ndim - stacked < 2:
            continue
        of = layout or ("in_out" if _IN_OUT.fullmatch(name.rpartition("/")[2]) else "out_in")
        axes = leaf.shape[stacked:]
        n_out = 1
        if len(axes) > 2:
            bias = _bias(named, name)
            n_out = 0 if bias is None else _outputs(axes, bias.shape[stacked:], of)
            if not n_out:
                raise ValueError(
                    f"lora: {name} {describe(leaf)} is not a matrix, and no bias beside it tells its axes of outputs. "
                    "Leave it out of where="
                )
        found[name] = Matrix(stacked, of, n_out)
    return found


def _bias(named: Mapping[str, PyTree], name: str) -> PyTree:
    """Return the bias in the layer of a parameter; None if there is none."""
    layer = name.rpartition("/")[0]
    names = (f"{layer}/{each}" if layer else each for each in ("b", "bias"))
    return next((named[each] for each in names if each in named), None)


def _outputs(axes: tuple[int, ...], bias: tuple[int, ...], layout: Layout) -> int:
    """Return how many axes of an array are those of its bias; 0 if they do not fit."""
    own = tuple(size for size in bias if size != 1) if layout == "out_in" else bias  # Equinox: [out, 1, 1]
    n = len(own)
    fits = axes[:n] == own if layout == "out_in" else axes[-n:] == own
    return n if 0 < n < len(axes) and fits else 0


def _signature(loss: Loss, takes_state: bool) -> inspect.Signature:
    """Return the signature of a loss of adapters, whose first two arguments are bound."""
    signature = inspect.signature(loss)
    kinds = inspect.Parameter
    bound = [kinds(name, kinds.POSITIONAL_ONLY) for name in ("frozen", "rest")]
    own = list(signature.parameters.values())
    rest = [own.pop()] if own and own[-1].kind is kinds.VAR_KEYWORD else []
    state = (
        [kinds("state", kinds.KEYWORD_ONLY)] if takes_state and "state" not in signature.parameters else []
    )
    return signature.replace(parameters=[*bound, *own, *state, *rest])


def _leaves(tree: PyTree) -> list[tuple[str, PyTree]]:
    return list(zip(names_of(tree), jax.tree.leaves(tree), strict=True))


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree.setdefault(last, {}).update(value)


def _get(tree: PyTree, name: str) -> PyTree:
    return functools.reduce(lambda node, part: node[part], name.split("/"), tree)
