"""Guided backpropagation, Grad-CAM and LRP against captum and zennit, on the same weights in PyTorch."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    captum = pytest.importorskip("captum.attr")
    zennit = pytest.importorskip("zennit.rules")
    from zennit.composites import LayerMapComposite
    from zennit.types import AvgPool, Convolution, Linear

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _wide(x64):
    pass


class Cnn(torch.nn.Module):
    """Two convolutions, one max pooled, one average pooled, and two dense layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 3, 3, padding=1)
        self.dense1, self.dense2 = torch.nn.Linear(12, 8), torch.nn.Linear(8, 3)
        self.relu1, self.relu2, self.relu3 = torch.nn.ReLU(), torch.nn.ReLU(), torch.nn.ReLU()
        self.max_pool, self.avg_pool = torch.nn.MaxPool2d(2), torch.nn.AvgPool2d(2)
        self.double()

    def forward(self, x):
        x = self.max_pool(self.relu1(self.conv1(x)))
        x = self.avg_pool(self.relu2(self.conv2(x)))
        return self.dense2(self.relu3(self.dense1(x.flatten(1))))


def cnn(params, image):
    """The same network on an image `[1, 8, 8]`, channels first."""

    def conv(name, x):
        W, b = params[f"{name}.weight"], params[f"{name}.bias"]
        z = jax.lax.conv_general_dilated(
            x[None], W, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        return gf.tap(jax.nn.relu(z[0] + b[:, None, None]), name)

    x = conv("conv1", image)
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2), (1, 2, 2), "VALID")
    x = conv("conv2", x)
    x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2), (1, 2, 2), "VALID") / 4
    x = jax.nn.relu(params["dense1.weight"] @ x.reshape(-1) + params["dense1.bias"])
    return params["dense2.weight"] @ x + params["dense2.bias"]


MODEL = Cnn()
IMAGES = np.random.default_rng(0).normal(size=(3, 1, 8, 8))
CLASS = 1


def weights():
    return {name: jnp.asarray(value.detach().numpy()) for name, value in MODEL.named_parameters()}


def of_batch(method):
    return jax.jit(jax.vmap(method, (None, 0)))(weights(), jnp.asarray(IMAGES))


def inputs():
    return torch.tensor(IMAGES, requires_grad=True)


def close(a, b):
    np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-6, atol=1e-9)


def test_the_networks_are_the_same():
    close(of_batch(cnn), MODEL(inputs()))


def test_guided_backprop_is_that_of_captum():
    expected = captum.GuidedBackprop(MODEL).attribute(inputs(), target=CLASS)
    close(of_batch(gf.attribution.guided_backprop(cnn, CLASS)), expected)


def test_grad_cam_is_that_of_captum():
    cam = captum.LayerGradCam(MODEL, MODEL.relu2).attribute(inputs(), CLASS, relu_attributions=True)
    expected = captum.LayerAttribution.interpolate(cam, (8, 8), "bilinear")
    assert expected.abs().max() > 0
    maps = of_batch(gf.attribution.grad_cam(cnn, "conv2", CLASS, channel_axis=0))
    close(maps[:, None], expected)
    guided = captum.GuidedGradCam(MODEL, MODEL.relu2).attribute(inputs(), CLASS, interpolate_mode="bilinear")
    close(maps[:, None] * of_batch(gf.attribution.guided_backprop(cnn, CLASS)), guided)


def relevance_of_zennit(rule):
    layers = LayerMapComposite([(Convolution, rule), (Linear, rule), (AvgPool, zennit.Norm(stabilizer=0.0))])
    x = inputs()
    with layers.context(MODEL) as modified:
        output = modified(x)
        start = torch.zeros_like(output)
        start[:, CLASS] = output.detach()[:, CLASS]
        (relevance,) = torch.autograd.grad(output, x, start)
    return relevance


@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
def test_the_epsilon_rule_is_that_of_zennit(epsilon):
    result = of_batch(gf.attribution.lrp(cnn, CLASS, epsilon=epsilon))
    close(result.attributions, relevance_of_zennit(zennit.Epsilon(epsilon)))


def test_the_gamma_rule_is_that_of_zennit():
    result = of_batch(gf.attribution.lrp(cnn, CLASS, rule="gamma", gamma=0.3))
    close(result.attributions, relevance_of_zennit(zennit.Gamma(0.3)))


def test_the_rule_of_positive_terms_is_that_of_zennit():
    result = of_batch(gf.attribution.lrp(cnn, CLASS, rule="z+"))
    close(result.attributions, relevance_of_zennit(zennit.ZPlus()))


def test_the_epsilon_rule_is_that_of_captum():
    for layer in (MODEL.conv1, MODEL.conv2, MODEL.dense1, MODEL.dense2):
        layer.rule = captum._core.lrp.EpsilonRule(1e-6)
    expected = captum.LRP(MODEL).attribute(inputs(), target=CLASS)
    result = of_batch(gf.attribution.lrp(cnn, CLASS, epsilon=1e-6))
    np.testing.assert_allclose(result.attributions, expected.detach().numpy(), rtol=1e-4, atol=1e-6)
