"""What every run of an image classifier measures as it goes, and draws in the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradfn.core.net import Net
from gradfn.data import Dataset
from gradfn.flatten import Loss, batch_mean
from gradfn.losses import accuracy
from gradfn.report.figures import History, confusion, curves, mistakes, save_all, weight_images

PART = (
    1000  # examples that are answered at a time: the values inside a network for all of them fill the memory
)


def classifier_measures(
    net: Net, loss: Loss, data: Dataset, n_train: int | None = None
) -> Callable[[Any], dict[str, jax.Array]]:
    """Return what `gf.fit` is to evaluate: accuracy on the training and validation examples, validation loss.

    Args:
        net: answers with one value a class.
        loss: of one example, without noise.
        data: its test examples are not looked at.
        n_train: measure on so many training examples, the first ones; None for all.

    Returns:
        `params -> {"train_accuracy", "validation_accuracy", "validation_loss"}`.
    """
    of_train = tuple(part[:n_train] for part in data.train)
    train, validation = jax.tree.map(jnp.asarray, (of_train, data.validation))
    share_right, mean_loss = accuracy(net), batch_mean(loss)
    right, losses = jax.jit(in_parts(share_right)), jax.jit(in_parts(mean_loss))
    return lambda params: {
        "train_accuracy": right(params, train),
        "validation_accuracy": right(params, validation),
        "validation_loss": losses(params, validation),
    }


def in_parts(mean: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any], jax.Array]:
    """Return a mean over a batch as the mean over parts of it, one after the other."""

    def of_all(params: Any, batch: Any) -> jax.Array:
        one = lambda example: mean(params, jax.tree.map(lambda leaf: leaf[None], example))  # noqa: E731
        return jax.lax.map(one, batch, batch_size=PART).mean()

    return of_all


def test_probabilities(net: Net, params: Any, data: Dataset) -> jax.Array:
    """Return how sure a net is of each class of each test example.

    Args:
        net: answers with one logit a class.
        params: its parameters.
        data: whose test examples to answer.

    Returns:
        `[n, classes]`.
    """
    answer = jax.jit(lambda params, x: jax.lax.map(lambda one: net.apply(params, one), x, batch_size=PART))
    return jax.nn.softmax(answer(params, jnp.asarray(data.test[0])))


def six_digits(data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return six unlike test digits to show what a net does with: images `[6, pixels]` and labels `[6]`."""
    images, labels = (part[:200] for part in data.test)
    chosen = [int(np.flatnonzero(labels == digit)[0]) for digit in (0, 1, 2, 4, 7, 8) if digit in labels]
    return images[chosen], labels[chosen]


def classifier_figures(
    folder: Path,
    first: Any,
    history: History,
    data: Dataset,
    probabilities: Any,
    loss_unit: str = "nats",
) -> list[Path]:
    """Draw what a classifier of images has learned, and how it did on the test examples.

    Args:
        folder: where to put the pictures.
        first: `[hidden, pixels]`, the weights of its first layer; or figures of its own by their names.
        history: from `gf.fit`.
        data: whose test examples it answered.
        probabilities: `[n, classes]`, how sure it was of each class of each test example.
        loss_unit: of the losses in the history.

    Returns:
        The files: weights (or its own figures), curves, confusion and mistakes, as PNG. Each names the data.
    """
    images, labels = data.test
    figures = dict(first) if isinstance(first, dict) else {"weights": weight_images(first, data.shape)}
    figures |= {
        "curves": curves(history, loss_unit),
        "confusion": confusion(labels, np.asarray(probabilities).argmax(1), "test digits"),
        "mistakes": mistakes(images, labels, probabilities, data.shape, "test digits"),
    }
    return save_all(figures, folder, data.name)
