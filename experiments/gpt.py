"""Train a small GPT on a text, let it write, and draw where it looks and what it expects."""

from __future__ import annotations

# Before what takes long to import, so that Ctrl-C is answered from the first moment.
if __name__ == "__main__":
    from gradfn.cli import script

    script(__file__)

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
from gradfn.report.language import language_figures, loss_per_token
from gradfn.runs import sample
from gradfn.train import adamw_warmup_cosine, from_host

EXPECTED = (
    "a validation loss of at most 1.45 nats a character on the built-in text and 1.88 on tiny-shakespeare (--data "
    "input.txt), each in some two minutes on 2 cores; and 2.0 on names in some five (--data names.txt --lines "
    "--batch 64 --width 96 --dropout 0.1 --rate 0.003 --steps 6000)"
)
NAMES = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"
PROMISED = {  # by the sha256 of the file, or the name of what is built in
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed": 1.88,  # tiny-shakespeare
    "topics of the Python documentation": 1.45,
    NAMES: 2.0,
}
FOR_NAMES: dict[str, Any] = {
    "lines": True,
    "batch": 64,
    "width": 96,
    "dropout": 0.1,
    "rate": 3e-3,
    "steps": 6000,
}
ON_HOST = 1 << 28  # bytes; larger texts stay in their files
SHOWN = 200  # characters of a sample


@dataclass(frozen=True)
class Config:
    """Options of a run; the defaults are nanoGPT's for a processor, but for the positions."""

    data: str | None = None
    """a text in UTF-8, or the .npy of tokens that gf.data.tokenize wrote (else what Python's help() has to say)"""
    tokens: str = "characters"
    """characters, bytes, or tiktoken:<encoding>"""
    lines: bool = False
    """each line is a text of its own (names): none is in both parts"""
    steps: int = 2000
    """updates"""
    batch: int = 12
    """sequences a step"""
    accumulate: int = 1
    """steps an update, whose gradients are meant"""
    context: int = 64
    """tokens a sequence (lines: as many as the longest needs)"""
    layers: int = 4
    """blocks"""
    heads: int | None = None
    """attention heads per block (else 4, or as many below that as divide the width)"""
    width: int = 128
    """features of a position"""
    positions: Literal["rope", "learned", "sinusoidal"] = "rope"
    """how a position is told; nanoGPT's are learned, which in 2,000 steps end some 0.1 higher"""
    bias: bool = False
    """whether products and norms have biases"""
    dropout: float = 0.0
    """share of the embedding's and the blocks' outputs that is dropped"""
    rate: float = 1e-3
    """AdamW's learning rate after warm-up; it falls to a tenth on half a cosine"""
    warmup: int | None = None
    """updates in which the rate grows (else 100, or a tenth of the updates where that is less)"""
    b2: float = 0.99
    """decay of the mean of squared gradients"""
    decay: float = 0.1
    """weight decay, of matrices only"""
    clip: float = 1.0
    """longest gradient"""
    seed: int = 0
    """decides the first weights and the order of the text"""
    resume: bool = False
    """go on with an interrupted run: the latest, or that in --folder"""
    folder: str | None = None
    """where to keep the run (else runs/gpt/<time>)"""

    def __post_init__(self) -> None:
        whole = ("steps", "batch", "accumulate", "context", "layers", "heads", "width")
        runs.within(1, None, **{name: getattr(self, name) for name in whole})
        runs.within(0, 2**32 - 1, seed=self.seed)
        runs.within(0, self.steps - 1, warmup=self.warmup)
        runs.positive(rate=self.rate, clip=self.clip)
        if self.heads and self.width % self.heads:
            raise ValueError(f"heads: a number that divides the width of {self.width}, came {self.heads}")
        features = self.width // runs.heads_for(self)
        if self.positions == "rope" and features % 2:
            raise ValueError(
                f"width: rope needs an even number of features per head, got {features}. Use --width "
                f"{2 * self.width}, or --positions learned"
            )


class Result(NamedTuple):
    """What came of a run."""

    params: dict[str, Any]
    history: Sequence[dict[str, Any]]
    validation_loss: float  # nats a token, over the whole validation part
    folder: Path
    verdict: str


def run(config: Config) -> Result:
    """Train, measure, write and draw; what it writes is in the result's folder."""
    config = runs.settle("gpt", config)
    data = gf.data.lines(config.data) if config.lines else gf.data.text(config.data, config.tokens)
    print(data)
    context = data.train[0].shape[1] if config.lines else config.context
    if config.lines:
        runs.some(training=data.train[0], validation=data.validation[0])
    batch = runs.batch_for(config, len(data.train[0]), "lines") if config.lines else config.batch
    batches, on_the_way, at_the_end = sequences(data, config, context)
    model = gf.GPTConfig(
        vocab=data.tokenizer.size,
        context=context,
        n_layers=config.layers,
        n_heads=runs.heads_for(config),
        width=config.width,
        positions=config.positions,
        bias=config.bias,
        dropout=config.dropout,
    )
    folder = runs.begin("gpt", config)
    sample.save_model(folder, "gpt", dataclasses.asdict(model), data.tokenizer, config.lines)

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
        print(f"... {written(sample.Model(net, params, data.tokenizer, config.lines))}")
        return {"validation_loss": measure(params)}

    steps = config.steps * config.accumulate
    fitted = gf.fit(
        gf.batch_mean(loss),
        net.init(jax.random.key(config.seed)),
        batches,
        optimizer,
        steps,
        batch_size=batch,
        seed=config.seed,
        evaluate=evaluate,
        eval_every=max(steps // 8, 1),
        inspect_every=steps // 20 or None,  # a run of a few steps is not looked at
        folder=folder,
        resume=config.resume,
    )

    validation_loss = float(loss_per_token(loss, at_the_end)(fitted.params))
    pictures = language_figures(
        folder,
        net,
        loss,
        fitted.params,
        fitted.history,
        at_the_end,
        data.tokenizer,
        data.name,
        {"validation_loss": validation_loss},
    )
    print(
        f"{folder}: it writes\n{written(sample.Model(net, fitted.params, data.tokenizer, config.lines), 600)}"
    )
    verdict = judge(config, data, validation_loss)
    runs.finish(folder, {"validation_loss": validation_loss, "verdict": verdict})
    print(f"{verdict}\npictures: {folder}/{', '.join(file.name for file in pictures)}")
    print(f"more of its writing: gradfn sample {shlex.quote(str(folder))} --prompt ... --temperature 0.8")
    return Result(fitted.params, fitted.history, validation_loss, folder, verdict)


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


def written(model: sample.Model, characters: int = SHOWN) -> str:
    """Return the beginning of what a model writes; lines side by side."""
    tokens = sample.write(model, sample.Config(n=characters))
    text = "".join(islice(model.tokenizer.stream(tokens), characters))
    return text.replace("\n", "  ") if model.lines else text.strip("\n")


def judge(config: Config, data: Any, validation_loss: float) -> str:
    """Say what was reached against what was expected."""
    reached = f"validation loss {validation_loss:.3f} nats a token of {data.name}"
    promised = PROMISED.get(data.sha256) or PROMISED.get(data.name)
    wanted = FOR_NAMES if data.sha256 == NAMES else {}
    as_promised = Config(data=config.data, seed=config.seed, **wanted)
    if promised is None or runs.options(config) != runs.options(as_promised):
        return f"{reached} (nothing was promised for this text and these options)"
    enough = "reached" if validation_loss <= promised else "NOT reached"
    return f"{reached}; expected at most {promised}: {enough}"
