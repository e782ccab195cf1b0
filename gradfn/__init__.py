"""gradfn: networks as pure functions over plain dicts of arrays, with every gradient visible."""

from gradfn import layers
from gradfn.losses import accuracy, batch_mean, classification_loss, quadratic_loss, regression_loss
from gradfn.names import ParameterError, tap
from gradfn.net import Net, repeat, residual, serial
from gradfn.nets import hidden_width, mlp
from gradfn.params import Param, check, count, init, shapes, table

__version__ = "0.1.0"

__all__ = [
    "Net",
    "Param",
    "ParameterError",
    "accuracy",
    "batch_mean",
    "check",
    "classification_loss",
    "count",
    "hidden_width",
    "init",
    "layers",
    "mlp",
    "quadratic_loss",
    "regression_loss",
    "repeat",
    "residual",
    "serial",
    "shapes",
    "table",
    "tap",
]
