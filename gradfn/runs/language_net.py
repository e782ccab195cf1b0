"""A trained GPT, read back from the folder of its run without jax, for the page of the run to compute with."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np

from gradfn.files import FileError, inside, read_json
from gradfn.layout import KEPT, MODEL
from gradfn.runs.live_net import ACTIVATIONS
from gradfn.stored import STEP, Stored, newest, parameter_shapes
from gradfn.tensors import CHECKSUM, open_tensors

NETS = ("gpt", "attention")  # those that this module reads, by their names in `model.json`
LIMIT = 64 << 20  # bytes of the parameters in float32, of which a page holds fewer
MAX_CHECKPOINTS = 10_000
PREFIX = "params/"
FEEDS = (*ACTIVATIONS, "softmax", "swiglu")
# Settings of `gf.GPTConfig` that change what a network computes and that the page does not have, with the value that
# changes nothing.
NOT_IN_PAGE: Mapping[str, Any] = {
    **dict.fromkeys(
        ("attention_bias", "rope_scaling", "rope_base_local", "window", "score_cap", "logit_cap")
    ),
    **dict.fromkeys(("attention_scale", "embed_scale")),
    **dict.fromkeys(("qk_norm", "norms_after", "parallel"), False),
    "rope_fraction": 1.0,
    "global_layers": [],
}
LARGEST, MAX_LAYERS, MAX_HEADS = 1 << 24, 1000, 256  # of a size in the settings


class TokenizerFile(TypedDict):
    """A tokenizer, as `gradfn.data.Tokenizer.to_dict` writes it."""

    name: str
    symbols: NotRequired[str]


class Quiet(TypedDict, total=False):
    """Where a model was not trained to predict.

    Attributes:
        until: before the first of these tokens.
        repeats: before the tokens repeat.
    """

    until: int
    repeats: bool


class ModelFile(TypedDict):
    """`model.json`, as far as a GPT needs it."""

    net: NotRequired[str]
    settings: NotRequired[dict[str, Any]]
    tokenizer: NotRequired[TokenizerFile | None]
    lines: NotRequired[bool]
    quiet: NotRequired[Quiet | None]
    samples: NotRequired[list[str]]


class Architecture(NamedTuple):
    """What the page computes: the fields of `gf.GPTConfig` that matter for it, with all sizes filled in.

    Attributes:
        feed: None where blocks have no feed-forward layers.
    """

    vocab: int
    context: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    width: int
    hidden: int
    positions: str
    norm: str
    feed: str | None
    bias: bool
    tied: bool
    norm_epsilon: float
    rope_base: float


class LanguageNet(NamedTuple):
    """What the page computes with.

    Attributes:
        architecture: of the network.
        tokenizer: None where the tokens are integers without a text.
        lines: whether it was trained on lines that are texts of their own.
        quiet: where it was not trained to predict; None where it predicts each next token.
        samples: texts to start with.
        params: by path, float32; those of blocks under `lax.scan` as those of unrolled blocks.
        step: of the newest checkpoint; 0 where it does not say.
        kept: the files with the parameters after earlier steps, by step: see `load_kept`.
    """

    architecture: Architecture
    tokenizer: TokenizerFile | None
    lines: bool
    quiet: Quiet | None
    samples: list[str]
    params: dict[str, np.ndarray]
    step: int
    kept: dict[int, Path]


def load_language_net(folder: Path) -> LanguageNet | str | None:
    """Read the GPT that a run has trained so far.

    Args:
        folder: that `gf.fit` wrote its checkpoint into.

    Returns:
        The network; None where the folder has no GPT; or a sentence that says why it cannot run in a page.

    Raises:
        FileError: a file of it cannot be read, does not fit the others, or leads out of the folder.
    """
    file = inside(folder, MODEL)
    if not os.path.lexists(file):
        return None
    content = read_json(file, ModelFile)
    if content.get("net") not in NETS:
        return None
    stored = newest(folder)
    if stored is None:
        return None  # the run has only just started
    if stored.folder:
        return (
            "The GPT does not run in the page: its checkpoint is split over devices. Train it without a mesh."
        )
    tokenizer = content.get("tokenizer")
    if tokenizer and tokenizer["name"] not in ("characters", "bytes"):
        name = tokenizer["name"]
        return (
            f"The GPT does not run in the page: its tokens are those of {name:.100}. Use characters or bytes."
        )
    size = sum(math.prod(shape) for shape in parameter_shapes(stored).values())
    if 4 * size > LIMIT:
        return too_large(size)
    if reason := _not_in_page(file, content):
        return reason
    architecture = _architecture(file, content)
    _check_vocab(file, architecture, tokenizer)
    quiet = content.get("quiet")
    if quiet and not 0 <= quiet.get("until", 0) < architecture.vocab:
        raise FileError(f"{file}: quiet: expected a token below {architecture.vocab:,}")
    params = load_params(stored.file, architecture)
    return LanguageNet(
        architecture,
        tokenizer,
        content.get("lines", False),
        quiet or None,
        content.get("samples", []),
        params,
        _step(stored),
        _kept(folder),
    )


def too_large(n: int) -> str:
    """Return the sentence for a network of that many parameters."""
    return f"The GPT is too large to run in the page: {n:,} parameters."


def load_params(file: Path, architecture: Architecture) -> dict[str, np.ndarray]:
    """Read the parameters of a network from a checkpoint, or from one of `kept`, by path.

    Raises:
        FileError: the file cannot be read, or its parameters are not those of the architecture.
    """
    found: dict[str, np.ndarray] = {}
    with open_tensors(file) as content:
        names = [name for name in sorted(set(content.keys()) - {CHECKSUM}) if name.startswith(PREFIX)]
        shapes = {name.removeprefix(PREFIX): tuple(content.get_slice(name).get_shape()) for name in names}
        expected = expected_shapes(architecture)
        stacked = _stacked(expected, architecture.n_layers)
        is_stacked = shapes.keys() == stacked.keys() != expected.keys()
        wanted = stacked if is_stacked else expected
        _check_shapes(file, shapes, wanted)
        for name in names:
            array = content.get_tensor(name)
            if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
                raise FileError(f"{file}: {name}: expected floating numbers, got {array.dtype}")
            found[name.removeprefix(PREFIX)] = array.astype(np.float32)
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise FileError(f"{file}: {name}: expected finite numbers")
    if is_stacked:
        return _unstacked(found, architecture.n_layers)
    return {name: found[name] for name in expected}


def expected_shapes(of: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of an architecture by path, in the order of computation."""

    def dense(path: str, n_in: int, n_out: int, bias: bool = of.bias) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {f"{path}/W": (n_out, n_in)}
        return found | ({f"{path}/b": (n_out,)} if bias else {})

    def norm(path: str) -> dict[str, tuple[int, ...]]:
        names = ("gain", "b") if of.bias and of.norm == "layer" else ("gain",)
        return {f"{path}/{name}": (of.width,) for name in names}

    shapes: dict[str, tuple[int, ...]] = {"embed/W": (of.vocab, of.width)}
    if of.positions == "learned":
        shapes["positions/W"] = (of.context, of.width)
    for i in range(of.n_layers):
        block = f"blocks/{i}"
        inner, kv = of.n_heads * of.head_size, of.n_kv_heads * of.head_size
        shapes |= norm(f"{block}/attention_norm")
        shapes |= dense(f"{block}/attention/query", of.width, inner)
        shapes |= dense(f"{block}/attention/key", of.width, kv) | dense(
            f"{block}/attention/value", of.width, kv
        )
        shapes |= dense(f"{block}/attention/out", inner, of.width)
        if of.feed:
            shapes |= norm(f"{block}/feed_norm")
            for name in ("gate", "up") if of.feed == "swiglu" else ("up",):
                shapes |= dense(f"{block}/feed/{name}", of.width, of.hidden)
            shapes |= dense(f"{block}/feed/down", of.hidden, of.width)
    shapes |= norm("final_norm")
    # The head of a net of attention layers has biases, that of a GPT never.
    return shapes | ({} if of.tied else dense("head", of.width, of.vocab, bias=of.feed is None))


def _not_in_page(file: Path, content: ModelFile) -> str | None:
    """Return the sentence for a network that the page cannot compute, because of one of its settings."""
    settings = content.get("settings", {})
    if not isinstance(settings, dict):
        raise FileError(f"{file}: settings: expected an object, got {settings!r:.100}")
    for name, default in NOT_IN_PAGE.items():
        if (value := settings.get(name, default)) != default:
            return f"The GPT does not run in the page: the page does not compute {name}, which is {value!r:.100}."
    for name, value in (("norm", "rms_unit_offset"), ("feed", "geglu")):
        if settings.get(name) == value:
            return f"The GPT does not run in the page: the page does not compute {name}, which is {value!r}."
    return None


def _architecture(file: Path, content: ModelFile) -> Architecture:
    """Return the architecture that the settings in `model.json` describe.

    Raises:
        FileError: settings that are missing, unknown, or of the wrong kind.
    """
    settings = content.get("settings", {})

    def number(name: str, default: int, most: int = LARGEST) -> int:
        found = settings.get(name)
        found = default if found is None else found
        if type(found) is not int or not 1 <= found <= most:
            raise FileError(f"{file}: settings: expected {name} from 1 to {most:,}, got {found!r:.100}")
        return found

    def positive(name: str, default: float) -> float:
        found = settings.get(name, default)
        if type(found) not in (int, float) or not 0 < found < 1e30:
            raise FileError(f"{file}: settings: expected a positive {name}, got {found!r:.100}")
        return float(found)

    def one_of(name: str, default: str, known: tuple[str, ...]) -> str:
        found = settings.get(name, default)
        if found not in known:
            raise FileError(
                f"{file}: settings: expected {name} out of {', '.join(known)}, got {found!r:.100}"
            )
        return str(found)

    def flag(name: str, default: bool) -> bool:
        found = settings.get(name, default)
        if type(found) is not bool:
            raise FileError(f"{file}: settings: expected true or false for {name}, got {found!r:.100}")
        return found

    # The defaults are those of gf.GPTConfig, which a test compares.
    is_gpt = content.get("net") == "gpt"
    vocab, context = number("vocab", 50257), number("context", 1024)
    n_layers, n_heads, width = (
        number("n_layers", 12, MAX_LAYERS),
        number("n_heads", 12, MAX_HEADS),
        number("width", 768),
    )
    n_kv_heads = number("n_kv_heads", n_heads)
    if settings.get("head_size") is None and width % n_heads:
        raise FileError(f"{file}: settings: expected heads that divide the width {width:,}, got {n_heads:,}")
    if n_heads % n_kv_heads:
        raise FileError(
            f"{file}: settings: expected n_kv_heads that divide {n_heads:,} heads, got {n_kv_heads:,}"
        )
    head_size = number("head_size", max(width // n_heads, 1))
    positions = one_of("positions", "learned", ("learned", "sinusoidal", "rope"))
    if (positions == "rope" and head_size % 2) or (positions == "sinusoidal" and width % 2):
        raise FileError(f"{file}: settings: expected an even number of features for {positions} positions")
    return Architecture(
        vocab=vocab,
        context=context,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_size=head_size,
        width=width,
        hidden=number("hidden", 4 * width),
        positions=positions,
        norm=one_of("norm", "layer", ("layer", "rms")),
        feed=one_of("feed", "gelu", FEEDS) if is_gpt else None,
        bias=flag("bias", default=True),
        tied=flag("tied", default=True) if is_gpt else False,
        norm_epsilon=positive("norm_epsilon", 1e-5),
        rope_base=positive("rope_base", 10_000.0),
    )


def _check_vocab(file: Path, architecture: Architecture, tokenizer: TokenizerFile | None) -> None:
    """Raise a FileError where a tokenizer has not as many tokens as the network."""
    if tokenizer is None:
        return
    symbols = tokenizer.get("symbols", "")
    size = 256 if tokenizer["name"] == "bytes" else len(symbols)
    if size != architecture.vocab:
        raise FileError(
            f"{file}: expected as many tokens as the vocab of {architecture.vocab:,}, got {size:,}"
        )
    if len(set(symbols)) != len(symbols) or any("\ud800" <= symbol <= "\udfff" for symbol in symbols):
        raise FileError(f"{file}: tokenizer: symbols must be unique characters")


def _stacked(shapes: Mapping[str, tuple[int, ...]], n: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the same parameters where blocks are stacked for `lax.scan`."""
    first = {name: shape for name, shape in shapes.items() if not re.match("blocks/(?!0/)", name)}
    return {
        name.replace("blocks/0/", "blocks/", 1): (n, *shape) if name.startswith("blocks/") else shape
        for name, shape in first.items()
    }


def _unstacked(params: Mapping[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, array in params.items():
        if name.startswith("blocks/"):
            rest = name.removeprefix("blocks/")
            found |= {f"blocks/{i}/{rest}": array[i] for i in range(n)}
        else:
            found[name] = array
    return found


def _check_shapes(
    file: Path, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise a FileError where the arrays in a file are not those that are wanted."""
    for name in [*wanted, *shapes]:
        expected, actual = wanted.get(name), shapes.get(name)
        if expected != actual:
            texts = ["no such array" if shape is None else str(list(shape)) for shape in (expected, actual)]
            raise FileError(f"{file}: {name:.200}: expected {texts[0]}, got {texts[1]}")


def _step(stored: Stored) -> int:
    """Return the step of a checkpoint; 0 where it has no such number."""
    with open_tensors(stored.file) as content:
        if "step" not in content.keys():  # noqa: SIM118
            return 0
        return int(content.get_tensor("step"))


def _kept(folder: Path) -> dict[int, Path]:
    """Return the files of the parameters that `gf.fit(keep_every=...)` kept, by step.

    Raises:
        FileError: one leads out of the run's folder.
    """
    files = sorted(inside(folder, KEPT).glob(f"{STEP}.safetensors"))[:MAX_CHECKPOINTS]
    return {int(file.stem): inside(folder, f"{KEPT}/{file.name}") for file in files}
