"""The cost of the first call: tracing, lowering and compiling each transform, relative to `jax.value_and_grad`.

    python -m benchmarks.compile_time            # about three minutes
    python -m benchmarks.compile_time --full     # also 24 and 96 unrolled layers, 96 scanned ones, 2,000 leaves

Transforms: `gf.gpt` with 2 to 96 layers (2 heads, width 32, 32 tokens, batch size 4), unrolled and scanned. The time to
compile hardly depends on these sizes, it follows the number of operations. `hessian_eigs` compiles several programs
as it runs; only its total is given. Leaves: `gf.fit` of one step, relative to the first call of a step by hand, for an
MLP of as many layers as the leaves need.

All figures are seconds of CPU time, of all threads: XLA compiles on all cores. Every measurement starts with JAX's
caches cleared and with functions of its own, and the contenders of a table take turns, `--rounds` times; the figures
are medians.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

import gradfn as gf
from benchmarks import harness
from benchmarks.rows import TOTAL
from gradfn.inspection import nan_guard

HEADS, WIDTH, TOKENS, BATCH, SYMBOLS = 2, 32, 32, 4, 65
BASELINE, BY_HAND = "value_and_grad", "step by hand"
AIMS = {"inspect": 1.5, "per_example.norms": 1.5, "nan_guard": 1.3}
AIM_OF_FIT = 1.1
UNROLLED, SCANNED, LEAVES = (2, 8), (2, 24), (20, 200)
UNROLLED_FULL, SCANNED_FULL, LEAVES_FULL = (2, 8, 24, 96), (2, 8, 24, 96), (20, 200, 2000)

Figures = dict[str, float]


def in_phases(f: Callable, *args: PyTree) -> Figures:
    """Return the CPU seconds of each phase of the first call of `jax.jit(f)`."""
    clock = [time.process_time()]

    def done(out: Any) -> Any:
        clock.append(time.process_time())
        return out

    traced = done(jax.jit(f).trace(*args))
    compiled = done(done(traced.lower()).compile())
    done(jax.block_until_ready(compiled(*args)))
    phases = ("trace, s", "lower, s", "compile, s", "first run, s")
    found = {name: clock[i + 1] - clock[i] for i, name in enumerate(phases)}
    return found | {TOTAL: clock[-1] - clock[0]}


def in_total(f: Callable, *args: PyTree) -> Figures:
    """Return the CPU seconds of the first call of `f`."""
    started = time.process_time()
    jax.block_until_ready(jax.tree.leaves(f(*args)))
    return {TOTAL: time.process_time() - started}


def transforms(depth: int, scanned: bool) -> dict[str, Callable[[], Figures]]:
    """Return the contenders for a GPT of some depth; each makes its functions anew when it is called."""
    config = gf.GPTConfig(SYMBOLS, TOKENS, depth, HEADS, WIDTH, scan=scanned)
    net = gf.gpt(config)
    params = net.init(jax.random.key(0))
    text = jax.random.randint(jax.random.key(1), (BATCH, TOKENS), 0, SYMBOLS)
    batch = text, text

    def loss_of_example() -> Callable:
        return gf.next_token_loss(gf.gpt(config))

    def loss() -> Callable:
        return gf.batch_mean(loss_of_example())

    return {
        BASELINE: lambda: in_phases(jax.value_and_grad(loss()), params, batch),
        "inspect": lambda: in_phases(gf.inspect(loss(), input_grads=False), params, batch),
        "capture": lambda: in_phases(gf.capture(loss()), params, batch),
        "nan_guard": lambda: in_phases(nan_guard(loss()), params, batch),
        "per_example.norms": lambda: in_phases(gf.per_example.norms(loss_of_example()), params, batch),
        "hvp": lambda: in_phases(gf.curvature.hvp(loss()), params, params, batch),
        "backprop": lambda: in_phases(gf.backprop(loss()), params, batch),
        "hessian_eigs": lambda: in_total(
            gf.curvature.hessian_eigs(loss(), k=1, max_products=8), params, batch
        ),
    }


def steps(leaves: int) -> dict[str, Callable[[], Figures]]:
    """Return the contenders for an MLP with some number of leaves."""
    net = gf.mlp([8] * (leaves // 2 + 1))
    params, optimizer = net.init(jax.random.key(0)), optax.adam(1e-3)
    rng = np.random.default_rng(0)
    data = rng.normal(size=(32, 8)).astype(np.float32), rng.normal(size=(32, 8)).astype(np.float32)

    def loss() -> Callable:
        return gf.batch_mean(gf.regression_loss(net))

    def by_hand() -> Figures:
        mean = loss()

        @jax.jit
        def step(params: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree, jax.Array]:
            value, grads = jax.value_and_grad(mean)(params, batch)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        return in_total(step, params, optimizer.init(params), tuple(map(jnp.asarray, data)))

    def fit() -> Figures:
        return in_total(
            lambda: gf.fit(loss(), params, data, optimizer, steps=1, batch_size=32, progress=False).params
        )

    return {BY_HAND: by_hand, "fit": fit}


def measured(contenders: Mapping[str, Callable[[], Figures]], rounds: int) -> dict[str, Figures]:
    """Return the medians of the figures of each contender over some rounds."""
    found: dict[str, list[Figures]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in harness.order_of_round(list(contenders), number):
            jax.clear_caches()
            found[name].append(contenders[name]())
    return {
        name: {column: statistics.median(one[column] for one in several) for column in several[0]}
        for name, several in found.items()
    }


def warm_up() -> None:
    """Compile something first: the first program of a process loads and starts what all others use."""
    for contenders in (transforms(1, scanned=False), steps(2)):
        for run in contenders.values():
            run()


def main() -> None:
    """Measure all cases."""
    parser = harness.arguments(__doc__, rounds=1)
    parser.add_argument("--full", action="store_true", help="deep unrolled networks and 2,000 leaves as well")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these transforms, and the baseline")
    options = parser.parse_args()
    warm_up()

    def cases(some: Iterable[int], every: Iterable[int]) -> Iterable[int]:
        return every if options.full else some

    for scanned, depths in (
        (False, cases(UNROLLED, UNROLLED_FULL)),
        (True, cases(SCANNED, SCANNED_FULL)),
    ):
        for depth in depths:
            contenders = transforms(depth, scanned)
            if options.only:
                contenders = {name: contenders[name] for name in (BASELINE, *options.only)}
            harness.report_figures(
                f"gf.gpt, {depth} layers, {'scanned' if scanned else 'unrolled'}",
                measured(contenders, options.rounds),
                BASELINE,
                aims={name: {TOTAL: aim} for name, aim in AIMS.items() if name in contenders},
                json_file=options.json,
            )
    for leaves in () if options.only else cases(LEAVES, LEAVES_FULL):
        harness.report_figures(
            f"an MLP with {leaves:,} leaves",
            measured(steps(leaves), options.rounds),
            BY_HAND,
            aims={"fit": {TOTAL: AIM_OF_FIT}},
            json_file=options.json,
        )


if __name__ == "__main__":
    main()
