"""Make networks deeper, see their gradients vanish, explode, saturate and die, and see what repairs that."""

from __future__ import annotations

# Before what takes long to import, so that Ctrl-C is answered from the first moment.
if __name__ == "__main__":
    from gradfn.cli import script

    script(__file__)

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradfn as gf
from gradfn import runs
from gradfn.report.figures import save_all
from gradfn.report.saturate import gradient_flow, learned, saturation

EXPECTED = (
    "ten layers of sigmoids, begun as usual, to leave the first less than 1/1,000 of the last one's gradient and learn "
    "nothing, and to read at least 80 % of the test digits with residual connections or layer norm, as ten layers of "
    "relus begun by He's rule do; in a minute"
)
ACTIVATIONS = ("sigmoid", "tanh", "relu", "gelu")
WIRINGS = ("plain", "residual", "layer norm")
PROMISED = 0.8
DEPTHS = (1, 2, 3, 5, 7, 10)  # hidden layers
# Standard deviation of a weight, given how many inputs its node has.
STARTS: dict[str, Callable[[int], float]] = {
    "small": lambda n_in: 0.3 / math.sqrt(n_in),
    "LeCun": lambda n_in: 1 / math.sqrt(n_in),  # keeps the size of what goes through straight
    "He": lambda n_in: math.sqrt(2 / n_in),  # and of what goes through relus
    "N(0, 1)": lambda n_in: 1.0,
}


@dataclass(frozen=True)
class Config:
    """Options of a run."""

    width: int = 32
    """nodes in each hidden layer"""
    steps: int = 300
    """training steps of each network"""
    batch: int = 64
    """digits a step"""
    rate: float = 0.02
    """learning rate of SGD with momentum 0.9"""
    data: Literal["digits", "mnist"] = "digits"
    """digits: 1,797 real ones of 8x8 pixels that come with scikit-learn; mnist: the 70,000"""
    data_path: str | None = None
    """folder with MNIST's four files (else $GRADFN_MNIST, else a download into the cache)"""
    seed: int = 0
    """decides the first weights and the order of the digits"""
    resume: bool = False
    """go on with an interrupted run: the latest, or that in --folder"""
    folder: str | None = None
    """where to keep the run (else runs/saturate/<time>)"""

    def __post_init__(self) -> None:
        runs.within(1, None, width=self.width, steps=self.steps, batch=self.batch)
        runs.within(0, 2**32 - 1, seed=self.seed)
        runs.positive(rate=self.rate)


class Outcome(NamedTuple):
    """What came of the networks with one activation and one wiring, by start and depth."""

    norms: (
        np.ndarray
    )  # [starts, layers], of the gradient with respect to the weighted sums, ten layers, untrained
    off: (
        np.ndarray | None
    )  # [starts, layers], share of saturated values or dead nodes; None where neither is a thing
    accuracies: np.ndarray  # [starts, depths], on the test digits after training


class Result(NamedTuple):
    """What came of a run."""

    outcomes: dict[tuple[str, str], Outcome]  # by activation and wiring
    folder: Path
    verdict: str


def run(config: Config) -> Result:
    """Look at every network, train it, and draw; what it writes is in the result's folder."""
    config = runs.settle("saturate", config)
    data = gf.data.mnist(config.data_path) if config.data == "mnist" else gf.data.digits(size=8)
    print(data)
    if config.batch > len(data.train[1]):
        raise runs.RunError(f"batch: there are {len(data.train[1]):,} training digits, got {config.batch}")
    folder = runs.begin("saturate", config)
    outcomes = {}
    for activation in ACTIVATIONS:
        for wiring in WIRINGS:
            found = outcomes[activation, wiring] = outcome(config, data, activation, wiring)
            deepest = ", ".join(
                f"{start} {100 * share:.0f} %"
                for start, share in zip(STARTS, found.accuracies[:, -1], strict=True)
            )
            print(f"{activation}, {wiring}: with {DEPTHS[-1]} hidden layers {deepest} right")

    lecun = list(STARTS).index("LeCun")
    plain, residual = (outcomes["sigmoid", wiring] for wiring in ("plain", "residual"))
    lost, kept = (100 * found.norms[lecun, 0] / found.norms[lecun, -1] for found in (plain, residual))
    stuck, learns = (found.accuracies[lecun, -1] for found in (plain, residual))
    off = {name: shares for name in ACTIVATIONS if (shares := outcomes[name, "plain"].off) is not None}
    shut = off["tanh"][list(STARTS).index("N(0, 1)")].mean()
    figures = {
        "flow": gradient_flow(
            {kind: found.norms for kind, found in outcomes.items()},
            list(STARTS),
            f"Of the last layer's gradient, ten layers of sigmoids (LeCun) leave the first {lost:.1g} %, "
            f"with residual connections {kept:.0f} %",
        ),
        "saturated": saturation(
            off,
            list(STARTS),
            {"sigmoid": "saturated values", "tanh": "saturated values", "relu": "dead nodes"},
            f"Weights from N(0, 1) shut {100 * shut:.0f} % of all tanh values before training begins",
        ),
        "learned": learned(
            {kind: found.accuracies for kind, found in outcomes.items()},
            list(STARTS),
            DEPTHS,
            f"After {config.steps} steps, ten layers of sigmoids (LeCun) read {100 * stuck:.0f} % of the test digits, "
            f"with residual connections {100 * learns:.0f} %",
        ),
    }
    save_all(figures, folder, data.name)
    verdict = judge(config, outcomes)
    runs.finish(folder, {"verdict": verdict})
    print(f"{verdict}\npictures: {folder}/flow.png, saturated.png, learned.png")
    return Result(outcomes, folder, verdict)


def deep(n_in: int, width: int, activation: str, wiring: str) -> tuple[gf.Net, list[str]]:
    """Return a net of up to ten hidden layers, of which `apply(params, (x, depth))` uses `depth`.

    That all depths are one program spares compiling sixty.
    """
    n_more = DEPTHS[-1] - 1
    squash, norm = gf.layers.activation(activation), gf.layers.layer_norm(width)
    block = {"dense": gf.layers.dense(width, width)} | ({"norm": norm} if wiring == "layer norm" else {})
    spec = {
        "first": gf.layers.dense(n_in, width).spec,
        "more": {name: gf.repeat(net, n_more).spec for name, net in block.items()},
        "last": gf.layers.dense(width, 10).spec,
    }

    def apply(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, depth = example
        z = gf.tap(gf.layers.affine(params["first"]["W"], params["first"]["b"], x), "z1")
        a = gf.tap(squash(z), "a1")

        def layer(a: jax.Array, each: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
            own, i = each
            before = norm.apply(own["norm"], a) if wiring == "layer norm" else a
            z = gf.tap(gf.layers.affine(own["dense"]["W"], own["dense"]["b"], before), "z")
            after = gf.tap(squash(z), "a")
            after = a + after if wiring == "residual" else after
            return jnp.where(i < depth - 1, after, a), None

        a, _ = jax.lax.scan(layer, a, (params["more"], jnp.arange(n_more)))
        return gf.layers.affine(params["last"]["W"], params["last"]["b"], a)

    return gf.Net(spec, apply), ["z1", "z", "a1", "a"]


def start(net: gf.Net, std: Callable[[int], float], key: jax.Array) -> Any:
    """Return first parameters with hidden weights of that standard deviation."""
    params = net.init(key)

    def drawn(name: str, W: jax.Array) -> jax.Array:
        return std(W.shape[-1]) * jax.random.normal(jax.random.fold_in(key, len(name)), W.shape)

    first = params["first"] | {"W": drawn("first", params["first"]["W"])}
    dense = params["more"]["dense"] | {"W": drawn("dense", params["more"]["dense"]["W"])}
    return params | {"first": first, "more": params["more"] | {"dense": dense}}


def outcome(config: Config, data: gf.data.Dataset, activation: str, wiring: str) -> Outcome:
    """Look at and train the networks with one activation and one wiring: every start, every depth, all at once."""
    train, test = jax.tree.map(jnp.asarray, (data.train, data.test))
    net, sites = deep(train[0].shape[1], config.width, activation, wiring)
    one = gf.classification_loss(net)
    of_batch = gf.batch_mean(lambda params, example: one(params, ((example[0], example[2]), example[1])))

    def loss(params: Any, batch: Any, depth: jax.Array) -> jax.Array:
        x, y = batch
        return of_batch(params, (x, y, jnp.broadcast_to(depth, y.shape)))

    key = jax.random.key(config.seed)
    made = [start(net, std, key) for std in STARTS.values()]
    of_starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)  # [starts, ...]

    some = jax.tree.map(lambda part: part[:256], train)
    stats = ["rms", "saturated", "dead"]
    look = jax.jit(jax.vmap(gf.inspect(loss, sites=sites, stats=stats, input_grads=False), (0, None, None)))
    seen = jax.device_get(look(of_starts, some, jnp.int32(DEPTHS[-1])))
    rms = np.concatenate(
        [seen.grad_stats["z1"].rms[:, None], seen.grad_stats["z"].rms], 1
    )  # [starts, layers]
    first, more = seen.stats["a1"], seen.stats["a"]
    off = None
    for name in ("saturated", "dead"):
        if getattr(first, name) is not None:
            off = np.concatenate([getattr(first, name)[:, None], getattr(more, name)], 1)

    optimizer = optax.sgd(config.rate, momentum=0.9)
    n_epochs = -(-config.steps * config.batch // len(train[1])) + 1
    orders = [
        gf.data.epoch_order(len(train[1]), config.batch, config.seed, epoch) for epoch in range(n_epochs)
    ]
    order = jnp.asarray(np.concatenate(orders)[: config.steps])  # [steps, batch]

    @jax.jit
    def trained(params: Any, depths: jax.Array) -> jax.Array:
        def of_one(params: Any, depth: jax.Array) -> jax.Array:
            def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
                params, state = carry
                batch = jax.tree.map(lambda part: part[rows], train)
                grads = jax.grad(loss)(params, batch, depth)
                updates, state = optimizer.update(grads, state)
                return (optax.apply_updates(params, updates), state), None

            (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), order)
            answers = jax.vmap(lambda x: net.apply(params, (x, depth)))(test[0])
            # Where the parameters are no longer finite, nothing is right.
            return ((answers.argmax(-1) == test[1]) & jnp.isfinite(answers).all(-1)).mean()

        return jax.vmap(jax.vmap(of_one, (None, 0)), (0, None))(params, depths)

    accuracies = np.asarray(trained(of_starts, jnp.asarray(DEPTHS)))
    return Outcome(rms * math.sqrt(config.width), off, accuracies)


def judge(config: Config, outcomes: dict[tuple[str, str], Outcome]) -> str:
    """Say what was reached against what was expected."""
    names = list(STARTS)
    lecun, he = names.index("LeCun"), names.index("He")
    bad = outcomes["sigmoid", "plain"]
    share = bad.norms[lecun, 0] / bad.norms[lecun, -1]
    stuck = bad.accuracies[lecun, -1]
    repaired = {
        "residual": outcomes["sigmoid", "residual"].accuracies[lecun, -1],
        "layer norm": outcomes["sigmoid", "layer norm"].accuracies[lecun, -1],
        "He's relus": outcomes["relu", "plain"].accuracies[he, -1],
    }
    told = ", ".join(f"{name} {100 * accuracy:.0f} %" for name, accuracy in repaired.items())
    reached = (
        f"ten layers of sigmoids have {share:.0e} of the last layer's gradient in the first and {100 * stuck:.0f} % "
        f"right; repaired: {told}"
    )
    if runs.options(config) != runs.options(Config(seed=config.seed)):
        return f"{reached} (nothing was promised for these options)"
    enough = share < 1e-3 and stuck < 0.2 and min(repaired.values()) >= PROMISED
    expected = f"below 1e-03 and 20 %, and at least {100 * PROMISED:.0f} %"
    return f"{reached}; expected {expected}: {'reached' if enough else 'NOT reached'}"
