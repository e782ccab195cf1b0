"""The convolutional network in the page: Chromium computes the same values as JAX, and every control works."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf
from gradfn.pages.live._cnn import described
from gradfn.pages.live.arrays import as_json
from gradfn.runs.cnn_net import ACTIVATIONS, CnnNet, flat_params
from gradfn.runs.kept import Kept
from tests.report.browser import in_page, needs_browser

pytestmark = [pytest.mark.slow, needs_browser]

# Image, channels, hidden layers, classes, window, activation. 28 -> 14 -> 7 -> 3 drops a row and a column.
NETS = {
    "digits": ((28, 28, 1), (3, 4), (6,), 10, 5, "relu"),
    "three": ((28, 28, 1), (2, 3, 2), (5, 4), 10, 3, "sigmoid"),
    "even": ((9, 12, 1), (3,), (), 4, 4, "tanh"),
    "color": ((13, 10, 3), (2, 3), (5,), 3, 2, "gelu"),
    "wide": ((4, 4, 2), (2,), (3,), 2, 5, "silu"),
}


@functools.cache
def untrained(name, n_samples=3):
    """Return what the page keeps of an untrained network with some samples, its parameters and its loss."""
    image, channels, hidden, classes, window, activation = NETS[name]
    net = gf.cnn(image, channels, hidden, classes, window, activation)
    rng = np.random.default_rng(0)
    # Biases, too, are not zero; all values are of the size of those of a trained network.
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
        net.init(jax.random.key(0)),
    )
    samples = rng.uniform(size=[n_samples, int(np.prod(image))]).astype(np.float32)
    about = {"activation": activation, "image": list(image), "data": "noise"}
    labels = np.arange(n_samples, dtype=np.int32) % classes
    kept = CnnNet(flat_params(params), samples, labels, None, about)
    return kept, params, gf.classification_loss(net)


def kept_run(folder, net):
    (folder / "config.json").write_text("{}")
    return Kept(folder, "toy", {"seed": 0}, {}, {"verdict": "done"}, {}, {}, None, cnn=net)


@functools.cache
def compiled(loss):
    """Return a compiled function: the inspection of a loss, and its gradients at the parameters and the input."""
    look = gf.inspect(loss, keep="*")
    grad = jax.grad(lambda params, x, label: loss(params, (x, label)), (0, 1))
    return jax.jit(lambda params, x, label: (look(params, (x, label)), grad(params, x, label)))


def by_jax(params, loss, x, label):
    """Return the values and the gradients by the names of the page, with channels first, and the loss."""
    inspection, (grads, grad_x) = compiled(loss)(params, jnp.asarray(x, jnp.float32), label)
    values = {name: value for name, value in inspection.values.items() if name[0] in "zap"}
    gradients = {name: inspection[name].grad for name in values} | {"x": grad_x}
    n_convs = sum(name.startswith("conv") for name in params)
    for layer, arrays in grads.items():
        number = int(layer[-1]) + (n_convs if layer.startswith("dense") else 0)
        gradients |= {f"{kind}{number}": array for kind, array in arrays.items()}
    return values, gradients, inspection.value


def planar(value, name):
    """Return `[height, width, channels]` as `[channels, height, width]`; parameters as they are."""
    value = np.asarray(value)
    return np.moveaxis(value, -1, 0) if value.ndim == 3 and name[0] in "zapx" else value


def assert_agree(actual, params, loss, x, label, close=2e-5):
    """Assert that `{"values", "gradients", "loss"}` of the page are those of JAX."""
    values, gradients, value = by_jax(params, loss, x, label)
    np.testing.assert_allclose(actual["loss"], value, atol=close, rtol=close)
    assert set(actual["values"]) == {*values, "x"}
    assert set(actual["gradients"]) == set(gradients)
    for kind, expected in (("values", values), ("gradients", gradients)):
        for name, each in expected.items():
            array = planar(each, name)
            found = np.reshape(actual[kind][name], array.shape)
            np.testing.assert_allclose(found, array, atol=close, rtol=close, err_msg=f"{kind} {name}")


NUMBERS = """
const numbers = ({ pass, loss, probabilities, gradients }) =>
  plain({ values: pass.values, loss, probabilities, gradients });
"""


def test_every_value_and_gradient_is_that_of_jax(tmp_path):
    nets = {name: untrained(name) for name in NETS}
    cases = {
        name: {"net": as_json(described(kept)), "x": planar(_image(kept, 1), "x").ravel().tolist()}
        for name, (kept, *_) in nets.items()
    }
    script = """const result = () => Object.fromEntries(Object.entries(inputs.cases).map(([name, { net, x }]) =>
        [name, numbers(gradfn.compute(gradfn.build(JSON.parse(net)).net, x, 1))]));"""
    run = kept_run(tmp_path, nets["digits"][0])
    result = in_page(tmp_path, [run], NUMBERS + script, cases=cases)
    for name, (kept, params, loss) in nets.items():
        assert_agree(result[name], params, loss, _image(kept, 1), 1)


def test_every_activation_and_its_slope_is_that_of_jax(tmp_path):
    z = np.concatenate([np.linspace(-12, 12, 97), [0.0, 1e-3, -1e-3]]).astype(np.float32)
    script = """const result = async () => {
      const { activations } = await import("gradfn/core/activations.js");
      return inputs.names.map((name) => inputs.z.map((z) => {
        const { of, slope } = activations[name];
        return [of(z), slope(z, of(z))];
      }));
    };"""
    run = kept_run(tmp_path, untrained("even")[0])
    result = in_page(tmp_path, [run], script, names=ACTIVATIONS, z=z.tolist())
    for name, found in zip(ACTIVATIONS, result, strict=True):
        function = gf.layers.activations[name]
        expected = jax.vmap(jax.value_and_grad(function))(jnp.asarray(z))
        np.testing.assert_allclose(found, np.stack(expected, -1), atol=3e-6, rtol=3e-6, err_msg=name)


def _image(kept, i):
    return kept.samples[i].reshape(kept.about["image"])
