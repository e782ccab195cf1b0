"""A Flax NNX model, trained by an NNX loop, and what gradfn shows of it: `python examples/flax_digits.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import gradfn as gf

STEPS, BATCH = 200, 64


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(784, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.last = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def loss(net, batch):
    x, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(net(x), labels).mean()


def loss_of_one(net, example):
    x, label = example
    return loss(net, (x[None], label[None]))


@nnx.jit
def step(net, optimizer, batch):
    value, grads = nnx.value_and_grad(loss)(net, batch)
    optimizer.update(net, grads)
    return value


digits = gf.data.digits()
draw = np.random.default_rng(0)
net = Net(nnx.Rngs(0))
optimizer = nnx.Optimizer(net, optax.adam(3e-3), wrt=nnx.Param)
for _ in range(STEPS):
    index = draw.integers(0, len(digits.train[1]), BATCH)
    batch = jax.tree.map(lambda array: array[index], digits.train)  # noqa: B023
    value = step(net, optimizer, batch)
print(f"loss {value:.4f} after {STEPS} steps")

# The model as it is: its parameters, the running statistics apart, and the values inside it.
net.eval()
print(gf.table(net))
print(gf.sites(net)(batch[0]))

# Every gradient and activation of one step.
inspection = jax.jit(gf.inspect(loss))(net, batch)
print(inspection)

# What the loss would be without the hidden layer.
print(f"loss without the hidden layer {gf.patch(loss, {'norm/bias:relu': 0.0})(net, batch):.4f}")

# Which examples have the largest gradients.
norms = jax.jit(gf.per_example.norms(loss_of_one))(net, batch)
print("largest gradients: examples", jnp.argsort(-norms.total)[:3])

# The curvature along the gradient, by a product with the Hessian.
graphdef, params, rest = nnx.split(net, nnx.Param, ...)


def loss_of_params(params, batch):
    return loss(nnx.merge(graphdef, params, rest, copy=True), batch)


grads = jax.grad(loss_of_params)(params, batch)
product = jax.jit(gf.curvature.hvp(loss_of_params))(params, grads, batch)
print(f"curvature along the gradient {optax.tree.vdot(grads, product) / optax.tree.vdot(grads, grads):.2f}")

# Where a NaN comes from.
print(gf.nan_origin(lambda net, batch: jnp.log(net(batch[0]).min() * 0.0))(net, batch))
