"""Whether the weights of a multilayer perceptron may have half precision in a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

MARGIN = 0.01  # how much the loss may change, relatively
INPUTS = 64  # random ones, where there are no examples


def is_close(
    params: Mapping[str, np.ndarray],
    activation: str,
    output: str | None,
    loss: str,
    x: np.ndarray,
    y: np.ndarray,
) -> bool:
    """Return whether the mean loss of some examples changes by 1 % at most if the parameters are float16.

    Without examples, the outputs for random inputs are compared: their difference may be 1 % of their spread.

    Args:
        params: `W1`, `b1`, ... of a `gf.mlp`.
        activation: of the hidden layers.
        output: of the last layer, or None.
        loss: the function of gradfn that made the loss.
        x: examples `[n, inputs]`; n may be 0.
        y: their labels `[n]`, or vectors `[n, outputs]`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        halves = {name: array.astype(np.float16).astype(np.float32) for name, array in params.items()}
        if len(x):
            exact, close = (
                _loss(_outputs(each, x, activation, output), y, loss) for each in (params, halves)
            )
            return bool(abs(exact - close) <= MARGIN * exact)
        x = np.random.default_rng(0).uniform(size=[INPUTS, params["W1"].shape[1]])
        exact, close = (_outputs(each, x, activation, output) for each in (params, halves))
        return bool(np.sqrt(np.mean(np.square(exact - close))) <= MARGIN * exact.std())


def _outputs(
    params: Mapping[str, np.ndarray], x: np.ndarray, activation: str, output: str | None
) -> np.ndarray:
    """Return what the network returns for a batch, `[n, outputs]`."""
    n_layers = len(params) // 2
    for i in range(1, n_layers + 1):
        z = x @ params[f"W{i}"].T + params[f"b{i}"]
        squash = output if i == n_layers else activation
        x = z if squash is None else ACTIVATIONS[squash](z)
    return x


def _loss(outputs: np.ndarray, y: np.ndarray, loss: str) -> np.ndarray:
    """Return the mean loss of a batch."""
    if loss == "classification_loss":
        top = outputs.max(1, keepdims=True)
        sums = top[:, 0] + np.log(np.exp(outputs - top).sum(1))
        return (sums - outputs[np.arange(len(y)), y]).mean()
    targets = np.eye(outputs.shape[1])[y] if y.ndim == 1 else y
    return np.square(outputs - targets).mean()


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * z))


def _elu(z: np.ndarray, scale: float = 1.0, below: float = 1.0) -> np.ndarray:
    return np.where(z > 0, scale * z, below * np.expm1(np.minimum(z, 0)))


def _gelu(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


# The activations that assets/core/activations.js knows, to compare half precision with.
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu": lambda z: np.where(z >= 0, z, 0.01 * z),
    "elu": _elu,
    "selu": lambda z: _elu(z, 1.0507009873554805, 1.0507009873554805 * 1.6732632423543772),
    "gelu": _gelu,
    "gelu_exact": _gelu,  # which differs by less than the comparison's margin
    "silu": lambda z: z * _sigmoid(z),
    "softplus": lambda z: np.logaddexp(z, 0),
    "identity": lambda z: z,
}
