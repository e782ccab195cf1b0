"""Make one node by hand: weights for a stroke, a bias for inactivity, and see which digits it fires for."""

from __future__ import annotations

# Before what takes long to import, so that Ctrl-C is answered from the first moment.
if __name__ == "__main__":
    from gradfn.cli import script

    script(__file__)

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gradfn as gf
from gradfn import runs
from gradfn.report.figures import save_all
from gradfn.report.neuron import firing_rates, what_a_node_sees

EXPECTED = (
    "a node that fires for 4 in 10 of all digits without a bias, and with a bias of -10 for 1 in 14, of which at "
    "least 65 % are fives; in some seconds"
)
BIASES = tuple(range(0, -21, -1))
PROMISED_SHARE, PROMISED_RATE = 0.65, 0.10


@dataclass(frozen=True)
class Config:
    """Options of a run; the region is counted in pixels of the 28x28 image."""

    top: int = 11
    """first row of the region of interest"""
    left: int = 0
    """its first column"""
    height: int | None = None
    """its rows (else 5, or what is left below the first)"""
    width: int | None = None
    """its columns (else 16, or what is left to the right of the first)"""
    ring: int = 3
    """how far the negative surround reaches; 0 for none"""
    bias: int = -10
    """the bias for inactivity that is drawn in detail, beside none"""
    data: Literal["digits", "mnist"] = "digits"
    """digits: 1,797 real ones that come with scikit-learn, 8x8 resized to 28x28 (not MNIST); mnist: the 70,000"""
    data_path: str | None = None
    """folder with MNIST's four files (else $GRADFN_MNIST, else a download into the cache)"""
    resume: bool = False
    """go on with an interrupted run: the latest, or that in --folder"""
    folder: str | None = None
    """where to keep the run (else runs/neuron/<time>)"""

    def __post_init__(self) -> None:
        runs.within(0, 27, top=self.top, left=self.left)
        runs.within(1, 28 - self.top, height=self.height)
        runs.within(1, 28 - self.left, width=self.width)
        runs.within(0, 28, ring=self.ring)
        runs.within(BIASES[-1], -1, bias=self.bias)


class Result(NamedTuple):
    """What came of a run."""

    weights: np.ndarray  # [28, 28]
    sums: np.ndarray  # [digits], weighted, without a bias
    rates: np.ndarray  # [biases, 10], share of each class that the node fires for
    folder: Path
    verdict: str


def run(config: Config) -> Result:
    """Make the node, show it every digit under every bias, and draw; what it writes is in the result's folder."""
    config = runs.settle("neuron", config)
    data = gf.data.mnist(config.data_path) if config.data == "mnist" else gf.data.digits()
    print(data if config.data == "mnist" else f"{data}\n(8x8 pixels, resized: this is not MNIST)")
    folder = runs.begin("neuron", config)
    # Nothing is learned here, so all of the digits may be looked at.
    images, labels = (np.concatenate(parts) for parts in zip(*data[:3], strict=True))

    weights = node(config)
    activations = activation(jnp.asarray(weights.reshape(1, 784)), jnp.asarray(images))  # [biases, digits]
    fires = np.asarray(activations > 0.5)  # over the middle of [0, 1]: the weighted sum outweighs the bias
    rates = np.stack([fires[:, labels == digit].mean(1) for digit in range(10)], 1)  # [biases, 10]
    sums = images @ weights.ravel()

    shown = [typical(sums, np.flatnonzero(labels == digit)) for digit in range(10)]
    figures = {
        "node": what_a_node_sees(weights, images[shown].reshape(-1, 28, 28), labels[shown], config.bias),
        "firing": firing_rates(sums, labels, BIASES, rates, config.bias),
    }
    save_all(figures, folder, data.name)
    verdict = judge(config, labels, fires)
    runs.finish(folder, {"rates": rates.tolist(), "verdict": verdict})
    print(f"{verdict}\npictures: {folder}/node.png, firing.png")
    return Result(weights, sums, rates, folder, verdict)


def node(config: Config) -> np.ndarray:
    """Return the weights `[28, 28]`: 1 in the region, 0 far from it, and below 0 in a ring around it.

    The ring takes off what the region adds, so that paper covered with ink is no signal: only a stroke with
    paper beside it is.
    """
    height = config.height or min(5, 28 - config.top)
    width = config.width or min(16, 28 - config.left)
    rows, columns = np.indices((28, 28))
    above, below = config.top - rows, rows - (config.top + height - 1)
    before, after = config.left - columns, columns - (config.left + width - 1)
    away = np.maximum.reduce([above, below, before, after])  # pixels from the region, 0 and less inside
    region, ring = away <= 0, (away > 0) & (away <= config.ring)
    surround = -region.sum() / ring.sum() if ring.any() else 0.0
    return np.where(region, 1.0, np.where(ring, surround, 0.0)).astype(np.float32)


def typical(sums: np.ndarray, index: np.ndarray) -> int:
    """Return that of some digits whose weighted sum lies in the middle."""
    return int(index[np.argsort(sums[index])[len(index) // 2]])


@jax.jit
def activation(W: jax.Array, images: jax.Array) -> jax.Array:
    """Return what the node makes of each image `[n, 784]` under each bias, in [0, 1]: `[biases, n]`."""

    def of_one(bias: jax.Array, image: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(gf.layers.affine(W, bias[None], image))[0]  # sigma(W a + b)

    of_all = jax.vmap(jax.vmap(of_one, (None, 0)), (0, None))
    return of_all(jnp.asarray(BIASES, W.dtype), images)


def judge(config: Config, labels: np.ndarray, fires: np.ndarray) -> str:
    """Say what was reached against what was expected; `fires` is `[biases, digits]`."""
    with_bias = fires[BIASES.index(config.bias)]
    counts = np.bincount(labels[with_bias], minlength=10)
    digit, share = int(counts.argmax()), counts.max() / max(counts.sum(), 1)
    reached = (
        f"without a bias the node fires for {100 * fires[0].mean():.1f} % of the digits, with a bias of {config.bias} "
        f"for {100 * with_bias.mean():.1f} %, of which {100 * share:.0f} % are {digit}s"
    )
    if runs.options(config) != runs.options(Config()):
        return f"{reached} (nothing was promised for these options)"
    enough = digit == 5 and share >= PROMISED_SHARE and with_bias.mean() <= PROMISED_RATE
    expected = f"at most {100 * PROMISED_RATE:.0f} %, and at least {100 * PROMISED_SHARE:.0f} % of them 5s"
    return f"{reached}; expected {expected}: {'reached' if enough else 'NOT reached'}"
