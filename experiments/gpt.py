"""Train a small GPT on a text, generate from it, and draw its attention and its predictions."""

from __future__ import annotations

# Before the slow imports, so that Ctrl-C works from the start.
if __name__ == "__main__":
    from _script import run_script

    run_script(__file__)

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

import gradfn as gf
from gradfn import runs
from gradfn.runs import sample
from gradfn.timings import phase
from gradfn.train import adamw_warmup_cosine, from_host, gathered, is_first

from ._common import (
    DistributedOptions,
    batch_for,
    check_heads,
    conclude,
    given,
    heads_for,
    init_on,
    mesh_for,
    not_empty,
)
from ._language import keep_start, language_figures, loss_per_token

EXPECTED = (
    runs.Expectation("validation loss", at_most=1.45, unit="nats per token"),
    runs.Expectation("validation loss", at_most=1.88, unit="nats per token", given="--data input.txt"),
    runs.Expectation(
        "validation loss",
        at_most=2.0,
        unit="nats per token",
        given="--data names.txt --lines --batch 64 --width 96 --dropout 0.1 --rate 0.003 --steps 6000",
    ),
)
FOR_NAMES = EXPECTED[-1].given
NAMES_OPTIONS = {"lines": True, "batch": 64, "width": 96, "dropout": 0.1, "rate": 3e-3, "steps": 6000}
BUILT_IN = "topics of the Python documentation"
# The options to which expectations belong, by the sha256 of the text: tiny-shakespeare and names.
TEXTS = {
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed": "--data input.txt",
    "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d": FOR_NAMES,
}
ON_HOST = 1 << 28  # bytes; larger texts stay in their files
SHOWN = 200  # characters of a sample
KEPT = 16  # times that the parameters are kept along the way, for the page
EXCERPTS = 4  # texts that the page starts with


@dataclass(frozen=True)
class Config(DistributedOptions):
    """Options of a run; the defaults are nanoGPT's for a CPU, except for the positions."""

    data: str | None = runs.option(
        None,
        "a text in UTF-8, or the .npy of tokens that gf.data.tokenize wrote (default: the texts of Python's help())",
    )
    tokens: str = runs.option("characters", "characters, bytes, tiktoken:<encoding>, or huggingface:<folder>")
    lines: bool = runs.option(False, "each line is a text of its own (names): none is in both parts")
    steps: int = runs.option(2000, "updates", at_least=1)
    batch: int = runs.option(12, "sequences per step", at_least=1)
    accumulate: int = runs.option(1, "steps per update, whose gradients are averaged", at_least=1)
    context: int = runs.option(64, "tokens a sequence (lines: as many as the longest needs)", at_least=1)
    layers: int = runs.option(4, "blocks", at_least=1)
    heads: int | None = runs.option(
        None, "attention heads per block (default: 4, or as many below that as divide the width)", at_least=1
    )
    width: int = runs.option(128, "features of a position", at_least=1)
    positions: Literal["rope", "learned", "sinusoidal"] = runs.option(
        "rope",
        "how positions are encoded; nanoGPT learns them, which after 2,000 steps gives a loss about 0.1 higher",
    )
    bias: bool = runs.option(False, "whether products and norms have biases")
    dropout: float = runs.option(0.0, "share of the embedding's and the blocks' outputs that is dropped")
    rate: float = runs.option(
        1e-3, "AdamW's learning rate after warm-up; it falls to a tenth on half a cosine", above=0
    )
    warmup: int | None = runs.option(
        None, "updates in which the rate grows (default: 100, or a tenth of the updates where that is less)"
    )
    b2: float = runs.option(0.99, "decay of the mean of squared gradients")
    decay: float = runs.option(0.1, "weight decay, of matrices only")
    clip: float = runs.option(1.0, "maximum global gradient norm", above=0)
    profile_steps: tuple[int, ...] = runs.option(
        (), "trace these steps into the folder: the first, and the one after the last (10 20)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        runs.within(0, self.steps - 1, warmup=self.warmup)
        window, end = self.profile_steps, self.steps * self.accumulate
        if window and not (len(window) == 2 and 0 <= window[0] < window[1] <= end):
            raise ValueError(
                f"profile_steps must be two increasing steps of the run's {end:,}, such as 10 20, got {window}"
            )
        check_heads(self)
        features = self.width // heads_for(self)
        if self.positions == "rope" and features % 2:
            raise ValueError(
                f"width: rope needs an even number of features per head, got {features}. Use --width "
                f"{2 * self.width}, or --positions learned"
            )


class Result(NamedTuple):
    """The result of a run."""

    params: dict[str, Any]
    history: Sequence[dict[str, Any]]
    validation_loss: float  # nats per token, over the whole validation part
    folder: Path
    outcome: runs.Outcome


def run(config: Config) -> Result:
    """Train, measure, write and draw; it writes into the folder of the result."""
    config = runs.settle("gpt", config)
    data = gf.data.lines(config.data) if config.lines else gf.data.text(config.data, config.tokens)
    print(data)
    context = data.train[0].shape[1] if config.lines else config.context
    if config.lines:
        not_empty(training=data.train[0], validation=data.validation[0])
    batch = batch_for(config, len(data.train[0]), "lines") if config.lines else config.batch
    mesh = mesh_for(config, batch)
    batches, on_the_way, at_the_end = sequences(data, config, context)
    model = gf.GPTConfig(
        vocab=data.tokenizer.size,
        context=context,
        n_layers=config.layers,
        n_heads=heads_for(config),
        width=config.width,
        positions=config.positions,
        bias=config.bias,
        dropout=config.dropout,
    )
    folder = runs.start("gpt", config)
    if is_first():
        texts = excerpts(data, config, context)
        sample.save_model(folder, "gpt", dataclasses.asdict(model), data.tokenizer, config.lines, texts)

    net = gf.gpt(model)
    print(gf.table(net.spec))
    loss = gf.next_token_loss(net)
    optimizer = adamw_warmup_cosine(
        config.steps,
        config.rate,
        final_rate=config.rate / 10,
        warmup=min(100, config.steps // 10) if config.warmup is None else config.warmup,
        b2=config.b2,
        decay=config.decay,
        clip=config.clip,
        accumulate=config.accumulate,
    )
    measure = loss_per_token(loss, on_the_way)

    def evaluate(params: Any) -> dict[str, Any]:
        params = gathered(params)
        if is_first():
            print(f"... {written(sample.Model(net, params, data.tokenizer, config.lines))}")
        return {"validation_loss": measure(params)}

    steps = config.steps * config.accumulate
    fitted = gf.fit(
        gf.batch_mean(loss),
        init_on(net, jax.random.key(config.seed), mesh, config.shard),
        batches,
        optimizer,
        steps,
        batch_size=batch,
        seed=config.seed,
        evaluate=evaluate,
        eval_every=max(steps // 8, 1),
        inspect_every=steps // 20 or None,  # a run of a few steps is not inspected
        folder=folder,
        keep_every=max(steps // KEPT, 1),
        resume=config.resume,
        profile_steps=config.profile_steps or None,
    )

    if mesh is None:
        keep_start(folder, net, config.seed)
    params = gathered(fitted.params)
    validation_loss = float(loss_per_token(loss, at_the_end)(params))
    outcome = judge(config, data, validation_loss)
    result = Result(params, fitted.history, validation_loss, folder, outcome)
    if not is_first():
        return result
    with phase("pictures"):
        figures = language_figures(
            net,
            loss,
            params,
            fitted.history,
            at_the_end,
            data.tokenizer,
            {"validation_loss": validation_loss},
            f"with {100 * config.dropout:.0f} % dropout" if config.dropout else "",
        )
    print(f"{folder}: it writes\n{written(sample.Model(net, params, data.tokenizer, config.lines), 600)}")
    conclude(folder, outcome, figures, data.name, validation_loss=validation_loss)
    print(f"more of its writing: gradfn sample {shlex.quote(str(folder))} --prompt ... --temperature 0.8")
    return result


def sequences(data: Any, config: Config, context: int) -> tuple[Any, Any, Any]:
    """Return what `gf.fit` trains on, and what is measured on as it goes and at the end."""
    if config.lines:
        return data.train, tuple(part[:1000] for part in data.validation), data.validation
    batches: Any
    if data.train.nbytes > ON_HOST:
        batches = from_host(gf.data.host_windows(data.train, context, config.batch, config.seed))
    else:
        batches = gf.data.windows(data.train, context, config.batch)
    on_the_way, at_the_end = (gf.data.fixed_windows(data.validation, context, most) for most in (300, 5000))
    return batches, on_the_way, at_the_end


def excerpts(data: Any, config: Config, context: int) -> list[str]:
    """Return texts of the validation part for the page of the run; of a long text, from evenly spaced starts."""
    if config.lines:
        inputs, targets = (part[:EXCERPTS] for part in data.validation)
        lines = [row[: int((of >= 0).sum())] for row, of in zip(inputs, targets, strict=True)]
        return [data.tokenizer.decode(line).strip("\n") for line in lines]
    starts = [len(data.validation) * i // EXCERPTS for i in range(EXCERPTS)]
    texts = [data.tokenizer.decode(data.validation[start : start + 3 * context]) for start in starts]
    # A text starts where a line does, if one does soon; and it does not start within a character.
    texts = [text[text.find("\n", 0, context) + 1 :].lstrip("\n\ufffd")[:context] for text in texts]
    return list(dict.fromkeys(text for text in texts if text))


def written(model: sample.Model, characters: int = SHOWN) -> str:
    """Return the start of a generated text, with lines side by side."""
    tokens = sample.write(model, sample.Config(n=characters))
    text = "".join(islice(model.tokenizer.stream(tokens), characters))
    return text.replace("\n", "  ") if model.lines else text.strip("\n")


def judge(config: Config, data: Any, validation_loss: float) -> runs.Outcome:
    """Compare the validation loss with what is expected of the text and the options."""
    options = TEXTS.get(data.sha256, "")
    wanted: dict[str, Any] = NAMES_OPTIONS if options == FOR_NAMES else {}
    promised = (options != "" or data.name == BUILT_IN) and runs.options(config) == runs.options(
        Config(data=config.data, seed=config.seed, **wanted)
    )
    return runs.judge(given(EXPECTED, options), {"validation loss": validation_loss}, promised)
