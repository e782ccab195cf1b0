"""The cost of `gf.capture` relative to the forward pass alone, both compiled.

    python -m benchmarks.capture_overhead

Models: `gf.mlp` 784-16-10 at batch size 32, and `gf.gpt` (4 layers, 4 heads, width 128, 64 tokens, batch size 12, 65
symbols). One call is 20 forward passes. `all seven` records the default statistics of every site and keeps no value;
`rms, non-finite` takes these two alone, `one site a layer` takes them of the MLP's pre-activations or the residual
stream of the GPT. `values` keeps every value and takes no statistics; `values, eager` does the same operation by
operation, as tools do that record outside of `jit`.
"""

from collections.abc import Callable
from typing import Any

import jax

import gradfn as gf
from benchmarks import harness

LAYERS, HEADS, WIDTH, TOKENS, BATCH, SYMBOLS = 4, 4, 128, 64, 12, 65
PASSES = 20
AIMS = {"rms, non-finite, one site a layer": 1.10, "rms, non-finite": 1.10, "all seven (the default)": 1.10}
TWO = ("rms", "nonfinite")


def contenders(f: Callable, params: Any, x: jax.Array, layers: str) -> dict[str, harness.Contender]:
    """Return functions that run 20 forward passes each.

    Args:
        f: of a batch.
        params: its parameters.
        x: the batch.
        layers: the sites of which there is one per layer.
    """

    def contender(function: Callable, passes: int = PASSES) -> harness.Contender:
        def run() -> float:
            for _ in range(passes):
                out = function(params, x)
            jax.block_until_ready(out)
            return passes

        return run

    everything = gf.capture(f, keep=None, stats=())
    compiled = {
        "forward pass": f,
        "all seven (the default)": gf.capture(f),
        "rms, non-finite": gf.capture(f, stats=TWO),
        "rms, non-finite, one site a layer": gf.capture(f, stats=TWO, sites=layers),
        "values": everything,
    }
    return {name: contender(jax.jit(function)) for name, function in compiled.items()} | {
        "values, eager": contender(everything, 1)
    }


def main() -> None:
    """Run the comparison for both models."""
    parser = harness.arguments(__doc__, rounds=30)
    models = ("MLP", "GPT")
    parser.add_argument("--only", nargs="+", choices=models, default=models, help="only these models")
    options = parser.parse_args()
    key = jax.random.key(0)
    mlp, images = gf.mlp([784, 16, 10]), jax.random.normal(key, (32, 784))
    gpt = gf.gpt(gf.GPTConfig(SYMBOLS, TOKENS, LAYERS, HEADS, WIDTH))
    text = jax.random.randint(key, (BATCH, TOKENS), 0, SYMBOLS)
    tasks = {"MLP": (mlp, images, "z*"), "GPT": (gpt, text, "*residual")}
    for title in options.only:
        net, x, layers = tasks[title]
        runs = contenders(jax.vmap(net.apply, (None, 0)), net.init(key), x, layers)
        times = harness.race(runs, options.rounds)
        harness.report(title, times, "forward pass", "passes", aims=AIMS, json_file=options.json)


if __name__ == "__main__":
    main()
