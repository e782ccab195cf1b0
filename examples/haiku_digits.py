"""A Haiku function, trained by a Haiku loop, and what gradfn shows of it: `python examples/haiku_digits.py`."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf

STEPS, BATCH = 200, 64

net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([32, 10])(x)))


def loss_of_one(params, example):
    x, label = example
    return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), label)


def loss(params, batch):
    return jax.vmap(loss_of_one, (None, 0))(params, batch).mean()


optimizer = optax.adam(3e-3)


@jax.jit
def step(params, state, batch):
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, value


digits = gf.data.digits()
draw = np.random.default_rng(0)
params = net.init(jax.random.key(0), digits.train[0][0])
state = optimizer.init(params)
for _ in range(STEPS):
    index = draw.integers(0, len(digits.train[1]), BATCH)
    batch = jax.tree.map(lambda array: array[index], digits.train)  # noqa: B023
    params, state, value = step(params, state, batch)
print(f"loss {value:.4f} after {STEPS} steps")

# The parameters as they are, and the values inside the function.
print(gf.table(params))
print(gf.sites(net)(params, batch[0][0]))

# Every gradient and activation of one step.
inspection = jax.jit(gf.inspect(loss))(params, batch)
print(inspection)

# What the loss would be without the hidden layer.
print(f"loss without the hidden layer {gf.patch(loss, {'mlp/linear_0:relu': 0.0})(params, batch):.4f}")

# Which examples have the largest gradients.
norms = jax.jit(gf.per_example.norms(loss_of_one))(params, batch)
print("largest gradients: examples", jnp.argsort(-norms.total)[:3])

# The curvature along the gradient, by a product with the Hessian.
grads = inspection.grads
product = jax.jit(gf.curvature.hvp(loss))(params, grads, batch)
print(f"curvature along the gradient {optax.tree.vdot(grads, product) / optax.tree.vdot(grads, grads):.2f}")

# Where a NaN comes from.
print(gf.nan_origin(lambda params, batch: jnp.log(net.apply(params, batch[0]).min() * 0.0))(params, batch))
