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
# # Inside a GPT
#
# We train a transformer of two attention layers to continue a sequence that repeats, and then find out how
# it does it. The mechanism is known as *induction* (Elhage et al., [A Mathematical Framework for
# Transformer Circuits](https://transformer-circuits.pub/2021/framework/index.html), 2021): a head of the
# first layer notes which token came before each position, and a head of the second layer searches for the
# position whose note is the current token. Nothing below is specific to this network; the same functions
# work on pretrained weights and on models of Flax and Equinox.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from gradfn.experiments.induction import attention_only, pairs, repeated

import gradfn as gf
from gradfn.train import adamw_warmup_cosine

net = attention_only(width=64, n_heads=4)
loss = gf.next_token_loss(net)
params = net.init(jax.random.key(0))
print(f"{gf.count(params):,} parameters")

# %% [markdown]
# ## The task
#
# Random tokens repeat after a while. A target of -1 is not scored: nothing could predict it.

# %%
tokens, targets = repeated(jax.random.key(1), 64)
print("input ", tokens[0])
print("target", targets[0])

# %%
fitted = gf.fit(
    gf.batch_mean(loss),
    params,
    lambda key: repeated(key, 32),
    adamw_warmup_cosine(400, 3e-3),
    steps=400,
)
params = fitted.params

# %%
_, axes = plt.subplots(figsize=(6, 2), layout="constrained")
axes.plot([row["step"] for row in fitted.history], [row["loss"] for row in fitted.history], marker="o")
axes.axhline(jnp.log(32), color="gray", linestyle=":")
axes.set(xlabel="step", ylabel="loss in nats per token")
plt.show()

# %% [markdown]
# The dotted line is a guess, ln 32. The loss leaves it suddenly: that is when the mechanism forms.
#
# ## What is inside
#
# Every value has a name. `gf.capture` records values in a forward pass; a glob selects them.

# %%
captured = jax.jit(gf.capture(net.apply, sites="*probabilities", keep="*"))(params, tokens[0])
captured

# %% [markdown]
# ## Where heads attend
#
# Attention of the four heads of both layers, for one sequence. Rows are the positions that read, columns
# the positions that are read.

# %%
_, axes = plt.subplots(2, 4, figsize=(8, 4.2), layout="constrained")
for layer in range(2):
    attention = captured[f"blocks/{layer}/attention/probabilities"].value
    for head in range(4):
        axes[layer, head].imshow(attention[head], cmap="Blues", vmin=0, vmax=1)
        axes[layer, head].set_title(f"layer {layer}, head {head}", fontsize=8)
        axes[layer, head].axis("off")
plt.show()

# %% [markdown]
# A line just below the diagonal is attention to the token before. A line further to the left is attention
# to the token *after* an earlier copy of the current one. `head_scores` measures both over 64 sequences.

# %%
scores = jax.jit(gf.circuits.head_scores(jax.vmap(net.apply, (None, 0))))(params, tokens)
scores

# %%
previous = int(scores.previous_token[0].argmax())
print(
    f"head {previous} of layer 0 attends to the token before it most: {float(scores.previous_token[0, previous]):.0%}"
)

# %% [markdown]
# ## What each layer believes
#
# The *logit lens* passes the residual stream after each layer through the last norm and the output matrix,
# as if the network ended there. The second layer makes the prediction; the first one does not know it yet.

# %%
lens = jax.jit(gf.circuits.logit_lens(net.apply))(params, tokens[0])
lens

# %% [markdown]
# ## Which part computes it
#
# Attention says where a head reads, not whether its output is used. So change one part and see. In the
# clean sequence the last token occurred before, and its successor is the right continuation; in the corrupt
# one it did not. Each run takes the output of one head from the clean sequence, all else from the corrupt
# one. 0 is the corrupt run, 1 the clean one.

# %%
clean, corrupt, right = pairs(jax.random.key(2), 16)


def swept(params, clean, corrupt, right):
    """Return the sweep of one pair."""
    return gf.circuits.patch_sweep(
        net.apply,
        (params, clean),
        (params, corrupt),
        lambda logits: jax.nn.log_softmax(logits[-1])[right],
        over="layer x head",
    )


sweep = jax.tree.map(
    lambda x: x.mean(0), jax.jit(jax.vmap(swept, (None, 0, 0, 0)))(params, clean, corrupt, right)
)
sweep

# %% [markdown]
# ## Remove a head
#
# `gf.patch` removes one head of the first layer at a time. Without the head that attends to the token
# before, the loss doubles; the others cost far less.

# %%
batch = tokens, targets
mean = gf.batch_mean(loss)
print(f"all heads: {float(mean(params, batch)):.2f} nats per token")
for head in range(4):
    edit = gf.circuits.at((..., head, slice(None)), gf.circuits.zero)
    removed = gf.patch(mean, {"blocks/0/attention/mixed": edit})
    print(f"without head {head} of layer 0: {float(jax.jit(removed)(params, batch)):.2f}")

# %% [markdown]
# ## The gradient of each token
#
# Which earlier tokens does one prediction depend on? The loss of the last position alone, differentiated
# with respect to the embedded tokens, has one gradient per position. Its norm is large where a change would
# matter.


# %%
def last_token_loss(params, tokens, target):
    """Return the loss at the last position."""
    return -jax.nn.log_softmax(net.apply(params, tokens)[-1])[target]


inspection = jax.jit(gf.inspect(last_token_loss, keep="embedded"))(params, tokens[0], targets[0][-1])
per_token = jnp.linalg.norm(inspection["embedded"].grad, axis=-1)
_, axes = plt.subplots(figsize=(8, 2), layout="constrained")
axes.bar(range(48), per_token)
axes.set_xticks(range(48), [str(token) for token in tokens[0]], fontsize=6)
axes.set(xlabel="token", ylabel="gradient norm")
plt.show()

# %% [markdown]
# Among the tallest bars are the last token itself, an earlier copy of it, and the token that followed that
# copy.
#
# ## Every gradient, layer by layer
#
# The inspection of the training loss: a healthy network has gradients of similar size in all of its blocks.

# %%
inspected = jax.jit(gf.inspect(mean, sites=["*residual", "*mixed", "logits"]))(params, batch)
inspected

# %% [markdown]
# ## Next
#
# - [Which part computes it](../circuits.md): paths between heads, attribution patching, faithfulness, on this network.
# - [From the digit network to a GPT](../transformers.md): attention by hand, scanned layers, pretrained weights.
# - `gradfn run induction`, then `gradfn report induction`: the same network in a page that runs in the browser.
