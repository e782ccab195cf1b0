"""The cost of `gf.inspect` and `gf.nan_guard` relative to plain `jax.value_and_grad`, and their compile times.

    python -m benchmarks.inspect_overhead

Models: `gf.gpt` (4 layers, 4 heads, width 128, 64 tokens, batch size 12, 65 symbols), a GPT of that size in plain JAX
with unrolled and with scanned layers, and an MLP 784-256-256-10 at batch size 128 in plain JAX. One call is 20 steps,
each on the same parameters; `every 20th` inspects one of them; `nan_guard` is the test for a NaN, on healthy
steps. Every site is inspected, forward and backward, and all statistics are returned; `one site a
layer` inspects the MLP's pre-activations alone. A ratio of 0.9 means that a step takes 1/0.9 of the time of a plain
step.

Two more tables compare `gf.fit` with and without inspections, on an MLP of that size and on 784-16-10 at batch size
32, with random data. There, the rows of the log are included: in memory, and in a folder.
"""

import functools
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradfn as gf
from benchmarks import harness
from benchmarks.paused import paused
from gradfn.inspection import inspect, nan_guard

LAYERS, HEADS, WIDTH, TOKENS, BATCH, SYMBOLS = 4, 4, 128, 64, 12, 65
STEPS = 20
MODELS = ("gf.gpt", "GPT", "GPT, layers scanned", "MLP")
# Sizes, batch size and steps between two pauses.
FITS = {"fit MLP": ((784, 256, 256, 10), 128, 100), "fit 784-16-10": ((784, 16, 10), 32, 1000)}
# How many times the time of the baseline a step may take, by model and row.
AIMS = {
    "gf.gpt": {"nan_guard": 1.03},
    "MLP": {
        "all seven (the default)": 1.25,
        "rms, non-finite, one site a layer": 1.10,
        "every 20th step": 1.02,
        "nan_guard": 1.05,
    },
    "fit MLP": {"every 20th step": 1.02, "at spikes": 1.05},
    "fit 784-16-10": {"every step": 1.25, "at spikes": 1.25},
}
ROOT_MEAN_SQUARE = ("rms",)
THREE = ("mean", "rms", "max")
FIVE = (*THREE, "zeros", "nonfinite")
SEVEN = (*FIVE, "saturated", "dead")


def init_gpt(key: jax.Array) -> dict[str, Any]:
    keys = iter(jax.random.split(key, 4 * LAYERS + 3))

    def matrix(*shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), shape)

    def norm() -> dict[str, jax.Array]:
        return {"scale": jnp.ones(WIDTH), "shift": jnp.zeros(WIDTH)}

    def block() -> dict[str, Any]:
        return {
            "norm1": norm(),
            "qkv": {"W": matrix(WIDTH, 3 * WIDTH), "b": jnp.zeros(3 * WIDTH)},
            "out": {"W": matrix(WIDTH, WIDTH), "b": jnp.zeros(WIDTH)},
            "norm2": norm(),
            "up": {"W": matrix(WIDTH, 4 * WIDTH), "b": jnp.zeros(4 * WIDTH)},
            "down": {"W": matrix(4 * WIDTH, WIDTH), "b": jnp.zeros(WIDTH)},
        }

    return {
        "symbols": matrix(SYMBOLS, WIDTH),
        "positions": matrix(TOKENS, WIDTH),
        "blocks": [block() for _ in range(LAYERS)],
        "norm": norm(),
        "head": matrix(WIDTH, SYMBOLS),
    }


def layer_norm(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["shift"]


def affine(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ p["W"] + p["b"]


def block(p: dict[str, Any], x: jax.Array) -> jax.Array:
    parts = jnp.split(affine(p["qkv"], layer_norm(p["norm1"], x)), 3, axis=-1)
    # [batch, tokens, width] -> [batch, heads, tokens, width / heads]
    q, k, v = (a.reshape(BATCH, TOKENS, HEADS, WIDTH // HEADS).swapaxes(1, 2) for a in parts)
    scores = q @ k.swapaxes(-1, -2) * (WIDTH // HEADS) ** -0.5
    weights = jax.nn.softmax(jnp.where(jnp.tri(TOKENS, dtype=bool), scores, -1e30))
    x = x + affine(p["out"], (weights @ v).swapaxes(1, 2).reshape(BATCH, TOKENS, WIDTH))
    return x + affine(p["down"], jax.nn.gelu(affine(p["up"], layer_norm(p["norm2"], x))))


def gpt(params: dict[str, Any], batch: tuple[jax.Array, jax.Array], scanned: bool = False) -> jax.Array:
    x, y = batch
    h = params["symbols"][x] + params["positions"]
    if scanned:
        h, _ = jax.lax.scan(lambda h, p: (block(p, h), None), h, params["blocks"])
    else:
        for p in params["blocks"]:
            h = block(p, h)
    return cross_entropy(layer_norm(params["norm"], h) @ params["head"], y)


def init_mlp(key: jax.Array, sizes: tuple[int, ...] = (784, 256, 256, 10)) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"W": jax.random.normal(k, (n, m)) * (2 / n) ** 0.5, "b": jnp.zeros(m)}
        for k, n, m in zip(keys, sizes, sizes[1:], strict=False)
    ]


def mlp(params: list[dict[str, jax.Array]], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, y = batch
    for p in params[:-1]:
        x = jax.nn.relu(affine(p, x))
    return cross_entropy(affine(params[-1], x), y)


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], axis=-1).mean()


def contenders(
    loss: Callable, params: Any, batch: Any, layers: str | None = None
) -> tuple[dict[str, harness.Contender], dict[str, float]]:
    """Return functions that run 20 steps each, and the seconds to compile one step of each.

    Args:
        loss: of a batch.
        params: its parameters.
        batch: the batch.
        layers: the sites of which there is one per layer, if they are to be inspected on their own.
    """
    compiled_in: dict[str, float] = {}

    def contender(name: str, first: Callable, others: Callable | None = None) -> harness.Contender:
        started = time.perf_counter()
        # Called through jit, as users do: what `compile` returns calls a program with a callback from Python.
        first = jax.jit(first)
        first.lower(params, batch).compile()
        compiled_in[name] = time.perf_counter() - started
        others = first if others is None else jax.jit(others)

        def run() -> float:
            out = first(params, batch)
            for _ in range(STEPS - 1):
                out = others(params, batch)
            jax.block_until_ready(out)
            return STEPS

        return run

    plain = jax.value_and_grad(loss)
    inspected = functools.partial(inspect, loss, input_grads=False)
    contestants = {
        "plain": (plain,),
        "sums of squares": (inspected(stats=ROOT_MEAN_SQUARE),),
        "three statistics": (inspected(stats=THREE),),
        "five statistics": (inspected(stats=FIVE),),
        "all seven (the default)": (inspected(stats=SEVEN),),
        "all, and histograms": (inspected(stats=(*SEVEN, "histogram")),),
        "every 20th step": (inspected(stats=SEVEN), plain),
        "nan_guard": (nan_guard(loss),),
    }
    if layers is not None:
        few = inspected(stats=("rms", "nonfinite"), sites=layers)
        contestants["rms, non-finite, one site a layer"] = (few,)
    return {name: contender(name, *steps) for name, steps in contestants.items()}, compiled_in


def fits(
    sizes: tuple[int, ...], batch_size: int, steps: int, folder: str
) -> tuple[dict[str, harness.Contender], str]:
    """Return functions that train for some steps each, with and without inspections; and which is the baseline."""
    key = jax.random.key(0)
    data = jax.random.normal(key, (25_600, sizes[0])), jax.random.randint(key, (25_600,), 0, sizes[-1])
    net = gf.mlp(sizes)
    start = net.init(key)

    def contender(**options: Any) -> harness.Contender:
        def train(pause: Callable[[Any], None]) -> None:
            def evaluate(params: Any) -> dict[str, Any]:
                pause(params)
                return {}

            loss = gf.batch_mean(gf.classification_loss(net))
            gf.fit(loss, start, data, optax.sgd(0.1), 10**6 * steps, batch_size=batch_size, evaluate=evaluate,
                   eval_every=steps, progress=False, **options)  # fmt: skip

        proceed = paused(train)

        def run() -> float:
            jax.block_until_ready(proceed())
            return steps

        return run

    baseline = "without inspection"
    return {
        baseline: contender(),
        "every 20th step": contender(inspect_every=20),
        "at spikes": contender(inspect_when="spike"),
        "every step": contender(inspect_every=1),
        "every step, in a folder": contender(inspect_every=1, folder=folder, checkpoint_seconds=1e6),
    }, baseline


def main() -> None:
    """Run the comparison for each model."""
    parser = harness.arguments(__doc__, rounds=15)
    every = (*MODELS, *FITS)
    parser.add_argument("--only", nargs="+", choices=every, default=every, help="only these models")
    options = parser.parse_args()
    key = jax.random.key(0)
    text = jax.random.randint(key, (BATCH, TOKENS), 0, SYMBOLS)
    unrolled = init_gpt(key)
    stacked = unrolled | {"blocks": jax.tree.map(lambda *a: jnp.stack(a), *unrolled["blocks"])}
    images = jax.random.normal(key, (128, 784)), jax.random.randint(key, (128,), 0, 10)
    net = gf.gpt(gf.GPTConfig(SYMBOLS, TOKENS, LAYERS, HEADS, WIDTH, bias=False, feed="gelu_exact"))
    tasks = (
        (gf.batch_mean(gf.next_token_loss(net)), net.init(key), (text, text)),
        (gpt, unrolled, (text, text)),
        (functools.partial(gpt, scanned=True), stacked, (text, text)),
        (mlp, init_mlp(key), images),
    )
    models = dict(zip(MODELS, tasks, strict=True))
    for title in options.only:
        aims = AIMS.get(title)
        if title in FITS:
            with tempfile.TemporaryDirectory() as folder:
                trainers, baseline = fits(*FITS[title], folder)
                times = harness.race(trainers, options.rounds)
                harness.report(title, times, baseline, "steps", aims=aims, json_file=options.json)
            continue
        loss, params, batch = models[title]
        runs, compiled_in = contenders(loss, params, batch, "*/b" if title == "MLP" else None)
        times = harness.race(runs, options.rounds)
        harness.report(title, times, "plain", "steps", aims=aims, json_file=options.json)
        print("compiling:", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in compiled_in.items()))


if __name__ == "__main__":
    main()
