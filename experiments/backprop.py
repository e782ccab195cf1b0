"""Take one gradient in four ways: the chain rule by hand, jax.grad, gf.backprop by steps, finite differences."""

from __future__ import annotations

# Before what takes long to import, so that Ctrl-C is answered from the first moment.
if __name__ == "__main__":
    from gradfn.cli import script

    script(__file__)

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import gradfn as gf
from gradfn import runs
from gradfn.files import replace_file
from gradfn.report.backprop import agreement, equations
from gradfn.report.figures import save_all, weight_images

EXPECTED = (
    "the four to agree in all 12,730 parameters, by hand and by jax to 1e-12 of the largest gradient of each matrix, "
    "finite differences to 1e-8; in some ten seconds"
)
PROMISED = {"jax.grad": 1e-12, "gf.backprop": 1e-12, "finite differences": 1e-8}
STEP = 1e-4  # of the central differences: their errors are of its square, those of rounding 1e-16 over it


@dataclass(frozen=True)
class Config:
    """Options of a run."""

    hidden: int = 16
    """nodes in the hidden layer"""
    example: int = 0
    """which of the training digits to take the gradient for"""
    data: Literal["digits", "mnist"] = "digits"
    """digits: 1,797 real ones that come with scikit-learn, 8x8 resized to 28x28 (not MNIST); mnist: the 70,000"""
    data_path: str | None = None
    """folder with MNIST's four files (else $GRADFN_MNIST, else a download into the cache)"""
    seed: int = 0
    """decides the weights"""
    resume: bool = False
    """go on with an interrupted run: the latest, or that in --folder"""
    folder: str | None = None
    """where to keep the run (else runs/backprop/<time>)"""

    def __post_init__(self) -> None:
        runs.within(1, None, hidden=self.hidden)
        runs.within(0, None, example=self.example)
        runs.within(0, 2**32 - 1, seed=self.seed)


class Result(NamedTuple):
    """What came of a run."""

    grads: dict[str, dict[str, np.ndarray]]  # by way and parameter
    errors: dict[str, dict[str, float]]  # by way and parameter, against the chain rule by hand
    folder: Path
    verdict: str


def run(config: Config) -> Result:
    """Take the gradient in each way, compare, and draw; what it writes is in the result's folder."""
    config = runs.settle("backprop", config)
    data = gf.data.mnist(config.data_path) if config.data == "mnist" else gf.data.digits()
    print(data if config.data == "mnist" else f"{data}\n(8x8 pixels, resized: this is not MNIST)")
    images, labels = data.train
    if config.example >= len(labels):
        raise runs.RunError(
            f"example: there are {len(labels):,} training digits, came number {config.example}"
        )
    folder = runs.begin("backprop", config)

    net = gf.mlp([784, config.hidden, 10], activation="sigmoid")
    loss = gf.classification_loss(net)
    start = net.init(jax.random.key(config.seed))
    # In float64, so that what is left between the four is a difference of method and not of rounding.
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), start)
        example = jnp.asarray(images[config.example], jnp.float64), jnp.asarray(int(labels[config.example]))
        by_hand = jax.jit(gf.chain_rule)(params, *example)
        steps = gf.backprop(loss, keep=True)(params, example)
        print(steps)
        grads = {
            "by hand": by_hand.grads,
            "jax.grad": jax.jit(jax.grad(loss))(params, example),
            "gf.backprop": {c.name: c.value for step in steps for c in step.outgoing if c.name in params},
            "finite differences": finite_differences(loss, params, example),
        }
        grads = {way: {name: np.asarray(found[name]) for name in params} for way, found in grads.items()}
        by_hand = jax.tree.map(np.asarray, by_hand)
    errors = {
        way: errors_against(grads["by hand"], found) for way, found in grads.items() if way != "by hand"
    }
    replace_file(folder / "steps.txt", f"{steps}\n".encode())

    few = jax.tree.map(lambda part: jnp.asarray(part[:1000]), data.train)
    of_many = jax.jit(jax.grad(gf.batch_mean(loss)))(start, few)
    figures = {
        "equations": equations(by_hand, np.asarray(start["W2"]), labels[config.example], data.shape),
        "agree": agreement(grads, errors, int(np.abs(by_hand.deltas[1]).argmax()), data.shape),
        "gradients": weight_images(of_many["W1"], data.shape, "∂C/∂W1"),
    }
    figures["gradients"].suptitle(
        f"∂C/∂W1: how {len(few[1]):,} digits want each hidden node's weights to change, before any training"
    )
    figures["gradients"].axes[-1].set_ylabel(
        "gradient (the loss falls when red weights shrink, blue ones grow)"
    )
    save_all(figures, folder, data.name)
    verdict = judge(errors)
    runs.finish(folder, {"errors": errors, "verdict": verdict})
    print(f"{verdict}\npictures: {folder}/equations.png, agree.png, gradients.png; steps: {folder}/steps.txt")
    return Result(grads, errors, folder, verdict)


def finite_differences(loss: Any, params: Any, example: Any) -> Any:
    """Return the gradient by changing each parameter a little, up and down: (C(w + h) - C(w - h)) / 2h."""
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def slopes(flat: jax.Array) -> jax.Array:
        def slope(i: jax.Array) -> jax.Array:
            up, down = (loss(unravel(flat.at[i].add(step)), example) for step in (STEP, -STEP))
            return (up - down) / (2 * STEP)

        return jax.lax.map(slope, jnp.arange(flat.size), batch_size=256)

    return unravel(slopes(flat))


def errors_against(by_hand: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> dict[str, float]:
    """Return by parameter the largest difference between two gradients, as a share of the largest gradient."""
    return {
        name: float(np.abs(found[name] - grad).max() / max(np.abs(grad).max(), 1e-300))
        for name, grad in by_hand.items()
    }


def judge(errors: dict[str, dict[str, float]]) -> str:
    """Say what was reached against what was expected."""
    worst = {way: np.max(list(of_leaves.values())) for way, of_leaves in errors.items()}  # nan if one is
    reached = "; ".join(f"{way} {error:.0e}" for way, error in worst.items())
    enough = all(worst[way] <= promised for way, promised in PROMISED.items())
    expected = ", ".join(f"{promised:.0e}" for promised in PROMISED.values())
    return (
        f"largest difference to the gradient by hand: {reached}; expected at most {expected}: "
        f"{'reached' if enough else 'NOT reached'}"
    )
