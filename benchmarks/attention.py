"""Memory and time of a training step on long sequences, with plain attention and in blocks.

    python -m benchmarks.attention                       # 512, 1,024, 4,096 and 8,192 positions
    python -m benchmarks.attention --lengths 2048 --scan

A GPT with two layers of width 128 and four heads, one sequence. Memory is what the compiled program for the loss and
its gradients allocates for temporaries, as XLA reports it; time is CPU time. Plain attention over 8,192 positions takes
8 GB: beyond `--plain` positions it is compiled and not run.
"""

import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import gradfn as gf
from benchmarks import harness

LENGTHS = (512, 1024, 4096, 8192)
FORMS = ("plain", "blocks")


class Step(NamedTuple):
    """A compiled function of parameters and tokens, and its memory in bytes."""

    run: Any
    memory: int


def step_of(config: gf.GPTConfig, form: str) -> Step:
    """Compile value and gradients of the loss of one sequence."""
    net = gf.gpt(config)
    tokens = jax.ShapeDtypeStruct((1, config.context), jnp.int32)
    with gf.layers.attention_form(form):
        step = jax.jit(jax.value_and_grad(gf.batch_mean(gf.next_token_loss(net))))
        lowered = step.lower(jax.eval_shape(net.init, jax.random.key(0)), (tokens, tokens))
    compiled = lowered.compile()
    return Step(compiled, compiled.memory_analysis().temp_size_in_bytes)


def compare(config: gf.GPTConfig, forms: tuple[str, ...], rounds: int) -> dict[str, tuple[int, float | None]]:
    """Return the memory of every form, and the CPU seconds per step of some (medians)."""
    params = gf.gpt(config).init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), [1, config.context], 0, config.vocab)
    steps = {form: step_of(config, form) for form in FORMS}

    def contender(form: str) -> harness.Contender:
        def run() -> float:
            jax.block_until_ready(steps[form].run(params, (tokens, tokens)))
            return 1.0

        return run

    timings = harness.race({form: contender(form) for form in forms}, rounds, warmup=1)
    seconds = {form: statistics.median(timing.cpu) for form, timing in timings.items()}
    return {form: (steps[form].memory, seconds.get(form)) for form in FORMS}


def main(arguments: list[str] | None = None) -> None:
    parser = harness.arguments((__doc__ or "").partition("\n")[0], rounds=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="positions")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--scan", action="store_true", help="scan the layers")
    parser.add_argument(
        "--plain", type=int, default=4096, help="the longest sequence that plain attention is run on"
    )
    options = parser.parse_args(arguments)
    for length in options.lengths:
        config = gf.GPTConfig(
            vocab=65, context=length, n_layers=2, n_heads=4, width=options.width, scan=options.scan
        )
        forms = FORMS if length <= options.plain else FORMS[1:]
        figures = {}
        for form, (memory, seconds) in compare(config, forms, options.rounds).items():
            figures[form] = {"temporary MB": memory / 1e6}
            if seconds is not None:
                figures[form]["CPU ms"] = seconds * 1e3
        harness.report_figures(f"Attention, {length:,} positions", figures, "plain", json_file=options.json)


if __name__ == "__main__":
    main()
