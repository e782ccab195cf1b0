"""How much of a device's peak a training step uses: MFU, the model's FLOPs utilization.

Chowdhery et al., *PaLM*, 2022, appendix B. The numerator is what the model needs, not what was computed, so
recomputation does not raise it: three times the matrix products and convolutions of the loss as it is traced, since
the backward pass takes twice those of the forward pass. XLA's own `cost_analysis` is not used: it counts a loop's body
once and knows nothing of a library's kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import Jaxpr
from jaxtyping import PyTree

from gradfn.core.attention_form import requested
from gradfn.jaxpr.interpreter import bodies

# Dense bfloat16 operations per second from the vendors' data sheets, keyed by a part of the device name in jax, whole
# words; the first that fits counts.
PEAK = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_rate(device_kind: str) -> float | None:
    """Return the peak bfloat16 operations per second of a device by its name in jax; None where it is not known.

    >>> peak_rate("NVIDIA H100 80GB HBM3")
    989000000000000.0
    >>> peak_rate("cpu")
    """
    words = f" {device_kind} ".replace("-", " ")  # A100-SXM4-80GB
    return next((rate for name, rate in PEAK.items() if f" {name} " in words), None)


def peak_of(array: jax.Array) -> float | None:
    """Return the peak rate of the devices that an array is on, together; None where it is not known."""
    devices: Iterable[Any] = array.sharding.device_set
    peaks = [peak_rate(device.device_kind) for device in devices]
    return None if None in peaks else sum(filter(None, peaks))


def step_flops(loss: Callable[..., PyTree], *args: PyTree, **keywords: PyTree) -> float:
    """Return the floating-point operations that a training step needs: three times the products of its loss.

    The arguments may be arrays or their shapes; nothing is computed.

    >>> import jax, jax.numpy as jnp, gradfn as gf
    >>> net = gf.mlp([784, 16, 10])
    >>> loss = gf.batch_mean(gf.classification_loss(net))
    >>> step_flops(loss, net.init(jax.random.key(0)), (jnp.ones([32, 784]), jnp.zeros(32, int)))
    2439168.0
    >>> 3 * 2 * 32 * (784 * 16 + 16 * 10)
    2439168
    """
    with requested("plain"):  # attention's other forms compute some products twice, or inside a kernel
        return 3.0 * products(jax.make_jaxpr(loss)(*args, **keywords).jaxpr)


def products(jaxpr: Jaxpr) -> float:
    """Return the floating-point operations of a program's matrix products and convolutions.

    A scan counts as often as it runs, a while loop once, and of a `cond` the most expensive branch. Kernels of a
    user's own (Pallas) count as nothing.
    """
    return math.fsum(_of_equation(eqn) for eqn in jaxpr.eqns)


def _of_equation(eqn: Any) -> float:
    kind, inner = bodies(eqn, enter_custom=True)
    if inner:
        times = {"scan": lambda: eqn.params["length"], "shard_map": lambda: eqn.params["mesh"].size}
        return times.get(kind, lambda: 1)() * max(products(body) for body, _ in inner)
    size = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        # Every output is a sum over the kernel's window and the input channels of its group.
        return 2.0 * size * math.prod(kernel) / kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 0.0
