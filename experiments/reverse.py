"""Teach a transformer of one block to write 16 digits backwards, and see its attention run against the order."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gradfn as gf
from gradfn import runs
from gradfn.pages.figures import curves
from gradfn.pages.sequences import attention_maps
from gradfn.runs import sample
from gradfn.runs.language_net import Quiet
from gradfn.timings import phase
from gradfn.train import adamw_warmup_cosine

from ._common import SeededOptions, check_heads, conclude
from ._language import attention_of, keep_start

EXPECTED = (runs.Expectation("sequences reversed without a mistake", at_least=1, unit="%"),)
END_OF_INPUT = 10  # the token after the digits 0 to 9: "now you"
SYMBOLS = "0123456789="
N_TEST = 1000
# Times that the parameters are kept along the way, and sequences to start with, for the page.
KEPT, EXCERPTS = 16, 3


@dataclass(frozen=True)
class Config(SeededOptions):
    """Options of a run."""

    digits: int = runs.option(16, "how many to reverse", at_least=2)
    steps: int = runs.option(500, "training steps", at_least=2)
    batch: int = runs.option(64, "sequences per step", at_least=1)
    width: int = runs.option(64, "features of a position", at_least=1)
    heads: int = runs.option(1, "attention heads", at_least=1)
    rate: float = runs.option(
        3e-3, "AdamW's learning rate after warm-up; it falls to a tenth on half a cosine"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self)


class Result(NamedTuple):
    """The result of a run."""

    params: dict[str, Any]
    history: Sequence[dict[str, Any]]
    accuracy: float  # share of the test sequences without any mistake, in [0, 1]
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train, measure and draw; it writes into the folder of the result."""
    config = runs.settle("reverse", config)
    folder = runs.start("reverse", config)
    n = config.digits
    model = gf.GPTConfig(len(SYMBOLS), 2 * n, n_layers=1, n_heads=config.heads, width=config.width)
    net = gf.gpt(model)
    print(gf.table(net.spec))
    loss = gf.next_token_loss(net)
    # Of 10^16 sequences training sees a hundred thousand: that it meets one of these is next to impossible.
    test = reversals(jax.random.key(2**32 - 1 - config.seed), N_TEST, n)
    letters = gf.data.characters(SYMBOLS)
    texts = [as_text(tokens) for tokens in test[0][:EXCERPTS]]
    quiet = Quiet(until=END_OF_INPUT)
    sample.save_model(folder, "gpt", dataclasses.asdict(model), letters, False, texts, quiet)
    answer = jax.jit(jax.vmap(net.apply, (None, 0)))
    fitted = gf.fit(
        gf.batch_mean(loss),
        net.init(jax.random.key(config.seed)),
        lambda key: reversals(key, config.batch, n),
        adamw_warmup_cosine(
            config.steps, config.rate, final_rate=config.rate / 10, warmup=config.steps // 10
        ),
        config.steps,
        seed=config.seed,
        evaluate=lambda params: {"test_accuracy": all_right(answer(params, test[0]), test[1])},
        inspect_every=config.steps // 20 or None,  # a run of a few steps is not inspected
        folder=folder,
        keep_every=max(config.steps // KEPT, 1),
        resume=config.resume,
    )
    keep_start(folder, net, config.seed)

    accuracy = float(all_right(answer(fitted.params, test[0]), test[1]))
    written = gf.generate(net, fitted.params, test[0][0, : n + 1], n, temperature=0)
    print(f"{as_text(test[0][0, :n])} backwards, it writes: {as_text(written)}")
    with phase("pictures"):
        figures = {"curves": curves(fitted.history), "attention": attention(loss, fitted.params, test, n)}
    outcome = judge(config, accuracy)
    conclude(folder, outcome, figures, accuracy=accuracy)
    return Result(fitted.params, fitted.history, accuracy, folder, outcome)


def reversals(key: jax.Array, batch: int, n: int) -> tuple[jax.Array, jax.Array]:
    """Draw digits at random: what is read, `1 2 3 = 3 2`, and what is to be predicted, `- - - 3 2 1`.

    Returns:
        Tokens and targets, `[batch, 2 * n]` int32 each; while it reads, nothing is required of it (-1).
    """
    digits = jax.random.randint(key, (batch, n), 0, 10)
    backwards = digits[:, ::-1]
    end = jnp.full((batch, 1), END_OF_INPUT, jnp.int32)
    tokens = jnp.concatenate([digits, end, backwards[:, :-1]], axis=1)
    return tokens, jnp.concatenate([jnp.full((batch, n), -1, jnp.int32), backwards], axis=1)


def all_right(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the share of sequences `[batch, T, vocab]` whose every prediction is right.

    Each prediction follows the correct ones before it. A sequence without an error here is also generated without one.
    """
    right = (logits.argmax(-1) == targets) | (targets < 0)  # [batch, T]
    return right.all(-1).mean()


def attention(loss: Any, params: Any, test: tuple[jax.Array, jax.Array], n: int) -> Any:
    """Draw where the network looks as it writes, for the first test sequence."""
    weights = attention_of(loss, params, (test[0][:1], test[1][:1]))
    rows = {name: layer[0, :, n:, :] for name, layer in weights.items()}  # [1, heads, T, T] -> [heads, n, T]
    tokens = [SYMBOLS[token] for token in test[0][0].tolist()]
    figure = attention_maps(rows, tokens, tokens[n:])
    # Row i writes the digit n - 1 - i.
    copied = np.arange(n)[::-1]
    shares = {
        (name, head): float(one[np.arange(n), copied].mean())
        for name, layer in rows.items()
        for head, one in enumerate(layer)
    }
    best = max(shares, key=lambda which: shares[which])
    of_best = f"{100 * shares[best]:.0f} % of the attention of {best[0]}, head {best[1]}, is on it"
    figure.suptitle(
        f"While it writes (rows, downwards), it attends to the digit that it copies:\n{of_best}"
        if shares[best] > 0.4
        else f"While it writes (rows, downwards), no head attends to the digit that it copies:\nat most {of_best}"
    )
    return figure


def as_text(tokens: Any) -> str:
    """Return digits as text."""
    return "".join(SYMBOLS[token] for token in np.asarray(tokens).tolist())


def judge(config: Config, accuracy: float) -> runs.Outcome:
    """Compare the share of test sequences that were reversed without a mistake with what is expected."""
    promised = (
        config.digits <= Config.digits and config.steps >= Config.steps and config.batch >= Config.batch
    )
    return runs.judge(EXPECTED, {"sequences reversed without a mistake": accuracy}, promised)
