"""Generate text with the language model of a run or a Hugging Face folder: `gradfn sample RUN`."""

from __future__ import annotations

import dataclasses
import json
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
import numpy as np

from gradfn.core.params import Params
from gradfn.data import DataError, Tokenizer, stop_at, tokenizer_from
from gradfn.data._tokenizer import TokenizerFile
from gradfn.files import FileError, inside, read_json, read_text
from gradfn.layout import CHECKPOINT, MODEL
from gradfn.nets import GPTConfig, LanguageModel, generate, gpt, rnn, stream
from gradfn.runs import hugging_face
from gradfn.runs.config import check, option
from gradfn.runs.folder import RUNS, RunError, latest, write_json
from gradfn.runs.language_net import Quiet
from gradfn.stored import model_file, newest, parameter_shapes
from gradfn.train import load_params

PROMPTS_LIMIT = 1 << 24  # bytes of a file of prompts
DASHES = f"{'-' * 8}\n"  # between texts
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

    prompt: str = option("", "what the text continues from (default: the start of a line, or of a text)")
    prompts: str | None = option(None, "a file with one prompt per line, which are continued together")
    n: int = option(500, "how many tokens to write at most, for each prompt", at_least=1)
    temperature: float = option(
        0.8, "below 1 the likely becomes likelier; 0 always takes the likeliest token", at_least=0
    )
    top_k: int | None = option(None, "sample from the N most likely tokens only", at_least=1)
    top_p: float | None = option(
        None, "sample from the most likely tokens that have this probability together", at_least=0, at_most=1
    )
    min_p: float | None = option(
        None, "sample from tokens at least this many times as likely as the likeliest", at_least=0, at_most=1
    )
    stop: tuple[str, ...] = option((), "end the text before any of these strings")
    seed: int = option(0, "the same seed writes the same text", at_least=0, at_most=0xFFFF_FFFF)
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "of the parameters (default: that of the run; float32 for a Hugging Face folder)"
    )

    def __post_init__(self) -> None:
        check(self)
        if "" in self.stop:
            raise ValueError("stop must be strings of at least one character, got an empty one")
        if self.prompt and self.prompts is not None:
            raise ValueError("prompt and prompts cannot be used together")


class Model(NamedTuple):
    """A language model and all that is needed to generate text with it.

    Attributes:
        lines: whether it was trained on lines that are texts of their own.
        start: the tokens that a text without a prompt continues; None for those of a new line.
        stop: the tokens that end a text.
        config: of a GPT whose context may be shortened.
    """

    net: LanguageModel
    params: Params
    tokenizer: Tokenizer
    lines: bool
    start: list[int] | None = None
    stop: frozenset[int] = frozenset()
    config: GPTConfig | None = None


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
    content = json.loads(json.dumps(content))  # as in a file, where tuples are lists
    file = inside(folder, MODEL)
    found: Any = read_json(file, ModelFile) if os.path.lexists(file) else {}
    if found:
        of_fit = content | {"tokenizer": None, "lines": False}
        if {name: found[name] for name in content} not in (content, of_fit):
            raise RunError(f"{file} belongs to another model or text. Use another folder")
    of_page = {"samples": list(samples)} | ({"quiet": quiet} if quiet else {})
    # Texts that are there stay: the run may be one that refuses to resume, on another text of the same characters.
    write_json(file, {**of_page, **found, **content})


def load_model(run: str | Path, dtype: str | None = None) -> Model:
    """Return the language model that a run has trained so far, or that of a Hugging Face folder.

    Args:
        run: its folder, or an experiment's name for its latest run; or a Hugging Face folder.
        dtype: of the parameters; None for that of the run, and for float32 from a Hugging Face folder.

    Raises:
        RunError: there is no such run, or it did not train a language model.
        FileError: a file of it is missing or cannot be read, or leads out of the folder.
        ImportError: its tokenizer needs a library that is not installed.
    """
    folder = Path(run)
    if hugging_face.is_pretrained(folder):
        config, params, tokenizer, start, stop = hugging_face.load(folder, dtype)
        return Model(gpt(config), params, tokenizer, False, start, stop, config)
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
    if dtype:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
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
        # Nothing has the size of a window, which may be longer than any sequence.
        most = sys.maxsize if name == "window" else most
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
    if not model.lines:
        prompt = _tokens_of(model, config.prompt)
        yield from stream(model.net, model.params, prompt, config.n, **_options(model, config))
        return
    options = _options(model, config)
    seed = options.pop("seed")
    start = config.prompt.strip("\n")
    prompt = model.tokenizer.encode(f"\n{start}")
    end = int(prompt[0])
    room = (model.net.context or len(prompt) + config.n) - len(prompt) + 1
    if room < 1:
        raise DataError(f"a prompt of {len(start)} characters, where lines have {model.net.context} at most")
    left, line = config.n, 0
    while left:
        n = min(room, left)
        for token in stream(model.net, model.params, prompt, n, seed=seed + line, **options):
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


def _options(model: Model, config: Config) -> dict[str, Any]:
    """Return the options of `gf.stream`."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    return {name: getattr(config, name) for name in names} | {"stop": model.stop}


def _tokens_of(model: Model, prompt: str) -> np.ndarray:
    """Return the tokens that a text continues: those of a prompt, or those that a text starts with.

    Raises:
        DataError: there are none.
    """
    if prompt or model.start is None:
        new_line = "\n" if "\n" in (model.tokenizer.symbols or "\n") else model.tokenizer.symbols[0]
        tokens = model.tokenizer.encode(prompt or new_line)
    else:
        tokens = np.array(model.start, np.int32)
    if not len(tokens):
        raise DataError(
            "a prompt with at least one token is needed: the folder names no token that starts a text"
        )
    return tokens


def run(model: Model, config: Config) -> None:
    """Print the texts of one prompt as it is generated, or those of several prompts; and the rate on stderr.

    Raises:
        ValueError: options that the model cannot take.
        FileError: the file of prompts cannot be read.
        DataError: a prompt with a character that the model does not know.
    """
    if config.prompts is not None:
        _run_several(model, config)
        return
    prompt = config.prompt
    if model.lines:
        prompt = prompt.strip("\n")
        before: Sequence[int] = []
    else:
        before = _tokens_of(model, prompt).tolist()
        model = _with_context(model, len(before) + config.n)
    print(prompt, end="", flush=True)
    times: list[float] = [time.monotonic()]

    def timed() -> Iterator[int]:
        for token in write(model, config):
            times.append(time.monotonic())
            # Not all tokenizers know that such a token is not part of a text.
            if token not in model.stop:
                yield token

    for text in stop_at(model.tokenizer.stream(timed(), after=before), config.stop):
        print(text, end="", flush=True)
    print()
    n = len(times) - 1
    first = min(2, n)  # these include compilation: of the prompt's step, and of a single token's
    content = f"{n:,} tokens, the first {first} in {times[first] - times[0]:.1f} s (compiled)"
    if n > first:
        content += f", then {(n - first) / max(times[-1] - times[first], 1e-9):,.0f} tokens/s"
    print(content, file=sys.stderr)


def _run_several(model: Model, config: Config) -> None:
    """Print the texts of the prompts in a file, one per line, with a line of dashes between them."""
    if model.lines:
        raise RunError(
            "a model that was trained on lines continues one prompt: use --prompt instead of --prompts"
        )
    prompts = [line for line in read_text(Path(config.prompts or ""), PROMPTS_LIMIT).splitlines() if line]
    if not prompts:
        raise RunError(f"{config.prompts}: expected one prompt per line, got an empty file")
    before = [_tokens_of(model, prompt).tolist() for prompt in prompts]
    model = _with_context(model, max(map(len, before)) + config.n)
    start = time.monotonic()
    found = generate(model.net, model.params, before, config.n, **_options(model, config))
    seconds = time.monotonic() - start
    for i, (prompt, tokens, new) in enumerate(zip(prompts, before, found, strict=True)):
        shown = [token for token in new.tolist() if token not in model.stop]
        text = "".join(stop_at(model.tokenizer.stream(shown, after=tokens), config.stop))
        print(f"{DASHES if i else ''}{prompt}{text}")
    n = sum(map(len, found))
    print(f"{n:,} tokens in {seconds:.1f} s, with compilation", file=sys.stderr)


def _with_context(model: Model, n_tokens: int) -> Model:
    """Return a model with a shorter context where that is enough for a text, and its parameters stay the same.

    A state takes memory and time for the whole context, which may be 100 times as long as the text.
    """
    config = model.config
    # Learned positions are parameters, and dynamic frequencies depend on the context.
    scaling = None if config is None else getattr(config.rope_scaling, "kind", None)
    if config is None or config.positions != "rope" or scaling == "dynamic":
        return model
    # A power of two, so that texts of similar lengths share their compiled programs.
    context = min(config.context, 1 << max(n_tokens - 1, 63).bit_length())
    return model._replace(net=gpt(dataclasses.replace(config, context=context)))
