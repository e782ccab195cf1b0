"""Every net's programs lower for GPUs and TPUs, on a machine that has neither."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import gradfn as gf
from gradfn.per_example import ghost

GPT = {"vocab": 17, "context": 8, "n_layers": 1, "n_heads": 2, "width": 8}
LLAMA = {"n_kv_heads": 1, "positions": "rope", "norm": "rms", "feed": "swiglu", "bias": False, "tied": False}
VIT = {"image": (8, 8, 1), "patch": 4, "classes": 3, "n_layers": 1, "n_heads": 2, "width": 8}
NETS = {
    "mlp": lambda: gf.mlp([64, 5, 3]),
    "cnn": lambda: gf.cnn([8, 8, 1], [2, 3], [5], 3),
    "rnn": lambda: gf.rnn(17, 4, "vanilla"),
    "lstm": lambda: gf.rnn(17, 4, "lstm"),
    "gpt": lambda: gf.gpt(gf.GPTConfig(**GPT)),
    "gpt, scanned": lambda: gf.gpt(gf.GPTConfig(**GPT | {"n_layers": 2}, scan=True)),
    "gpt, bfloat16": lambda: gf.gpt(gf.GPTConfig(**GPT, compute="bfloat16")),
    "llama": lambda: gf.gpt(gf.GPTConfig(**GPT, **LLAMA)),
    "vit": lambda: gf.vit(gf.ViTConfig(**VIT, pool="class", compute="bfloat16")),
}
OPTIMIZER = optax.adamw(1e-3)
TRANSFORMS = {
    "step": lambda loss, params, batch: gf.train_step(gf.batch_mean(loss), OPTIMIZER)(
        gf.train_state(params, OPTIMIZER, jax.random.key(0)), batch
    ),
    "inspected step": lambda loss, params, batch: gf.inspect(gf.batch_mean(loss))(params, batch),
    "norms": lambda loss, params, batch: gf.per_example.norms(loss)(params, batch),
    "hvp": lambda loss, params, batch: gf.curvature.hvp(gf.batch_mean(loss))(params, params, batch),
    "nan_guard": lambda loss, params, batch: gf.nan_guard(gf.batch_mean(loss))(params, batch),
}


@functools.cache
def prepared(name, chunks=1):
    net = NETS[name]()
    params = jax.eval_shape(net.init, jax.random.key(0))
    if name.split(",")[0] in ("mlp", "cnn", "vit"):
        loss, batch = gf.classification_loss(net), (jnp.zeros([2, 64]), jnp.zeros(2, jnp.int32))
    else:
        loss, batch = gf.next_token_loss(net, chunks), (jnp.zeros([2, 8], jnp.int32),) * 2
    return loss, params, batch


def exported(transform, name, platforms, chunks=1):
    """Return the text of a program that was lowered for other platforms."""
    loss, params, batch = prepared(name, chunks)
    program = jax.jit(functools.partial(TRANSFORMS[transform], loss))
    return jax.export.export(program, platforms=platforms)(params, batch).mlir_module()


def operations(text):
    """Return the names of a program's operations, and the targets of its custom calls."""
    return set(re.findall(r"stablehlo\.(\w+)", text)), set(re.findall(r"custom_call @(\w+)", text))


# Most take a second or two.
QUICK = {("cnn", "step"), ("gpt", "inspected step")}
PAIRS = [
    pytest.param(name, transform, marks=() if (name, transform) in QUICK else pytest.mark.slow)
    for name in NETS
    for transform in TRANSFORMS
]


@pytest.mark.parametrize(("name", "transform"), PAIRS)
def test_it_lowers_for_gpus_and_tpus(name, transform):
    known, custom = operations(exported(transform, name, ["cuda", "tpu"]))
    assert "dot_general" in known
    # No call into a library of CPUs.
    assert not custom


@pytest.mark.parametrize("transform", ["step", pytest.param("norms", marks=pytest.mark.slow)])
def test_a_convolution_has_the_form_of_its_platform(transform):
    known, _ = operations(exported(transform, "cnn", ["cuda"]))
    assert "convolution" in known
    known, _ = operations(exported(transform, "cnn", ["cpu"]))
    assert "convolution" not in known


@pytest.mark.slow
def test_products_of_examples_are_made_in_chunks_on_cpus_alone(monkeypatch):
    monkeypatch.setattr(ghost, "CACHED", 0)
    monkeypatch.setattr(ghost, "AT_ONCE", 1)
    assert "while" in operations(exported("norms", "cnn", ["cpu"]))[0]
    assert "while" not in operations(exported("norms", "cnn", ["cuda"]))[0]


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["step", "norms", "inspected step"])
def test_the_loss_in_chunks_lowers(transform):
    known, _ = operations(exported(transform, "gpt", ["cuda", "tpu"], chunks=4))
    assert "while" in known
