"""All layers and nets of gradfn, with every option."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import gradfn as gf
from tests.menagerie.contexts import Layer

GPT = {"vocab": 7, "context": 4, "n_layers": 1, "n_heads": 2, "width": 4}
TOKENS = (np.arange(4) * 3 % 7).astype(np.int32)


def floats(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape))


def of(net, x, **options):
    return Layer(lambda p, x: net.apply(p, x, **options), net.init(jax.random.key(1)), x)


def gpt(**options):
    return lambda: of(gf.gpt(gf.GPTConfig(**GPT | options)), TOKENS)


def with_key(net, x):
    """A net with dropout, whose key is the same in each run."""
    return of(net, x, key=jax.random.key(3))


def narrow(make):
    """A net that computes in bfloat16, which is too coarse for finite differences."""

    def built():
        layer = make()
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), layer.params)
        return layer._replace(params=params, x=jnp.asarray(layer.x), exact=False)

    return built


def _layers():
    L = gf.layers
    yield "dense", lambda: of(L.dense(4, 4), floats(4))
    yield "dense over time", lambda: of(L.dense(3, 2), floats(5, 3))
    yield "dense without bias", lambda: of(L.dense(3, 2, bias=False), floats(3))
    yield (
        "affine",
        lambda: Layer(
            lambda p, x: L.affine(p["W"], p["b"], x), {"W": floats(3, 4), "b": floats(3)}, floats(2, 4)
        ),
    )
    yield "layer_norm", lambda: of(L.layer_norm(4), floats(3, 4))
    yield "layer_norm without bias", lambda: of(L.layer_norm(4, bias=False), floats(4))
    yield "rms_norm", lambda: of(L.rms_norm(4), floats(3, 4))
    yield "group_norm", lambda: of(L.group_norm(4, 2), floats(2, 3, 4))
    yield "group_norm without bias", lambda: of(L.group_norm(4, 2, bias=False), floats(3, 4))
    yield "dropout", lambda: with_key(gf.serial(d=L.dense(4, 4), drop=L.dropout(0.5)), floats(4))
    yield "embed", lambda: of(L.embed(7, 3), TOKENS)
    yield "conv", lambda: of(L.conv(2, 2, [3]), floats(5, 2))
    yield "conv of images", lambda: of(L.conv(2, 3, [3, 2]), floats(4, 3, 2))
    yield (
        "conv, options",
        lambda: of(L.conv(4, 2, [3, 2], stride=2, padding="VALID", groups=2, dilation=2), floats(8, 7, 4)),
    )
    yield "conv without bias", lambda: of(L.conv(2, 2, [2, 2], bias=False), floats(3, 2, 2))
    pooled = {"max_pool": L.max_pool, "avg_pool": L.avg_pool}
    for (name, pool), stride in itertools.product(pooled.items(), (None, 1)):
        yield (
            f"{name}, stride {stride}",
            lambda p=pool, s=stride: of(gf.serial(c=L.conv(2, 3, [2]), pool=p([2], s)), floats(6, 2)),
        )
    for cell in ("vanilla_rnn", "gru", "lstm"):
        yield cell, lambda c=cell: of(getattr(L, c)(3, 3), floats(4, 3))
    for n_kv, causal, bias, base in itertools.product((None, 1), (False, True), (False, True), (None, 50.0)):
        options = {"n_kv_heads": n_kv, "causal": causal, "bias": bias, "rope_base": base}
        yield (
            f"attention {n_kv or 2} {causal} {bias} {base}",
            lambda o=options: of(L.attention(4, 2, **o), floats(3, 4)),
        )
    yield (
        "attend",
        lambda: Layer(
            lambda p, x: L.attend(x @ p["q"], x @ p["k"], x @ p["v"], causal=True),
            {"q": floats(4, 4), "k": floats(4, 4) + 1, "v": floats(4, 4) - 1},
            floats(3, 2, 4),
        ),
    )
    for squash in gf.layers.activations:
        yield f"feed_forward {squash}", lambda s=squash: of(L.feed_forward(3, 5, s), floats(3))
    yield "feed_forward without bias", lambda: of(L.feed_forward(3, 5, bias=False), floats(2, 3))
    yield "swiglu", lambda: of(L.swiglu(3, 4), floats(2, 3))
    yield "swiglu with bias", lambda: of(L.swiglu(3, 4, bias=True), floats(2, 3))
    yield "rope", lambda: Layer(lambda p, x: L.rope(x @ p, jnp.arange(3)), floats(4, 4), floats(3, 2, 4))
    yield (
        "sinusoidal",
        lambda: Layer(lambda p, x: (x + L.sinusoidal(3, 4).astype(x.dtype)) @ p, floats(4, 2), floats(3, 4)),
    )


def _nets():
    for squash in gf.layers.activations:
        yield f"mlp {squash}", lambda s=squash: of(gf.mlp([3, 4, 3], s), floats(3))
    yield "mlp with output", lambda: of(gf.mlp([3, 5, 4, 2], "gelu", output="sigmoid"), floats(3))
    yield "mlp of columns", lambda: of(gf.mlp([3, 4, 2], "tanh"), floats(3, 1))
    yield (
        "tower",
        lambda: of(
            gf.serial(
                start=gf.layers.dense(3, 4),
                blocks=gf.repeat(
                    gf.residual(
                        gf.serial(norm=gf.layers.layer_norm(4), mix=gf.layers.dense(4, 4), squash=jnp.tanh)
                    ),
                    2,
                ),
                out=gf.layers.dense(4, 2, bias=False),
            ),
            floats(3),
        ),
    )
    cnn = {"image": (4, 5, 1), "channels": (2,), "hidden": (3,), "classes": 2}
    yield "cnn", lambda: of(gf.cnn(**cnn), floats(20))
    yield "cnn tanh", lambda: of(gf.cnn(**cnn, activation="tanh", window=2), floats(4, 5, 1))
    yield "cnn, two", lambda: of(gf.cnn(**cnn | {"channels": (2, 3), "image": (4, 4, 1)}), floats(16))
    yield "cnn with dropout", lambda: with_key(gf.cnn(**cnn, dropout=0.5), floats(20))
    yield "cnn bfloat16", narrow(lambda: of(gf.cnn(**cnn, compute="bfloat16"), floats(20).astype(np.float32)))
    for cell, n in itertools.product(("vanilla", "gru", "lstm"), (1, 2)):
        yield f"rnn {cell} {n}", lambda c=cell, n=n: of(gf.rnn(7, 3, c, n), TOKENS)
    for positions, norm, feed in itertools.product(
        ("learned", "sinusoidal", "rope"), ("layer", "rms"), ("gelu", "swiglu", "relu")
    ):
        yield f"gpt {positions} {norm} {feed}", gpt(positions=positions, norm=norm, feed=feed)
    others = {
        "gqa": {"n_kv_heads": 1},
        "head size": {"head_size": 4, "hidden": 6},
        "untied": {"tied": False},
        "without bias": {"bias": False},
        "two": {"n_layers": 2},
        "scan": {"n_layers": 2, "scan": True},
        "remat": {"remat": True},
        "scan, remat": {"n_layers": 2, "scan": True, "remat": True},
        "llama": {
            "positions": "rope", "norm": "rms", "feed": "swiglu", "n_kv_heads": 1, "bias": False,
            "tied": False, "n_layers": 2, "scan": True,
        },
    }  # fmt: skip
    for name, options in others.items():
        yield f"gpt {name}", gpt(**options)
    for scan in (False, True):
        config = gf.GPTConfig(**GPT, dropout=0.2, scan=scan)
        yield f"gpt with dropout, scan={scan}", lambda c=config: with_key(gf.gpt(c), TOKENS)
        yield f"gpt bfloat16, scan={scan}", narrow(gpt(compute="bfloat16", scan=scan))
    vit = {"image": (4, 4, 1), "patch": 2, "classes": 3, "n_layers": 1, "n_heads": 2, "width": 4}
    for pool, scan in itertools.product(("mean", "class"), (False, True)):
        config = gf.ViTConfig(**vit, pool=pool, scan=scan)
        yield f"vit {pool}, scan={scan}", lambda c=config: of(gf.vit(c), floats(4, 4))


LAYERS = {f"gradfn {name}": make for name, make in itertools.chain(_layers(), _nets())}
