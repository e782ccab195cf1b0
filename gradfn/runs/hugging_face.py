"""A language model with its tokenizer from a Hugging Face folder, for `gradfn sample FOLDER`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple, TypedDict

import jax

from gradfn.core.params import Params
from gradfn.data import Tokenizer, huggingface
from gradfn.files import FileError, read_json
from gradfn.nets import GPTConfig, load_pretrained

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
LARGE = 100_000_000  # bytes of weights whose loading is announced


class Ids(TypedDict, total=False):
    """What the two files say about generation: tokens."""

    model_type: str | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None


class Pretrained(NamedTuple):
    """A language model from a Hugging Face folder.

    Attributes:
        config: of `gf.gpt`.
        params: its parameters.
        tokenizer: of the folder; it adds special tokens.
        start: the tokens that a text without a prompt continues; empty where the folder names none.
        stop: the tokens that end a text.
    """

    config: GPTConfig
    params: Params
    tokenizer: Tokenizer
    start: list[int]
    stop: frozenset[int]


def is_pretrained(folder: Path) -> bool:
    """Return whether a folder has weights of Hugging Face, or its `config.json`: those of runs have no `model_type`."""
    if any(os.path.lexists(folder / name) for name in WEIGHTS):
        return True
    try:
        return isinstance(read_json(folder / CONFIG, Ids).get("model_type"), str)
    except FileError:
        return False


def load(folder: Path, dtype: str | None = None) -> Pretrained:
    """Load a language model with its tokenizer.

    Args:
        folder: with `config.json`, `tokenizer.json` and weights in safetensors files, as `transformers` saves them.
        dtype: of the parameters; None for float32.

    Raises:
        ImportError: `tokenizers` is not installed.
        FileError: a file that is missing, damaged, of an unsupported model, or does not fit the others.
    """
    if not os.path.lexists(folder / "tokenizer.json"):
        raise FileError(
            f"{folder}: expected tokenizer.json, which tokenizer.save_pretrained of transformers writes; without it, "
            "generate tokens with gf.generate(net, params, prompt, n)"
        )
    tokenizer = huggingface(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    before = time.monotonic()
    if size >= LARGE:
        print(f"{folder}: loading {size / 1e9:.1f} GB of weights", file=sys.stderr)
    config, params = load_pretrained(folder, dtype or "float32")
    if size >= LARGE:
        seconds = time.monotonic() - before
        n = sum(leaf.size for leaf in jax.tree.leaves(params))
        print(
            f"loaded {n:,} parameters in {seconds:.1f} s; the first token is compiled next", file=sys.stderr
        )
    # Some tokenizers have special tokens that their models were not trained with.
    beyond = next((i for i in range(config.vocab, tokenizer.size) if i not in tokenizer.special), None)
    if beyond is not None:
        raise FileError(
            f"{folder}: tokenizer.json has the token {beyond:,}, but the model's vocab_size is {config.vocab:,}. Use "
            "the tokenizer that the model was trained with"
        )
    ids = [read_json(folder / name, Ids) for name in (GENERATION, CONFIG) if os.path.lexists(folder / name)]
    start = next((each["bos_token_id"] for each in ids if each.get("bos_token_id") is not None), None)
    stop = next((each["eos_token_id"] for each in ids if each.get("eos_token_id") is not None), None)
    stops = [stop] if isinstance(stop, int) else stop or []
    encoded = tokenizer.encode("").tolist()
    starts = encoded or ([] if start is None else [start])
    # A config may name a token that neither knows: transformers writes GPT-2's for every model of its kind.
    return Pretrained(
        config,
        params,
        tokenizer,
        [token for token in starts if 0 <= token < config.vocab],
        frozenset(token for token in stops if 0 <= token < config.vocab),
    )
