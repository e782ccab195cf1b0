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
# # First look
#
# A network that reads handwritten digits, trained in a few seconds and then opened: its weights as
# pictures, its gradients as tables, one node switched off, and a NaN traced to its line.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import gradfn as gf

digits = gf.data.digits()
images, labels = digits.train


def show(pictures, titles, vmax=None):
    """Draw vectors of 784 values as pictures of 28 by 28 in one row."""
    _, axes = plt.subplots(1, len(pictures), figsize=(len(pictures), 1.25), layout="constrained")
    for axis, picture, title in zip(axes, pictures, titles, strict=True):
        limits = {"cmap": "RdBu", "vmin": -vmax, "vmax": vmax} if vmax else {"cmap": "gray_r"}
        axis.imshow(picture.reshape(28, 28), **limits)
        axis.set_title(str(title), fontsize=8)
        axis.axis("off")
    plt.show()


show(images[:10], labels[:10])

# %% [markdown]
# ## The network
#
# A network is a pure function `net.apply(params, x)`, and `params` is a dict of arrays.

# %%
net = gf.mlp([784, 16, 10])
params = net.init(jax.random.key(0))
gf.table(params)

# %% [markdown]
# ## Training
#
# `gf.classification_loss` is the loss of one example, and `gf.batch_mean` averages it over a batch. While
# `gf.fit` runs, one line reports the step, the loss and the time left.

# %%
loss = gf.classification_loss(net)
mean = gf.batch_mean(loss)
accuracy = jax.jit(gf.accuracy(net))
fitted = gf.fit(
    mean,
    params,
    digits.train,
    optax.adam(3e-3),
    steps=1000,
    eval_every=250,
    evaluate=lambda params: {"test accuracy": accuracy(params, digits.test)},
)

# %% [markdown]
# The history is a list of rows, and a result shows itself as a table.

# %%
fitted

# %% [markdown]
# ## What a hidden node detects
#
# Each of the 16 hidden nodes has one weight per pixel. Blue pixels turn it on, red ones turn it off.

# %%
weights = fitted.params["W1"]
show(weights[:8], [f"node {i}" for i in range(8)], vmax=1.0)

# %% [markdown]
# ## Every gradient in one table
#
# One forward and one backward pass of 64 digits: each value inside the function, its size, and the norm of
# the loss's gradient there. The second table has the gradients of the parameters. Compare the column
# `sat/dead` with the network before training: its nodes have become decided, almost fully on or off, and a
# saturated sigmoid passes little gradient to what lies before it.

# %%
batch = images[:64], labels[:64]
inspection = jax.jit(gf.inspect(mean))(fitted.params, batch)
inspection

# %%
before = jax.jit(gf.inspect(mean))(params, batch)
print("saturated before training:", f"{float(before['a1'].stats.saturated):.0%}")
print("saturated after training: ", f"{float(inspection['a1'].stats.saturated):.0%}")

# %% [markdown]
# ## The backward pass, step by step
#
# `gf.backprop` lists the equations that `jax.grad` evaluates, from the loss back to the pixels, with the
# factor by which each changes the norm of the gradient.

# %%
gf.backprop(loss)(fitted.params, (images[0], labels[0]))

# %% [markdown]
# ## Which pixels matter
#
# The last row of that table is the gradient of the input. It is a picture: along blue pixels, more ink
# raises the loss.

# %%
saliency = jax.vmap(jax.grad(lambda x, y: loss(fitted.params, (x, y))))(images[:10], labels[:10])
show(saliency / jnp.abs(saliency).max(1, keepdims=True), labels[:10], vmax=1.0)

# %% [markdown]
# ## Which digits are hard
#
# The norm of each example's own gradient, all from a single backward pass. A few digits dominate; they are
# badly written, or labeled in a way that one can argue about.

# %%
norms = jax.jit(gf.per_example.norms(loss))(fitted.params, digits.train)
norms

# %%
hardest = jnp.argsort(norms.total)[-10:]
show(images[hardest], [f"{label}" for label in labels[hardest]])

# %% [markdown]
# ## Switch off a node
#
# `gf.patch` returns the same function with a value replaced. Here each hidden node in turn is set to zero;
# the accuracy says how much the network needs it.


# %%
def without(node, params, data):
    """Return the accuracy with one hidden node at zero."""
    images, labels = data
    edited = gf.patch(net.apply, {"a1": lambda a1: a1.at[node].set(0.0)})
    predictions = jax.vmap(edited, (None, 0))(params, images).argmax(1)
    return (predictions == labels).mean()


needed = jax.jit(jax.vmap(without, (0, None, None)))(jnp.arange(16), fitted.params, digits.test)
_, axes = plt.subplots(figsize=(6, 2), layout="constrained")
axes.bar(range(16), needed)
axes.set(xlabel="hidden node that is off", ylabel="test accuracy", xticks=range(16))
plt.show()

# %% [markdown]
# ## Where a NaN came from
#
# The norm of a vector has no gradient at zero. The value is fine, the gradient is NaN, and the report names
# the operation, the line, the operands and the remedy.


# %%
def norm(vector):
    return jnp.sqrt(jnp.sum(vector**2))


gf.nan_origin(norm)(jnp.zeros(3))

# %% [markdown]
# ## Next
#
# - *Debug a network that does not learn*: seven faults, each found in one of these tables.
# - *Inside a GPT*: attention, lenses and patching.
# - [Your own model](../start/researcher.md): all of this on a function, an Equinox model or a Flax model.
