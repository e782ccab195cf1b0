"""Kronecker factors and products with them: those of curvlinops on the same weights."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradfn as gf

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    # Of torch.jit, which curvlinops uses.
    warnings.simplefilter("ignore")
    curvlinops = pytest.importorskip("curvlinops")

pytestmark = pytest.mark.filterwarnings("ignore")
N = 6


def dense(i, shape):
    return np.random.default_rng(i).normal(size=shape).astype(np.float32)


def mlp():
    """Return outputs, parameters, inputs; and the module with the parameters that stand for them."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    params = {"W1": dense(0, (4, 5)), "b1": dense(1, 4), "W2": dense(2, (3, 4)), "b2": dense(3, 3)}

    def outputs(params, x):
        return params["W2"] @ jnp.tanh(params["W1"] @ x + params["b1"]) + params["b2"]

    return outputs, params, dense(4, (N, 5)), model


def convolutions():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(18, 3),
    )
    params = {"W1": dense(0, (3, 2, 3, 3)), "b1": dense(1, 3), "W2": dense(2, (3, 18)), "b2": dense(3, 3)}

    def outputs(params, x):
        z = jax.lax.conv_general_dilated(x[None], params["W1"], (2, 2), [(1, 1), (1, 1)])[0]
        return params["W2"] @ jax.nn.relu(z + params["b1"][:, None, None]).ravel() + params["b2"]

    return outputs, params, dense(4, (N, 2, 6, 4)), model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "loss", "fisher"),
    [
        (mlp, "softmax", "type-2"),
        (mlp, "squared", "empirical"),
        (convolutions, "squared", "type-2"),
        (convolutions, "softmax", "empirical"),
    ],
)
def test_factors_and_products(net, loss, fisher):
    outputs, params, x, model = net()
    y = np.arange(N) % 3 if loss == "softmax" else dense(9, (N, 3))
    for parameter, value in zip(model.parameters(), params.values(), strict=True):
        parameter.data = torch.from_numpy(value)
    criterion = torch.nn.CrossEntropyLoss() if loss == "softmax" else torch.nn.MSELoss()
    batch = torch.from_numpy(x), torch.from_numpy(y)
    vector = {name: dense(10 + i, p.shape) for i, (name, p) in enumerate(params.items())}
    name_of = {"0": "W1", "2": "W2", "3": "W2"}

    def of_example(params, example):
        z = outputs(params, example[0])
        return gf_loss(z, example[1])

    def gf_loss(z, y):
        if loss == "softmax":
            return -jax.nn.log_softmax(z)[y]
        # curvlinops takes the root of the mean over outputs, not the mean, into the gradients.
        return jnp.sum((z - y) ** 2) / np.sqrt(3).astype(np.float32)

    source = (of_example,) if fisher == "empirical" else (outputs, loss)
    for sharing in ("expand", "reduce"):
        theirs = curvlinops.KFACLinearOperator(
            model, criterion, list(model.parameters()), [batch], fisher_type=fisher, kfac_approx=sharing,
            check_deterministic=False,
        )  # fmt: skip
        theirs.compute_kronecker_factors()
        ours = gf.curvature.kfac(*source, weight_sharing=sharing)(params, (x, y))
        for module, factor in theirs._input_covariances.items():
            close(ours.blocks[name_of[module]].second[0], factor)
            close(ours.blocks[name_of[module]].first[0], theirs._gradient_covariances[module])
        products = theirs @ [torch.from_numpy(v) for v in vector.values()]
        found = ours.product(vector)
        for name, product in zip(params, products, strict=True):
            # Their bias of a convolution has the factor of the weight's outputs; ours is the exact block, which is
            # the one of reduce.
            if name != "b1" or net is mlp or sharing == "reduce":
                close(found[name], product)
    if fisher == "type-2":
        exact = curvlinops.GGNLinearOperator(
            model, criterion, list(model.parameters()), [batch], check_deterministic=False
        )
        columns = exact @ torch.eye(exact.shape[0])
        ours = gf.curvature.ggn_diagonal(outputs, loss)(params, (x, y))
        close(np.concatenate([np.ravel(ours[name]) for name in params]), torch.diagonal(columns))
    theirs = curvlinops.EKFACLinearOperator(
        model, criterion, list(model.parameters()), [batch], fisher_type=fisher, check_deterministic=False
    )
    products = theirs @ [torch.from_numpy(v) for v in vector.values()]
    found = gf.curvature.ekfac(*source)(params, (x, y)).product(vector)
    for name in ("W1", "W2", "b2"):
        close(found[name], products[list(params).index(name)])


def close(a, b):
    a, b = np.asarray(a), b.detach().numpy() if hasattr(b, "detach") else np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
