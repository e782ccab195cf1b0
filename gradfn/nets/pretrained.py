"""Real weights: GPT-2 and Llama models in the folders that Hugging Face's `transformers` writes and reads.

A folder holds `config.json` and `model.safetensors`, or several such files and `model.safetensors.index.json`.
Pickled weights are never read, because unpickling a file can run arbitrary code. What the config describes
is compared with the files' headers before anything is built or loaded, and tensors are loaded one at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import reprlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from gradfn.core.params import Params, check, path_name
from gradfn.files import IDLE, FileError, beside, read_json, remove_parts, replacing
from gradfn.nets._gpt import GPTConfig, gpt
from gradfn.tensors import NAMES, Tensor, is_stored, open_tensors, write_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {NAMES[name]: name for name in ("float16", "bfloat16", "float32", "float64")}
MOST = 2**31 - 1  # of each size in a config


class Stored(NamedTuple):
    """A tensor in a file: what the file's header says of it, and a function that loads it."""

    file: Path
    dtype: str  # as the format calls it
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]


class Index(TypedDict):
    """What `model.safetensors.index.json` contains."""

    weight_map: dict[str, str]  # the file of each tensor


class Entry(NamedTuple):
    """Where a file's tensor lies in our tree: one leaf, or several stacked along their first axis (out)."""

    name: str
    paths: tuple[str, ...]
    transposed: bool = False  # GPT-2 keeps its matrices as [in, out]


def load_pretrained(
    folder: str | os.PathLike[str], dtype: str | None = "float32"
) -> tuple[GPTConfig, Params]:
    """Load a GPT-2 or Llama model from a Hugging Face folder; `model_type` in its `config.json` says which.

    Args:
        folder: contains `config.json` and safetensors files, in one piece or in shards.
        dtype: of the parameters; None for that of the files (float32, float16 or bfloat16).

    Returns:
        `(config, params)`. `gf.gpt(config)` is the net; `dataclasses.replace(config, scan=True)` and
        `gf.stack_blocks(params)` run its blocks under `lax.scan`.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: another `model_type`; a field of `config.json` that asks for something that `gf.gpt` does not
            do; a tensor that is missing, unexpected, of another shape or not of floats; a damaged file. The
            message names it, and nothing is loaded before headers and config agree. Fields of training,
            generation and bookkeeping change no result and are ignored; unknown fields that are null, false or
            empty are ignored with a warning.

    >>> import jax, tempfile, gradfn as gf
    >>> config = gf.GPTConfig(vocab=65, context=8, n_layers=1, n_heads=2, width=4)
    >>> folder = tempfile.mkdtemp()
    >>> gf.save_pretrained(folder, config, gf.gpt(config).init(jax.random.key(0)))
    >>> loaded, params = gf.load_pretrained(folder)
    >>> loaded == config, gf.count(params)
    (True, 544)
    """
    folder = Path(folder)
    file = folder / "config.json"
    fields = _Fields(file)
    family = _FAMILIES[fields.choice("model_type", _FAMILIES)]
    config = family.read(fields)
    try:
        gpt(dataclasses.replace(config, n_layers=1))
    except ValueError as error:
        # Sizes that do not fit together.
        raise FileError(f"{file}: {error}") from error
    with _opened(folder) as tensors:
        tensors = _without_buffers(tensors, family, config, file)
        _check_depth(family, config, len(tensors), file)
        entries = family.entries(config)
        _check_names([entry.name for entry in entries], tensors, folder)
        spec = gpt(config).spec
        shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(spec)}
        for entry in entries:
            _check_tensor(entry, tensors[entry.name], shapes)
        leaves: dict[str, jax.Array] = {}
        for entry in entries:
            tensor = tensors[entry.name].load()
            tensor = tensor.T if entry.transposed else tensor
            cuts = np.cumsum([shapes[path][0] for path in entry.paths])[:-1]
            for path, part in zip(entry.paths, np.split(tensor, cuts), strict=True):
                leaves[path] = jnp.asarray(part, dtype and jnp.dtype(dtype))
    return config, jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], spec)


def save_pretrained(folder: str | os.PathLike[str], config: GPTConfig, params: Params) -> None:
    """Write a model as a Hugging Face folder that `transformers` reads, as GPT-2 or as Llama.

    Args:
        folder: created if it does not exist. A model in it is replaced, including its shards and their index
            (`model-00001-of-00002.safetensors`, ...). Config and weights are written completely before they
            replace existing ones.
        config: with the features of GPT-2 (learned positions, layer norms, no shared heads; absent biases are
            written as zeros) or of Llama (RoPE, RMS norms, SwiGLU).
        params: of `gf.gpt(config)`; they are written in their own dtype, one tensor at a time.

    Raises:
        ParameterError: parameters that do not fit the config.
        ValueError: a config that is neither of the two (the message names the field); a folder whose `config.json`
            or `model.safetensors` does not belong to such a model.

    >>> import jax, tempfile, gradfn as gf, os
    >>> config = gf.GPTConfig(vocab=65, context=8, n_layers=1, n_heads=2, width=4)
    >>> folder = tempfile.mkdtemp()
    >>> gf.save_pretrained(folder, config, gf.gpt(config).init(jax.random.key(0)))
    >>> sorted(os.listdir(folder))
    ['config.json', 'model.safetensors']
    """
    check(gpt(config).spec, params)
    family = _family_of(config)
    fields = family.write(config)
    given = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    dtype = next(iter(given.values())).dtype
    # GPT-2 always has biases.
    bias = config.bias or family.name == "gpt2"
    spec = gpt(dataclasses.replace(config, bias=bias, scan=False)).spec
    shapes = {path_name(path): param.shape for path, param in jax.tree_util.tree_leaves_with_path(spec)}

    def leaf(path: str) -> PyTree:
        block = re.fullmatch(r"blocks/(\d+)/(.+)", path) if config.scan else None
        if block is not None:
            path = f"blocks/{block[2]}"
        if path not in given:
            return np.zeros(shapes[path if block is None else block[0]], dtype)
        return given[path] if block is None else given[path][int(block[1])]

    def tensor(entry: Entry) -> Tensor:
        parts = [shapes[path] for path in entry.paths]
        shape = (sum(part[0] for part in parts), *parts[0][1:])

        def load() -> np.ndarray:
            array = np.concatenate([np.asarray(leaf(path)) for path in entry.paths])
            return array.T if entry.transposed else array

        return Tensor(np.dtype(dtype), shape[::-1] if entry.transposed else shape, load)

    if not is_stored(dtype):
        raise ValueError(f"save_pretrained: expected parameters of a dtype that safetensors has, got {dtype}")
    tensors = {entry.name: tensor(entry) for entry in family.entries(config)}
    folder = Path(folder)
    _check_replaceable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", SINGLE):
        remove_parts(folder, name, IDLE)
    fields |= {"architectures": [family.architecture], "dtype": str(dtype), "model_type": family.name}
    # The config gets its name first: weights without one would not be recognized as ours.
    with replacing(folder / SINGLE) as weights, replacing(folder / "config.json") as described:
        described.write((json.dumps(fields, indent=2) + "\n").encode())
        write_tensors(weights, tensors, {"format": "pt"})
    for stale in [folder / INDEX, *folder.iterdir()]:
        if stale.name == INDEX or re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", stale.name):
            stale.unlink(missing_ok=True)


def _check_replaceable(folder: Path) -> None:
    """Refuse to write over files that are not a model's."""
    file = folder / "config.json"
    if os.path.lexists(file):
        try:
            content = read_json(file, dict[str, Any])
        except FileError:
            content = {}
        if not isinstance(content.get("model_type"), str):
            raise ValueError(
                f"{file}: already exists and is not the config of a Hugging Face model. Name another folder"
            )
    elif os.path.lexists(folder / SINGLE):
        raise ValueError(f"{folder / SINGLE}: already exists without a config.json. Name another folder")


def _shown(name: str) -> str:
    """Return a name from a file in a form that is safe to show in an error: on one line, and not too long."""
    return name if name.isprintable() and len(name) <= 200 else f"{name!r:.200}"


# Files


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[dict[str, Stored]]:
    """Open all tensors of a folder, in one file or else in shards, as `transformers` does."""
    with contextlib.ExitStack() as files:
        tensors: dict[str, Stored] = {}
        for file, names in _files(folder).items():
            content = files.enter_context(open_tensors(file))
            stored = _stored(content, file)
            absent = sorted(names - stored.keys())
            if absent:
                raise FileError(f"{file}: {_shown(absent[0])}: missing, though {INDEX} says it is here")
            tensors |= stored
        yield tensors


def _files(folder: Path) -> dict[Path, set[str]]:
    """Return a folder's files of weights, each with the tensors that an index says it contains."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():
        return {single: set()}
    if index.exists():
        files: dict[Path, set[str]] = {}
        for name, file in sorted(read_json(index, Index)["weight_map"].items()):
            files.setdefault(beside(index, file), set()).add(name)
        absent = next((file for file in files if not file.exists()), None)
        if absent is not None:
            raise FileNotFoundError(f"{absent}: not there, though the index names it")
        return files
    pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
    hint = (
        f". {_shown(pickled[0].name)} is pickled and never read; save the model with safe_serialization=True"
        if pickled
        else ""
    )
    raise FileNotFoundError(f"{folder}: expected {single.name} or {index.name}{hint}")


def _stored(content: PyTree, file: Path) -> dict[str, Stored]:
    """Return what an open file's header says of its tensors."""
    stored = {}
    for name in content.keys():  # noqa: SIM118
        header = content.get_slice(name)
        load = partial(content.get_tensor, name)
        stored[name] = Stored(file, header.get_dtype(), tuple(header.get_shape()), load)
    return stored


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise FileNotFoundError(f"{file}: not there")
    return read_json(file, dict[str, Any])


def _without_buffers(
    tensors: dict[str, Stored], family: _Family, config: GPTConfig, file: Path
) -> dict[str, Stored]:
    """Drop what older files hold beside the parameters, and give all names their usual prefix."""
    if not any(name.startswith(family.prefix) for name in tensors):  # the bare model, without its head
        tensors = {
            name if name == "lm_head.weight" else family.prefix + name: t for name, t in tensors.items()
        }
    tensors = {name: t for name, t in tensors.items() if not re.search(family.buffers, name)}
    head, embedded = tensors.get("lm_head.weight"), tensors.get(family.embedding)
    if config.tied and head is not None and embedded is not None:
        same = head[1:3] == embedded[1:3] and head.dtype in FLOATS
        if not same or not np.array_equal(head.load(), embedded.load()):
            raise FileError(
                f"{head.file}: lm_head.weight: differs from {family.embedding}, though {file.name} ties them "
                "(tie_word_embeddings)"
            )
        del tensors["lm_head.weight"]
    return tensors


def _check_depth(family: _Family, config: GPTConfig, n_tensors: int, file: Path) -> None:
    """Refuse far more layers than the files can have the tensors of, before a list of them is made."""
    one, two = (len(family.entries(dataclasses.replace(config, n_layers=n))) for n in (1, 2))
    expected = one + (config.n_layers - 1) * (two - one)
    if expected > n_tensors + 1000:
        raise FileError(
            f"{file}: describes {config.n_layers:,} layers of {two - one} tensors each, but the folder's files contain "
            f"{n_tensors:,} tensors"
        )


def _check_names(expected: list[str], tensors: dict[str, Stored], folder: Path) -> None:
    missing = [name for name in expected if name not in tensors]
    extra = sorted(set(tensors) - set(expected))
    if missing:
        alike = [name for name in extra if len(name) <= 200][:1000]
        near = difflib.get_close_matches(missing[0], alike, 1)
        hint = f". Left over is {_shown(near[0])}" if near else ""
        raise FileError(f"{folder}: {missing[0]}: missing ({len(missing)} of {len(expected)} are){hint}")
    if extra:
        raise FileError(
            f"{folder}: {_shown(extra[0])}: no parameter of this model ({len(extra)} are left over)"
        )


def _check_tensor(entry: Entry, tensor: Stored, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a tensor of another shape than the config describes, or of a dtype that is not of parameters."""
    parts = [shapes[path] for path in entry.paths]
    expected: tuple[int, ...] = (sum(part[0] for part in parts), *parts[0][1:])
    expected = expected[::-1] if entry.transposed else expected
    if tensor.shape != expected or tensor.dtype not in FLOATS:
        raise FileError(
            f"{tensor.file}: {entry.name}: expected {list(expected)} of {', '.join(FLOATS)}, got "
            f"{list(tensor.shape)[:9]} of {tensor.dtype}"
        )


# What config.json says


class _Fields:
    """The fields of a `config.json`, each taken once; what is left at the end must be known to do nothing."""

    def __init__(self, file: Path) -> None:
        self.file, self.left = file, _read_json(file)

    def choice(self, name: str, choices: Collection[str]) -> str:
        """Take a string that is one of some."""
        value = self.left.pop(name, None)
        if not isinstance(value, str) or value not in choices:
            expected = " or ".join(map(repr, choices))
            raise FileError(f"{self.file}: {name}: expected {expected}, got {reprlib.repr(value)}")
        return value

    def take(self, name: str, default: Any = None, kind: type | tuple[type, ...] = object) -> PyTree:
        value = self.left.pop(name, default)
        if value is None and default is False:  # as where it is absent
            value = False
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and int in kinds):
            names = " or ".join(k.__name__ for k in kinds)
            raise FileError(f"{self.file}: {name}: expected {names}, got {reprlib.repr(value)}")
        return value

    def size(self, name: str, default: int | None) -> PyTree:
        """Take an integer that counts something; it may be null where the default is None."""
        value = self.take(name, default, int if default is not None else (int, type(None)))
        if value is not None and not 1 <= value <= MOST:
            raise FileError(f"{self.file}: {name}: expected 1 to {MOST:,}, got {reprlib.repr(value)}")
        return value

    def positive(self, name: str, value: PyTree) -> float:
        """Return a field's value as a float."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise FileError(f"{self.file}: {name}: expected a number above 0, got {reprlib.repr(value)}")
        return float(value)

    def expect(self, **values: PyTree) -> None:
        """Refuse other values than the one that `gf.gpt` stands for; a field that is absent has it."""
        for name, value in values.items():
            actual = self.left.pop(name, value)
            if actual != value and not (actual is None and not value):
                raise FileError(
                    f"{self.file}: {name}: gf.gpt does {value!r} only, got {reprlib.repr(actual)}"
                )

    def end(self) -> None:
        """Refuse fields that nobody took and that say something, but for those of training, text and book-keeping.

        What is null, false or empty asks for nothing: it is named in a warning and passed over.
        """
        unknown = sorted(set(self.left) - _WITHOUT_EFFECT)
        for name in unknown:
            value = self.left[name]
            if value is not None and value is not False and value not in ("", [], {}):
                raise FileError(f"{self.file}: {_shown(name)}: not supported, got {reprlib.repr(value)}")
        if unknown:
            listed = ", ".join(f"{_shown(name)} {self.left[name]!r}" for name in unknown)
            warnings.warn(f"{self.file}: ignored what gradfn does not know: {listed:.500}", stacklevel=5)


# Fields that change neither logits nor gradients without dropout, whatever they say.
_WITHOUT_EFFECT = {
    *(
        "_name_or_path",
        "architectures",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "id2label",
        "label2id",
    ),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "unk_token_id",
        "decoder_start_token_id",
    ),
    *("initializer_range", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
    *("gradient_checkpointing", "problem_type", "num_labels", "finetuning_task", "task_specific_params"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "chunk_size_feed_forward", "n_ctx"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
    *("summary_first_dropout", "pretraining_tp", "attn_implementation", "_attn_implementation"),
    *("_attn_implementation_autoset", "_commit_hash", "_num_labels", "n_special", "predict_special_tokens"),
    *("output_past", "is_decoder", "is_llama_config", "torchscript", "use_bfloat16", "tie_encoder_decoder"),
    *("tf_legacy_loss", "transformers.js_config", "tokenizer_class", "prefix"),
    # Of generation
    *("do_sample", "max_length", "min_length", "temperature", "top_k", "top_p", "typical_p", "num_beams"),
    *("num_beam_groups", "diversity_penalty", "length_penalty", "repetition_penalty", "early_stopping"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("output_scores", "return_dict_in_generate", "remove_invalid_values", "suppress_tokens"),
    *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "max_new_tokens"),
    "exponential_decay_length_penalty",
}


def _read_gpt2(fields: _Fields) -> GPTConfig:
    fields.expect(
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        add_cross_attention=False,
        is_encoder_decoder=False,
    )
    activation = fields.take("activation_function", "gelu_new", str)
    if activation not in _ACTIVATIONS:
        raise FileError(f"{fields.file}: activation_function: not supported, got {reprlib.repr(activation)}")
    width, hidden = fields.size("n_embd", 768), fields.size("n_inner", None)
    config = GPTConfig(
        vocab=fields.size("vocab_size", 50257),
        context=fields.size("n_positions", 1024),
        n_layers=fields.size("n_layer", 12),
        n_heads=fields.size("n_head", 12),
        width=width,
        hidden=None if hidden == 4 * width else hidden,
        feed=_ACTIVATIONS[activation],
        tied=fields.take("tie_word_embeddings", True, bool),
        norm_epsilon=fields.positive("layer_norm_epsilon", fields.take("layer_norm_epsilon", 1e-5)),
    )
    fields.end()
    return config


def _write_gpt2(config: GPTConfig) -> dict[str, Any]:
    for name, needed in (("positions", "learned"), ("norm", "layer"), ("head_size", None)):
        _need("gpt2", config, name, needed)
    if config.n_kv_heads not in (None, config.n_heads):
        _need("gpt2", config, "n_kv_heads", None)
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items() if theirs != "gelu_pytorch_tanh"}
    if config.feed not in names:
        raise ValueError(f"save_pretrained: gpt2 has no feed {config.feed!r}")
    return {
        "vocab_size": config.vocab,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.hidden,
        "activation_function": names[config.feed],
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
    }


def _read_llama(fields: _Fields) -> GPTConfig:
    fields.expect(hidden_act="silu", is_encoder_decoder=False, rope_interleaved=False)
    rope: dict[str, Any] = {}
    for name, does in (("rope_scaling", "None only, or "), ("rope_parameters", "")):
        given = fields.take(name, None, (dict, type(None))) or {}
        kind = given.get("rope_type", given.get("type", "default"))
        rest = {
            key
            for key, value in given.items()
            if key not in ("rope_type", "type", "rope_theta") and value != 1
        }
        if kind != "default" or rest:
            raise FileError(
                f"{fields.file}: {name}: gf.gpt does {does}rope_type 'default' only, got {reprlib.repr(given)}"
            )
        rope |= given
    base = fields.take("rope_theta", 10_000.0)
    bias, feed_bias = fields.take("attention_bias", False, bool), fields.take("mlp_bias", False, bool)
    if bias != feed_bias:
        raise FileError(
            f"{fields.file}: attention_bias: gf.gpt has biases in attention and feed-forward layers or in "
            f"neither, got {bias} with mlp_bias {feed_bias}"
        )
    width, n_heads = fields.size("hidden_size", 4096), fields.size("num_attention_heads", 32)
    head_size = fields.size("head_dim", None)
    config = GPTConfig(
        vocab=fields.size("vocab_size", 32000),
        context=fields.size("max_position_embeddings", 2048),
        n_layers=fields.size("num_hidden_layers", 32),
        n_heads=n_heads,
        width=width,
        n_kv_heads=fields.size("num_key_value_heads", None),
        head_size=None if head_size is not None and head_size * n_heads == width else head_size,
        hidden=fields.size("intermediate_size", 11008),
        positions="rope",
        norm="rms",
        feed="swiglu",
        bias=bias,
        tied=fields.take("tie_word_embeddings", False, bool),
        norm_epsilon=fields.positive("rms_norm_eps", fields.take("rms_norm_eps", 1e-6)),
        rope_base=fields.positive("rope_theta", rope.get("rope_theta", base)),
    )
    fields.end()
    return config


def _write_llama(config: GPTConfig) -> dict[str, Any]:
    for name, needed in (("positions", "rope"), ("norm", "rms"), ("feed", "swiglu")):
        _need("llama", config, name, needed)
    return {
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "head_dim": config.head_size or config.width // config.n_heads,
        "hidden_size": config.width,
        "intermediate_size": config.hidden or 4 * config.width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,  # where older versions of transformers look
        "rope_parameters": {"rope_theta": config.rope_base, "rope_type": "default"},
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.tied,
    }


def _need(family: str, config: GPTConfig, name: str, needed: Any) -> None:
    actual = getattr(config, name)
    if actual != needed:
        raise ValueError(f"save_pretrained: {family} has {name} {needed!r}, got {actual!r}")


def _family_of(config: GPTConfig) -> _Family:
    return _FAMILIES["llama" if config.positions == "rope" else "gpt2"]


# Which tensor is which parameter


def _entries_gpt2(config: GPTConfig) -> list[Entry]:
    entries = [
        Entry("transformer.wte.weight", ("embed/W",)),
        Entry("transformer.wpe.weight", ("positions/W",)),
    ]

    def norm(name: str, path: str) -> None:
        entries.append(Entry(f"{name}.weight", (f"{path}/gain",)))
        entries.append(Entry(f"{name}.bias", (f"{path}/b",)))

    def product(name: str, *paths: str) -> None:
        entries.append(Entry(f"{name}.weight", tuple(f"{path}/W" for path in paths), transposed=True))
        entries.append(Entry(f"{name}.bias", tuple(f"{path}/b" for path in paths)))

    for i in range(config.n_layers):
        theirs, ours = f"transformer.h.{i}", f"blocks/{i}"
        norm(f"{theirs}.ln_1", f"{ours}/attention_norm")
        product(f"{theirs}.attn.c_attn", *(f"{ours}/attention/{part}" for part in ("query", "key", "value")))
        product(f"{theirs}.attn.c_proj", f"{ours}/attention/out")
        norm(f"{theirs}.ln_2", f"{ours}/feed_norm")
        product(f"{theirs}.mlp.c_fc", f"{ours}/feed/up")
        product(f"{theirs}.mlp.c_proj", f"{ours}/feed/down")
    norm("transformer.ln_f", "final_norm")
    return entries if config.tied else [*entries, Entry("lm_head.weight", ("head/W",))]


def _entries_llama(config: GPTConfig) -> list[Entry]:
    entries = [
        Entry("model.embed_tokens.weight", ("embed/W",)),
        Entry("model.norm.weight", ("final_norm/gain",)),
    ]
    products = {f"self_attn.{part[0]}_proj": f"attention/{part}" for part in ("query", "key", "value", "out")}
    products |= {f"mlp.{part}_proj": f"feed/{part}" for part in ("gate", "up", "down")}
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_norm"}
    for i in range(config.n_layers):
        theirs, ours = f"model.layers.{i}", f"blocks/{i}"
        entries += [
            Entry(f"{theirs}.{name}.weight", (f"{ours}/{path}/gain",)) for name, path in norms.items()
        ]
        for name, path in products.items():
            entries.append(Entry(f"{theirs}.{name}.weight", (f"{ours}/{path}/W",)))
            if config.bias:
                entries.append(Entry(f"{theirs}.{name}.bias", (f"{ours}/{path}/b",)))
    return entries if config.tied else [*entries, Entry("lm_head.weight", ("head/W",))]


@dataclasses.dataclass(frozen=True)
class _Family:
    """How `transformers` writes the models of one kind."""

    name: str
    architecture: str
    prefix: str
    embedding: str
    buffers: str  # what older files hold beside the parameters
    read: Callable[[_Fields], GPTConfig]
    write: Callable[[GPTConfig], dict[str, Any]]
    entries: Callable[[GPTConfig], list[Entry]]


_ACTIVATIONS: Mapping[str, str] = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
}
_FAMILIES: Mapping[str, _Family] = {
    "gpt2": _Family(
        "gpt2",
        "GPT2LMHeadModel",
        "transformer.",
        "transformer.wte.weight",
        r"\.attn\.(masked_)?bias$",
        _read_gpt2,
        _write_gpt2,
        _entries_gpt2,
    ),
    "llama": _Family(
        "llama",
        "LlamaForCausalLM",
        "model.",
        "model.embed_tokens.weight",
        r"\.rotary_emb\.inv_freq$",
        _read_llama,
        _write_llama,
        _entries_llama,
    ),
}
