"""Losses that compare the output of a net with a target: `loss(params, (x, y)) -> scalar`, of one example."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from gradfn.core.labels import check_range, counting, label_of, labels_of
from gradfn.core.net import Net, takes_key
from gradfn.core.params import Params
from gradfn.core.params import check as check_params
from gradfn.core.precision import wide, widen
from gradfn.data._arrays import as_arrays
from gradfn.flatten import ExampleLoss, Loss, loss_of_example


@dataclass(frozen=True, eq=False)
class NetLoss:
    """The loss of a net's output against a target, for one example.

    Attributes:
        name: of the function in gradfn that made it.
        function: `(params, (x, y)) -> scalar`, with `key=` where the net has noise in it.
        check: of a batch `(x, y)` whose targets are known; raises an error for targets that the loss is not made for.
        description: the net's, see `gf.Net`, with the `name` as `"loss"`; None for a net without one.
    """

    name: str
    function: ExampleLoss = field(repr=False)
    check: Callable[[PyTree], None] = field(repr=False)
    description: Mapping[str, Any] | None = field(repr=False)

    def __call__(self, *args: PyTree, **keywords: PyTree) -> jax.Array:
        """Return the loss of one example."""
        return self.function(*args, **keywords)

    @property
    def __wrapped__(self) -> ExampleLoss:
        """What `inspect.signature` looks up: whether there is a parameter `key` depends on the net."""
        return self.function


def classification_loss(net: Net) -> ExampleLoss:
    """Return the cross-entropy between a net's logits and an integer label, the loss of one example.

    Args:
        net: returns one logit per class, `[classes]` or `[classes, 1]`.

    Returns:
        `loss(params, (x, label)) -> scalar`, in nats; `label` is an integer scalar in [0, classes), or `[1]`. In
        compiled code, which cannot raise an error, a label outside this range gives NaN; `gf.fit` refuses it.

    Raises:
        ValueError: several labels for one example (a one-hot vector), or a net with one output.
        TypeError: a label that is not an integer.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.mlp([784, 16, 10])
    >>> zeros = jax.tree.map(jnp.zeros_like, net.init(jax.random.key(0)))
    >>> gf.classification_loss(net)(zeros, (jnp.zeros(784), 3))  # the logarithm of 10
    Array(2.3025851, dtype=float32)
    """
    name = "classification_loss"

    def compare(logits: jax.Array, y: PyTree) -> jax.Array:
        logits = widen(_vector(logits, name))
        label, zero = label_of(y, logits.size, name)
        return optax.softmax_cross_entropy_with_integer_labels(logits + zero.astype(logits.dtype), label)

    return _on_net(name, net, compare, functools.partial(_check_labels, name=name))


def regression_loss(net: Net) -> ExampleLoss:
    """Return the mean squared error over the outputs of a net, the loss of one example.

    Args:
        net: returns `[n]`, one value per target.

    Returns:
        `loss(params, (x, y)) -> scalar`, in squared units of `y`; `y` is `[n]`, or a scalar where `n` is 1.

    Raises:
        ValueError: `y` and the output have different shapes. Axes of size 1 do not count, and either may be flat.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> net = gf.mlp([2, 1])
    >>> gf.regression_loss(net)({"W1": jnp.ones([1, 2]), "b1": jnp.zeros(1)}, (jnp.ones(2), jnp.array(5.0)))
    Array(9., dtype=float32)
    """

    name = "regression_loss"

    def compare(output: jax.Array, y: PyTree) -> jax.Array:
        return optax.squared_error(*_alike(output, y, name)).mean()

    return _on_net(name, net, compare, functools.partial(_check_values, name=name))


def quadratic_loss(net: Net) -> ExampleLoss:
    """Return the quadratic cost, half the squared distance between output and target, the loss of one example.

    Nielsen, *Neural Networks and Deep Learning*, 2015, equation (6): the usual cost for sigmoid networks.

    Args:
        net: returns one activation per class: `gf.mlp(sizes, output="sigmoid")`.

    Returns:
        `loss(params, (x, y)) -> scalar`; `y` is an integer label as in `gf.classification_loss`, which stands for
        its one-hot vector, or a vector of floats.

    Raises:
        ValueError: `y` and the output have different sizes, or an integer label for a net with one output.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> net = gf.mlp([2, 3])
    >>> params = {"W1": jnp.zeros([3, 2]), "b1": jnp.array([0.0, 1.0, 2.0])}
    >>> gf.quadratic_loss(net)(params, (jnp.ones(2), 1))
    Array(2., dtype=float32)
    """
    name = "quadratic_loss"

    def compare(output: jax.Array, y: PyTree) -> jax.Array:
        y = jnp.asarray(y)
        if not jnp.issubdtype(y.dtype, jnp.floating):
            output = _vector(output, name)
            label, zero = label_of(y, output.size, name)
            y = jax.nn.one_hot(label, output.size, dtype=output.dtype)
            output = output + zero.astype(output.dtype)
        return optax.l2_loss(*_alike(output, y, name)).sum()

    def check(output: jax.ShapeDtypeStruct, y: PyTree) -> None:
        floats = jnp.issubdtype(y.dtype, jnp.floating)
        (_check_values if floats else _check_labels)(output, y, name=name)

    return _on_net(name, net, compare, check)


def next_token_loss(net: Net, chunks: int = 1) -> ExampleLoss:
    """Return the cross-entropy of the next token, averaged over a sequence, the loss of one sequence.

    Args:
        net: from tokens `[T]` to logits `[T, vocab]`: `gf.gpt`, `gf.rnn`.
        chunks: the number of parts of the sequence whose logits are computed one after the other, and again in the
            backward pass: memory for logits falls to `[T / chunks, vocab]`, and a step takes somewhat longer. The
            loss and its gradients are the same up to rounding. Where `logits` are inspected, captured or patched,
            they are `[chunks, T / chunks, vocab]`.

    Returns:
        `loss(params, (tokens, targets)) -> scalar`, in nats per token; both are integers `[T]`, and `targets[t]`
        follows `tokens[t]`. Negative targets are padding and do not count. In compiled code, which cannot raise an
        error, targets of `vocab` or more give NaN; `gf.fit` refuses them.

    Raises:
        ValueError: the shape of the targets is not the `[T]` of the logits; `chunks` below 1, or that does not
            divide `T`, or more than 1 for a net that is not from `gf.gpt` or `gf.rnn`.
        TypeError: targets that are not integers.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.gpt(gf.GPTConfig(vocab=65, context=8, n_layers=1, n_heads=2, width=4))
    >>> zeros = jax.tree.map(jnp.zeros_like, net.init(jax.random.key(0)))
    >>> gf.next_token_loss(net)(zeros, (jnp.array([1, 2]), jnp.array([2, 3])))  # the logarithm of 65
    Array(4.1743875, dtype=float32)
    """
    name = "next_token_loss"
    model: Any = net  # perhaps a `gf.LanguageModel`

    def check_form(logits: PyTree, targets: PyTree) -> None:
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            raise TypeError(f"{name}: targets must be integers, got {targets.dtype}")
        if targets.shape != logits.shape[:-1]:
            raise ValueError(
                f"{name}: expected targets {list(logits.shape[:-1])} for logits {list(logits.shape)}, got "
                f"{list(targets.shape)}"
            )

    def compare(logits: jax.Array, targets: PyTree) -> jax.Array:
        targets = jnp.asarray(targets)
        check_form(logits, targets)
        total = _nats(logits, counting(targets))
        return total / jnp.maximum((targets >= 0).sum(dtype=total.dtype), 1)

    def compare_chunks(read: tuple[Params, jax.Array], targets: PyTree) -> jax.Array:
        params, hidden = read  # hidden [T, width]
        targets = jnp.asarray(targets)
        check_form(jax.eval_shape(model.head, params, hidden), targets)
        if len(targets) % chunks:
            raise ValueError(f"{name}: chunks must divide the {len(targets)} positions, got {chunks}")

        # The logits of a chunk are not stored for the backward pass, but computed again.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def of_chunk(hidden: jax.Array, targets: jax.Array) -> jax.Array:
            return _nats(model.head(params, hidden), targets)

        # [T, ...] -> [chunks, T / chunks, ...]
        parts = [x.reshape(chunks, -1, *x.shape[1:]) for x in (hidden, counting(targets))]
        total = jax.lax.map(lambda part: of_chunk(*part), parts).sum()
        return total / jnp.maximum((targets >= 0).sum(dtype=total.dtype), 1)

    def check(logits: jax.ShapeDtypeStruct, targets: PyTree) -> None:
        check_form(logits, jax.ShapeDtypeStruct(targets.shape[1:], targets.dtype))
        check_range(targets, logits.shape[-1], name, padding=True)

    if chunks < 1:
        raise ValueError(f"{name}: chunks must be an integer >= 1, got {chunks}")
    if chunks == 1:
        return _on_net(name, net, compare, check)
    if getattr(model, "head", None) is None:
        raise ValueError(
            f"{name}: chunks={chunks} needs a net with a head, from gf.gpt or gf.rnn; use chunks=1"
        )

    def read(params: Params, tokens: jax.Array, **key: PyTree) -> tuple[Params, jax.Array]:
        check_params(net.spec, params)
        return params, model.hidden(params, tokens, **key)

    return _on_net(name, net, compare_chunks, check, read)


def _nats(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the sum of the cross-entropies of logits `[T, vocab]`; negative targets `[T]` do not count."""
    counted = targets >= 0
    labels = jnp.where(counted, targets, 0)
    nats = optax.softmax_cross_entropy_with_integer_labels(widen(logits), labels)  # [T]
    known = jnp.where(labels < logits.shape[-1], jnp.float32(1), jnp.float32(jnp.nan)).astype(nats.dtype)
    return jnp.where(counted, nats * known, 0).sum()


def accuracy(net: Net) -> Callable[[PyTree, PyTree], jax.Array]:
    """Return a function that computes the accuracy: the share of examples whose largest output is the label's.

    Args:
        net: returns one value per class.

    Returns:
        `(params, (x, labels)) -> scalar` in [0, 1]; `x` is `[batch, ...]`, `labels` `[batch]` (or `[batch, 1]`)
        integers in [0, classes). In compiled code, which cannot raise an error, a label outside this range gives
        NaN. So does an output that is NaN.

    Raises:
        ValueError: labels outside this range, one-hot, or not one per example; a net with one output.
        TypeError: labels that are not integers.

    >>> import jax.numpy as jnp, gradfn as gf
    >>> params = {"W1": jnp.eye(2), "b1": jnp.zeros(2)}
    >>> gf.accuracy(gf.mlp([2, 2]))(params, (jnp.eye(2), jnp.array([0, 0])))
    Array(0.5, dtype=float32)
    """

    def share(params: PyTree, batch: PyTree) -> jax.Array:
        x, labels = _pair(as_arrays(batch, "batch"), "accuracy")
        outputs = jax.vmap(lambda x: _vector(net.apply(params, x), "accuracy"))(x)
        # vmap returns numpy arrays that the net passes through as they are, and numpy counts in int64.
        outputs = jnp.asarray(outputs)  # [batch, classes]
        n, classes = outputs.shape
        labels = labels_of(labels, n, classes, "accuracy")
        known = (labels >= 0) & (labels < classes) & ~jnp.isnan(outputs).any(-1)
        largest = outputs.argmax(-1)
        hits = largest == labels.astype(largest.dtype)
        return jnp.where(known, hits.astype(jnp.float32), jnp.nan).mean()

    return share


def check_targets(loss: Loss, batch: PyTree) -> None:
    """Check the targets of a batch of concrete arrays, where the loss is the mean of one of gradfn's own.

    Args:
        loss: any; only the targets of gradfn's own losses are known.
        batch: the argument of the loss, with a leading axis of examples.

    Raises:
        ValueError: targets that do not fit the loss; it names their range and shape.
        TypeError: labels that are not integers.
    """
    one = of_net(loss_of_example(loss))
    if one is not None:
        one.check(batch)


def of_net(loss: Loss) -> NetLoss | None:
    """Return the loss of a net that a loss of one example is, or was made from; None for any other."""
    if isinstance(loss, jax.tree_util.Partial):  # such as that of `gf.train.lora`
        loss = getattr(loss.func, "__wrapped__", loss)
    return loss if isinstance(loss, NetLoss) else None


def description_of(loss: Loss) -> Mapping[str, Any] | None:
    """Return what the net of a loss, or of its mean, was made with, see `NetLoss`; None where it is not known."""
    one = loss_of_example(loss)
    return one.description if isinstance(one, NetLoss) else None


def _on_net(
    name: str,
    net: Net,
    compare: Callable[[PyTree, PyTree], jax.Array],
    check: Callable[[jax.ShapeDtypeStruct, PyTree], None],
    read: Callable | None = None,
) -> NetLoss:
    """Return a loss that compares a net's output with a target; `check` is for concrete targets `[examples, ...]`.

    With `read`, which is called like `net.apply`, `compare` gets its result instead.
    """
    output_of = read or net.apply

    def loss(params: PyTree, example: PyTree) -> jax.Array:
        x, y = example
        return compare(output_of(params, x), y)

    def noisy_loss(params: PyTree, example: PyTree, key: jax.Array | None = None) -> jax.Array:
        x, y = example
        return compare(output_of(params, x, key=key), y)

    def check_batch(batch: PyTree) -> None:
        x, y = _pair(batch, "fit")
        if not hasattr(y, "shape"):
            raise ValueError(f"fit: expected one array of targets, got {type(y).__name__}")
        one = jax.tree.map(lambda leaf: jax.eval_shape(lambda a: a[0], leaf), x)
        check(jax.eval_shape(net.apply, net.spec, one), y)

    description = getattr(net, "description", None)
    described = None if description is None else {**description, "loss": name}
    return NetLoss(name, noisy_loss if takes_key(net.apply) else loss, check_batch, described)


def _pair(batch: PyTree, what: str) -> tuple[PyTree, PyTree]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        found = f"{len(batch):,} parts" if isinstance(batch, (tuple, list, dict)) else type(batch).__name__
        raise ValueError(f"{what}: expected a pair (inputs, targets), got {found}")
    return batch[0], batch[1]


def _vector(output: PyTree, name: str) -> jax.Array:
    """Return a net's output, one value per class, as `[classes]`."""
    output = jnp.asarray(output)
    if output.size != max(output.shape, default=1):
        raise ValueError(f"{name}: expected a net with outputs [classes], got {list(output.shape)}")
    return output.reshape(-1)


def _check_labels(output: jax.ShapeDtypeStruct, y: PyTree, name: str) -> None:
    labels_of(y, y.shape[0], output.size, name)


def _check_values(output: jax.ShapeDtypeStruct, y: PyTree, name: str) -> None:
    _same_shape(output, jax.ShapeDtypeStruct(y.shape[1:], y.dtype), name)
    known = not isinstance(y, jax.core.Tracer) and getattr(y, "is_fully_addressable", True)
    if known and jnp.issubdtype(y.dtype, jnp.floating) and (n := int(np.isnan(np.asarray(y)).sum())):
        raise ValueError(f"{name}: {n:,} of {y.size:,} target values are NaN")


def _alike(output: jax.Array, y: PyTree, name: str) -> tuple[jax.Array, jax.Array]:
    """Return an output and its target as vectors of floats."""
    y = jnp.asarray(y)
    _same_shape(output, y, name)
    if not jnp.issubdtype(y.dtype, jnp.floating):
        y = y.astype(wide(output.dtype))
    return widen(output).reshape(-1), y.reshape(-1)  # both [n]


def _same_shape(output: PyTree, y: PyTree, name: str) -> None:
    """Compare the shapes of an output and its target without axes of size 1; one of them may be flat."""
    shapes = [tuple(size for size in a.shape if size != 1) for a in (output, y)]
    if output.size == y.size and (shapes[0] == shapes[1] or min(map(len, shapes)) == 1):
        return
    raise ValueError(
        f"{name}: expected a target of {output.size} values, like the net's output {list(output.shape)}, got "
        f"{list(y.shape)}"
    )
