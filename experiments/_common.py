"""What the experiments share: options of a run and of its data, and training and evaluation of image classifiers."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from gradfn import runs
from gradfn.pages.figures import History, confusion, curves, mistakes, save_all
from gradfn.timings import phase
from gradfn.train.augment import shifted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Examples evaluated at a time: the values inside a network for all examples at once would fill the memory.
PART = 1000
# Why a training loss is larger than it would be on the images as they are.
SHIFTED = "on digits shifted at random"


@dataclass(frozen=True)
class RunOptions:
    """Options of every run."""

    resume: bool = runs.option(False, "resume an interrupted run: the latest, or the one in --folder")
    folder: str | None = runs.option(None, "where to store the run (default: runs/NAME/<time>)")
    timings: bool = runs.option(False, "print how long it took to import, read data, compile, train and draw")

    def __post_init__(self) -> None:
        """Check the bounds of all options; a subclass with more to check extends this."""
        runs.check(self)


@dataclass(frozen=True)
class SeededOptions(RunOptions):
    """Options of a run with random numbers."""

    seed: int = runs.option(
        0,
        "determines all random numbers, such as the initial weights and the order of the examples",
        at_least=0,
        at_most=0xFFFF_FFFF,
    )


@dataclass(frozen=True)
class DigitOptions(SeededOptions):
    """Options of a run on images of digits."""

    data: Literal["digits", "mnist"] = runs.option(
        "digits",
        "digits: 1,797 real ones from scikit-learn, 8x8 resized to 28x28 (not MNIST); mnist: all 70,000",
    )
    data_path: str | None = runs.option(
        None,
        "folder with MNIST's four files (default: $GRADFN_MNIST, else they are downloaded into the cache)",
    )


@dataclass(frozen=True)
class DistributedOptions(SeededOptions):
    """Options of a run that several processes may compute."""

    distributed: bool = runs.option(
        False,
        "this is one of several processes, each started with the same command: under SLURM, Open MPI, Kubernetes and "
        "on TPU pods they find each other, elsewhere each needs the three options below",
    )
    coordinator: str | None = runs.option(None, "the address of process 0, host:port")
    processes: int | None = runs.option(None, "how many processes there are", at_least=1)
    process: int | None = runs.option(None, "the index of this process, from 0", at_least=0)
    mesh: str | None = runs.option(
        None,
        "the devices to train on, as a mesh such as data=8 or data=4,model=2; each batch is split over data (default: "
        "all devices of several processes, one device of a single process)",
    )
    shard: Literal["data", "fsdp", "tensor", "fsdp_tensor"] = runs.option(
        "data",
        "what each device of the mesh holds: all parameters, a part of them along data (fsdp), along model (tensor), "
        "or along both",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mesh_axes()
        for name in ("coordinator", "processes", "process"):
            if getattr(self, name) is not None and not self.distributed:
                raise ValueError(f"{name}: add --distributed, which it belongs to")

    def mesh_axes(self) -> dict[str, int]:
        """Return the sizes of the axes of the mesh, by name; none where no mesh is given.

        Raises:
            ValueError: it cannot be read, or lacks an axis.
        """
        axes = dict(re.findall(r"(data|model)=([1-9][0-9]*)(?:,|$)", self.mesh or ""))
        if self.mesh is not None and (
            not axes or ",".join("=".join(axis) for axis in axes.items()) != self.mesh
        ):
            raise ValueError(f"mesh: expected data=8 or data=4,model=2, got {self.mesh!r:.60}")
        if axes and "data" not in axes:
            raise ValueError(f"mesh: an axis data is missing. Pass data=1,{self.mesh}")
        if "tensor" in self.shard and "model" not in axes:
            raise ValueError(
                f"shard: {self.shard} needs a mesh with an axis model, such as --mesh data=4,model=2"
            )
        return {name: int(size) for name, size in axes.items()}


D = TypeVar("D", bound=DigitOptions)


class ClassifierResult(NamedTuple):
    """The result of training a classifier."""

    params: dict[str, Any]
    history: Sequence[dict[str, Any]]
    test_accuracy: float  # in [0, 1]
    folder: Path
    outcome: runs.Outcome


def load_digits(config: DigitOptions, **options: Any) -> gf.data.Dataset:
    """Return the data that `config` asks for, and print a line about it; `options` are those of `gf.data.digits`."""
    data = gf.data.mnist(config.data_path) if config.data == "mnist" else gf.data.digits(**options)
    print(data)
    return data


def start_on_digits(name: str, config: D, **options: Any) -> tuple[D, gf.data.Dataset, Path]:
    """Start a run on digits.

    Args:
        name: of the experiment.
        config: its options.
        options: those of `gf.data.digits`.

    Returns:
        The settled options, the data, and the folder of the run.

    Raises:
        RunError: the run cannot be started as requested, or a batch would be larger than the training data.
    """
    config = runs.settle(name, config)
    data = load_digits(config, **options)
    if hasattr(config, "batch"):
        batch_for(config, len(data.train[1]), "training digits")
    return config, data, runs.start(name, config)


def defaults(config: RunOptions, *free: str) -> bool:
    """Tell whether all options but the seed and those named in `free` have their default values."""
    default = runs.options(type(config)())
    given = runs.options(config)
    return all(given[name] == default[name] for name in given if name not in ("seed", "data_path", *free))


def given(expected: Sequence[runs.Expectation], options: str) -> list[runs.Expectation]:
    """Return the expectations for some options, or those without options where there are none for these."""
    found = [each for each in expected if each.given == options]
    return found or [each for each in expected if not each.given]


def batch_for(config: Any, n: int, what: str) -> int:
    """Return the batch size: `config.batch`, or all `n` examples where there are fewer than its default.

    Args:
        config: with `batch`.
        n: how many examples there are.
        what: their name for the error.

    Raises:
        RunError: more were requested than there are.
    """
    if config.batch > n and config.batch != type(config)().batch:
        raise runs.RunError(f"batch: there are {n:,} {what}, got {config.batch}")
    return min(config.batch, n)


def mesh_for(config: DistributedOptions, batch: int) -> jax.sharding.Mesh | None:
    """Return the devices that share each batch; None for a single one.

    Args:
        config: whose `mesh` names the devices; by default they are all devices of several processes.
        batch: examples per step.

    Raises:
        RunError: there are fewer devices, several processes have more, or the examples cannot be split evenly.
    """
    axes = config.mesh_axes()
    if not axes:
        if jax.process_count() == 1 and config.shard == "data":
            return None
        axes = {"data": jax.device_count()}
    n = math.prod(axes.values())
    if n > jax.device_count() or (n < jax.device_count() and jax.process_count() > 1):
        raise runs.RunError(f"mesh: {config.mesh} has {n} devices, but there are {jax.device_count()}")
    if batch % axes["data"]:
        raise runs.RunError(
            f"batch: must be a multiple of {axes['data']}, the devices along data, got {batch}"
        )
    # Evaluation and generation know nothing of devices: the compiler splits their work.
    types = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=jax.devices()[:n])


def init_on(net: gf.Net, key: jax.Array, mesh: jax.sharding.Mesh | None, shard: str) -> Any:
    """Return a net's initial parameters, split over a mesh as the option `shard` says; None for one device."""
    if mesh is None:
        return net.init(key)
    rules = {
        "data": gf.train.DATA_PARALLEL,
        "fsdp": gf.train.FSDP,
        "tensor": gf.train.TENSOR_PARALLEL,
        "fsdp_tensor": gf.train.FSDP_TENSOR_PARALLEL,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shardings = gf.train.shardings(net, mesh, rules[shard])
    for warning in caught:  # of axes that do not divide
        print(warning.message)
    return net.init(key, shardings=shardings)


def heads_for(config: Any) -> int:
    """Return the number of attention heads: `config.heads`, or at most 4 that divide the width.

    >>> from types import SimpleNamespace
    >>> [heads_for(SimpleNamespace(heads=None, width=width)) for width in (128, 30, 25)]
    [4, 3, 1]
    """
    return config.heads or next(n for n in (4, 3, 2, 1) if config.width % n == 0)


def check_heads(config: Any) -> None:
    """Raise a ValueError unless the number of attention heads, where it is given, divides the width."""
    if config.heads and config.width % config.heads:
        raise ValueError(f"heads must divide the width of {config.width}, got {config.heads}")


def not_empty(**parts: Any) -> None:
    """Raise a RunError that names the first part of the data that has no examples.

    >>> not_empty(train=[1, 2], validation=[])
    Traceback (most recent call last):
    gradfn.runs.folder.RunError: data: too few examples: none are left for validation; use more
    """
    for name, part in parts.items():
        if not len(part):
            raise runs.RunError(f"data: too few examples: none are left for {name}; use more")


def conclude(
    folder: Path,
    outcome: runs.Outcome,
    figures: Mapping[str, Figure],
    data: str = "",
    others: Sequence[str] = (),
    **measured: Any,
) -> None:
    """Save the pictures of a run, write its result and print both.

    Args:
        folder: of the run.
        outcome: what was measured and expected.
        figures: by name.
        data: the name of the data, which is added below each title.
        others: names of files that were written before, to be printed.
        measured: what else the result contains, as JSON.
    """
    pictures = [file.name for file in save_all(figures, folder, data)]
    runs.finish(folder, outcome, **measured)
    print(f"{outcome}\nsee {folder}/{', '.join([*pictures, *others])}")


def adamw_cosine(steps: int, rate: float = 0.003, decay: float = 0.03) -> optax.GradientTransformation:
    """AdamW, its learning rate falling to zero on half a cosine.

    Weight decay keeps the weights of pixels that are almost always blank from growing.
    """
    return optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=decay)


def train_classifier(
    name: str,
    config: Any,
    net: gf.Net,
    data: gf.data.Dataset,
    epochs: int,
    decay: float,
    expected: Sequence[runs.Expectation],
    figures: Callable[[Any, Any], dict[str, Figure]],
    keep: Callable[[Path, Any, Any], object] | None = None,
) -> ClassifierResult:
    """Train a network on digits that are shifted by up to two pixels, evaluate it on the test digits and draw both.

    Args:
        name: of the experiment.
        config: settled options, with `batch`, `rate`, `epochs`, `data` and those of every run.
        net: returns logits `[10]` for an image `[784]`.
        data: the digits.
        epochs: how often to go through the training digits.
        decay: AdamW's weight decay.
        expected: the expectations of the experiment.
        figures: `(loss, params)` to the experiment's own figures, by name.
        keep: called with the folder, the parameters and the probabilities of the test digits; it keeps what the page
            of the run needs.
    """
    n_train = len(data.train[1])
    batch = batch_for(config, n_train, "training digits")
    folder = runs.start(name, config)
    print(gf.table(net.spec))
    loss = gf.classification_loss(net)
    steps = epochs * (n_train // batch)
    fitted = gf.fit(
        shifted(gf.batch_mean(loss), data.shape),
        net.init(jax.random.key(config.seed)),
        data.train,
        gf.train.adamw_warmup_cosine(
            steps, config.rate, final_rate=config.rate / 100, warmup=steps // 20, decay=decay
        ),
        steps,
        batch_size=batch,
        seed=config.seed,
        evaluate=classifier_measures(net, loss, data, n_train=5000),
        # A run of a few steps is not inspected.
        inspect_every=steps // 20 or None,
        folder=folder,
        resume=config.resume,
    )
    probabilities = np.asarray(test_probabilities(net, fitted.params, data))
    accuracy = float((probabilities.argmax(1) == data.test[1]).mean())
    outcome = judge_classifier(config, expected, accuracy)
    with phase("pictures"):
        all_figures = figures(loss, fitted.params) | classifier_figures(
            fitted.history, data, probabilities, harder=SHIFTED
        )
    if keep:
        keep(folder, fitted.params, probabilities)
    conclude(folder, outcome, all_figures, data.name, test_accuracy=accuracy)
    return ClassifierResult(fitted.params, fitted.history, accuracy, folder, outcome)


def judge_classifier(config: Any, expected: Sequence[runs.Expectation], accuracy: float) -> runs.Outcome:
    """Compare the test accuracy with what is expected of the data."""
    options = "" if config.data == "digits" else f"--data {config.data}"
    return runs.judge(given(expected, options), {"test accuracy": accuracy}, defaults(config, "data"))


def classifier_measures(
    net: gf.Net, loss: Any, data: gf.data.Dataset, n_train: int | None = None
) -> Callable[[Any], dict[str, jax.Array]]:
    """Return what `gf.fit` evaluates: accuracy on training and validation examples, and validation loss.

    Args:
        net: returns one logit per class.
        loss: of one example, without noise.
        data: its test examples are not used.
        n_train: how many training examples to evaluate, the first ones; None for all.

    Returns:
        `params -> {"train_accuracy", "validation_accuracy", "validation_loss"}`.
    """
    of_train = tuple(part[:n_train] for part in data.train)
    train, validation = jax.tree.map(jnp.asarray, (of_train, data.validation))
    accuracy = jax.jit(in_parts(gf.accuracy(net)))
    mean_loss = jax.jit(in_parts(gf.batch_mean(loss)))
    return lambda params: {
        "train_accuracy": accuracy(params, train),
        "validation_accuracy": accuracy(params, validation),
        "validation_loss": mean_loss(params, validation),
    }


def in_parts(mean: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any], jax.Array]:
    """Return a mean over a batch that is computed for one part of the batch after the other."""

    def of_all(params: Any, batch: Any) -> jax.Array:
        one = lambda example: mean(params, jax.tree.map(lambda leaf: leaf[None], example))  # noqa: E731
        return jax.lax.map(one, batch, batch_size=PART).mean()

    return of_all


def test_probabilities(net: gf.Net, params: Any, data: gf.data.Dataset) -> jax.Array:
    """Return the probability of each class for each test example, `[n, classes]`; `net` returns logits."""
    logits = jax.jit(lambda params, x: jax.lax.map(lambda one: net.apply(params, one), x, batch_size=PART))
    return jax.nn.softmax(logits(params, jnp.asarray(data.test[0])))


def six_digits(data: gf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return six test images of different digits, `[6, pixels]`, and their labels `[6]`."""
    images, labels = (part[:200] for part in data.test)
    chosen = [int(np.flatnonzero(labels == digit)[0]) for digit in (0, 1, 2, 4, 7, 8) if digit in labels]
    return images[chosen], labels[chosen]


def classifier_figures(
    history: History, data: gf.data.Dataset, probabilities: Any, loss_unit: str = "nats", harder: str = ""
) -> dict[str, Figure]:
    """Return the figures curves, confusion and mistakes of a classifier of images.

    Args:
        history: from `gf.fit`.
        data: whose test examples were classified.
        probabilities: `[n, classes]`, of each class for each test example.
        loss_unit: of the losses in the history.
        harder: what makes training harder than evaluation, see `curves`.
    """
    images, labels = data.test
    return {
        "curves": curves(history, loss_unit, harder=harder),
        "confusion": confusion(labels, np.asarray(probabilities).argmax(1), "test digits"),
        "mistakes": mistakes(images, labels, probabilities, data.shape, "test digits"),
    }
