"""Let a dense and a convolutional net draw what each digit should look like, beside digits as people write them."""

from __future__ import annotations

# Before what takes long to import, so that Ctrl-C is answered from the first moment.
if __name__ == "__main__":
    from gradfn.cli import script

    script(__file__)

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from gradfn import runs
from gradfn.files import inner_folder
from gradfn.report.attribution import image_rows
from gradfn.report.classifier import in_parts
from gradfn.report.figures import save_all
from gradfn.train.augment import shifted

EXPECTED = (
    "for at least 9 of the dense net's 10 drawings that the training digit which is most like it is of its class, in a "
    "minute"
)
STEPS = {"digits": 2400, "mnist": 12_000}
N_CLASSES = 10


@dataclass(frozen=True)
class Config:
    """Options of a run; the defaults ask a 784-16-10 net and a small convolutional one about the built-in digits."""

    hidden: int = 16
    """nodes in the dense net's hidden layer"""
    data: Literal["digits", "mnist"] = "digits"
    """digits: 1,797 real ones that come with scikit-learn, 8x8 resized to 28x28 (not MNIST); mnist: the 70,000"""
    data_path: str | None = None
    """folder with MNIST's four files (else $GRADFN_MNIST, else a download into the cache)"""
    steps: int | None = None
    """of the dense net's training, 32 digits each (else 2,400; with MNIST 12,000); the other takes a third of them"""
    noise: float = 0.5
    """standard deviation of the noise on the training digits, in units of full ink, which smooths what is learned"""
    climb: int = 256
    """steps up the score of a class"""
    seed: int = 0
    """decides the first weights, the order of the digits, the noise, and how drawings are shifted on the way"""
    resume: bool = False
    """go on with an interrupted run: the latest, or that in --folder"""
    folder: str | None = None
    """where to keep the run (else runs/reconstruct/<time>)"""

    def __post_init__(self) -> None:
        runs.within(1, None, hidden=self.hidden, steps=self.steps, climb=self.climb)
        runs.within(0, 2**32 - 1, seed=self.seed)
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise: a number from 0 up, came {self.noise}")


class Drawn(NamedTuple):
    """What a net drew, a row each class, and how like a digit it is."""

    images: np.ndarray  # [classes, height, width]
    sure: np.ndarray  # [classes], how sure the net is of its class, in [0, 1]
    nearest: np.ndarray  # [classes], the training digit that is most like it
    of_own_class: int  # for how many that digit is of their class
    test_accuracy: float  # of the net, in [0, 1]


class Result(NamedTuple):
    """What came of a run."""

    params: dict[str, Any]  # by the name of the net
    drawn: dict[str, Drawn]
    history: Sequence[dict[str, Any]]
    test_accuracy: float  # of the dense net, in [0, 1]
    folder: Path
    verdict: str


def run(config: Config) -> Result:
    """Train two nets, let them draw each class, and compare the drawings with real digits."""
    config = runs.settle("reconstruct", config)
    data = gf.data.mnist(config.data_path) if config.data == "mnist" else gf.data.digits()
    print(data)
    folder = runs.begin("reconstruct", config)
    steps = config.steps or STEPS[config.data]
    dense, conv = gf.mlp([784, config.hidden, N_CLASSES]), gf.cnn((28, 28, 1), (8, 16), (64,), N_CLASSES, 5)
    ways = {
        "dense net": (dense, noisy(gf.classification_loss(dense), config.noise), steps, folder),
        "convolutional net": (
            conv,
            shifted(gf.batch_mean(gf.classification_loss(conv)), data.shape),
            -(-steps // 3),
            inner_folder(folder, "conv"),
        ),
    }
    params, drawn, histories = {}, {}, []
    for name, (net, loss, n_steps, where) in ways.items():
        print(f"{name}: {gf.count(net.spec):,} parameters")
        fitted = gf.fit(
            loss,
            net.init(jax.random.key(config.seed)),
            data.train,
            optax.adamw(optax.cosine_decay_schedule(0.003, n_steps), weight_decay=0.03),
            n_steps,
            seed=config.seed,
            folder=where,
            resume=config.resume,
        )
        params[name], drawn[name] = fitted.params, draw(net, fitted.params, data, config)
        histories.append(fitted.history)

    verdict = judge(config, drawn["dense net"].of_own_class)
    save_all({"wanted": wanted_figure(drawn, data)}, folder, data.name)
    for name, one in drawn.items():
        likeness = f"{one.of_own_class} of {N_CLASSES} drawings are most like a digit of their class"
        print(f"{name}: test accuracy {100 * one.test_accuracy:.1f} %, {likeness}")
    accuracy = drawn["dense net"].test_accuracy
    counts = {name: one.of_own_class for name, one in drawn.items()}
    runs.finish(folder, {"test_accuracy": accuracy, "of_own_class": counts, "verdict": verdict})
    print(f"{verdict}\npictures: {folder}/wanted.png")
    return Result(params, drawn, histories[0], accuracy, folder, verdict)


def noisy(loss: Any, sd: float) -> Any:
    """Return the mean over a batch of a loss of one example, its input noisy each time otherwise.

    Bishop, *Training with Noise is Equivalent to Tikhonov Regularization*, 1995: it keeps the slope with respect
    to the input small, so that what the net wants to see is smooth.
    """

    def noisy_loss(params: Any, example: Any, key: jax.Array) -> jax.Array:
        x, label = example
        return loss(params, (x + sd * jax.random.normal(key, x.shape, x.dtype), label))

    return gf.batch_mean(noisy_loss)


def draw(net: gf.Net, params: Any, data: gf.data.Dataset, config: Config) -> Drawn:
    """Let a net draw each class, and compare with the training digits."""
    # From grey, not from paper: there all units of a relu net may be off, and no slope shows the way.
    key, grey = jax.random.key(config.seed), jnp.full(784, 0.5)

    @jax.jit
    def climb(label: jax.Array) -> tuple[jax.Array, jax.Array]:
        wanted = gf.attribution.maximize(net.apply, label, shape=data.shape, steps=config.climb)
        x = wanted(params, grey, key=key).x
        return x, jax.nn.softmax(net.apply(params, x))[label]

    images, sure = jax.lax.map(climb, jnp.arange(N_CLASSES))
    digits, labels = data.train
    nearest = correlations(np.asarray(images), digits).argmax(1)
    return Drawn(
        images=np.asarray(images).reshape(-1, *data.shape),
        sure=np.asarray(sure),
        nearest=nearest,
        of_own_class=int((labels[nearest] == np.arange(N_CLASSES)).sum()),
        test_accuracy=float(
            jax.jit(in_parts(gf.accuracy(net)))(params, jax.tree.map(jnp.asarray, data.test))
        ),
    )


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the correlation of each image of one batch with each of another: how alike, whatever the ink.

    Args:
        a: `[n, pixels]`.
        b: `[m, pixels]`.

    Returns:
        `[n, m]`, from -1 to 1.
    """
    centred = [part - part.mean(1, keepdims=True) for part in (a, b)]
    a, b = (part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12) for part in centred)
    return a @ b.T


def wanted_figure(drawn: dict[str, Drawn], data: gf.data.Dataset) -> Any:
    """Draw what each class wants to see, beside the class's mean and the nearest training digit."""
    digits, labels = data.train
    as_images = lambda part: part.reshape(-1, *data.shape)  # noqa: E731
    rows = {"class mean": as_images(np.stack([digits[labels == k].mean(0) for k in range(N_CLASSES)]))}
    notes = {}
    for name, one in drawn.items():
        # Each drawing is shown from paper to its own darkest ink: some are pale.
        darkest = one.images.max((1, 2), keepdims=True)
        drawing, nearest = f"{name}\ndraws", f"nearest digit\n({name.split()[0]})"
        rows |= {
            drawing: one.images / np.where(darkest > 0, darkest, 1),
            nearest: as_images(digits[one.nearest]),
        }
        notes[drawing] = [f"{100 * sure:.0f} % sure" for sure in one.sure]
        notes[nearest] = [f"a {label}" for label in labels[one.nearest]]
    counts = [f"{one.of_own_class} of the {name}'s" for name, one in drawn.items()]
    title = (
        f"What each class wants to see: for {' and '.join(counts)} ten drawings\n"
        "the training digit that is most like it is of its class"
    )
    return image_rows(rows, [str(k) for k in range(N_CLASSES)], title, notes)


def judge(config: Config, of_own_class: int) -> str:
    """Say what was reached against what was expected."""
    reached = f"{of_own_class} of {N_CLASSES} drawings of the dense net are most like a digit of their class"
    asked = (config.hidden, config.steps, config.noise, config.climb)
    if asked != (Config.hidden, None, Config.noise, Config.climb):
        return f"{reached} (nothing was promised for these options)"
    return f"{reached}; expected at least 9: {'reached' if of_own_class >= 9 else 'NOT reached'}"
