"""A net of two attention layers learns to repeat: which heads do it, by six methods."""

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
from gradfn.pages.sequences import attention_maps
from gradfn.runs import sample
from gradfn.runs.language_net import Quiet
from gradfn.timings import phase
from gradfn.train import adamw_warmup_cosine

from ._common import SeededOptions, check_heads, conclude, defaults, heads_for
from ._language import keep_start

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPECTED = (
    runs.Expectation("induction score of the best head", at_least=0.7),
    runs.Expectation("previous-token score of the best head", at_least=0.5),
    runs.Expectation("methods that name that previous-token head", at_least=5),
    runs.Expectation(
        "evaluations between the fall of the loss and the rise of the induction score", at_most=1
    ),
)
VOCAB, LENGTH = 32, 48
# The shortest and the longest part that a sequence repeats, in tokens.
SHORTEST, LONGEST = LENGTH // 4, LENGTH // 2
PAIRS = 32  # of a clean and a corrupt sequence
EVALUATIONS = 50
# Times that the parameters are kept along the way, and sequences to start with, for the page.
KEPT, EXCERPTS = 25, 3
SYMBOLS = "012345ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # what stands for each token


@dataclass(frozen=True)
class Config(SeededOptions):
    """Options of a run."""

    steps: int = runs.option(1500, "training steps", at_least=50)
    batch: int = runs.option(64, "sequences per step", at_least=1)
    width: int = runs.option(64, "features of a position", at_least=1)
    heads: int | None = runs.option(
        None, "attention heads per layer (default: 4, or as many below that as divide the width)", at_least=1
    )
    rate: float = runs.option(3e-3, "AdamW's learning rate after warm-up", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self)


class Result(NamedTuple):
    """The result of a run."""

    params: dict[str, Any]
    history: Sequence[dict[str, Any]]
    methods: dict[str, np.ndarray]  # by method, a score of each head of the first layer, [heads]
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train, find the heads, and draw; it writes into the folder of the result."""
    config = runs.settle("induction", config)
    folder = runs.start("induction", config)
    net = attention_only(config.width, heads_for(config))
    print(gf.table(net.spec))
    settings = {"vocab": VOCAB, "context": LENGTH, "n_layers": 2, "n_heads": heads_for(config)}
    texts = ["".join(SYMBOLS[token] for token in tokens.tolist()) for tokens in examples(EXCERPTS)]
    sample.save_model(
        folder,
        "attention",
        settings | {"width": config.width},
        gf.data.characters(SYMBOLS),
        lines=False,
        samples=texts,
        quiet=Quiet(repeats=True),
    )
    loss = gf.batch_mean(gf.next_token_loss(net))
    test = repeated(jax.random.key(2**32 - 1 - config.seed), 128)
    detect = gf.circuits.head_scores(jax.vmap(net.apply, (None, 0)))

    @jax.jit
    def evaluate(params: Any) -> dict[str, jax.Array]:
        scores = detect(params, test[0])
        return {
            "test_loss": loss(params, test),
            "previous_token_score": scores.previous_token[0].max(),
            "induction_score": scores.induction[1].max(),
        }

    fitted = gf.fit(
        loss,
        net.init(jax.random.key(config.seed)),
        lambda key: repeated(key, config.batch),
        adamw_warmup_cosine(
            config.steps, config.rate, final_rate=config.rate / 30, warmup=config.steps // 10
        ),
        config.steps,
        seed=config.seed,
        evaluate=evaluate,
        eval_every=config.steps // EVALUATIONS,
        folder=folder,
        keep_every=max(config.steps // KEPT, 1),
        resume=config.resume,
        progress=False,
    )
    keep_start(folder, net, config.seed)
    params, scores = fitted.params, detect(fitted.params, test[0])
    print(scores)
    with phase("circuits"):
        found = find_heads(net, params, jax.random.key(config.seed), scores)
    for name, of_heads in found.methods.items():
        print(f"{name}: " + ", ".join(f"0.{head} {value:.3g}" for head, value in enumerate(of_heads)))
    with phase("pictures"):
        figures = {
            "bump": bump(fitted.history),
            "heads": heads(found),
            "attention": attention(net, params, test[0][0]),
        }
    outcome = judge(config, fitted.history, scores, found)
    conclude(folder, outcome, figures, methods={name: of.tolist() for name, of in found.methods.items()})
    return Result(params, fitted.history, found.methods, folder, outcome)


def attention_only(width: int, n_heads: int) -> gf.Net:
    """Return a language model of two attention layers, without feed-forward layers: tokens `[T]` to logits."""
    embed, positions = gf.layers.embed(VOCAB, width), gf.layers.embed(LENGTH, width)
    norm, attention = gf.layers.layer_norm(width), gf.layers.attention(width, n_heads, causal=True)
    head = gf.layers.dense(width, VOCAB)
    block = {"attention_norm": norm.spec, "attention": attention.spec}
    spec = {"embed": embed.spec, "positions": positions.spec, "blocks": {"0": block, "1": block}}

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        x = embed.apply(params["embed"], tokens) + positions.apply(
            params["positions"], jnp.arange(len(tokens))
        )
        x = gf.tap(x, "embedded")
        for i in ("0", "1"):
            own = params["blocks"][i]
            with jax.named_scope(f"blocks/{i}"):
                with jax.named_scope("attention_norm"):
                    normed = norm.apply(own["attention_norm"], x)
                with jax.named_scope("attention"):
                    added = attention.apply(own["attention"], normed)
                x = gf.tap(x + gf.tap(added, "attention_out"), "residual")
        normed = gf.tap(norm.apply(params["final_norm"], x), "final_norm")
        return gf.tap(head.apply(params["head"], normed), "logits")

    return gf.Net(spec | {"final_norm": norm.spec, "head": head.spec}, apply)


def examples(n: int) -> np.ndarray:
    """Return sequences for the page of the run: random tokens that repeat, each period of them without a repetition.

    Returns:
        `[n, LENGTH]`.

    >>> [tokens] = examples(1)
    >>> bool((tokens[SHORTEST + 4 :] == tokens[: -SHORTEST - 4]).all())
    True
    """
    random = np.random.default_rng(0)
    return np.stack([np.resize(random.permutation(VOCAB)[: SHORTEST + 4], LENGTH) for _ in range(n)])


def repeated(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Draw random tokens that repeat after a random number of them.

    Returns:
        Tokens and targets, `[n, LENGTH]` int32 each; before the repetition nothing can be predicted (-1).
    """
    words, period = jax.random.split(key)
    words = jax.random.randint(words, (n, LENGTH + 1), 0, VOCAB)
    period = jax.random.randint(period, (n, 1), SHORTEST, LONGEST + 1)
    place = jnp.arange(LENGTH + 1)[None]
    sequence = jnp.take_along_axis(words, place % period, 1)
    return sequence[:, :-1], jnp.where(place[:, 1:] > period, sequence[:, 1:], -1)


def pairs(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draw sequences that differ in what induction needs: `.. A B .. A`, and `.. C B .. A`.

    Returns:
        Clean and corrupt tokens `[n, LENGTH]`, and the right next token of the clean ones `[n]`. No token occurs twice
        before it repeats; in a corrupt sequence, the last token occurs nowhere else.
    """

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        words, period = jax.random.split(key)
        words = jax.random.permutation(words, VOCAB)
        period = jax.random.randint(period, (), SHORTEST, LONGEST + 1)
        clean = words[jnp.arange(LENGTH) % period]
        is_last = (clean == clean[-1]) & (jnp.arange(LENGTH) < LENGTH - 1)
        # The last word of the permutation is in no sequence.
        return clean, jnp.where(is_last, words[-1], clean), words[LENGTH % period]

    return jax.vmap(one)(jax.random.split(key, n))


class Found(NamedTuple):
    """What the methods say of the heads.

    Attributes:
        methods: by name, a score of each head of the first layer, `[heads]`.
        restored: the exact effect of each head, from 0 (corrupt) to 1 (clean), `[layer, head]`.
        estimated: the same by attribution patching, in units of the metric.
        paths: by receiver, the effect of each head of the first layer along the direct path to it, `[heads]`.
    """

    methods: dict[str, np.ndarray]
    restored: np.ndarray
    estimated: np.ndarray
    paths: dict[str, np.ndarray]


def find_heads(net: gf.Net, params: Any, key: jax.Array, scores: gf.circuits.HeadScores) -> Found:
    """Find the heads of the first layer that the repetition depends on, by each method on the same pairs."""
    clean, corrupt, right = pairs(key, PAIRS)

    def over_pairs(method: Any) -> Any:
        def one(clean: jax.Array, corrupt: jax.Array, right: jax.Array) -> Any:
            return method(
                (params, clean), (params, corrupt), lambda logits: jax.nn.log_softmax(logits[-1])[right]
            )

        return jax.tree.map(lambda x: x.mean(0), jax.jit(jax.vmap(one))(clean, corrupt, right))

    exact = over_pairs(lambda *pair: gf.circuits.patch_sweep(net.apply, *pair, over="layer x head"))
    estimate = over_pairs(
        lambda *pair: gf.circuits.attribution_patch(
            net.apply, *pair, sites="*mixed", over="layer x head", method="ig_values"
        )
    )
    paths = {}
    for name in ("queries", "keys", "values"):
        receiver = f"blocks/1/attention/{name}"
        patched = over_pairs(
            lambda *pair, receiver=receiver: gf.circuits.path_patch(
                net.apply, *pair, receivers=receiver, sender="blocks/0/*mixed", over="head"
            )
        )
        paths[name] = np.asarray(patched.normalized)
    edges = over_pairs(lambda *pair: gf.circuits.edge_attribution_patch(net.apply, *pair, steps=8))
    strength = gf.circuits.composition(gf.circuits.head_weights(params, n_heads=scores.induction.shape[1]))
    induction = int(scores.induction[1].argmax())
    methods = {
        "attention to the token before": np.asarray(scores.previous_token[0]),
        "exact patch": np.asarray(exact.normalized[0]),
        "attribution patch": np.asarray(estimate.scores[0]),
        "edges to the keys": to_the_keys(edges),
        "path to the keys": paths["keys"],
        "key composition of the weights": np.asarray(strength.key[0, :, 1, induction]),
    }
    return Found(methods, np.asarray(exact.normalized), np.asarray(estimate.scores), paths)


def to_the_keys(edges: gf.circuits.EdgeAttribution) -> np.ndarray:
    """Return the sum of the scores of the edges from each head of the first layer to all keys of the second."""
    senders = [i for i, name in enumerate(edges.senders) if name.startswith("a0.")]
    keys = [i for i, name in enumerate(edges.receivers) if name.startswith("a1.") and name.endswith(".k")]
    return np.asarray(edges.scores)[np.ix_(senders, keys)].sum(1)


def judge(config: Config, history: Sequence[Mapping[str, Any]], scores: Any, found: Found) -> runs.Outcome:
    """Compare the scores of the heads, and whether the methods agree, with what is expected."""
    best = int(scores.previous_token[0].argmax())
    loss, induction = (np.array([row[name] for row in history]) for name in ("test_loss", "induction_score"))
    fall = int(np.diff(loss).argmin())
    measured = {
        "step at which the loss has fallen fastest": history[fall + 1]["step"],
        "induction score of the best head": float(scores.induction[1].max()),
        "previous-token score of the best head": float(scores.previous_token[0].max()),
        "methods that name that previous-token head": sum(
            int(of.argmax()) == best for of in found.methods.values()
        ),
        "evaluations between the fall of the loss and the rise of the induction score": abs(
            fall - int(np.diff(induction).argmax())
        ),
    }
    return runs.judge(EXPECTED, measured, defaults(config))


def bump(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the loss over training, and the scores of the best heads below.

    >>> row = {"step": 0, "test_loss": 3.0, "induction_score": 0.1, "previous_token_score": 0.1}
    >>> bump([row, row | {"step": 1, "test_loss": 1.0}]).get_suptitle()
    'The loss falls fastest at step 1, as the induction head forms'
    """
    figure = new_figure(8.4, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in history]
    loss = np.array([row["test_loss"] for row in history])
    upper.plot(steps, loss, color=LINE_COLORS[0])
    upper.set_ylabel("loss on repeated tokens (nats)")
    for i, (name, text) in enumerate(
        (
            ("induction_score", "induction (second layer)"),
            ("previous_token_score", "previous token (first layer)"),
        )
    ):
        lower.plot(steps, [row[name] for row in history], color=LINE_COLORS[i + 1], label=text)
    at = int(np.diff(loss).argmin()) + 1
    for panel in (upper, lower):
        panel.axvspan(steps[at - 1], steps[at], color="0.9", zorder=0)
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
    lower.set_ylabel("score of the best head")
    lower.set_ylim(0, 1)
    lower.set_xlabel("training step")
    lower.legend(frameon=False, loc="lower right")
    figure.suptitle(f"The loss falls fastest at step {steps[at]:,}, as the induction head forms")
    return figure


def heads(found: Found) -> Figure:
    """Draw what each method says of each head of the first layer, and along which paths.

    Args:
        found: by `find_heads`.
    """
    figure = new_figure(9.6, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    n = len(next(iter(found.methods.values())))
    shares = np.stack([np.maximum(of, 0) / max(of.max(), 1e-9) for of in found.methods.values()])
    left.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, of in enumerate(found.methods.values()):
        for head, value in enumerate(of):
            color = "white" if shares[i, head] > 0.6 else "black"
            left.text(head, i, f"{value:.2f}", ha="center", va="center", color=color)
    left.set_yticks(range(len(found.methods)), list(found.methods))
    left.set_xticks(range(n), [f"head 0.{head}" for head in range(n)])
    left.set_title("each method (darkest: its largest)", fontsize=10)
    for i, (name, of) in enumerate(found.paths.items()):
        right.bar(np.arange(n) + 0.27 * (i - 1), of, 0.25, color=LINE_COLORS[i], label=f"to the {name}")
    right.set_xticks(range(n), [f"0.{head}" for head in range(n)])
    right.set_title("restored along each path to the second layer", fontsize=10)
    right.legend(frameon=False, fontsize=9)
    right.spines[["top", "right"]].set_visible(False)
    names = {int(of.argmax()) for of in found.methods.values()}
    agree = (
        f"All methods name head 0.{names.pop()}"
        if len(names) == 1
        else "The methods do not all name one head"
    )
    figure.suptitle(f"{agree}; its output is read by the keys of the second layer")
    return figure


def attention(net: gf.Net, params: Any, tokens: jax.Array, n: int = 30) -> Figure:
    """Draw the attention of all heads on the first tokens of a sequence."""
    tokens = tokens[:n]
    capture = gf.capture(net.apply, sites="*probabilities", keep="*probabilities", stats=["mean"])
    values = jax.jit(capture)(params, tokens).values
    layers = {f"layer {i}": np.asarray(value) for i, value in enumerate(values.values())}
    return attention_maps(layers, [SYMBOLS[token] for token in tokens.tolist()])
