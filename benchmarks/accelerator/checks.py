"""Results of gradfn on a device compared with those on the CPU: `tests/accelerator` and the section `correctness`.

Products are computed at the highest precision, so that differences are those of the order of summation. `difference` is
relative to the largest magnitude of an array.
"""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from benchmarks.accelerator.common import Emit, Params, Shapes
from gradfn.inspection.summaries import summarize

# A relative difference in float32 that the order of summation explains; and one of bfloat16's rounding.
BOUND, HALF_BOUND = 1e-4, 3e-2
RESULTS = ("value", "gradients", "inspection", "per-example norms")


class Devices(NamedTuple):
    """The device that is checked, and the CPU that it is compared with."""

    device: jax.Device
    cpu: jax.Device


class Example(NamedTuple):
    """The loss of one example, parameters and a batch of eight for one net."""

    loss: Callable
    params: Params
    batch: Any


def examples() -> dict[str, Callable[[], Example]]:
    """Return a function for one net of each kind, by its name."""
    return {"mlp": _mlp, "cnn": _cnn, "gpt": _gpt}


def _mlp() -> Example:
    net = gf.mlp([784, 16, 10])
    return Example(gf.classification_loss(net), net.init(jax.random.key(0)), _images())


def _cnn() -> Example:
    net = gf.cnn(channels=(8, 16), hidden=(32,))
    return Example(gf.classification_loss(net), net.init(jax.random.key(0)), _images())


def _gpt() -> Example:
    net = gf.gpt(gf.GPTConfig(vocab=65, context=16, n_layers=2, n_heads=2, width=32))
    text = jax.random.randint(jax.random.key(2), (8, 17), 0, 65)
    return Example(gf.next_token_loss(net), net.init(jax.random.key(0)), (text[:, :-1], text[:, 1:]))


def _images() -> tuple[jax.Array, jax.Array]:
    return jax.random.normal(jax.random.key(1), (8, 784)), jnp.arange(8) % 10


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference between two trees, each leaf relative to its largest magnitude."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    worst = 0.0
    for one, other in pairs:
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        if other.size:
            scale = max(float(np.abs(other).max()), 1e-6)
            error = float(np.abs(one - other).max()) / scale
            worst = max(worst, error if error == error else np.inf)
    return worst


def on(device: jax.Device, f: Callable, *args: Any) -> Any:
    """Return the result of a jitted function on a device."""
    with jax.default_matmul_precision("highest"), jax.default_device(device):
        return jax.jit(f)(*jax.device_put(args, device))


def results(example: Example) -> Callable[[Params, Any], dict[str, Any]]:
    """Return a function that computes all RESULTS in one program."""
    mean = gf.batch_mean(example.loss)

    def of(params: Params, batch: Any) -> dict[str, Any]:
        value, grads = jax.value_and_grad(mean)(params, batch)
        found = gf.inspect(mean, input_grads=False)(params, batch)
        statistics = [s.values for s in (*found.stats.values(), *found.grad_stats.values())]
        norms = gf.per_example.norms(example.loss)(params, batch)
        return dict(zip(RESULTS, (value, grads, (found.value, found.grads, statistics), norms), strict=True))

    return of


def differences(name: str, devices: Devices) -> dict[str, float]:
    """Return the difference of each of RESULTS for a net."""
    example = examples()[name]()
    found, expected = (on(device, results(example), *example[1:]) for device in devices)
    return {what: difference(found[what], expected[what]) for what in RESULTS}


def magnitudes(devices: Devices) -> float:
    """Compare root mean squares of values whose squares overflow or underflow in float32 with numpy in float64."""
    x = np.random.default_rng(0).standard_normal(100_000)
    scales = [10.0**exponent for exponent in range(-30, 31, 5)]
    values = [(scale * x).astype(np.float32) for scale in scales]
    expected = [np.sqrt(np.mean(np.square(value.astype(np.float64)))) for value in values]
    found = on(devices.device, lambda values: [summarize(value, ("rms",)).rms for value in values], values)
    return max(
        difference([one / scale], [other / scale])
        for one, other, scale in zip(found, expected, scales, strict=True)
    )


def nan_origins(devices: Devices) -> tuple[list[Any], list[Any]]:
    """Return the equations that `gf.nan_origin` reports on both devices for a deliberate logarithm of zero."""
    _, params, batch = _mlp()

    def loss(params: Params, batch: Any) -> jax.Array:
        x, _ = batch
        hidden = jax.nn.relu(x @ params["W1"].T + params["b1"][None])  # [batch, 16]
        return jnp.log(hidden).sum()

    def found(device: jax.Device) -> list[Any]:
        with jax.default_matmul_precision("highest"):
            report = gf.nan_origin(loss)(*jax.device_put((params, batch), device))
        # The report includes ranges of operands, which differ by rounding.
        return [event and event[:-2] for event in (report.nan, report.inf)]

    one, other = map(found, devices)
    return one, other


def names_the_logarithm(events: list[Any]) -> bool:
    return any(event and event[1] == "log" for event in events)


def guarded(device: jax.Device) -> list[str | None]:
    """Return the operation that `gf.nan_guard`, compiled, names for the logarithms of 1 and of 0."""

    def loss(params: Params, x: jax.Array) -> jax.Array:
        return jnp.log(params["w"] * x).sum()

    named = []
    for x in (1.0, 0.0):
        *_, record = on(device, gf.nan_guard(loss), {"w": jnp.ones(3)}, jnp.full(3, x))
        event = record.report().inf
        named.append(event and event.operation)
    return named


# By name: the dtype, heads of keys and values (there are four of queries), and the largest difference that is right.
ATTENTION = {
    "float32": (jnp.float32, 4, BOUND),
    "bfloat16": (jnp.bfloat16, 4, HALF_BOUND),
    "bfloat16, grouped queries": (jnp.bfloat16, 2, HALF_BOUND),
}


def attention(name: str, causal: bool, devices: Devices) -> float:
    """Compare attention over 512 positions in the device's form with the plain form on the CPU, in float32.

    Returns:
        The difference of the outputs and of the gradients with respect to queries, keys and values.
    """
    dtype, kv_heads, _ = ATTENTION[name]
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [
        jax.random.normal(key, (2, 512, heads, 64)).astype(dtype)
        for key, heads in zip(keys, (4, kv_heads, kv_heads), strict=True)
    ]

    def outputs(*inputs: jax.Array) -> Any:
        def weighted(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
            mixed = jax.vmap(functools.partial(gf.layers.attend, causal=causal))(*inputs)
            # Weights that differ from feature to feature: the gradient of a plain sum would be too simple.
            weights = jnp.cos(jnp.arange(mixed.size)).reshape(mixed.shape)
            return (mixed.astype(jnp.float32) * weights).sum(), mixed

        return jax.grad(weighted, (0, 1, 2), has_aux=True)(*inputs)

    found = on(devices.device, outputs, *inputs)
    with gf.layers.attention_form("plain"):
        expected = on(devices.cpu, outputs, *(x.astype(jnp.float32) for x in inputs))
    return difference(jax.tree.map(lambda x: np.asarray(x, np.float32), found), expected)


def resumed(device: jax.Device) -> float:
    """Return the difference between an interrupted, resumed run on a device and an uninterrupted one."""
    example = _mlp()
    loss, (x, y) = gf.batch_mean(example.loss), example.batch
    data = jnp.tile(x, (8, 1)), jnp.tile(y, 8)
    settings = {"steps": 24, "batch_size": 8, "eval_every": 4, "progress": False, "checkpoint_seconds": 0.0}
    calls = iter(range(100))

    def interrupt(params: Params) -> dict[str, float]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return {}

    with jax.default_device(device), tempfile.TemporaryDirectory() as folder:
        params, data = jax.device_put((example.params, data), device)
        train = functools.partial(gf.fit, loss, params, data, optax.adam(1e-3), **settings)
        whole = train()
        with contextlib.suppress(KeyboardInterrupt):
            train(folder=folder, evaluate=interrupt)
        again = train(folder=folder, resume=True)
    assert {leaf.device for leaf in jax.tree.leaves(again.params)} == {device}
    return difference(again.params, whole.params)


def correctness(shapes: Shapes, emit: Emit) -> None:
    """Report all comparisons of the default device with the CPU."""
    devices = Devices(jax.devices()[0], jax.devices("cpu")[0])
    for name, value, bound in comparisons(devices):
        emit(name, difference=value, bound=bound, ok=value <= bound)
    found, expected = nan_origins(devices)
    emit("nan_origin", ok=found == expected and names_the_logarithm(found))
    emit("nan_guard", ok=guarded(devices.device) == [None, "log"])


def comparisons(devices: Devices) -> Iterator[tuple[str, float, float]]:
    """Yield the name of a comparison, its difference, and the largest one that is right."""
    for name in examples():
        for what, error in differences(name, devices).items():
            yield f"{name}: {what}", error, BOUND
    for name, (*_, bound) in ATTENTION.items():
        yield f"attention, {name}", attention(name, True, devices), bound
    yield "rms from 1e-30 to 1e30", magnitudes(devices), BOUND
    yield "resume", resumed(devices.device), 0.0
