"""Generate text with a trained language model, token by token: `gradfn sample RUN`."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import msgspec

from gradfn.core.params import Params
from gradfn.data import DataError, Tokenizer, tokenizer_from
from gradfn.data._tokenizer import TokenizerFile
from gradfn.files import FileError, inside, read_json
from gradfn.layout import CHECKPOINT, MODEL
from gradfn.nets import GPTConfig, LanguageModel, gpt, rnn, stream
from gradfn.runs.config import check, option
from gradfn.runs.folder import RUNS, RunError, latest, write_json
from gradfn.runs.language_net import Quiet
from gradfn.stored import model_file, newest, parameter_shapes
from gradfn.train import load_params

CACHE_LIMIT = 1 << 30  # values that a GPT keeps of a whole context while it writes


class ModelFile(TypedDict):
    """`model.json`: what `load_model` needs beside the checkpoint."""

    net: Literal["gpt", "rnn"]
    settings: dict[str, Any]  # fields of GPTConfig, or of RNNSettings
    tokenizer: TokenizerFile | None  # None in a file of `gf.fit`, which does not know it
    lines: bool
    samples: NotRequired[list[str]]  # of the page, as is `quiet`: see `save_model`
    quiet: NotRequired[Quiet | None]


class RNNSettings(TypedDict):
    """What `gf.rnn` takes."""

    vocab: int
    width: int
    cell: NotRequired[Literal["vanilla", "gru", "lstm"]]
    n_layers: NotRequired[int]


@dataclass(frozen=True)
class Config:
    """Options of `gradfn sample RUN`."""

    prompt: str = option("", "what the text continues from (default: the start of a line)")
    n: int = option(500, "how many tokens to write", at_least=1)
    temperature: float = option(
        0.8, "below 1 the likely becomes likelier; 0 always takes the likeliest token", at_least=0
    )
    top_k: int | None = option(None, "sample from the N most likely tokens only", at_least=1)
    seed: int = option(0, "the same seed writes the same text", at_least=0, at_most=0xFFFF_FFFF)

    def __post_init__(self) -> None:
        check(self)


class Model(NamedTuple):
    """A language model and all that is needed to generate text with it."""

    net: LanguageModel
    params: Params
    tokenizer: Tokenizer
    lines: bool  # whether it was trained on lines that are texts of their own


def save_model(
    folder: Path,
    net: str,
    settings: dict[str, Any],
    tokenizer: Tokenizer,
    lines: bool,
    samples: Sequence[str] = (),
    quiet: Quiet | None = None,
) -> None:
    """Write into a folder what `load_model` needs beside the checkpoint that `gf.fit` keeps there.

    Args:
        folder: where to.
        net: `"gpt"` or `"rnn"`; `"attention"` for a GPT without feed-forward layers, which only the page uses.
        settings: what `gf.GPTConfig`, or `gf.rnn`, takes.
        tokenizer: of the text that it was trained on.
        lines: whether that was lines that are texts of their own.
        samples: texts that the page of the run starts with.
        quiet: where it was not trained to predict; None where it predicts each next token.

    Raises:
        RunError: the folder contains another model, or one trained on another text.
        FileError: it contains one that cannot be read.
    """
    content = {"net": net, "settings": settings, "tokenizer": tokenizer.to_dict(), "lines": lines}
    file = inside(folder, MODEL)
    found: Any = read_json(file, ModelFile) if os.path.lexists(file) else {}
    if found:
        of_fit = content | {"tokenizer": None, "lines": False}
        if {name: found[name] for name in content} not in (content, of_fit):
            raise RunError(f"{file} belongs to another model or text. Use another folder")
    of_page = {"samples": list(samples)} | ({"quiet": quiet} if quiet else {})
    # Texts that are there stay: the run may be one that refuses to resume, on another text of the same characters.
    write_json(file, {**of_page, **found, **content})


def load_model(run: str | Path) -> Model:
    """Return the language model that a run has trained so far.

    Args:
        run: its folder, or an experiment's name for its latest run.

    Raises:
        RunError: there is no such run, or it did not train a language model.
        FileError: a file of it is missing or cannot be read, or leads out of the folder.
    """
    folder = Path(run)
    if not folder.exists():
        found = latest(run, holding=MODEL)
        if found is None:
            raise RunError(_no_model(run))
        folder = found
    file = inside(folder, MODEL)
    if not os.path.lexists(file):
        raise RunError(_no_model(folder))
    if not _writes(folder):
        raise RunError(_no_model(folder))
    content = read_json(file, ModelFile)
    if content["tokenizer"] is None:
        raise RunError(
            f"{folder}: was trained on tokens, and no tokenizer is known that makes texts of them; generate tokens "
            "with gf.generate(net, params, prompt, n)"
        )
    stored = newest(folder)
    if stored is None:
        raise FileError(f"{folder / CHECKPOINT}: there is no such file")
    shapes = list(parameter_shapes(stored).values())
    try:
        tokenizer = tokenizer_from(content["tokenizer"])
        net = _net(content["net"], content["settings"], tokenizer.size, shapes)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise FileError(f"{file}: {error}") from error
    like = jax.eval_shape(net.init, jax.random.key(0))
    if (n := len(jax.tree.leaves(like))) != len(shapes):
        raise FileError(f"{file}: expected settings of the {len(shapes)} arrays in {CHECKPOINT}, got {n}")
    params = load_params(folder, like)
    try:
        jax.eval_shape(net.apply, params, jnp.zeros([1], jnp.int32))
    except Exception as error:  # a layer may raise anything for settings that it does not support
        raise FileError(f"{file}: not a model that can be computed with ({error})") from error
    return Model(net, params, tokenizer, content["lines"])


def _net(kind: str, settings: dict[str, Any], vocab: int, shapes: list[tuple[int, ...]]) -> LanguageModel:
    """Return the net of a `model.json`, after checking that it is not larger than the stored parameters.

    Raises:
        ValueError: unknown settings, or sizes that do not fit the parameters.
    """
    form: Any = GPTConfig if kind == "gpt" else RNNSettings
    known = form.__annotations__
    if unknown := sorted(settings.keys() - known):
        raise ValueError(f"settings: {unknown[0]!r:.100} is not one of {', '.join(known)}")
    made: Any = msgspec.convert(settings, form)
    sizes = dataclasses.asdict(made) if kind == "gpt" else {"n_layers": 1} | made
    n_values = sum(map(math.prod, shapes))
    for name, size in sizes.items():
        most = len(shapes) if name == "n_layers" and not sizes.get("scan") else n_values
        # A context has no parameters, but generation needs memory proportional to it.
        most = CACHE_LIMIT // (sizes["n_layers"] * sizes["width"]) if name == "context" else most
        if type(size) is int and not 1 <= size <= most:
            raise ValueError(
                f"settings: expected {name} from 1 to {most:,}, as in {CHECKPOINT}, got {size:,}"
            )
    if sizes["vocab"] != vocab:
        raise ValueError(f"expected as many tokens as the vocab of {sizes['vocab']:,}, got {vocab:,}")
    return gpt(made) if kind == "gpt" else rnn(**made)


def _no_model(run: str | Path) -> str:
    """Return the error for a run without a model to sample from."""
    parts = sorted(file.parent for file in Path(run).glob(f"*/{MODEL}") if _writes(file.parent))
    if not parts and (last := latest(run)):
        parts = sorted(file.parent for file in last.glob(f"*/{MODEL}") if _writes(file.parent))
    if parts:
        return f"{run}: has several models; name one of {', '.join(map(str, parts))}"
    if not Path(run).exists() and not latest(run):
        return f"{run}: neither a run's folder nor an experiment with a run in {RUNS / run}; gradfn run gpt makes one"
    file = Path(run) / MODEL
    why = f"its {MODEL} describes another network" if os.path.lexists(file) else f"it has no {MODEL}"
    return f"{run}: not a run of a language model ({why}); gradfn run gpt trains one"


def _writes(folder: Path) -> bool:
    """Return whether a folder has a language model, or a description that cannot be read."""
    try:
        found = model_file(folder)
    except FileError:
        return True
    return found is not None and found["net"] in ("gpt", "rnn")


def write(model: Model, config: Config) -> Iterator[int]:
    """Yield the tokens of a text; where each line is a text of its own, every line starts with the prompt.

    Raises:
        ValueError: options that the model cannot take.
        DataError: a prompt with a character that it does not know.
    """
    options: dict[str, Any] = {"temperature": config.temperature, "top_k": config.top_k}
    if not model.lines:
        new_line = "\n" if "\n" in (model.tokenizer.symbols or "\n") else model.tokenizer.symbols[0]
        prompt = model.tokenizer.encode(config.prompt or new_line)
        yield from stream(model.net, model.params, prompt, config.n, seed=config.seed, **options)
        return
    start = config.prompt.strip("\n")
    prompt = model.tokenizer.encode(f"\n{start}")
    end = int(prompt[0])
    room = (model.net.context or len(prompt) + config.n) - len(prompt) + 1
    if room < 1:
        raise DataError(f"a prompt of {len(start)} characters, where lines have {model.net.context} at most")
    left, line = config.n, 0
    while left:
        n = min(room, left)
        for token in stream(model.net, model.params, prompt, n, seed=config.seed + line, **options):
            yield token
            left -= 1
            if token == end:
                break
        if not left:
            return
        # A line that fills the context ends there; the next one starts with the same prompt.
        yield from ([] if token == end else [end])
        yield from prompt[1:].tolist()
        line += 1


def run(model: Model, config: Config) -> None:
    """Print the tokens as they are generated, and their rate on stderr."""
    print(config.prompt.strip("\n") if model.lines else config.prompt, end="", flush=True)
    times: list[float] = [time.monotonic()]

    def timed() -> Iterator[int]:
        for token in write(model, config):
            times.append(time.monotonic())
            yield token

    for text in model.tokenizer.stream(timed()):
        print(text, end="", flush=True)
    print()
    n = len(times) - 1
    first = min(2, n)  # these include compilation: of the prompt's step, and of a single token's
    content = f"{n:,} tokens, the first {first} in {times[first] - times[0]:.1f} s (compiled)"
    if n > first:
        content += f", then {(n - first) / max(times[-1] - times[first], 1e-9):,.0f} tokens/s"
    print(content, file=sys.stderr)
