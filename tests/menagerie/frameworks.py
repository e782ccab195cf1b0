"""Layers and example models of Equinox, Flax Linen, Flax NNX and Haiku, built from their public classes."""

import inspect

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.menagerie.contexts import Layer

KEY = jax.random.key(1)
# Layers that would compute in float32 by default.
WIDE = {"param_dtype": jnp.float64, "dtype": jnp.float64}
TOKENS = (np.arange(4) * 3 % 5).astype(np.int32)


def floats(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


# --- Equinox ---------------------------------------------------------------------------------------------------------


def of_equinox(model, x, call=lambda model, x: model(x)):
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    return Layer(lambda p, x: call(eqx.combine(p, rest), x), params, x)


def with_state(make, x, call=lambda model, x, state: model(x, state)[0]):
    """A model of Equinox with a state, such as running means; its new state is dropped."""
    model, state = eqx.nn.make_with_state(make)()
    state = jax.tree.map(lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a, state)
    leaves, structure = jax.tree.flatten(state)
    # A state of Equinox can be used once.
    fresh = lambda: jax.tree.unflatten(structure, leaves)  # noqa: E731
    return of_equinox(model, x, lambda model, x: call(model, x, fresh()))


class Tied(eqx.Module):
    """Equinox's example of shared layers: the embedding is the head."""

    shared: eqx.nn.Shared

    def __init__(self):
        parts = eqx.nn.Embedding(5, 3, key=KEY), eqx.nn.Linear(3, 5, use_bias=False, key=KEY)
        self.shared = eqx.nn.Shared(parts, lambda pair: pair[1].weight, lambda pair: pair[0].weight)

    def __call__(self, tokens):
        embedding, head = self.shared()
        return jax.vmap(head)(jnp.tanh(jax.vmap(embedding)(tokens)))


class Recurrent(eqx.Module):
    """Equinox's example of a recurrent network: a GRU in a scan."""

    cell: eqx.nn.GRUCell
    linear: eqx.nn.Linear

    def __init__(self):
        self.cell = eqx.nn.GRUCell(2, 3, key=KEY)
        self.linear = eqx.nn.Linear(3, 1, key=KEY)

    def __call__(self, xs):
        step = lambda h, x: (self.cell(x, h), None)  # noqa: E731
        return jax.nn.sigmoid(self.linear(jax.lax.scan(step, jnp.zeros(3, xs.dtype), xs)[0]))


class Generator(eqx.Module):
    """Equinox's example of a deep convolutional generator, small."""

    layers: list

    def __init__(self):
        self.layers = [
            eqx.nn.ConvTranspose2d(2, 4, 3, 1, use_bias=False, key=KEY),
            jax.nn.relu,
            eqx.nn.ConvTranspose2d(4, 1, 4, 2, padding=1, use_bias=False, key=KEY),
            jax.nn.tanh,
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Mixer(eqx.Module):
    """Equinox's example of an MLP mixer, one block."""

    patch: eqx.nn.MLP
    hidden: eqx.nn.MLP
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm

    def __init__(self):
        self.patch, self.hidden = eqx.nn.MLP(4, 4, 5, 1, key=KEY), eqx.nn.MLP(3, 3, 5, 1, key=KEY)
        self.norm1, self.norm2 = eqx.nn.LayerNorm((3, 4)), eqx.nn.LayerNorm((4, 3))

    def __call__(self, y):
        y = y + jax.vmap(self.patch)(self.norm1(y))
        y = y.T
        return (y + jax.vmap(self.hidden)(self.norm2(y))).T


def _equinox():
    N = eqx.nn
    linear = lambda n=4, m=4: N.Linear(n, m, key=KEY)  # noqa: E731
    yield "Linear", lambda: of_equinox(linear(), floats(4))
    yield "Linear, scalar", lambda: of_equinox(N.Linear("scalar", 3, key=KEY), floats())
    yield "Linear, no bias", lambda: of_equinox(N.Linear(4, 3, use_bias=False, key=KEY), floats(4))
    yield "Linear, vmap", lambda: of_equinox(linear(3, 3), floats(2, 3), lambda m, x: jax.vmap(m)(x))
    yield "Identity", lambda: of_equinox(N.Sequential([linear(), N.Identity()]), floats(4))
    for name, n in (("Conv1d", 1), ("Conv2d", 2), ("Conv3d", 3)):
        x = floats(2, *(4, 3, 2)[:n])
        yield name, lambda name=name, x=x: of_equinox(getattr(N, name)(2, 2, 2, padding="SAME", key=KEY), x)
        transposed = name.replace("Conv", "ConvTranspose")
        yield (
            transposed,
            lambda name=transposed, x=x: of_equinox(getattr(N, name)(2, 2, 2, 2, key=KEY), x),
        )
        for pool in ("AvgPool", "MaxPool"):
            both = lambda name, x=x, n=n: of_equinox(  # noqa: E731
                N.Sequential([N.Conv(n, 2, 2, 1, key=KEY), getattr(N, name)(2, padding=1)]), x
            )
            yield f"{pool}{n}d", lambda both=both, name=f"{pool}{n}d": both(name)
            adaptive = f"Adaptive{pool}{n}d"
            yield (
                adaptive,
                lambda name=adaptive, x=x, n=n: of_equinox(
                    N.Sequential([N.Conv(n, 2, 2, 1, key=KEY), getattr(N, name)(2)]), x
                ),
            )
    yield "Conv", lambda: of_equinox(N.Conv(1, 2, 4, 3, 2, 1, 1, 2, key=KEY), floats(2, 6))
    yield (
        "Conv, circular",
        lambda: of_equinox(
            N.Conv(1, 2, 2, 3, padding="SAME", padding_mode="CIRCULAR", key=KEY), floats(2, 4)
        ),
    )
    yield (
        "ConvTranspose",
        lambda: of_equinox(N.ConvTranspose(1, 2, 4, 3, 2, 1, 1, 1, 2, key=KEY), floats(2, 3)),
    )
    yield (
        "Pool",
        lambda: of_equinox(
            N.Sequential([N.Conv1d(1, 2, 2, key=KEY), N.Pool(0.0, jax.lax.add, 1, 2)]), floats(1, 5)
        ),
    )
    yield (
        "AdaptivePool",
        lambda: of_equinox(
            N.Sequential([N.Conv1d(1, 2, 1, key=KEY), N.AdaptivePool(2, 1, jnp.max)]), floats(1, 5)
        ),
    )
    yield (
        "Dropout",
        lambda: of_equinox(
            N.Sequential([linear(), N.Dropout(0.5)]), floats(4), lambda m, x: m(x, key=jax.random.key(2))
        ),
    )
    yield "Embedding", lambda: of_equinox(N.Embedding(5, 3, key=KEY), TOKENS, lambda m, x: jax.vmap(m)(x))
    yield "GRUCell", lambda: of_equinox(N.GRUCell(3, 3, key=KEY), floats(3), lambda m, x: m(x, jnp.sin(x)))
    yield (
        "LSTMCell",
        lambda: of_equinox(N.LSTMCell(3, 3, key=KEY), floats(3), lambda m, x: m(x, (jnp.sin(x), jnp.cos(x)))),
    )
    yield "LayerNorm", lambda: of_equinox(N.LayerNorm(4), floats(4))
    yield "LayerNorm, two axes", lambda: of_equinox(N.LayerNorm((2, 3), use_bias=False), floats(2, 3))
    yield "RMSNorm", lambda: of_equinox(N.RMSNorm(4), floats(4))
    yield "GroupNorm", lambda: of_equinox(N.GroupNorm(2, 4), floats(4, 3))
    yield "BatchNorm", lambda: with_state(
        lambda: N.BatchNorm(3, "batch", mode="batch"), floats(4, 3),
        lambda m, x, s: jax.vmap(m, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, s)[0],
    )  # fmt: skip
    yield "BatchNorm, ema", lambda: with_state(
        lambda: N.BatchNorm(3, "batch", mode="ema"), floats(4, 3),
        lambda m, x, s: jax.vmap(m, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, s)[0],
    )  # fmt: skip
    yield "Lambda", lambda: of_equinox(N.Sequential([linear(), N.Lambda(jnp.tanh), linear()]), floats(4))
    for depth in (0, 1, 2):
        yield f"MLP {depth}", lambda d=depth: of_equinox(N.MLP(3, 3, 4, d, jax.nn.gelu, key=KEY), floats(3))
    yield "MLP scalar", lambda: of_equinox(N.MLP("scalar", "scalar", 4, 2, key=KEY), floats())
    yield (
        "MultiheadAttention",
        lambda: of_equinox(N.MultiheadAttention(2, 4, key=KEY), floats(3, 4), lambda m, x: m(x, x, x)),
    )
    yield (
        "MultiheadAttention, all",
        lambda: of_equinox(
            N.MultiheadAttention(2, 4, 4, 4, 3, 2, 3, True, True, True, True, dropout_p=0.3, key=KEY),
            floats(3, 4),
            lambda m, x: m(x, x + 1, jnp.sin(x), jnp.tril(jnp.ones((3, 3), bool)), key=jax.random.key(2)),
        ),
    )
    yield "PReLU", lambda: of_equinox(N.Sequential([linear(), N.Lambda(N.PReLU(0.3))]), floats(4))
    yield (
        "RotaryPositionalEmbedding",
        lambda: of_equinox(
            N.Sequential([N.LayerNorm((3, 4)), N.RotaryPositionalEmbedding(4, dtype=jnp.float64)]),
            floats(3, 4),
        ),
    )
    yield "Sequential", lambda: of_equinox(N.Sequential([linear(), N.LayerNorm(4), linear()]), floats(4))
    yield "Shared", lambda: of_equinox(Tied(), TOKENS)
    yield (
        "SpectralNorm",
        lambda: with_state(lambda: N.SpectralNorm(linear(), "weight", inference=True, key=KEY), floats(4)),
    )
    yield (
        "SpectralNorm, training",
        lambda: with_state(lambda: N.SpectralNorm(linear(), "weight", key=KEY), floats(4)),
    )
    yield (
        "StatefulLayer",
        lambda: with_state(
            lambda: N.Sequential([linear(), N.SpectralNorm(linear(), "weight", inference=True, key=KEY)]),
            floats(4),
        ),
    )
    yield "WeightNorm", lambda: of_equinox(N.WeightNorm(linear()), floats(4))
    yield "example RNN", lambda: of_equinox(Recurrent(), floats(4, 2))
    yield "example CNN", lambda: of_equinox(
        N.Sequential([
            N.Conv2d(1, 2, 2, key=KEY), N.MaxPool2d(2), N.Lambda(jax.nn.relu), N.Lambda(jnp.ravel),
            linear(18, 4), N.Lambda(jax.nn.sigmoid), linear(4, 3), N.Lambda(jax.nn.log_softmax),
        ]), floats(1, 5, 5),
    )  # fmt: skip
    yield "example generator", lambda: of_equinox(Generator(), floats(2, 1, 1))
    yield "example mixer", lambda: of_equinox(Mixer(), floats(3, 4))


# --- Flax Linen ------------------------------------------------------------------------------------------------------


def of_linen(module, *xs, rngs=(), **options):
    keys = {name: jax.random.key(i) for i, name in enumerate(("params", *rngs))}
    variables = module.init(keys, *xs, **options)
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def f(p, xs):
        keys = {name: jax.random.key(7) for name in rngs}
        out, _ = module.apply({"params": p, **_double(rest)}, *xs, rngs=keys, mutable=[*rest], **options)
        return out

    params = variables.get("params", {})
    return Layer(f, params, xs) if len(xs) > 1 else Layer(lambda p, x: f(p, (x,)), params, xs[0])


def _double(tree):
    return jax.tree.map(lambda a: a.astype(float) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


class LinenCNN(nn.Module):
    """Flax's MNIST example, small."""

    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(nn.relu(nn.Conv(2, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.avg_pool(nn.relu(nn.Conv(3, (2, 2))(x)), (2, 2), (1, 1))
        return nn.Dense(3)(nn.relu(nn.Dense(4)(x.reshape(-1))))  # [height, width, channels] -> [features]


class LinenBlock(nn.Module):
    """A block of Flax's language model example, small."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, deterministic=True)(y, y)
        return x + nn.Dense(4)(nn.gelu(nn.Dense(6)(nn.LayerNorm()(x))))


class LinenLM(nn.Module):
    """Flax's language model example, small."""

    remat: bool = False
    scan: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(5, 4)
        x = embed(tokens)
        block = nn.remat(LinenBlock) if self.remat else LinenBlock
        if self.scan:
            step = nn.scan(
                lambda module, x, _: (module(x), None), variable_axes={"params": 0},
                split_rngs={"params": True}, length=2,
            )  # fmt: skip
            x, _ = step(block(), x, None)
        else:
            x = block()(block()(x))
        return embed.attend(nn.LayerNorm()(x))


class LinenVAE(nn.Module):
    """Flax's variational autoencoder example, small."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(5, name="encode")(x))
        mean, logvar = nn.Dense(2, name="mean")(h), nn.Dense(2, name="logvar")(h)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(self.make_rng("noise"), mean.shape, mean.dtype)
        return nn.Dense(x.shape[-1])(nn.relu(nn.Dense(5)(z))), mean, logvar


class LinenResNet(nn.Module):
    """A block of Flax's ResNet example, small, with batch normalization in training."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(2, (1, 1), use_bias=False)(x)))
        y = nn.BatchNorm(use_running_average=False)(nn.Conv(3, (3, 3), use_bias=False)(y))
        return nn.relu(y + nn.BatchNorm(use_running_average=False)(nn.Conv(3, (1, 1))(x))).mean((1, 2))


class LinenVmap(nn.Module):
    """Linen's lifted vmap: an ensemble."""

    @nn.compact
    def __call__(self, x):
        return nn.vmap(
            nn.Dense, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2
        )(3)(x)


def _linen():
    yield "Dense", lambda: of_linen(nn.Dense(4), floats(4))
    yield "Dense over time", lambda: of_linen(nn.Dense(3, use_bias=False), floats(2, 3))
    yield "DenseGeneral", lambda: of_linen(nn.DenseGeneral((2, 3), axis=(-2, -1)), floats(2, 2, 3))
    yield (
        "DenseGeneral, batched",
        lambda: of_linen(nn.DenseGeneral(3, axis=-1, batch_dims=(0,)), floats(2, 3)),
    )
    yield "Einsum", lambda: of_linen(nn.Einsum((3, 2, 4), "...x,xyz->...yz"), floats(2, 3))
    for n in (1, 2, 3):
        yield f"Conv {n}d", lambda n=n: of_linen(nn.Conv(2, (2,) * n), floats(*(4, 3, 2)[:n], 2))
    yield (
        "Conv, options",
        lambda: of_linen(
            nn.Conv(4, (3,), 2, "CIRCULAR", kernel_dilation=2, feature_group_count=2), floats(6, 2)
        ),
    )
    yield "Conv, causal", lambda: of_linen(nn.Conv(2, (3,), padding="CAUSAL"), floats(5, 2))
    yield "ConvLocal", lambda: of_linen(nn.ConvLocal(2, (2,)), floats(4, 2))
    yield "ConvTranspose", lambda: of_linen(nn.ConvTranspose(2, (3,), (2,)), floats(3, 2))
    yield (
        "ConvTranspose, circular",
        lambda: of_linen(nn.ConvTranspose(2, (2,), padding="CIRCULAR"), floats(3, 2)),
    )
    yield "Embed", lambda: of_linen(nn.Embed(5, 3), TOKENS)
    yield (
        "Dropout",
        lambda: of_linen(
            nn.Sequential([nn.Dense(4), nn.Dropout(0.5, deterministic=False)]), floats(4), rngs=("dropout",)
        ),
    )
    norms = {
        "LayerNorm": nn.LayerNorm(), "LayerNorm, slow": nn.LayerNorm(use_fast_variance=False),
        "RMSNorm": nn.RMSNorm(), "GroupNorm": nn.GroupNorm(2), "InstanceNorm": nn.InstanceNorm(),
        "BatchNorm": nn.BatchNorm(use_running_average=False),
        "BatchNorm, fixed": nn.BatchNorm(use_running_average=True),
    }  # fmt: skip
    for name, module in norms.items():
        yield name, lambda m=module: of_linen(m, floats(2, 3, 4))
    for update in (False, True):
        yield (
            f"SpectralNorm {update}",
            lambda u=update: of_linen(nn.SpectralNorm(nn.Dense(3)), floats(2, 3), update_stats=u),
        )
    yield "WeightNorm", lambda: of_linen(nn.WeightNorm(nn.Dense(3)), floats(2, 3))
    yield "PReLU", lambda: of_linen(nn.Sequential([nn.Dense(3), nn.PReLU()]), floats(2, 3))
    cells = {
        "SimpleCell": nn.SimpleCell, "GRUCell": nn.GRUCell, "LSTMCell": nn.LSTMCell, "MGUCell": nn.MGUCell,
        "OptimizedLSTMCell": nn.OptimizedLSTMCell,
    }  # fmt: skip
    for name, cell in cells.items():
        make = lambda cell=cell: cell(3, param_dtype=jnp.float64)  # noqa: E731
        yield f"RNN, {name}", lambda make=make: of_linen(nn.RNN(make()), jnp.asarray(floats(3, 2), float))
    yield (
        "RNN, ConvLSTMCell",
        lambda: of_linen(
            nn.RNN(nn.ConvLSTMCell(2, (2,), param_dtype=jnp.float64)), jnp.asarray(floats(1, 2, 3, 1), float)
        ),
    )
    yield (
        "Bidirectional",
        lambda: of_linen(
            nn.Bidirectional(
                nn.RNN(nn.GRUCell(2, param_dtype=jnp.float64)), nn.RNN(nn.GRUCell(2, param_dtype=jnp.float64))
            ),
            jnp.asarray(floats(3, 2), float),
        ),
    )
    attentions = {
        "MultiHeadDotProductAttention": nn.MultiHeadDotProductAttention(2),
        "MultiHeadAttention": nn.MultiHeadAttention(2, qkv_features=6, out_features=3, normalize_qk=True),
        "SelfAttention": nn.SelfAttention(2, use_bias=False),
    }
    for name, module in attentions.items():
        yield name, lambda m=module: of_linen(m, floats(3, 4))
    yield (
        "MultiHeadAttention, causal",
        lambda: of_linen(
            nn.MultiHeadAttention(2, dropout_rate=0.3, deterministic=False),
            floats(3, 4),
            rngs=("dropout",),
            mask=nn.make_causal_mask(jnp.ones(3)),
        ),
    )
    yield "Sequential", lambda: of_linen(nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)]), floats(3))
    yield "lifted vmap", lambda: of_linen(LinenVmap(), floats(3))
    yield "example CNN", lambda: of_linen(LinenCNN(), floats(4, 4, 1))
    yield "example LM", lambda: of_linen(LinenLM(), TOKENS)
    yield "example LM, remat", lambda: of_linen(LinenLM(remat=True), TOKENS)
    yield "example LM, scan", lambda: of_linen(LinenLM(scan=True), TOKENS)
    yield "example VAE", lambda: of_linen(LinenVAE(), floats(4), rngs=("noise",))
    yield "example ResNet block", lambda: of_linen(LinenResNet(), floats(2, 3, 3, 2))


# --- Flax NNX --------------------------------------------------------------------------------------------------------


def of_nnx(make, x, call=lambda model, x: model(x), exact=True):
    model = make(nnx.Rngs(1))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    rest = _double(rest) if exact else rest
    return Layer(lambda p, x: call(nnx.merge(graph, p, rest, copy=True), x), params, x, exact)


class NNXMLP(nnx.Module):
    """NNX's first example: a perceptron with batch normalization and dropout."""

    def __init__(self, rngs):
        self.linear1 = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.linear2 = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.linear2(nnx.relu(self.dropout(self.norm(self.linear1(x)))))


class NNXCNN(nnx.Module):
    """NNX's MNIST example, small."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.linear1, self.linear2 = nnx.Linear(8, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.avg_pool(nnx.relu(self.conv(x)), (2, 2), (2, 2))
        return self.linear2(nnx.relu(self.linear1(x.reshape(-1))))  # [height, width, channels] -> [features]


class NNXBlock(nnx.Module):
    """A transformer block of NNX."""

    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(4, rngs=rngs), nnx.RMSNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NNXScanned(nnx.Module):
    """NNX's example of layers under its own scan."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            return NNXBlock(rngs)

        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return run(x, self.blocks)


class NNXRemat(nnx.Module):
    def __init__(self, rngs):
        self.block = NNXBlock(rngs)

    def __call__(self, x):
        return nnx.remat(lambda block, x: block(x))(self.block, x)


def _nnx():
    N = nnx
    linear = lambda r, n=4, m=4: N.Linear(n, m, rngs=r)  # noqa: E731
    yield "Linear", lambda: of_nnx(linear, floats(4))
    yield "Linear, no bias", lambda: of_nnx(lambda r: N.Linear(3, 2, use_bias=False, rngs=r), floats(2, 3))
    yield (
        "LinearGeneral",
        lambda: of_nnx(lambda r: N.LinearGeneral((2, 3), (2, 2), axis=(-2, -1), rngs=r), floats(2, 2, 3)),
    )
    yield (
        "Einsum",
        lambda: of_nnx(lambda r: N.Einsum("nta,hab->nthb", (2, 3, 4), (2, 4), rngs=r), floats(1, 2, 3)),
    )
    for n in (1, 2, 3):
        yield (
            f"Conv {n}d",
            lambda n=n: of_nnx(lambda r: N.Conv(2, 2, (2,) * n, rngs=r), floats(*(4, 3, 2)[:n], 2)),
        )
    yield (
        "Conv, options",
        lambda: of_nnx(
            lambda r: N.Conv(
                2, 4, (3,), 2, padding="CIRCULAR", kernel_dilation=2, feature_group_count=2, rngs=r
            ),
            floats(6, 2),
        ),
    )
    yield "ConvTranspose", lambda: of_nnx(lambda r: N.ConvTranspose(2, 2, (3,), (2,), rngs=r), floats(3, 2))
    yield "Embed", lambda: of_nnx(lambda r: N.Embed(5, 3, rngs=r, **WIDE), TOKENS)
    yield (
        "Embed, attend",
        lambda: of_nnx(
            lambda r: N.Embed(5, 3, rngs=r, **WIDE), TOKENS, lambda m, x: m.attend(jnp.tanh(m(x)))
        ),
    )
    yield "Dropout", lambda: of_nnx(lambda r: N.Sequential(linear(r), N.Dropout(0.5, rngs=r)), floats(4))
    norms = {
        "LayerNorm": lambda r: N.LayerNorm(4, rngs=r), "RMSNorm": lambda r: N.RMSNorm(4, rngs=r),
        "GroupNorm": lambda r: N.GroupNorm(4, 2, rngs=r), "InstanceNorm": lambda r: N.InstanceNorm(4, rngs=r),
        "BatchNorm": lambda r: N.BatchNorm(4, rngs=r),
        "BatchNorm, fixed": lambda r: N.BatchNorm(4, use_running_average=True, rngs=r),
        "SpectralNorm": lambda r: N.SpectralNorm(linear(r), rngs=r),
        "WeightNorm": lambda r: N.WeightNorm(linear(r), rngs=r),
        "PReLU": lambda r: N.Sequential(linear(r), N.PReLU()),
        "LoRA": lambda r: N.LoRA(4, 2, 3, base_module=linear(r, 4, 3), rngs=r),
        "LoRALinear": lambda r: N.LoRALinear(4, 3, lora_rank=2, rngs=r),
    }  # fmt: skip
    for name, make in norms.items():
        yield name, lambda make=make: of_nnx(make, floats(2, 3, 4))
    for name in ("SimpleCell", "GRUCell", "LSTMCell", "OptimizedLSTMCell"):
        cell = lambda r, name=name: N.RNN(getattr(N, name)(2, 3, rngs=r, **WIDE))  # noqa: E731
        yield f"RNN, {name}", lambda cell=cell: of_nnx(cell, floats(1, 3, 2))
    yield (
        "Bidirectional",
        lambda: of_nnx(
            lambda r: N.Bidirectional(
                N.RNN(N.GRUCell(2, 2, rngs=r, **WIDE)), N.RNN(N.GRUCell(2, 2, rngs=r, **WIDE)), rngs=r
            ),
            floats(1, 3, 2),
        ),
    )
    # jax.nn.dot_product_attention computes in float32: too coarse for finite differences.
    attention = lambda **options: lambda r: N.MultiHeadAttention(2, 4, decode=False, rngs=r, **options)  # noqa: E731
    yield "MultiHeadAttention", lambda: of_nnx(attention(), floats(3, 4), exact=False)
    yield "MultiHeadAttention, all", lambda: of_nnx(
        attention(qkv_features=6, out_features=3, normalize_qk=True, dropout_rate=0.3, deterministic=False),
        floats(3, 4), lambda m, x: m(x, x + 1, jnp.sin(x), mask=nnx.make_causal_mask(jnp.ones(3))), exact=False,
    )  # fmt: skip
    yield "Sequential", lambda: of_nnx(lambda r: N.Sequential(linear(r), jnp.tanh, linear(r)), floats(4))
    yield (
        "List",
        lambda: of_nnx(
            lambda r: N.List([linear(r), linear(r)]), floats(4), lambda m, x: m[1](jnp.sin(m[0](x)))
        ),
    )
    yield (
        "Dict",
        lambda: of_nnx(
            lambda r: N.Dict(a=linear(r), b=linear(r)), floats(4), lambda m, x: m.b(jnp.sin(m.a(x)))
        ),
    )
    yield "example MLP", lambda: of_nnx(NNXMLP, floats(3, 3))
    yield "example CNN", lambda: of_nnx(NNXCNN, floats(4, 4, 1))
    yield "example block", lambda: of_nnx(NNXBlock, floats(3, 4), exact=False)
    yield "example scan", lambda: of_nnx(NNXScanned, floats(2, 4), exact=False)
    yield "example remat", lambda: of_nnx(NNXRemat, floats(2, 4), exact=False)


# --- Haiku -----------------------------------------------------------------------------------------------------------


def of_haiku(run, x):
    pair = hk.transform_with_state(run)
    params, state = pair.init(KEY, x)
    return Layer(lambda p, x: pair.apply(p, _double(state), jax.random.key(7), x)[0], params, x)


def _haiku():
    simple = {
        "Linear": (lambda: hk.Linear(4), (4,)),
        "Linear, no bias": (lambda: hk.Linear(3, with_bias=False), (2, 3)),
        "Bias": (lambda: hk.Bias(), (2, 3)),
        "Conv1D": (lambda: hk.Conv1D(2, 2), (4, 2)),
        "Conv2D": (lambda: hk.Conv2D(2, (2, 3), 2, padding="VALID"), (5, 4, 2)),
        "Conv3D": (lambda: hk.Conv3D(2, 2), (2, 2, 2, 1)),
        "ConvND": (lambda: hk.ConvND(1, 4, 3, rate=2, feature_group_count=2), (6, 2)),
        "Conv1DTranspose": (lambda: hk.Conv1DTranspose(2, 3, 2), (3, 2)),
        "Conv2DTranspose": (lambda: hk.Conv2DTranspose(2, 2, 2), (2, 3, 2)),
        "Conv3DTranspose": (lambda: hk.Conv3DTranspose(1, 2), (2, 2, 2, 1)),
        "ConvNDTranspose": (lambda: hk.ConvNDTranspose(1, 2, 3), (3, 2)),
        "DepthwiseConv1D": (lambda: hk.DepthwiseConv1D(2, 2, data_format="NWC"), (1, 4, 2)),
        "DepthwiseConv2D": (lambda: hk.DepthwiseConv2D(1, 2), (1, 3, 3, 2)),
        "DepthwiseConv3D": (lambda: hk.DepthwiseConv3D(1, 2), (1, 2, 2, 2, 2)),
        "SeparableDepthwiseConv2D": (lambda: hk.SeparableDepthwiseConv2D(1, 2), (1, 3, 3, 2)),
        "LayerNorm": (lambda: hk.LayerNorm(-1, True, True), (2, 4)),
        "LayerNorm, two axes": (lambda: hk.LayerNorm((0, 1), True, False, param_axis=-1), (2, 4)),
        "RMSNorm": (lambda: hk.RMSNorm(-1), (2, 4)),
        "GroupNorm": (lambda: hk.GroupNorm(2), (1, 3, 4)),
        "InstanceNorm": (lambda: hk.InstanceNorm(True, True), (1, 3, 4)),
        "MLP": (lambda: hk.nets.MLP([4, 3]), (3,)),
        "MLP, final": (lambda: hk.nets.MLP([4, 3], activation=jnp.tanh, activate_final=True), (3,)),
        "Sequential": (lambda: hk.Sequential([hk.Linear(3), jnp.sin, hk.Linear(2)]), (3,)),
        "Flatten": (lambda: hk.Sequential([hk.Linear(3), hk.Flatten(), hk.Linear(2)]), (2, 3)),
        "Reshape": (lambda: hk.Sequential([hk.Linear(4), hk.Reshape((2, 2)), hk.Linear(2)]), (2, 3)),
        "AvgPool": (lambda: hk.Sequential([hk.Conv1D(2, 2), hk.AvgPool(2, 1, "SAME")]), (1, 4, 2)),
        "MaxPool": (lambda: hk.Sequential([hk.Conv1D(2, 2), hk.MaxPool((2, 1), (2, 1), "SAME")]), (1, 4, 2)),
    }
    for name, (module, shape) in simple.items():
        yield name, lambda m=module, s=shape: of_haiku(lambda x: m()(x), floats(*s))
    for test in (False, True):
        yield (
            f"BatchNorm {test}",
            lambda t=test: of_haiku(
                lambda x: hk.BatchNorm(True, True, 0.9)(x, True, test_local_stats=t), floats(3, 4)
            ),
        )
    yield (
        "ExponentialMovingAverage",
        lambda: of_haiku(lambda x: hk.ExponentialMovingAverage(0.9)(hk.Linear(3)(x)), floats(3)),
    )
    yield (
        "SpectralNorm",
        lambda: of_haiku(
            lambda x: (
                x @ hk.SpectralNorm()(hk.get_parameter("w", (3, 3), x.dtype, hk.initializers.RandomNormal()))
            ),
            floats(2, 3),
        ),
    )
    yield "Embed", lambda: of_haiku(lambda x: hk.Embed(5, 3)(x), TOKENS)
    yield "Embed, one hot", lambda: of_haiku(lambda x: hk.Embed(5, 3, lookup_style="ONE_HOT")(x), TOKENS)
    yield (
        "MultiHeadAttention",
        lambda: of_haiku(
            lambda x: hk.MultiHeadAttention(2, 3, w_init=hk.initializers.RandomNormal())(x, x, jnp.sin(x)),
            floats(3, 4),
        ),
    )
    yield (
        "MultiHeadAttention, causal",
        lambda: of_haiku(
            lambda x: hk.MultiHeadAttention(2, 2, w_init=hk.initializers.RandomNormal(), model_size=4)(
                x, x, x, jnp.tril(jnp.ones((1, 3, 3), bool))
            ),
            floats(3, 4),
        ),
    )
    cores = {
        "VanillaRNN": lambda: hk.VanillaRNN(3), "GRU": lambda: hk.GRU(3), "LSTM": lambda: hk.LSTM(3),
        "DeepRNN": lambda: hk.DeepRNN([hk.GRU(3), jnp.tanh, hk.VanillaRNN(2)]),
        "IdentityCore": lambda: hk.DeepRNN([hk.Linear(3), hk.IdentityCore()]),
    }  # fmt: skip

    def unrolled(core, unroll, x):
        core = core()
        state = jax.tree.map(lambda a: a.astype(x.dtype), core.initial_state(1))
        return unroll(core, x, state)[0]

    for name, core in cores.items():
        for unroll in (hk.dynamic_unroll, hk.static_unroll):
            yield (
                f"{name}, {unroll.__name__}",
                lambda c=core, u=unroll: of_haiku(lambda x: unrolled(c, u, x), floats(3, 1, 2)),
            )
    convs = {
        "Conv1DLSTM": (hk.Conv1DLSTM, (3,)),
        "Conv2DLSTM": (hk.Conv2DLSTM, (2, 2)),
        "Conv3DLSTM": (hk.Conv3DLSTM, (2, 1, 2)),
    }
    for name, (core, shape) in convs.items():
        yield (
            name,
            lambda c=core, s=shape: of_haiku(
                lambda x: unrolled(lambda: c(s, 2, 2), hk.dynamic_unroll, x), floats(2, 1, *s, 1)
            ),
        )
    yield (
        "ResetCore",
        lambda: of_haiku(
            lambda x: unrolled(
                lambda: hk.ResetCore(hk.GRU(3)),
                lambda core, x, s: hk.dynamic_unroll(core, (x, x[..., 0] > 0), s),
                x,
            ),
            floats(3, 1, 2),
        ),
    )
    yield (
        "dropout",
        lambda: of_haiku(
            lambda x: hk.Linear(2)(hk.dropout(hk.next_rng_key(), 0.5, hk.Linear(4)(x))), floats(3)
        ),
    )
    yield (
        "layer_stack",
        lambda: of_haiku(
            lambda x: hk.experimental.layer_stack(2)(lambda x: jnp.tanh(hk.Linear(3)(x)))(x), floats(3)
        ),
    )
    yield (
        "MobileNetV1",
        lambda: of_haiku(lambda x: hk.nets.MobileNetV1((1, 1), (2, 3), 2)(x, True), floats(2, 4, 4, 1)),
    )
    for version in (False, True):
        yield f"ResNet, v2={version}", lambda v=version: of_haiku(
            lambda x: hk.nets.ResNet(
                (1, 1, 1, 1), 2, resnet_v2=v, bottleneck=v, channels_per_group=(4, 4, 4, 4),
                use_projection=(True,) * 4, initial_conv_config={"output_channels": 2, "kernel_shape": 3, "stride": 1},
            )(x, True),
            floats(1, 4, 4, 1),
        )  # fmt: skip


# --- All -------------------------------------------------------------------------------------------------------------

LAYERS = {
    f"{framework} {name}": make
    for framework, layers in (
        ("Equinox", _equinox()),
        ("Linen", _linen()),
        ("NNX", _nnx()),
        ("Haiku", _haiku()),
    )
    for name, make in layers
}

# Public classes without an entry of their own, and why.
OTHERS = {
    "Equinox": {"StateIndex": "no layer, but an index into a state"},
    "Linen": {
        "Module": "the base class", "RNNCellBase": "a base class",
        "Fp8DirectDotGeneralOp": "computes in float8", "Fp8DotGeneral": "computes in float8",
        "Fp8DotGeneralOp": "computes in float8", "Fp8Einsum": "computes in float8",
        "NANOOFp8DotGeneralOp": "computes in float8",
    },
    "NNX": {"Module": "the base class", "RNNCellBase": "a base class"},
    "Haiku": {
        "Module": "the base class", "RNNCore": "a base class",
        "EMAParamsTree": "applies to trees of parameters after a step",
        "SNParamsTree": "applies to trees of parameters after a step",
        **{f"ResNet{n}": "ResNet with more layers" for n in (18, 34, 50, 101, 152, 200)},
        "VectorQuantizer": "a derivative that is defined to be another one (straight through)",
        "VectorQuantizerEMA": "a derivative that is defined to be another one (straight through)",
    },
}  # fmt: skip


def public_classes():
    """Return the public layer classes of each framework, by name."""
    modules = {"Equinox": ([eqx.nn], eqx.Module), "Linen": ([nn], nn.Module), "NNX": ([nnx], nnx.Module)}
    modules["Haiku"] = [hk, hk.nets], hk.Module
    return {
        framework: sorted(
            name
            for space in spaces
            for name, kind in inspect.getmembers(space, inspect.isclass)
            if issubclass(kind, base) and not name.startswith("_")
        )
        for framework, (spaces, base) in modules.items()
    }
