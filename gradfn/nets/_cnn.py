"""The convolutional network: convolution and pooling layers, followed by dense layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gradfn.core.axes import with_axes
from gradfn.core.names import ParameterError, scope, tap
from gradfn.core.net import Net, fold, with_or_without_key
from gradfn.core.params import Params, Spec
from gradfn.layers._activations import Activation
from gradfn.layers._activations import activation as activation_named
from gradfn.layers._conv import conv, max_pool
from gradfn.layers._dense import dense
from gradfn.layers._dropout import dropout as dropout_layer
from gradfn.nets._description import described
from gradfn.nets.transformer import cast


def cnn(
    image: Sequence[int] = (28, 28, 1),
    channels: Sequence[int] = (32, 64),
    hidden: Sequence[int] = (128,),
    classes: int = 10,
    window: int = 3,
    activation: str | Activation = "relu",
    dropout: float = 0.0,
    compute: str | None = None,
) -> Net:
    """Return a convolutional network: repeated convolution, activation and 2x2 max pooling, then dense layers.

    LeCun et al., *Gradient-based learning applied to document recognition*, 1998. Its values are named: `z1` is the
    first convolution's output, `a1` its activation, `p1` the pooled value, and so on; the dense layers continue
    the numbering.

    Args:
        image: `[height, width, channels]` of an image.
        channels: output channels of each convolution; each pooling halves height and width.
        hidden: nodes of each hidden dense layer.
        classes: the number of classes.
        window: height and width of the convolution windows; images are padded with zeros.
        activation: a name from `gf.layers.activations` or a function.
        dropout: the fraction of each dense layer's inputs that training drops.
        compute: the dtype to compute in, such as `"bfloat16"`; None for that of the parameters.

    Returns:
        A net with `conv1` `{"W" [channels, in, window, window], "b"}`, ..., and `dense1` `{"W", "b"}`, ... It
        takes an image of the declared shape, flat (`[784]`), or without its single channel (`[28, 28]`), and
        returns logits `[classes]` in the parameters' dtype. With dropout it takes `key=`.

    Raises:
        ValueError: an image that is too small for the number of poolings.
        ParameterError: parameters or an image of other shapes.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.cnn()
    >>> gf.count(net.spec), net.apply(net.init(jax.random.key(0)), jnp.zeros(784)).shape
    (421642, (10,))
    """
    settings = {
        "image": image,
        "channels": channels,
        "hidden": hidden,
        "classes": classes,
        "window": window,
        "activation": activation,
        "dropout": dropout,
        "compute": compute,
    }
    height, width, n_in = image = tuple(image)
    squash = activation_named(activation)
    convs: dict[str, Net] = {}
    for i, n_out in enumerate(channels, 1):
        convs[f"conv{i}"] = conv(n_in, n_out, [window, window])
        height, width, n_in = height // 2, width // 2, n_out
    if height * width == 0:
        raise ValueError(f"cnn: image {list(image)} is too small for {len(channels)} poolings")
    sizes = [height * width * n_in, *hidden, classes]
    denses = {f"dense{i}": dense(sizes[i - 1], sizes[i]) for i in range(1, len(sizes))}
    pool, drop, last = max_pool([2, 2]), dropout_layer(dropout), f"dense{len(denses)}"
    dtype = None if compute is None else jnp.dtype(compute)

    def run(params: Params, x: jax.Array, key: jax.Array | None) -> jax.Array:
        x = jnp.asarray(x)
        if x.size != math.prod(image) or x.shape not in (image, image[:2], (x.size,)):
            flat = math.prod(image)
            raise ParameterError(
                "conv1/W", f"expected an image of {list(image)} or [{flat}], got {list(x.shape)}"
            )
        output_dtype = params[last]["W"].dtype
        params, x = cast((params, x), dtype)
        x = x.reshape(image)  # [784] or [28, 28] -> [28, 28, 1]
        for i, (name, layer) in enumerate(convs.items(), 1):
            with scope(name):
                z = tap(layer.apply(params[name], x), f"z{i}")
            x = tap(pool.apply({}, tap(squash(z), f"a{i}")), f"p{i}")
        x = x.reshape(-1)  # [height, width, channels] -> [height * width * channels]
        for i, (name, layer) in enumerate(denses.items(), len(convs) + 1):
            x = drop.apply({}, x, key=fold(key, i))
            with scope(name):
                z = layer.apply(params[name], x)
                z = tap(z.astype(output_dtype) if name == last else z, f"z{i}")
            x = z if name == last else tap(squash(z), f"a{i}")
        return x

    spec: Spec = {name: layer.spec for name, layer in (convs | denses).items()}
    spec[last] = with_axes(spec[last], None, "mlp_in")
    apply = with_or_without_key(run, bool(dropout))
    return Net(spec, apply, description=described("cnn", settings))
