"""What every run of an image classifier measures as it goes, and draws in the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradfn.data import Dataset
from gradfn.losses import Loss, accuracy, batch_mean
from gradfn.net import Net
from gradfn.report.figures import History, confusion, curves, mistakes, save, weight_images


def classifier_measures(net: Net, loss: Loss, data: Dataset) -> Callable[[Any], dict[str, jax.Array]]:
    """Return what `gf.fit` is to evaluate: accuracy on the training and validation examples, validation loss.

    Args:
        net: answers with one value a class.
        loss: of one example, without noise.
        data: its test examples are not looked at.

    Returns:
        `params -> {"train_accuracy", "validation_accuracy", "validation_loss"}`.
    """
    train, validation = jax.tree.map(jnp.asarray, (data.train, data.validation))
    share_right, mean_loss = jax.jit(accuracy(net)), jax.jit(batch_mean(loss))
    return lambda params: {
        "train_accuracy": share_right(params, train),
        "validation_accuracy": share_right(params, validation),
        "validation_loss": mean_loss(params, validation),
    }


def classifier_figures(
    folder: Path, W1: Any, history: History, data: Dataset, probabilities: Any, loss_unit: str = "nats"
) -> list[Path]:
    """Draw what a classifier of images has learned, and how it did on the test examples.

    Args:
        folder: where to put the pictures.
        W1: `[hidden, pixels]`, the weights of its first layer.
        history: from `gf.fit`.
        data: whose test examples it answered.
        probabilities: `[n, classes]`, how sure it was of each class of each test example.
        loss_unit: of the losses in the history.

    Returns:
        The files: weights, curves, confusion and mistakes, as PNG. Each names the data.
    """
    images, labels = data.test
    figures = {
        "weights": weight_images(W1, data.shape),
        "curves": curves(history, loss_unit),
        "confusion": confusion(labels, np.asarray(probabilities).argmax(1), "test digits"),
        "mistakes": mistakes(images, labels, probabilities, data.shape, "test digits"),
    }
    for figure in figures.values():
        figure.suptitle(f"{figure.get_suptitle()}\n(data: {data.name})")
    return [save(figure, folder / f"{name}.png") for name, figure in figures.items()]
