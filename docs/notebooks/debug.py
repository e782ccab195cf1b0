# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Debug a network that does not learn
#
# A loss that stays where it is tells you nothing about the reason. Here are seven faults that everyone meets.
# Each is introduced on purpose, each shows the same symptom, and each is found in a table. The order of
# questions is always the same:
#
# 1. **Are values healthy?** `gf.inspect`: sizes, saturation, dead units.
# 2. **Do gradients arrive?** the same table, from the bottom up.
# 3. **Is the loss the one I meant?** `gf.backprop`: every equation with its shape.
# 4. **Is the step too large?** `gf.curvature`.
# 5. **Which examples are to blame?** `gf.per_example`.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf

digits = gf.data.digits()
images, labels = digits.train
batch = images[:64], labels[:64]


def trained(loss, params, data, optimizer, steps=200):
    """Train, print the loss a few times, and return the parameters."""
    fitted = gf.fit(loss, params, data, optimizer, steps, eval_every=steps // 5, progress=False)
    print("loss", " ".join(f"{row['loss']:.3f}" for row in fitted.history))
    return fitted.params


# %% [markdown]
# A network that learns, to compare with. A guess among ten classes has a loss of ln 10 = 2.303.

# %%
net = gf.mlp([784, 32, 10])
loss = gf.batch_mean(gf.classification_loss(net))
params = net.init(jax.random.key(0))
inspect = jax.jit(gf.inspect(loss))
good = trained(loss, params, digits.train, optax.adam(3e-3))

# %% [markdown]
# ## 1. Inputs that are not scaled
#
# The same network and the same pictures, with pixels from 0 to 255.

# %%
raw = images * 255, labels
_ = trained(loss, params, raw, optax.sgd(0.1))

# %%
raw_batch = raw[0][:64], labels[:64]
inspection = inspect(params, raw_batch)
inspection

# %% [markdown]
# The weighted sums `z1` have an rms above 100, so nearly all sigmoids are `saturated`: they are flat there,
# and the gradient shrinks to a few percent on its path from `a1` to `z1`. Scale the inputs.

# %%
assert "saturated" in inspection.flags()["a1"]
assert "a1" not in inspect(params, batch).flags()
_ = trained(loss, params, digits.train, optax.sgd(0.1))

# %% [markdown]
# ## 2. A learning rate that is too large
#
# A relu network, trained by gradient descent with a learning rate of 1.

# %%
relu = gf.mlp([784, 32, 10], activation="relu")
relu_loss = gf.batch_mean(gf.classification_loss(relu))
start = relu.init(jax.random.key(0))
stuck = trained(relu_loss, start, digits.train, optax.sgd(1.0))

# %% [markdown]
# Gradient descent is stable in a direction of curvature λ only below a learning rate of 2/λ. The largest
# eigenvalue of the Hessian at the start says what is possible:

# %%
eigs = jax.jit(gf.curvature.hessian_eigs(relu_loss, 1))(start, batch, key=jax.random.key(0))
print(
    f"largest eigenvalue {float(eigs.values[0]):.1f}: a learning rate below {2 / float(eigs.values[0]):.2f}"
)

# %% [markdown]
# ## 3. Dead units
#
# Why does it not recover once it is stuck? Inspect the network where it ended:

# %%
inspection = jax.jit(gf.inspect(relu_loss))(stuck, batch)
inspection

# %% [markdown]
# The first steps were so large that almost all relus are zero for every digit: `dead`. Their slope is zero
# too, so no gradient reaches `W1`, and a smaller learning rate comes too late. Start again, below the
# limit:

# %%
assert "dead" in inspection.flags()["a1"]
_ = trained(relu_loss, start, digits.train, optax.sgd(0.1))

# %% [markdown]
# ## 4. A loss that is reduced over the wrong axes
#
# A regression whose loss stops at the variance of the targets, as if the inputs did not matter.

# %%
draw = np.random.default_rng(0)
x = draw.normal(size=(256, 4)).astype("float32")
y = x.sum(1)
line = gf.mlp([4, 16, 1], activation="tanh")
line_start = line.init(jax.random.key(0))


def wrong(params, batch):
    """The mean squared error, with a fault."""
    x, y = batch
    prediction = jax.vmap(line.apply, (None, 0))(params, x)
    return jnp.mean((prediction - y) ** 2)


_ = trained(wrong, line_start, (x, y), optax.adam(1e-2))
print(f"variance of the targets {y.var():.3f}")

# %% [markdown]
# Values and gradients are healthy; the loss is not what it was meant to be. The backward pass starts with
# it:

# %%
steps = gf.backprop(wrong)(line_start, (x[:64], y[:64]))
steps.table(rows=8)

# %% [markdown]
# The difference of 64 predictions and 64 targets has the shape `[64, 64]`. Predictions are `[64, 1]` and
# targets `[64]`, so numpy's rules pair each with each, and the best prediction for all pairs is the mean.
# The targets need the shape of the predictions; `gf.regression_loss` checks that.


# %%
def mended(params, batch):
    """The mean squared error."""
    x, y = batch
    prediction = jax.vmap(line.apply, (None, 0))(params, x)
    return jnp.mean((prediction - y[:, None]) ** 2)


assert (64, 64) in [cotangent.shape for step in steps for cotangent in step.incoming]
_ = trained(mended, line_start, (x, y), optax.adam(1e-2))

# %% [markdown]
# ### Sum or mean
#
# The other fault of this kind is a sum over the batch where a mean was meant. The loss still falls for some
# learning rates, but the gradient is as many times larger as the batch has examples, and the learning rate
# of a paper no longer fits.


# %%
def summed(params, batch):
    """The sum of squared errors over the batch."""
    return len(batch[0]) * mended(params, batch)


small = x[:64], y[:64]
for name, function in {"sum": summed, "mean": mended}.items():
    print(name, float(gf.inspect(function)(line_start, small)["z2"].grad_stats.rms))

# %% [markdown]
# ## 5. A gradient that stops
#
# Someone wanted to log the hidden activations without their gradient, and returned the wrong variable.


# %%
def frozen(params, example):
    """The squared error, with a fault."""
    x, y = example
    hidden = jnp.tanh(params["W1"] @ x + params["b1"])
    logged = hidden = jax.lax.stop_gradient(hidden)
    return jnp.sum((params["W2"] @ hidden + params["b2"] - y) ** 2) + 0.0 * logged.mean()


inspection = gf.inspect(gf.batch_mean(frozen))(line_start, small)
inspection

# %% [markdown]
# `W1` and `b1` have a gradient of exactly zero. `gf.check_grads` compares every gradient with differences
# in float64, and names what stopped it:

# %%
report = gf.check_grads(frozen)(line_start, (x[0], y[0]))
assert not report.ok
report

# %% [markdown]
# ## 6. A NaN behind a mask
#
# The last rows of the batch are padding. The loss leaves them out, and is still NaN after one step.

# %%
weight = (np.arange(64) < 60).astype("float32")


def masked(params, batch):
    """The cross-entropy over the rows of weight 1, with a fault."""
    x, label, weight = batch
    likelihood = weight * jax.nn.softmax(jax.vmap(net.apply, (None, 0))(params, x))[jnp.arange(64), label]
    return jnp.where(weight > 0, -jnp.log(likelihood), 0.0).sum() / weight.sum()


try:
    gf.fit(masked, params, (*batch, weight), optax.adam(3e-3), 10, batch_size=64, progress=False)
except FloatingPointError as error:
    print(error)

# %% [markdown]
# `gf.fit` stops and reports the first NaN and the first infinity. The logarithm of a padded row is
# infinite; `where` discards its value, and the backward pass multiplies its infinite slope by zero. A value
# that must not count has to be replaced *before* the operation that it breaks (the "double where"), or the
# loss is written so that nothing breaks:


# %%
def unmasked(params, batch):
    """The cross-entropy over the rows of weight 1."""
    x, label, weight = batch
    logits = jax.vmap(net.apply, (None, 0))(params, x)
    return (weight * optax.softmax_cross_entropy_with_integer_labels(logits, label)).sum() / weight.sum()


assert gf.nan_origin(unmasked)(params, (*batch, weight)).nan is None
gf.nan_origin(unmasked)(params, (*batch, weight))

# %% [markdown]
# ## 7. A few bad examples
#
# The network learns, but not as well as it should: forty of the 1,257 labels are wrong. Their gradients are
# the largest ones.

# %%
wrong_labels = labels.copy()
bad = draw.choice(len(labels), 40, replace=False)
wrong_labels[bad] = (wrong_labels[bad] + draw.integers(1, 10, 40)) % 10
fooled = trained(loss, params, (images, wrong_labels), optax.adam(3e-3), steps=400)

# %%
norms = jax.jit(gf.per_example.norms(loss))(fooled, (images, wrong_labels))
suspects = np.argsort(norms.total)[-40:]
print(f"{np.isin(suspects, bad).mean():.0%} of the 40 examples with the largest gradients are mislabeled")
norms

# %% [markdown]
# ## In short
#
# | you see | it is |
# |---|---|
# | `saturated`, large `rms` of the weighted sums | inputs or weights that are too large |
# | `dead` | a step that was too large, or a bias that was too negative |
# | `vanishing` toward the input | too many saturating layers; use relu, normalization, residual connections |
# | a gradient of exactly zero | `stop_gradient`, `round`, `argmax`, an unused parameter: `gf.check_grads` names it |
# | a shape with the batch in it twice | broadcasting in the loss |
# | a gradient that grows with the batch size | a sum instead of a mean |
# | `non-finite` | `gf.nan_origin`, which `gf.fit` calls for you |
# | few examples with most of the gradient | wrong labels, outliers: `gf.per_example.norms` |
