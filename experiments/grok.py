"""Let a network learn to add modulo 59 by heart, wait, and see it understand; watch gradients, weights and waves."""

from __future__ import annotations

# Before what takes long to import, so that Ctrl-C is answered from the first moment.
if __name__ == "__main__":
    from gradfn.cli import script

    script(__file__)

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from gradfn import runs
from gradfn.files import inner_folder
from gradfn.layers._embed import look_up
from gradfn.report.figures import save_all
from gradfn.report.grok import grokking, waves

EXPECTED = (
    "with weight decay, 95 % of the sums that it was never shown right, at least 10 times as late as those that it was "
    "trained on; without, below 10 %; in a minute"
)
BY_HEART, UNDERSTOOD = 0.99, 0.95  # accuracies on the training and on the other sums
PROMISED_FACTOR, PROMISED_WITHOUT = 10.0, 0.10
EVALUATIONS = 160


@dataclass(frozen=True)
class Config:
    """Options of a run."""

    modulus: int = 59
    """the numbers are 0 to this, without it; sums are taken modulo it"""
    share: float = 0.4
    """of all pairs of numbers, what to train on"""
    hidden: int = 128
    """nodes in the hidden layer"""
    steps: int = 8000
    """training steps, each on all training pairs"""
    rate: float = 0.003
    """AdamW's learning rate"""
    decay: float = 0.2
    """weight decay of the first network; the second has none"""
    seed: int = 0
    """decides the first weights and which pairs are trained on"""
    resume: bool = False
    """go on with an interrupted run: the latest, or that in --folder"""
    folder: str | None = None
    """where to keep the run (else runs/grok/<time>)"""

    def __post_init__(self) -> None:
        runs.within(3, None, modulus=self.modulus)
        runs.within(1, None, hidden=self.hidden, steps=self.steps)
        runs.within(0, 2**32 - 1, seed=self.seed)
        if not 0 < self.share < 1:
            raise ValueError(f"share: a number above 0 and below 1, came {self.share}")
        if not (0 < self.rate < float("inf") and 0 < self.decay < float("inf")):
            raise ValueError(f"rate, decay: numbers above 0, came {self.rate}, {self.decay}")


class Result(NamedTuple):
    """What came of a run; dicts are by network, `decay` and `no decay`."""

    params: dict[str, dict[str, jax.Array]]
    histories: dict[str, Sequence[dict[str, Any]]]
    by_heart: int | None  # the step at which the training pairs are known, with decay
    understood: int | None  # that at which the others are
    folder: Path
    verdict: str


def run(config: Config) -> Result:
    """Train with and without weight decay, measure and draw; what it writes is in the result's folder."""
    config = runs.settle("grok", config)
    folder = runs.begin("grok", config)
    train, test = sums(config.modulus, config.share, config.seed)
    print(f"{len(train[1]):,} sums modulo {config.modulus} to train on, {len(test[1]):,} others")
    net = adder(config.modulus, config.hidden)
    print(gf.table(net.spec))
    loss, start = gf.classification_loss(net), net.init(jax.random.key(config.seed))
    params, histories = {}, {}
    for name, decay in {"decay": config.decay, "no decay": 0.0}.items():
        fitted = gf.fit(
            gf.batch_mean(loss),
            start,
            lambda key: train,  # all of it, each step
            optax.adamw(config.rate, b2=0.98, weight_decay=decay),
            config.steps,
            seed=config.seed,
            evaluate=measures(net, loss, train, test),
            eval_every=max(config.steps // EVALUATIONS, 1),
            folder=inner_folder(folder, name.replace(" ", "-")),
            resume=config.resume,
            progress=False,
        )
        params[name], histories[name] = fitted.params, fitted.history
        last = fitted.history[-1]
        print(
            f"{name}: after {last['step']:,} steps {100 * last['train_accuracy']:.1f} % of the training sums right, "
            f"{100 * last['test_accuracy']:.1f} % of the others"
        )

    by_heart = first(histories["decay"], "train_accuracy", BY_HEART)
    understood = first(histories["decay"], "test_accuracy", UNDERSTOOD)
    figures = {
        "grok": grokking(histories, by_heart, understood),
        "waves": waves(
            {"before training": start["A"]} | {f"after, {name}": params[name]["A"] for name in params}
        ),
    }
    save_all(figures, folder, f"sums modulo {config.modulus}")
    verdict = judge(config, by_heart, understood, histories["no decay"][-1]["test_accuracy"])
    runs.finish(folder, {"by_heart": by_heart, "understood": understood, "verdict": verdict})
    print(f"{verdict}\npictures: {folder}/grok.png, waves.png")
    return Result(params, histories, by_heart, understood, folder, verdict)


def adder(modulus: int, hidden: int) -> gf.Net:
    """Return a network of two numbers: a vector for each, added up, squared node by node, weighted.

    Gromov, *Grokking modular arithmetic*, 2023, whose squares make the waves that it finds easy to read.
    """
    normal = jax.nn.initializers.normal(0.3)  # large: learning by heart is the easy way from here
    spec = {
        "A": gf.Param((modulus, hidden), normal),
        "B": gf.Param((modulus, hidden), normal),
        "W": gf.Param((modulus, hidden), normal),
    }

    def apply(params: Any, pair: jax.Array) -> jax.Array:
        z = gf.tap(look_up(params["A"], pair[0]) + look_up(params["B"], pair[1]), "z")  # [hidden]
        return gf.layers.affine(params["W"], None, gf.tap(jnp.square(z), "a"))  # [modulus]

    return gf.Net(spec, apply)


def sums(
    modulus: int, share: float, seed: int
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Return all pairs of numbers `[n, 2]` and their sums `[n]`: those to train on, and the others."""
    pairs = np.stack(np.divmod(np.arange(modulus**2), modulus), 1).astype(np.int32)
    pairs = pairs[np.random.default_rng(seed).permutation(len(pairs))]
    answers = pairs.sum(1, dtype=np.int32) % modulus
    n = min(max(round(share * len(pairs)), 1), len(pairs) - 1)
    x, y = jnp.asarray(pairs), jnp.asarray(answers)
    return (x[:n], y[:n]), (x[n:], y[n:])


def measures(net: gf.Net, loss: Any, train: Any, test: Any) -> Any:
    """Return what `gf.fit` is to evaluate: accuracies, norms of weights and gradient, how pure the waves are."""
    right, mean_loss = gf.accuracy(net), gf.batch_mean(loss)

    @jax.jit
    def measure(params: Any) -> dict[str, jax.Array]:
        return {
            "train_accuracy": right(params, train),
            "test_accuracy": right(params, test),
            "test_loss": mean_loss(params, test),
            "weight_norm": optax.tree.norm(params),
            "gradient_norm": optax.tree.norm(jax.grad(mean_loss)(params, train)),
            "wave_share": wave_share(params["A"]),
        }

    return measure


def wave_share(A: jax.Array) -> jax.Array:
    """Return how much of the nodes' weights `[numbers, nodes]` is one wave each, in [0, 1].

    It is the share of the strongest frequency in a node's power (its mean left out), over all nodes. Nanda et al.,
    *Progress Measures for Grokking via Mechanistic Interpretability*, 2023, follow such a measure.
    """
    power = jnp.square(jnp.abs(jnp.fft.rfft(A, axis=0)[1:]))  # [frequencies, nodes]
    return power.max(0).sum() / power.sum()


def first(history: Sequence[dict[str, Any]], name: str, level: float) -> int | None:
    """Return the first step that was looked at with a metric at a level or above."""
    return next((row["step"] for row in history if row[name] >= level), None)


def judge(config: Config, by_heart: int | None, understood: int | None, without: float) -> str:
    """Say what was reached against what was expected; `without` is the test accuracy without decay."""
    reached = (
        f"known by heart ({100 * BY_HEART:.0f} %) at step {by_heart}, understood ({100 * UNDERSTOOD:.0f} %) at step "
        f"{understood}; without decay {100 * without:.1f} % understood"
    )
    if runs.options(config) != runs.options(Config(seed=config.seed)):
        return f"{reached} (nothing was promised for these options)"
    late = by_heart is not None and understood is not None and understood >= PROMISED_FACTOR * by_heart
    enough = late and without < PROMISED_WITHOUT
    expected = f"{PROMISED_FACTOR:.0f} times as late, and below {100 * PROMISED_WITHOUT:.0f} %"
    return f"{reached}; expected {expected}: {'reached' if enough else 'NOT reached'}"
