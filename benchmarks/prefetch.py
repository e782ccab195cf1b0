"""Time per step with a slow loader: `gf.fit` against the loop that loads a batch, then takes a step.

    python -m benchmarks.prefetch                # as in README.md

The loader waits, as for a disk or a network, so it takes no CPU time from the step. "no loader" is `gf.fit` with a
batch that is there already: what a step takes if it never waits. Each figure is the median over rounds, in which the
contenders take turns. The first steps, which compile, are left out.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

import gradfn as gf
from benchmarks import harness

WAITS = (0.0, 5.0, 10.0, 20.0)  # ms
PLAIN, FIT, NONE = "load, then step", "gf.fit", "gf.fit, no loader"


def contenders(
    sizes: list[int], batch_size: int, steps: int, wait: float
) -> Mapping[str, Callable[[], float]]:
    """Return functions that take `steps` steps after some others, and return the seconds per step.

    Args:
        sizes: of the network.
        batch_size: examples per batch.
        steps: how many are measured.
        wait: the seconds that a batch takes to load.
    """
    net = gf.mlp(sizes)
    loss, optimizer = gf.batch_mean(gf.classification_loss(net)), optax.sgd(0.1)
    params = net.init(jax.random.key(0))
    random = np.random.default_rng(0)
    images = random.random([batch_size, sizes[0]], np.float32)
    batch = images, random.integers(0, sizes[-1], batch_size, np.int32)

    def load(step: int) -> Any:
        time.sleep(wait)
        return batch

    step = jax.jit(gf.train_step(loss, optimizer))

    def plain() -> float:
        state = gf.train_state(params, optimizer, jax.random.key(0))
        state, _ = step(state, batch)
        began = time.monotonic()
        for i in range(steps):
            state, metrics = step(state, load(i))
        jax.block_until_ready(metrics)
        return (time.monotonic() - began) / steps

    def fit(data: Any) -> float:
        stamps = []
        evaluate = lambda params: stamps.append(time.monotonic()) or {}  # noqa: E731
        gf.fit(loss, params, data, optimizer, 2 * steps, eval_every=steps, evaluate=evaluate, progress=False)
        return (stamps[1] - stamps[0]) / steps

    return {
        PLAIN: plain,
        FIT: functools.partial(fit, gf.train.from_host(load)),
        NONE: functools.partial(fit, gf.train.from_host(lambda step: batch)),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = harness.arguments((__doc__ or "").partition("\n")[0], rounds=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[784, 256, 10], help="of the network")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=192, help="3 groups of 64")
    options = parser.parse_args(arguments)
    figures: dict[str, dict[str, float]] = {PLAIN: {}, FIT: {}, NONE: {}}
    for wait in WAITS:
        by_name = contenders(options.sizes, options.batch_size, options.steps, wait / 1e3)
        seconds: dict[str, list[float]] = {name: [] for name in by_name}
        for number in range(options.rounds):
            for name in harness.order_of_round(list(by_name), number):
                seconds[name].append(by_name[name]())
        for name, found in seconds.items():
            figures[name][f"loads in {wait:g} ms"] = 1e3 * statistics.median(found)
    harness.report_figures("A slow loader: ms per step", figures, PLAIN, json_file=options.json)


if __name__ == "__main__":
    main()
