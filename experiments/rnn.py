"""Train recurrent networks on names, letter by letter, and see how far back in time their gradients reach."""

from __future__ import annotations

# Before what takes long to import, so that Ctrl-C is answered from the first moment.
if __name__ == "__main__":
    from gradfn.cli import script

    script(__file__)

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gradfn as gf
from gradfn import runs
from gradfn.files import inner_folder
from gradfn.report.figures import curves, save_all
from gradfn.report.language import expectations, loss_per_token
from gradfn.report.sequences import gradient_through_time, token_probabilities, visible
from gradfn.runs import sample
from gradfn.train import adamw_warmup_cosine

EXPECTED = (
    "a gradient 49 letters back that is at least 10 times larger in the LSTM than in the vanilla network, and on "
    "names (--data names.txt) validation losses below 2.15 nats a letter; in a minute"
)
NAMES = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"  # sha256 of the file
PROMISED_LOSS, PROMISED_RATIO = 2.15, 10.0
CELLS = ("vanilla", "gru", "lstm")
STATE = {"vanilla": "h", "gru": "h", "lstm": "c"}  # what carries the past on; an LSTM's h comes of its c
LONG = 50  # letters, over which the gradient is followed


@dataclass(frozen=True)
class Config:
    """Options of a run."""

    data: str | None = None
    """a file of names, a line each (else the words of the Python documentation)"""
    width: int = 64
    """features of the states"""
    steps: int = 3000
    """training steps of each network"""
    batch: int = 64
    """names a step"""
    rate: float = 3e-3
    """AdamW's learning rate after warm-up; it falls to a tenth on half a cosine"""
    seed: int = 0
    """decides the first weights and the order of the names"""
    resume: bool = False
    """go on with an interrupted run: the latest, or that in --folder"""
    folder: str | None = None
    """where to keep the run (else runs/rnn/<time>)"""

    def __post_init__(self) -> None:
        runs.within(1, None, width=self.width, batch=self.batch)
        runs.within(2, None, steps=self.steps)
        runs.within(0, 2**32 - 1, seed=self.seed)
        runs.positive(rate=self.rate)


class Result(NamedTuple):
    """What came of a run, by cell."""

    params: dict[str, Any]
    validation_losses: dict[str, float]  # nats a letter
    gradients: dict[str, np.ndarray]  # rms of the state's gradient at each of 50 letters, after training
    folder: Path
    verdict: str


def run(config: Config) -> Result:
    """Train a network with each cell, measure and draw; what it writes is in the result's folder."""
    config = runs.settle("rnn", config)
    data = gf.data.lines(config.data)
    print(data)
    runs.some(training=data.train[0], validation=data.validation[0])
    batch = runs.batch_for(config, len(data.train[0]), "lines")
    folder = runs.begin("rnn", config)
    letters = long_sequences(data)

    params: dict[str, Any] = {}
    losses: dict[str, float] = {}
    histories: dict[str, Any] = {}
    before: dict[str, np.ndarray] = {}
    after: dict[str, np.ndarray] = {}
    for cell in CELLS:
        settings: dict[str, Any] = {"vocab": data.tokenizer.size, "width": config.width, "cell": cell}
        net = gf.rnn(**settings)
        loss = gf.next_token_loss(net)
        start = net.init(jax.random.key(config.seed))
        fitted = gf.fit(
            gf.batch_mean(loss),
            start,
            data.train,
            adamw_warmup_cosine(
                config.steps, config.rate, final_rate=config.rate / 10, warmup=config.steps // 20
            ),
            config.steps,
            batch_size=batch,
            seed=config.seed,
            evaluate=measured(loss_per_token(loss, data.validation)),
            eval_every=max(config.steps // 20, 1),
            folder=inner_folder(folder, cell),
            resume=config.resume,
        )
        sample.save_model(inner_folder(folder, cell), "rnn", settings, data.tokenizer, lines=True)
        params[cell], histories[cell] = fitted.params, fitted.history
        losses[cell] = fitted.history[-1]["validation_loss"]
        before[cell], after[cell] = (gradients(loss, cell, p, letters) for p in (start, fitted.params))
        model = sample.Model(net, fitted.params, data.tokenizer, True)
        words = "".join(islice(data.tokenizer.stream(sample.write(model, sample.Config())), 100))
        print(f"{cell}: validation loss {losses[cell]:.3f}; it writes {' '.join(words.split())}")

    net = gf.rnn(data.tokenizer.size, config.width, "lstm")
    figures = {
        "gradients": gradient_through_time(after, before, "last letter"),
        "curves": curves(joined(histories), "nats a letter"),
        "probabilities": drawn_expectations(net, params["lstm"], data),
    }
    figures["curves"].axes[0].autoscale(axis="y")  # the lines lie close together, far from zero
    save_all(figures, folder, data.name)
    verdict = judge(config, data, losses, after)
    runs.finish(folder, {"validation_losses": losses, "verdict": verdict})
    print(f"{verdict}\npictures: {folder}/{', '.join(f'{name}.png' for name in figures)}")
    print(f"more of its writing: gradfn sample {shlex.quote(str(folder / 'lstm'))}")
    return Result(params, losses, after, folder, verdict)


def measured(measure: Callable[[Any], jax.Array]) -> Callable[[Any], dict[str, jax.Array]]:
    """Return what `gf.fit` is to evaluate."""
    return lambda params: {"validation_loss": measure(params)}


def long_sequences(data: gf.data.Lines, most: int = 64) -> tuple[jax.Array, jax.Array]:
    """Return validation lines, joined without their ends, of which the last letter alone is asked for.

    Returns:
        Tokens and targets, `[n, 50]` each; all targets but the last are -1.

    Raises:
        RunError: there is too little of it.
    """
    tokens, targets = data.validation
    letters = tokens[:, 1:][targets[:, 1:] >= 0]  # without the line's end at the beginning of each
    n = min(most, (len(letters) - 1) // LONG)
    if n < 1:
        raise runs.RunError(f"data: the validation lines have {len(letters)} letters, {LONG + 1} are needed")
    asked = np.full([n, LONG], -1, np.int32)
    asked[:, -1] = letters[LONG : n * LONG + 1 : LONG]
    return jnp.asarray(letters[: n * LONG].reshape(n, LONG)), jnp.asarray(asked)


def gradients(loss: Any, cell: str, params: Any, batch: Any) -> np.ndarray:
    """Return the rms of the gradient of the last letter's loss with respect to the state at each letter."""
    name = STATE[cell]
    look = gf.inspect(gf.batch_mean(loss), sites=name, stats=["rms"], input_grads=False)
    return np.asarray(jax.jit(look)(params, batch).grad_stats[name].rms)  # [50], a value a step of the scan


def joined(histories: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return one history, with the validation losses of each network under its name."""
    rows = zip(*histories.values(), strict=True)
    return [
        {"step": row[0]["step"]}
        | {
            f"{cell}_validation_loss": its["validation_loss"]
            for cell, its in zip(histories, row, strict=True)
        }
        for row in rows
    ]


def drawn_expectations(net: gf.Net, params: Any, data: gf.data.Lines) -> Any:
    """Draw what a network expects after each letter of a few validation lines."""
    read, came, probabilities = expectations(net, params, *data.validation)
    symbols = data.tokenizer.symbols
    figure = token_probabilities([symbols[token] for token in read], came, probabilities, symbols)
    figure.axes[0].set_title(
        f"what the LSTM has read ({visible(chr(10))} begins and ends a line)", fontsize=10
    )
    return figure


def judge(config: Config, data: Any, losses: dict[str, float], gradients: dict[str, np.ndarray]) -> str:
    """Say what was reached against what was expected."""
    shares = {cell: sizes[0] / sizes[-1] for cell, sizes in gradients.items()}
    ratio = shares["lstm"] / max(shares["vanilla"], 1e-30)
    told = ", ".join(f"{cell} {loss:.3f}" for cell, loss in losses.items())
    reached = (
        f"validation losses {told} nats a letter; the LSTM's gradient {LONG - 1} letters back is {ratio:,.0f} "
        "times that of the vanilla network"
    )
    as_promised = Config(data=config.data, seed=config.seed)
    if runs.options(config) != runs.options(as_promised):
        return f"{reached} (nothing was promised for these options)"
    enough = ratio >= PROMISED_RATIO
    expected = f"at least {PROMISED_RATIO:,.0f} times"
    if data.sha256 == NAMES:
        enough = enough and max(losses.values()) < PROMISED_LOSS
        expected = f"losses below {PROMISED_LOSS} and {expected}"
    return f"{reached}; expected {expected}: {'reached' if enough else 'NOT reached'}"
