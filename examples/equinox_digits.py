"""An Equinox model, trained by an Equinox loop, and what gradfn shows of it: `python examples/equinox_digits.py`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf

STEPS, BATCH = 200, 64


class Net(eqx.Module):
    layers: list

    def __init__(self, key):
        first, last = jax.random.split(key)
        self.layers = [eqx.nn.Linear(784, 32, key=first), eqx.nn.Linear(32, 10, key=last)]

    def __call__(self, x):
        return self.layers[1](jax.nn.relu(self.layers[0](x)))


def loss_of_one(net, example):
    x, label = example
    return optax.softmax_cross_entropy_with_integer_labels(net(x), label)


def loss(net, batch):
    return jax.vmap(loss_of_one, (None, 0))(net, batch).mean()


optimizer = optax.adam(3e-3)


@eqx.filter_jit
def step(net, state, batch):
    value, grads = eqx.filter_value_and_grad(loss)(net, batch)
    updates, state = optimizer.update(grads, state)
    return eqx.apply_updates(net, updates), state, value


digits = gf.data.digits()
draw = np.random.default_rng(0)
net = Net(jax.random.key(0))
state = optimizer.init(eqx.filter(net, eqx.is_inexact_array))
for _ in range(STEPS):
    index = draw.integers(0, len(digits.train[1]), BATCH)
    batch = jax.tree.map(lambda array: array[index], digits.train)  # noqa: B023
    net, state, value = step(net, state, batch)
print(f"loss {value:.4f} after {STEPS} steps")

# The model as it is: its parameters, and the values inside it.
print(gf.table(net))
print(gf.sites(net)(batch[0][0]))

# Every gradient and activation of one step.
inspection = eqx.filter_jit(gf.inspect(loss))(net, batch)
print(inspection)

# What the loss would be without the hidden layer.
print(f"loss without the hidden layer {gf.patch(loss, {'layers/0/bias:relu': 0.0})(net, batch):.4f}")

# Which examples have the largest gradients.
norms = eqx.filter_jit(gf.per_example.norms(loss_of_one))(net, batch)
print("largest gradients: examples", jnp.argsort(-norms.total)[:3])

# The curvature along the gradient, by a product with the Hessian.
grads = inspection.grads
product = eqx.filter_jit(gf.curvature.hvp(loss))(net, grads, batch)
print(f"curvature along the gradient {optax.tree.vdot(grads, product) / optax.tree.vdot(grads, grads):.2f}")

# Where a NaN comes from.
print(gf.nan_origin(lambda net, batch: jnp.log(jax.vmap(net)(batch[0]).min() * 0.0))(net, batch))
