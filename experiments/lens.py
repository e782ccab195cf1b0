"""Read what each layer of a small GPT believes: the logit lens, the Jacobian lens, and the effects of its heads.

The logit lens of the embedding, whose matrix is also the unembedding, is sure of the token that was just read. The
Jacobian lens corrects that. After the first block the logit lens predicts the next token better: the mean Jacobian
sums what a position does to all later ones, not only to its own prediction.
"""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gradfn as gf
from gradfn import runs
from gradfn.pages.figures import LINE_COLORS, new_figure
from gradfn.pages.lenses import backward_lens_picture, direct_effects_picture, lens_picture
from gradfn.pages.sequences import MAX_TOKENS, visible
from gradfn.timings import phase
from gradfn.train import adamw_warmup_cosine

from ._common import SeededOptions, conclude, defaults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPECTED = (
    runs.Expectation("cross-entropy of the logit lens at the embedding", unit="nats per token"),
    runs.Expectation("cross-entropy of the last layer", unit="nats per token"),
    runs.Expectation(
        "smallest fall of the logit lens from a layer to the next", at_least=0.05, unit="nats per token"
    ),
    runs.Expectation("Jacobian lens - logit lens at the embedding", at_most=-1, unit="nats per token"),
    runs.Expectation("Jacobian lens - logit lens after the first block", unit="nats per token"),
    runs.Expectation("error of the sum of direct effects", at_most=1e-4),
)
N_FITTED, N_MEASURED = 50, 200  # sequences


@dataclass(frozen=True)
class Config(SeededOptions):
    """Options of a run; the defaults train a GPT of four blocks on the texts of Python's help()."""

    steps: int = runs.option(800, "updates", at_least=1)
    batch: int = runs.option(16, "sequences per step", at_least=1)
    context: int = runs.option(64, "characters a sequence", at_least=2)
    layers: int = runs.option(4, "blocks", at_least=1)
    width: int = runs.option(64, "features of a position, a multiple of 8", at_least=8)
    rate: float = runs.option(3e-3, "AdamW's learning rate after warm-up", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 8:
            raise ValueError(f"width must be a multiple of 8, got {self.width}")


class Result(NamedTuple):
    """The result of a run."""

    params: dict[str, Any]
    losses: Mapping[str, np.ndarray]  # nats per token of each layer, by the name of the lens
    effects: gf.circuits.DirectEffects
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train, read every layer and draw; it writes into the folder of the result."""
    config = runs.settle("lens", config)
    data = gf.data.text()
    print(data)
    net = gf.gpt(
        gf.GPTConfig(
            vocab=data.tokenizer.size,
            context=config.context,
            n_layers=config.layers,
            n_heads=4,
            width=config.width,
            positions="rope",
            norm="rms",
            bias=False,
        )
    )
    folder = runs.start("lens", config)
    print(gf.table(net.spec))
    fitted = gf.fit(
        gf.batch_mean(gf.next_token_loss(net)),
        net.init(jax.random.key(config.seed)),
        gf.data.windows(data.train, config.context, config.batch),
        adamw_warmup_cosine(
            config.steps,
            config.rate,
            final_rate=config.rate / 10,
            warmup=min(100, config.steps // 10),
            b2=0.99,
            decay=0.1,
            clip=1.0,
        ),
        config.steps,
        batch_size=config.batch,
        seed=config.seed,
        folder=folder,
        resume=config.resume,
    )
    fitted_on, of_test = (
        tuple(map(jnp.asarray, gf.data.fixed_windows(part, config.context, n)))
        for part, n in ((data.train, N_FITTED), (data.validation, N_MEASURED))
    )
    jacobians = gf.circuits.jacobian_lens(net.apply)(fitted.params, fitted_on[0])
    print(jacobians)
    lenses = {
        "logit lens": gf.circuits.logit_lens(net.apply),
        "Jacobian lens": gf.circuits.logit_lens(net.apply, transport=jacobians),
    }
    losses = {name: np.asarray(mean_loss(lens)(fitted.params, of_test)) for name, lens in lenses.items()}
    tokens, targets = (part[0] for part in of_test)
    shown = {name: lens(fitted.params, tokens) for name, lens in lenses.items()}
    print(shown["logit lens"])
    written = gf.circuits.backward_lens(gf.next_token_loss(net))(fitted.params, (tokens, targets))
    print(written)
    at, token = most_raised(shown["logit lens"], targets)
    effects = gf.circuits.direct_effects(net.apply, lambda logits: centered(logits[at])[token])(
        fitted.params, tokens
    )
    print(effects)
    outcome = judge(config, losses, effects)
    with phase("pictures"):
        vocabulary = data.tokenizer.vocabulary()
        read, follow = [vocabulary[t] for t in tokens], targets.tolist()
        before = "".join(visible(vocabulary[t]) for t in tokens[max(0, at - 11) : at + 1])
        figures = {
            "logits": lens_picture(shown["logit lens"], read, follow, vocabulary),
            "gradients": backward_lens_picture(written, read, follow, vocabulary),
            "depth": by_depth(losses, jacobians.layers),
            "effects": direct_effects_picture(
                effects, f"Above the mean, the logit of '{visible(vocabulary[token])}' after '{before}'"
            ),
        }
    conclude(
        folder, outcome, figures, data.name, losses={name: loss.tolist() for name, loss in losses.items()}
    )
    return Result(fitted.params, losses, effects, folder, outcome)


def mean_loss(lens: Any) -> Any:
    """Return `(params, (tokens, targets)) -> [layer]`: the mean cross-entropy of each layer over sequences."""

    @jax.jit
    def measure(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        one = lambda example: lens(params, example[0]).cross_entropy(example[1])  # noqa: E731
        return jax.lax.map(one, batch, batch_size=16).mean(0)

    return measure


def most_raised(lens: gf.circuits.LogitLens, targets: jax.Array) -> tuple[int, int]:
    """Return where the layers raise the probability of the right token most, of what is drawn, and that token."""
    own = jnp.exp(lens.log_probability(targets)[:, :MAX_TOKENS])
    at = int((own[-1] - own[0]).argmax())
    return at, int(targets[at])


def centered(logits: jax.Array) -> jax.Array:
    """Return logits minus their mean, which the softmax does not see."""
    return logits - logits.mean()


def judge(
    config: Config, losses: Mapping[str, np.ndarray], effects: gf.circuits.DirectEffects
) -> runs.Outcome:
    """Compare what the layers believe, and whether the effects add up, with what is expected."""
    logit, jacobian = losses["logit lens"], losses["Jacobian lens"]
    total = effects.constant + effects.parts.sum() + effects.rest
    values = (
        logit[0],
        logit[-1],
        -np.diff(logit).max(),
        jacobian[0] - logit[0],
        jacobian[1] - logit[1],
        abs(total - effects.value),
    )
    measured = {each.name: float(value) for each, value in zip(EXPECTED, values, strict=True)}
    return runs.judge(EXPECTED, measured, defaults(config))


def by_depth(losses: Mapping[str, np.ndarray], layers: Sequence[str]) -> Figure:
    """Draw the cross-entropy of each layer by each lens.

    Args:
        losses: `[layer]` by the name of the lens.
        layers: their names.

    Returns:
        A figure with one line per lens.

    >>> losses = {"logit lens": np.array([7.5, 2.5, 1.5]), "Jacobian lens": np.array([4.0, 3.0, 1.5])}
    >>> print(by_depth(losses, ["embedded", "blocks/0/residual", "blocks/1/residual"]).get_suptitle())
    What each layer believes of the next token: by the logit lens, 7.5 nats fall to 1.5;
    the Jacobian lens is 3.5 nats lower at the embedding and 0.5 higher after the first block
    """
    figure = new_figure(7.2, 4.2)
    panel = figure.subplots()
    for (name, loss), color, marker in zip(losses.items(), LINE_COLORS, "os", strict=False):
        panel.plot(loss, color=color, marker=marker, label=name)
        for i, value in enumerate(loss):
            above = value >= max(each[i] for each in losses.values())
            panel.annotate(
                f"{value:.2f}",
                (i, value),
                xytext=(0, 7 if above else -14),
                textcoords="offset points",
                color=color,
                ha="center",
                fontsize=8,
            )
    panel.set_xticks(range(len(layers)), layers)
    panel.set_ylabel("cross-entropy of the next token (nats)")
    panel.set_ylim(0, 1.12 * max(map(max, losses.values())))
    panel.margins(x=0.08)
    panel.legend()
    logit, jacobian = losses["logit lens"], losses["Jacobian lens"]
    first, second = jacobian[:2] - logit[:2]
    figure.suptitle(
        "What each layer believes of the next token: by the logit lens, "
        f"{logit[0]:.3g} nats fall to {logit[-1]:.3g};\nthe Jacobian lens is {_compared(first)} at the embedding and "
        f"{_compared(second, '')} after the first block",
        fontsize=11,
    )
    return figure


def _compared(difference: float, unit: str = " nats") -> str:
    return f"{abs(difference):.2g}{unit} {'lower' if difference < 0 else 'higher'}"
