"""Train recurrent networks on names, letter by letter, and see how far back in time their gradients reach."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gradfn as gf
from gradfn import runs
from gradfn.files import inner_folder
from gradfn.pages.figures import LINE_COLORS, LINE_STYLES, curves, label_lines, new_figure
from gradfn.pages.sequences import token_probabilities, visible
from gradfn.runs import sample
from gradfn.timings import phase
from gradfn.train import adamw_warmup_cosine

from ._common import SeededOptions, batch_for, conclude, defaults, given, not_empty
from ._language import expectations, loss_per_token

if TYPE_CHECKING:
    from matplotlib.figure import Figure


EXPECTED = (
    runs.Expectation("LSTM gradient / vanilla gradient", at_least=10),
    runs.Expectation("LSTM gradient / vanilla gradient", at_least=10, given="--data names.txt"),
    runs.Expectation(
        "largest validation loss", at_most=2.15, unit="nats per letter", given="--data names.txt"
    ),
)

NAMES = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"  # sha256 of the file
CELLS = ("vanilla", "gru", "lstm")
STATE = {"vanilla": "h", "gru": "h", "lstm": "c"}  # what carries the past on; an LSTM's h comes of its c
LONG = 50  # letters, over which the gradient is followed


@dataclass(frozen=True)
class Config(SeededOptions):
    """Options of a run."""

    data: str | None = runs.option(
        None, "a file of names, a line each (default: the words of the Python documentation)"
    )
    width: int = runs.option(64, "features of the states", at_least=1)
    steps: int = runs.option(3000, "training steps of each network", at_least=2)
    batch: int = runs.option(64, "names a step", at_least=1)
    rate: float = runs.option(
        3e-3, "AdamW's learning rate after warm-up; it falls to a tenth on half a cosine"
    )


class Result(NamedTuple):
    """The result of a run, by cell."""

    params: dict[str, Any]
    validation_losses: dict[str, float]  # nats per letter
    gradients: dict[str, np.ndarray]  # rms of the state's gradient at each of 50 letters, after training
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train a network with each cell, measure and draw; it writes into the folder of the result."""
    config = runs.settle("rnn", config)
    data = gf.data.lines(config.data)
    print(data)
    not_empty(training=data.train[0], validation=data.validation[0])
    batch = batch_for(config, len(data.train[0]), "lines")
    folder = runs.start("rnn", config)
    letters = long_sequences(data)

    params: dict[str, Any] = {}
    losses: dict[str, float] = {}
    histories: dict[str, Any] = {}
    before: dict[str, np.ndarray] = {}
    after: dict[str, np.ndarray] = {}
    for cell in CELLS:
        settings: dict[str, Any] = {
            "vocab": data.tokenizer.size,
            "width": config.width,
            "cell": cell,
            "n_layers": 1,
        }
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
    with phase("pictures"):
        figures = {
            "gradients": gradient_through_time(after, before, "last letter"),
            # The lines lie close together, far from zero.
            "curves": curves(joined(histories), "nats per letter", from_zero=False),
            "probabilities": drawn_expectations(net, params["lstm"], data),
        }
    outcome = judge(config, data, losses, after)
    conclude(folder, outcome, figures, data.name, validation_losses=losses)
    print(f"more of its writing: gradfn sample {shlex.quote(str(folder / 'lstm'))}")
    return Result(params, losses, after, folder, outcome)


def measured(measure: Callable[[Any], jax.Array]) -> Callable[[Any], dict[str, jax.Array]]:
    """Return what `gf.fit` is to evaluate."""
    return lambda params: {"validation_loss": measure(params)}


def long_sequences(data: gf.data.Lines, most: int = 64) -> tuple[jax.Array, jax.Array]:
    """Return validation lines, joined without line ends; only the last letter of each has a target.

    Returns:
        Tokens and targets, `[n, 50]` each; all targets but the last are -1.

    Raises:
        RunError: there is too little of it.
    """
    tokens, targets = data.validation
    letters = tokens[:, 1:][targets[:, 1:] >= 0]  # without the line's end at the start of each
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
    # [50], one value per step of the scan
    return np.asarray(jax.jit(look)(params, batch).grad_stats[name].rms)


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
    read, actual, probabilities = expectations(net, params, *data.validation)
    symbols = data.tokenizer.symbols
    figure = token_probabilities([symbols[token] for token in read], actual, probabilities, symbols)
    figure.axes[0].set_xlabel(f"validation lines, letter by letter ({visible(chr(10))} ends a line)")
    return figure


def judge(
    config: Config, data: Any, losses: dict[str, float], gradients: dict[str, np.ndarray]
) -> runs.Outcome:
    """Compare the gradient 49 letters back, and on names the losses, with what is expected."""
    shares = {cell: sizes[0] / sizes[-1] for cell, sizes in gradients.items()}
    measured = {f"{cell} validation loss": loss for cell, loss in losses.items()}
    measured |= {
        "largest validation loss": max(losses.values()),
        "LSTM gradient / vanilla gradient": shares["lstm"] / max(shares["vanilla"], 1e-30),
    }
    options = "--data names.txt" if data.sha256 == NAMES else ""
    return runs.judge(given(EXPECTED, options), measured, defaults(config, "data"))


def gradient_through_time(
    norms: Mapping[str, Any], untrained: Mapping[str, Any] | None = None, what: str = "last step"
) -> Figure:
    """Draw how large the gradient still is, N steps before the loss that it comes from.

    Bengio, Simard and Frasconi, *Learning Long-Term Dependencies with Gradient Descent is Difficult*, 1994.

    Args:
        norms: for each network by its name, the rms of the gradient with respect to its state at each step
            `[T]`, from the first step to the last, where the loss is.
        untrained: the same networks before training, to draw as dotted lines of the same colors.
        what: what to call the last step.

    Returns:
        A figure with one line per network, as a share of the gradient at the last step, on a logarithmic scale.

    Raises:
        ValueError: nothing to draw, or a gradient that is zero at the last step.

    >>> gradient_through_time({"vanilla": [0.01, 0.1, 1.0]}).get_suptitle()
    '2 steps back from the last step: vanilla keeps 1/100 of the gradient'
    """
    if not norms:
        raise ValueError("gradient_through_time: there is no network to draw")
    figure = new_figure(8.0, 4.4)
    panel = figure.subplots()
    left_of = {}
    for (name, sizes), color, style in zip(
        norms.items(), cycle(LINE_COLORS), cycle(LINE_STYLES[:3]), strict=False
    ):
        shares = _shares(name, sizes)
        back = np.arange(len(shares))[::-1]
        panel.plot(back[::-1], shares[::-1], style, color=color, label=name, linewidth=2)
        if untrained is not None:
            before = _shares(name, untrained[name])
            panel.plot(back[::-1], before[::-1], ":", color=color, label="_untrained", linewidth=1.2)
        left_of[name] = shares[0]
    panel.set_yscale("log")
    panel.set_xlim(0, max(len(shares) - 1, 1))
    panel.set_xlabel(f"steps back from the {what}")
    panel.set_ylabel("gradient of the state (rms),\nas a share of that at the last step")
    panel.grid(color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
    if untrained is not None:
        panel.set_title("dotted: before training", fontsize=10)
    label_lines(panel)
    order = sorted(left_of, key=lambda name: -np.nan_to_num(left_of[name]))
    texts = [
        f"{name} {'keeps ' if i == 0 else ''}{_ratio(left_of[name])}{' of the gradient' if i == 0 else ''}"
        for i, name in enumerate(order)
    ]
    figure.suptitle(f"{len(shares) - 1} steps back from the {what}: {', '.join(texts)}")
    return figure


def _shares(name: str, sizes: Any) -> np.ndarray:
    sizes = np.asarray(sizes, np.float64)
    if not len(sizes) or not sizes[-1] > 0:
        raise ValueError(f"gradient_through_time: {name}: the gradient at the last step is not above 0")
    shares = sizes / sizes[-1]
    return np.where(shares > 0, shares, np.nan)  # a logarithm has no place for zeros


def _ratio(share: float) -> str:
    if not share > 0:
        return "nothing"
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if share < 1 / size:
            return f"1/{float(f'{1 / share / size:.2g}'):,.10g} {word}"
    return f"{100 * share:.0f} %" if share > 0.1 else f"1/{1 / share:,.0f}"
